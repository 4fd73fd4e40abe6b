"""The network device (5.1), both ends: `NetDriver` and `NetDevice`, each a `virtio.port.Port`.

    with LoopbackTransport(device := NetDevice()) as transport, NetDriver(transport) as net:
        net.send_frames([bytes(60)])
        print(device.receive_frames())

One queue pair, or several with a control queue (`queue_pairs`), each a port of its own besides (`pair`). Frames are Ethernet frames without
their checksum; offloads are claimed in the header before each frame (`headers`), and what the other end does not take is completed here
(checksums) or dropped (segmentation).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from math import ceil
from typing import TYPE_CHECKING, Any, Final

from virtio import arguments
from virtio._core import BufferPool, DriverPort, DriverQueue, Memory, PortGroup, net_header_size
from virtio.devices import net_control, net_header
from virtio.devices.net_control import Commands, ControlClass, ControlQueue
from virtio.devices.net_device import NetDevice
from virtio.devices.net_header import (
    CHECKSUMS,
    DEFAULT_MTU,
    DEVICE_ID,
    GUEST_OFFLOADS,
    HOST_OFFLOADS,
    IMPLEMENTED,
    MAX_FRAME,
    MULTIQUEUE,
    RECEIVEQ1,
    RULES,
    UNKNOWN_SPEED,
    Config,
    GsoType,
    HeaderFlag,
    NetFeature,
    NetStatus,
    header_dtype,
)
from virtio.devices.net_pairs import DriverBursts, DriverPair, check_whole, connect, find_pair
from virtio.driver import MEMORY_SIZE, RESET_TIMEOUT, RING_FEATURES, Driver, DriverState
from virtio.errors import SpecViolation
from virtio.features import Features, features_of
from virtio.port import Descriptor, add_statistics
from virtio.spec import MAX_QUEUE_SIZE, Feature
from virtio.status import locked
from virtio.transport import Transport, check_transport

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

WANTED: Final = RING_FEATURES | (IMPLEMENTED - Features({Feature.IN_ORDER})) | Features({Feature.RING_RESET, Feature.ACCESS_PLATFORM})
"""What a driver asks for, unless it is told otherwise: all that is implemented, but IN_ORDER."""

__all__ = [
    "CHECKSUMS",
    "DEVICE_ID",
    "GUEST_OFFLOADS",
    "HOST_OFFLOADS",
    "MULTIQUEUE",
    "RULES",
    "WANTED",
    "Config",
    "ControlClass",
    "GsoType",
    "HeaderFlag",
    "NetDevice",
    "NetDriver",
    "NetFeature",
    "NetStatus",
    "header_dtype",
]


class NetDriver(Commands, DriverBursts, Driver):
    """Drives a network device: initializes it, keeps receive buffers with it, and is a `Port`.

    `pool` gives slots, and `memory` is where the pool and the queues are: shared between drivers by passing one's `pool` to the other. What
    is not given is made: a pool of `slots` slots of `slot_size` bytes for each queue pair, and memory for it and for the queues, or the
    transport's own.

    With more `queue_pairs` than one MQ and CTRL_VQ are asked for too, and as many pairs are used as the device has. Frames come from all of
    them in turn, and go out with each flow on one; `pair(i)` is a port of its own.

    A queue that the device broke raises a SpecViolation once and stands still; so does a device that needs a reset (DeviceNeedsReset, from
    `wait`). `restart` begins anew.
    """

    device_id = DEVICE_ID
    rules = RULES
    told_in_config = net_header.TOLD_IN_CONFIG

    def __init__(
        self,
        transport: Transport,
        *,
        memory: Memory | None = None,
        pool: BufferPool | None = None,
        slots: int = 1024,
        slot_size: int = 2048,
        queue_size: int = 256,
        queue_pairs: int = 1,
        required: Iterable[int] = (),
        wanted: Iterable[int] = WANTED,
    ) -> None:
        """Initializes the device. FeatureNegotiationError, TransportError, SpecViolation: that cannot be; the driver is then closed.

        ValueError: sizes that cannot be, queue pairs outside 1..32768, a pool that is not in `memory`, or one too small for a single
        receive buffer. TypeError: an argument of another type.
        """
        check_transport(transport)
        queue_pairs = arguments.integer("queue_pairs", queue_pairs, 1, net_header.MAX_QUEUE_PAIRS)
        queue_size = arguments.integer("queue_size", queue_size, 1, MAX_QUEUE_SIZE)
        slots, slot_size = net_header.check_slots(pool, slots, slot_size)
        if pool is not None:
            if memory is not None and memory is not pool.memory:
                raise ValueError("the pool is not in the memory given")
            memory, slot_size = pool.memory, pool.slot_size
        if memory is None:
            memory = getattr(transport, "memory", None)
        self._rows = ceil(MAX_FRAME / max(1, slot_size - BufferPool.HEADROOM))
        self._own_memory: Memory | None = None
        if memory is None:
            tables = 2 * queue_pairs * queue_size * (min(self._rows, queue_size) * 16 + 64)
            memory = self._own_memory = Memory(max(1, slots * slot_size * queue_pairs) + max(0, tables) + MEMORY_SIZE)
        self._own_pool: BufferPool | None = None
        self._over: DriverPort | PortGroup | None = None
        self._headers: NDArray[np.void] | None = None
        self._pairs = tuple(DriverPair(self, number) for number in range(queue_pairs))
        self._control_place: int | None = None
        self._link_events: deque[bool] = deque(maxlen=1024)
        self._link = True
        self.on_link: Callable[[bool], None] | None = None
        """Called with what the link became, by whichever call noticed."""
        self._queue_size = queue_size
        wanted = features_of("wanted", wanted, names=[NetFeature])
        self._asked = features_of("required", required), wanted | (MULTIQUEUE if queue_pairs > 1 else ())
        super().__init__(transport, memory=memory)
        with self.initializing():
            if pool is None:
                pool = self._own_pool = BufferPool(memory, slots * queue_pairs, slot_size=slot_size)
            self.pool: Final = pool
            self._start()

    def _start(self) -> None:
        self.acknowledge()
        required, wanted = self._asked
        offered = self.offered()
        # Long packets need long buffers: without MRG_RXBUF as many slots as there are in a chain, or none of this.
        if NetFeature.MRG_RXBUF not in offered & (required | wanted):
            most = min(self._queue_size, self.transport.queue_max(RECEIVEQ1), self.pool.slots)
            if self._rows >= most:
                wanted = wanted - GUEST_OFFLOADS
            if NetFeature.MTU in offered & wanted and not self._can_hold_mtu(offered & (required | wanted)):
                wanted = wanted - {NetFeature.MTU}
        self.negotiate(required=required, wanted=wanted)
        self._header_size = net_header_size(self._features)
        self.mac: bytes = net_header.check_mac(self._field("mac")) if NetFeature.MAC in self._features else net_header.random_mac()
        """The address that the device names, or a random one if it names none."""
        self.mtu: int = net_header.check_mtu(self._number("mtu")) if NetFeature.MTU in self._features else DEFAULT_MTU
        speed = self._number("speed") if NetFeature.SPEED_DUPLEX in self._features else UNKNOWN_SPEED
        self.speed: int | None = speed if speed < 1 << 31 else None
        """Mbit/s, or None if the device does not say."""
        self._there = self._active = 0
        there, control = self._find_queues()
        for index in range(2 * there):
            self.setup_queue(index)
        self._there, self._active = there, 1
        for pair in self._pairs[:there]:
            self._make_port(pair)
        self._control = None
        if NetFeature.CTRL_VQ in self._features:
            if self._control_place is None:
                self._control_place = self.allocate(ControlQueue.ROOM)
            queue = self.setup_queue(control, size=net_control.RING_SIZE, indirect_limit=0)
            self._control = ControlQueue(self, queue, self._control_place)
        self._over = connect(self._pairs, self._active)
        self.driver_ok()
        self._link = self._read_link()
        if there > 1:
            self.use_pairs(there)

    def _find_queues(self) -> tuple[int, int]:
        """How many pairs are to be used, and where the control queue is (5.1.2). SpecViolation: the device has not what it names."""
        if NetFeature.MQ not in self._features:
            return 1, 2
        most = net_header.check_queue_pairs(self._number("max_virtqueue_pairs"))
        if not self.transport.queue_max(2 * most):
            raise SpecViolation(f"the device's max_virtqueue_pairs is {most}, and it has no queue {2 * most} for control", "5.1.4")
        return min(len(self._pairs), most), 2 * most

    @locked
    def setup_queue(self, index: int, *, size: int | None = None, indirect_limit: int | None = None) -> DriverQueue:
        """As `Driver.setup_queue`, with the constructor's sizes unless told otherwise: for a queue that `reset_queue` was called for.

        Traffic then goes on, its counts too. With both queues reset, it does once both are set up.
        """
        index = arguments.number("queue index", index)
        size = self._queue_size if size is None else arguments.integer("queue size", size, 1, MAX_QUEUE_SIZE)
        if indirect_limit is None:
            most = max(1, min(size, self.transport.queue_max(index)))
            indirect_limit = min(self._rows, 1 << most.bit_length() - 1) if Feature.INDIRECT_DESC in self._features else 0
        queue = super().setup_queue(index, size=size, indirect_limit=indirect_limit)
        if self._control is not None and index == self._control.queue.index:
            self._control = ControlQueue(self, queue, self._control_place or 0)
        elif index // 2 < len(self._pairs):
            pair = self._pairs[index // 2]
            pair.take_over(queue, self.transport.interrupt(index))
            if pair.number < self._there and not self._queues_reset.intersection(pair.indexes):
                self._make_port(pair)
                self._over = connect(self._pairs, self._active)
        return queue

    def _make_port(self, pair: DriverPair) -> None:
        """A port over both queues, with receive buffers in them."""
        size, each = self._receive_buffer(self._features, self.mtu)
        buffers = min(max(1, self.pool.slots // (4 * self._there) // each), pair.receiveq.size)
        port = DriverPort(pair.receiveq, pair.transmitq, self.pool, features=self._features, buffer_size=size, buffers=buffers)
        pair.transmitq.disarm()
        port.refill()
        pair.change(port, pair.receiveq, pair.transmitq)

    def _receive_buffer(self, features: Features, mtu: int) -> tuple[int, int]:
        """Bytes of a receive buffer, and slots that it takes."""
        size = net_header.receive_buffer_size(features, mtu)
        return size, ceil(size / (self.pool.slot_size - self.pool.HEADROOM + net_header_size(features)))

    def _can_hold_mtu(self, features: Features) -> bool:
        """Whether the device's own queue is long enough for one frame of the device's own MTU."""
        _, each = self._receive_buffer(features, self._number("mtu"))
        return each <= self.transport.queue_max(RECEIVEQ1)

    def _field(self, name: str) -> bytes:
        try:
            return self.read_config(*net_header.FIELDS[name])
        except ValueError as error:
            raise SpecViolation(f"the device's configuration has no room for {name}, which it offers: {error}", "5.1.4") from None

    def _number(self, name: str) -> int:
        return int.from_bytes(self._field(name), "little")

    @property
    def header_size(self) -> int:
        """Bytes of the header before each frame (5.1.6)."""
        return self._header_size

    @property
    def headers(self) -> NDArray[np.void]:
        """A writable structured view of the header before each slot's frame: shape (slots,)."""
        if self._headers is None:
            self._headers = net_header.headers_of(self.pool, self._features)
        return self._headers

    @property
    def statistics(self) -> dict[str, Any]:
        """`sent_frames`, `sent_bytes`, `sent_drops` by reason, the same received; `notified` and `suppressed` notifications of the device.

        Of all pairs together: `pair(i).statistics` has those of one. Counts go on over `restart`. Frames left in a burst and never sent are
        in `pool.drops`.
        """
        found: dict[str, Any] = {}
        for pair in self._pairs:
            found = add_statistics(found, pair.statistics)
        return found

    def pair(self, number: int) -> DriverPair:
        """Queue pair `number`, from 0, as a port of its own: for one thread, or one loop. ValueError: there is no such pair."""
        return find_pair(self._pairs[: max(1, self._there)], number)

    @property
    def receiveq(self) -> DriverQueue:
        """The first pair's receive queue."""
        return self._pairs[0].receiveq

    @property
    def transmitq(self) -> DriverQueue:
        """The first pair's transmit queue."""
        return self._pairs[0].transmitq

    @property
    def link(self) -> bool:
        """Whether the link is up, as last seen; always without STATUS."""
        return self._link

    def link_events(self) -> list[bool]:
        """What the link became since this was last asked, oldest first."""
        found = []
        with suppress(IndexError):
            while True:
                found.append(self._link_events.popleft())
        return found

    def arm(self, queues: Iterable[DriverQueue] | None = None, *, room: bool = False) -> bool:
        """As `Driver.arm`, of the receive queues if not told, with `room` of the transmit queues too."""
        queues = self._meant(queues, room)
        self._remind(queues, room)
        return super().arm(queues)

    def wait(self, timeout: float | None = None, *, queues: Iterable[DriverQueue] | None = None, room: bool = False) -> bool:
        """As `Driver.wait`, for the receive queues if not told, with `room` for the transmit queues too. Looks at the link if the
        configuration changed."""
        queues = self._meant(queues, room)
        self._remind(queues, room)
        found = super().wait(timeout, queues=queues)
        for pair in self._pairs[: self._there]:
            pair.quieten()
        if self._control is not None:
            self._control.quieten()
        config = self.transport.config_interrupt
        if config.wait(0):  # it found frames before it looked
            config.drain()
            self.check()
        return found

    def _remind(self, queues: Iterable[DriverQueue], room: bool) -> None:
        """Rings once more for whoever waits for room in a packed queue with EVENT_IDX.

        QEMU, when its back-end took no more for a while, asks to be notified of chains that it has seen already, and never of later ones.
        """
        if room and self._features >= {Feature.RING_PACKED, Feature.EVENT_IDX}:
            for queue in queues:
                if queue.index % 2 and queue.outstanding and (transmit := self._enabled.get(queue.index)) is not None:
                    transmit.doorbell.signal()

    def _meant(self, queues: Iterable[DriverQueue] | None, room: bool) -> list[DriverQueue]:
        """Those given, or those of every pair."""
        if queues is not None:
            return list(queues)
        return [queue for pair in self._pairs[: self._there] for queue in pair.queues(room)]

    def check(self) -> None:
        """As `Driver.check`; then reads whether the link is up, and tells if that changed."""
        super().check()
        if self._state is DriverState.DRIVER_OK and (up := self._read_link()) != self._link:
            self._link = up
            self._link_events.append(up)
            for index, transmit in self._enabled.items():
                if up and index % 2:
                    transmit.doorbell.signal()  # QEMU never asks for it in a packed queue that was enabled while the link was down
            if self.on_link is not None:
                self.on_link(up)

    def _read_link(self) -> bool:
        return NetFeature.STATUS not in self._features or bool(self._number("status") & NetStatus.LINK_UP)

    @locked
    def reset(self, *, timeout: float = RESET_TIMEOUT) -> dict[int, list[Any]]:
        """As `Driver.reset`: slots that the device had are the pool's again. `restart` is this, and initialization after it."""
        tokens = super().reset(timeout=timeout)
        self._retire()
        return tokens

    def _retire(self) -> None:
        """The queues are gone."""
        for pair in self._pairs:
            pair.change(None)
        self._over = connect(self._pairs, 0)
        self._control = self._headers = None

    @locked
    def restart(self, *, timeout: float = RESET_TIMEOUT) -> None:
        """Resets the device and initializes it again, with the same wishes: the way on after a broken queue or NEEDS_RESET.

        Frames in flight are lost. TransportError, FeatureNegotiationError, SpecViolation: as at the beginning; it may be tried again.
        """
        self.reset(timeout=timeout)
        self._start()

    @locked
    def close(self) -> None:
        """As `Driver.close`; ends the pool if it was made here."""
        try:
            super().close()
        finally:
            self._retire()
            if self._own_pool is not None:
                self._own_pool.close()
            if self._own_memory is not None:
                with suppress(BufferError):  # bursts and views keep it, and the last of them frees it
                    self._own_memory.close()

    def _sleeps_on(self) -> Descriptor:
        return self._watching()

    def _alternate(self) -> None:
        if self._serve is not None:
            self._serve()

    def _check_whole(self) -> None:
        check_whole([pair.receiveq for pair in self._pairs[: self._there]], "the device is reset")
