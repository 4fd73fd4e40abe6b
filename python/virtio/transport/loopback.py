"""A driver and its device in one process, one thread alternating: the smallest transport.

    with LoopbackTransport(RngDevice()) as transport, RngDriver(transport) as rng:
        print(rng.read(16).hex())

Notifications are eventfds, as elsewhere.
"""

from types import TracebackType
from typing import Self

from virtio._core import EventFd, Memory
from virtio.device import Device, check_device
from virtio.errors import StatusError
from virtio.features import Features
from virtio.spec import Status
from virtio.transport import CARRIED, Attachments


class LoopbackTransport:
    """Carries everything from a driver to `device` in the same process.

    The device runs inside `serve`, which a driver calls before it sleeps; `device.poll()` by hand does as well. StatusError: the device is
    on another transport already. TypeError: no device.
    """

    def __init__(self, device: Device) -> None:
        check_device(device)
        self._config_interrupt = EventFd()
        device.connect(self._config_interrupt)
        self._device: Device | None = device
        self._doorbells: dict[int, EventFd] = {}
        self._interrupts: dict[int, EventFd] = {}
        self._attachments = Attachments(device.memory)

    @property
    def device(self) -> Device:
        """The far end. StatusError: the transport is closed."""
        if self._device is None:
            raise StatusError("the transport is closed")
        return self._device

    @property
    def device_id(self) -> int:
        """The device's type (5)."""
        return self.device.device_id

    @property
    def status(self) -> Status:
        """The device status field (2.1). StatusError: the value that is set is out of order for the device."""
        return self.device.status

    @status.setter
    def status(self, value: Status) -> None:
        self.device.write_status(value)

    @property
    def config_generation(self) -> int:
        """Changes with the configuration (2.5)."""
        return self.device.config_generation

    @property
    def config_interrupt(self) -> EventFd:
        """Signalled by configuration-change notifications (2.3)."""
        return self._config_interrupt

    def offered(self) -> Features:
        """What the device offers, less what is for other transports only."""
        return self.device.offered & CARRIED

    def accept(self, features: Features) -> None:
        """Writes what the driver accepts (3.1.1 step 4). StatusError: out of order."""
        self.device.accept(features)

    def reset(self) -> None:
        """Resets the device (2.4), at once."""
        self.device.reset()

    def config_read(self, offset: int, length: int) -> bytes:
        """Reads the device's configuration (2.5). ValueError: outside it."""
        return self.device.read_config(offset, length)

    def config_write(self, offset: int, data: bytes) -> None:
        """Writes the device's configuration (2.5). ValueError: outside it, or read-only. StatusError: before FEATURES_OK."""
        self.device.write_config(offset, data)

    def queue_max(self, index: int) -> int:
        """Most entries that queue `index` may have; 0 if there is no such queue."""
        return self.device.queue_max(index)

    def queue_setup(self, index: int, size: int, areas: tuple[int, int, int]) -> EventFd:
        """Enables a queue; the eventfd is its doorbell. ValueError, StatusError: as `Device.setup_queue`."""
        doorbell = self.doorbell(index)
        self.device.setup_queue(index, size, areas, doorbell=doorbell, interrupt=self.interrupt(index))
        return doorbell

    def queue_reset(self, index: int) -> None:
        """Resets one queue (2.6.1), at once."""
        self.device.reset_queue(index)

    def doorbell(self, index: int) -> EventFd:
        """Signalled by available-buffer notifications of queue `index`, for a device that sleeps. ValueError: no such queue."""
        return self._event(self._doorbells, index)

    def interrupt(self, index: int) -> EventFd:
        """Signalled by used-buffer notifications of queue `index`. ValueError: no such queue."""
        return self._event(self._interrupts, index)

    def attach(self, memory: Memory) -> int:
        """Maps `memory` into the device's; returns its address there. ValueError: it is attached already."""
        if self._device is None:
            raise StatusError("the transport is closed")
        return self._attachments.attach(memory)

    def detach(self, memory: Memory) -> None:
        """Takes `memory` out of the device's again. ValueError: it is not attached."""
        self._attachments.detach(memory)

    def serve(self) -> int:
        """Runs the device until nothing is left to do; returns how many handlers it called."""
        return self.device.poll()

    def close(self) -> None:
        """Resets the device, takes all memory from it, and frees it for another transport."""
        if self._device is None:
            return
        device, self._device = self._device, None
        device.reset()
        device.connect(None)
        self._attachments.clear()
        for event in (self._config_interrupt, *self._doorbells.values(), *self._interrupts.values()):
            event.close()

    def __enter__(self) -> Self:
        _ = self.device
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _event(self, events: dict[int, EventFd], index: int) -> EventFd:
        if not self.queue_max(index):
            raise ValueError(f"queue {index} does not exist: the device has {len(self.device.queues)}")
        if index not in events:
            events[index] = EventFd()
        return events[index]
