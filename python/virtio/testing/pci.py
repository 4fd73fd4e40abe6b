"""A PCI function written by hand: every byte of configuration space and BARs, and what each read returns, is the test's.

Alone, it is bytes: what is written is read back, and nobody is behind it. Over another function, it passes everything on but for what the
test has said otherwise, so that a device tells one lie and is legal beside it:

    function = RawPciFunction(over=EmulatedFunction(RngDevice()))
    layout = function.layout                                          # where its structures are
    function.script(layout.common, Common.QUEUE_SIZE.offset, [0])     # the next read of queue_size; those after it are passed on
    function.force(None, layout.common.place + 2, bytes([8]))         # cap_len, for ever
    PciTransport(function)                                            # TransportError

A place is a BAR's number (None: configuration space) or a `Structure`, and an offset from where that begins.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from struct import pack_into
from types import MappingProxyType
from typing import Final, NamedTuple

from virtio._core import EventFd, Memory
from virtio.errors import TransportError
from virtio.pci.config import (
    BAR_0,
    CAP_VENDOR,
    CAPABILITIES,
    EXTENDED_SIZE,
    SPACE_SIZE,
    STATUS,
    STATUS_CAPABILITIES,
    VENDOR,
    VENDOR_ID,
    Layout,
    Structure,
    parse,
)
from virtio.pci.function import Bar, PciFunction
from virtio.transport import Alternating

Place = int | None | Structure
"""A BAR's number, None for configuration space, or a structure in a BAR."""


class Access(NamedTuple):
    """One access that was made: `bar` is None for configuration space; `value` is what was written, or what the read returned."""

    write: bool
    bar: int | None
    offset: int
    width: int
    value: int


class RawPciFunction:
    """Plays any function, or lies about the one that it stands `over`, and closes it.

    Without `over`: configuration space and `bars` of zeros, with the ids of virtio device type `device_type` and an empty capability list;
    BARs are given as index and size, all of them 32-bit memory. `vectors` is how many MSI-X vectors can be had, `pin` whether there is an
    interrupt pin; both raise TransportError otherwise. Offsets and widths are not checked against anything but the bytes that are there.
    """

    def __init__(
        self,
        *,
        over: PciFunction | None = None,
        device_type: int = 4,
        bars: Mapping[int, int] | None = None,
        address: str = "0000:00:05.0",
        memory: Memory | None = None,
        vectors: int = 0,
        pin: bool = True,
    ) -> None:
        self.over: Final = over
        self.address: Final = over.address if over is not None else address
        self.memory: Final = over.memory if over is not None else memory
        self.access_platform = over is not None and over.access_platform
        self.vectors = vectors
        self.pin = pin
        self.removed = False
        """Whether everything reads as all ones, and writes go nowhere."""
        self.accesses: Final[list[Access]] = []
        """Every access that was made, in order."""
        self.on_write: Callable[[int | None, int, int, int], bool] | None = None
        """Called with BAR, offset, width and value before each write; if it returns True the write is done, and goes no further."""
        self.bytes: Final[dict[int | None, bytearray]] = {None: bytearray(EXTENDED_SIZE)}
        """Configuration space (None) and BARs, where this function is alone: to be looked at and written at any moment."""
        self.handler: Callable[[], None] | None = None
        """What the driver wants called while the line is high: call it, to interrupt."""
        self.targets: list[EventFd] = []
        """The eventfds of the vectors that are enabled: signal one, to interrupt."""
        self._bars: dict[int, Bar] = {}
        self._forced: dict[tuple[int | None, int], int] = {}
        self._scripts: dict[tuple[int | None, int], Iterator[int]] = {}
        self._doorbells: dict[tuple[int, int, int, int], EventFd] = {}
        self._attached: list[Memory] = []
        self._end = 0
        self._left: int | None = None
        if over is None:
            space = self.bytes[None]
            pack_into("<HH", space, VENDOR_ID, VENDOR, 0x1040 + device_type)
            pack_into("<H", space, STATUS, STATUS_CAPABILITIES)
            for index, size in (bars or {}).items():
                self.bytes[index] = bytearray(size)
                self._bars[index] = Bar(index, 0xE000_0000 + index * 0x0100_0000, size, "memory32", False)
                pack_into("<I", space, BAR_0 + 4 * index, self._bars[index].address)
        elif isinstance(over, Alternating):
            self.serve: Callable[[], int] = over.serve

    # The test's side.

    @property
    def layout(self) -> Layout:
        """What a driver finds. TransportError: nothing it could use."""
        return parse(b"".join(self._peek(None, offset, 4).to_bytes(4, "little") for offset in range(0, SPACE_SIZE, 4)), self.bars)

    def force(self, place: Place, offset: int, data: bytes) -> None:
        """These bytes read so from now on, whatever is written."""
        bar, start = _resolve(place)
        self._forced.update({(bar, start + offset + number): byte for number, byte in enumerate(data)})

    def script(self, place: Place, offset: int, values: Iterable[int]) -> None:
        """What the next reads that begin at `offset` return, of whatever width, in order; then reading is as before. May be endless."""
        bar, start = _resolve(place)
        self._scripts[bar, start + offset] = iter(values)

    def remove_after(self, accesses: int) -> None:
        """The function is gone after so many accesses more."""
        self._left = accesses

    def add_capability(self, identity: int, body: bytes, *, place: int | None = None) -> int:
        """Puts a capability at the end of the list, in the next free place or at `place`; returns its place. `body` follows cap_next."""
        space = self.bytes[None]
        link, last = CAPABILITIES, 0
        while space[link]:
            last = space[link]
            link = last + 1
        self._end = max(self._end, 0x40)
        if place is None:
            place = self._end
        self._end = max(self._end, -(-(place + 2 + len(body)) // 4) * 4)
        space[link] = place
        space[place] = identity
        space[place + 1] = 0
        space[place + 2 : place + 2 + len(body)] = body
        return place

    def add_structure(
        self, cfg_type: int, bar: int, offset: int, length: int, *, extra: bytes = b"", cap_len: int | None = None, identity: int = 0
    ) -> int:
        """Puts a virtio capability (4.1.4) at the end of the list; returns its place. `extra` follows, `cap_len` counts it unless given."""
        body = bytearray(14)
        cap_len = 16 + len(extra) if cap_len is None else cap_len
        pack_into("<BBBB2xII", body, 0, cap_len, cfg_type, bar, identity, offset, length)
        return self.add_capability(CAP_VENDOR, bytes(body) + extra)

    # The driver's side: a `PciFunction`.

    @property
    def bars(self) -> Mapping[int, Bar]:
        """The BARs."""
        return self.over.bars if self.over is not None else MappingProxyType(self._bars)

    def config_read(self, offset: int, width: int) -> int:
        """Reads configuration space."""
        return self._read(None, offset, width)

    def config_write(self, offset: int, width: int, value: int) -> None:
        """Writes configuration space: any byte of it."""
        self._write(None, offset, width, value)

    def bar_read(self, bar: int, offset: int, width: int) -> int:
        """Reads a BAR. ValueError: outside it."""
        return self._read(bar, offset, width)

    def bar_write(self, bar: int, offset: int, width: int, value: int) -> None:
        """Writes a BAR. ValueError: outside it."""
        self._write(bar, offset, width, value)

    def doorbell(self, bar: int, offset: int, width: int, value: int) -> EventFd:
        """An eventfd for this store; alone, nobody looks at it but the test."""
        if self.over is not None:
            return self.over.doorbell(bar, offset, width, value)
        return self._doorbells.setdefault((bar, offset, width, value), EventFd())

    def enable_msix(self, count: int) -> list[EventFd]:
        """Vectors, if so many can be had. TransportError: fewer."""
        if self.over is not None:
            return self.over.enable_msix(count)
        if count > self.vectors:
            raise TransportError(f"{count} MSI-X vectors are not to be had: there are {self.vectors}")
        self.targets = [EventFd() for _ in range(count)]
        return list(self.targets)

    def mask_vector(self, index: int, masked: bool) -> None:
        """Passed on; alone, does nothing."""
        if self.over is not None:
            self.over.mask_vector(index, masked)

    def enable_intx(self, handler: Callable[[], None]) -> None:
        """Keeps the handler. TransportError: there is no pin."""
        if not self.pin:
            raise TransportError("the function has no interrupt pin")
        self.handler = handler
        if self.over is not None:
            self.over.enable_intx(handler)

    def disable_interrupts(self) -> None:
        """Forgets vectors and handler."""
        self.handler = None
        if self.over is not None:
            self.over.disable_interrupts()
        for event in self.targets:
            event.close()
        self.targets = []

    def attach(self, memory: Memory) -> int:
        """Passed on; alone, its first byte is at 0. ValueError: it is attached already."""
        if self.over is not None:
            return self.over.attach(memory)
        if memory in self._attached:
            raise ValueError("the memory is attached already")
        self._attached.append(memory)
        return 0

    def detach(self, memory: Memory) -> None:
        """Takes it away again. ValueError: it is not attached."""
        if self.over is not None:
            self.over.detach(memory)
        elif memory not in self._attached:
            raise ValueError("the memory is not attached")
        else:
            self._attached.remove(memory)

    def close(self) -> None:
        """Closes the function below, and all eventfds."""
        self.disable_interrupts()
        if self.over is not None:
            self.over.close()
        for event in self._doorbells.values():
            event.close()
        self._attached.clear()

    def _peek(self, bar: int | None, offset: int, width: int) -> int:
        if self.over is not None:
            value = self.over.config_read(offset, width) if bar is None else self.over.bar_read(bar, offset, width)
        else:
            value = int.from_bytes(self._span(bar, offset, width), "little")
        data = bytearray(value.to_bytes(width, "little"))
        for number in range(width):
            data[number] = self._forced.get((bar, offset + number), data[number])
        return int.from_bytes(data, "little")

    def _count(self) -> None:
        if self._left is not None:
            self.removed = self.removed or self._left <= 0
            self._left -= 1

    def _read(self, bar: int | None, offset: int, width: int) -> int:
        self._count()
        if self.removed:
            value = (1 << 8 * width) - 1
        else:
            scripted = next(self._scripts.get((bar, offset), iter(())), None)
            value = self._peek(bar, offset, width) if scripted is None else scripted
        self.accesses.append(Access(False, bar, offset, width, value))
        return value

    def _write(self, bar: int | None, offset: int, width: int, value: int) -> None:
        self._count()
        self.accesses.append(Access(True, bar, offset, width, value))
        if self.removed or (self.on_write is not None and self.on_write(bar, offset, width, value)):
            return
        if self.over is None:
            self._span(bar, offset, width)[:] = value.to_bytes(width, "little")
        elif bar is None:
            self.over.config_write(offset, width, value)
        else:
            self.over.bar_write(bar, offset, width, value)

    def _span(self, bar: int | None, offset: int, width: int) -> memoryview:
        if bar not in self.bytes or not 0 <= offset <= len(self.bytes[bar]) - width:
            raise ValueError(f"{width} bytes at {offset:#x} are not in {'configuration space' if bar is None else f'BAR {bar}'}")
        return memoryview(self.bytes[bar])[offset : offset + width]


def _resolve(place: Place) -> tuple[int | None, int]:
    return (place.bar, place.offset) if isinstance(place, Structure) else (place, 0)
