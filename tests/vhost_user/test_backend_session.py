"""The back-end's session, driven by messages that a front-end should and should not send."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtio.features import Features
from virtio.spec import Feature
from virtio.vhost_user import effects as fx
from virtio.vhost_user import message as wire
from virtio.vhost_user.backend_session import SUPPORTED, BackendSession, Step
from virtio.vhost_user.message import FRONTEND_RULES, ProtocolFeature, Region
from virtio.vhost_user.message import FrontendRequest as F
from virtio.vhost_user.regions import translate

FILE = 1 << 24
OFFERED = Features({Feature.VERSION_1, Feature.RING_PACKED, Feature.EVENT_IDX})
ACCEPTED = 1 << Feature.VERSION_1 | 1 << wire.PROTOCOL_FEATURES_BIT
GUEST, USER = 0x4000_0000, 0x7F00_0000_0000
MEMORY = Region(GUEST, 1 << 20, USER, 0)
RING = wire.VringAddr(0, 0, USER, USER + 0x3000, USER + 0x2000, 0)


class Peer:
    """A front-end by hand."""

    def __init__(self, protocol: int | None = int(SUPPORTED), features: Features = OFFERED) -> None:
        self.session = BackendSession(features, 2, file_size=lambda descriptor: FILE)
        if protocol is not None:
            self.send(F.SET_PROTOCOL_FEATURES, wire.U64(protocol))

    def send(self, request: int, payload: wire.Payload | None = None, fds: tuple[int, ...] = (), ack: bool = True) -> tuple[Any, ...]:
        """The effects; `reply` keeps the reply."""
        steps = self.session.feed(wire.encode(request, payload, need_reply=ack), fds)
        self.step: Step = steps[0]
        effects = tuple(effect for step in steps for effect in step.effects)
        asks = any(isinstance(effect, fx.StopVring | fx.GetConfig | fx.GetStatus | fx.GetInflight) for effect in effects)
        self.reply = b"" if asks else self.step.done(0 if request == F.CHECK_DEVICE_STATE else None).data
        return effects

    def refused(self, *args: Any, **kwargs: Any) -> str:
        effects = self.send(*args, **kwargs)
        errors = [effect for effect in effects if isinstance(effect, fx.Refused)]
        assert len(errors) == 1, effects
        return str(errors[0].error)

    @property
    def acknowledged(self) -> int:
        [message] = wire.Decoder().feed(self.reply)
        assert message.reply
        return wire.U64.unpack(message.body).value

    def running(self) -> "Peer":
        self.send(F.SET_FEATURES, wire.U64(ACCEPTED))
        self.send(F.SET_MEM_TABLE, wire.Regions([MEMORY]), (5,))
        self.send(F.SET_VRING_NUM, wire.VringState(0, 256))
        assert self.send(F.SET_VRING_ADDR, RING)[-1] == fx.SetVringAddr(0, (GUEST, GUEST + 0x2000, GUEST + 0x3000), None)
        self.send(F.SET_VRING_KICK, wire.U64(0), (6,))
        self.session.kicked(0)
        self.send(F.SET_VRING_ENABLE, wire.VringState(0, 1))
        return self


def test_device_23_regions_are_bounded_by_their_file_and_by_2_to_the_64() -> None:
    peer = Peer()
    for region in (
        Region(GUEST, 0, USER, 0),
        Region(2**64 - 4096, 8192, USER, 0),
        Region(GUEST, 8192, 2**64 - 4096, 0),
        Region(GUEST, 8192, USER, FILE - 4096),
        Region(GUEST, 8192, USER, 2**64 - 4096),
        Region(GUEST, FILE + 1, USER, 0),
    ):
        assert "memory regions" in peer.refused(F.SET_MEM_TABLE, wire.Regions([region]), (5,)) and peer.acknowledged == 1
        assert "memory regions" in peer.refused(F.ADD_MEM_REG, wire.SingleRegion(*region._fields), (5,)) and peer.acknowledged == 1
    assert peer.session.regions == ()


def test_device_23_overlapping_regions_are_refused() -> None:
    peer = Peer()
    assert "overlap" in peer.refused(F.SET_MEM_TABLE, wire.Regions([MEMORY, MEMORY]), (5, 6))


def test_a_region_may_be_added_once_more_and_goes_when_it_was_removed_as_often() -> None:
    """QEMU 7.2 adds each for every queue pair."""
    peer = Peer()
    region = wire.SingleRegion(GUEST, MEMORY.size, USER, 0)
    assert peer.send(F.ADD_MEM_REG, region, (5,)) == (fx.AddRegion(MEMORY, 5),)
    for number in range(2):
        assert peer.send(F.ADD_MEM_REG, region, (6 + number,)) == (fx.CloseDescriptors((6 + number,)),) and peer.acknowledged == 0
    assert "overlap" in peer.refused(F.ADD_MEM_REG, wire.SingleRegion(GUEST, MEMORY.size, USER, 4096), (9,))
    for _ in range(2):
        assert peer.send(F.REM_MEM_REG, region) == () and peer.acknowledged == 0 and peer.session.regions == (MEMORY,)
    assert peer.send(F.REM_MEM_REG, region) == (fx.RemoveRegion(MEMORY),) and peer.session.regions == ()
    assert "no region" in peer.refused(F.REM_MEM_REG, region)
    peer.send(F.ADD_MEM_REG, region, (5,))
    peer.send(F.ADD_MEM_REG, region, (6,))
    peer.send(F.SET_MEM_TABLE, wire.Regions([MEMORY]), (7,))
    assert peer.send(F.REM_MEM_REG, region) == (fx.RemoveRegion(MEMORY),)


def test_device_23_the_number_of_regions_is_bounded() -> None:
    peer = Peer()
    body = wire.Opaque((9).to_bytes(8, "little") + bytes(32 * 9))
    assert "9 regions" in peer.refused(F.SET_MEM_TABLE, body, (5,))
    for number in range(32):
        peer.send(F.ADD_MEM_REG, wire.SingleRegion(number << 20, 4096, number << 20, 0), (number + 10,))
        assert peer.acknowledged == 0
    assert "region 33" in peer.refused(F.ADD_MEM_REG, wire.SingleRegion(99 << 20, 4096, 99 << 20, 0), (50,))


def test_device_23_a_vring_has_a_size_that_its_format_allows() -> None:
    peer = Peer()
    peer.send(F.SET_FEATURES, wire.U64(ACCEPTED))
    for size in (0, 100, 65536, 65536 + 256):
        assert f"{size} entries" in peer.refused(F.SET_VRING_NUM, wire.VringState(0, size))
    peer.send(F.SET_FEATURES, wire.U64(ACCEPTED | 1 << Feature.RING_PACKED))
    assert peer.send(F.SET_VRING_NUM, wire.VringState(0, 100)) == (fx.SetVringNum(0, 100),)


def test_device_23_logs_and_in_flight_areas_lie_in_their_files() -> None:
    peer = Peer()
    assert "file" in peer.refused(F.SET_INFLIGHT_FD, wire.Inflight(FILE, 1, 1, 256), (5,))
    assert "no descriptor" in peer.refused(F.SET_INFLIGHT_FD, wire.Inflight(4096, 0, 1, 256))
    assert peer.send(F.SET_INFLIGHT_FD, wire.Inflight(4096, 0, 1, 256), (5,)) == (fx.SetInflight(wire.Inflight(4096, 0, 1, 256), 5),)
    peer.send(F.SET_MEM_TABLE, wire.Regions([MEMORY]), (5,))
    enough = wire.Log((GUEST + MEMORY.size) // wire.LOG_PAGE // 8, 0)
    assert peer.send(F.SET_LOG_BASE, enough, (6,)) == (fx.SetLogBase(enough, 6),)
    assert "does not reach" in peer.refused(F.SET_LOG_BASE, wire.Log(16, 0), (7,))
    assert peer.session.closed is not None


@pytest.mark.parametrize("request_", [F.SET_VRING_KICK, F.SET_VRING_CALL, F.SET_VRING_ERR])
def test_device_23_a_vring_index_is_bounded(request_: F) -> None:
    peer = Peer()
    assert "vring 255, of 2" in peer.refused(request_, wire.U64(255), (5,)) and peer.acknowledged == 1
    assert "vring 2, of 2" in peer.refused(F.SET_VRING_ENABLE, wire.VringState(2, 1))
    assert peer.send(F.GET_VRING_BASE, wire.VringState(2**32 - 1, 0))[-1] == fx.Disconnect(peer.session.closed)  # type: ignore[arg-type]


def test_device_23_superfluous_descriptors_are_closed() -> None:
    peer = Peer()
    assert peer.send(F.SET_MEM_TABLE, wire.Regions([MEMORY]), (5, 6, 7))[0] == fx.CloseDescriptors((6, 7))
    assert peer.send(F.SET_VRING_CALL, wire.U64(wire.VRING_NO_DESCRIPTOR), (8,)) == (fx.CloseDescriptors((8,)), fx.SetVringCall(0, None))
    assert peer.send(F.REM_MEM_REG, wire.SingleRegion(*MEMORY._fields), (9,))[0] == fx.CloseDescriptors((9,))


def test_device_23_without_bit_30_rings_start_enabled() -> None:
    peer = Peer(protocol=None)
    effects = peer.send(F.SET_FEATURES, wire.U64(1 << Feature.VERSION_1))
    assert effects[1:] == (fx.SetVringEnable(0, True), fx.SetVringEnable(1, True))
    peer = Peer()
    peer.send(F.SET_FEATURES, wire.U64(ACCEPTED))
    assert not peer.session.rings[0].enabled


def test_device_23_a_kick_may_come_before_enable() -> None:
    peer = Peer()
    ring = peer.session.rings[0]
    peer.send(F.SET_VRING_KICK, wire.U64(0), (6,))
    peer.session.kicked(0)
    assert ring.started and not ring.enabled
    assert peer.send(F.SET_VRING_ENABLE, wire.VringState(0, 1)) == (fx.SetVringEnable(0, True),)
    assert ring.started and ring.enabled


def test_device_23_bit_8_means_poll() -> None:
    peer = Peer()
    assert peer.send(F.SET_VRING_KICK, wire.U64(1 | wire.VRING_NO_DESCRIPTOR)) == (fx.SetVringKick(1, None),)
    assert peer.session.rings[1].started
    assert "neither" in peer.refused(F.SET_VRING_KICK, wire.U64(0))


def test_device_23_an_unknown_request_is_refused_and_the_connection_goes_on() -> None:
    peer = Peer()
    assert "request 77 is unknown" in peer.refused(77, fds=(5,)) and peer.acknowledged == 1
    assert "request 77" in peer.refused(77, ack=False) and peer.reply == b""
    assert peer.session.closed is None
    without = Peer(protocol=0)
    assert "request 77" in without.refused(77) and without.reply == b""


def test_device_23_memory_changes_while_a_ring_runs() -> None:
    peer = Peer().running()
    moved = Region(0x8000_0000, 1 << 20, USER, 0)
    effects = peer.send(F.SET_MEM_TABLE, wire.Regions([moved]), (9,))
    assert effects[1] == fx.SetVringAddr(0, (0x8000_0000, 0x8000_2000, 0x8000_3000), None)
    assert peer.send(F.ADD_MEM_REG, wire.SingleRegion(0, 4096, 0, 0), (10,)) == (fx.AddRegion(Region(0, 4096, 0, 0), 10),)
    effects = peer.send(F.REM_MEM_REG, wire.SingleRegion(*moved._fields))
    assert isinstance(effects[1], fx.BreakVring) and effects[1].index == 0 and peer.session.closed is None
    assert isinstance(peer.send(F.SET_MEM_TABLE, wire.Regions([moved]), (11,))[1], fx.SetVringAddr)


def test_device_04_features_beyond_the_offer_are_refused() -> None:
    peer = Peer()
    assert "not offered" in peer.refused(F.SET_FEATURES, wire.U64(1 << 63)) and peer.acknowledged == 1
    assert peer.session.accepted is None
    silent = Peer()
    assert isinstance(silent.send(F.SET_FEATURES, wire.U64(1 << 63), ack=False)[-1], fx.Disconnect)


def test_device_04_only_log_all_changes_while_a_ring_runs() -> None:
    peer = Peer().running()
    log = ACCEPTED | 1 << wire.LOG_ALL_BIT
    assert peer.send(F.SET_FEATURES, wire.U64(log)) == (fx.SetFeatures(Features({Feature.VERSION_1}), True),)
    assert "while a ring runs" in peer.refused(F.SET_FEATURES, wire.U64(log | 1 << Feature.RING_PACKED))


def test_a_running_ring_is_frozen_until_it_is_stopped_or_disabled() -> None:
    peer = Peer().running()
    for request in (F.SET_VRING_NUM, F.SET_VRING_BASE):
        assert "vring 0 is running" in peer.refused(request, wire.VringState(0, 64))
    peer.send(F.SET_VRING_ENABLE, wire.VringState(0, 0))
    assert peer.send(F.SET_VRING_NUM, wire.VringState(0, 64))[0] == fx.SetVringNum(0, 64)
    assert not peer.session.rings[0].started


def test_the_message_that_negotiates_reply_ack_is_acknowledged_if_it_asks() -> None:
    peer = Peer(protocol=None)
    peer.send(F.SET_PROTOCOL_FEATURES, wire.U64(1 << ProtocolFeature.REPLY_ACK))
    assert peer.acknowledged == 0
    peer.send(F.SET_OWNER, ack=False)
    assert peer.reply == b""


def test_a_failed_map_is_acknowledged_as_such_and_forgotten() -> None:
    peer = Peer()
    peer.send(F.SET_MEM_TABLE, wire.Regions([MEMORY]), (5,))
    sent = peer.step.failed()
    assert sent is not None and sent.data[-8:] == (1).to_bytes(8, "little") and peer.session.regions == ()
    peer = Peer().running()
    peer.send(F.SET_MEM_TABLE, wire.Regions([Region(0, 1 << 20, USER, 0)]), (9,))
    peer.step.failed()
    assert peer.session.regions == (MEMORY,) and peer.session.rings[0].areas == (GUEST, GUEST + 0x2000, GUEST + 0x3000)


def test_replies_of_their_own_are_not_acknowledged_too() -> None:
    peer = Peer()
    peer.send(F.GET_FEATURES)
    assert peer.acknowledged == int(OFFERED) | 1 << wire.PROTOCOL_FEATURES_BIT | 1 << wire.LOG_ALL_BIT
    [stop] = peer.send(F.GET_VRING_BASE, wire.VringState(1, 0))
    assert stop == fx.StopVring(1, True)
    assert peer.step.done(77).data == wire.encode(F.GET_VRING_BASE, wire.VringState(1, 77), reply=True)
    with pytest.raises(ValueError, match="does not answer"):
        peer.step.done(None)


def test_a_configuration_that_cannot_be_read_is_answered_without_data() -> None:
    peer = Peer()
    assert peer.send(F.GET_CONFIG, wire.Config(4, 2, 0, bytes(2))) == (fx.GetConfig(4, 2),)
    assert peer.step.done(b"ab").data.endswith(b"ab")
    failed = peer.step.failed()
    assert failed is not None and wire.Config.unpack(failed.data[12:]).size == 0


def test_the_in_flight_area_is_answered_as_long_as_it_was_asked() -> None:
    peer = Peer()
    asked = wire.Opaque(wire.Inflight(0, 0, 2, 256).pack() + bytes(4))
    assert peer.send(F.GET_INFLIGHT_FD, asked) == (fx.GetInflight(wire.Inflight(0, 0, 2, 256)),)
    sent = peer.step.done((wire.Inflight(8192, 0, 2, 256), 9))
    assert len(sent.data) == 12 + 24 and sent.descriptors == (9,)


def test_translation_goes_on_in_a_region_that_follows_on_both_sides() -> None:
    table = [Region(0x1000, 0x1000, 0x9000, 0), Region(0x2000, 0x1000, 0xA000, 0)]
    assert translate(table, 0x9800, 0x1000) == 0x1800
    for user, length in ((0x9800, 0x1801), (0x8FFF, 2), (0xB000, 1)):
        with pytest.raises(Exception, match="memory table"):
            translate(table, user, length)


def descriptors_in(effects: tuple[fx.Effect, ...]) -> list[int]:
    found: list[int] = []
    for effect in effects:
        found += getattr(effect, "descriptors", ())
        if (one := getattr(effect, "descriptor", None)) is not None:
            found.append(one)
    return found


WORDS = st.one_of(st.sampled_from([0, 1, 2, 255, 256, 257, 4096, GUEST, USER, 1 << 20, ACCEPTED, int(SUPPORTED), 2**64 - 1]))
BODIES = st.one_of(
    st.binary(max_size=48),
    st.lists(WORDS, max_size=9).map(lambda words: b"".join(word.to_bytes(8, "little") for word in words)),
    st.lists(st.sampled_from([0, 1, 255, 256, 2**32 - 1]), max_size=4).map(lambda words: b"".join(w.to_bytes(4, "little") for w in words)),
    st.just(wire.Regions([MEMORY]).pack()),
    st.just(RING.pack()),
)
REQUESTS = st.one_of(st.sampled_from([*FRONTEND_RULES, 0, 45, 2**32 - 1]))


@given(st.lists(st.tuples(REQUESTS, BODIES, st.integers(0, 10), st.booleans(), st.integers(0, 60)), max_size=25), st.booleans())
def test_every_descriptor_is_in_exactly_one_effect(calls: list[tuple[int, bytes, int, bool, int]], negotiated: bool) -> None:
    session = Peer(protocol=int(SUPPORTED) if negotiated else None).session
    number, seen = 100, []
    for request, body, count, ack, cut in calls:
        fresh = range(number, number + count)
        number += count
        data = wire.encode(request, wire.Opaque(body), need_reply=ack)
        for part, fds in ((data[:cut], fresh), (data[cut:], ())) if cut else ((data, fresh),):
            for step in session.feed(part, fds):
                seen += descriptors_in(step.effects)
                step.failed()
    seen += descriptors_in(session.end())
    assert sorted(seen) == list(range(100, number))
    assert ProtocolFeature.MQ in session.offered_protocol
