"""A driver's queue with a pool, and the device's queue over the same memory: what every benchmark of a ring starts from."""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field

from virtio._core import BufferPool, DeviceQueue, DriverQueue, GuestMemory, Memory
from virtio.spec import Feature

BASE = 1 << 32
"""Where the device sees the driver's memory."""

FORMATS = {"split": 0, "packed": 1 << Feature.RING_PACKED}


def features_of(ring_format: str, *extra: Feature) -> int:
    """The accepted bits of a ring of this format, with `extra`; EVENT_IDX always. ValueError: not "split" or "packed"."""
    if ring_format not in FORMATS:
        raise ValueError(f"ring format {ring_format!r} is not one of {', '.join(FORMATS)}")
    return FORMATS[ring_format] | 1 << Feature.EVENT_IDX | sum(1 << bit for bit in extra)


@dataclass
class Near:
    """The driver's side: its memory, a queue, and a pool of two rings and a burst."""

    ring_format: str
    size: int = 256
    burst: int = 64
    extra: Iterable[Feature] = ()
    memory: Memory = field(init=False)
    queue: DriverQueue = field(init=False)
    pool: BufferPool = field(init=False)
    features: int = field(init=False)

    def __post_init__(self) -> None:
        self.features = features_of(self.ring_format, *self.extra)
        slots = 2 * self.size + self.burst
        self.memory = Memory(slots * 2048 + (1 << 20))
        self.queue = DriverQueue(self.memory, self.size, features=self.features, address=BASE)
        self.pool = BufferPool(self.memory, slots)

    def far(self) -> "Far":
        """The device's side, in this process or in a child."""
        return Far(self)


class Far:
    """The device's side: a queue over the driver's memory, and a pool of its own."""

    def __init__(self, near: Near) -> None:
        self.guest = GuestMemory()
        self.guest.add(BASE, near.memory)
        self.queue = DeviceQueue(self.guest, near.size, near.queue.areas, features=near.features)
        slots = 2 * near.size + near.burst
        self.memory = Memory(slots * 2048 + 4096)
        self.pool = BufferPool(self.memory, slots)


def pin(core: int) -> None:
    """Ties this process to one core. OSError: there is no such core."""
    os.sched_setaffinity(0, {core})
