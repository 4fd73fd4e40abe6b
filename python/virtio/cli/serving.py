"""The loop of `virtio serve`: back-ends, signals, a count now and then. It sleeps when nothing happens."""

import select
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from time import monotonic
from types import FrameType
from typing import Any, Final, NamedTuple, Protocol

from virtio import EventFd
from virtio.cli.counters import Counted
from virtio.cli.signals import SIGNALS
from virtio.cli.switch import Patch
from virtio.vhost_user.backend import Backend

INTERVAL: Final = 1.0
"""Seconds between counts."""
AT_ONCE: Final = 0.5
"""Seconds in which several signals ask for one end: a process and its group are often sent one each."""
LOOK: Final = 0.005
"""Seconds after which frames that wait for room are tried again."""

Emit = Callable[..., None]
"""Called with a kind of event, and its values by name: what JSON can say."""


class Serving(NamedTuple):
    """One socket, and what is counted at it."""

    name: str
    backend: Backend
    counted: Counted
    what: str
    opening: str
    """The event that tells of it."""
    errors: list[Exception]
    """What the back-end reported, and was not told yet."""


class End(Protocol):
    """What may end beside the sockets."""

    def fileno(self) -> int:
        """Readable when it has."""

    def check(self) -> None:
        """Raises what ended it."""


@contextmanager
def stopping() -> Iterator[EventFd]:
    """What the first signal that asks for an end signals. The second one is for whoever had signals before, unless it comes at once."""
    asked, first = EventFd(), 0.0
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal first
        if not first:
            first = monotonic()
            asked.signal()
        elif monotonic() - first > AT_ONCE:
            restore()
            signal.raise_signal(number)

    def restore() -> None:
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, handler)

    try:
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, stop)
        yield asked
    finally:
        restore()
        asked.close()


class Server:
    """Serves until a signal, or until no front-end can come any more."""

    def __init__(
        self,
        sockets: Sequence[Serving],
        emit: Emit,
        report: Callable[[str, Exception], object],
        *,
        patches: Sequence[Patch] = (),
        ends: Sequence[End] = (),
    ) -> None:
        self._sockets, self._emit, self._report = sockets, emit, report
        self._patches, self._ends = patches, ends
        self._connections = [0] * len(sockets)
        self._accepted = [0] * len(sockets)
        self._told: list[dict[str, Any]] = []
        self._began = monotonic()

    def run(self, asked: EventFd) -> None:
        """Whatever ended one of the ends is raised."""
        watch = select.poll()
        descriptors = [asked.fileno(), *(socket.backend.fileno() for socket in self._sockets), *(end.fileno() for end in self._ends)]
        for descriptor in descriptors:
            watch.register(descriptor, select.POLLIN)
        self._told = self._count()
        following = self._began + INTERVAL
        try:
            for socket in self._sockets:
                self._emit(socket.opening, socket=socket.name, what=socket.what)
            while not asked.wait(0) and not all(socket.backend.ended for socket in self._sockets):
                watch.poll(self._timeout(following))
                self._turn()
                for end in self._ends:
                    end.check()
                if monotonic() >= following:
                    following = monotonic() + INTERVAL
                    self._tell()
        finally:
            self._emit("end", seconds=round(monotonic() - self._began, 3), devices=self._count())

    def _timeout(self, following: float) -> float | None:
        """Milliseconds."""
        waits = [wait for socket in self._sockets if (wait := socket.backend.wait_time) is not None]
        if any(patch.holds for patch in self._patches):
            waits.append(LOOK)
        if any(self._connections) or self._count() != self._told:
            waits.append(max(0.0, following - monotonic()))
        return min(waits) * 1000 if waits else None

    def _turn(self) -> None:
        for index, socket in enumerate(self._sockets):
            backend = socket.backend
            backend.process(0.0)
            socket.counted.look()
            while self._accepted[index] < backend.accepted:
                self._accepted[index] += 1
                self._connections[index] += 1
                self._emit("connected", socket=socket.name, connections=self._connections[index])
            while socket.errors:
                self._report(socket.name, socket.errors.pop(0))
            while self._connections[index] > backend.connections:
                self._connections[index] -= 1
                self._emit("disconnected", socket=socket.name, connections=self._connections[index])
        for patch in self._patches:
            if patch.holds:
                patch.look()

    def _count(self) -> list[dict[str, Any]]:
        return [{"socket": socket.name, "live": socket.counted.live, **socket.counted.count()} for socket in self._sockets]

    def _tell(self) -> None:
        counts = self._count()
        if counts != self._told:
            self._told = counts
            self._emit("counters", seconds=round(monotonic() - self._began, 3), devices=counts)
