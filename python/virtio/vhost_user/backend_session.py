"""The back-end's end of a connection, without I/O: bytes and descriptors in, effects and replies out.

    for step in session.feed(data, descriptors):
        answer = carry_out(step.effects)            # raises what it cannot do
        send(*step.done(answer))                    # or step.failed()

A refusal changes nothing. It is told to the front-end where the protocol has words for it; where it has none and the front-end would go on
with a wrong idea, the connection ends (`Disconnect`). Every descriptor that comes in is in exactly one effect.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from virtio.errors import FeatureNegotiationError, MalformedMessage
from virtio.features import Features, Requires, check_accepted
from virtio.spec import MAX_QUEUE_SIZE, Feature
from virtio.vhost_user import effects as fx
from virtio.vhost_user import message as wire
from virtio.vhost_user.message import FRONTEND_RULES, FrontendRequest, Message, ProtocolFeature, Region
from virtio.vhost_user.regions import area_lengths, check_region, translate

SUPPORTED: Final = Features(
    {
        *(ProtocolFeature.MQ, ProtocolFeature.LOG_SHMFD, ProtocolFeature.RARP, ProtocolFeature.REPLY_ACK, ProtocolFeature.MTU),
        *(ProtocolFeature.BACKEND_REQ, ProtocolFeature.CONFIG, ProtocolFeature.BACKEND_SEND_FD, ProtocolFeature.INFLIGHT_SHMFD),
        *(ProtocolFeature.RESET_DEVICE, ProtocolFeature.CONFIGURE_MEM_SLOTS, ProtocolFeature.STATUS, ProtocolFeature.DEVICE_STATE),
        ProtocolFeature.GET_VRING_BASE_INFLIGHT,
    }
)
"""Protocol features that a session can offer."""
SLOTS: Final = 32
"""Most memory regions by default, with CONFIGURE_MEM_SLOTS."""

_F = FrontendRequest
_QUIET: Final = frozenset({_F.SEND_RARP, _F.SET_LOG_FD, _F.RESET_OWNER})
"""Requests whose refusal leaves no wrong idea behind."""


@dataclass
class Ring:
    """What is known of a ring. It is processed while started, without side effects unless enabled too."""

    size: int = 0
    base: int = 0
    user: wire.VringAddr | None = None
    areas: tuple[int, int, int] | None = None
    started: bool = False
    enabled: bool = False

    @property
    def running(self) -> bool:
        """Whether it is frozen. One that is disabled is not: Linux's own front-end never stops a ring, it disables it and begins anew."""
        return self.started and self.enabled


class Send(NamedTuple):
    """Bytes, and the descriptors that go with the first of them."""

    data: bytes = b""
    descriptors: tuple[int, ...] = ()


Answer = int | bytes | tuple[wire.Inflight, int] | None


@dataclass
class Step:
    """One message's effects, and its reply once they were carried out."""

    effects: tuple[fx.Effect, ...]
    _reply: Callable[[Answer], Send] = field(default=lambda _: Send())
    _failure: Callable[[], Send | None] = field(default=lambda: None)

    def done(self, answer: Answer = None) -> Send:
        """The reply, perhaps nothing. `answer` is what the effect asked for: a number, configuration bytes, or an area and a descriptor.

        ValueError: an effect that wants an answer got none, or one that does not fit.
        """
        return self._reply(answer)

    def failed(self) -> Send | None:
        """What to send if the effects could not be carried out; None: nothing can tell that, close the connection."""
        return self._failure()


class BackendSession:
    """The state of one connection.

    `features` is what the device offers; those that 64 bits cannot carry are left out, and ACCESS_PLATFORM, whose IOTLB is not there.
    `file_size(descriptor)` tells the size of a file (as `os.fstat` does; an OSError refuses the message). `assumed` are features whose
    owner is the front-end (device-04). `queue_count` answers GET_QUEUE_NUM, where network devices tell pairs: by default `queues`.
    """

    def __init__(
        self,
        features: Features,
        queues: int,
        *,
        file_size: Callable[[int], int],
        protocol_features: Iterable[int] = SUPPORTED,
        max_queue_size: int = MAX_QUEUE_SIZE,
        max_slots: int = SLOTS,
        rules: tuple[Requires, ...] = (),
        assumed: Iterable[int] = (),
        queue_count: int | None = None,
    ) -> None:
        """ValueError: not 1 to 256 queues, or a protocol feature that is not in `SUPPORTED`."""
        if not 1 <= queues <= wire.VRING_INDEX_MASK + 1:
            raise ValueError(f"{queues} queues, not 1 to {wire.VRING_INDEX_MASK + 1}")
        self.offered_protocol = Features(protocol_features)
        if foreign := self.offered_protocol - SUPPORTED:
            raise ValueError(f"protocol features {foreign} are not supported")
        own = [wire.PROTOCOL_FEATURES_BIT] + [wire.LOG_ALL_BIT] * (ProtocolFeature.LOG_SHMFD in self.offered_protocol)
        self.offered = Features.from_mask(int(features) & (1 << 64) - 1) - [Feature.ACCESS_PLATFORM] | own
        self.rings = [Ring() for _ in range(queues)]
        self.regions: tuple[Region, ...] = ()
        self._again: dict[Region, int] = {}
        """How often a region was added once more: QEMU 7.2 adds and removes each for every queue pair."""
        self.accepted: Features | None = None
        self.protocol = Features()
        self.log: wire.Log | None = None
        self.closed: MalformedMessage | None = None
        self._file_size, self._max_size, self._max_slots = file_size, max_queue_size, max_slots
        self._rules, self._assumed = rules, Features(assumed)
        self._queue_count = queues if queue_count is None else queue_count
        self._decoder = wire.Decoder()

    @property
    def needed(self) -> int:
        """How many bytes to read at most, so that descriptors stay with their message."""
        return self._decoder.needed

    def feed(self, data: bytes, descriptors: Iterable[int] = ()) -> list[Step]:
        """Takes what was read: a step for each message that is complete. Reading `needed` bytes at most gives one at most."""
        if self.closed:
            return [Step((fx.CloseDescriptors(closed),))] if (closed := tuple(descriptors)) else []
        steps = []
        for message in self._decoder.feed(data, descriptors):
            steps.append(self._handle(message) if not self.closed else Step(_closing(message.descriptors)))
        if self._decoder.broken and not self.closed:
            steps.append(self._end(self._decoder.broken))
        if self._decoder.discarded:
            steps.append(Step(_closing(tuple(self._decoder.discarded))))
            self._decoder.discarded.clear()
        return steps

    def end(self) -> tuple[fx.Effect, ...]:
        """The connection is gone: what is left to close."""
        self._decoder.close()
        left = tuple(self._decoder.discarded)
        self._decoder.discarded.clear()
        self.closed = self.closed or MalformedMessage("the connection ended", "vhost-user")
        return _closing(left)

    def kicked(self, index: int) -> None:
        """A kick arrived (or the ring is polled): it is started, also if it is not enabled yet."""
        self.rings[index].started = True

    def _end(self, error: MalformedMessage, *effects: fx.Effect) -> Step:
        self.closed = error
        return Step((*effects, fx.Disconnect(error)))

    def _handle(self, message: Message) -> Step:
        rule = FRONTEND_RULES.get(message.request)
        ack = message.need_reply and ProtocolFeature.REPLY_ACK in self.protocol
        kept = message.descriptors[: rule.descriptors if rule else 0]
        extra = _closing(message.descriptors[len(kept) :])
        before = self.regions
        try:
            if message.reply:
                raise MalformedMessage(f"request {message.request} has the reply flag", "vhost-user header")
            if rule is None:
                raise MalformedMessage(f"request {message.request} is unknown", "front-end message types")
            handler = _HANDLERS.get(rule.request)
            negotiated = self.offered_protocol if rule.request == _F.GET_QUEUE_NUM else self.protocol
            if handler is None or (rule.feature is not None and rule.feature not in negotiated):
                raise MalformedMessage(f"{rule.request.name} was not negotiated", rule.request.name)
            try:
                payload = rule.payload.unpack(message.body)
            except ValueError as error:
                raise MalformedMessage(str(error), rule.request.name) from None
            effects = handler(self, FrontendRequest(message.request), payload, kept)
        except (MalformedMessage, OSError, FeatureNegotiationError) as error:
            name = rule.request.name if rule else "front-end message types"
            told = error if isinstance(error, MalformedMessage) else MalformedMessage(str(error), name)
            refusal = (*extra, *_closing(kept), fx.Refused(told))
            if rule and rule.reply is wire.Config and rule.feature in self.protocol:  # no data is how the text spells an error
                sent = Send(wire.encode(message.request, wire.Config(0, 0), reply=True))
                return Step(refusal, lambda _: sent, lambda: sent)
            if rule and rule.reply is wire.Inflight and rule.feature in self.protocol:
                return Step(refusal, lambda _: _no_area(message), lambda: _no_area(message))
            if ack and not (rule and rule.reply):
                return self._acknowledged(message.request, refusal, 1)
            unknown = rule is None or rule.request in _QUIET or rule.request not in _HANDLERS or rule.feature not in {None, *self.protocol}
            if unknown and not message.reply:
                return self._acknowledged(message.request, refusal, 1) if ack else Step(refusal)
            return self._end(told, *refusal)
        ack = ack or (message.need_reply and ProtocolFeature.REPLY_ACK in self.protocol)  # this very message may have negotiated it
        known = {descriptor for effect in effects for descriptor in descriptors_of(effect)}
        done = (*extra, *_closing(tuple(each for each in kept if each not in known)), *effects)
        if rule.reply is None:
            return self._acknowledged(message.request, done, 0, before) if ack else Step(done, _failure=lambda: self._undo(before))
        return Step(done, lambda answer: self._reply(message, answer), lambda: self._failure(message, rule))

    def _acknowledged(self, request: int, effects: tuple[fx.Effect, ...], value: int, before: tuple[Region, ...] | None = None) -> Step:
        def failed() -> Send:
            if before is not None:
                self._undo(before)
            return Send(wire.encode(request, wire.U64(1), reply=True))

        return Step(effects, lambda _: Send(wire.encode(request, wire.U64(value), reply=True)), failed)

    def _undo(self, before: tuple[Region, ...]) -> None:
        self.regions = before
        self._placed()  # none of the effects were carried out: the rings lie where they lay

    def _failure(self, message: Message, rule: wire.Rule) -> Send | None:
        if rule.reply is wire.Config:
            return Send(wire.encode(message.request, wire.Config(0, 0), reply=True))
        if rule.reply is wire.Inflight:
            return _no_area(message)
        if rule.request in {_F.SET_DEVICE_STATE_FD, _F.CHECK_DEVICE_STATE}:
            return Send(wire.encode(message.request, wire.U64(wire.VRING_NO_DESCRIPTOR | 1), reply=True))
        return None

    def _reply(self, message: Message, answer: Answer) -> Send:
        request, body, descriptors = message.request, message.body, ()
        payload: wire.Payload
        match request, answer:
            case _F.SET_LOG_BASE, _:
                payload = wire.Opaque()
            case _F.SET_DEVICE_STATE_FD, _:
                payload = wire.U64(wire.VRING_NO_DESCRIPTOR)
            case _F.GET_VRING_BASE, int(base):
                payload = wire.VringState(wire.VringState.unpack(body).index, base)
            case _F.GET_CONFIG, bytes(data):
                asked = wire.Config.unpack(body)
                payload = wire.Config(asked.offset, asked.size, asked.flags, data)
            case _F.GET_INFLIGHT_FD, (wire.Inflight() as area, int(descriptor)):
                return _area(message, area, descriptor)
            case ((_F.GET_STATUS | _F.CHECK_DEVICE_STATE), int(value)):
                payload = wire.U64(value)
            case _F.GET_FEATURES, _:
                payload = wire.U64(int(self.offered))
            case _F.GET_PROTOCOL_FEATURES, _:
                payload = wire.U64(int(self.offered_protocol))
            case _F.GET_QUEUE_NUM, _:
                payload = wire.U64(self._queue_count)
            case _F.GET_MAX_MEM_SLOTS, _:
                payload = wire.U64(self._max_slots)
            case _:
                raise ValueError(f"{answer!r} does not answer {FrontendRequest(request).name}")
        return Send(wire.encode(request, payload, reply=True), descriptors)

    def _ring(self, request: FrontendRequest, index: int) -> Ring:
        if index >= len(self.rings):
            raise MalformedMessage(f"vring {index}, of {len(self.rings)}", request.name)
        return self.rings[index]

    def _areas(self, ring: Ring, regions: tuple[Region, ...], user: wire.VringAddr) -> tuple[int, int, int]:
        packed = self.accepted is not None and Feature.RING_PACKED in self.accepted
        lengths = area_lengths(max(ring.size, 1), packed)
        starts = (user.descriptor, user.available, user.used)
        first, second, third = (translate(regions, start, length) for start, length in zip(starts, lengths, strict=True))
        return first, second, third

    def _placed(self) -> tuple[fx.Effect, ...]:
        """Where each ring lies now, if that changed."""
        found: list[fx.Effect] = []
        for index, ring in enumerate(self.rings):
            if ring.user is None:
                continue
            try:
                areas = self._areas(ring, self.regions, ring.user)
            except MalformedMessage as error:
                if ring.areas is not None:
                    ring.areas = None
                    found.append(fx.BreakVring(index, error))
                continue
            if areas != ring.areas:
                ring.areas = areas
                found.append(fx.SetVringAddr(index, areas, ring.user.log if ring.user.flags & wire.VRING_LOG else None))
        return tuple(found)

    # Handlers: (request, payload, descriptors) -> effects. Each checks all before it changes anything.

    def _get(self, request: FrontendRequest, payload: wire.Payload, descriptors: tuple[int, ...]) -> tuple[fx.Effect, ...]:
        if request == _F.GET_STATUS:
            return (fx.GetStatus(),)
        if request == _F.CHECK_DEVICE_STATE:
            return (fx.CheckDeviceState(),)
        if isinstance(payload, wire.Config):
            return (fx.GetConfig(payload.offset, payload.size),)
        if isinstance(payload, wire.Inflight):
            if payload.queues > len(self.rings) or not 0 < payload.queue_size <= self._max_size:
                raise MalformedMessage(f"{payload.queues} queues of {payload.queue_size} entries", request.name)
            return (fx.GetInflight(payload),)
        return ()

    def _features(self, request: FrontendRequest, payload: wire.Payload, descriptors: tuple[int, ...]) -> tuple[fx.Effect, ...]:
        own = {wire.PROTOCOL_FEATURES_BIT, wire.LOG_ALL_BIT}
        accepted = Features.from_mask(payload.value)
        check_accepted(accepted, self.offered, self._rules, assumed=self._assumed)
        if self.accepted is not None and any(ring.running for ring in self.rings):
            changed = (accepted ^ self.accepted) - [wire.LOG_ALL_BIT]
            if changed:
                raise MalformedMessage(f"features {changed} changed while a ring runs; only LOG_ALL may", request.name)
        self.accepted = accepted
        found: list[fx.Effect] = [fx.SetFeatures(accepted - own, wire.LOG_ALL_BIT in accepted)]
        if wire.PROTOCOL_FEATURES_BIT not in accepted:
            for index, ring in enumerate(self.rings):
                if not ring.enabled:
                    ring.enabled = True
                    found.append(fx.SetVringEnable(index, True))
        return (*found, *self._placed())

    def _protocol(self, request: FrontendRequest, payload: wire.Payload, descriptors: tuple[int, ...]) -> tuple[fx.Effect, ...]:
        asked = payload.value
        if foreign := asked & ~int(self.offered_protocol):
            raise MalformedMessage(f"protocol features {foreign:#x} were not offered", request.name)
        features = Features.from_mask(asked, names=[ProtocolFeature])
        if ProtocolFeature.GET_VRING_BASE_INFLIGHT in features and ProtocolFeature.INFLIGHT_SHMFD not in features:
            raise MalformedMessage("GET_VRING_BASE_INFLIGHT without INFLIGHT_SHMFD", request.name)
        self.protocol = features
        return (fx.SetProtocolFeatures(features),)

    def _owner(self, request: FrontendRequest, payload: wire.Payload, descriptors: tuple[int, ...]) -> tuple[fx.Effect, ...]:
        return (fx.SetOwner(),) if request == _F.SET_OWNER else self._disabled()

    def _disabled(self) -> tuple[fx.Effect, ...]:
        found = tuple(fx.SetVringEnable(index, False) for index, ring in enumerate(self.rings) if ring.enabled)
        for ring in self.rings:
            ring.enabled = False
        return found

    def _memory(self, request: FrontendRequest, payload: wire.Payload, descriptors: tuple[int, ...]) -> tuple[fx.Effect, ...]:
        if isinstance(payload, wire.Regions):
            regions = payload.regions
            if len(descriptors) < len(regions):
                raise MalformedMessage(f"{len(regions)} regions with {len(descriptors)} descriptors", request.name)
            used = descriptors[: len(regions)]
            for number, (region, descriptor) in enumerate(zip(regions, used, strict=True)):
                check_region(region, self._file_size(descriptor), regions[:number])
            self.regions = regions
            self._again.clear()
            return (fx.MapMemory(regions, used), *self._placed())
        assert isinstance(payload, wire.SingleRegion)
        region = payload.region
        if request == _F.ADD_MEM_REG and region in self.regions:
            self._again[region] = self._again.get(region, 0) + 1
            return ()
        if request == _F.ADD_MEM_REG:
            if len(self.regions) >= self._max_slots or not descriptors:
                raise MalformedMessage(f"region {len(self.regions) + 1} of {self._max_slots}, {len(descriptors)} descriptors", request.name)
            check_region(region, self._file_size(descriptors[0]), self.regions)
            self.regions = (*self.regions, region)
            return (fx.AddRegion(region, descriptors[0]), *self._placed())
        same = [each for each in self.regions if (each.guest, each.user, each.size) == (region.guest, region.user, region.size)]
        if not same:
            raise MalformedMessage(f"no region of {region.size} bytes at guest {region.guest:#x}, user {region.user:#x}", request.name)
        if again := self._again.pop(same[0], 0):
            if again > 1:
                self._again[same[0]] = again - 1
            return ()
        self.regions = tuple(each for each in self.regions if each is not same[0])
        return (fx.RemoveRegion(same[0]), *self._placed())

    def _vring(self, request: FrontendRequest, payload: wire.Payload, descriptors: tuple[int, ...]) -> tuple[fx.Effect, ...]:
        ring = self._ring(request, payload.index)
        index = payload.index
        if isinstance(payload, wire.VringAddr):
            areas = self._areas(ring, self.regions, payload)
            log = payload.log if payload.flags & wire.VRING_LOG else None
            last = 0 if log is None else log + area_lengths(max(ring.size, 1), Feature.RING_PACKED in (self.accepted or ()))[2] - 1
            if self.log and last // wire.LOG_PAGE >= self.log.size * 8:
                raise MalformedMessage(f"log address {log:#x} beyond a log of {self.log.size} bytes", request.name)
            ring.user, ring.areas = payload, areas
            return (fx.SetVringAddr(index, areas, log),)
        num = payload.num
        if request == _F.GET_VRING_BASE:
            ring.started = False
            return (fx.StopVring(index, ProtocolFeature.GET_VRING_BASE_INFLIGHT in self.protocol),)
        if request == _F.SET_VRING_ENABLE:
            if num > 1:
                raise MalformedMessage(f"vring {index} enabled with {num}", request.name)
            ring.enabled = bool(num)
            return (fx.SetVringEnable(index, ring.enabled),)
        if ring.running:
            raise MalformedMessage(f"vring {index} is running", request.name)
        if request == _F.SET_VRING_BASE:
            ring.base, ring.started = num, False
            return (fx.SetVringBase(index, num),)
        packed = self.accepted is not None and Feature.RING_PACKED in self.accepted
        if not 0 < num <= self._max_size or (self.accepted is not None and not packed and num & num - 1):
            raise MalformedMessage(f"vring {index} of {num} entries, at most {self._max_size}, split ones a power of two", request.name)
        ring.size, ring.started = num, False
        return (fx.SetVringNum(index, num), *self._placed())

    def _descriptor(self, request: FrontendRequest, payload: wire.Payload, descriptors: tuple[int, ...]) -> tuple[fx.Effect, ...]:
        index = payload.value & wire.VRING_INDEX_MASK
        ring = self._ring(request, index)
        if payload.value >> 9:
            raise MalformedMessage(f"payload {payload.value:#x} has bits above 8", request.name)
        none = bool(payload.value & wire.VRING_NO_DESCRIPTOR)
        if not none and not descriptors:
            raise MalformedMessage(f"vring {index}: neither a descriptor nor the flag that says so", request.name)
        descriptor = None if none else descriptors[0]
        if request == _F.SET_VRING_KICK:
            ring.started = ring.started or none  # polled: there is no kick to wait for
            return (fx.SetVringKick(index, descriptor),)
        return (fx.SetVringCall(index, descriptor) if request == _F.SET_VRING_CALL else fx.SetVringErr(index, descriptor),)

    def _with_file(self, request: FrontendRequest, payload: wire.Payload, descriptors: tuple[int, ...]) -> tuple[fx.Effect, ...]:
        if request == _F.SET_LOG_FD:
            return (fx.SetLogFd(descriptors[0] if descriptors else None),)
        if not descriptors:
            raise MalformedMessage("no descriptor", request.name)
        file = descriptors[0]
        if request == _F.SET_BACKEND_REQ_FD:
            return (fx.SetBackendChannel(file),)
        if isinstance(payload, wire.DeviceStateTransfer):
            if payload.direction > 1 or payload.phase or any(ring.started for ring in self.rings):
                raise MalformedMessage(f"{payload!r}, or a ring runs", request.name)
            return (fx.TransferDeviceState(payload, file),)
        if payload.size + payload.offset > self._file_size(file) or not payload.size:
            raise MalformedMessage(f"{payload!r} in a file of {self._file_size(file)} bytes", request.name)
        if isinstance(payload, wire.Inflight):
            if payload.queues > len(self.rings) or not 0 < payload.queue_size <= self._max_size:
                raise MalformedMessage(f"{payload!r}", request.name)
            return (fx.SetInflight(payload, file),)
        assert isinstance(payload, wire.Log)
        end = max((region.guest + region.size for region in self.regions), default=0)
        if payload.size * 8 * wire.LOG_PAGE < end:
            raise MalformedMessage(f"a log of {payload.size} bytes does not reach guest address {end:#x}", request.name)
        self.log = payload
        return (fx.SetLogBase(payload, file),)

    def _device(self, request: FrontendRequest, payload: wire.Payload, descriptors: tuple[int, ...]) -> tuple[fx.Effect, ...]:
        if isinstance(payload, wire.Config):
            if payload.flags > 1 or len(payload.data) != payload.size:
                raise MalformedMessage(f"{payload!r} with {len(payload.data)} bytes", request.name)
            return (fx.SetConfig(payload, bool(payload.flags)),)
        if request == _F.RESET_DEVICE:
            for ring in self.rings:
                ring.started = False
            return (*self._disabled(), fx.ResetDevice())
        if request == _F.SEND_RARP:
            return (fx.SendRarp(payload.pack()[:6]),)
        limit = 0xFF if request == _F.SET_STATUS else 0xFFFF
        if payload.value > limit:
            raise MalformedMessage(f"{payload.value:#x} is above {limit:#x}", request.name)
        if request == _F.SET_STATUS and not payload.value:  # a reset (2.4.1)
            for ring in self.rings:
                ring.started = False
        return (fx.SetStatus(payload.value) if request == _F.SET_STATUS else fx.SetMtu(payload.value),)


def _area(message: Message, area: wire.Inflight, *descriptors: int) -> Send:
    padding = bytes(max(0, len(message.body) - len(area.pack())))  # as long as what was asked: some send the C structure
    return Send(wire.encode(message.request, wire.Opaque(area.pack() + padding), reply=True), descriptors)


def _no_area(message: Message) -> Send:
    """An area of no bytes: nothing will be tracked."""
    return _area(message, wire.Inflight(0, 0, 0, 0))


def _closing(descriptors: tuple[int, ...]) -> tuple[fx.Effect, ...]:
    return (fx.CloseDescriptors(descriptors),) if descriptors else ()


def descriptors_of(effect: fx.Effect) -> tuple[int, ...]:
    """The descriptors that an effect hands over."""
    if isinstance(effect, fx.MapMemory | fx.CloseDescriptors):
        return effect.descriptors
    descriptor = getattr(effect, "descriptor", None)
    return () if descriptor is None else (descriptor,)


_S = BackendSession
_Handler = Callable[[BackendSession, FrontendRequest, wire.Payload, tuple[int, ...]], tuple[fx.Effect, ...]]
_HANDLERS: Final[dict[FrontendRequest | wire.BackendRequest, _Handler]] = {
    **dict.fromkeys((_F.GET_FEATURES, _F.GET_PROTOCOL_FEATURES, _F.GET_QUEUE_NUM, _F.GET_MAX_MEM_SLOTS, _F.GET_STATUS), _S._get),
    **dict.fromkeys((_F.GET_CONFIG, _F.GET_INFLIGHT_FD, _F.CHECK_DEVICE_STATE), _S._get),
    _F.SET_FEATURES: _S._features,
    _F.SET_PROTOCOL_FEATURES: _S._protocol,
    **dict.fromkeys((_F.SET_OWNER, _F.RESET_OWNER), _S._owner),
    **dict.fromkeys((_F.SET_MEM_TABLE, _F.ADD_MEM_REG, _F.REM_MEM_REG), _S._memory),
    **dict.fromkeys((_F.SET_VRING_NUM, _F.SET_VRING_ADDR, _F.SET_VRING_BASE, _F.GET_VRING_BASE, _F.SET_VRING_ENABLE), _S._vring),
    **dict.fromkeys((_F.SET_VRING_KICK, _F.SET_VRING_CALL, _F.SET_VRING_ERR), _S._descriptor),
    **dict.fromkeys((_F.SET_LOG_BASE, _F.SET_LOG_FD, _F.SET_BACKEND_REQ_FD, _F.SET_INFLIGHT_FD, _F.SET_DEVICE_STATE_FD), _S._with_file),
    **dict.fromkeys((_F.SET_CONFIG, _F.RESET_DEVICE, _F.SEND_RARP, _F.NET_SET_MTU, _F.SET_STATUS), _S._device),
}
