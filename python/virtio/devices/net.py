"""The network device (5.1), both ends: `NetDriver` and `NetDevice`, each a `virtio.port.Port`.

    with LoopbackTransport(device := NetDevice()) as transport, NetDriver(transport) as net:
        net.send_frames([bytes(60)])
        print(device.receive_frames())

One queue pair, no control queue. Frames are Ethernet frames without their checksum; offloads are claimed in the header before each frame
(`headers`), and what the other end does not take is completed here (checksums) or dropped (segmentation).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from math import ceil
from typing import TYPE_CHECKING, Any, Final

from virtio._core import BufferPool, Burst, DriverPort, DriverQueue, Memory, net_header_size
from virtio.devices import net_header
from virtio.devices.net_device import NetDevice
from virtio.devices.net_header import (
    CHECKSUMS,
    DEFAULT_MTU,
    DEVICE_ID,
    GUEST_OFFLOADS,
    HOST_OFFLOADS,
    IMPLEMENTED,
    MAX_FRAME,
    RECEIVEQ1,
    RULES,
    TRANSMITQ1,
    UNKNOWN_SPEED,
    Config,
    GsoType,
    HeaderFlag,
    NetFeature,
    NetStatus,
    header_dtype,
)
from virtio.driver import MEMORY_SIZE, RESET_TIMEOUT, RING_FEATURES, Driver, DriverState
from virtio.errors import SpecViolation, StatusError
from virtio.features import Features
from virtio.port import AsyncBursts, add_statistics, counted, notifications
from virtio.spec import Feature
from virtio.status import locked
from virtio.transport import Transport

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
    "RULES",
    "WANTED",
    "Config",
    "GsoType",
    "HeaderFlag",
    "NetDevice",
    "NetDriver",
    "NetFeature",
    "NetStatus",
    "header_dtype",
]


class NetDriver(AsyncBursts, Driver):
    """Drives a network device: initializes it, keeps receive buffers with it, and is a `Port`.

    `pool` gives slots, and `memory` is where the pool and the queues are: shared between drivers by passing one's `pool` to the other. What
    is not given is made: a pool of `slots` slots of `slot_size` bytes, and memory for it and for the queues, or the transport's own.

    A queue that the device broke raises a SpecViolation once and stands still; so does a device that needs a reset (DeviceNeedsReset, from
    `wait`). `restart` begins anew.
    """

    device_id = DEVICE_ID
    rules = RULES

    def __init__(
        self,
        transport: Transport,
        *,
        memory: Memory | None = None,
        pool: BufferPool | None = None,
        slots: int = 1024,
        slot_size: int = 2048,
        queue_size: int = 256,
        required: Iterable[int] = (),
        wanted: Iterable[int] = WANTED,
    ) -> None:
        """Initializes the device. FeatureNegotiationError, TransportError, SpecViolation: that cannot be; the driver is then closed.

        ValueError: sizes that cannot be, a pool that is not in `memory`, or one too small for a single receive buffer.
        """
        if pool is not None:
            if memory is not None and memory is not pool.memory:
                raise ValueError("the pool is not in the memory given")
            memory, slot_size = pool.memory, pool.slot_size
        if memory is None:
            memory = getattr(transport, "memory", None)
        self._rows = ceil(MAX_FRAME / max(1, slot_size - BufferPool.HEADROOM))
        self._own_memory: Memory | None = None
        if memory is None:
            tables = 2 * queue_size * (min(self._rows, queue_size) * 16 + 64)
            memory = self._own_memory = Memory(max(1, slots * slot_size) + max(0, tables) + MEMORY_SIZE)
        self._own_pool: BufferPool | None = None
        self._port: DriverPort | None = None
        self._headers: NDArray[np.void] | None = None
        self._totals: dict[str, Any] = {}
        self._link_events: deque[bool] = deque(maxlen=1024)
        self._link = True
        self.on_link: Callable[[bool], None] | None = None
        """Called with what the link became, by whichever call noticed."""
        self._queue_size = queue_size
        self._asked = Features(required), Features(wanted, names=[NetFeature])
        super().__init__(transport, memory=memory)
        with self.initializing():
            if pool is None:
                pool = self._own_pool = BufferPool(memory, slots, slot_size=slot_size)
            self.pool: Final = pool
            self._start()

    def _start(self) -> None:
        self.acknowledge()
        required, wanted = self._asked
        offered = self.transport.offered()
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
        self.receiveq: DriverQueue = self.setup_queue(RECEIVEQ1)
        self.transmitq: DriverQueue = self.setup_queue(TRANSMITQ1)
        self._port = self._make_port()
        self.driver_ok()
        self._link = self._read_link()

    @locked
    def setup_queue(self, index: int, *, size: int | None = None, indirect_limit: int | None = None) -> DriverQueue:
        """As `Driver.setup_queue`, with the constructor's sizes unless told otherwise: for a queue that `reset_queue` was called for.

        Traffic then goes on, its counts too. With both queues reset, it does once both are set up.
        """
        if size is None:
            size = self._queue_size
        if indirect_limit is None:
            most = max(1, min(size, self.transport.queue_max(index)))
            indirect_limit = min(self._rows, 1 << most.bit_length() - 1) if Feature.INDIRECT_DESC in self._features else 0
        queue = super().setup_queue(index, size=size, indirect_limit=indirect_limit)
        if (old := self._port) is not None:
            if index == RECEIVEQ1:
                self.receiveq = queue
            elif index == TRANSMITQ1:
                self.transmitq = queue
            pair = self.receiveq, self.transmitq
            if not self._queues_reset.intersection((RECEIVEQ1, TRANSMITQ1)):
                self._port = self._make_port()
                self._totals = add_statistics(self._totals, old.counters)
                for gone in {old.receiveq, old.transmitq}.difference(pair):
                    self._totals = add_statistics(self._totals, notifications(gone))
        return queue

    def _make_port(self) -> DriverPort:
        """A port over both queues, with receive buffers in them."""
        size, each = self._receive_buffer(self._features, self.mtu)
        buffers = max(1, self.pool.slots // 4 // each)
        port = DriverPort(
            self.receiveq, self.transmitq, self.pool, features=self._features, buffer_size=size, buffers=min(buffers, self.receiveq.size)
        )
        self.transmitq.disarm()
        port.refill()
        return port

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

        Counts go on over `restart`. Frames left in a burst and never sent are in `pool.drops`.
        """
        return add_statistics(self._totals, counted(self._port))

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

    def _live(self) -> DriverPort:
        if self._port is None:
            raise StatusError("the driver's queues are gone: the device was reset, or the driver closed")
        return self._port

    def arm(self, queues: Iterable[DriverQueue] | None = None, *, room: bool = False) -> bool:
        """As `Driver.arm`, of the receive queue if not told, with `room` of both."""
        self._remind(room)
        return super().arm(self._meant(queues, room))

    def wait(self, timeout: float | None = None, *, queues: Iterable[DriverQueue] | None = None, room: bool = False) -> bool:
        """As `Driver.wait`, for the receive queue if not told, with `room` for both. Looks at the link if the configuration changed."""
        self._remind(room)
        found = super().wait(timeout, queues=self._meant(queues, room))
        config = self.transport.config_interrupt
        if config.wait(0):  # it found frames before it looked
            config.drain()
            self.check()
        return found

    def _remind(self, room: bool) -> None:
        """Rings once more for whoever waits for room in a packed queue with EVENT_IDX.

        QEMU, when its back-end took no more for a while, asks to be notified of chains that it has seen already, and never of later ones.
        """
        suppressed = room and self._features >= {Feature.RING_PACKED, Feature.EVENT_IDX}
        if suppressed and self.transmitq.outstanding and (transmit := self._enabled.get(TRANSMITQ1)) is not None:
            transmit.doorbell.signal()

    def _meant(self, queues: Iterable[DriverQueue] | None, room: bool) -> Iterable[DriverQueue]:
        if queues is not None:
            return queues
        return [self.receiveq, self.transmitq] if room else [self.receiveq]

    def check(self) -> None:
        """As `Driver.check`; then reads whether the link is up, and tells if that changed."""
        super().check()
        if self._state is DriverState.DRIVER_OK and (up := self._read_link()) != self._link:
            self._link = up
            self._link_events.append(up)
            if up and (transmit := self._enabled.get(TRANSMITQ1)) is not None:
                transmit.doorbell.signal()  # QEMU never asks for it in a packed queue that was enabled while the link was down
            if self.on_link is not None:
                self.on_link(up)

    def _read_link(self) -> bool:
        return NetFeature.STATUS not in self._features or bool(self._number("status") & NetStatus.LINK_UP)

    @locked
    def reset(self, *, timeout: float = RESET_TIMEOUT) -> dict[int, list[Any]]:
        """As `Driver.reset`: slots that the device had are the pool's again. `restart` is this, and initialization after it."""
        tokens = super().reset(timeout=timeout)
        self._totals = self.statistics
        self._port = None
        self._headers = None
        return tokens

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
            self._totals = self.statistics
            self._port = None
            self._headers = None
            if self._own_pool is not None:
                self._own_pool.close()
            if self._own_memory is not None:
                with suppress(BufferError):  # bursts and views keep it, and the last of them frees it
                    self._own_memory.close()

    def _alternate(self) -> None:
        if self._serve is not None:
            self._serve()

    def _check_whole(self) -> None:
        if (error := self.receiveq.broken) is not None:
            raise StatusError(f"queue {self.receiveq.index} is broken until the device is reset: {error}")
