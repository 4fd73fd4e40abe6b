"""Interrupts of one virtio-pci device, as an eventfd for each queue and one for the configuration, whatever the function has (4.1.5.1.2).

With MSI-X, as many vectors as there are: one each if that is possible, else shared ones. What has a vector to itself is that vector's
eventfd; what shares one is signalled by a thread that watches the vector. With the interrupt pin, all are signalled by its handler.
"""

import select
from collections.abc import Callable
from contextlib import suppress
from threading import RLock, Thread
from typing import Final, Literal

from virtio._core import EventFd
from virtio.errors import StatusError, TransportError, VirtioError
from virtio.pci.config import CONFIG, ISR_CONFIG, ISR_QUEUE
from virtio.pci.function import PciFunction

MOST_VECTORS: Final = 64
"""Vectors that are asked for at most, however many queues a device claims to have: each is a descriptor. More queues share them."""

MapVector = Callable[[int, int], int]
"""Writes a vector to the register of a source and returns what it reads as then; anything else means refused."""


class Interrupts:
    """Notifications of `queues` queues and of the configuration. Not thread-safe: the transport calls one at a time."""

    def __init__(
        self,
        function: PciFunction,
        vectors: int,
        queues: int,
        *,
        wanted: Literal["auto", "msix", "intx"],
        map_vector: MapVector,
        read_isr: Callable[[], int],
    ) -> None:
        """`vectors`: how many the MSI-X table has, 0 without. TransportError: there is no way to be interrupted."""
        self._function = function
        self._map_vector = map_vector
        self._read_isr = read_isr
        self._wanted = wanted
        self._sinks: dict[int, EventFd] = {}
        self._vectors: list[EventFd] = []
        self._owners: dict[int, int] = {}
        """By vector, the source whose eventfd is the vector's own."""
        self._sharers: dict[int, set[int]] = {}
        self._fan_out: _FanOut | None = None
        self._queues = queues
        self._guard = RLock()
        """For `_sinks` and `_sharers`, which threads of ours and the function's read."""
        try:
            if wanted == "intx" or not self._start_msix(vectors):
                self._start_intx(f"of {vectors} MSI-X vectors none is to be had" if vectors else "there are no MSI-X vectors")
            with self._guard:
                if CONFIG not in self._sinks:
                    self._sinks[CONFIG] = EventFd()
        except StatusError:  # somebody else has enabled them, and keeps them
            raise
        except BaseException:
            with suppress(VirtioError, OSError):
                self.close()
            raise

    @property
    def vectors(self) -> int:
        """How many MSI-X vectors are in use; 0 with the interrupt pin."""
        return len(self._vectors)

    def sink(self, source: int) -> EventFd:
        """What notifications of a source signal. KeyError: it was never mapped."""
        return self._sinks[source]

    def map(self, source: int) -> None:
        """Maps a source, after the reset or queue reset that unmapped it. TransportError: no vector is accepted, nor is there a pin."""
        tried: set[int] = set()
        for vector in self._choices(source):
            if vector not in tried and self._map_vector(source, vector) == vector:
                self._listen(source, vector)
                return
            tried.add(vector)
        if self._vectors:
            self._forget_msix()
            self._start_intx(f"the device refuses MSI-X vectors {sorted(tried)} for {_name(source)}")
        with self._guard:
            if source not in self._sinks:
                self._sinks[source] = EventFd()

    def close(self) -> None:
        """Disables all, and closes the eventfds. TransportError: as the function's."""
        try:
            self._forget_msix()
        finally:
            with self._guard:
                for event in self._sinks.values():
                    event.close()
            self._map_vector = self._read_isr = _closed  # the transport's: neither keeps the other for the collector

    def _start_msix(self, vectors: int) -> bool:
        counts = sorted({min(vectors, self._queues + 1, MOST_VECTORS), min(vectors, 2), min(vectors, 1)} - {0}, reverse=True)
        for count in counts:
            try:
                for event in self._function.enable_msix(count):
                    self._vectors.append(EventFd.from_fd(event.fileno()))  # descriptors of our own: they outlive the function's
                config = EventFd.from_fd(self._vectors[0].fileno())
            except (TransportError, OSError):  # OSError: there are no more descriptors, which fewer vectors may do without
                with suppress(TransportError):
                    self._forget_msix()
                continue
            with self._guard:
                self._sinks[CONFIG] = config
            self._owners[0] = CONFIG
            return True
        return False

    def _start_intx(self, why: str) -> None:
        if self._wanted == "msix":
            raise TransportError(f"{why}, and the interrupt pin is not to be used")
        try:
            self._function.enable_intx(self._interrupted)
        except TransportError as error:
            raise TransportError(f"no interrupts: {why}, and {error}") from error

    def _interrupted(self) -> None:
        """Reads the ISR, which lowers the line (4.1.4.5). All ones are what a device reads as that is gone: everybody looks then."""
        try:
            bits = self._read_isr()
        except TransportError:  # comes again, and reads as all ones then
            raise
        except Exception:  # the last call: whoever waits shall look
            self._signal_all()
            raise
        with self._guard:
            for source, event in self._sinks.items():
                if bits & (ISR_CONFIG if source == CONFIG else ISR_QUEUE):
                    event.signal()

    def _signal_all(self) -> None:
        with self._guard:
            for event in self._sinks.values():
                event.signal()

    def _choices(self, source: int) -> list[int]:
        """Vectors to try, best first."""
        count = len(self._vectors)
        if count == 0 or source == CONFIG:
            return list(range(min(count, 1)))
        if count == 1:
            return [0]
        return [1 + source % (count - 1), 1, 0]

    def _listen(self, source: int, vector: int) -> None:
        with self._guard:
            for sharers in self._sharers.values():
                sharers.discard(source)
        owner = self._owners.get(vector)
        if owner is None and source not in self._sinks:
            with self._guard:
                self._sinks[source] = EventFd.from_fd(self._vectors[vector].fileno())
            self._owners[vector] = source
        elif owner != source:
            if self._fan_out is None:
                self._fan_out = _FanOut(self._guard, self._sinks, self._sharers)
            with self._guard:
                if source not in self._sinks:
                    self._sinks[source] = EventFd()
                self._sharers.setdefault(vector, set()).add(source)
            self._fan_out.watch(vector, self._vectors[vector])

    def _forget_msix(self) -> None:
        try:
            self._function.disable_interrupts()
        finally:
            if self._fan_out is not None:
                self._fan_out.stop()
                self._fan_out = None
            for event in self._vectors:
                event.close()
            self._vectors.clear()
            self._owners.clear()
            with self._guard:
                self._sharers.clear()


class _FanOut:
    """A thread that signals every source of a shared vector. It never drains one: a source may use the vector's own eventfd."""

    def __init__(self, guard: RLock, sinks: dict[int, EventFd], sharers: dict[int, set[int]]) -> None:
        self._guard, self._sinks, self._sharers = guard, sinks, sharers
        self._stop = EventFd()
        self._watched: dict[int, int] = {}
        self._events = select.epoll()
        self._events.register(self._stop.fileno(), select.EPOLLIN)
        self._thread = Thread(target=self._run, name="virtio-pci-vectors", daemon=True)
        self._thread.start()

    def watch(self, vector: int, event: EventFd) -> None:
        """Each signal of `event` is an edge, drained or not."""
        if event.fileno() not in self._watched:
            self._watched[event.fileno()] = vector
            self._events.register(event.fileno(), select.EPOLLIN | select.EPOLLET)

    def stop(self) -> None:
        """Ends the thread."""
        self._stop.signal()
        self._thread.join()
        self._events.close()
        self._stop.close()

    def _run(self) -> None:
        while True:
            for descriptor, _ in self._events.poll():
                if descriptor not in self._watched:
                    return
                with self._guard:
                    for source in tuple(self._sharers.get(self._watched[descriptor], ())):
                        self._sinks[source].signal()


def _closed(*_: int) -> int:
    raise StatusError("the interrupts are closed")


def _name(source: int) -> str:
    return "configuration changes" if source == CONFIG else f"queue {source}"
