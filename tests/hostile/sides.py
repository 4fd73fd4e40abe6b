"""The two stages on which hostile ends are played: one end is the library's queue, the other is a raw ring in the test's hands."""

import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import pytest

from virtio import (
    BadUsedElement,
    BufferPool,
    Burst,
    Chain,
    DeviceQueue,
    DriverQueue,
    EventFd,
    Feature,
    Features,
    GuestMemory,
    MalformedChain,
    Memory,
    SpecViolation,
    StatusError,
)
from virtio.spec import DescriptorFlag
from virtio.testing import RawPackedDevice, RawPackedDriver, RawSplitDevice, RawSplitDriver, Segment
from virtio.testing.packed import available_flags

BASE = 1 << 32
"""Where the device sees the driver's memory: far from 0, so that an offset taken for an address is noticed."""
MEMORY = 1 << 18
BUFFERS = BASE + MEMORY // 2
"""Buffers lie in the upper half, rings in the lower one."""
PAYLOAD = 16
WRITE, NEXT, INDIRECT = DescriptorFlag.WRITE, DescriptorFlag.NEXT, DescriptorFlag.INDIRECT

DEVICE_PATHS = ("token", "batch", "burst", "fill")
DRIVER_PATHS = ("token", "burst")

Descriptor = tuple[int, int, int]
"""(address, length, flags), as it is to stand in a ring or table."""


def features(ring_format: str, *more: Feature) -> Features:
    """What was negotiated: the format's bit, and more."""
    return Features({Feature.VERSION_1, *more, *([Feature.RING_PACKED] if ring_format == "packed" else [])})


def raises_once(kind: type[SpecViolation], error: SpecViolation, ring_format: str, numbers: Iterable[int]) -> None:
    """The violation is of this kind, has these numbers and a section of the format, and says both."""
    assert type(error) is kind
    assert re.fullmatch(r"2\.(6|7|8)(\.\d+)*", error.section), error.section
    if ring_format == "packed":
        assert not error.section.startswith("2.7."), f"{error.section} is about split rings: {error}"
    for number in numbers:
        assert re.search(rf"\b({number}|{number:#x})\b", error.message), f"{number} is not in: {error}"
    assert str(error) == f"{error.message} ({error.section})"


class DeviceSide:
    """A device's queue over memory and a ring that a hostile driver writes."""

    def __init__(self, ring_format: str, *more: Feature, size: int = 8, **options: Any) -> None:
        self.ring_format = ring_format
        self.memory = Memory(MEMORY)
        self.guest = GuestMemory()
        self.guest.add(BASE, self.memory)
        raw = RawPackedDriver if ring_format == "packed" else RawSplitDriver
        self.ring = raw(self.memory, size, address=BASE)
        self.options = {"features": features(ring_format, *more), **options}
        self.pool = BufferPool(Memory(1 << 20), 256, slot_size=256)
        self.bursts: list[Burst] = []
        self.chains: list[Chain] = []
        self.interrupt = EventFd()
        self.ids = 0
        self.restart()

    def restart(self, **options: Any) -> None:
        """A new queue over the same ring."""
        self.queue = DeviceQueue(self.guest, self.ring.size, self.ring.areas, **{**self.options, **options})
        self.queue.connect(self.interrupt)
        self.batch = self.queue.batch(self.ring.size)

    @property
    def split(self) -> RawSplitDriver:
        assert isinstance(self.ring, RawSplitDriver)
        return self.ring

    @property
    def packed(self) -> RawPackedDriver:
        assert isinstance(self.ring, RawPackedDriver)
        return self.ring

    def buffer(self, path: str = "token", number: int = 0) -> list[Segment]:
        """A legal buffer that `path` can carry."""
        return [(BUFFERS + PAYLOAD * number, PAYLOAD, path == "fill")]

    def offer(self, *buffers: Sequence[Segment]) -> list[int]:
        """Makes legal chains available; returns their heads (split) or ids (packed)."""
        names = []
        for segments in buffers:
            if isinstance(self.ring, RawPackedDriver):
                names.append(self.ids)
                self.ring.add(segments, self.ids)
                self.ids = (self.ids + 1) % 65536
            else:
                names.append(self.ring.add(segments))
        if isinstance(self.ring, RawSplitDriver):
            self.ring.make_available(*names)
        return names

    def offer_list(self, *descriptors: Descriptor, id: int = 0) -> int:
        """Makes one list of descriptors available as it stands, each linked to the next; returns where the first one is."""
        ring = self.ring
        if isinstance(ring, RawPackedDriver):
            first = ring.position
            places = [ring.step(first, ring.wrap, number) for number in range(len(descriptors))]
            for (place, wrap), (address, length, flags) in reversed(list(zip(places, descriptors, strict=True))):
                ring.set_descriptor(place, address, length, id, flags | available_flags(wrap))
            ring.position, ring.wrap = ring.step(first, ring.wrap, len(descriptors))
            ring.slots[id] = len(descriptors)
            return first
        first = ring.next_descriptor
        for number, (address, length, flags) in enumerate(descriptors):
            ring.set_descriptor((first + number) % ring.size, address, length, flags, (first + number + 1) % ring.size)
        ring.next_descriptor = (first + len(descriptors)) % ring.size
        ring.make_available(first)
        return first

    def offer_table(self, table: int, length: int, flags: int = INDIRECT) -> int:
        """Makes one descriptor available that refers to a table."""
        return self.offer_list((table, length, flags))

    def write_table(self, table: int, *descriptors: tuple[int, int, int, int]) -> int:
        """Writes (address, length, flags, next or id) as a table at any address; returns its bytes."""
        for number, (address, length, flags, other) in enumerate(descriptors):
            low, high = (other, flags) if self.ring_format == "packed" else (flags, other)
            word = length | low << 32 | high << 48
            self.memory.write(table - BASE + 16 * number, address.to_bytes(8, "little") + word.to_bytes(8, "little"))
        return 16 * len(descriptors)

    def burst(self, capacity: int = 64) -> Burst:
        """A burst that stays alive with what it holds."""
        self.bursts.append(self.pool.burst(capacity))
        return self.bursts[-1]

    def take(self, path: str, limit: int | None = None) -> int:
        """Takes all chains that are there (or `limit`) by one of the four paths; tells how many."""
        if path == "token":
            chains = self.queue.pop(limit)
            self.chains += chains
            return len(chains)
        if path == "batch":
            self.batch = self.queue.batch(limit or self.ring.size)
            return self.queue.pop_batch(self.batch)
        burst = self.burst(limit or 64)
        if path == "burst":
            return self.queue.pop_burst(burst)
        self.pool.take(burst)
        burst.count = min(burst.count, 2 * self.ring.size)
        burst.lengths[:] = PAYLOAD
        return self.queue.fill_burst(burst)

    def state(self) -> tuple[Any, ...]:
        """All that a refused call must leave alone."""
        return (self.queue.snapshot(), self.queue.counters, self.queue.outstanding, self.queue.base, self.memory.read(0, MEMORY // 2))

    def breaks(self, path: str, *numbers: int) -> SpecViolation:
        """Taking by `path` meets the driver's mistake: it is raised once, kept, and nothing moves any more."""
        assert self.queue.broken is None
        with pytest.raises(SpecViolation) as caught:
            self.take(path)
        raises_once(MalformedChain, caught.value, self.ring_format, numbers)
        self.stands_still(caught.value)
        return caught.value

    def stands_still(self, error: SpecViolation) -> None:
        """The queue is broken by `error`, and every call says so in its way."""
        before, self.interrupt_count = self.state(), self.interrupt.drain()
        for path in DEVICE_PATHS:
            assert self.take(path) == 0
        for chain in self.chains:
            if not chain.completed:
                self.queue.complete(chain, 0)
        assert self.queue.complete_batch(self.queue.batch(4)) == 0
        assert self.queue.publish() is False
        assert self.queue.arm() is True, "whoever would sleep looks, and learns that it is broken"
        self.queue.disarm()
        assert self.queue.broken is error
        assert self.state() == before
        assert self.interrupt.drain() == 0
        free = self.pool.slots - self.pool.available
        for burst in self.bursts:
            self.pool.give(burst)
        assert self.pool.available == self.pool.slots, f"{free} slots were held by bursts"
        self.queue.reset()
        assert self.queue.broken is error
        with pytest.raises(StatusError, match="closed"):
            self.queue.pop()


class FarChain(NamedTuple):
    """A chain as a hostile device sees it."""

    id: int
    """Head (split) or buffer id (packed)."""
    slots: int
    segments: list[Segment]


class DriverSide:
    """A driver's queue whose device is played by hand."""

    def __init__(self, ring_format: str, *more: Feature, size: int = 8, **options: Any) -> None:
        self.ring_format = ring_format
        self.memory = Memory(MEMORY)
        self.queue = DriverQueue(self.memory, size, features=features(ring_format, *more), address=BASE, **options)
        raw = RawPackedDevice if ring_format == "packed" else RawSplitDevice
        self.ring = raw(self.memory, size, self.queue.areas, address=BASE)
        self.pool = BufferPool(self.memory, 64, slot_size=256)
        self.burst = self.pool.burst(64)
        self.doorbell = EventFd()
        self.queue.connect(self.doorbell)
        self.added = 0
        self.areas = self.queue.areas

    @property
    def split(self) -> RawSplitDevice:
        assert isinstance(self.ring, RawSplitDevice)
        return self.ring

    @property
    def packed(self) -> RawPackedDevice:
        assert isinstance(self.ring, RawPackedDevice)
        return self.ring

    def add(self, path: str, count: int = 1, *, writable: bool = True, publish: bool = True) -> None:
        """Adds chains of one segment of `PAYLOAD` bytes; their tokens, if they have any, count up from 0."""
        if path == "burst":
            burst = self.pool.burst(count)
            assert self.pool.take(burst) == count
            burst.lengths[:] = PAYLOAD
            assert (self.queue.add_writable_burst if writable else self.queue.add_burst)(burst) == count
            return
        for _ in range(count):
            segment = [(BUFFERS + PAYLOAD * (self.added % 1024), PAYLOAD)]
            self.queue.add(self.added, readable=() if writable else segment, writable=segment if writable else ())
            self.added += 1
        if publish:
            self.queue.publish()

    def available(self) -> list[FarChain]:
        """What the device finds, tables followed."""
        ring = self.ring
        if isinstance(ring, RawPackedDevice):
            found = []
            for chain in ring.available():
                entries: list[Any] = list(chain)
                if chain[0].flags & INDIRECT:
                    places = range(chain[0].address - BASE, chain[0].address - BASE + chain[0].length, 16)
                    words = [(self.memory.load(place, 8), self.memory.load(place + 8, 8)) for place in places]
                    segments = [(address, word & 0xFFFF_FFFF, bool(word >> 48 & WRITE)) for address, word in words]
                else:
                    segments = [(entry.address, entry.length, bool(entry.flags & WRITE)) for entry in entries]
                found.append(FarChain(chain[-1].id, len(chain), segments))
            return found
        result = []
        for head in ring.available():
            descriptors = ring.chain(head)
            table = ring.table(descriptors[0]) if descriptors[0].flags & INDIRECT else descriptors
            result.append(FarChain(head, len(descriptors), [(d.address, d.length, bool(d.flags & WRITE)) for d in table]))
        return result

    def use(self, chain: FarChain, length: int = 0) -> None:
        """Uses a chain as the rules say."""
        if isinstance(self.ring, RawPackedDevice):
            self.ring.use(chain.id, length, slots=chain.slots)
        else:
            self.ring.use(chain.id, length)

    def use_id(self, id: int, length: int = 0) -> None:
        """Uses whatever id, one slot."""
        self.ring.use(id, length)

    def scribble(self) -> None:
        """Overwrites all that a device may read: descriptors, avail ring, tables. Only what it must write stays as it is."""
        for position in range(self.ring.size):
            if isinstance(self.ring, RawSplitDevice):
                self.ring.set_descriptor(position, 0xBAD0_BAD0_BAD0_BAD0, 0xFFFF_FFFF, 0xFFFF, 0xFFFF)
                self.ring.set_avail_element(position, 0xFFFF)
            else:
                flags = self.packed.descriptor(position).flags
                self.packed.set_descriptor(position, 0xBAD0_BAD0_BAD0_BAD0, 0xFFFF_FFFF, 0xFFFF, flags ^ 7)

    def take(self, path: str) -> list[int]:
        """The lengths of all chains that came back."""
        if path == "token":
            return [length for _, length in self.queue.pop_used()]
        count = self.queue.pop_used_burst(self.burst)
        return [int(length) for length in self.burst.lengths[:count]]

    def state(self) -> tuple[Any, ...]:
        """All that a refused call, or a broken queue, must leave alone."""
        return (self.queue.snapshot(), self.queue.counters, self.queue.outstanding, self.queue.free, self.memory.read(0, MEMORY // 2))

    def breaks(self, path: str, *numbers: int) -> SpecViolation:
        """Taking by `path` meets the device's mistake: raised once, kept; what is outstanding stays with the device until reset."""
        assert self.queue.broken is None
        outstanding = self.queue.outstanding
        with pytest.raises(SpecViolation) as caught:
            self.take(path)
        raises_once(BadUsedElement, caught.value, self.ring_format, numbers)
        assert self.queue.outstanding == outstanding
        self.stands_still(path, caught.value)
        return caught.value

    def stands_still(self, path: str, error: SpecViolation) -> None:
        """The queue is broken by `error`; buffers come back at reset, all of them, and not before."""
        self.doorbell.drain()
        fresh = self.pool.burst(1)
        assert self.pool.take(fresh) == 1
        fresh.lengths[:] = PAYLOAD
        before, free_slots, outstanding = self.state(), self.pool.available, self.queue.outstanding
        assert self.take(path) == []
        if path == "burst":
            assert self.queue.add_burst(fresh) == 0 and self.queue.add_writable_burst(fresh) == 0
        else:
            with pytest.raises(StatusError, match="broken"):
                self.queue.add("more", writable=[(BUFFERS, 1)])
        assert self.queue.publish() is False
        assert self.queue.arm() is True, "whoever would sleep looks, and learns that it is broken"
        self.queue.disarm()
        assert self.queue.broken is error
        assert self.state() == before and self.pool.available == free_slots
        assert self.doorbell.drain() == 0
        tokens = self.queue.reset()
        assert self.queue.broken is error
        if path == "token":
            assert len(tokens) == outstanding
        else:
            self.pool.give(fresh)
            assert tokens == [] and self.pool.available == self.pool.slots - self.burst_slots()
        with pytest.raises(StatusError, match="closed"):
            self.queue.pop_used()

    def burst_slots(self) -> int:
        """Slots that the burst of `take` holds."""
        return self.burst.count
