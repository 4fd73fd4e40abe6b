"""Both ends of one queue in one process, over one memory, with a pool for each end: the stage of the binding's own tests."""

from typing import Any

from virtio import BufferPool, Burst, DeviceQueue, DriverQueue, Feature, Features, GuestMemory, Memory

BASE = 1 << 32
"""Where the device sees the memory: far from 0, so that an offset taken for an address is noticed."""
SLOT_SIZE = 256
PAYLOAD = SLOT_SIZE - BufferPool.HEADROOM


class Pair:
    """A driver's queue and the device's queue at the other end."""

    def __init__(self, ring_format: str, size: int = 8, *wanted: Feature, slots: int = 64, memory_size: int = 1 << 20) -> None:
        self.features = Features(wanted) | ([Feature.RING_PACKED] if ring_format == "packed" else [])
        self.memory = Memory(memory_size)
        self.guest = GuestMemory()
        self.guest.add(BASE, self.memory)
        self.driver = DriverQueue(self.memory, size, features=self.features, address=BASE)
        self.device = DeviceQueue(self.guest, size, self.driver.areas, features=self.features)
        self.pool = BufferPool(self.memory, slots, slot_size=SLOT_SIZE)
        self.own = Memory(slots * SLOT_SIZE)
        self.far = BufferPool(self.own, slots, slot_size=SLOT_SIZE)

    def place(self, data: bytes) -> tuple[int, int]:
        """(address, length) of a new segment that holds `data`."""
        offset = self.memory.allocate(len(data))
        self.memory.write(offset, data)
        return BASE + offset, len(data)

    def room(self, length: int) -> tuple[int, int]:
        """(address, length) of a new zeroed segment."""
        return self.place(bytes(length))

    def look(self, segment: tuple[int, int]) -> bytes:
        """What stands in a segment."""
        return self.guest.read(*segment)

    def state(self) -> dict[str, Any]:
        """All that a refused call must leave as it is."""
        return {
            "driver": (self.driver.snapshot(), self.driver.counters, self.driver.free, self.driver.outstanding, self.driver.broken),
            "device": (self.device.snapshot(), self.device.counters, self.device.outstanding, self.device.broken),
            "pools": (self.pool.available, self.pool.drops, self.far.available, self.far.drops),
        }


def fill(burst: Burst, packets: list[bytes]) -> None:
    """New slots with these packets; one longer than a slot takes several rows."""
    pool = burst.pool
    taken = pool.take(burst)
    pieces = [(packet[at : at + PAYLOAD], at + PAYLOAD < len(packet)) for packet in packets for at in range(0, len(packet), PAYLOAD)]
    assert len(pieces) <= taken
    for row, (piece, more) in enumerate(pieces):
        pool.frames[burst.slots[row], : len(piece)] = list(piece)
        burst.lengths[row] = len(piece)
        burst.more[row] = more
    burst.count = len(pieces)


def packets_of(burst: Burst) -> list[bytes]:
    """The packets that stand in a burst."""
    packets = [b""]
    for row in range(burst.count):
        packets[-1] += burst.tobytes(row)
        if not burst.more[row]:
            packets.append(b"")
    assert packets.pop() == b""
    return packets
