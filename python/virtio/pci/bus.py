"""What firmware does to a PCI bus: find the functions, number the buses behind bridges, size BARs, give addresses, set bridges' windows.

Needed where nobody ran firmware (QEMU over qtest). Configuration space is reached through an `Access`; nothing else is assumed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple, Protocol, Self

from virtio.errors import TransportError
from virtio.pci import config
from virtio.pci.function import Bar, BarKind

HEADER_BRIDGE: Final = 1
"""Header type of a bridge between buses (PCI-to-PCI Bridge Architecture 1.2, 3.2)."""
MULTIFUNCTION: Final = 0x80
BRIDGE_BARS: Final = 2
BUS_NUMBERS: Final = 0x18
IO_WINDOW: Final = 0x1C
MEMORY_WINDOW: Final = 0x20
PREFETCHABLE_WINDOW: Final = 0x24
PREFETCHABLE_HIGH: Final = (0x28, 0x2C)
IO_HIGH: Final = 0x30

BAR_IO: Final = 1
BAR_64: Final = 4
BAR_PREFETCHABLE: Final = 8

MEGABYTE: Final = 1 << 20
IO_STEP: Final = 1 << 12
"""Bridges' windows begin and end at multiples of these: memory of 1 MiB, I/O of 4 KiB."""


class Place(NamedTuple):
    """Where a function is: bus, device (0 to 31), function (0 to 7)."""

    bus: int
    device: int
    function: int

    def __str__(self) -> str:
        return f"0000:{self.bus:02x}:{self.device:02x}.{self.function}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """From `0000:00:04.0`, or without the domain. ValueError: it is not of that form."""
        try:
            *_, bus, rest = text.split(":")
            device, function = rest.split(".")
            return cls(int(bus, 16), int(device, 16), int(function, 16))
        except ValueError:
            raise ValueError(f"{text!r} is not a PCI address such as 0000:00:04.0") from None


class Access(Protocol):
    """Configuration space of all functions. An operation is (place, offset, width, value); without a value (None) it is a read."""

    def configure(self, operations: Sequence[tuple[Place, int, int, int | None]]) -> list[int]:
        """Does them in order; returns what was read, 0 for each write."""


@dataclass
class Range:
    """Addresses to give away, upwards from `next`, below `end`."""

    next: int
    end: int

    def align(self, step: int) -> int:
        """Goes on to the next multiple of `step`."""
        self.next = -(-self.next // step) * step
        return self.next

    def take(self, size: int) -> int | None:
        """`size` bytes (a power of two) at a multiple of it; None if there is no such room."""
        start = -(-self.next // size) * size
        if start + size > self.end:
            return None
        self.next = start + size
        return start


@dataclass
class Windows:
    """What a root bus forwards: I/O ports, memory below 4 GiB, and memory above (for prefetchable 64-bit BARs)."""

    io: Range
    low: Range
    high: Range


@dataclass
class Found:
    """A function: its place, vendor and device number, and, when addresses are given, its BARs. A bridge has what is behind it."""

    place: Place
    vendor: int
    device: int
    header: int
    class_code: int
    bars: dict[int, Bar] = field(default_factory=dict)
    behind: list["Found"] = field(default_factory=list)

    def walk(self) -> Iterator["Found"]:
        """This function and all that are behind it."""
        yield self
        for found in self.behind:
            yield from found.walk()


class _Sized(NamedTuple):
    number: int
    size: int
    kind: BarKind
    prefetchable: bool


class Bus:
    """The root bus: `scan`, then `assign`."""

    def __init__(self, access: Access) -> None:
        self._access = access
        self.roots: list[Found] = []
        self._last_bus = 0

    def scan(self) -> list[Found]:
        """Numbers all buses and finds all functions, in the order of their addresses; bridges are among them."""
        self._last_bus = 0
        self.roots = self._scan(0)
        return sorted((found for root in self.roots for found in root.walk()), key=lambda found: found.place)

    def assign(self, windows: Windows) -> None:
        """Gives every BAR an address, opens the bridges' windows, and turns decoding on, with interrupt pins off.

        A BAR for which there is no room gets none, and is not among its function's `bars`.
        """
        self._assign(self.roots, windows, high=True)

    def _read(self, place: Place, offset: int, width: int) -> int:
        return self._access.configure([(place, offset, width, None)])[0]

    def _scan(self, bus: int) -> list[Found]:
        firsts = [Place(bus, device, 0) for device in range(32)]
        found: list[Found] = []
        present = [place for place, vendor in zip(firsts, self._vendors(firsts), strict=True) if vendor != 0xFFFF]
        for first in present:
            places = [first]
            if self._read(first, config.HEADER_TYPE, 1) & MULTIFUNCTION:
                others = [first._replace(function=number) for number in range(1, 8)]
                places += [place for place, vendor in zip(others, self._vendors(others), strict=True) if vendor != 0xFFFF]
            found += [self._function(place) for place in places]
        return found

    def _vendors(self, places: list[Place]) -> list[int]:
        return self._access.configure([(place, config.VENDOR_ID, 2, None) for place in places])

    def _function(self, place: Place) -> Found:
        identity, revision, header = self._access.configure(
            [(place, config.VENDOR_ID, 4, None), (place, config.REVISION, 4, None), (place, config.HEADER_TYPE, 1, None)]
        )
        found = Found(place, identity & 0xFFFF, identity >> 16, header & ~MULTIFUNCTION, revision >> 8)
        if found.header == HEADER_BRIDGE:
            if self._last_bus == 255:
                raise TransportError(f"no bus number is left for the bridge at {place}")
            self._last_bus += 1
            secondary = self._last_bus
            self._number(place, secondary, 255)  # everything goes through while what is behind it is looked for
            found.behind = self._scan(secondary)
            self._number(place, secondary, self._last_bus)
        return found

    def _number(self, place: Place, secondary: int, subordinate: int) -> None:
        self._access.configure([(place, BUS_NUMBERS, 4, place.bus | secondary << 8 | subordinate << 16)])

    def _assign(self, functions: list[Found], windows: Windows, *, high: bool) -> None:
        for found in functions:
            for sized in self._size(found):
                self._place(found, sized, windows, high=high)
            if found.header == HEADER_BRIDGE:
                self._open(found, windows, high=high)
            kinds = {bar.kind for bar in found.bars.values()}
            command = config.COMMAND_INTX_DISABLE
            if "io" in kinds or found.behind:
                command |= config.COMMAND_IO
            if kinds - {"io"} or found.behind:
                command |= config.COMMAND_MEMORY
            if found.behind:
                command |= config.COMMAND_MASTER  # a bridge forwards what comes from behind it only then
            old = self._read(found.place, config.COMMAND, 2)
            self._access.configure([(found.place, config.COMMAND, 2, old | command)])

    def _size(self, found: Found) -> Iterator[_Sized]:
        """Sizes BARs by what of all ones they keep; decoding is off meanwhile."""
        count = {0: config.BARS, HEADER_BRIDGE: BRIDGE_BARS}.get(found.header, 0)
        place, offsets = found.place, [config.BAR_0 + 4 * index for index in range(count)]
        decoding = config.COMMAND_IO | config.COMMAND_MEMORY
        command = self._read(place, config.COMMAND, 2)
        operations: list[tuple[Place, int, int, int | None]] = [(place, config.COMMAND, 2, command & ~decoding)]
        for offset in offsets:
            operations += [(place, offset, 4, None), (place, offset, 4, 0xFFFF_FFFF), (place, offset, 4, None), (place, offset, 4, 0)]
        values = self._access.configure(operations)
        masks = values[3::4]
        index = 0
        while index < count:
            kept = masks[index]
            if kept & BAR_IO:
                if mask := kept & 0xFFFC:
                    yield _Sized(index, mask & -mask, "io", False)
                index += 1
                continue
            prefetchable, wide = bool(kept & BAR_PREFETCHABLE), kept & 6 == BAR_64 and index + 1 < count
            mask = kept & ~0xF | (masks[index + 1] << 32 if wide else 0)
            if mask:
                yield _Sized(index, mask & -mask, "memory64" if wide else "memory32", prefetchable)
            index += 2 if wide else 1

    def _place(self, found: Found, bar: _Sized, windows: Windows, *, high: bool) -> None:
        if bar.kind == "io":
            address = windows.io.take(bar.size)
        else:
            above = high and bar.kind == "memory64" and bar.prefetchable
            address = (windows.high if above else windows.low).take(bar.size)
        if address is None:
            return
        offset = config.BAR_0 + 4 * bar.number
        self._access.configure([(found.place, offset, 4, address & 0xFFFF_FFFF)])
        if bar.kind == "memory64":
            self._access.configure([(found.place, offset + 4, 4, address >> 32)])
        found.bars[bar.number] = Bar(bar.number, address, bar.size, bar.kind, bar.prefetchable)

    def _open(self, bridge: Found, windows: Windows, *, high: bool) -> None:
        """Gives addresses to what is behind a bridge, and sets its windows around them. An empty one is closed (base above limit)."""
        place = bridge.place
        io_kind, prefetchable_kind = self._access.configure([(place, IO_WINDOW, 1, None), (place, PREFETCHABLE_WINDOW, 2, None)])
        wide = high and prefetchable_kind & 0xF == 1  # such BARs go below 4 GiB where the window cannot reach above
        ranges = ((windows.io, IO_STEP), (windows.low, MEGABYTE), (windows.high, MEGABYTE))
        starts = [each.align(step) for each, step in ranges]
        self._assign(bridge.behind, windows, high=wide)
        ends = [each.align(step) for each, step in ranges]
        io, low, above = (
            (start, end - 1) if end > start else (step, 0) for start, end, (_, step) in zip(starts, ends, ranges, strict=True)
        )
        operations: list[tuple[Place, int, int, int | None]] = [
            (place, IO_WINDOW, 2, io[0] >> 8 & 0xF0 | io[1] & 0xF000),
            (place, MEMORY_WINDOW, 4, low[0] >> 16 & 0xFFF0 | low[1] & 0xFFF0_0000),
            (place, PREFETCHABLE_WINDOW, 4, above[0] >> 16 & 0xFFF0 | above[1] & 0xFFF0_0000),
        ]
        if prefetchable_kind & 0xF == 1:
            operations += [(place, offset, 4, number >> 32) for offset, number in zip(PREFETCHABLE_HIGH, above, strict=True)]
        if io_kind & 0xF == 1:
            operations.append((place, IO_HIGH, 4, io[0] >> 16 | io[1] & 0xFFFF_0000))
        self._access.configure(operations)
