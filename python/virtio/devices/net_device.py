"""The device's end of the network device (5.1): `virtio.devices.net` shows it beside the driver's."""

from __future__ import annotations

import select
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from math import ceil
from typing import TYPE_CHECKING, Any, Final, TypeVar

from virtio._core import BufferPool, Burst, DevicePort, DeviceQueue, EventFd, Memory, net_header_size
from virtio.device import RING_FEATURES, Device, DeviceState
from virtio.devices import net_header
from virtio.devices.net_header import DEFAULT_MTU, DEVICE_ID, IMPLEMENTED, RECEIVEQ1, RULES, TRANSMITQ1, Config, NetFeature, NetStatus
from virtio.driver import LONGEST_SLEEP
from virtio.errors import SpecViolation, StatusError
from virtio.features import Features
from virtio.port import AsyncBursts, add_statistics, counted
from virtio.spec import Feature
from virtio.status import locked

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_A = TypeVar("_A")
_T = TypeVar("_T")

HANDLER_BURST: Final = 64
HANDLER_ROUNDS: Final = 64
"""Bursts that a served device takes before other queues have their turn."""


class NetDevice(AsyncBursts, Device):
    """A network device: what the driver sends is received here, what is sent here the driver receives.

    Driven by hand it is a `Port`. Served (`poll`), a subclass with a method `on_frames(burst)` has it called with each burst of received
    packets, whose slots it may change, and send on with `self.send(burst)`; without such a method, frames stay in the queue.

    Slots are of `pool`, or of one made here; `send_frames` and `receive_frames` need none. `mac` is random if not given; `mtu` and `speed`
    (Mbit/s) are offered if given.
    """

    device_id = DEVICE_ID
    queues = ("receiveq1", "transmitq1")
    features = IMPLEMENTED
    rules = RULES
    discarded = frozenset({TRANSMITQ1})
    on_frames: Callable[[Burst], object] | None = None

    def __init__(
        self,
        *,
        mac: bytes | None = None,
        mtu: int | None = None,
        speed: int | None = None,
        link: bool = True,
        offered: Iterable[int] | None = None,
        pool: BufferPool | None = None,
        slots: int = 1024,
        slot_size: int = 2048,
    ) -> None:
        """ValueError: an address that is not 6 bytes or is a group's, an MTU outside 68..65535, or features that cannot be offered."""
        self.mac: Final = net_header.random_mac() if mac is None else bytes(mac)
        if len(self.mac) != 6 or self.mac[0] & 1:
            raise ValueError(f"{self.mac.hex(':')} is not the address of one device")
        if mtu is not None and not net_header.MIN_MTU <= mtu <= net_header.MAX_MTU:
            raise ValueError(f"MTU {mtu} is outside {net_header.MIN_MTU}..{net_header.MAX_MTU} (5.1.4.1)")
        if speed is not None and not 0 <= speed < 1 << 31:
            raise ValueError(f"speed {speed} is outside 0..{(1 << 31) - 1} Mbit/s (5.1.4)")
        unsaid = [bit for bit, value in ((NetFeature.MTU, mtu), (NetFeature.SPEED_DUPLEX, speed)) if value is None]
        super().__init__(offered=(RING_FEATURES | Features(self.features)) - unsaid if offered is None else offered)
        self.mtu: Final = DEFAULT_MTU if mtu is None else mtu
        known = Config(self.mac, NetStatus.LINK_UP if link else 0, 1, self.mtu)
        self._config = known if speed is None else known._replace(speed=speed, duplex=1)
        self.config = self._config.pack()
        self._pool = pool
        self._sizes = slots, slot_size
        self._headers: NDArray[np.void] | None = None
        self._port: DevicePort | None = None
        self._totals: dict[str, Any] = {}
        self._changed = EventFd()
        self._events = select.epoll()
        self._events.register(self._changed.fileno(), select.EPOLLIN)
        self._doorbells: dict[int, EventFd] = {}
        self._handled: Burst | None = None
        self.on_link: Callable[[bool], None] | None = None
        """Called with what the link became, by whoever sets it."""
        self._watchers: list[Callable[[bool], object]] = []
        self._told = False

    @property
    def pool(self) -> BufferPool:
        """Whose slots hold received frames."""
        if self._pool is None:
            slots, slot_size = self._sizes
            self._pool = BufferPool(Memory(slots * slot_size + (1 << 12)), slots, slot_size=slot_size)
        return self._pool

    @property
    def header_size(self) -> int:
        """Bytes of the header before each frame (5.1.6)."""
        return net_header_size(self._accepted | {Feature.VERSION_1})

    @property
    def headers(self) -> NDArray[np.void]:
        """A writable structured view of the header before each slot's frame: shape (slots,)."""
        if self._headers is None or self._headers.dtype.itemsize != self.header_size:
            self._headers = net_header.headers_of(self.pool, self._accepted | {Feature.VERSION_1})
        return self._headers

    @property
    def statistics(self) -> dict[str, Any]:
        """As of `NetDriver`; `notified` and `suppressed` are notifications of the driver. Counts go on over resets."""
        return add_statistics(self._totals, counted(self._port))

    @property
    def link(self) -> bool:
        """Whether the link is up. Setting it changes the configuration and notifies the driver; traffic is not touched."""
        return bool(self._config.status & NetStatus.LINK_UP)

    @link.setter
    def link(self, up: bool) -> None:
        if up != self.link:
            self._config = self._config._replace(status=NetStatus.LINK_UP if up else 0)
            self.change_config(self._config.pack())
            if self.on_link is not None:
                self.on_link(up)

    @locked
    def watch_port(self, call: Callable[[bool], object]) -> None:
        """For those who use the queues beside the port: calls `call(True)` once frames may move, which may be at once.

        Before they may not any more, because a queue is taken off, it calls `call(False)`: when that returns nobody may use one. It comes
        in the thread that changes the device, with the device locked: it must not raise, or wait for a thread that calls the device.
        """
        self._watchers.append(call)
        if self._told:
            call(True)

    @locked
    def unwatch_port(self, call: Callable[[bool], object]) -> None:
        """Does not call it any more. Who is not known is passed over."""
        with suppress(ValueError):
            self._watchers.remove(call)

    def link_events(self) -> list[bool]:
        """None: here the link is set, not noticed."""
        return []

    def take(self, burst: Burst) -> int:
        """Completes what came back, and fills `burst` with free slots whose headers are zero; returns how many."""
        return burst.pool.take(burst) if (port := self._port) is None else self._call_port(port.take, burst)

    def send(self, burst: Burst) -> int:
        """Sends the burst's packets to the driver; returns how many. The others stay in front; before DRIVER_OK all do.

        Packets longer than the driver's buffers, or with segmentation that it did not accept, are dropped. ValueError: an illegal row, or
        no room for a header before one. SpecViolation: the driver broke a rule; the device needs a reset.
        """
        return 0 if (port := self._port) is None else self._call_port(port.send, burst)

    def receive(self, burst: Burst) -> int:
        """Gives the burst's slots back, which completes the chains they came from, and fills it with packets; returns how many."""
        if (port := self._port) is None:
            burst.pool.give(burst)
            return 0
        return self._call_port(port.receive, burst)

    def send_frames(self, frames: Iterable[bytes]) -> int:
        """Copies frames to the driver; returns how many are done with, from the first on. ValueError: one without bytes, or too long."""
        return 0 if (port := self._port) is None else self._call_port(port.send_frames, frames)

    def receive_frames(self, limit: int = 64) -> list[bytes]:
        """Copies of frames that the driver sent, at most `limit`."""
        return [] if (port := self._port) is None else self._call_port(port.receive_frames, limit)

    def _call_port(self, call: Callable[[_A], _T], argument: _A) -> _T:
        try:
            return call(argument)
        except SpecViolation:
            self.need_reset()
            raise

    def arm(self, *, room: bool = False) -> bool:
        """Asks the driver to ring when it sends, with `room` also when it has given buffers; true if there is something already."""
        if (port := self._port) is None:
            return False
        return self._armed(port.transmitq) | (room and self._armed(port.receiveq))

    @staticmethod
    def _armed(queue: DeviceQueue) -> bool:
        return queue.broken is not None or queue.arm()

    def wait(self, timeout: float | None = None, *, room: bool = False) -> bool:
        """Sleeps until the driver may have sent something, with `room` also until it may have given buffers, or until it set the device up
        or reset it. True can be a false alarm, False means that `timeout` seconds have passed."""
        if self.arm(room=room):
            return True
        chosen = [self._changed, *(bell for index, bell in dict(self._doorbells).items() if room or index == TRANSMITQ1)]
        events = {event.fileno(): event for event in chosen}
        sleep_on = select.poll()
        for descriptor in events:
            sleep_on.register(descriptor, select.POLLIN)
        ready = sleep_on.poll(None if timeout is None else ceil(min(max(timeout, 0.0), LONGEST_SLEEP) * 1000))
        for descriptor, _ in ready:
            events[descriptor].drain()
        return bool(ready)

    def fileno(self) -> int:
        """One descriptor for a selector: readable when `wait` would not sleep, if `arm` was called before."""
        return self._events.fileno()

    def _check_whole(self) -> None:
        if (port := self._port) is not None and (error := port.transmitq.broken) is not None:
            raise StatusError(f"queue {TRANSMITQ1} is broken until the driver resets the device: {error}")

    # Served by `poll`.

    @property
    def served(self) -> bool:
        """Whether there is `on_frames`; without it the port is driven by hand."""
        return self.on_frames is not None

    def on_receiveq1(self, queue: DeviceQueue) -> None:
        """The driver gave buffers: whoever waits for room looks again."""

    def on_transmitq1(self, queue: DeviceQueue) -> None:
        """The driver sent something: `on_frames` has it, if there is such a method."""
        if self.on_frames is None:
            return
        if self._handled is None:
            self._handled = self.pool.burst(HANDLER_BURST)
        for _ in range(HANDLER_ROUNDS):
            if not self.receive(self._handled):
                return
            self.on_frames(self._handled)

    # What the driver does, and the port that follows from it.

    @locked
    def write_status(self, value: int) -> None:
        """As `Device.write_status`."""
        with self._moving():
            super().write_status(value)

    @locked
    def setup_queue(
        self,
        index: int,
        size: int,
        areas: tuple[int, int, int],
        *,
        doorbell: EventFd,
        interrupt: EventFd | None,
        base: int | None = None,
        error: EventFd | None = None,
    ) -> None:
        """As `Device.setup_queue`."""
        super().setup_queue(index, size, areas, doorbell=doorbell, interrupt=interrupt, base=base, error=error)
        self._doorbells[index] = doorbell
        with suppress(FileExistsError):
            self._events.register(doorbell.fileno(), select.EPOLLIN)
        self._follow()

    @locked
    def reset_queue(self, index: int) -> None:
        """As `Device.reset_queue`."""
        with self._moving():
            super().reset_queue(index)
            self._silence(index)

    @locked
    def stop_queue(self, index: int) -> int:
        """As `Device.stop_queue`."""
        with self._moving():
            base = super().stop_queue(index)
            self._silence(index)
        return base

    @locked
    def need_reset(self) -> None:
        """As `Device.need_reset`."""
        with self._moving():
            super().need_reset()

    @locked
    def reset(self) -> None:
        """As `Device.reset`."""
        with self._moving():
            super().reset()

    def was_reset(self) -> None:
        """The port is gone with the queues."""
        for index in list(self._doorbells):
            self._silence(index)

    def _silence(self, index: int) -> None:
        with suppress(StatusError, OSError):  # a transport that is closed took its doorbells with it
            self._events.unregister(self._doorbells.pop(index).fileno())

    @contextmanager
    def _moving(self) -> Iterator[None]:
        """While what the port stands on changes, nobody uses its queues."""
        self._tell(False)
        try:
            yield
        finally:
            self._follow()

    def _tell(self, live: bool) -> None:
        if live != self._told:
            self._told = live
            for call in list(self._watchers):
                call(live)

    def _follow(self) -> None:
        """There is a port while the device is live and both queues are enabled."""
        receiveq, transmitq = self.queue(RECEIVEQ1), self.queue(TRANSMITQ1)
        live = self.state is DeviceState.DRIVER_OK and receiveq is not None and transmitq is not None
        old = self._port
        if live and old is not None and old.receiveq is receiveq and old.transmitq is transmitq:
            self._tell(True)
            return
        if old is not None:
            self._totals = self.statistics
            self._port = None
        if live and receiveq is not None and transmitq is not None:
            self._port = DevicePort(receiveq, transmitq, features=self._accepted)
            receiveq.disarm()
        self._changed.signal()
        self._tell(live)
