"""A split virtqueue by hand (2.7). `SplitRing` is the memory, field by field; the two sides add helpers for legal steps.

Widths: a descriptor is two 64-bit words, flags, indexes and avail elements are 16 bits, each half of a used element 32. Flags and numbers
are taken as they are, `DescriptorFlag` and friends in `virtio.spec` name the legal ones.
"""

from collections.abc import Sequence
from typing import NamedTuple

from virtio._core import GuestMemory, Memory
from virtio.spec import DESCRIPTOR_SIZE, RING_HEADER_SIZE, USED_ELEMENT_SIZE, DescriptorFlag
from virtio.testing.raw import Areas, RawRing, Segment, Window, fits

_WRAP = 1 << 16


class SplitDescriptor(NamedTuple):
    """An entry of the descriptor table (2.7.5)."""

    address: int
    length: int
    flags: int = 0
    next: int = 0


def write_descriptor(window: Window, address: int, descriptor: SplitDescriptor) -> None:
    """Writes a descriptor anywhere, for instance into an indirect table. ValueError: a field's value does not fit."""
    fits("address", descriptor.address, 64)
    length, flags = fits("length", descriptor.length, 32), fits("flags", descriptor.flags, 16)
    rest = length | flags << 32 | fits("next", descriptor.next, 16) << 48
    if address % 8:  # an indirect table needs no alignment
        window.write(address, descriptor.address.to_bytes(8, "little") + rest.to_bytes(8, "little"))
    else:
        window.store(address, 8, descriptor.address)
        window.store(address + 8, 8, rest)


class SplitRing(RawRing):
    """Every field of a split virtqueue, to be read and written by either side."""

    def descriptor(self, index: int) -> SplitDescriptor:
        """Entry `index` of the descriptor table."""
        place = self.descriptor_place(index)
        rest = self.window.load(place + 8, 8)
        return SplitDescriptor(self.window.load(place, 8), rest & 0xFFFF_FFFF, rest >> 32 & 0xFFFF, rest >> 48)

    def set_descriptor(self, index: int, address: int, length: int, flags: int = 0, next: int = 0) -> None:
        """Writes entry `index` of the descriptor table."""
        write_descriptor(self.window, self.descriptor_place(index), SplitDescriptor(address, length, flags, next))

    @property
    def avail_flags(self) -> int:
        """Flags of the avail ring (2.7.6)."""
        return self.window.load(self.areas[1], 2)

    @avail_flags.setter
    def avail_flags(self, value: int) -> None:
        self.window.store(self.areas[1], 2, value)

    @property
    def avail_idx(self) -> int:
        """idx of the avail ring (2.7.6): one 16-bit access; setting it makes elements available."""
        return self.window.load(self.areas[1] + 2, 2)

    @avail_idx.setter
    def avail_idx(self, value: int) -> None:
        self.window.store(self.areas[1] + 2, 2, value % _WRAP)

    def avail_element(self, position: int) -> int:
        """The head at `position` (below the size, or an index reduced to it) of the avail ring."""
        return self.window.load(self.areas[1] + RING_HEADER_SIZE + 2 * (position % self.size), 2)

    def set_avail_element(self, position: int, head: int) -> None:
        """Writes a head into the avail ring."""
        self.window.store(self.areas[1] + RING_HEADER_SIZE + 2 * (position % self.size), 2, head)

    @property
    def used_event(self) -> int:
        """used_event, behind the avail ring (2.7.7): the driver wants a notification when used idx passes it."""
        return self.window.load(self.areas[1] + RING_HEADER_SIZE + 2 * self.size, 2)

    @used_event.setter
    def used_event(self, value: int) -> None:
        self.window.store(self.areas[1] + RING_HEADER_SIZE + 2 * self.size, 2, value % _WRAP)

    @property
    def used_flags(self) -> int:
        """Flags of the used ring (2.7.8)."""
        return self.window.load(self.areas[2], 2)

    @used_flags.setter
    def used_flags(self, value: int) -> None:
        self.window.store(self.areas[2], 2, value)

    @property
    def used_idx(self) -> int:
        """idx of the used ring (2.7.8): one 16-bit access; setting it makes elements used."""
        return self.window.load(self.areas[2] + 2, 2)

    @used_idx.setter
    def used_idx(self, value: int) -> None:
        self.window.store(self.areas[2] + 2, 2, value % _WRAP)

    def used_element(self, position: int) -> tuple[int, int]:
        """(id, length) at `position` (below the size, or an index reduced to it) of the used ring."""
        place = self.areas[2] + RING_HEADER_SIZE + USED_ELEMENT_SIZE * (position % self.size)
        return self.window.load(place, 4), self.window.load(place + 4, 4)

    def set_used_element(self, position: int, id: int, length: int) -> None:
        """Writes an element of the used ring, both halves 32 bits."""
        place = self.areas[2] + RING_HEADER_SIZE + USED_ELEMENT_SIZE * (position % self.size)
        self.window.store(place, 4, id)
        self.window.store(place + 4, 4, length)

    @property
    def avail_event(self) -> int:
        """avail_event, behind the used ring (2.7.10): the device wants a notification when avail idx passes it."""
        return self.window.load(self.areas[2] + RING_HEADER_SIZE + USED_ELEMENT_SIZE * self.size, 2)

    @avail_event.setter
    def avail_event(self, value: int) -> None:
        self.window.store(self.areas[2] + RING_HEADER_SIZE + USED_ELEMENT_SIZE * self.size, 2, value % _WRAP)


class RawSplitDriver(SplitRing):
    """The driver's side: whatever it writes, a device must survive."""

    def __init__(self, memory: Memory | GuestMemory, size: int, areas: Areas | None = None, *, address: int = 0) -> None:
        super().__init__(memory, size, areas, address=address)
        self.next_descriptor = 0
        """Where `add` writes next; it goes round and round and looks at nothing."""
        self.used_position = 0
        """Used index up to which `used` has read."""

    def add(self, segments: Sequence[Segment]) -> int:
        """Writes a legal chain into the descriptor table; returns its head. Nobody sees it before `make_available`."""
        if not segments:
            raise ValueError("a chain needs at least one segment")
        places = [(self.next_descriptor + i) % self.size for i in range(len(segments))]
        for number, (address, length, writable) in enumerate(segments):
            last = number == len(segments) - 1
            flags = (DescriptorFlag.WRITE if writable else 0) | (0 if last else DescriptorFlag.NEXT)
            self.set_descriptor(places[number], address, length, flags, 0 if last else places[number + 1])
        self.next_descriptor = (self.next_descriptor + len(segments)) % self.size
        return places[0]

    def add_indirect(self, table: int, segments: Sequence[Segment]) -> int:
        """Writes an indirect table at address `table` and one descriptor that refers to it (2.7.5.3); returns the head."""
        head = self.next_descriptor
        self.set_descriptor(head, table, self.write_table(table, segments), DescriptorFlag.INDIRECT)
        self.next_descriptor = (head + 1) % self.size
        return head

    def write_table(self, table: int, segments: Sequence[Segment]) -> int:
        """Writes a legal indirect table at address `table`, next fields in order; returns its bytes."""
        for number, (address, length, writable) in enumerate(segments):
            more = number + 1 < len(segments)
            flags = (DescriptorFlag.WRITE if writable else 0) | (DescriptorFlag.NEXT if more else 0)
            descriptor = SplitDescriptor(address, length, flags, number + 1 if more else 0)
            write_descriptor(self.window, table + DESCRIPTOR_SIZE * number, descriptor)
        return DESCRIPTOR_SIZE * len(segments)

    def make_available(self, *heads: int) -> None:
        """Writes the heads behind the present idx, then the idx, once."""
        index = self.avail_idx
        for number, head in enumerate(heads):
            self.set_avail_element(index + number, head)
        self.avail_idx = index + len(heads)

    def used(self) -> list[tuple[int, int]]:
        """(id, length) of every element that was used since the last call."""
        count = (self.used_idx - self.used_position) % _WRAP
        elements = [self.used_element(self.used_position + i) for i in range(count)]
        self.used_position = (self.used_position + count) % _WRAP
        return elements


class RawSplitDevice(SplitRing):
    """The device's side: whatever it writes, a driver must survive."""

    def __init__(self, memory: Memory | GuestMemory, size: int, areas: Areas | None = None, *, address: int = 0) -> None:
        super().__init__(memory, size, areas, address=address)
        self.avail_position = 0
        """Avail index up to which `available` has read."""

    def available(self) -> list[int]:
        """The head of every chain that was made available since the last call."""
        count = (self.avail_idx - self.avail_position) % _WRAP
        heads = [self.avail_element(self.avail_position + i) for i in range(count)]
        self.avail_position = (self.avail_position + count) % _WRAP
        return heads

    def chain(self, head: int) -> list[SplitDescriptor]:
        """The descriptors from `head` on, at most as many as the ring has. An indirect one is not followed."""
        found = [self.descriptor(head)]
        while found[-1].flags & DescriptorFlag.NEXT and len(found) < self.size:
            found.append(self.descriptor(found[-1].next))
        return found

    def table(self, descriptor: SplitDescriptor) -> list[SplitDescriptor]:
        """All entries of the indirect table that `descriptor` refers to."""
        entries = []
        for place in range(descriptor.address, descriptor.address + descriptor.length, DESCRIPTOR_SIZE):
            address, rest = (int.from_bytes(self.window.read(place + i, 8), "little") for i in (0, 8))
            entries.append(SplitDescriptor(address, rest & 0xFFFF_FFFF, rest >> 32 & 0xFFFF, rest >> 48))
        return entries

    def use(self, id: int, length: int = 0) -> None:
        """Writes one used element behind the present idx, then the idx."""
        index = self.used_idx
        self.set_used_element(index, id, length)
        self.used_idx = index + 1
