"""A packed virtqueue by hand (2.8). `PackedRing` is the memory, field by field; the two sides add helpers for legal steps.

Widths: a descriptor is two 64-bit words (address; length, id and flags), so that its flags and what they guard become visible together; an
event suppression structure is one 32-bit word. Flags and numbers are taken as they are.
"""

from collections.abc import Sequence
from typing import NamedTuple

from virtio._core import GuestMemory, Memory
from virtio.features import Features
from virtio.spec import DESCRIPTOR_SIZE, DescriptorFlag, Feature, RingEvent
from virtio.testing.raw import Areas, RawRing, Segment, fits


class PackedDescriptor(NamedTuple):
    """An entry of the descriptor ring (2.8.13), made available or used."""

    address: int
    length: int
    id: int = 0
    flags: int = 0

    @property
    def word(self) -> int:
        """Length, id and flags as the one 64-bit word that makes them visible. ValueError: one of them does not fit."""
        return fits("length", self.length, 32) | fits("id", self.id, 16) << 32 | fits("flags", self.flags, 16) << 48


class PackedEvent(NamedTuple):
    """An event suppression structure (2.8.14). `flags` is two bits wide, `offset` fifteen, `wrap` one."""

    flags: int = RingEvent.ENABLE
    offset: int = 0
    wrap: int = 0

    @property
    def word(self) -> int:
        """The structure as one 32-bit word. ValueError: a field does not fit (`flags` may take all of its 16 bits)."""
        return fits("offset", self.offset, 15) | fits("wrap", self.wrap, 1) << 15 | fits("flags", self.flags, 16) << 16

    @classmethod
    def from_word(cls, word: int) -> "PackedEvent":
        """The reverse of `word`; the reserved bits are left out."""
        return cls(word >> 16 & 3, word & 0x7FFF, word >> 15 & 1)


def available_flags(wrap: int) -> int:
    """AVAIL and USED of a descriptor that is available, in a lap with this wrap counter (2.8.1)."""
    return DescriptorFlag.AVAIL if wrap else DescriptorFlag.USED


def used_flags(wrap: int) -> int:
    """AVAIL and USED of a descriptor that was used, in a lap with this wrap counter (2.8.1)."""
    return DescriptorFlag.AVAIL | DescriptorFlag.USED if wrap else 0


class PackedRing(RawRing):
    """Every field of a packed virtqueue, to be read and written by either side."""

    features = Features({Feature.RING_PACKED})

    def descriptor(self, position: int) -> PackedDescriptor:
        """The descriptor at `position`: the word with the flags is read first."""
        place = self.descriptor_place(position)
        word = self.window.load(place + 8, 8)
        return PackedDescriptor(self.window.load(place, 8), word & 0xFFFF_FFFF, word >> 32 & 0xFFFF, word >> 48)

    def set_descriptor(self, position: int, address: int, length: int, id: int = 0, flags: int = 0) -> None:
        """Writes the descriptor at `position`: the address first, then length, id and flags at once."""
        place = self.descriptor_place(position)
        word = PackedDescriptor(address, length, id, flags).word
        self.window.store(place, 8, fits("address", address, 64))
        self.window.store(place + 8, 8, word)

    def set_flags(self, position: int, flags: int) -> None:
        """Writes the flags at `position` and leaves id and length as they are."""
        place = self.descriptor_place(position) + 8
        self.window.store(place, 8, self.window.load(place, 8) & 0xFFFF_FFFF_FFFF | fits("flags", flags, 16) << 48)

    @property
    def driver_event(self) -> PackedEvent:
        """Driver event suppression: which used buffer notifications the driver wants (2.8.10)."""
        return PackedEvent.from_word(self.window.load(self.areas[1], 4))

    @driver_event.setter
    def driver_event(self, event: PackedEvent) -> None:
        self.window.store(self.areas[1], 4, event.word)

    @property
    def device_event(self) -> PackedEvent:
        """Device event suppression: which available buffer notifications the device wants (2.8.10)."""
        return PackedEvent.from_word(self.window.load(self.areas[2], 4))

    @device_event.setter
    def device_event(self, event: PackedEvent) -> None:
        self.window.store(self.areas[2], 4, event.word)

    def step(self, position: int, wrap: int, slots: int) -> tuple[int, int]:
        """(position, wrap counter) `slots` further on: the counter toggles at the ring's size (2.8.1)."""
        laps, position = divmod(position + slots, self.size)
        return position, wrap ^ (laps & 1)


class RawPackedDriver(PackedRing):
    """The driver's side: whatever it writes, a device must survive."""

    def __init__(self, memory: Memory | GuestMemory, size: int, areas: Areas | None = None, *, address: int = 0) -> None:
        super().__init__(memory, size, areas, address=address)
        self.position, self.wrap = 0, 1
        """Where `add` writes next, and the driver's wrap counter there."""
        self.used_position, self.used_wrap = 0, 1
        """Where `used` looks next, and the wrap counter there."""
        self.slots: dict[int, int] = {}
        """Ring slots of each chain added, by buffer id."""

    def add(self, segments: Sequence[Segment], id: int = 0, *, visible: bool = True) -> int:
        """Writes a legal list behind the last one, its first descriptor last; returns that one's position.

        With `visible=False` the first descriptor keeps flags that mean "not available" until `make_available` is called with its position.
        """
        if not segments:
            raise ValueError("a chain needs at least one segment")
        head, head_wrap = self.position, self.wrap
        later = []
        for number, (address, length, writable) in enumerate(segments):
            flags = (DescriptorFlag.WRITE if writable else 0) | (DescriptorFlag.NEXT if number + 1 < len(segments) else 0)
            later.append((self.position, address, length, id, flags | available_flags(self.wrap)))
            self.position, self.wrap = self.step(self.position, self.wrap, 1)
        for descriptor in reversed(later if visible else later[1:]):
            self.set_descriptor(*descriptor)
        if not visible:
            position, address, length, id, flags = later[0]
            self.set_descriptor(position, address, length, id, flags ^ available_flags(head_wrap) | used_flags(1 - head_wrap))
        self.slots[id] = len(segments)
        return head

    def add_indirect(self, table: int, segments: Sequence[Segment], id: int = 0) -> int:
        """Writes an indirect table at address `table` and one available descriptor that refers to it (2.8.7); returns its position."""
        position = self.position
        self.set_descriptor(position, table, self.write_table(table, segments), id, DescriptorFlag.INDIRECT | available_flags(self.wrap))
        self.position, self.wrap = self.step(position, self.wrap, 1)
        self.slots[id] = 1
        return position

    def write_table(self, table: int, segments: Sequence[Segment]) -> int:
        """Writes a legal indirect table at address `table`: only WRITE counts there; returns its bytes."""
        for number, (address, length, writable) in enumerate(segments):
            word = PackedDescriptor(address, length, 0, DescriptorFlag.WRITE if writable else 0).word
            self.window.write(table + DESCRIPTOR_SIZE * number, address.to_bytes(8, "little") + word.to_bytes(8, "little"))
        return DESCRIPTOR_SIZE * len(segments)

    def make_available(self, *positions: int) -> None:
        """Turns the descriptors at these positions into available ones, the first position last."""
        for position in reversed(positions):
            flags = self.descriptor(position).flags
            keep = flags & ~(DescriptorFlag.AVAIL | DescriptorFlag.USED)
            lap = self.wrap if position < self.position else 1 - self.wrap
            self.set_flags(position, keep | available_flags(lap))

    def used(self) -> list[tuple[int, int]]:
        """(id, length) of every buffer that was used since the last call; ends at an id that was never added."""
        found: list[tuple[int, int]] = []
        while True:
            descriptor = self.descriptor(self.used_position)
            if descriptor.flags & used_flags(1) != used_flags(self.used_wrap):
                return found
            found.append((descriptor.id, descriptor.length))
            if descriptor.id not in self.slots:
                return found
            self.used_position, self.used_wrap = self.step(self.used_position, self.used_wrap, self.slots.pop(descriptor.id))


class RawPackedDevice(PackedRing):
    """The device's side: whatever it writes, a driver must survive."""

    def __init__(self, memory: Memory | GuestMemory, size: int, areas: Areas | None = None, *, address: int = 0) -> None:
        super().__init__(memory, size, areas, address=address)
        self.position, self.wrap = 0, 1
        """Where `use` writes next, and the device's wrap counter there."""
        self.avail_position, self.avail_wrap = 0, 1
        """Where `available` looks next, and the wrap counter there."""

    def available(self) -> list[list[PackedDescriptor]]:
        """Every list of descriptors that was made available since the last call; the buffer id stands in a list's last one."""
        lists: list[list[PackedDescriptor]] = []
        while True:
            descriptor = self.descriptor(self.avail_position)
            if descriptor.flags & used_flags(1) != available_flags(self.avail_wrap):
                return lists
            found: list[PackedDescriptor] = []
            while not found or (found[-1].flags & DescriptorFlag.NEXT and len(found) < self.size):
                found.append(self.descriptor(self.avail_position))
                self.avail_position, self.avail_wrap = self.step(self.avail_position, self.avail_wrap, 1)
            lists.append(found)

    def use(self, id: int, length: int = 0, *, slots: int = 1, flags: int | None = None) -> None:
        """Writes one used descriptor and goes on by `slots`, which a device knows from the list that it used.

        `flags` default to AVAIL and USED as the wrap counter says, with WRITE if the length is not 0.
        """
        if flags is None:
            flags = used_flags(self.wrap) | (DescriptorFlag.WRITE if length else 0)
        self.set_descriptor(self.position, 0, length, id, flags)
        self.position, self.wrap = self.step(self.position, self.wrap, slots)
