"""A split ring in plain Python, both ends in one thread: what a packet costs when each is a Python statement. Prints nanoseconds a buffer.

It checks nothing, decides no notification and has one segment a buffer: a lower bound for rings in pure Python.
"""

import statistics
import struct
import sys
import time

SIZE, SLOT = 256, 2048
DESCRIPTOR = struct.Struct("<QIHH")


class PlainRing:
    def __init__(self) -> None:
        self.descriptors = bytearray(16 * SIZE)
        self.avail = memoryview(bytearray(4 + 2 * SIZE)).cast("H")
        self.used = memoryview(bytearray(4 + 8 * SIZE)).cast("I")
        self.slots = memoryview(bytearray(SIZE * SLOT))
        self.free = list(range(SIZE))
        self.tokens: list[object] = [None] * SIZE
        self.added = self.taken = self.reclaimed = 0

    def add(self, frames: list[bytes]) -> None:
        pack = DESCRIPTOR.pack_into
        avail, slots, descriptors, index = self.avail, self.slots, self.descriptors, self.added
        for frame in frames:
            slot = self.free.pop()
            start = slot * SLOT
            slots[start : start + len(frame)] = frame
            pack(descriptors, 16 * slot, start, len(frame), 0, 0)
            avail[2 + index % SIZE] = slot
            self.tokens[slot] = frame
            index = (index + 1) & 0xFFFF
        avail[1] = self.added = index

    def serve(self) -> list[bytes]:
        unpack = DESCRIPTOR.unpack_from
        used, index, end = self.used, self.taken, self.avail[1]
        out = []
        while index != end:
            head = self.avail[2 + index % SIZE]
            start, length, _, _ = unpack(self.descriptors, 16 * head)
            out.append(bytes(self.slots[start : start + length]))
            at = 1 + 2 * (index % SIZE)
            used[at], used[at + 1] = head, 0
            index = (index + 1) & 0xFFFF
        used[0] = index << 16
        self.taken = index
        return out

    def reclaim(self) -> int:
        end, index, count = self.used[0] >> 16, self.reclaimed, 0
        while index != end:
            head = self.used[1 + 2 * (index % SIZE)]
            self.tokens[head] = None
            self.free.append(head)
            index, count = (index + 1) & 0xFFFF, count + 1
        self.reclaimed = index
        return count


def measure(burst: int = 64, length: int = 60, total: int = 64 * 1024) -> float:
    """Nanoseconds a buffer."""
    ring, frames = PlainRing(), [bytes(length)] * burst
    start = time.perf_counter_ns()
    for _ in range(total // burst):
        ring.add(frames)
        if len(ring.serve()) != burst or ring.reclaim() != burst:
            raise RuntimeError("buffers lost")
    return (time.perf_counter_ns() - start) / (total // burst * burst)


if __name__ == "__main__":
    samples = sorted(measure() for _ in range(int(sys.argv[1]) if len(sys.argv) > 1 else 15))
    print(f"{statistics.median(samples):.0f} ({samples[0]:.0f} to {samples[-1]:.0f}, n={len(samples)})")
