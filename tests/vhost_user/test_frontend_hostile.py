"""A front-end of ours whose back-end lies, is silent, or vanishes: a typed exception, and nothing is left open."""

import os
import socket
import time
from collections.abc import Callable, Iterator

import pytest

from tests.leftovers import all_closed
from tests.vhost_user.hostile import OFFERED, PROTOCOL, Answer, ByHand, reply
from tests.vhost_user.serving import PATIENCE, until
from virtio import DeviceId, FeatureNegotiationError, NetDriver, TransportError
from virtio.errors import DeviceNeedsReset, SpecViolation
from virtio.features import Features
from virtio.transport.vhost_user import VhostUserTransport
from virtio.vhost_user import message as wire
from virtio.vhost_user.message import BackendRequest, Message, ProtocolFeature
from virtio.vhost_user.message import FrontendRequest as F


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    with all_closed():
        yield


def opened(far: ByHand, timeout: float = PATIENCE) -> VhostUserTransport:
    return VhostUserTransport(far.near.detach(), DeviceId.NETWORK, timeout=timeout)


def session(far: ByHand, timeout: float = PATIENCE) -> int:
    """All that a driver asks for, from the first message to the last; how many bytes it was told until it was to be closed."""
    with opened(far, timeout) as transport, NetDriver(transport) as net:
        assert net.mac == bytes((2, 0, 0, 0, 0, 1))
        net.check()
        net.restart()
        return far.sent


def test_with_one_that_does_not_lie_all_is_well() -> None:
    with ByHand() as far:
        session(far)
        assert far.seen.count(F.SET_VRING_KICK) == 4


def test_messages_come_in_qemus_order() -> None:
    with ByHand() as far, opened(far) as transport, NetDriver(transport):
        assert [F(each).name for each in far.seen if each not in (F.SET_STATUS, F.GET_STATUS, F.GET_CONFIG)] == [
            *("GET_FEATURES", "GET_PROTOCOL_FEATURES", "SET_PROTOCOL_FEATURES", "GET_QUEUE_NUM", "GET_MAX_MEM_SLOTS"),
            *("SET_BACKEND_REQ_FD", "SET_OWNER", "GET_FEATURES", "RESET_DEVICE", "SET_FEATURES", "ADD_MEM_REG", "GET_INFLIGHT_FD"),
            "SET_INFLIGHT_FD",
            *["SET_VRING_NUM", "SET_VRING_BASE", "SET_VRING_ADDR", "SET_VRING_ERR", "SET_VRING_CALL", "SET_VRING_ENABLE", "SET_VRING_KICK"]
            * 2,
        ]


def test_without_protocol_features_rings_are_not_enabled_by_message() -> None:
    with ByHand(offered=Features({32})) as far, opened(far) as transport:
        with NetDriver(transport) as net:
            assert net.features == {32}
            assert [F(each).name for each in far.seen] == [
                *("GET_FEATURES", "SET_OWNER", "GET_FEATURES", "SET_FEATURES", "SET_MEM_TABLE"),
                *["SET_VRING_NUM", "SET_VRING_BASE", "SET_VRING_ADDR", "SET_VRING_ERR", "SET_VRING_CALL", "SET_VRING_KICK"] * 2,
                "GET_FEATURES",  # whose answer tells that the others have arrived
            ]
        assert far.seen[-2:] == [F.GET_VRING_BASE, F.GET_VRING_BASE]


LIES: dict[str, tuple[F, Callable[[Message], Answer]]] = {
    "a reply that is short": (F.GET_FEATURES, lambda m: reply(m.request, wire.Opaque(b"\0" * 7))),
    "a reply that is long": (F.GET_PROTOCOL_FEATURES, lambda m: reply(m.request, wire.Opaque(b"\0" * 9))),
    "another's reply": (F.GET_QUEUE_NUM, lambda m: reply(F.GET_FEATURES, wire.U64(1))),
    "a reply that is none": (F.GET_QUEUE_NUM, lambda m: wire.encode(m.request, wire.U64(1))),
    "no queues": (F.GET_QUEUE_NUM, lambda m: reply(m.request, wire.U64(0))),
    "too many queues": (F.GET_QUEUE_NUM, lambda m: reply(m.request, wire.U64(1 << 63))),
    "no memory": (F.GET_MAX_MEM_SLOTS, lambda m: reply(m.request, wire.U64(0))),
    "a version that there is not": (F.GET_FEATURES, lambda m: bytes((1, 0, 0, 0, 6, 0, 0, 0, 8, 0, 0, 0)) + bytes(8)),
    "a payload of 4 GiB": (F.GET_FEATURES, lambda m: bytes((1, 0, 0, 0, 5, 0, 0, 0)) + b"\xff" * 4),
    "two replies": (F.SET_OWNER, lambda m: reply(m.request, wire.U64(0)) * 2),
    "descriptors with a reply that has none": (F.SET_FEATURES, lambda m: (reply(m.request, wire.U64(1)), 8)),
    "a refusal": (F.SET_VRING_ADDR, lambda m: reply(m.request, wire.U64(1))),
    "a refusal of the memory": (F.ADD_MEM_REG, lambda m: reply(m.request, wire.U64(22))),
    "a status of 64 bits": (F.GET_STATUS, lambda m: reply(m.request, wire.U64(1 << 40))),
    "a status that never ends": (F.GET_STATUS, lambda m: reply(m.request, wire.U64(0xFF))),
    "another configuration": (F.GET_CONFIG, lambda m: reply(m.request, wire.Config(1, 6, 0, bytes(6)))),
    "no configuration": (F.GET_CONFIG, lambda m: reply(m.request, wire.Config(0, 6, 0))),
    "a long configuration": (F.GET_CONFIG, lambda m: reply(m.request, wire.Config(0, 4000, 0, bytes(4000)))),
    "another vring": (F.GET_VRING_BASE, lambda m: reply(m.request, wire.VringState(7, 0))),
    "no area": (F.GET_INFLIGHT_FD, lambda m: reply(m.request, wire.Inflight(4096, 0, 2, 256))),
    "two areas of which one is short": (F.GET_INFLIGHT_FD, lambda m: (reply(m.request, wire.Opaque(b"\0" * 3)), 2)),
    "a hang-up": (F.SET_VRING_CALL, lambda m: None),
}


@pytest.mark.parametrize(("request_", "lie"), LIES.values(), ids=LIES)
def test_a_lie_is_a_typed_exception(request_: F, lie: Callable[[Message], Answer]) -> None:
    with ByHand({request_: lie}) as far, pytest.raises((TransportError, SpecViolation, FeatureNegotiationError)):
        session(far)


HARMLESS: dict[str, tuple[F, Callable[[Message], Answer]]] = {
    "descriptors nobody asked for": (F.GET_FEATURES, lambda m: (reply(m.request, wire.U64(1 << 32 | 1 << 30 | 1 << 5)), 8)),
    "more areas than one": (F.GET_INFLIGHT_FD, lambda m: (reply(m.request, wire.Inflight(4096, 0, 2, 256)), 5)),
    "no tracking": (F.GET_INFLIGHT_FD, lambda m: (reply(m.request, wire.Inflight(0, 0, 0, 0)), 1)),
}


@pytest.mark.parametrize(("request_", "odd"), HARMLESS.values(), ids=HARMLESS)
def test_what_is_odd_and_does_no_harm(request_: F, odd: Callable[[Message], Answer]) -> None:
    with ByHand({request_: odd}) as far:
        session(far)


@pytest.mark.parametrize("request_", [F.GET_FEATURES, F.SET_OWNER, F.GET_CONFIG, F.SET_VRING_NUM, F.GET_STATUS])
def test_silence_has_a_time_limit(request_: F) -> None:
    with ByHand({request_: lambda m: b""}) as far, pytest.raises(TransportError, match=rf"does not answer {request_.name} within 0\.2 s"):
        session(far, 0.2)


def test_one_that_answers_just_in_time_has_no_more_time_for_all_of_it() -> None:
    """Greeting and hand-over are a few dozen requests: each answer alone is in time."""
    late: dict[int, Callable[[Message], Answer]] = {}

    def answer(message: Message) -> Answer:
        time.sleep(0.3)
        return reply(message.request, wire.U64(int(OFFERED) if message.request == F.GET_FEATURES else 0))

    for request in (F.GET_FEATURES, F.SET_OWNER, F.SET_VRING_NUM, F.SET_VRING_BASE, F.SET_VRING_ADDR, F.SET_VRING_CALL):
        late[request] = answer
    with ByHand(late) as far, pytest.raises(TransportError, match=r"within 0\.8 s, with all that it was asked at once"):
        session(far, 0.8)
    for request in (F.GET_FEATURES, F.SET_OWNER):  # greeted in time, it holds up the hand-over
        del late[request]
    with ByHand(late) as far, pytest.raises(TransportError, match=r"does not answer \w+ within 0\.8 s, with all"):
        session(far, 0.8)


def test_protocol_features_that_nobody_knows_are_the_callers_mistake() -> None:
    with ByHand() as far, pytest.raises(ValueError, match=r"protocol features \[40\] are not among those that it knows, \[0, 3, 5"):
        VhostUserTransport(far.near.fileno(), DeviceId.NETWORK, protocol_features=PROTOCOL | {40})
    assert far.seen == []


def test_half_a_reply_is_no_reply() -> None:
    half: dict[int, Callable[[Message], Answer]] = {F.GET_FEATURES: lambda m: reply(m.request, wire.U64(0))[:15]}
    with ByHand(half) as far, pytest.raises(TransportError, match="does not answer GET_FEATURES"):
        session(far, 0.2)


def test_it_may_vanish_after_any_byte() -> None:
    with ByHand() as far:
        length = session(far)
    cuts = sorted({*range(140), *range(140, length, 37), length - 1})
    for cut in cuts:
        with ByHand(budget=cut + 1) as far, pytest.raises(TransportError):
            session(far)


def test_a_hang_up_in_the_middle_of_everything_is_noticed() -> None:
    with ByHand() as far, opened(far) as transport:
        net = NetDriver(transport)
        far.end()
        with pytest.raises(TransportError, match="gone"):
            while net.wait(PATIENCE):
                pass
        assert transport.gone
        with pytest.raises(TransportError, match="gone"):
            net.close()


def test_a_reply_that_nobody_asked_for_ends_the_connection() -> None:
    with ByHand() as far, opened(far) as transport:
        net = NetDriver(transport)
        far.say(reply(F.GET_STATUS, wire.U64(0)))
        with pytest.raises(TransportError, match="where nothing is awaited"):
            net.check()
        with pytest.raises(TransportError, match="gone"):
            net.close()


def test_a_reply_that_nobody_asked_for_is_noticed_while_nobody_asks() -> None:
    with ByHand() as far, opened(far) as transport:
        net = NetDriver(transport)
        far.say(reply(F.GET_STATUS, wire.U64(0)))
        with pytest.raises(TransportError, match="where nothing is awaited"):
            while net.wait(PATIENCE):
                pass
        assert transport.gone
        with pytest.raises(TransportError, match="gone"):
            net.close()


def test_a_broken_ring_is_noticed() -> None:
    with ByHand() as far, opened(far) as transport, NetDriver(transport) as net:
        os.eventfd_write(far.events[0], 1)
        with pytest.raises(DeviceNeedsReset):
            while net.wait(PATIENCE):
                pass
        net.restart()
        net.check()


def test_requests_over_the_channel() -> None:
    with ByHand() as far, opened(far) as transport, NetDriver(transport) as net:
        until(lambda: far.channel is not None)
        assert far.channel is not None
        far.channel.settimeout(PATIENCE)
        before = transport.config_generation
        far.channel.sendall(wire.encode(BackendRequest.CONFIG_CHANGE_MSG, need_reply=True))
        assert far.channel.recv(100) == reply(BackendRequest.CONFIG_CHANGE_MSG, wire.U64(0))
        assert transport.config_generation == before + 1
        assert net.wait(PATIENCE)
        with socket.socket() as one:  # whatever else it may ask, descriptors and all
            socket.send_fds(far.channel, [wire.encode(3, wire.VringArea(0, 0, 0), need_reply=True)], [one.fileno()] * 8)
        assert far.channel.recv(100) == reply(3, wire.U64(1))
        far.channel.sendall(b"\xff" * 12)
        assert far.channel.recv(100) == b""  # that channel is over, and the device goes on
        net.check()
        net.restart()


def test_a_back_end_that_waits_for_an_answer_over_its_channel_gets_it() -> None:
    def ask_first(message: Message) -> Answer:
        assert far.channel is not None
        far.channel.settimeout(PATIENCE)
        far.channel.sendall(wire.encode(BackendRequest.CONFIG_CHANGE_MSG, need_reply=True))
        assert far.channel.recv(100)
        return reply(message.request, wire.U64(0))

    with ByHand({F.SET_FEATURES: ask_first, F.SET_OWNER: ask_first}) as far:
        session(far)


def test_the_hidden_bit_without_features_behind_it() -> None:
    with ByHand(protocol=Features()) as far:
        session_of = opened(far)
        assert session_of.frontend.protocol == Features() and not session_of.has_config
        session_of.close()
    few = PROTOCOL - {ProtocolFeature.REPLY_ACK, ProtocolFeature.STATUS}
    with ByHand(protocol=few) as far:
        session(far)
