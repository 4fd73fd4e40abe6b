"""A front-end's connection that outlives its back-ends: the next one is found, and told everything that the one before was.

One thread sleeps on it. It takes what the back-end says of its configuration, notices a ring that broke, a back-end that is gone and one
that says what nobody asked for, and finds the next.
"""

from __future__ import annotations

import logging
import os
import select
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from socket import socket
from threading import Condition, RLock, Thread, current_thread
from time import monotonic, sleep
from types import TracebackType
from typing import Final, Self, TypeVar

from virtio._core import EventFd
from virtio.errors import FeatureNegotiationError, SpecViolation, StatusError, TransportError, VirtioError
from virtio.features import Features
from virtio.spec import Status
from virtio.status import locked
from virtio.vhost_user.frontend import ConnectionLost, Frontend, RequestRefused
from virtio.vhost_user.setup import Setup
from virtio.vhost_user.socket import Source

ACCEPT_TIMEOUT: Final = 30.0
"""Seconds that a listening front-end waits for its first back-end."""
RETRY: Final = 0.05
"""Seconds before the second attempt to connect again; each further one waits twice as long, up to `LONGEST_RETRY`."""
LONGEST_RETRY: Final = 0.4

_log = logging.getLogger(__name__)
_Answer = TypeVar("_Answer")


class Reconnecting:
    """A connection to the back-end at `path_or_fd`, or to whichever takes its place. What each is told is in its `Setup`.

    A back-end has `timeout` seconds for a request, and for all that it is told at once: to greet it and to hand everything over, say.
    """

    def __init__(
        self, path_or_fd: str | os.PathLike[str] | int, *, listen: bool, reconnect: bool, timeout: float, protocol_features: Features
    ) -> None:
        self._source = Source(path_or_fd, listens=listen)
        self._lock = RLock()
        self._back = Condition(self._lock)
        self._timeout, self._protocol = timeout, protocol_features
        self._setup = Setup()
        self._fault = Status(0)
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

    def _open(self, patience: float | None) -> None:
        """Finds the first back-end, within so many seconds; None: as is usual. TransportError: there is none."""
        if patience is None:
            patience = ACCEPT_TIMEOUT if self._source.listener is not None else 0.0
        try:
            self._take(self._first(patience))
        except BaseException:
            self._release()
            raise
        self._helper = Thread(target=self._watch, name="virtio-vhost-user", daemon=True)
        self._helper.start()

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
    @locked
    def frontend(self) -> Frontend:
        """The connection, waiting for one if need be. TransportError: there is none."""
        self._await()
        assert self._frontend is not None
        return self._frontend

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
                with suppress(VirtioError), self._together(self._frontend):  # what is gone needs no reset
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
                with self._together(self._frontend):
                    action(self._frontend)
                return
            except ConnectionLost as error:
                self._lose(error)
        self._await()

    def _together(self, frontend: Frontend | None) -> AbstractContextManager[None]:
        return nullcontext() if frontend is None else frontend.together()

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

    @locked
    def _events_of(self, index: int) -> tuple[EventFd, EventFd, EventFd]:
        """Kick, call and error of a ring."""
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
            with frontend.together():
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
        self._epoll.register(frontend.descriptor, select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET)  # whoever asks reads, too
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
        if self._frontend is not None:
            try:
                self._frontend.check_quiet()
                if self._frontend.hung_up:
                    raise ConnectionLost("the back-end hung up")
            except ConnectionLost as lost:
                self._lose(lost)
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
