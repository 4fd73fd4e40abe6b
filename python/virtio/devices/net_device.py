"""The device's end of the network device (5.1): `virtio.devices.net` shows it beside the driver's."""

from __future__ import annotations

import select
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final

from virtio import arguments
from virtio._core import BufferPool, Burst, DevicePort, DeviceQueue, EventFd, Memory, PortGroup, net_header_size
from virtio.device import RING_FEATURES, Device, DeviceState
from virtio.devices import net_control, net_header
from virtio.devices.net_control import ControlClass
from virtio.devices.net_header import DEFAULT_MTU, DEVICE_ID, IMPLEMENTED, MULTIQUEUE, RULES, Config, NetFeature, NetStatus
from virtio.devices.net_pairs import DeviceBursts, DevicePair, check_whole, connect, find_pair, queue_names
from virtio.errors import StatusError
from virtio.features import Features, features_of
from virtio.port import add_statistics
from virtio.spec import Feature, Status
from virtio.status import locked
from virtio.waiting import milliseconds, sleep_on

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MOST_PAIRS: Final = 0x7FFF
"""Most queue pairs of a device here: with the control queue, as many queues as a transport counts in 16 bits."""


class NetDevice(DeviceBursts, Device):
    """A network device: what the driver sends is received here, what is sent here the driver receives.

    Driven by hand it is a `Port`. Served (`poll`), a subclass with a method `on_frames(burst)` has it called with each burst of received
    packets, whose slots it may change, and send on with `self.send(burst)`; without such a method, frames stay in the queue.

    Slots are of `pool`, or of one made here, of `slots` slots for each pair; `send_frames` and `receive_frames` need none. `mac` is random
    if not given; `mtu` and `speed` (Mbit/s) are offered if given.

    With more `queue_pairs` than one MQ and CTRL_VQ are offered. Frames come from all pairs in turn, and go to those that the driver has in
    use, a flow to the pair from which the driver sent of it (5.1.6.5.5); `pair(i)` is a port of its own. The control queue is answered by
    `poll`, by `wait`, and by the transports that call these.
    """

    device_id = DEVICE_ID
    features = IMPLEMENTED
    rules = RULES
    on_frames: Callable[[Burst], object] | None = None
    """Called with each burst of received packets. It may be set, or set to None, at any time."""
    on_rarp: Callable[[bytes], object] | None = None
    """Called with a MAC address that the network is to be told of: of a machine that moved here (vhost-user)."""
    on_mtu: Callable[[int], object] | None = None
    """Called with the MTU that the driver was told (vhost-user)."""

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
        queue_pairs: int = 1,
    ) -> None:
        """ValueError: an address that is not 6 bytes or is a group's, an MTU outside 68..65535, queue pairs outside 1..32767, or features
        that cannot be offered: more than one pair without MQ among them. TypeError: an argument of another type."""
        self.mac: Final = net_header.random_mac() if mac is None else arguments.mac("mac", mac)
        if mtu is not None:
            mtu = arguments.integer("MTU", mtu, net_header.MIN_MTU, net_header.MAX_MTU, "(5.1.4.1)")
        if speed is not None:
            speed = arguments.integer("speed", speed, 0, (1 << 31) - 1, "Mbit/s (5.1.4)")
        queue_pairs = arguments.integer("queue_pairs", queue_pairs, 1, MOST_PAIRS)
        arguments.switch("link", link)
        slots, slot_size = net_header.check_slots(pool, slots, slot_size)
        unsaid = [bit for bit, value in ((NetFeature.MTU, mtu), (NetFeature.SPEED_DUPLEX, speed)) if value is None]
        if offered is None:
            offered = (RING_FEATURES | Features(self.features)) - unsaid | (MULTIQUEUE if queue_pairs > 1 else ())
        offered = features_of("offered", offered, names=[NetFeature])
        if queue_pairs > 1 and NetFeature.MQ not in offered:
            raise ValueError(f"{queue_pairs} queue pairs without MQ (bit {NetFeature.MQ.value}) among the features offered (5.1.5.1)")
        self.queues = queue_names(queue_pairs, control=NetFeature.CTRL_VQ in offered)
        self.discarded = frozenset(range(1, 2 * queue_pairs, 2))
        self._pairs: Final = tuple(DevicePair(self, number) for number in range(queue_pairs))
        self._wanted_pairs = 1
        super().__init__(offered=offered)
        self.mtu: Final = DEFAULT_MTU if mtu is None else mtu
        known = Config(self.mac, NetStatus.LINK_UP if link else 0, queue_pairs, self.mtu)
        self._config = known if speed is None else known._replace(speed=speed, duplex=1)
        self.config = self._config.pack()
        self._pool = pool
        self._sizes = slots * queue_pairs, slot_size
        self._headers: NDArray[np.void] | None = None
        self._over: DevicePort | PortGroup | None = None
        self._changed = EventFd()
        self._events = select.epoll()
        self._events.register(self._changed.fileno(), select.EPOLLIN)
        self._doorbells: dict[int, EventFd] = {}
        self.on_link: Callable[[bool], None] | None = None
        """Called with what the link became, by whoever sets it."""
        self._watchers: list[Callable[[Collection[int]], object]] = []
        self._told: frozenset[int] = frozenset()

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        if name == "on_frames" and hasattr(self, "_turns"):  # which is there once it is made
            self.serving_changed()

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
        found: dict[str, Any] = {}
        for pair in self._pairs:
            found = add_statistics(found, pair.statistics)
        return found

    def pair(self, number: int) -> DevicePair:
        """Queue pair `number`, from 0, as a port of its own: for one thread, or one loop. ValueError: there is no such pair."""
        return find_pair(self._pairs, number)

    @property
    def queue_pairs(self) -> int:
        """How many pairs the device has; without MQ the driver sees the first."""
        return len(self._pairs)

    @property
    def active_pairs(self) -> int:
        """How many pairs frames go to: what VQ_PAIRS_SET said, 1 until then. Where somebody else owns the control queue (vhost-user), all
        whose rings are enabled."""
        if NetFeature.MQ not in self._accepted:
            return 1
        return self._wanted_pairs if NetFeature.CTRL_VQ in self._accepted else len(self._pairs)

    @property
    def link(self) -> bool:
        """Whether the link is up. Setting it changes the configuration and notifies the driver; traffic is not touched.

        TypeError: set to something else than True or False.
        """
        return bool(self._config.status & NetStatus.LINK_UP)

    @link.setter
    def link(self, up: bool) -> None:
        if arguments.switch("link", up) != self.link:
            self._config = self._config._replace(status=NetStatus.LINK_UP if up else 0)
            self.change_config(self._config.pack())
            if self.on_link is not None:
                self.on_link(up)

    @locked
    def watch_port(self, call: Callable[[Collection[int]], object]) -> None:
        """For those who use the queues beside the port: calls `call(pairs)` with the numbers of the queue pairs that are live, once frames
        may move, which may be at once, and again when pairs came or other ones are in use.

        Before a queue is taken off, it is called with the pairs that stay, which may be none: when that returns nobody may use another's.
        It comes in the thread that changes the device, with the device locked: it must not raise, or wait for a thread that calls the
        device.
        """
        self._watchers.append(call)
        if self._told:
            call(self._told)

    @locked
    def unwatch_port(self, call: Callable[[Collection[int]], object]) -> None:
        """Does not call it any more. Who is not known is passed over."""
        with suppress(ValueError):
            self._watchers.remove(call)

    def link_events(self) -> list[bool]:
        """None: here the link is set, not noticed."""
        return []

    def arm(self, *, room: bool = False) -> bool:
        """Asks the driver to ring when it sends, with `room` also when it has given buffers; true if there is something already."""
        found = [pair.arm(room=room) for pair in self._pairs]  # every one is armed
        return any(found)

    def wait(self, timeout: float | None = None, *, room: bool = False) -> bool:
        """Sleeps until the driver may have sent something, with `room` also until it may have given buffers, or until it set the device up
        or reset it. True can be a false alarm, False means that `timeout` seconds have passed."""
        time = milliseconds(timeout)
        if self.arm(room=room):
            return True
        bells, control = dict(self._doorbells), self._control
        chosen = [bell for index, bell in bells.items() if room or index % 2 or index == control]
        ready = sleep_on([self._changed, *chosen], time)
        for pair in self._pairs:
            pair.quieten()
        if bells.get(control) in ready:
            self.poll()
        return bool(ready)

    def fileno(self) -> int:
        """One descriptor for a selector: readable when `wait` would not sleep, if `arm` was called before."""
        return self._events.fileno()

    def _check_whole(self) -> None:
        queues = [self.queue(index) for index in range(1, 2 * len(self._pairs), 2)]
        check_whole([queue for queue in queues if queue is not None], "the driver resets the device")

    # Queues, and who serves them.

    @property
    def _control(self) -> int:
        """Where the control queue is (5.1.2): behind all pairs with MQ, else behind one. Before the negotiation, behind all."""
        return 2 * (len(self._pairs) if NetFeature.MQ in self._accepted or not self._accepted else 1)

    def queue_max(self, index: int) -> int:
        """As `Device.queue_max`. From FEATURES_OK on there are the queues that were negotiated (5.1.2)."""
        if Status.FEATURES_OK in self._status and index >= self._control + (NetFeature.CTRL_VQ in self._accepted):
            return 0
        return super().queue_max(index)

    def handler(self, index: int) -> Callable[[DeviceQueue], None]:
        """As `Device.handler`: a pair's queue goes to the pair, the control queue to `on_controlq`."""
        if index == self._control:
            return self.on_controlq
        pair = self._pairs[index // 2]
        return pair.serve if index % 2 else pair.filled

    def serves(self, index: int) -> bool:
        """The control queue always; transmit queues if there is `on_frames`, without which the port is driven by hand. Of receive buffers
        nobody is told: whoever sends finds them."""
        return index == self._control or (index % 2 == 1 and self.on_frames is not None)

    def on_controlq(self, queue: DeviceQueue) -> None:
        """The driver sent commands: they are answered (5.1.6.5)."""
        before = self._wanted_pairs
        net_control.answer(queue, self._execute, lambda: self._use_pairs(before))

    def rounds(self, index: int) -> int:
        """As `Device.rounds`: commands once, since they may start and stop what serves the pairs."""
        return 1 if index == self._control else super().rounds(index)

    def _execute(self, kind: int, command: int, data: bytes) -> bool:
        """Carries out a command; whether that can be."""
        if (kind, command) != (ControlClass.MQ, net_control.VQ_PAIRS_SET) or NetFeature.MQ not in self._accepted:
            return False
        pairs = net_control.pairs_wanted(data)
        if pairs is None or not 1 <= pairs <= len(self._pairs):
            return False
        self._wanted_pairs = pairs
        return True

    def _use_pairs(self, before: int) -> None:
        if self._wanted_pairs != before:
            self._over = connect(self._pairs, self.active_pairs)
            self._tell(self._live_pairs, again=True)

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
        inflight: tuple[Memory, int] | None = None,
    ) -> None:
        """As `Device.setup_queue`."""
        super().setup_queue(index, size, areas, doorbell=doorbell, interrupt=interrupt, base=base, error=error, inflight=inflight)
        self._doorbells[index] = doorbell
        with suppress(FileExistsError):
            self._events.register(doorbell.fileno(), select.EPOLLIN)
        if index != self._control:
            self._pairs[index // 2].ring(index, doorbell)
        self._follow(index)

    @locked
    def reset_queue(self, index: int) -> None:
        """As `Device.reset_queue`."""
        with self._moving(index):
            super().reset_queue(index)
            self._silence(index)

    @locked
    def stop_queue(self, index: int) -> int:
        """As `Device.stop_queue`."""
        with self._moving(index):
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
        """The ports are gone with the queues."""
        for index in list(self._doorbells):
            self._silence(index)
        self._wanted_pairs = 1

    def _silence(self, index: int) -> None:
        with suppress(StatusError, OSError):  # a transport that is closed took its doorbells with it
            bell = self._doorbells.pop(index)
            for pair in self._pairs[index // 2 :][:1]:
                pair.ring(index, bell, silent=True)
            self._events.unregister(bell.fileno())

    @contextmanager
    def _moving(self, only: int | None = None) -> Iterator[None]:
        """While what the port stands on changes (`only` this queue, if it is given), nobody uses its queues."""
        self._tell(frozenset() if only is None else self._told - {only // 2})
        try:
            yield
        finally:
            self._follow(only)

    @property
    def _live_pairs(self) -> frozenset[int]:
        return frozenset(pair.number for pair in self._pairs if pair._port is not None)

    def _tell(self, pairs: frozenset[int], *, again: bool = False) -> None:
        if pairs != self._told or (pairs and again):
            self._told = pairs
            for call in list(self._watchers):
                call(pairs)

    def _follow(self, only: int | None = None) -> None:
        """A pair is live while the device is and both of its queues are enabled. `only` a queue has changed, if that is given."""
        features = self._accepted if self.state is DeviceState.DRIVER_OK else None
        there = self._control // 2 if self._accepted else 0
        changed = False
        for pair in self._pairs if only is None else self._pairs[only // 2 :][:1]:
            receiveq, transmitq = (self.queue(index) if pair.number < there else None for index in pair.indexes)
            changed |= pair.follow(receiveq, transmitq, features)
        if changed:
            self._over = connect(self._pairs, self.active_pairs)
        self._changed.signal()
        self._tell(self._live_pairs, again=changed)
