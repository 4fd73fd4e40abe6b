"""What a kernel interface needs of a port: which end it is, its queues, what it negotiated, and the two pumps that follow from that."""

from collections.abc import Callable, Collection
from typing import Any, Final, NamedTuple, Protocol, runtime_checkable

from virtio import arguments
from virtio._core import BufferPool, DeviceQueue, DriverQueue, EventFd, Pump
from virtio.driver import DriverState
from virtio.errors import StatusError
from virtio.features import Features
from virtio.netdev import tap
from virtio.spec import Status
from virtio.transport import Transport

SLOT_SIZE: Final = 69632
"""Bytes of slots that hold the longest frame (65589 bytes, and headroom) each: `NetDriver(..., slot_size=SLOT_SIZE, slots=128)`."""

MAX_FRAME: Final = 65589
"""Bytes of the longest frame (5.1.6.3)."""
AROUND_PACKET: Final = 18
"""Bytes of a frame beside its packet: the Ethernet header and a VLAN tag."""
MIN_MTU: Final = 68
MAX_MTU: Final = 65521
"""What the kernel allows a TAP."""

_MTU: Final = 3


class LinkEnd(Protocol):
    """What either end of a network device has for an interface."""

    on_link: Callable[[bool], None] | None
    """Called with what the link became. The interface puts itself in front of what is there, and takes that back when it is closed."""

    @property
    def link(self) -> bool:
        """Whether the link is up: the interface's carrier."""

    @property
    def mtu(self) -> int:
        """Bytes of the longest packet in a frame (5.1.4.1): the interface's, if it is given none."""


@runtime_checkable
class DeviceEnd(LinkEnd, Protocol):
    """The device's end of a network device: `NetDevice`, and whatever has these."""

    @property
    def status(self) -> Status:
        """The device status field (2.1): an interface starts under DRIVER_OK, without NEEDS_RESET."""

    @property
    def accepted(self) -> Features:
        """What the driver accepted."""

    @property
    def header_size(self) -> int:
        """Bytes of the header before each frame (5.1.6)."""

    def queue(self, index: int) -> DeviceQueue | None:
        """The enabled queue at `index`."""

    def doorbell(self, index: int) -> EventFd | None:
        """What the driver rings for it."""

    def check_queues(self) -> None:
        """Stops until the driver resets the device (2.1.2), if a queue is broken."""


@runtime_checkable
class DriverEnd(LinkEnd, Protocol):
    """The driver's end: `NetDriver`, and whatever has these."""

    @property
    def transport(self) -> Transport:
        """Its interrupts wake the pumps."""

    @property
    def state(self) -> DriverState:
        """An interface starts under DRIVER_OK."""

    @property
    def receiveq(self) -> DriverQueue:
        """The queue of received frames (5.1.2)."""

    @property
    def transmitq(self) -> DriverQueue:
        """The queue of frames to be sent (5.1.2)."""

    @property
    def pool(self) -> BufferPool:
        """Whose slots hold frames in both queues."""

    @property
    def mac(self) -> bytes:
        """The interface's address, if it is given none."""

    @property
    def features(self) -> Features:
        """What was negotiated."""

    @property
    def header_size(self) -> int:
        """Bytes of the header before each frame (5.1.6)."""

    def check(self) -> None:
        """Reads status and link. DeviceNeedsReset, TransportError: the device says so, or is gone."""


@runtime_checkable
class Paired(Protocol):
    """A driver's end with several queue pairs: `NetDriver`."""

    def pair(self, number: int) -> Any:
        """One of them, with `receiveq` and `transmitq`."""


class Lane(NamedTuple):
    """What the pumps of a queue pair stand on: two that are the same need no change."""

    pair: int
    queues: tuple[object, object]
    """The queue from which its driver receives, and the one by which it sends."""
    descriptor: int
    """Its queue of the TAP."""
    used: bool
    """Whether the pair is in use."""


class Pumps(NamedTuple):
    """The pumps of one queue pair and its queue of the TAP, by the queue that they serve."""

    transmit: Pump
    receive: Pump | None
    """None if the pair is not in use: what its driver sent before it said so is taken (5.1.6.5.5), and nothing given."""


class End:
    """A port, seen as the end of a cable."""

    mac: bytes | None = None
    """The address that the interface gets; None: whatever the kernel chooses."""
    config_interrupt: EventFd | None = None
    """Signalled when `check` has something to look at."""

    def __init__(self, port: LinkEnd) -> None:
        self.port = port

    def mtu(self, wanted: int | None) -> int:
        """The interface's MTU. ValueError: the wanted one cannot be, or is more than was negotiated (5.1.4.2)."""
        if wanted is None:
            return min(self.port.mtu, MAX_MTU)
        arguments.integer("MTU", wanted, MIN_MTU, MAX_MTU)
        if _MTU in self.features and wanted > self.port.mtu:
            raise ValueError(f"MTU {wanted} is more than the {self.port.mtu} that the device offers (5.1.4.2)")
        return wanted

    @property
    def features(self) -> Features:
        """What was negotiated."""
        raise NotImplementedError

    @property
    def queue_pairs(self) -> int:
        """How many queue pairs the port has."""
        return int(getattr(self.port, "queue_pairs", 1))

    def live_pairs(self, live: Collection[int] | None) -> list[int]:
        """Those that are live and in use; of `live` ones, if that is given. StatusError: it is not, and none is."""
        raise NotImplementedError

    def lanes(self, descriptors: dict[int, int], live: Collection[int] | None) -> list[Lane]:
        """What pumps are for: pairs with these descriptors of the TAP's queues, and a device's others, which send to the first of these;
        of `live` ones only, if that is given. StatusError: a pair was taken off meanwhile."""
        raise NotImplementedError

    def prepare(self, descriptor: int, mtu: int) -> None:
        """Sets the TAP's offloads. ValueError: slots are too small."""
        raise NotImplementedError

    def pumps(self, lane: Lane, mtu: int) -> Pumps:
        """The pumps of one pair, after `prepare`. StatusError: it was taken off meanwhile."""
        raise NotImplementedError

    def check(self) -> None:
        """Reads status and link. DeviceNeedsReset, TransportError: the device says so, or is gone."""

    def failed(self) -> None:
        """A pump met an error."""


class _Driver(End):
    port: DriverEnd

    def __init__(self, port: DriverEnd) -> None:
        super().__init__(port)
        self.mac = port.mac
        self.config_interrupt = port.transport.config_interrupt

    @property
    def features(self) -> Features:
        return self.port.features

    def check(self) -> None:
        self.port.check()

    def live_pairs(self, live: Collection[int] | None) -> list[int]:
        if self.port.state is not DriverState.DRIVER_OK:
            raise StatusError(f"the driver's device is not live (driver: {self.port.state}): restart it first")
        return list(range(getattr(self.port, "active_pairs", 1)))

    def lanes(self, descriptors: dict[int, int], live: Collection[int] | None) -> list[Lane]:
        found = []
        for pair, descriptor in descriptors.items():
            queues = self._queues(pair)
            found.append(Lane(pair, (queues.receiveq, queues.transmitq), descriptor, used=True))
        return found

    def prepare(self, descriptor: int, mtu: int) -> None:
        port = self.port
        wanted = tap.offloads(self.features, driver=True)
        payload, needed = port.pool.slot_size - BufferPool.HEADROOM, mtu + AROUND_PACKET
        if not wanted & tap.SEGMENTATION and payload < needed:
            raise ValueError(f"slots of {port.pool.slot_size} bytes hold frames of {payload}, and an MTU of {mtu} makes them {needed}")
        tap.set_offloads(descriptor, port.header_size, wanted)

    def pumps(self, lane: Lane, mtu: int) -> Pumps:
        port, queues, features = self.port, self._queues(lane.pair), self.features
        inwards, outwards = (port.transport.interrupt(index) for index in (2 * lane.pair, 2 * lane.pair + 1))
        return Pumps(
            Pump.driver_transmit(queues.transmitq, port.pool, lane.descriptor, features=features, interrupt=outwards),
            Pump.driver_receive(queues.receiveq, port.pool, lane.descriptor, features=features, interrupt=inwards),
        )

    def _queues(self, pair: int) -> Any:
        return self.port.pair(pair) if isinstance(self.port, Paired) else self.port


class _Device(End):
    port: DeviceEnd
    _longest = MAX_FRAME

    @property
    def features(self) -> Features:
        return self.port.accepted

    def live_pairs(self, live: Collection[int] | None) -> list[int]:
        status, found = self.port.status, []
        if Status.DRIVER_OK in status and Status.NEEDS_RESET not in status:
            pairs = range(getattr(self.port, "active_pairs", 1))
            found = [pair for pair in pairs if all(self.port.queue(index) is not None for index in (2 * pair, 2 * pair + 1))]
        if live is not None:
            return [pair for pair in found if pair in live]
        if not found:
            raise StatusError(f"the device is not live (status {int(status):#x}): its driver has to initialize it first")
        return found

    def lanes(self, descriptors: dict[int, int], live: Collection[int] | None) -> list[Lane]:
        found: list[Lane] = []
        if not descriptors:
            return found
        first = next(iter(descriptors.values()))
        for pair in range(self.queue_pairs) if live is None else sorted(live):
            used, (receiveq, transmitq) = pair in descriptors, (self.port.queue(index) for index in (2 * pair, 2 * pair + 1))
            if used and (receiveq is None or transmitq is None):
                raise StatusError(f"queue pair {pair} was taken off meanwhile")
            if transmitq is not None:
                found.append(Lane(pair, (receiveq, transmitq), descriptors.get(pair, first), used))
        return found

    def prepare(self, descriptor: int, mtu: int) -> None:
        taken = tap.set_offloads(descriptor, self.port.header_size, tap.offloads(self.features, driver=False))
        self._longest = MAX_FRAME if taken & tap.SEGMENTATION else mtu + AROUND_PACKET

    def pumps(self, lane: Lane, mtu: int) -> Pumps:
        port, features, receive = self.port, self.features, None
        (receiveq, filled), (transmitq, sent) = ((port.queue(index), port.doorbell(index)) for index in (2 * lane.pair, 2 * lane.pair + 1))
        if transmitq is None or sent is None:
            raise StatusError(f"queue pair {lane.pair} was taken off meanwhile")
        transmit = Pump.device_transmit(transmitq, lane.descriptor, features=features, doorbell=sent)
        if lane.used:
            if receiveq is None or filled is None:
                raise StatusError(f"queue pair {lane.pair} was taken off meanwhile")
            receive = Pump.device_receive(receiveq, lane.descriptor, features=features, doorbell=filled, longest=self._longest)
        return Pumps(transmit, receive)

    def failed(self) -> None:
        """A driver that broke a rule has to reset the device (2.1.2)."""
        self.port.check_queues()


def end_of(port: object) -> End:
    """TypeError: it is neither a driver's end nor a device's."""
    if isinstance(port, DeviceEnd):
        return _Device(port)
    if isinstance(port, DriverEnd):
        return _Driver(port)
    raise TypeError(f"{type(port).__name__} is neither a driver's end of a network device nor a device's")
