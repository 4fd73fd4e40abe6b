"""Devices and drivers that the PCI tests share."""

from collections.abc import Iterable

from virtio import DeviceId, DeviceQueue
from virtio.device import RING_FEATURES, Device
from virtio.driver import Driver
from virtio.spec import Feature
from virtio.transport import Transport

CONFIG = bytes(range(0x10, 0x1C))


class Numbers(Device):
    """Three queues; each writes its number into every buffer. Twelve bytes of configuration, the first four writable."""

    device_id = DeviceId.ENTROPY
    queues = ("first", "second", "third")
    queue_size = 64
    config = CONFIG

    def config_written(self, offset: int, data: bytes) -> None:
        if offset + len(data) > 4:
            super().config_written(offset, data)
        self.config = self.config[:offset] + data + self.config[offset + len(data) :]

    def on_first(self, queue: DeviceQueue) -> None:
        for chain in queue.pop():
            queue.complete(chain, chain.write(bytes([queue.index])))
        queue.publish()

    on_second = on_third = on_first


class NumbersDriver(Driver):
    """Asks each queue for its number."""

    device_id = DeviceId.ENTROPY

    def __init__(self, transport: Transport, *, wanted: Iterable[int] = RING_FEATURES, queues: int = 3) -> None:
        super().__init__(transport)
        with self.initializing():
            self.negotiate(wanted=wanted)
            self.place = self.allocate(16)
            for index in range(queues):
                self.setup_queue(index, size=8)
            self.driver_ok()

    def post(self, index: int) -> None:
        """Makes a buffer available, armed for its return."""
        self.queues[index].arm()
        self.queues[index].add(index, writable=[(self.address + self.place + index, 1)])
        self.queues[index].publish()

    def ask(self, index: int, timeout: float = 5.0) -> int:
        """The queue's number, by way of the device."""
        self.memory.write(self.place + index, b"\xee")
        self.post(index)
        ((token, length),) = self.wait_used(self.queues[index], timeout)
        assert (token, length) == (index, 1)
        return self.memory.read(self.place + index, 1)[0]


MODERN = {Feature.VERSION_1}
