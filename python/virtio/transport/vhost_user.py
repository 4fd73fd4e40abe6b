"""Virtio over vhost-user, the front-end: a driver of ours on anybody's back-end.

    with VhostUserTransport("net.sock", DeviceId.NETWORK) as transport, NetDriver(transport) as net:
        ...

Doorbells and interrupts are the rings' eventfds themselves, so frames move with nobody in between. One thread sleeps on the connection: it
takes what the back-end says of its configuration, notices a ring that broke and a back-end that is gone, and finds the next one.
"""

import logging
import os
import select
from collections.abc import Callable, Iterable
from contextlib import suppress
from socket import socket
from threading import Condition, RLock, Thread, current_thread
from time import monotonic, sleep
from types import TracebackType
from typing import Final, Self, TypeVar

from virtio._core import EventFd, Memory
from virtio.errors import FeatureNegotiationError, SpecViolation, StatusError, TransportError, VirtioError
from virtio.features import Features
from virtio.spec import MAX_QUEUE_SIZE, DeviceId, Status
from virtio.status import locked
from virtio.transport import CARRIED, Resume
from virtio.vhost_user import message as wire
from virtio.vhost_user.frontend import PROTOCOL, ConnectionLost, Frontend, RequestRefused
from virtio.vhost_user.message import FrontendRequest, ProtocolFeature
from virtio.vhost_user.setup import Ring, Setup
from virtio.vhost_user.socket import Source

TIMEOUT: Final = 5.0
"""Seconds that a back-end may take to answer, and that a call waits for one that went away to come back."""
ACCEPT_TIMEOUT: Final = 30.0
"""Seconds that a listening front-end waits for its first back-end."""
RETRY: Final = 0.05
"""Seconds before the second attempt to connect again; each further one waits twice as long, up to `LONGEST_RETRY`."""
LONGEST_RETRY: Final = 0.4
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

_log = logging.getLogger(__name__)
_F, _P = FrontendRequest, ProtocolFeature
_Answer = TypeVar("_Answer")


class VhostUserTransport:
    """Carries everything from a driver to the back-end at `path_or_fd`: a path to connect to, or to `listen` at; a descriptor of a
    connection or of a listening socket, which becomes the transport's.

    vhost-user tells neither the type of a device, nor the size of its queues, nor always how many there are: `device_id`, `queue_size` and
    `queues` do. A network device's are two, and a control queue, unless the back-end can be asked.

    Whenever the back-end is gone, the next one takes its place: the transport connects again, or accepts again, and hands everything over.
    The driver notices nothing, unless the new one does not offer what was negotiated: then it reads NEEDS_RESET. With `reconnect` false, or
    over a given connection, everything raises `TransportError` from then on, and `gone` is true.

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
        connect to is tried once, and one to listen at for `ACCEPT_TIMEOUT`. `protocol_features` is a choice from `PROTOCOL`.

        ValueError: a path longer than 107 bytes, numbers that cannot be. TransportError: no back-end is there, or none that answers as the
        protocol has it.
        """
        if not 1 <= queue_size <= MAX_QUEUE_SIZE:
            raise ValueError(f"queue size {queue_size} is outside 1..{MAX_QUEUE_SIZE}")
        if queues is not None and not 1 <= queues <= MOST_RINGS:
            raise ValueError(f"{queues} queues are outside 1..{MOST_RINGS}")
        if timeout <= 0:
            raise ValueError(f"a time limit of {timeout} s is not above 0")
        self._source = Source(path_or_fd, listens=listen)
        self._lock = RLock()
        self._back = Condition(self._lock)
        self._device_id, self._queues, self._queue_size = device_id, queues, queue_size
        self._carried = (CARRIED & _MESSAGE) - Features(masked)
        self._timeout, self._protocol = timeout, protocol_features
        self._setup = Setup()
        self._fault = Status(0)
        self._refused = False
        self._generation = 0
        self._gone: TransportError | None = None
        self._frontend: Frontend | None = None
        self._greeted: Frontend | None = None
        self._offered, self._known = Features(), Features()
        self._told_queues: int | None = None
        self._reconnections = 0
        self._closing = self._closed = False
        self._callers: list[Thread] = []
        self.on_resumed: Callable[[], object] | None = None
        """See `Resuming`."""
        self._retry, self._retry_at, self._taken_at = RETRY, 0.0, 0.0
        self._config_interrupt = EventFd()
        self._wake = EventFd()
        self._events: dict[int, tuple[EventFd, EventFd, EventFd]] = {}
        self._reconnect = reconnect and self._source.repeats
        self._epoll = select.epoll()
        self._epoll.register(self._wake.fileno(), select.EPOLLIN)
        if connect_timeout is None:
            connect_timeout = ACCEPT_TIMEOUT if self._source.listener is not None else 0.0
        try:
            self._take(self._first(connect_timeout))
        except BaseException:
            self._release()
            raise
        self._helper = Thread(target=self._watch, name="virtio-vhost-user", daemon=True)
        self._helper.start()

    # What it is.

    @property
    def device_id(self) -> int:
        """The device's type (5), as whoever opened it says."""
        return self._device_id

    @property
    def connected(self) -> bool:
        """Whether a back-end is there now."""
        return self._frontend is not None

    @property
    def gone(self) -> bool:
        """Whether the back-end ended for good."""
        return self._gone is not None

    @property
    @locked
    def reconnections(self) -> int:
        """How many back-ends took the place of one before."""
        return self._reconnections

    @property
    def tracked(self) -> bool:
        """Whether the back-end writes down what it has in flight, for the next one."""
        return self._setup.tracked

    @property
    @locked
    def frontend(self) -> Frontend:
        """The connection, waiting for one if need be. TransportError: there is none."""
        self._await()
        assert self._frontend is not None
        return self._frontend

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
        """Most entries that queue `index` may have; 0 if there is no such queue."""
        count = self.num_queues
        return self._queue_size if 0 <= index < (MOST_RINGS if count is None else count) else 0

    @locked
    def queue_setup(self, index: int, size: int, areas: tuple[int, int, int]) -> EventFd:
        """Keeps a queue for DRIVER_OK, when the back-end gets it; after that, at once. ValueError: no such queue, or too large: after
        DRIVER_OK also larger than what the back-end tracks."""
        self._check_open()
        if not 1 <= size <= (most := self.queue_max(index)):
            raise ValueError(f"queue {index} may have 1 to {most} entries, not {size}" if most else f"the device has no queue {index}")
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
        """Where a queue that is set up goes on with another device: see `Resuming`."""
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
        return self._events_of(index)[1]

    @locked
    def attach(self, memory: Memory) -> int:
        """Lets the back-end map `memory`; returns the address at which the device sees it.

        ValueError: it is attached already. TransportError: the back-end takes no more.
        """
        self._check_open()
        return self._setup.attach(memory, self._frontend)

    @locked
    def detach(self, memory: Memory) -> None:
        """Takes `memory` from the back-end again. ValueError: it is not attached."""
        if self._closed:
            raise ValueError("the memory is not attached: the transport is closed")
        try:
            self._setup.detach(memory, self._frontend)
        except ConnectionLost as error:
            self._lose(error)

    def close(self) -> None:
        """Resets the device, and ends the connection and the thread. Closing twice is closing once."""
        self._closing = True
        if (busy := self._greeted) is not None and busy is not self._frontend:
            busy.shut()  # so that the thread does not wait for its answer
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._wake.signal()
            if self._frontend is not None:
                with suppress(VirtioError):  # what is gone needs no reset
                    self._setup.reset(self._frontend)
            self._back.notify_all()
        for thread in (self._helper, *self._callers):
            if thread is not current_thread():
                thread.join()
        self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # For whoever calls.

    def _check_open(self) -> None:
        if self._closing:
            raise StatusError("the transport is closed")
        if self._gone is not None:
            raise TransportError(f"the device is gone: {self._gone}")

    def _await(self) -> None:
        """Returns with a connection. TransportError: there is none within the time limit."""
        deadline = monotonic() + self._timeout
        while True:
            self._check_open()
            if self._frontend is not None:
                return
            if (left := deadline - monotonic()) <= 0:
                raise TransportError(f"no back-end came back to {self._source.name} within {self._timeout:g} s")
            self._back.wait(left)

    def _carry(self, action: Callable[[Frontend], None]) -> None:
        """Tells the back-end of a change that is in the setup already. If it ends meanwhile, the next one is told everything."""
        if self._frontend is not None:
            try:
                action(self._frontend)
                return
            except ConnectionLost as error:
                self._lose(error)
        self._await()

    def _again(self, question: Callable[[Frontend], _Answer]) -> _Answer:
        """Asks, and asks the next back-end if the first one ends meanwhile."""
        deadline = monotonic() + self._timeout
        while True:
            self._await()
            assert self._frontend is not None
            try:
                return question(self._frontend)
            except ConnectionLost as error:
                self._lose(error)
                if monotonic() >= deadline:
                    raise

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

    @locked
    def _events_of(self, index: int) -> tuple[EventFd, EventFd, EventFd]:
        if not self.queue_max(index):
            raise ValueError(f"the device has no queue {index}")
        if index not in self._events:
            self._events[index] = (EventFd(), EventFd(), error := EventFd())
            self._epoll.register(error.fileno(), select.EPOLLIN)
        return self._events[index]

    # Connections.

    def _first(self, patience: float) -> socket:
        deadline = monotonic() + patience
        while True:
            try:
                if (found := self._source.next()) is not None:
                    return found
                why = f"no back-end connected to {self._source.name} within {patience:g} s"
            except TransportError as error:
                why = str(error)
            if monotonic() >= deadline:
                raise TransportError(why)
            sleep(min(RETRY, max(0.0, deadline - monotonic())))

    def _take(self, connected: socket) -> None:
        """Greets a back-end, and hands everything over. TransportError, OSError: it is none, or gone again."""
        frontend = Frontend(connected, timeout=self._timeout, protocol_features=self._protocol, changed=self._changed)
        self._greeted = frontend
        self._setup.disconnected()
        try:
            if self._closing:
                raise ConnectionLost("the transport is closed")
            frontend.greet()
            if not self._fault:
                try:
                    self._setup.bring(frontend)
                except (FeatureNegotiationError, RequestRefused, SpecViolation, StatusError) as error:
                    _log.warning("%s: the device needs a reset: %s", self._source.name, error)
                    self._fault = Status.NEEDS_RESET
        except BaseException:
            self._greeted = None
            frontend.close()
            raise
        self._offered, self._known, self._told_queues = frontend.offered, frontend.protocol, frontend.queues
        self._epoll.register(frontend.descriptor, select.EPOLLRDHUP)
        if frontend.channel is not None:
            self._epoll.register(frontend.channel, select.EPOLLIN)
        self._frontend, self._taken_at = frontend, monotonic()

    def _lose(self, error: TransportError) -> None:
        """The connection is gone: forgets it, and lets the thread look for the next, or gives up."""
        frontend, self._frontend, self._greeted = self._frontend, None, None
        if frontend is None:
            return
        for descriptor in (frontend.descriptor, frontend.channel):
            if descriptor is not None:
                with suppress(OSError, ValueError):  # the channel may end at any time
                    self._epoll.unregister(descriptor)
        frontend.close()
        if self._reconnect:
            _log.info("%s: %s", self._source.name, error)
            if self._source.listener is None and monotonic() - self._taken_at < LONGEST_RETRY:
                self._pause()  # as if it had not come at all
            else:
                self._retry, self._retry_at = RETRY, monotonic()
            if self._source.listener is not None:
                self._epoll.register(self._source.listener.fileno(), select.EPOLLIN)
            self._wake.signal()
        else:
            self._gone = error
            self._tell()

    def _tell(self) -> None:
        """Wakes whoever waits, to look at the status."""
        self._generation += 1
        self._config_interrupt.signal()
        for _, call, _ in self._events.values():
            call.signal()

    def _changed(self) -> None:
        """The back-end says that the configuration changed. Called by whoever reads its channel."""
        self._generation += 1
        self._config_interrupt.signal()

    # The thread.

    def _watch(self) -> None:
        while not self._closing:
            searching = self._frontend is None and self._gone is None and self._source.listener is None
            self._epoll.poll(max(0.0, self._retry_at - monotonic()) if searching else None)
            if (frontend := self._frontend) is not None:
                frontend.serve_channel()
            with self._lock:
                self._wake.drain()
                if self._closing:
                    return
                self._look()

    def _look(self) -> None:
        """At everything that may have woken the thread."""
        if self._frontend is not None and self._frontend.hung_up:
            self._lose(ConnectionLost("the back-end hung up"))
        for index, (_, _, error) in self._events.items():
            if error.drain() and self._setup.live:
                _log.warning("%s: ring %d is broken, says the back-end", self._source.name, index)
                self._fault = Status.NEEDS_RESET
                self._tell()
        if self._frontend is None and self._gone is None and self._retry_at <= monotonic():
            self._search()

    def _search(self) -> None:
        try:
            if (connected := self._source.next()) is None:
                return
            self._take(connected)
        except (TransportError, OSError) as error:
            _log.debug("%s: %s", self._source.name, error)
            self._pause()
            return
        if self._source.listener is not None:
            self._epoll.unregister(self._source.listener.fileno())
        self._reconnections += 1
        self._tell()
        self._back.notify_all()
        self._callers = [thread for thread in self._callers if thread.is_alive()]
        if self.on_resumed is not None and self._setup.live and not self._fault:
            self._callers.append(Thread(target=self._call, args=(self.on_resumed,), name="virtio-vhost-user-resumed", daemon=True))
            self._callers[-1].start()

    def _pause(self) -> None:
        """Before the next attempt to connect."""
        self._retry_at = monotonic() + self._retry
        self._retry = min(2 * self._retry, LONGEST_RETRY)

    def _call(self, resumed: Callable[[], object]) -> None:
        try:
            resumed()
        except Exception as error:
            with self._lock:
                if not self._closing and self._setup.live:
                    _log.warning("%s: the device needs a reset: %s", self._source.name, error)
                    self._fault = Status.NEEDS_RESET
                    self._tell()

    def _release(self) -> None:
        """Closes everything that is its own."""
        if (frontend := self._frontend or self._greeted) is not None:
            frontend.close()
        self._frontend = self._greeted = None
        self._setup.forget_area()
        self._source.close()
        self._epoll.close()
        for events in self._events.values():
            for event in events:
                event.close()
        self._config_interrupt.close()
        self._wake.close()
