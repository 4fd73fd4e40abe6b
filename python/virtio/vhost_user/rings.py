"""A back-end's rings, put on their device and taken off as the front-end says.

A ring is on the device while it is started, enabled and placed. A network device's disabled transmit ring is emptied here, other disabled
rings wait.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Final

from virtio._core import DeviceQueue, EventFd
from virtio.device import Device, DeviceState
from virtio.errors import FeatureNegotiationError, MalformedMessage, StatusError, VirtioError
from virtio.features import Features
from virtio.spec import DeviceId, Feature
from virtio.vhost_user import effects as fx
from virtio.vhost_user.backend_session import Answer
from virtio.vhost_user.position import DESCRIPTOR, FLAGS_AT, START, USED, find_position, may_be_right, put_in_order
from virtio.vhost_user.regions import area_lengths
from virtio.vhost_user.serving import Loop, Ring
from virtio.vhost_user.tracking import InflightArea

CTRL_VQ: Final = 17
"""Feature bit of the network device's control queue, whose owner may be the front-end (device-04)."""
DISCARD_BATCH: Final = 64
DISCARD_ROUNDS: Final = 64


class Rings:
    """The rings of `device`, in order. `poll`: nobody waits for their kicks, except of those that are emptied here; else `serve` is called
    for a kick. Nothing is emptied unless `heard` says that messages have been carried out."""

    def __init__(self, device: Device, loop: Loop, *, poll: bool, serve: Callable[[], object], heard: Callable[[], bool]) -> None:
        self.each: Final = [Ring() for _ in device.queues]
        self.features: Features | None = None
        """What the front-end accepted."""
        self._device, self._loop, self._poll, self._serve, self._heard = device, loop, poll, serve, heard
        self._inflight: InflightArea | None = None
        self._busy: bool | None = None

    @property
    def packed(self) -> bool | None:
        """Whether the rings are; None: that is not known yet."""
        return None if self.features is None else Feature.RING_PACKED in self.features

    @property
    def busy(self) -> bool:
        """Whether some are to be looked at without being kicked."""
        if self._busy is None:
            wanted = (ring.on and (ring.polled or self._poll) and self._device.serves(index) for index, ring in enumerate(self.each))
            self._busy = self._device.state is not DeviceState.NEEDS_RESET and any(wanted)
        return self._busy

    @property
    def used_areas(self) -> list[tuple[int, int, int]]:
        """Device areas whose writes are logged under another address: address, length, that address."""
        found = []
        for ring in self.each:
            if ring.areas is not None and ring.log is not None and ring.log != ring.areas[2]:
                found.append((ring.areas[2], area_lengths(ring.size, bool(self.packed))[2], ring.log))
        return found

    # What the front-end says of one.

    def change(self, effect: fx.Effect) -> Answer:
        """Carries out what is asked of one ring; `place` then puts it where it belongs."""
        match effect:
            case fx.SetVringNum(index, size):
                ring = self._stopped(index)
                ring.size = size
            case fx.SetVringBase(index, base):
                ring = self._stopped(index)
                if base != ring.base and self._inflight is not None:
                    self._inflight.forget(index)  # not the ring that stopped there
                ring.base, ring.exact = base, ring.exact and base == ring.base
            case fx.SetVringAddr(index, areas, log):
                self.take_off(index)
                self.each[index].areas, self.each[index].log = areas, log
            case fx.SetVringEnable(index, enabled):
                self.each[index].enabled = enabled
            case fx.StopVring(index):
                ring = self._stopped(index)
                ring.kick = _replaced(ring.kick, None)
                return ring.base
            case fx.BreakVring(index, error):
                self.take_off(index)
                ring = self.each[index]
                ring.areas = None
                if ring.started:  # memory that a ring once lay in may go
                    self._break(ring, error)
            case fx.SetVringKick(index, descriptor):
                self.take_off(index)
                ring = self.each[index]
                ring.kick = _replaced(ring.kick, EventFd() if descriptor is None else EventFd.from_fd(descriptor))
                ring.polled, ring.started, ring.fresh = descriptor is None, True, self._device.state is DeviceState.NEEDS_RESET
            case fx.SetVringCall(index, descriptor):
                ring = self.each[index]
                call = None if descriptor is None else EventFd.from_fd(descriptor, stream=True)  # User-Mode Linux passes a socket
                told = call if ring.on or ring.discarding else None
                if told is not None:
                    told.signal()  # one that takes none is refused here, and the old one stays
                for queue in (self._device.queue(index) if ring.on else None, ring.discarding):
                    if queue is not None and queue.broken is None:
                        queue.connect(call)
                if told is not None:
                    told.signal()  # what the old one was told meanwhile may be lost
                ring.call = _replaced(ring.call, call)
            case fx.SetVringErr(index, descriptor):
                self.take_off(index)
                ring = self.each[index]
                ring.error = _replaced(ring.error, None if descriptor is None else EventFd.from_fd(descriptor))
        return None

    def _stopped(self, index: int) -> Ring:
        self.take_off(index)
        ring = self.each[index]
        ring.started = False
        return ring

    def stop(self) -> None:
        """None is started any more, as after a device reset."""
        for index in range(len(self.each)):
            self._stopped(index)

    def forget_broken(self) -> None:
        """Before the device begins anew: if it needs a reset, only rings that were given a kick since go on with it."""
        if self._device.state is DeviceState.NEEDS_RESET:
            for ring in self.each:
                ring.started, ring.fresh = ring.started and ring.fresh, False

    # Rings on and off the device.

    def place(self, index: int) -> None:
        """Puts a ring where it belongs now."""
        ring = self.each[index]
        ready = ring.started and ring.size > 0 and ring.areas is not None and self.features is not None
        on = ready and ring.enabled
        discarding = ready and not on and index in self._device.discarded
        if self._device.state is DeviceState.NEEDS_RESET and not ring.fresh:  # nobody began anew
            on, discarding = on and ring.on, discarding and ring.discarding is not None
        if ring.on == on and (ring.discarding is not None) == discarding:
            return
        self.take_off(index)
        if not on and not discarding:
            return
        try:
            self._put_on(index, ring, on)
        except (VirtioError, ValueError) as error:
            ring.started = False
            self._break(ring, error)

    def _put_on(self, index: int, ring: Ring, on: bool) -> None:
        assert ring.areas is not None and ring.kick is not None and self.features is not None
        device = self._device
        if device.state is not DeviceState.DRIVER_OK:
            others = [other for other, each in enumerate(self.each) if each.on or each.discarding]
            for other in others:
                self.take_off(other)
            self.forget_broken()
            assumed = {CTRL_VQ} if device.device_id == DeviceId.NETWORK else ()
            try:
                device.begin(self.features & device.offered, assumed=assumed)
            except FeatureNegotiationError as refused:
                raise MalformedMessage(str(refused), "SET_FEATURES") from None
            for other in others:
                self.place(other)
        base, inflight = self._base(ring), None
        if self._inflight is not None:
            inflight = self._inflight.region(index, ring.size, packed=bool(self.packed))
        if on:
            call, error = ring.call, ring.error
            device.setup_queue(index, ring.size, ring.areas, doorbell=ring.kick, interrupt=call, base=base, error=error, inflight=inflight)
            ring.on, self._busy = True, None
            if self._poll and (queue := device.queue(index)) is not None:
                queue.disarm()
            ring.kick.signal()  # what was published before is looked at, and who waits for the device wakes
            if call is not None and not ring.exact and base not in (0, START):
                with suppress(OSError):  # whoever is told next reports it
                    call.signal()  # whoever served it before may have been killed before it told
        else:
            limit, features = device.queue_max(index), device.accepted
            queue = DeviceQueue(
                device.memory, ring.size, ring.areas, features=features, index=index, max_size=limit, base=base, inflight=inflight
            )
            queue.connect(ring.call)
            ring.discarding = queue
            queue.arm()
        self._watch(index, ring)

    def _watch(self, index: int, ring: Ring) -> None:
        """Hears of its kicks, or no more, as it is served."""
        alive = self._device.state is not DeviceState.NEEDS_RESET
        wanted = ring.discarding is not None or (ring.on and alive and self._device.serves(index) and not self._poll)
        if wanted and ring.watched is None and ring.kick is not None:
            ring.watched = ring.kick.fileno()
            self._loop.watch(ring.watched, self._serve if ring.on else lambda: self._discard(ring))
        elif not wanted and ring.watched is not None:
            self._loop.unwatch(ring.watched)
            ring.watched = None

    def look_again(self) -> None:
        """The device serves other queues: what came meanwhile is theirs too."""
        self._busy = None
        for index, ring in enumerate(self.each):
            self._watch(index, ring)
            if ring.on and ring.kick is not None:
                ring.kick.signal()

    def needs_reset(self) -> None:
        """Kicks are for nobody until the front-end begins anew."""
        self._busy = None
        for index, ring in enumerate(self.each):
            self._watch(index, ring)

    def _base(self, ring: Ring) -> int:
        """Where the ring resumes. Some front-ends give packed rings no base at all, and a ring that no device wrote tells; some give only
        the available position, as if there were 16 bits, and nothing is then in flight."""
        assert ring.areas is not None and self.features is not None
        if not self.packed or ring.exact:
            return ring.base
        if (found := self._found(ring, ring.areas[0])) is not None:
            return found
        if ring.base >> 16:
            return ring.base
        if ring.base == 0 and not self._device.memory.load(ring.areas[0] + FLAGS_AT, 2) & USED:
            return START
        return ring.base << 16 | ring.base

    def _found(self, ring: Ring, table: int) -> int | None:
        """Where a packed ring tells itself that it resumes, if its front-end is not to be believed. QEMU, whose back-end vanished, says
        that it is at the start, or where its own network device stopped, which has transmitted for a moment."""
        assert self.features is not None
        # Without INDIRECT_DESC drivers have chains of many descriptors, and in order one used descriptor may stand for many.
        lone = Feature.INDIRECT_DESC in self.features and Feature.IN_ORDER not in self.features
        doubtful = ring.base == START or (lone and self._device.device_id == DeviceId.NETWORK)
        if self._inflight is not None or not doubtful:
            return None
        memory = self._device.memory
        found = find_position([memory.load(table + DESCRIPTOR * index + FLAGS_AT, 2) for index in range(ring.size)])
        if found is None or (found.taken and not lone):
            return None
        if (found.taken or ring.base != START) and may_be_right(memory, table, ring.size, found, ring.base):
            return None
        return put_in_order(memory, table, found)

    def take_off(self, index: int) -> None:
        """Nobody serves it any more; its base tells where it goes on."""
        ring = self.each[index]
        if ring.watched is not None:
            self._loop.unwatch(ring.watched)
            ring.watched = None
        if ring.on:
            ring.on, self._busy = False, None
            with suppress(StatusError):  # the device was reset behind our back
                ring.base, ring.exact = self._device.stop_queue(index), True
        if ring.discarding is not None:
            ring.base, ring.exact = ring.discarding.base, True
            ring.discarding.close()
            ring.discarding = None

    def _break(self, ring: Ring, error: Exception) -> None:
        self._loop.report(error)
        if ring.error is not None:
            with suppress(OSError):
                ring.error.signal()

    def _discard(self, ring: Ring) -> None:
        if not self._heard() or (queue := ring.discarding) is None or ring.kick is None:
            return
        ring.kick.drain()
        batch = queue.batch(DISCARD_BATCH)
        try:
            for _ in range(DISCARD_ROUNDS):
                if not queue.pop_batch(batch):
                    if not queue.arm():
                        return
                    continue
                queue.complete_batch(batch)
            ring.kick.signal()
        except (VirtioError, OSError) as error:  # OSError: the front-end cannot be told
            ring.started = False
            self._break(ring, error)
            self.take_off(self.each.index(ring))

    # Chains in flight.

    def track(self, area: InflightArea) -> InflightArea:
        """From now on, chains in flight stand there."""
        if any(ring.on or ring.discarding for ring in self.each):
            area.close()
            raise MalformedMessage("an in-flight area for rings that run", "SET_INFLIGHT_FD")
        old, self._inflight = self._inflight, area
        if old is not None:
            old.close()
        return area

    def forget_inflight(self) -> None:
        """After a reset nothing is in flight."""
        if self._inflight is not None:
            self._inflight.forget_all()

    def close(self) -> None:
        """Closes what was passed for them. They have been taken off."""
        for ring in self.each:
            ring.started = False
            for event in (ring.kick, ring.call, ring.error):
                _replaced(event, None)
        if self._inflight is not None:
            self._inflight.close()


def _replaced(old: EventFd | None, new: EventFd | None) -> EventFd | None:
    if old is not None:
        old.close()
    return new
