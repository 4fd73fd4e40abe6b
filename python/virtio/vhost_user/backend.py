"""A vhost-user back-end: devices of ours for a virtual machine that somebody else runs.

    with Backend("/tmp/net.sock", Answer()) as backend:
        backend.serve()

Any thread, or a signal handler, may call `stop`. With asyncio: `await backend.run()`. Any other loop calls `process` when `fileno` is
readable, and after `wait_time` seconds.
"""

import logging
import math
import os
import select
import socket
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from threading import RLock
from types import TracebackType
from typing import Final, NoReturn, Self

from virtio import arguments
from virtio._core import EventFd
from virtio.device import Device, check_device
from virtio.errors import StatusError, TransportError
from virtio.features import Features, check_choice, features_of
from virtio.port import readable
from virtio.vhost_user.connection import PROTOCOL, Connection
from virtio.vhost_user.socket import Link, Place, adopt, check_path, connect, listen, listening

RETRY: Final = 0.1
"""Seconds between attempts to connect, and to accept once that has failed."""
LOG_INTERVAL: Final = 0.05
"""Seconds between writes to a dirty log."""

FRESH: Final = 0.001
"""Seconds of serving after which connections are heard again before the next ring."""

_log = logging.getLogger(__name__)


class Backend:
    """Serves `device` to front-ends at `path_or_fd`.

    It listens there, or with `connect` it connects, again whenever the connection is gone. A descriptor, which becomes the back-end's, is
    of a listening socket or of a connection. `device` is a device, which has one connection at a time (others wait), or what makes one for
    each connection. `poll` never sleeps while a ring runs. `report` is told of mistakes of front-ends and of what ended a connection; by
    default `logging` is. `protocol_features` is a choice from `PROTOCOL`; `withheld` are features of devices that are not offered here.

    Devices run in the thread that processes. What is driven by hand (`Device.serves` is false) belongs in that thread too. An exception of
    theirs ends their connection and is reported; SystemExit and KeyboardInterrupt are the program's, and go through.

    TypeError: a device whose constructor does not call the base class's. ValueError: a path longer than 107 bytes, protocol features
    outside `PROTOCOL`. TransportError: the path is in use, is no socket, or cannot be made; the descriptor is not a Unix socket's, or its
    socket neither listens nor is connected.
    """

    def __init__(
        self,
        path_or_fd: str | os.PathLike[str] | int,
        device: Device | Callable[[], Device],
        connect: bool = False,
        *,
        poll: bool = False,
        report: Callable[[Exception], object] | None = None,
        protocol_features: Features = PROTOCOL,
        withheld: Iterable[int] = (),
    ) -> None:
        if isinstance(device, type) or not isinstance(device, Device):
            arguments.call("device", device)
        else:
            check_device(device)
        if report is not None:
            arguments.call("report", report)
        if not isinstance(path_or_fd, int | str | os.PathLike):
            raise arguments.wrong_type("path_or_fd", path_or_fd, "a path, or a socket's descriptor")
        check_choice("protocol features", protocol_features, PROTOCOL)
        self._withheld = features_of("withheld", withheld)
        self.accepted = 0
        """How many front-ends have connected, and were given a device, since it was made."""
        self._device, self._poll, self._protocol = device, poll, protocol_features
        self._report = report
        self._path: str | None = None
        self._place: Place | None = None
        self._listener: socket.socket | None = None
        self._accepting = False
        self._accept_at: float | None = None
        self._connecting = False
        self._retry_at = 0.0
        self._unreached = ""
        self._connections: list[Connection] = []
        self._watched: dict[int, Callable[[], object]] = {}
        first: socket.socket | None = None
        if isinstance(path_or_fd, int):
            first = adopt(arguments.integer("path_or_fd", path_or_fd, 0, (1 << 31) - 1))
            if listening(first):
                first.setblocking(False)
                self._listener, first = first, None
        else:
            self._path = check_path(os.fspath(path_or_fd))
            self._connecting = connect
            if not connect:
                self._listener = listen(self._path)
                self._place = Place.of(self._path)
        self._sleep: tuple[select.epoll, EventFd] | None = select.epoll(), EventFd()
        self._epoll.register(self._wake.fileno(), select.EPOLLIN)
        self._stopping = False
        self._turn = RLock()
        """Held while anything but sleeping is done, so that nothing is closed under it; by a handler that closes, too."""
        self._closed = self._ended = False
        if first is not None:
            self._begin(first)
        self._accept_or_not()

    @property
    def connections(self) -> int:
        """How many front-ends are connected."""
        return len(self._connections)

    @property
    def ended(self) -> bool:
        """Whether the only connection that there can be has ended."""
        return not self._connections and self._listener is None and not self._connecting

    def fileno(self) -> int:
        """A descriptor that is readable when `process` has something to do, but for what time brings: `wait_time`. StatusError: closed."""
        return self._epoll.fileno()

    @property
    def wait_time(self) -> float | None:
        """Seconds after which `process` has something to do even if `fileno` is not readable; None: never."""
        waits: list[float] = []
        if self._connecting and not self._connections:
            waits.append(max(0.0, self._retry_at - time.monotonic()))
        if self._accept_at is not None and self._room and not self._accepting:
            waits.append(max(0.0, self._accept_at - time.monotonic()))
        if any(connection.busy for connection in self._connections):
            waits.append(0.0)
        if any(connection.logging for connection in self._connections):
            waits.append(LOG_INTERVAL)
        return min(waits, default=None)

    def process(self, timeout: float | None = 0.0) -> int:
        """Handles what there is to do, sleeping up to `timeout` seconds (None: for ever); how many events.

        StatusError: closed, by another thread meanwhile too.
        """
        if timeout is not None:
            timeout = arguments.seconds("timeout", timeout)
        with self._turn:
            if self._closed:
                self._over()
            if self._connecting and not self._connections and self._retry_at <= time.monotonic():
                self._connect()
            if self._accept_at is not None:
                self._accept_or_not()
            wait = self.wait_time
            sleep = wait if timeout is None else timeout if wait is None else min(wait, timeout)
            epoll, wake = self._sleep or self._over()  # held, so that they stay open until this is awake
        events = epoll.poll(-1 if sleep is None else sleep)
        del epoll, wake  # which an exception would keep
        with self._turn:
            return self._carry_out(events, math.inf if timeout is None else timeout)

    def _carry_out(self, events: list[tuple[int, int]], spin: float) -> int:
        # Messages first: a ring that is disabled or moved by one, or whose front-end is gone, is not served once more as it was.
        done, others = self._hear(events)
        heard = time.monotonic()
        for descriptor in others:
            if time.monotonic() - heard > FRESH:  # what was served before took its time
                done += self._hear(self._epoll.poll(0))[0]
                heard = time.monotonic()
            if descriptor == self._wake.fileno():
                self._wake.drain()
            elif (call := self._watched.get(descriptor)) is not None:
                call()
                done += 1
        for connection in self._connections:
            if connection.busy:
                if time.monotonic() - heard > FRESH:
                    done += self._hear(self._epoll.poll(0))[0]
                    heard = time.monotonic()
                done += connection.spin(spin)
            if connection.logging and not connection.closed:
                connection.flush_log()
        self._forget()
        return done

    def _hear(self, events: list[tuple[int, int]]) -> tuple[int, list[int]]:
        """Carries out the messages that are among `events`; on how many connections, and what else is ready. StatusError: closed."""
        if self._closed:  # or somebody waits for this turn's end to do that
            self._over()
        links = {connection.descriptor for connection in self._connections}
        said = [descriptor for descriptor, _ in events if descriptor in links]
        for descriptor in said:
            if (call := self._watched.get(descriptor)) is not None:
                call()
        return len(said), [descriptor for descriptor, _ in events if descriptor not in links]

    def serve(self) -> None:
        """Processes until `stop`, or until the only connection that there can be has ended. StatusError: closed meanwhile."""
        while not self._stopping and not self.ended:
            self.process(None)
        self._stopping = False

    async def run(self) -> None:
        """As `serve`, in a task of an asyncio loop: that loop's thread is the one that processes, whenever there is something to do."""
        import asyncio

        while not self._stopping and not self.ended:
            if (wait := self.wait_time) == 0:
                await asyncio.sleep(0)  # whoever else has something to do
            else:
                epoll, wake = self._sleep or self._over()  # held, as in `process`
                with suppress(TimeoutError):
                    async with asyncio.timeout(wait):
                        await readable(epoll)
                del epoll, wake
            self.process()
        self._stopping = False

    def stop(self) -> None:
        """Lets `serve` and `run` return. From any thread, or from a signal handler."""
        self._stopping = True
        with suppress(StatusError):
            self._wake.signal()

    def close(self) -> None:
        """Ends all connections, resets their devices, and removes the socket that it made, unless its path is somebody else's by now.

        From any thread: it waits for what another one is processing, a device's handler say. Again does nothing.
        """
        self._closed = True  # a thread that processes begins nothing more
        with self._turn, ExitStack() as left:  # whatever leaves one of them, the others are closed
            if self._ended:
                return
            self._ended = True
            left.callback(self._release)
            for connection in self._connections:
                left.callback(connection.close)

    def _release(self) -> None:
        self._connections.clear()
        if self._listener is not None:
            if self._place is not None:
                self._place.remove()
            self._listener.close()
        self._wake.signal()
        self._sleep = None

    def __enter__(self) -> Self:
        if self._closed:
            self._over()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def _epoll(self) -> select.epoll:
        return (self._sleep or self._over())[0]

    @property
    def _wake(self) -> EventFd:
        return (self._sleep or self._over())[1]

    def _over(self) -> NoReturn:
        raise StatusError("the back-end is closed")

    # For connections.

    def watch(self, descriptor: int, call: Callable[[], object]) -> None:
        """Calls `call` when `descriptor` is readable."""
        self._epoll.register(descriptor, select.EPOLLIN)
        self._watched[descriptor] = call

    def await_room(self, descriptor: int, *, wanted: bool) -> None:
        """Calls it when there is room to write, not when it is readable; or, not `wanted`, as before."""
        self._epoll.modify(descriptor, select.EPOLLOUT if wanted else select.EPOLLIN)

    def unwatch(self, descriptor: int) -> None:
        """No more."""
        if self._watched.pop(descriptor, None) is not None:
            self._epoll.unregister(descriptor)

    def report(self, error: Exception) -> None:
        """Tells who was named, or the log."""
        if self._report is not None:
            self._report(error)
        else:
            _log.warning("%s", error)

    # Connections.

    def _connect(self) -> None:
        assert self._path is not None
        self._retry_at = time.monotonic() + RETRY
        try:
            self._begin(connect(self._path))
            self._unreached = ""
        except TransportError as error:
            nobody = isinstance(error.__cause__, FileNotFoundError | ConnectionRefusedError)
            if not nobody and str(error) != self._unreached:  # once: it is tried again and again
                self.report(error)
            self._unreached = "" if nobody else str(error)

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            accepted, _ = self._listener.accept()
        except (BlockingIOError, ConnectionError):
            return
        except OSError as error:  # no descriptor is left: what waits keeps the listener readable, so nobody looks at it for a while
            if self._accept_at is None:
                self.report(error)
            self._accept_at = time.monotonic() + RETRY
            self._accept_or_not()
            return
        self._accept_at = None
        self._begin(accepted)

    def _begin(self, connected: socket.socket) -> None:
        link = Link(connected)
        try:
            device = self._device if isinstance(self._device, Device) else self._device()
            check_device(device)
            made = Connection(link, device, self, protocol_features=self._protocol, poll=self._poll, withheld=self._withheld)
            self._connections.append(made)
            self.accepted += 1
        except Exception as error:
            link.close()
            self.report(error)
        self._accept_or_not()

    def _forget(self) -> None:
        if any(connection.closed for connection in self._connections):
            self._connections = [connection for connection in self._connections if not connection.closed]
            self._accept_or_not()

    @property
    def _room(self) -> bool:
        """Whether there may be another connection. A device that is taken takes no second one: it waits in the kernel."""
        return self._listener is not None and not (isinstance(self._device, Device) and self._connections)

    def _accept_or_not(self) -> None:
        wanted = self._room and (self._accept_at is None or self._accept_at <= time.monotonic())
        if wanted is not self._accepting and self._listener is not None:
            self._accepting = wanted
            if wanted:
                self.watch(self._listener.fileno(), self._accept)
            else:
                self.unwatch(self._listener.fileno())
