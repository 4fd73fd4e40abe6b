"""The front-end's session, first against our back-end's, then against one that answers nonsense."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtio.features import Features
from virtio.spec import Feature
from virtio.vhost_user import effects as fx
from virtio.vhost_user import message as wire
from virtio.vhost_user.backend_session import BackendSession, Send
from virtio.vhost_user.frontend_session import ConfigChanged, FrontendSession, Reply
from virtio.vhost_user.message import BackendRequest, ProtocolFeature
from virtio.vhost_user.message import FrontendRequest as F


def negotiated(features: set[ProtocolFeature]) -> tuple[FrontendSession, BackendSession]:
    front, back = FrontendSession(), BackendSession(Features({Feature.VERSION_1}), 2, file_size=lambda descriptor: 1 << 20)
    for request in (F.GET_FEATURES, F.GET_PROTOCOL_FEATURES):
        exchange(front, back, front.request(request))
    exchange(front, back, front.request(F.SET_PROTOCOL_FEATURES, wire.U64(int(Features(features)))))
    return front, back


def exchange(front: FrontendSession, back: BackendSession, sent: Send) -> list[fx.Effect]:
    [step] = back.feed(*sent)
    return front.feed(*step.done())


def test_both_ends_understand_each_other() -> None:
    front, back = negotiated({ProtocolFeature.REPLY_ACK, ProtocolFeature.MQ})
    assert front.offered is not None and Feature.VERSION_1 in front.offered and front.protocol == back.protocol
    assert exchange(front, back, front.request(F.GET_QUEUE_NUM)) == [Reply(F.GET_QUEUE_NUM, wire.U64(2))]
    [reply] = exchange(front, back, front.request(F.SET_VRING_ENABLE, wire.VringState(1, 1)))
    assert isinstance(reply, Reply) and not reply.refused and back.rings[1].enabled
    [reply] = exchange(front, back, front.request(F.SET_VRING_NUM, wire.VringState(9, 256)))
    assert isinstance(reply, Reply) and reply.refused and front.awaited == 0


def test_requests_that_were_not_negotiated_are_the_callers_mistake() -> None:
    front, _ = negotiated(set())
    for request, payload, descriptors in (
        (F.GET_STATUS, None, ()),
        (F.SET_FEATURES, wire.Empty(), ()),
        (F.SET_FEATURES, wire.U64(0), (3,)),
        (F.SET_PROTOCOL_FEATURES, wire.U64(1 << 40), ()),
    ):
        with pytest.raises(ValueError, match=request.name if request != F.SET_PROTOCOL_FEATURES else "not all offered"):
            front.request(request, payload, descriptors)
    assert front.awaited == 0


def test_a_wrong_reply_ends_the_connection() -> None:
    for data in (wire.encode(2, wire.U64(0), reply=True), wire.encode(1, wire.U64(0)), wire.encode(1, reply=True)):
        front = FrontendSession()
        front.request(F.GET_FEATURES)
        effects = front.feed(data, (7,))
        assert effects[0] == fx.CloseDescriptors((7,)) and isinstance(effects[1], fx.Disconnect)


def test_requests_of_the_back_end_are_acknowledged() -> None:
    front, _ = negotiated({ProtocolFeature.REPLY_ACK, ProtocolFeature.CONFIG})
    [step] = front.feed_channel(wire.encode(BackendRequest.CONFIG_CHANGE_MSG, need_reply=True))
    assert step.effects == (ConfigChanged(),) and step.done().data == wire.encode(2, wire.U64(0), reply=True)
    [step] = front.feed_channel(wire.encode(99, need_reply=True), (5,))
    assert step.effects[0] == fx.CloseDescriptors((5,)) and step.done().data == wire.encode(99, wire.U64(1), reply=True)


@given(st.lists(st.tuples(st.integers(0, 45), st.binary(max_size=24), st.integers(0, 10), st.booleans()), max_size=8), st.booleans())
def test_no_descriptor_from_a_back_end_is_lost(replies: list[tuple[int, bytes, int, bool]], flag: bool) -> None:
    front, _ = negotiated({ProtocolFeature.REPLY_ACK, ProtocolFeature.INFLIGHT_SHMFD, ProtocolFeature.DEVICE_STATE})
    front.request(F.GET_INFLIGHT_FD, wire.Inflight(0, 0, 1, 256))
    front.request(F.SET_DEVICE_STATE_FD, wire.DeviceStateTransfer(0, 0), (3,))
    seen: list[int] = []
    number = 100
    for request, body, count, reply in replies:
        fresh = range(number, number + count)
        number += count
        data = wire.encode(request, wire.Opaque(body), reply=reply, need_reply=flag)
        effects = front.feed(data, fresh) if reply else [each for step in front.feed_channel(data, fresh) for each in step.effects]
        for effect in effects:
            seen += getattr(effect, "descriptors", ())
    for effect in front.end():
        seen += getattr(effect, "descriptors", ())
    assert sorted(seen) == list(range(100, number))
