"""Virtio over vhost-user, the front-end: a driver of ours on anybody's back-end.

    with VhostUserTransport("net.sock", DeviceId.NETWORK) as transport, NetDriver(transport) as net:
        ...

Doorbells and interrupts are the rings' eventfds themselves, so frames move with nobody in between. The connection, and the thread that
sleeps on it, are in `virtio.vhost_user.reconnecting`.
"""

import os
from collections.abc import Iterable
from typing import Final

from virtio import arguments
from virtio._core import EventFd, Memory
from virtio.errors import StatusError, TransportError
from virtio.features import Features, check_choice, features_of
from virtio.spec import MAX_QUEUE_SIZE, DeviceId, Status
from virtio.status import locked
from virtio.transport import CARRIED, Resume
from virtio.vhost_user import message as wire
from virtio.vhost_user.frontend import PROTOCOL, ConnectionLost, Frontend, RequestRefused
from virtio.vhost_user.message import FrontendRequest, ProtocolFeature
from virtio.vhost_user.reconnecting import Reconnecting
from virtio.vhost_user.setup import Ring

TIMEOUT: Final = 5.0
"""Seconds that a back-end may take to answer, and that a call waits for one that went away to come back."""
QUEUE_SIZE: Final = 1024
"""Most entries of a queue, unless told otherwise: a back-end cannot be asked."""
MOST_RINGS: Final = wire.VRING_INDEX_MASK + 1
"""Queues that messages can name."""
MOST_CONFIG: Final = wire.MAX_BODY - wire.Config.LAYOUT.size
"""Bytes of configuration that messages can carry."""
_MESSAGE: Final = Features(range(64))
"""Features that a message has room for."""
_CTRL_VQ: Final = 17
"""Feature bit of the network device's control queue."""

_F, _P = FrontendRequest, ProtocolFeature


class VhostUserTransport(Reconnecting):
    """Carries everything from a driver to the back-end at `path_or_fd`: a path to connect to, or to `listen` at; a descriptor of a
    connection or of a listening socket, which becomes the transport's.

    vhost-user tells neither the type of a device, nor the size of its queues, nor always how many there are: `device_id`, `queue_size` and
    `queues` do. A network device's are two, and a control queue, unless the back-end can be asked.

    Whenever the back-end is gone, the next one takes its place: the transport connects again, or accepts again, and hands everything over.
    The driver notices nothing, unless the new one does not offer what was negotiated: then it reads NEEDS_RESET. With `reconnect` false, or
    over a given connection, everything raises `TransportError` from then on, and `gone` is true.

    What a device was told by a control queue no transport knows: drivers tell the next device (`Driver.resumed`). `NetDriver` tells how
    many queue pairs are in use, which is all that it ever told one of itself; what a caller of `command` said is for that caller to repeat.

    Not carried, and so never negotiated: what no 64-bit message holds, ACCESS_PLATFORM, NOTIFICATION_DATA, and `masked`.
    """

    def __init__(
        self,
        path_or_fd: str | os.PathLike[str] | int,
        device_id: int,
        *,
        listen: bool = False,
        reconnect: bool = True,
        queues: int | None = None,
        queue_size: int = QUEUE_SIZE,
        masked: Iterable[int] = (),
        timeout: float = TIMEOUT,
        connect_timeout: float | None = None,
        protocol_features: Features = PROTOCOL,
    ) -> None:
        """Connects, and asks for the device's features. `connect_timeout`: seconds to wait for the first back-end; without it a path to
        connect to is tried once, and one to listen at for `ACCEPT_TIMEOUT`. `timeout`: seconds that a back-end has for a request, and for
        all that it is told at once, be it ever so much. `protocol_features` is a choice from `PROTOCOL`.

        ValueError: a path longer than 107 bytes, numbers that cannot be, protocol features outside `PROTOCOL`. TransportError: no back-end
        is there, or none that answers as the protocol has it.
        """
        queue_size = arguments.integer("queue_size", queue_size, 1, MAX_QUEUE_SIZE)
        if queues is not None:
            queues = arguments.integer("queues", queues, 1, MOST_RINGS)
        if (timeout := arguments.seconds("timeout", timeout)) <= 0:
            raise ValueError(f"a time limit of {timeout:g} s is not above 0")
        if connect_timeout is not None:
            connect_timeout = arguments.seconds("connect_timeout", connect_timeout)
        check_choice("protocol features", protocol_features, PROTOCOL)
        self._device_id, self._queues, self._queue_size = arguments.number("device_id", device_id), queues, queue_size
        self._carried = (CARRIED & _MESSAGE) - features_of("masked", masked)
        self._refused = False
        super().__init__(path_or_fd, listen=listen, reconnect=reconnect, timeout=timeout, protocol_features=protocol_features)
        self._open(connect_timeout)

    # What it is.

    @property
    def device_id(self) -> int:
        """The device's type (5), as whoever opened it says."""
        return self._device_id

    @property
    def tracked(self) -> bool:
        """Whether the back-end writes down what it has in flight, for the next one."""
        return self._setup.tracked

    @property
    def has_config(self) -> bool:
        """Whether the device's configuration can be read: with CONFIG. Drivers accept no feature whose fields they could not read."""
        return _P.CONFIG in self._known

    @property
    def num_queues(self) -> int | None:
        """How many queues there are, if anybody told."""
        if self._queues is not None or self._device_id != DeviceId.NETWORK:
            return self._queues if self._told_queues is None else min(self._queues or MOST_RINGS, self._told_queues)
        pairs = 1 if self._told_queues is None else self._told_queues
        return min(2 * pairs + (_CTRL_VQ in self._offered), MOST_RINGS)

    # The device.

    @property
    @locked
    def status(self) -> Status:
        """The device status field (2.1): the back-end's with STATUS, else as it was set; with NEEDS_RESET if a ring broke."""
        self._check_open()
        if self._frontend is not None and _P.STATUS in self._frontend.protocol:
            try:
                value = self._frontend.number(_F.GET_STATUS)
            except ConnectionLost as error:
                self._lose(error)
                self._check_open()
            else:
                if value > 0xFF:
                    raise TransportError(f"device status {value:#x} of the back-end has more than 8 bits (GET_STATUS)")
                return Status(value) | self._fault
        return self._setup.status | self._fault

    @status.setter
    @locked
    def status(self, value: Status) -> None:
        self._check_open()
        before = self._setup.status
        if self._refused:
            value &= ~Status.FEATURES_OK
        self._setup.status = value
        try:
            if self._setup.live and Status.DRIVER_OK not in before:
                self._carry(self._start)
            elif self._frontend is not None:
                self._setup.tell_status(self._frontend, value)
        except ConnectionLost as error:
            self._lose(error)
            self._check_open()
        except BaseException:
            self._setup.status = before
            raise

    @property
    def config_generation(self) -> int:
        """Counts what the back-end said of changes, and back-ends that came back (2.5)."""
        return self._generation

    @property
    def config_interrupt(self) -> EventFd:
        """Signalled by configuration-change notifications (2.3), when a ring breaks, and when the back-end is gone or came back."""
        return self._config_interrupt

    @locked
    def offered(self) -> Features:
        """What the device offers, less what this transport does not carry."""
        self._await()
        return self._offered & self._carried

    @locked
    def accept(self, features: Features) -> None:
        """Sends what the driver accepts (3.1.1 step 4). If the back-end refuses it, FEATURES_OK does not stick."""
        self._check_open()
        self._setup.features = Features(features)
        self._refused = False
        try:
            self._carry(self._setup.tell_features)
        except RequestRefused:
            self._refused = True

    @locked
    def reset(self) -> None:
        """Asks for a device reset (2.4): all rings stop. With no back-end there now, the next one begins anew."""
        self._check_open()
        self._fault = Status(0)
        self._refused = False
        try:
            with self._together(self._frontend):
                self._setup.reset(self._frontend)
        except ConnectionLost as error:
            self._lose(error)
            self._check_open()
        for events in self._events.values():
            for event in events:
                event.drain()

    @locked
    def config_read(self, offset: int, length: int) -> bytes:
        """Reads the device's configuration (2.5). ValueError: outside it, or the back-end has none to read (no CONFIG)."""
        # From the first byte on: there are back-ends that take no notice of an offset.
        size = self._config_place(offset, length)
        reply = self._again(lambda frontend: frontend.ask(_F.GET_CONFIG, wire.Config(0, size, 0, bytes(size))))
        assert reply is not None and isinstance(reply.payload, wire.Config)
        if len(reply.payload.data) != size:
            raise ValueError(f"the back-end has no configuration bytes {offset}..{offset + length}")
        return reply.payload.data[offset : offset + length]

    @locked
    def config_write(self, offset: int, data: bytes) -> None:
        """Writes the device's configuration (2.5). ValueError: outside it, read-only, or the back-end has none (no CONFIG)."""
        self._config_place(offset, len(data))
        try:
            self._again(lambda frontend: frontend.ask(_F.SET_CONFIG, wire.Config(offset, len(data), 0, bytes(data))))
        except RequestRefused as error:
            raise ValueError(f"configuration bytes {offset}..{offset + len(data)}: {error}") from None

    # Queues.

    def queue_max(self, index: int) -> int:
        """Most entries that queue `index` may have; 0 if there is no such queue. Once the back-end writes down what it has in flight, no
        more than it has room for, until the device is reset."""
        count = self.num_queues
        if not 0 <= index < (MOST_RINGS if count is None else count):
            return 0
        return min(self._queue_size, self._setup.tracked_size(index) or MAX_QUEUE_SIZE)

    @locked
    def queue_setup(self, index: int, size: int, areas: tuple[int, int, int]) -> EventFd:
        """Keeps a queue for DRIVER_OK, when the back-end gets it; after that, at once. ValueError: no such queue, or more entries than
        `queue_max`."""
        self._check_open()
        if not 1 <= size <= (most := self.queue_max(index)):
            tracked = ": the back-end tracks so many until a reset" if most == self._setup.tracked_size(index) else ""
            why = f"queue {index} may have 1 to {most} entries, not {size}{tracked}"
            raise ValueError(why if most else f"the device has no queue {index}")
        if index in self._setup.rings:
            raise StatusError(f"queue {index} is set up already")
        kick, call, error = self._events_of(index)
        ring = self._setup.rings[index] = Ring(index, size, areas, kick, call, error)
        if self._setup.live and not self._fault:
            try:
                self._carry(lambda frontend: self._setup.start_ring(frontend, ring))
            except BaseException:
                self._setup.rings.pop(index, None)
                raise
        return kick

    @locked
    def queue_resumes(self, index: int, resume: Resume) -> None:
        """Where a queue that is set up goes on with another device: see `Resuming`. StatusError: it is not set up."""
        if index not in self._setup.rings:
            raise StatusError(f"queue {index} is not set up")
        self._setup.rings[index].resume = resume

    @locked
    def queue_reset(self, index: int) -> None:
        """Resets one queue (2.6.1), which RING_RESET allows: the back-end stops it."""
        self._check_open()
        if (ring := self._setup.rings.pop(index, None)) is not None:
            self._carry(lambda frontend: self._setup.stop_ring(frontend, ring))
            for event in self._events_of(index):
                event.drain()

    def interrupt(self, index: int) -> EventFd:
        """Signalled by used-buffer notifications of queue `index`. ValueError: no such queue."""
        if not self.queue_max(index):
            raise ValueError(f"the device has no queue {index}")
        return self._events_of(index)[1]

    @locked
    def attach(self, memory: Memory) -> int:
        """Lets the back-end map `memory`; returns the address at which the device sees it. One that ends meanwhile leaves it to the next.

        ValueError: it is attached already. TransportError: the back-end takes no more, or has ended for good.
        """
        self._check_open()
        try:
            return self._setup.attach(memory, self._frontend)
        except ConnectionLost as error:
            self._lose(error)
        self._check_open()
        return self._setup.attach(memory, None)

    @locked
    def detach(self, memory: Memory) -> None:
        """Takes `memory` from the back-end again. ValueError: it is not attached."""
        if self._closed:
            raise ValueError("the memory is not attached: the transport is closed")
        try:
            self._setup.detach(memory, self._frontend)
        except ConnectionLost as error:
            self._lose(error)

    # For whoever calls.

    def _start(self, frontend: Frontend) -> None:
        self._setup.start(frontend)
        self._setup.tell_status(frontend, self._setup.status)

    def _config_place(self, offset: int, length: int) -> int:
        self._check_open()
        if not self.has_config:
            raise ValueError("the back-end's configuration cannot be read: it does not offer CONFIG")
        if offset < 0 or length < 0 or offset + length > MOST_CONFIG:
            raise ValueError(f"configuration bytes {offset}..{offset + length} are outside 0..{MOST_CONFIG}")
        return offset + length
