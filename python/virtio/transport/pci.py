"""Virtio over PCI (4.1), the modern interface: any `PciFunction` as a transport.

    with PciTransport(EmulatedFunction(RngDevice())) as transport, RngDriver(transport) as rng:
        print(rng.read(16).hex())

Registers are accessed at their own width, 64-bit ones as two halves (4.1.3.1). NOTIFICATION_DATA is not carried: a doorbell is one fixed
store. What the device says about itself is checked as driver-06 to driver-10 in docs/invariants.md tell.
"""

from collections.abc import Callable
from contextlib import suppress
from threading import RLock
from time import monotonic, sleep
from types import TracebackType
from typing import Final, Literal, Self

from virtio import arguments
from virtio._core import EventFd, Memory
from virtio.errors import StatusError, TransportError, VirtioError
from virtio.features import Features
from virtio.pci.config import CONFIG, NO_VECTOR, SPACE_SIZE, Common, Field, Layout, device_type, parse
from virtio.pci.function import PciFunction, check_function
from virtio.pci.interrupts import Interrupts
from virtio.spec import Feature, Status
from virtio.status import locked
from virtio.transport import CARRIED, Alternating

QUEUE_RESET_TIMEOUT: Final = 5.0
"""Seconds that a device may take to reset a queue (4.1.4.3.2)."""

CLOSE_TIMEOUT: Final = 1.0
"""Seconds that closing waits for the device's reset, before everything is taken from it all the same."""

_DOORBELL_WIDTH: Final = 2


class PciTransport:
    """Carries everything from a driver to the virtio device behind `function`, which is closed with it.

    Not carried, and so never negotiated: NOTIFICATION_DATA, NOTIF_CONFIG_DATA, ADMIN_VQ, SR_IOV, ORDER_PLATFORM; ACCESS_PLATFORM unless the
    function's addresses are the platform's; RING_RESET if the common configuration ends before its register.
    """

    def __init__(self, function: PciFunction, *, interrupts: Literal["auto", "msix", "intx"] = "auto") -> None:
        """Finds the device's structures and enables interrupts: MSI-X, or the pin where that cannot be had; or the one that is asked for.

        TransportError: not a virtio device, a legacy one, one whose capabilities are unusable, or no interrupts; the function is then the
        caller's as before. TypeError: no PCI function. ValueError: another word for `interrupts`.
        """
        if interrupts not in ("auto", "msix", "intx"):
            raise ValueError(f"interrupts must be auto, msix or intx, not {interrupts!r}")
        check_function(function)
        self._lock = RLock()
        self._closed = False
        self.function: Final = function
        self.memory: Final[Memory | None] = function.memory
        """Memory that the device reaches already, and a driver uses if it is given none."""
        space = b"".join(function.config_read(offset, 4).to_bytes(4, "little") for offset in range(0, SPACE_SIZE, 4))
        self._device_id = device_type(space)
        self.layout: Final[Layout] = parse(space, function.bars)
        """Where the device's structures are, as its capabilities tell."""
        if isinstance(function, Alternating):
            self.serve: Callable[[], int] = function.serve
        self._carried = CARRIED
        if function.access_platform:
            self._carried |= {Feature.ACCESS_PLATFORM}
        if self.layout.common.length < sum(Common.QUEUE_RESET):
            self._carried -= {Feature.RING_RESET}
        msix = self.layout.msix
        self._interrupts = Interrupts(
            function,
            0 if msix is None else msix.size,
            self._read(Common.NUM_QUEUES),
            wanted=interrupts,
            map_vector=self._map_vector,
            read_isr=self._read_isr,
        )
        try:
            self._interrupts.map(CONFIG)  # tried now, so that falling back is over before anybody waits
        except BaseException:
            with suppress(VirtioError, OSError):
                self._interrupts.close()
            raise
        self._queue_max: dict[int, int] = {}
        """What was told of each queue's size since the last reset."""
        self._config_mapped = False  # the reset that begins every initialization undoes it (4.1.5.1.2.1)

    @property
    def device_id(self) -> int:
        """The device's type (5), by its PCI ids (4.1.2)."""
        return self._device_id

    @property
    @locked
    def num_queues(self) -> int:
        """How many queues the device may have at present (4.1.4.3)."""
        self._check_open()
        return self._read(Common.NUM_QUEUES)

    @property
    def vectors(self) -> int:
        """How many MSI-X vectors are in use; 0 with the interrupt pin."""
        return self._interrupts.vectors

    @property
    def gone(self) -> bool:
        """Whether the device ended for good, so that it writes to no memory any more. False also where that cannot be known."""
        return bool(getattr(self.function, "gone", False))

    @property
    @locked
    def status(self) -> Status:
        """The device status field (2.1); 0xff from a device that is gone."""
        self._check_open()
        return Status(self._read_raw(Common.DEVICE_STATUS))

    @status.setter
    @locked
    def status(self, value: Status) -> None:
        arguments.number("status", value)
        self._check_open()
        if value and not self._config_mapped:
            self._interrupts.map(CONFIG)
            self._config_mapped = True
        self._write(Common.DEVICE_STATUS, int(value))

    @property
    @locked
    def config_generation(self) -> int:
        """Changes with the configuration (2.5), modulo 256."""
        self._check_open()
        return self._read(Common.CONFIG_GENERATION)

    @property
    def config_interrupt(self) -> EventFd:
        """Signalled by configuration-change notifications (2.3)."""
        return self._interrupts.sink(CONFIG)

    @locked
    def offered(self) -> Features:
        """What the device offers, all four words, less what this transport does not carry."""
        self._check_open()
        words = []
        for select in range(4):
            self._write(Common.DEVICE_FEATURE_SELECT, select)
            words.append(self._read(Common.DEVICE_FEATURE))
        return Features.from_words(words) & self._carried

    @locked
    def accept(self, features: Features) -> None:
        """Writes what the driver accepts (3.1.1 step 4), all four words."""
        self._check_open()
        for select, word in enumerate(features.words):
            self._write(Common.DRIVER_FEATURE_SELECT, select)
            self._write(Common.DRIVER_FEATURE, word)

    @locked
    def reset(self) -> None:
        """Asks for a device reset (2.4); `status` reads 0 when it is complete."""
        self._check_open()
        self._config_mapped = False
        self._queue_max.clear()
        self._write(Common.DEVICE_STATUS, 0)

    @locked
    def config_read(self, offset: int, length: int) -> bytes:
        """Reads the device's configuration (2.5): one field a call, so that it is accessed at its width (4.1.3.1).

        4 or 2 aligned bytes are one access, 8 are two; any other number is read byte by byte. ValueError: outside it.
        """
        place, width = self._config_place(offset, length)
        bar = place[0]
        values = (self.function.bar_read(bar, place[1] + at, width) for at in range(0, length, width))
        data = b"".join(value.to_bytes(width, "little") for value in values)
        if data and data.count(0xFF) == length:
            self._check_there()
        return data

    @locked
    def config_write(self, offset: int, data: bytes) -> None:
        """Writes the device's configuration (2.5), at widths as `config_read`. ValueError: outside it. What is read-only stays."""
        (bar, start), width = self._config_place(offset, len(data))
        for at in range(0, len(data), width):
            self.function.bar_write(bar, start + at, width, int.from_bytes(data[at : at + width], "little"))

    @locked
    def queue_max(self, index: int) -> int:
        """Most entries that queue `index` may have, as long as it is not set up; 0 if there is no such queue."""
        self._check_open()
        if not 0 <= arguments.number("queue index", index) < self._read(Common.NUM_QUEUES):
            return 0
        self._write(Common.QUEUE_SELECT, index)
        self._queue_max[index] = most = self._read(Common.QUEUE_SIZE)
        return most

    @locked
    def queue_setup(self, index: int, size: int, areas: tuple[int, int, int]) -> EventFd:
        """Enables a queue (4.1.5.1.3); the eventfd stores its index to its notification address.

        ValueError: no such queue, or more entries than it has. TransportError: it has fewer than `queue_max` told, the notification address
        lies outside its structure, no vector is accepted, or the device does not enable the queue.
        """
        told = self._queue_max.get(index, 0)
        most = self.queue_max(index)  # selects it
        if most < size <= told:
            raise TransportError(f"queue {index} may have {most} entries now, and {told} when that was read before (4.1.4.3)")
        if not 1 <= size <= most:
            raise ValueError(f"queue {index} may have 1 to {most} entries, not {size}" if most else f"the device has no queue {index}")
        if self._read(Common.QUEUE_ENABLE):
            raise TransportError(f"queue {index} reads as enabled before it was set up (4.1.4.3.1)")
        doorbell = self._doorbell(index)
        if size != most:
            self._write(Common.QUEUE_SIZE, size)
            self._queue_max[index] = size
            if (kept := self._read(Common.QUEUE_SIZE)) != size:
                raise TransportError(f"queue {index} keeps size {kept} where {size} was written (4.1.4.3)")
        for field, address in zip((Common.QUEUE_DESC, Common.QUEUE_DRIVER, Common.QUEUE_DEVICE), areas, strict=True):
            self._write(field, address)
        self._interrupts.map(index)
        self._write(Common.QUEUE_ENABLE, 1)
        if (enabled := self._read(Common.QUEUE_ENABLE)) != 1:
            raise TransportError(f"the device did not enable queue {index}: queue_enable reads {enabled:#x} (4.1.4.3)")
        return doorbell

    @locked
    def queue_reset(self, index: int) -> None:
        """Resets one queue (2.6.1), which RING_RESET allows. TransportError: not done within `QUEUE_RESET_TIMEOUT` seconds."""
        self._check_open()
        deadline = monotonic() + QUEUE_RESET_TIMEOUT
        self._queue_max.pop(index, None)
        self._write(Common.QUEUE_SELECT, index)
        self._write(Common.QUEUE_RESET, 1)
        while (busy := self._read(Common.QUEUE_RESET)) or self._read(Common.QUEUE_ENABLE):
            if monotonic() >= deadline:
                state = f"queue_reset reads {busy:#x}" if busy else "queue_enable is still set"
                raise TransportError(f"queue {index} is not reset after {QUEUE_RESET_TIMEOUT} s: {state} (4.1.4.3.1)")
            sleep(0.001)

    def interrupt(self, index: int) -> EventFd:
        """Signalled by used-buffer notifications of queue `index`. ValueError: it was never set up."""
        self._check_open()
        try:
            return self._interrupts.sink(index)
        except KeyError:
            raise ValueError(f"queue {index} was never set up") from None

    def attach(self, memory: Memory) -> int:
        """Lets the device reach `memory`; returns its address there. ValueError: it is attached already."""
        self._check_open()
        return self.function.attach(memory)

    def detach(self, memory: Memory) -> None:
        """Takes `memory` from the device again. ValueError: it is not attached."""
        if self._closed:
            raise ValueError("the memory is not attached: the transport is closed")
        self.function.detach(memory)

    @locked
    def close(self) -> None:
        """Resets the device, disables interrupts, and closes the function. Closing twice is closing once."""
        if self._closed:
            return
        try:
            with suppress(VirtioError, OSError):  # what is gone needs no reset
                self.reset()
                deadline = monotonic() + CLOSE_TIMEOUT
                while self._read_raw(Common.DEVICE_STATUS) not in (0, 0xFF) and monotonic() < deadline:
                    sleep(0.001)
        finally:
            self._closed = True
            try:
                with suppress(VirtioError, OSError):
                    self._interrupts.close()
            finally:
                self.function.close()

    def __enter__(self) -> Self:
        self._check_open()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise StatusError("the transport is closed")

    def _read_raw(self, field: Field) -> int:
        common = self.layout.common
        return self.function.bar_read(common.bar, common.offset + field.offset, field.width)

    def _read(self, field: Field) -> int:
        """A register of the common configuration. TransportError: it reads as all ones, and so does the status: the device is gone."""
        value = self._read_raw(field)
        if value == (1 << 8 * field.width) - 1:
            self._check_there()
        return value

    def _write(self, field: Field, value: int) -> None:
        common = self.layout.common
        halves = [(field.offset, value)] if field.width < 8 else [(field.offset, value & 0xFFFF_FFFF), (field.offset + 4, value >> 32)]
        for offset, half in halves:
            self.function.bar_write(common.bar, common.offset + offset, min(field.width, 4), half)

    def _check_there(self) -> None:
        if self._read_raw(Common.DEVICE_STATUS) == 0xFF:
            raise TransportError(f"PCI function {self.function.address} reads as all ones: the device is gone")

    def _read_isr(self) -> int:
        """Called in the function's thread, so it takes no lock."""
        return self.function.bar_read(self.layout.isr.bar, self.layout.isr.offset, 1)

    def _map_vector(self, source: int, vector: int) -> int:
        field = Common.CONFIG_MSIX_VECTOR
        if source != CONFIG:
            self._write(Common.QUEUE_SELECT, source)
            field = Common.QUEUE_MSIX_VECTOR
        self._write(field, vector)
        value = self._read(field)
        if value not in (vector, NO_VECTOR):
            raise TransportError(f"a vector register reads {value:#x} after {vector:#x} was written (4.1.5.1.2.1)")
        return value

    def _doorbell(self, index: int) -> EventFd:
        notify = self.layout.notify
        offset = self._read(Common.QUEUE_NOTIFY_OFF) * notify.multiplier
        if offset + _DOORBELL_WIDTH > notify.length:
            raise TransportError(
                f"queue {index} is notified at {offset:#x}, but the structure for that has {notify.length} bytes (4.1.4.4.1)"
            )
        return self.function.doorbell(notify.bar, notify.offset + offset, _DOORBELL_WIDTH, index)

    def _config_place(self, offset: int, length: int) -> tuple[tuple[int, int], int]:
        """BAR and offset of configuration bytes, and the width to access them at."""
        self._check_open()
        device = self.layout.device
        size = 0 if device is None else device.length
        if offset < 0 or length < 0 or offset + length > size:
            raise ValueError(f"configuration bytes {offset}..{offset + length} are outside 0..{size}")
        width = next((each for each in (4, 2) if length == each and offset % each == 0), 1)
        if length == 8 and offset % 4 == 0:
            width = 4
        return (0 if device is None else device.bar, offset + (0 if device is None else device.offset)), width
