"""What both raw formats share: memory by the device's addresses, and where the three areas lie. No rule of the ring is known here."""

from typing import SupportsIndex

from virtio import arguments
from virtio._core import GuestMemory, Memory, layout
from virtio.spec import DESCRIPTOR_SIZE

Segment = tuple[int, int, bool]
"""(address, length in bytes, whether the device may write it)."""

Areas = tuple[int, int, int]
"""Addresses of the descriptor, driver and device area, as the device sees them (2.6)."""


def fits(name: str, value: int, bits: int) -> int:
    """`value`, if it fits in a field of so many bits. ValueError: it does not, and would change the field beside it."""
    if not 0 <= arguments.number(name, value) < 1 << bits:
        raise ValueError(f"{name} {value} does not fit in {bits} bits")
    return value


class Window:
    """Memory by the addresses that the device uses, whichever side looks at it.

    A `GuestMemory` has them already; a `Memory` has its first byte at `address`.
    """

    def __init__(self, memory: Memory | GuestMemory, address: int = 0) -> None:
        if not isinstance(memory, Memory | GuestMemory):
            raise arguments.wrong_type("memory", memory, "a Memory or a GuestMemory")
        if isinstance(memory, GuestMemory) and address:
            raise ValueError(f"a GuestMemory has its own addresses; address must be 0, not {address:#x}")
        self.memory = memory
        self.address = address

    def load(self, address: int, width: int) -> int:
        """One aligned little-endian load of `width` bytes (1, 2, 4 or 8)."""
        return self.memory.load(address - self.address, width)

    def store(self, address: int, width: int, value: int) -> None:
        """One aligned little-endian store of `width` bytes (1, 2, 4 or 8)."""
        self.memory.store(address - self.address, width, value)

    def read(self, address: int, length: int) -> bytes:
        """A copy of `length` bytes."""
        return self.memory.read(address - self.address, length)

    def write(self, address: int, data: bytes) -> None:
        """Writes `data`, in any order and width: for buffers, not for rings."""
        self.memory.write(address - self.address, data)

    def allocate(self, features: SupportsIndex, size: int) -> Areas:
        """Room for the three areas of a queue of `size`, zeroed. TypeError on a `GuestMemory`: only a driver owns memory."""
        if isinstance(self.memory, GuestMemory):
            raise TypeError("areas can be allocated in a Memory only; give the areas of a GuestMemory")
        places = []
        for length, align in layout(size, features=features):
            offset = self.memory.allocate(length, align)
            self.memory.write(offset, bytes(length))
            places.append(self.address + offset)
        descriptor, driver, device = places
        return descriptor, driver, device


class RawRing:
    """Three areas in memory and a size. No rule of the ring is checked, only that a value fits in its field and a place is in the ring."""

    features: SupportsIndex = 0

    def __init__(self, memory: Memory | GuestMemory, size: int, areas: Areas | None = None, *, address: int = 0) -> None:
        """A ring of `size` entries at `areas`; without them, areas are allocated and zeroed. `address`: of a `Memory`'s first byte."""
        self.window = Window(memory, address)
        self.size = size
        self.areas = self.window.allocate(self.features, size) if areas is None else areas

    def descriptor_place(self, position: int) -> int:
        """The address of a descriptor. ValueError: there is no such position."""
        if not 0 <= arguments.number("descriptor", position) < self.size:
            raise ValueError(f"descriptor {position} is not in 0 to {self.size - 1}")
        return self.areas[0] + DESCRIPTOR_SIZE * position
