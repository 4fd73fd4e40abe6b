"""One connection of a back-end: carries out on a `Device` what the session asks for. Sockets and loop are in `virtio.vhost_user.backend`.

A ring is on the device while it is started, enabled and placed. A network device's disabled transmit ring is emptied here, other disabled
rings wait. What the front-end passes is duplicated by its user and closed behind each message, so nothing stays open on any way out.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable
from contextlib import suppress
from time import monotonic
from typing import Final

from virtio._core import DeviceQueue, EventFd, Memory
from virtio.device import Device, DeviceState
from virtio.errors import FeatureNegotiationError, MalformedMessage, SpecViolation, StatusError, TransportError, VirtioError
from virtio.features import Features
from virtio.spec import DeviceId, Feature, Status
from virtio.vhost_user import effects as fx
from virtio.vhost_user import message as wire
from virtio.vhost_user.backend_session import Answer, BackendSession, Send, descriptors_of
from virtio.vhost_user.dirty import DirtyLog
from virtio.vhost_user.message import ProtocolFeature
from virtio.vhost_user.position import START, packed_base
from virtio.vhost_user.regions import area_lengths
from virtio.vhost_user.serving import Loop, Ring
from virtio.vhost_user.socket import Link
from virtio.vhost_user.state import StateTransfer
from virtio.vhost_user.tracking import InflightArea

PROTOCOL: Final = Features(
    {
        *(ProtocolFeature.MQ, ProtocolFeature.LOG_SHMFD, ProtocolFeature.REPLY_ACK, ProtocolFeature.MTU, ProtocolFeature.BACKEND_REQ),
        *(ProtocolFeature.CONFIG, ProtocolFeature.RESET_DEVICE, ProtocolFeature.CONFIGURE_MEM_SLOTS, ProtocolFeature.STATUS),
        *(ProtocolFeature.INFLIGHT_SHMFD, ProtocolFeature.RARP, ProtocolFeature.DEVICE_STATE),
    }
)
"""Protocol features that are offered."""
CTRL_VQ: Final = 17
"""Feature bit of the network device's control queue, whose owner may be the front-end (device-04)."""
DISCARD_BATCH: Final = 64
DISCARD_ROUNDS: Final = 64
SPIN: Final = 0.0002
"""Seconds that one turn of a connection looks at its rings before it looks at its messages, if it never sleeps."""
MESSAGES: Final = 64
"""Messages that one turn reads at most, so that others have theirs."""
LONG: Final = 0.02
"""Seconds after which a turn reads no further message."""


class Connection:
    """A front-end that is connected over `link`, and the device that it has. Both are its own until `close`."""

    def __init__(
        self,
        link: Link,
        device: Device,
        loop: Loop,
        *,
        protocol_features: Features = PROTOCOL,
        poll: bool = False,
        withheld: Iterable[int] = (),
    ) -> None:
        """StatusError: the device is on a transport already; the link is closed."""
        self.device: Final = device
        self.session: Final = BackendSession(
            device.offered - withheld,
            len(device.queues),
            file_size=lambda descriptor: os.fstat(descriptor).st_size,
            protocol_features=protocol_features - ([ProtocolFeature.RARP] if getattr(device, "on_rarp", None) is None else []),
            max_queue_size=device.queue_size,
            rules=device.rules,
            assumed={CTRL_VQ} if device.device_id == DeviceId.NETWORK else (),
            queue_count=len(device.queues) // 2 if device.device_id == DeviceId.NETWORK else None,
        )
        self.rings: Final = [Ring() for _ in device.queues]
        self.closed = False
        self._link, self._loop, self._poll = link, loop, poll
        self._config_changed, self._serving_changed = EventFd(), EventFd()
        try:
            device.connect(self._config_changed, serving_changed=self._serving_changed)
        except StatusError:
            self._config_changed.close()
            self._serving_changed.close()
            link.close()
            raise
        self._features: Features | None = None
        self._status = 0
        self._memories: dict[int, Memory] = {}
        self._files: dict[int, tuple[int, ...]] = {}
        self._lingering: list[Memory] = []
        self._unread = False
        self._busy: bool | None = None
        self._channel: Link | None = None
        self._log = DirtyLog(device.memory)
        self._state = StateTransfer()
        self._inflight: InflightArea | None = None
        loop.watch(link.fileno(), self.receive)
        loop.watch(self._config_changed.fileno(), self._tell_config)
        loop.watch(self._serving_changed.fileno(), self._look_again)

    @property
    def busy(self) -> bool:
        """Whether it wants `spin` without being kicked."""
        if self._busy is None:
            wanted = (ring.on and (ring.polled or self._poll) and self.device.serves(index) for index, ring in enumerate(self.rings))
            self._busy = self.device.state is not DeviceState.NEEDS_RESET and any(wanted)
        return self._busy

    @property
    def logging(self) -> bool:
        """Whether `flush_log` is to be called now and then."""
        return self._log.wanted

    @property
    def waiting(self) -> bool:
        """Whether the front-end leaves replies unread."""
        return self._link.waiting

    @property
    def descriptor(self) -> int:
        """The descriptor of the connection."""
        return self._link.fileno()

    # What arrives.

    def receive(self) -> None:
        """Reads and carries out the messages that are there, up to `MESSAGES`, or as many as are begun within `LONG` seconds."""
        self._unread = True
        until = monotonic() + LONG
        for number in range(MESSAGES):
            if number and monotonic() > until:
                return
            if self.closed or (received := self._receive()) is None:
                self._unread = False
                return
            data, descriptors = received
            if not data:
                self.close()
                return
            for step in self.session.feed(data, descriptors):
                try:
                    self._carry_out(step.effects, step.done, step.failed)
                except Exception as error:  # also what a device raises: other connections go on
                    self._loop.report(error)
                    self.close()

    def _receive(self) -> tuple[bytes, list[int]] | None:
        try:
            self._link.flush()
        except TransportError:
            return b"", []
        return self._link.receive(self.session.needed)

    def _carry_out(self, effects: tuple[fx.Effect, ...], done: Callable[[Answer], Send], failed: Callable[[], Send | None]) -> None:
        ended = False
        try:
            for effect in effects:  # what moves is taken off while its memory is still there
                if isinstance(effect, fx.SetVringAddr | fx.BreakVring) and not self.closed:
                    self._take_off(effect.index)
            answer: Answer = None
            sent: Send | None
            try:
                for effect in effects:
                    if isinstance(effect, fx.Disconnect):
                        ended = True
                        self._loop.report(effect.error)
                    elif not self.closed:
                        found = self._do(effect)
                        answer = answer if found is None else found
                sent = done(answer) if not ended else Send()
            except (VirtioError, ValueError, OSError) as error:
                self._loop.report(error)
                sent = failed()
            for index in range(len(self.rings)):
                self._place(index)
            if sent is None:
                ended = True
            elif not self.closed and not ended:
                self.flush_log()
                self._link.send(sent)
        finally:
            for effect in effects:
                for descriptor in descriptors_of(effect):
                    os.close(descriptor)
        if ended:
            self.close()

    # What is asked for.

    def _do(self, effect: fx.Effect) -> Answer:
        match effect:
            case fx.Refused(error):
                self._loop.report(error)
            case fx.SetFeatures(features, log):
                self._set_features(features, log)
            case fx.MapMemory() | fx.AddRegion() | fx.RemoveRegion():
                self._map(effect)
            case (
                (fx.SetVringNum() | fx.SetVringAddr() | fx.SetVringBase() | fx.SetVringEnable() | fx.StopVring() | fx.BreakVring())
                | fx.SetVringKick()
                | fx.SetVringCall()
                | fx.SetVringErr()
            ):
                return self._vring(effect)
            case fx.GetConfig(offset, size):
                have = self.device.read_config(offset, min(size, max(0, len(self.device.config) - offset)))
                return have.ljust(size, b"\0")  # the front-end's structure may be longer
            case fx.SetConfig(config):
                self.device.write_config(config.offset, config.data)
            case fx.SetLogBase(log, descriptor):
                self.flush_log()
                self._log.place(log, descriptor)
            case fx.GetInflight(wanted):
                return self._track(InflightArea.make(wanted, packed=self._packed)).answer
            case fx.SetInflight(area, descriptor):
                self._track(InflightArea.passed(area, descriptor))
            case fx.SetBackendChannel(descriptor):
                self._set_channel(descriptor)
            case fx.ResetDevice():
                self._reset()
                self._forget_inflight()
            case fx.SetStatus(status):
                self._status = status
                if not status:
                    self._reset()
                    self._forget_inflight()
            case fx.GetStatus():
                return self._status | (Status.NEEDS_RESET if self.device.state is DeviceState.NEEDS_RESET else 0)
            case fx.SendRarp(value) | fx.SetMtu(value):
                hook = getattr(self.device, "on_rarp" if isinstance(effect, fx.SendRarp) else "on_mtu", None)
                if hook is not None:
                    hook(value)
            case fx.TransferDeviceState(transfer, descriptor):
                self._state.begin(transfer.direction, descriptor)
            case fx.CheckDeviceState():
                return self._state.check()
            case _:  # SetOwner, SetProtocolFeatures, SetLogFd: nothing to do
                pass
        return None

    def _set_features(self, features: Features, log: bool) -> None:
        if features != self._features:
            self._reset()
            self._forget_inflight()
            self._features = features
        self._log.wanted = log
        self._log.start()

    def _reset(self) -> None:
        for index in range(len(self.rings)):
            self._take_off(index)
        self.device.reset()

    @property
    def _packed(self) -> bool | None:
        return None if self._features is None else Feature.RING_PACKED in self._features

    def _track(self, area: InflightArea) -> InflightArea:
        """From now on, chains in flight stand there."""
        if any(ring.on or ring.discarding for ring in self.rings):
            area.close()
            raise MalformedMessage("an in-flight area for rings that run", "SET_INFLIGHT_FD")
        old, self._inflight = self._inflight, area
        if old is not None:
            old.close()
        return area

    def _forget_inflight(self) -> None:
        if self._inflight is not None:
            self._inflight.forget_all()

    def _map(self, effect: fx.MapMemory | fx.AddRegion | fx.RemoveRegion) -> None:
        memories = self.device.memory
        match effect:
            case fx.RemoveRegion(region):
                memories.remove(region.guest)
                self._drop(self._memories.pop(region.guest))
                del self._files[region.guest]
            case fx.AddRegion(region, descriptor):
                added = Memory.from_fd(descriptor, region.size, offset=region.offset)
                memories.add(region.guest, added)
                self._memories[region.guest] = added
                self._files[region.guest] = _file(descriptor, region)
            case fx.MapMemory(regions, descriptors):
                made: dict[int, Memory] = {}
                files = {region.guest: _file(descriptor, region) for region, descriptor in zip(regions, descriptors, strict=True)}
                if any(files.get(guest) != file for guest, file in self._files.items()):
                    for index in range(len(self.rings)):  # what is at their addresses may be other memory now (device-23)
                        self._take_off(index)
                try:
                    for region, descriptor in zip(regions, descriptors, strict=True):
                        made[region.guest] = Memory.from_fd(descriptor, region.size, offset=region.offset)
                    memories.replace([(address, memory, 0, memory.size) for address, memory in made.items()])
                except BaseException:
                    for memory in made.values():
                        memory.close()
                    raise
                old, self._memories, self._files = self._memories, made, files
                for memory in old.values():
                    self._drop(memory)
        if self._log.wanted:
            self.flush_log()
            self._log.start()  # it may have to reach further

    def _drop(self, memory: Memory) -> None:
        self._lingering.append(memory)
        left, self._lingering = self._lingering, []
        for each in left:
            try:
                each.close()
            except BufferError:  # a chain that is in flight; it closes with the next
                self._lingering.append(each)

    def _vring(self, effect: fx.Effect) -> Answer:
        match effect:
            case fx.SetVringNum(index, size):
                ring = self._stopped(index)
                ring.size = size
            case fx.SetVringBase(index, base):
                ring = self._stopped(index)
                if base != ring.base and self._inflight is not None:
                    self._inflight.forget(index)  # not the ring that stopped there
                ring.base = base
            case fx.SetVringAddr(index, areas, log):
                self._take_off(index)
                self.rings[index].areas, self.rings[index].log = areas, log
            case fx.SetVringEnable(index, enabled):
                self.rings[index].enabled = enabled
            case fx.StopVring(index):
                ring = self._stopped(index)
                ring.kick = _replaced(ring.kick, None)
                return ring.base
            case fx.BreakVring(index, error):
                self._take_off(index)
                ring = self.rings[index]
                ring.areas = None
                if ring.started:  # memory that a ring once lay in may go
                    self._break(ring, error)
            case fx.SetVringKick(index, descriptor):
                self._take_off(index)
                ring = self.rings[index]
                ring.kick = _replaced(ring.kick, EventFd() if descriptor is None else EventFd.from_fd(descriptor))
                ring.polled, ring.started = descriptor is None, True
                self.session.kicked(index)
            case fx.SetVringCall(index, descriptor):
                ring, old = self.rings[index], self.rings[index].call
                ring.call = None if descriptor is None else EventFd.from_fd(descriptor, stream=True)  # User-Mode Linux passes a socket
                for queue in (self.device.queue(index) if ring.on else None, ring.discarding):
                    if queue is not None and queue.broken is None:
                        queue.connect(ring.call)
                if ring.call is not None and (ring.on or ring.discarding):
                    ring.call.signal()  # what the old one was told may be lost
                _replaced(old, None)
            case fx.SetVringErr(index, descriptor):
                self._take_off(index)
                ring = self.rings[index]
                ring.error = _replaced(ring.error, None if descriptor is None else EventFd.from_fd(descriptor))
        return None

    def _stopped(self, index: int) -> Ring:
        self._take_off(index)
        ring = self.rings[index]
        ring.started = False
        return ring

    # Rings on and off the device.

    def _place(self, index: int) -> None:
        """Puts a ring where it belongs now."""
        ring = self.rings[index]
        ready = not self.closed and ring.started and ring.size > 0 and ring.areas is not None and self._features is not None
        on = ready and ring.enabled
        discarding = ready and not on and index in self.device.discarded
        if ring.on == on and (ring.discarding is not None) == discarding:
            return
        self._take_off(index)
        if not on and not discarding:
            return
        try:
            self._put_on(index, ring, on)
        except (VirtioError, ValueError) as error:
            ring.started = False
            self._break(ring, error)

    def _put_on(self, index: int, ring: Ring, on: bool) -> None:
        assert ring.areas is not None and ring.kick is not None and self._features is not None
        device = self.device
        if device.state is not DeviceState.DRIVER_OK:
            others = [other for other, each in enumerate(self.rings) if each.on or each.discarding]
            for other in others:
                self._take_off(other)
            assumed = {CTRL_VQ} if device.device_id == DeviceId.NETWORK else ()
            try:
                device.begin(self._features & device.offered, assumed=assumed)
            except FeatureNegotiationError as refused:
                raise MalformedMessage(str(refused), "SET_FEATURES") from None
            for other in others:
                self._place(other)
        base, inflight = self._base(ring), None
        if self._inflight is not None:
            inflight = self._inflight.region(index, ring.size, packed=bool(self._packed))
        if on:
            call, error = ring.call, ring.error
            device.setup_queue(index, ring.size, ring.areas, doorbell=ring.kick, interrupt=call, base=base, error=error, inflight=inflight)
            ring.on, self._busy = True, None
            if self._poll and (queue := device.queue(index)) is not None:
                queue.disarm()
            ring.kick.signal()  # what was published before is looked at, and who waits for the device wakes
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
        alive = self.device.state is not DeviceState.NEEDS_RESET
        wanted = ring.discarding is not None or (ring.on and alive and self.device.serves(index) and not self._poll)
        if wanted and ring.watched is None and ring.kick is not None:
            ring.watched = ring.kick.fileno()
            self._loop.watch(ring.watched, self.poll if ring.on else lambda: self._discard(ring))
        elif not wanted and ring.watched is not None:
            self._loop.unwatch(ring.watched)
            ring.watched = None

    def _look_again(self) -> None:
        """The device serves other queues: what came meanwhile is theirs too."""
        self._serving_changed.drain()
        self._busy = None
        for index, ring in enumerate(self.rings):
            self._watch(index, ring)
            if ring.on and ring.kick is not None:
                ring.kick.signal()

    def _base(self, ring: Ring) -> int:
        """Where the ring resumes. Some front-ends give packed rings no base at all, and a ring that no device wrote tells; some give only
        the available position, as if there were 16 bits, and nothing is then in flight."""
        assert ring.areas is not None and self._features is not None
        packed = Feature.RING_PACKED in self._features
        if packed and ring.base == START and self._inflight is None:  # QEMU says that of one, too, whose back-end vanished
            return packed_base([self.device.memory.load(ring.areas[0] + 16 * index + 14, 2) for index in range(ring.size)])
        if not packed or ring.base >> 16:
            return ring.base
        if ring.base == 0 and not self.device.memory.load(ring.areas[0] + 14, 2) >> 15:
            return START
        return ring.base << 16 | ring.base

    def _take_off(self, index: int) -> None:
        ring = self.rings[index]
        if ring.watched is not None:
            self._loop.unwatch(ring.watched)
            ring.watched = None
        if ring.on:
            ring.on, self._busy = False, None
            with suppress(StatusError):  # the device was reset behind our back
                ring.base = self.device.stop_queue(index)
        if ring.discarding is not None:
            ring.base = ring.discarding.base
            ring.discarding.close()
            ring.discarding = None

    def _break(self, ring: Ring, error: Exception) -> None:
        self._loop.report(error)
        if ring.error is not None:
            with suppress(OSError):
                ring.error.signal()

    # Serving.

    def _heard(self) -> bool:
        """Whether rings are to be served: not before what has come is carried out, since that may stop one, or be the end."""
        if self._unread:
            self.receive()
        return not self.closed and not self._unread

    def poll(self) -> int:
        """Serves the device's queues; how many handler calls that took. Whatever a handler raises ends the connection."""
        return self._serve(self.device.poll)

    def spin(self, seconds: float) -> int:
        """As `poll`, for one that never sleeps: over and over for so many seconds, `SPIN` at most, and once at least."""
        if not self._poll:
            return self.poll()
        until = monotonic() + min(seconds, SPIN)

        def serve() -> int:
            spin, calls = self.device.spin, 0
            while True:
                calls += spin()
                if self.closed or monotonic() >= until:
                    return calls

        return self._serve(serve)

    def _serve(self, serve: Callable[[], int]) -> int:
        if not self._heard():
            return 0
        try:
            calls = serve()
        except SpecViolation as error:
            self._loop.report(error)
            calls = 1
        except Exception as error:
            self._loop.report(error)
            self.close()
            return 0
        if self.device.state is DeviceState.NEEDS_RESET:  # kicks are for nobody until the front-end begins anew
            self._busy = None
            for index, ring in enumerate(self.rings):
                self._watch(index, ring)
        return calls

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
        except VirtioError as error:
            ring.started = False
            self._break(ring, error)
            self._take_off(self.rings.index(ring))

    # The channel and the log.

    def _set_channel(self, descriptor: int) -> None:
        copy = os.dup(descriptor)
        try:
            channel = Link(socket.socket(fileno=copy))
        except OSError:  # no socket
            os.close(copy)
            raise
        if self._channel is not None:
            self._channel.close()
        self._channel = channel

    def _tell_config(self) -> None:
        self._config_changed.drain()
        if self._channel is not None and ProtocolFeature.CONFIG in self.session.protocol:
            try:
                self._channel.send(Send(wire.encode(wire.BackendRequest.CONFIG_CHANGE_MSG)))
            except TransportError as error:
                self._loop.report(error)
                self._channel.close()
                self._channel = None

    def flush_log(self) -> None:
        """Carries the marks of what was written over to the front-end's log."""
        packed, used = bool(self._packed), []
        for ring in self.rings:
            if ring.areas is not None and ring.log not in {None, ring.areas[2]}:
                used.append((ring.areas[2], area_lengths(ring.size, packed)[2], ring.log))
        self._log.flush(used)

    def close(self) -> None:
        """Resets the device and takes all from it; closes everything that is the connection's. Again does nothing."""
        if self.closed:
            return
        self.closed = True
        self._loop.unwatch(self._link.fileno())
        self._loop.unwatch(self._config_changed.fileno())
        self._loop.unwatch(self._serving_changed.fileno())
        for effect in self.session.end():
            for descriptor in descriptors_of(effect):
                os.close(descriptor)
        with suppress(VirtioError):
            self.flush_log()
        self._reset()
        self.device.connect(None)
        self._log.close()
        self._state.close()
        self.device.memory.replace([])
        for memory in self._memories.values():
            self._drop(memory)
        for ring in self.rings:
            for event in (ring.kick, ring.call, ring.error):
                _replaced(event, None)
        self._config_changed.close()
        self._serving_changed.close()
        if self._inflight is not None:
            self._inflight.close()
        if self._channel is not None:
            self._channel.close()
        self._link.close()


def _file(descriptor: int, region: wire.Region) -> tuple[int, ...]:
    """What a region is: the same descriptor never comes twice, the same file does."""
    found = os.fstat(descriptor)
    return found.st_dev, found.st_ino, region.offset, region.size


def _replaced(old: EventFd | None, new: EventFd | None) -> EventFd | None:
    if old is not None:
        old.close()
    return new
