"""A front-end's end of one connection: requests with their replies, within a time limit, and what the back-end asks over its channel.

Any thread may call; requests wait for each other, the channel is served beside them. What the back-end may not send ends the connection, as
the text has it, and every descriptor that came is closed.
"""

import os
import select
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from math import ceil, inf
from threading import Lock, RLock
from time import monotonic
from typing import Final

from virtio.errors import TransportError
from virtio.features import Features
from virtio.status import locked
from virtio.vhost_user import effects as fx
from virtio.vhost_user import message as wire
from virtio.vhost_user.frontend_session import ConfigChanged, FrontendSession, Reply
from virtio.vhost_user.message import FrontendRequest, ProtocolFeature
from virtio.vhost_user.socket import Link

_F, _P = FrontendRequest, ProtocolFeature
PROTOCOL: Final = Features(
    {
        *(_P.MQ, _P.REPLY_ACK, _P.BACKEND_REQ, _P.CONFIG, _P.INFLIGHT_SHMFD, _P.RESET_DEVICE, _P.CONFIGURE_MEM_SLOTS, _P.STATUS),
    }
)
"""Protocol features that are accepted where they are offered."""
MOST_QUEUES: Final = 1 << 16
"""Most queues that a back-end is believed to have."""
CHANNEL_MESSAGES: Final = 64
"""Messages of the back-end that one turn reads at most."""


class ConnectionLost(TransportError):
    """The connection ended, or had to be ended: the back-end hung up, was silent for too long, or sent what it may not."""


class RequestRefused(TransportError):
    """The back-end acknowledged a request as failed. The connection stays."""


class Frontend:
    """One connection, over `connected`, which becomes its own.

    `offered` are the device's features, `offered_protocol` and `protocol` the protocol features that there are and those in use, `queues`
    how many queues the back-end says that it has (None if it cannot be asked), `slots` how many memory regions it takes. `changed` is
    called when it says that the configuration changed, in whatever thread reads that.
    """

    def __init__(
        self,
        connected: socket.socket,
        *,
        timeout: float,
        protocol_features: Features = PROTOCOL,
        changed: Callable[[], object] = lambda: None,
    ) -> None:
        self._lock = RLock()
        self._channel_lock = Lock()
        self._link = Link(connected)
        self._session = FrontendSession()
        self._channel: Link | None = None
        self._timeout, self._wanted, self._changed = timeout, protocol_features, changed
        self._deadline: float | None = None
        self._failed: ConnectionLost | None = None
        self._closed = False
        self.offered = Features()
        self.offered_protocol = Features()
        self.queues: int | None = None
        self.slots = wire.MAX_REGIONS

    @property
    def protocol(self) -> Features:
        """The protocol features in use."""
        return self._session.protocol

    @property
    def descriptor(self) -> int:
        """The connection's."""
        return self._link.fileno()

    @property
    def channel(self) -> int | None:
        """The descriptor of the back-end's channel, readable when `serve_channel` has something to do; None: there is none."""
        channel = self._channel
        return None if channel is None else channel.fileno()

    @property
    def protocol_bit(self) -> Features:
        """What SET_FEATURES carries beside the device's features: the bit that says that there are protocol features."""
        return Features({wire.PROTOCOL_FEATURES_BIT}) & self.offered

    @contextmanager
    def together(self) -> Iterator[None]:
        """All that is asked here has to be answered within one time limit, not each of it."""
        with self._lock:
            before = self._deadline
            self._deadline = before or monotonic() + self._timeout
            try:
                yield
            finally:
                self._deadline = before

    def check_quiet(self) -> None:
        """ConnectionLost: the back-end says what nobody asked for. Never waits: whoever asks something now looks for himself."""
        if self._failed is None and self._lock.acquire(blocking=False):
            try:
                self._hear_unasked()
            except TransportError as error:
                self._fail(str(error))
                assert self._failed is not None
                raise self._failed from None
            finally:
                self._lock.release()

    def _hear_unasked(self) -> None:
        while (early := self._read()) is not None:  # with nothing awaited, every byte is one too many
            self._feed(*early)

    @property
    def hung_up(self) -> bool:
        """Whether the back-end has hung up."""
        if self._closed:
            return True
        look = select.poll()
        look.register(self._link.fileno(), select.POLLRDHUP)
        return bool(look.poll(0))

    @locked
    def greet(self) -> None:
        """Everything up to the device's features, in QEMU's order. TransportError: as `ask`, or numbers that cannot be."""
        self.offered = Features.from_mask(self.number(_F.GET_FEATURES))
        if self.protocol_bit:
            self.number(_F.GET_PROTOCOL_FEATURES)
            self.offered_protocol = self._session.offered_protocol or Features()
            self.ask(_F.SET_PROTOCOL_FEATURES, wire.U64(int(self.offered_protocol & self._wanted)))
            if _P.MQ in self.protocol:
                self.queues = self.number(_F.GET_QUEUE_NUM)
                if not 1 <= self.queues <= MOST_QUEUES:
                    raise TransportError(f"the back-end says that it has {self.queues} queues, not 1 to {MOST_QUEUES} (GET_QUEUE_NUM)")
            if _P.CONFIGURE_MEM_SLOTS in self.protocol:
                self.slots = self.number(_F.GET_MAX_MEM_SLOTS)
            if _P.BACKEND_REQ in self.protocol:
                self._open_channel()
        self.ask(_F.SET_OWNER)
        self.offered = Features.from_mask(self.number(_F.GET_FEATURES))  # some tell all of them only to their owner

    def number(self, request: FrontendRequest) -> int:
        """A request that is answered by a number. TransportError: as `ask`."""
        reply = self.ask(request)
        assert reply is not None
        return int(reply.payload.value)

    @locked
    def ask(self, request: FrontendRequest, payload: wire.Payload | None = None, descriptors: Iterable[int] = ()) -> Reply | None:
        """Sends a request, and waits for its reply or acknowledgement; None if it has neither.

        Descriptors in the reply are the caller's. RequestRefused: the back-end refuses it. ConnectionLost: it does not answer within the
        time limit, answers what it may not, or is gone; here and ever after.
        """
        if self._failed is not None:
            raise self._failed
        try:
            return self._exchange(request, payload, descriptors)
        except RequestRefused:
            raise
        except TransportError as error:
            self._fail(str(error))
            assert self._failed is not None
            raise self._failed from None
        except BaseException as error:  # Ctrl-C, say: a reply may be under way, and nobody could tell to what
            if self._session.awaited:
                self._fail(f"a request to the back-end was interrupted ({error!r})")
            raise

    def _exchange(self, request: FrontendRequest, payload: wire.Payload | None, descriptors: Iterable[int]) -> Reply | None:
        deadline = min(monotonic() + self._timeout, self._deadline or inf)
        self._hear_unasked()
        self._link.send(self._session.request(request, payload, descriptors))
        while self._link.waiting:
            self._wait(select.POLLOUT, deadline, f"does not read {request.name}")
            self._link.flush()
        while self._session.awaited:
            if (received := self._read()) is None:
                self._wait(select.POLLIN, deadline, f"does not answer {request.name}")
            elif (reply := self._feed(*received)) is not None:
                if reply.refused:
                    raise RequestRefused(f"the back-end refuses {request.name} ({reply.payload.value:#x})")
                return reply
        return None

    def _read(self) -> tuple[bytes, list[int]] | None:
        received = self._link.receive(self._session.needed)
        if received is not None and not received[0]:
            _close(received[1])
            raise TransportError("the back-end hung up")
        return received

    def _feed(self, data: bytes, descriptors: list[int]) -> Reply | None:
        found: Reply | None = None
        wrong: str | None = None
        for effect in self._session.feed(data, descriptors):
            match effect:
                case Reply():
                    found = effect
                case fx.Disconnect(error):
                    wrong = f"the back-end broke the protocol: {error}"
                case fx.CloseDescriptors(extra):
                    _close(extra)
        if wrong is not None:
            _close(found.descriptors if found else ())
            raise TransportError(wrong)
        return found

    def _wait(self, what: int, deadline: float, why: str) -> None:
        """Until the connection is ready for `what`. The channel is served meanwhile: the back-end may wait for an answer there."""
        link = self._link.fileno()
        while True:
            sleep_on = select.poll()
            sleep_on.register(link, what)
            if (channel := self.channel) is not None:
                sleep_on.register(channel, select.POLLIN)
            ready = [descriptor for descriptor, _ in sleep_on.poll(ceil(max(0.0, deadline - monotonic()) * 1000))]
            if link in ready:
                return
            if not ready or monotonic() >= deadline:
                besides = ", with all that it was asked at once" if self._deadline is not None else ""
                raise TransportError(f"the back-end {why} within {self._timeout:g} s{besides}")
            self.serve_channel()

    # The back-end's channel.

    def _open_channel(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            self._channel = Link(ours)
            self.ask(_F.SET_BACKEND_REQ_FD, None, [theirs.fileno()])

    def serve_channel(self) -> None:
        """Answers what the back-end asks over its channel, and calls `changed` when it says that the configuration did. Never waits."""
        with self._channel_lock:
            for _ in range(CHANNEL_MESSAGES):
                if self._channel is None or (received := self._channel.receive(self._session.channel_needed)) is None:
                    break
                data, descriptors = received
                if not data:
                    _close(descriptors)
                    self._end_channel()
                    break
                for step in self._session.feed_channel(data, descriptors):
                    for effect in step.effects:
                        if isinstance(effect, ConfigChanged):
                            self._changed()
                        _close(getattr(effect, "descriptors", ()))
                    try:
                        if any(isinstance(effect, fx.Disconnect) for effect in step.effects):
                            self._end_channel()
                        elif self._channel is not None:
                            self._channel.send(step.done(None))
                    except TransportError:
                        self._end_channel()

    def _end_channel(self) -> None:
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()

    # The end.

    def _fail(self, reason: str) -> None:
        self._failed = self._failed or ConnectionLost(reason)
        self.shut()

    def shut(self) -> None:
        """Ends the connection; whoever waits for a reply wakes. From any thread."""
        if not self._closed:
            self._link.shut()

    def close(self) -> None:
        """Ends the connection, and closes what is its own. Again does nothing."""
        self.shut()
        with self._lock, self._channel_lock:
            if self._closed:
                return
            self._closed = True
            self._failed = self._failed or ConnectionLost("the connection was closed")
            for effect in self._session.end():
                _close(getattr(effect, "descriptors", ()))
            self._end_channel()
            self._link.close()


def _close(descriptors: Iterable[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
