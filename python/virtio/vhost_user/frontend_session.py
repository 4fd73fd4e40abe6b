"""The front-end's end of a connection, without I/O: requests out, replies in, and the requests of the back-end over a channel of its own.

Replies come in the order of the requests. One that does not fit ends the connection, as the text has it; every descriptor that comes in is
in a `Reply` or in `CloseDescriptors`.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from virtio.errors import MalformedMessage
from virtio.features import Features
from virtio.vhost_user import effects as fx
from virtio.vhost_user import message as wire
from virtio.vhost_user.backend_session import Send, Step
from virtio.vhost_user.message import BACKEND_RULES, FRONTEND_RULES, BackendRequest, FrontendRequest, Message, ProtocolFeature


@dataclass(frozen=True, slots=True)
class Reply(fx.Effect):
    """What the back-end answered. `refused` says that it is an acknowledgement that is not 0."""

    request: FrontendRequest
    payload: wire.Payload
    descriptors: tuple[int, ...] = ()
    refused: bool = False


@dataclass(frozen=True, slots=True)
class ConfigChanged(fx.Effect):
    """The device's configuration changed."""


class _Pending(NamedTuple):
    request: FrontendRequest
    asked: wire.Payload
    rule: wire.Rule
    acknowledged: bool


class FrontendSession:
    """The state of one connection. `protocol` are the protocol features accepted last, `offered_protocol` those to choose from."""

    def __init__(self) -> None:
        self.offered: Features | None = None
        self.offered_protocol: Features | None = None
        self.protocol = Features()
        self.closed: MalformedMessage | None = None
        self._pending: deque[_Pending] = deque()
        self._decoder = wire.Decoder()
        self._channel = wire.Decoder()

    @property
    def needed(self) -> int:
        """How many bytes to read from the connection at most."""
        return self._decoder.needed

    @property
    def channel_needed(self) -> int:
        """How many bytes to read from the back-end's channel at most."""
        return self._channel.needed

    @property
    def awaited(self) -> int:
        """How many replies are to come."""
        return len(self._pending)

    def request(
        self, request: FrontendRequest, payload: wire.Payload | None = None, descriptors: Iterable[int] = (), *, acknowledge: bool = True
    ) -> Send:
        """A request's bytes. With REPLY_ACK it asks to be acknowledged, unless it has a reply of its own.

        ValueError: a payload or descriptors that it does not have, or a protocol feature that was not accepted.
        """
        rule, payload, descriptors = FRONTEND_RULES[request], payload or wire.Empty(), tuple(descriptors)
        if type(payload) is not rule.payload and not (rule.payload is wire.Opaque and isinstance(payload, wire.Empty)):
            raise ValueError(f"{request.name} carries {rule.payload.__name__}, not {payload!r}")
        if len(descriptors) > rule.descriptors:
            raise ValueError(f"{request.name} carries at most {rule.descriptors} descriptors, not {len(descriptors)}")
        if rule.feature is not None and rule.feature not in self.protocol:
            raise ValueError(f"{request.name} needs the protocol feature {rule.feature.name}")
        ack = acknowledge and rule.reply is None and ProtocolFeature.REPLY_ACK in self.protocol
        if request == FrontendRequest.SET_PROTOCOL_FEATURES:
            if self.offered_protocol is None or payload.value & ~int(self.offered_protocol):
                raise ValueError(f"protocol features {payload.value:#x} are not all offered")
            self.protocol = Features.from_mask(payload.value, names=[ProtocolFeature])
        if ack or rule.reply:
            self._pending.append(_Pending(request, payload, rule, ack))
        return Send(wire.encode(request, payload, need_reply=ack), descriptors)

    def feed(self, data: bytes, descriptors: Iterable[int] = ()) -> list[fx.Effect]:
        """Takes what was read from the connection: replies, and what is to be closed."""
        found: list[fx.Effect] = []
        for message in self._decoder.feed(data, descriptors):
            try:
                if self.closed:
                    raise self.closed
                found += self._match(message)
            except MalformedMessage as error:
                found += _closing(message.descriptors)
                self._end(error, found)
        if self._decoder.broken:
            self._end(self._decoder.broken, found)
        return found + _drained(self._decoder)

    def feed_channel(self, data: bytes, descriptors: Iterable[int] = ()) -> list[Step]:
        """Takes what was read from the back-end's channel: a step for each request."""
        steps: list[Step] = []
        for message in self._channel.feed(data, descriptors):
            rule = BACKEND_RULES.get(message.request)
            known = rule is not None and rule.request == BackendRequest.CONFIG_CHANGE_MSG and rule.feature in self.protocol
            if known and not message.body and not message.reply:
                effects: tuple[fx.Effect, ...] = (ConfigChanged(),)
            else:
                name = rule.request.name if rule else "back-end message types"
                effects = (fx.Refused(MalformedMessage(f"request {message.request} of the back-end is not served", name)),)
            value = int(not isinstance(effects[0], ConfigChanged))
            sent = [Send(wire.encode(message.request, wire.U64(each), reply=True)) for each in (value, 1)]
            if not message.need_reply or message.reply or ProtocolFeature.REPLY_ACK not in self.protocol:
                sent = [Send(), Send()]
            steps.append(Step((*_closing(message.descriptors), *effects), lambda _, s=sent[0]: s, lambda s=sent[1]: s))  # type: ignore[misc]
        if self._channel.broken:
            steps.append(Step((fx.Disconnect(self._channel.broken),)))
        if left := _drained(self._channel):
            steps.append(Step(tuple(left)))
        return steps

    def end(self) -> list[fx.Effect]:
        """The connection is gone: what is left to close. Requests without a reply stay counted in `awaited`."""
        self.closed = self.closed or MalformedMessage("the connection ended", "vhost-user")
        self._decoder.close()
        self._channel.close()
        return _drained(self._decoder) + _drained(self._channel)

    def _end(self, error: MalformedMessage, found: list[fx.Effect]) -> None:
        if not self.closed:
            self.closed = error
            found.append(fx.Disconnect(error))

    def _match(self, message: Message) -> list[fx.Effect]:
        if not message.reply or not self._pending or self._pending[0].request != message.request:
            awaited = self._pending[0].request.name if self._pending else "nothing"
            raise MalformedMessage(f"message {message.request} (reply: {message.reply}) where {awaited} is awaited", "Communication")
        request, asked, rule, acknowledged = self._pending[0]
        kind = wire.U64 if acknowledged or rule.reply is None else rule.reply
        try:
            payload = kind.unpack(message.body)
        except ValueError as error:
            raise MalformedMessage(str(error), request.name) from None
        kept = message.descriptors[: rule.reply_descriptors]
        if isinstance(payload, wire.Config) and payload.data and (payload.offset, payload.size) != (asked.offset, asked.size):
            raise MalformedMessage(f"{payload!r} answers {asked!r}", request.name)
        if isinstance(payload, wire.VringState) and payload.index != asked.index:
            raise MalformedMessage(f"{payload!r} answers {asked!r}", request.name)
        if isinstance(payload, wire.Inflight) and payload.size and not kept:
            raise MalformedMessage("no descriptor with the in-flight area", request.name)
        if request == FrontendRequest.SET_DEVICE_STATE_FD and bool(kept) == bool(payload.value & wire.VRING_NO_DESCRIPTOR):
            raise MalformedMessage(f"{payload!r} with {len(kept)} descriptors", request.name)
        self._pending.popleft()
        if request == FrontendRequest.GET_FEATURES:
            self.offered = Features.from_mask(payload.value)
        elif request == FrontendRequest.GET_PROTOCOL_FEATURES:
            self.offered_protocol = Features.from_mask(payload.value, names=[ProtocolFeature])
        refused = acknowledged and payload.value != 0
        return [Reply(request, payload, kept, refused), *_closing(message.descriptors[len(kept) :])]


def _closing(descriptors: tuple[int, ...]) -> list[fx.Effect]:
    return [fx.CloseDescriptors(descriptors)] if descriptors else []


def _drained(decoder: wire.Decoder) -> list[fx.Effect]:
    left = tuple(decoder.discarded)
    decoder.discarded.clear()
    return _closing(left)
