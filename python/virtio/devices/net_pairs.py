"""Queue pairs of a network device (5.1.2): each is a port of its own, and an end of the device is the port over all of them.

What comes is taken from the pairs in turn, one pair a call. What goes keeps a flow on one pair: that from which the driver sent it, as far
as a device has seen that, and otherwise one by a hash of addresses and ports (5.1.6.5.5).
"""

from __future__ import annotations

import select
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, TypeVar
from weakref import ref

from virtio._core import BufferPool, Burst, DevicePort, DeviceQueue, DriverPort, DriverQueue, EventFd, PortGroup
from virtio.errors import SpecViolation, StatusError
from virtio.features import Features
from virtio.port import AsyncBursts, Descriptor, add_statistics, notifications
from virtio.waiting import Watch, milliseconds, sleep_on

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

HANDLER_BURST: Final = 64
HANDLER_ROUNDS: Final = 64
"""Bursts that a served device takes before other queues have their turn."""

_A = TypeVar("_A")
_T = TypeVar("_T")
_P = TypeVar("_P", "Pair", "DriverPair", "DevicePair")


def queue_names(pairs: int, *, control: bool) -> tuple[str, ...]:
    """Names by index: receiveq1, transmitq1, receiveq2 ..., and controlq at the end."""
    names = [f"{way}q{number + 1}" for number in range(pairs) for way in ("receive", "transmit")]
    return (*names, "controlq") if control else tuple(names)


def find_pair(pairs: tuple[_P, ...], number: int) -> _P:
    """Pair `number`. ValueError: there is none."""
    if not 0 <= number < len(pairs):
        raise ValueError(f"queue pair {number} is outside 0..{len(pairs) - 1}")
    return pairs[number]


class Pair:
    """One queue pair: its queues, its port while it is live, and what it counted. The end keeps it, it does not keep the end."""

    def __init__(self, end: Any, number: int) -> None:
        self._end_reference = ref(end)  # memory and descriptors of an end that nobody keeps go at once
        self.number: Final = number
        """From 0."""
        self._port: Any = None
        self._over: Any = None
        self._queues: list[DriverQueue | DeviceQueue] = []
        self._totals: dict[str, Any] = {}

    @property
    def _end(self) -> Any:
        """StatusError: nobody has kept it."""
        if (end := self._end_reference()) is None:
            raise StatusError(f"queue pair {self.number} was kept, the network device's end that it is of was not")
        return end

    @property
    def indexes(self) -> tuple[int, int]:
        """Its receive queue and its transmit queue."""
        return 2 * self.number, 2 * self.number + 1

    @property
    def statistics(self) -> dict[str, Any]:
        """What this pair had of its end's statistics."""
        found = self._totals if self._port is None else add_statistics(self._totals, self._port.counters)
        for queue in self._queues:
            found = add_statistics(found, notifications(queue))
        return dict(found)

    # What is the whole end's.

    @property
    def pool(self) -> BufferPool:
        """Whose slots the bursts name."""
        pool: BufferPool = self._end.pool
        return pool

    @property
    def features(self) -> Any:
        """As of the whole end."""
        return self._end.features

    @property
    def header_size(self) -> int:
        """Bytes of the header before each frame (5.1.6)."""
        return int(self._end.header_size)

    @property
    def headers(self) -> NDArray[np.void]:
        """A structured view of the header before each slot's frame: shape (slots,)."""
        headers: NDArray[np.void] = self._end.headers
        return headers

    @property
    def link(self) -> bool:
        """Whether the link is up."""
        return bool(self._end.link)

    def link_events(self) -> list[bool]:
        """As of the whole end: whoever asks first has them."""
        events: list[bool] = self._end.link_events()
        return events

    def change(self, port: DriverPort | DevicePort | None, *queues: DriverQueue | DeviceQueue | None) -> None:
        """From now on these are its queues, and its port, if it is live. Counts go on."""
        kept = [queue for queue in queues if queue is not None]
        if self._port is not None and port is not self._port:
            self._totals = add_statistics(self._totals, self._port.counters)
        for queue in self._queues:
            if queue not in kept:
                self._totals = add_statistics(self._totals, notifications(queue))
        self._port, self._queues = port, kept


def connect(pairs: Sequence[Pair], active: int) -> Any:
    """What moves the bursts of all live pairs, of which those below `active` send; None if none is live. Each pair has its own besides."""
    live = [pair for pair in pairs if pair._port is not None]
    for pair in pairs:
        pair._over = pair._port
    if not live:
        return None
    senders = sum(pair.number < active for pair in live)
    if len(live) == senders == 1:
        return live[0]._port
    group = PortGroup(tuple(pair._port for pair in live), senders)
    for place, pair in enumerate(live):
        pair._over = group.one(place)
    return group


class DriverBursts(AsyncBursts):
    """Bursts over whatever is live of a driver's end."""

    _over: DriverPort | PortGroup | None

    def take(self, burst: Burst) -> int:
        """Takes back what the device has sent, and fills `burst` with free slots whose headers are zero; returns how many."""
        return self._live().take(burst)

    def send(self, burst: Burst) -> int:
        """Sends the burst's packets behind the headers that stand before them; returns how many. The others stay in front.

        ValueError: an illegal row, or no room for a header before one. BadUsedElement: the device broke a rule.
        """
        return self._live().send(burst)

    def receive(self, burst: Burst) -> int:
        """Gives the burst's slots back, fills it with received packets, and gives the device new buffers; returns how many packets."""
        return self._live().receive(burst)

    def send_frames(self, frames: Iterable[bytes]) -> int:
        """Copies and sends frames; returns how many fitted, from the first on. ValueError: one without bytes, or too long for any."""
        return self._live().send_frames(frames)

    def receive_frames(self, limit: int = 64) -> list[bytes]:
        """Copies of received frames, at most `limit`."""
        return self._live().receive_frames(limit)

    def _live(self) -> DriverPort | PortGroup:
        if self._over is None:
            raise StatusError("the driver's queues are gone: the device was reset, or the driver closed")
        return self._over


class DeviceBursts(AsyncBursts):
    """Bursts over whatever is live of a device's end."""

    _over: DevicePort | PortGroup | None

    def take(self, burst: Burst) -> int:
        """Completes what came back, and fills `burst` with free slots whose headers are zero; returns how many."""
        return burst.pool.take(burst) if (port := self._over) is None else self._through(port.take, burst)

    def send(self, burst: Burst) -> int:
        """Sends the burst's packets to the driver; returns how many. The others stay in front; before DRIVER_OK all do.

        Packets longer than the driver's buffers, or with segmentation that it did not accept, are dropped. ValueError: an illegal row, or
        no room for a header before one. SpecViolation: the driver broke a rule; the device needs a reset.
        """
        return 0 if (port := self._over) is None else self._through(port.send, burst)

    def receive(self, burst: Burst) -> int:
        """Gives the burst's old slots back, which completes the chains they came from, and fills it with packets; returns how many."""
        if (port := self._over) is None:
            burst.pool.give(burst)
            return 0
        return self._through(port.receive, burst)

    def send_frames(self, frames: Iterable[bytes]) -> int:
        """Copies frames to the driver; returns how many are done with, from the first on. ValueError: one without bytes, or too long."""
        return 0 if (port := self._over) is None else self._through(port.send_frames, frames)

    def receive_frames(self, limit: int = 64) -> list[bytes]:
        """Copies of frames that the driver sent, at most `limit`."""
        return [] if (port := self._over) is None else self._through(port.receive_frames, limit)

    def _through(self: Any, call: Callable[[_A], _T], argument: _A) -> _T:
        try:
            return call(argument)
        except SpecViolation:
            self.need_reset()
            raise


class DriverPair(DriverBursts, Pair):
    """One queue pair of a `NetDriver`, as a port of its own: for one thread, or one loop."""

    receiveq: DriverQueue
    transmitq: DriverQueue

    def __init__(self, end: Any, number: int) -> None:
        super().__init__(end, number)
        self._interrupts: dict[int, EventFd] = {}
        self._watch: Watch | None = None
        self._room_asked = False

    def arm(self, *, room: bool = False) -> bool:
        """As `NetDriver.arm`, for this pair."""
        return bool(self._end.arm(self.queues(room), room=room))

    def wait(self, timeout: float | None = None, *, room: bool = False) -> bool:
        """As `NetDriver.wait`, for this pair."""
        return bool(self._end.wait(timeout, queues=self.queues(room), room=room))

    def fileno(self) -> int:
        """One descriptor for a selector: readable when `wait` would not sleep, if `arm` was called before."""
        return self._watching().fileno()

    def _watching(self) -> Watch:
        if self._watch is None:
            events = (self._end.transport.config_interrupt, *self._interrupts.values())
            self._watch = Watch(events, over=self._end._watching().over)
        return self._watch

    def _sleeps_on(self) -> Descriptor:
        return self._watching()

    def queues(self, room: bool) -> list[DriverQueue]:
        """What is waited for: the receive queue, with `room` both."""
        self._room_asked |= room
        return [self.receiveq, self.transmitq] if room else [self.receiveq]

    def quieten(self) -> None:
        """Takes the news of room from the descriptors, if nobody ever asked for them: some devices interrupt all the same."""
        if not self._room_asked and (interrupt := self._interrupts.get(self.indexes[1])) is not None:
            interrupt.drain()

    def take_over(self, queue: DriverQueue, interrupt: EventFd) -> None:
        """This queue of the pair is set up."""
        index = queue.index
        old, self._interrupts[index] = self._interrupts.get(index), interrupt
        if index % 2:
            self.transmitq = queue
        else:
            self.receiveq = queue
        if self._watch is not None and old is not interrupt:
            if old is not None:
                with suppress(OSError, StatusError):  # it is closed
                    self._watch.remove(old)
            self._watch.add(interrupt)

    def _alternate(self) -> None:
        self._end._alternate()

    def _check_whole(self) -> None:
        check_whole([self.receiveq], "the device is reset")


class DevicePair(DeviceBursts, Pair):
    """One queue pair of a `NetDevice`, as a port of its own: for one thread, or one loop."""

    def __init__(self, end: Any, number: int) -> None:
        super().__init__(end, number)
        self._changed: EventFd | None = None
        self._events: select.epoll | None = None
        self._room_asked = False
        self._handled: Burst | None = None

    def need_reset(self) -> None:
        """As `NetDevice.need_reset`."""
        self._end.need_reset()

    def arm(self, *, room: bool = False) -> bool:
        """As `NetDevice.arm`, for this pair."""
        self._room_asked |= room
        if (port := self._port) is None:
            return False
        return armed(port.transmitq) | (room and armed(port.receiveq))

    def wait(self, timeout: float | None = None, *, room: bool = False) -> bool:
        """As `NetDevice.wait`, for this pair."""
        time, changed = milliseconds(timeout), self._notice()
        if self.arm(room=room):
            return True
        bells = [self._end.doorbell(index) for index in self.indexes[0 if room else 1 :]]
        ready = sleep_on([changed, *(bell for bell in bells if bell is not None)], time)
        self.quieten()
        return bool(ready)

    def quieten(self) -> None:
        """Takes the news of buffers from the descriptor, if nobody ever asked for them: some drivers ring all the same."""
        if not self._room_asked and (bell := self._end.doorbell(self.indexes[0])) is not None:
            bell.drain()

    def fileno(self) -> int:
        """One descriptor for a selector: readable when `wait` would not sleep, if `arm` was called before."""
        if self._events is None:
            self._events = select.epoll()
            self._events.register(self._notice().fileno(), select.EPOLLIN)
            for index in self.indexes:
                self.ring(index, self._end.doorbell(index))
        return self._events.fileno()

    def _notice(self) -> EventFd:
        if self._changed is None:
            self._changed = EventFd()
        return self._changed

    def ring(self, index: int, doorbell: EventFd | None, *, silent: bool = False) -> None:
        """The driver rings this for one of the queues from now on, or (`silent`) no more."""
        if self._events is not None and doorbell is not None:
            with suppress(StatusError, OSError):  # it is registered, or closed
                if silent:
                    self._events.unregister(doorbell.fileno())
                else:
                    self._events.register(doorbell.fileno(), select.EPOLLIN)

    def change(self, port: DriverPort | DevicePort | None, *queues: DriverQueue | DeviceQueue | None) -> None:
        """As `Pair.change`; wakes who waits."""
        super().change(port, *queues)
        if self._changed is not None:
            self._changed.signal()

    def follow(self, receiveq: DeviceQueue | None, transmitq: DeviceQueue | None, features: Features | None) -> bool:
        """These are its queues; it is live if there are both, and `features` says what was accepted. Whether that is new."""
        port: DevicePort | None = None
        if receiveq is not None and transmitq is not None and features is not None:
            port = self._port
            if port is None or port.receiveq is not receiveq or port.transmitq is not transmitq:
                port = DevicePort(receiveq, transmitq, features=features)
                receiveq.disarm()
        new = port is not self._port
        self.change(port, receiveq, transmitq)
        return new

    # Served by `poll`.

    def filled(self, queue: DeviceQueue) -> None:
        """The driver gave buffers: whoever waits for room looks again."""

    def serve(self, queue: DeviceQueue) -> None:
        """The driver sent something: `on_frames` has it, if there is such a method."""
        if (on_frames := self._end.on_frames) is None:
            return
        if self._handled is None:
            self._handled = self.pool.burst(HANDLER_BURST)
        for _ in range(HANDLER_ROUNDS):
            if not self.receive(self._handled):
                return
            on_frames(self._handled)

    def _check_whole(self) -> None:
        if self._port is not None:
            check_whole([self._port.transmitq], "the driver resets the device")


def armed(queue: DeviceQueue) -> bool:
    """Asks for a notification; whether there is something already, or never will be."""
    return queue.broken is not None or queue.arm()


def check_whole(queues: Iterable[DriverQueue | DeviceQueue], until: str) -> None:
    """StatusError: one of them is broken."""
    for queue in queues:
        if (error := queue.broken) is not None:
            raise StatusError(f"queue {queue.index} is broken until {until}: {error}")
