"""Numbered frames, many at a time, between our driver and somebody else's device; each is looked at."""

import time
import zlib

import numpy as np

from virtio import NetDriver

LIMIT = 60.0
"""Seconds without a frame that are too many."""
OURS, THEIRS = bytes.fromhex("020000000001"), bytes.fromhex("020000000002")
NUMBER = slice(16, 24)
"""Where a frame's number stands in it."""


def frame(number: int, length: int, *, swapped: bool = False) -> bytes:
    """A whole frame as it goes out, or as it comes back with its addresses swapped."""
    addresses = OURS + THEIRS if swapped else THEIRS + OURS
    return addresses + b"\x88\xb5\0\0" + number.to_bytes(8, "big") + bytes(number * 7 + k & 0xFF for k in range(length - 24))


class Traffic:
    """Sends numbered frames of one length over `net` in bursts, and takes back what a device with `macswap` returns."""

    def __init__(self, net: NetDriver, length: int = 60, *, window: int = 128) -> None:
        self.net, self.length, self.window = net, length, window
        self.sent = self.received = 0
        self._out, self._in = net.pool.burst(32), net.pool.burst(32)

    def send(self) -> None:
        """One burst, whole."""
        net, burst = self.net, self._out
        end = time.monotonic() + LIMIT
        while net.take(burst) < burst.capacity:
            assert time.monotonic() < end, "no room came"
        burst.lengths[:] = self.length
        burst.write(frame(0, self.length))
        numbers = np.arange(self.sent, self.sent + burst.count, dtype=">u8")
        net.pool.frames[burst.slots[: burst.count], NUMBER] = numbers.view(np.uint8).reshape(-1, 8)
        if not self.sent % 1024:  # a sample, with contents of its own
            net.pool.frames[burst.slots[0], : self.length] = np.frombuffer(frame(self.sent, self.length), np.uint8)
        self.sent += burst.count
        while len(burst):
            net.send(burst)
            assert time.monotonic() < end, "no room came"

    def receive(self) -> int:
        """What came, in order; how many."""
        net, burst = self.net, self._in
        count = net.receive(burst)
        if count:
            assert (burst.lengths[:count] == self.length).all() and not burst.more[:count].any()
            numbers = net.pool.frames[burst.slots[:count], NUMBER].copy().view(">u8")[:, 0]
            assert (numbers == np.arange(self.received, self.received + count)).all(), numbers
            for row in np.flatnonzero(numbers % 1024 == 0):
                expected = frame(int(numbers[row]), self.length, swapped=True)
                found = net.pool.frames[burst.slots[row], : self.length].tobytes()
                assert zlib.crc32(found) == zlib.crc32(expected)
            self.received += count
        return int(count)

    def swap(self, total: int) -> None:
        """Sends `total` more, and gets them all back."""
        total += self.sent
        last = time.monotonic()
        while self.received < total:
            if self.sent < total and self.sent - self.received <= self.window - self._out.capacity:
                self.send()
            if self.receive():
                last = time.monotonic()
            elif self.sent - self.received > self.window - self._out.capacity or self.sent >= total:
                self.net.wait(1.0)
                assert time.monotonic() < last + LIMIT, f"{self.received} of {self.sent} came back"
