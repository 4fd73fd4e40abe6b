"""A virtio-pci function in process: any `Device` behind real configuration space, capabilities, BARs, MSI-X and INTx (4.1).

    function = EmulatedFunction(RngDevice(), msix_vectors=2)
    with PciTransport(function) as transport, RngDriver(transport) as rng:
        print(rng.read(16).hex())

Registers answer at exactly their widths: any other access reads 0 and writes nothing, as do registers of a queue that is not there. A write
that the device refuses, because it is out of order or its numbers cannot be, changes nothing, which a driver sees by reading back.
"""

from collections.abc import Callable, Mapping
from threading import RLock
from types import MappingProxyType, TracebackType
from typing import Final, Self

from virtio._core import EventFd, Memory
from virtio.device import Device, check_device
from virtio.errors import StatusError, TransportError
from virtio.pci.common import MODERN_BAR, CommonRegisters, regions
from virtio.pci.config import BARS, COMMAND_MEMORY, MSIX_ENABLE, MSIX_ENTRY_SIZE, MSIX_FUNCTION_MASK
from virtio.pci.function import Bar
from virtio.pci.signals import Signals
from virtio.pci.space import MSIX_BAR, ConfigSpace
from virtio.status import locked
from virtio.transport import Attachments

MESSAGE_ADDRESS: Final = 0xFEE0_0000
"""What `enable_msix` writes as address of every vector, and the vector's number as data: nothing here is ever sent there."""


class EmulatedFunction:
    """`device` as a PCI function at `address`.

    `msix_vectors`: entries of the MSI-X table, by default one for each queue and one for the configuration; 0: no MSI-X. `intx`: whether
    there is an interrupt pin. `notify_multiplier`: bytes between the queues' notification addresses; 0: one for all. `transitional`: has
    the ids of a transitional device. `access_platform`: addresses count as the platform's, and ACCESS_PLATFORM is offered if the device
    offers it. StatusError: the device is on a transport already. ValueError: an option out of range.

    The device runs inside `serve`, or `device.poll()`.
    """

    def __init__(
        self,
        device: Device,
        *,
        address: str = "0000:00:04.0",
        msix_vectors: int | None = None,
        intx: bool = True,
        notify_multiplier: int = 4,
        transitional: bool = False,
        access_platform: bool = False,
    ) -> None:
        check_device(device)
        if msix_vectors is None:
            msix_vectors = min(len(device.queues) + 1, 2048)
        if not 0 <= msix_vectors <= 2048:
            raise ValueError(f"msix_vectors {msix_vectors} is outside 0..2048")
        if notify_multiplier == 1 or notify_multiplier < 0 or notify_multiplier & notify_multiplier - 1 or notify_multiplier > 1 << 16:
            raise ValueError(f"notify_multiplier {notify_multiplier} is neither 0 nor an even power of 2 up to 65536 (4.1.4.4.1)")
        self.device: Final = device
        """The device behind the registers."""
        self.address: Final = address
        self.memory: Final[Memory | None] = None
        self.access_platform: Final = access_platform
        self._lock = RLock()
        self._closed = False
        self._regions = regions(device, notify_multiplier)
        self._signals = Signals(device, msix_vectors, pin=intx)
        self._common = CommonRegisters(device, self._signals, access_platform=access_platform)
        self._space = ConfigSpace(device.device_id, self._regions, msix_vectors, pin=intx, transitional=transitional)
        self._table = bytearray(MSIX_ENTRY_SIZE * msix_vectors)
        for entry in range(msix_vectors):
            self._table[entry * MSIX_ENTRY_SIZE + 12] = 1  # masked, as after power-on
        self._nowhere = EventFd()
        self._attachments = Attachments(device.memory)
        self._update_signals()

    @property
    def bars(self) -> Mapping[int, Bar]:
        """The BARs: 1 has MSI-X table and pending bits, 4 (64-bit) virtio's structures. None while the command register disables them."""
        return MappingProxyType(self._space.bars())

    # Configuration space.

    @locked
    def config_read(self, offset: int, width: int) -> int:
        """Reads configuration space, 4 KiB of it. ValueError: outside it, unaligned, or another width than 1, 2, 4."""
        self._check_open()
        window = self._space.window(offset, width)
        if window is not None:
            bar, place, length = window
            data = self._reach(bar, place, length)
            self._space.store_window(0 if data is None else data, length)
        return self._space.read(offset, width, interrupt=self._signals.line)

    @locked
    def config_write(self, offset: int, width: int, value: int) -> None:
        """Writes configuration space: BARs may be sized and moved, the PCI_CFG window used. ValueError: as `config_read`."""
        self._check_open()
        window = self._space.window(offset, width)
        self._space.write(offset, width, value)
        if window is not None:
            bar, place, length = window
            self._reach(bar, place, length, self._space.load_window(length))
        self._update_signals()

    # BARs.

    @locked
    def bar_read(self, bar: int, offset: int, width: int) -> int:
        """Reads a register. ValueError: not in a BAR, unaligned, or another width than 1, 2, 4. All ones while BARs are disabled."""
        self._check_open()
        self._check_access(bar, offset, width)
        if not self._space.command & COMMAND_MEMORY:
            return int((1 << 8 * width) - 1)
        if bar == MSIX_BAR:
            if offset >= self._space.pending_offset:
                pending = self._signals.pending.to_bytes(max(8, -(-self._signals.vectors // 64) * 8), "little")
                return int.from_bytes(pending[offset - self._space.pending_offset :][:width], "little")
            return int.from_bytes(self._table[offset : offset + width], "little")
        name, place = self._find(offset)
        if name == "common":
            return self._common.read(place, width)
        if name == "isr":
            return self._signals.take_isr() if (place, width) == (0, 1) else 0
        if name == "device":
            return self._common.read_device(place, width)
        return 0

    @locked
    def bar_write(self, bar: int, offset: int, width: int, value: int) -> None:
        """Writes a register. ValueError: as `bar_read`, or a value wider than the access. Nothing happens while BARs are disabled."""
        self._check_open()
        self._check_access(bar, offset, width)
        if not 0 <= value < 1 << 8 * width:
            raise ValueError(f"value {value:#x} does not fit in {width} bytes")
        if not self._space.command & COMMAND_MEMORY:
            return
        if bar == MSIX_BAR:
            if offset + width <= len(self._table):
                self._table[offset : offset + width] = value.to_bytes(width, "little")
                self._update_signals()
            return
        name, place = self._find(offset)
        if name == "common":
            self._common.write(place, width, value)
        elif name == "device":
            self._common.write_device(place, width, value)
        elif name == "notify":
            self._store(place, width, value).signal()

    @locked
    def doorbell(self, bar: int, offset: int, width: int, value: int) -> EventFd:
        """The eventfd that is this store: a queue's, if it is that queue's notification, else one that nobody looks at."""
        self._check_open()
        self._check_access(bar, offset, width)
        name, place = self._find(offset) if bar == MODERN_BAR else ("", 0)
        return self._store(place, width, value) if name == "notify" else self._nowhere

    # Interrupts.

    @locked
    def enable_msix(self, count: int) -> list[EventFd]:
        """Enables MSI-X with `count` vectors. TransportError: the table has fewer. StatusError: interrupts are enabled."""
        self._check_open()
        self._check_disabled()
        if not 1 <= count <= self._signals.vectors:
            raise TransportError(f"{count} MSI-X vectors are not to be had: the table has {self._signals.vectors}")
        for vector in range(count):
            entry = MESSAGE_ADDRESS.to_bytes(8, "little") + vector.to_bytes(8, "little")
            self._table[vector * MSIX_ENTRY_SIZE : (vector + 1) * MSIX_ENTRY_SIZE] = entry
        self._space.set_msix_control(MSIX_ENABLE)
        self._update_signals()
        return [self._signals.target(vector) for vector in range(count)]

    @locked
    def mask_vector(self, index: int, masked: bool) -> None:
        """Masks or unmasks one vector in the table. ValueError: MSI-X is disabled, or has no such vector."""
        self._check_open()
        if not (self._space.msix_control & MSIX_ENABLE and 0 <= index < self._signals.vectors):
            raise ValueError(f"vector {index} is not an enabled one")
        self._table[index * MSIX_ENTRY_SIZE + 12] = masked
        self._update_signals()

    def enable_intx(self, handler: Callable[[], None]) -> None:
        """Enables the pin; `handler` is called in a thread of its own while the line is high. TransportError: there is no pin."""
        with self._lock:
            self._check_open()
            self._check_disabled()
            self._space.allow_intx(True)
            self._update_signals()
            self._signals.start(handler)

    def disable_interrupts(self) -> None:
        """Disables MSI-X and the pin, and returns once no handler runs."""
        self._signals.stop()  # without the lock: a handler may be waiting for it
        with self._lock:
            if not self._closed:
                self._space.set_msix_control(0)
                self._space.allow_intx(False)
                for vector in range(self._signals.vectors):
                    self._table[vector * MSIX_ENTRY_SIZE + 12] = 1
                self._update_signals()

    # Memory, and the device's turn.

    @locked
    def attach(self, memory: Memory) -> int:
        """Maps `memory` into the device's; returns its address there. ValueError: it is attached already."""
        self._check_open()
        address = self._attachments.attach(memory)
        self._space.set_master()
        return address

    @locked
    def detach(self, memory: Memory) -> None:
        """Takes `memory` out of the device's again. ValueError: it is not attached."""
        self._attachments.detach(memory)

    def serve(self) -> int:
        """Runs the device until nothing is left to do; returns how many handlers it called."""
        return self.device.poll()

    def close(self) -> None:
        """Resets the device, takes all memory from it, and frees it for another transport."""
        self.disable_interrupts()
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._common.reset()
            self.device.connect(None)
            self._attachments.clear()
            self._common.close()
            self._signals.close()
            self._nowhere.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise StatusError("the PCI function is closed")

    def _check_disabled(self) -> None:
        if self._space.msix_control & MSIX_ENABLE or self._signals.started:
            raise StatusError("interrupts are enabled already")

    def _check_access(self, bar: int, offset: int, width: int) -> None:
        size = self._space.sizes.get(bar) if 0 <= bar < BARS else None
        if size is None:
            raise ValueError(f"BAR {bar} is not there")
        if width not in (1, 2, 4) or offset % width or not 0 <= offset <= size - width:
            raise ValueError(f"an access of {width} bytes at {offset:#x} is not in BAR {bar}, which has {size}, or unaligned")

    def _find(self, offset: int) -> tuple[str, int]:
        """Which structure an offset in the modern BAR is in, and where in it."""
        for name, region in self._regions.items():
            if 0 <= offset - region.offset < region.length:
                return name, offset - region.offset
        return "", 0

    def _store(self, place: int, width: int, value: int) -> EventFd:
        """What a store to the notification structure signals: 16 bits, at the queue's address, with its index (4.1.5.2)."""
        if width == 2 and 0 <= value < len(self.device.queues) and place == value * self._regions["notify"].multiplier:
            return self._common.doorbell(value)
        return self._nowhere

    def _reach(self, bar: int, offset: int, length: int, value: int | None = None) -> int | None:
        """An access through the PCI_CFG window (4.1.4.9); one that cannot be reads 0 and writes nothing."""
        try:
            if value is None:
                return self.bar_read(bar, offset, length)
            self.bar_write(bar, offset, length, value)
        except ValueError:
            pass
        return None

    def _update_signals(self) -> None:
        """Tells where interrupts go, after any register changed that has to do with it."""
        control = self._space.msix_control
        everything = bool(control & MSIX_FUNCTION_MASK)
        masked = [everything or bool(self._table[vector * MSIX_ENTRY_SIZE + 12] & 1) for vector in range(self._signals.vectors)]
        self._signals.update(msix=bool(control & MSIX_ENABLE), masked=masked, pin_enabled=self._space.intx_enabled)
