"""Feature sets, the rules between features, and the two ends' use of them (2.2, 6)."""

import copy
import pickle
import re
from enum import Enum, IntEnum
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtio import _core, spec
from virtio.errors import FeatureNegotiationError, VirtioError
from virtio.features import Features, Requires, broken_rules, check_accepted, select
from virtio.spec import Feature


class Net(IntEnum):
    """Some bits of the network device (5.1.3): enough for every kind of rule."""

    CSUM = 0
    GUEST_CSUM = 1
    GUEST_TSO4 = 7
    GUEST_TSO6 = 8
    GUEST_ECN = 9
    CTRL_VQ = 17
    CTRL_RX = 18
    HASH_TUNNEL = 51
    GUEST_USO4 = 54
    GUEST_USO6 = 55
    HASH_REPORT = 57
    RSS = 60
    GUEST_UDP_TUNNEL_GSO = 65
    GUEST_UDP_TUNNEL_GSO_CSUM = 66


RULES = (
    Requires(Net.GUEST_TSO4, Net.GUEST_CSUM, section="5.1.3.1"),
    Requires(Net.GUEST_TSO6, Net.GUEST_CSUM, section="5.1.3.1"),
    Requires(Net.GUEST_ECN, (Net.GUEST_TSO4, Net.GUEST_TSO6), section="5.1.3.1"),
    Requires(Net.CTRL_RX, Net.CTRL_VQ, section="5.1.3.1"),
    Requires(Net.HASH_TUNNEL, Net.CTRL_VQ, (Net.RSS, Net.HASH_REPORT), section="5.1.3.1"),
    Requires(Net.GUEST_USO4, Net.GUEST_CSUM, section="5.1.3.1"),
    Requires(Net.GUEST_USO6, Net.GUEST_CSUM, section="5.1.3.1"),
    Requires(Net.GUEST_UDP_TUNNEL_GSO, Net.GUEST_TSO4, Net.GUEST_TSO6, Net.GUEST_USO4, Net.GUEST_USO6, section="5.1.3.1"),
    Requires(Net.GUEST_UDP_TUNNEL_GSO_CSUM, Net.GUEST_UDP_TUNNEL_GSO, section="5.1.3.1"),
)

RUST_PREFIXES: dict[str, type[Enum]] = {
    "DESC_F_": spec.DescriptorFlag,
    "AVAIL_F_": spec.AvailFlag,
    "USED_F_": spec.UsedFlag,
    "EVENT_FLAGS_": spec.RingEvent,
    "F_": Feature,
}

bits = st.integers(0, 127)
bit_sets = st.frozensets(bits)
net_sets = st.frozensets(st.sampled_from(Net)).map(Features)


@given(bit_sets, bit_sets)
def test_features_behave_as_frozensets_of_bit_numbers(left: frozenset[int], right: frozenset[int]) -> None:
    ours, theirs = Features(left), Features(right)
    assert list(ours) == sorted(left)
    assert (ours == theirs) == (left == right) == (ours == right)
    assert ours & theirs == left & right == ours & right == left & theirs
    assert ours | theirs == left | right == ours | right == left | theirs
    assert ours - theirs == left - right == ours - right == left - theirs
    assert ours ^ theirs == left ^ right == ours ^ right == left ^ theirs
    assert (ours <= theirs) == (left <= right) and ours.isdisjoint(theirs) == left.isdisjoint(right)
    assert hash(ours) == hash(left) and len(ours) == len(left) and bool(ours) == bool(left)
    assert all((bit in ours) == (bit in left) for bit in range(-1, 130))


@given(bit_sets)
def test_masks_and_words_come_back_as_the_same_set(numbers: frozenset[int]) -> None:
    features = Features(numbers)
    assert int(features) == sum(1 << bit for bit in numbers)
    assert Features.from_mask(int(features)) == Features.from_words(features.words) == features
    assert all(word < 1 << 32 for word in features.words) and len(features.words) == 4
    assert features.words[3] == int(features) >> 96
    assert pickle.loads(pickle.dumps(features)) == copy.deepcopy(features) == features


@given(net_sets, bit_sets)
def test_names_survive_operations_and_unknown_bits_are_numbers(net: Features, numbers: frozenset[int]) -> None:
    joined = net | numbers
    assert all(type(bit) is Net for bit in net & joined)
    for bit in joined:
        named = bit in net or bit in Feature._value2member_map_
        assert isinstance(bit, IntEnum) or not named
    assert repr(pickle.loads(pickle.dumps(joined))) == repr(joined)


def test_bits_are_named_by_number_where_no_enumeration_knows_them() -> None:
    features = Features.from_mask(1 << 34 | 1 << 7 | 1 << 44)
    assert repr(features) == "Features(7, RING_PACKED, 44)"
    assert str(features.named(Net)) == "GUEST_TSO4 (bit 7), RING_PACKED (bit 34), bit 44"
    assert str(Features()) == "none" and repr(Features()) == "Features()"
    assert Features(Net) >= {0, 66}


def test_a_set_is_immutable() -> None:
    features = Features({Feature.VERSION_1})
    with pytest.raises(AttributeError, match="immutable"):
        features._mask = 0
    assert features == {32}


@pytest.mark.parametrize("bit", [-1, 128, 1 << 40])
def test_a_bit_outside_the_128_is_refused_with_its_number(bit: int) -> None:
    with pytest.raises(ValueError, match=rf"{bit} is outside 0\.\.127"):
        Features([bit])
    with pytest.raises(ValueError, match=str(bit)):
        Features() | [bit]


def test_masks_and_words_out_of_range_are_refused() -> None:
    for mask in (-1, 1 << 128):
        with pytest.raises(ValueError, match="feature mask"):
            Features.from_mask(mask)
    with pytest.raises(ValueError, match="feature word 1 is 0x100000000"):
        Features.from_words([0, 1 << 32])
    with pytest.raises(ValueError, match="more than 4"):
        Features.from_words([0, 0, 0, 0, 0])
    with pytest.raises(ValueError, match="at least one"):
        Requires(Net.CTRL_RX, section="5.1.3.1")
    with pytest.raises(ValueError, match="each alternative"):
        Requires(Net.CTRL_RX, (), section="5.1.3.1")


@given(net_sets)
def test_rules_are_all_and_any(features: Features) -> None:
    has = features.__contains__
    broken = {rule.feature for rule in broken_rules(features, RULES)}
    assert (Net.GUEST_ECN in broken) == (has(9) and not (has(7) or has(8)))
    assert (Net.HASH_TUNNEL in broken) == (has(51) and not (has(17) and (has(60) or has(57))))
    assert (Net.GUEST_UDP_TUNNEL_GSO in broken) == (has(65) and not (has(7) and has(8) and has(54) and has(55)))
    assert "GUEST_ECN requires GUEST_TSO4 or GUEST_TSO6 (5.1.3.1)" in repr(RULES[2])


@given(net_sets, net_sets, net_sets)
def test_what_a_driver_selects_is_the_largest_set_that_the_device_accepts(offered: Features, wanted: Features, more: Features) -> None:
    accepted = select(offered, wanted=wanted, rules=RULES)
    check_accepted(accepted, offered, RULES)
    assert accepted <= offered & wanted
    legal = offered & wanted & more
    if not broken_rules(legal, RULES):
        assert legal <= accepted


@given(net_sets, net_sets, net_sets)
def test_required_bits_are_accepted_or_the_refusal_names_exactly_those_missing(
    offered: Features, required: Features, wanted: Features
) -> None:
    most = select(offered, wanted=required | wanted, rules=RULES)
    if required <= most:
        assert select(offered, required=required, wanted=wanted, rules=RULES) == most
        return
    with pytest.raises(FeatureNegotiationError) as refused:
        select(offered, required=required, wanted=wanted, rules=RULES)
    assert refused.value.offered == offered and refused.value.missing == required - most
    message = str(refused.value)
    assert [int(number) for number in re.findall(r"(?:^|; )\w+ \(bit (\d+)\)", message)] == sorted(required - most)


def test_a_refusal_says_why() -> None:
    offered = Features({Net.GUEST_CSUM, Net.GUEST_TSO4, Net.GUEST_ECN, Net.CTRL_RX, Feature.RING_PACKED})

    def refusal(required: set[Net | Feature], carried: set[int] | None = None) -> str:
        with pytest.raises(FeatureNegotiationError) as refused:
            select(offered, required=required, rules=RULES, carried=carried)
        return str(refused.value)

    assert refusal({Feature.VERSION_1}) == "VERSION_1 (bit 32) is not offered by the device"
    assert refusal({Feature.RING_PACKED}, carried=set()) == "RING_PACKED (bit 34) is offered, but this transport does not carry it"
    assert refusal({Net.CTRL_RX}) == "CTRL_RX (bit 18) needs CTRL_VQ (bit 17), not offered by the device (5.1.3.1)"
    assert refusal({Net.GUEST_TSO4}) == "GUEST_TSO4 (bit 7) needs GUEST_CSUM (bit 1), which nobody asked for (5.1.3.1)"
    assert refusal({Net.GUEST_TSO4, Net.GUEST_ECN}) == (
        "GUEST_TSO4 (bit 7) needs GUEST_CSUM (bit 1), which nobody asked for (5.1.3.1); "
        "GUEST_ECN (bit 9) needs GUEST_TSO4 (bit 7) or GUEST_TSO6 (bit 8), left out for its own needs (5.1.3.1)"
    )


@given(net_sets, net_sets, net_sets)
def test_a_device_accepts_exactly_a_subset_that_keeps_the_rules(offered: Features, accepted: Features, assumed: Features) -> None:
    present = accepted | assumed
    unkept = {rule.feature for rule in broken_rules(present, RULES)} & accepted
    if accepted <= offered and not unkept:
        check_accepted(accepted, offered, RULES, assumed=assumed)
    else:
        with pytest.raises(FeatureNegotiationError) as refused:
            check_accepted(accepted, offered, RULES, assumed=assumed)
        assert refused.value.missing == (accepted - offered) | unkept


def test_a_devices_refusal_names_the_bit_and_the_reason() -> None:
    offered = Features({Net.CTRL_RX, Net.CTRL_VQ})
    with pytest.raises(VirtioError, match=r"^CSUM \(bit 0\) was accepted but not offered$"):
        check_accepted(Features({Net.CSUM}), offered)
    with pytest.raises(VirtioError, match=r"^CTRL_RX \(bit 18\) needs CTRL_VQ \(bit 17\), not accepted \(5\.1\.3\.1\)$"):
        check_accepted(Features({Net.CTRL_RX}), offered, RULES)
    check_accepted(Features({Net.CTRL_RX}), offered, RULES, assumed={Net.CTRL_VQ})


def test_errors_survive_pickling() -> None:
    error = FeatureNegotiationError("no", Features({1}), Features({2}))
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.offered, again.missing) == ("no", {1}, {2})


def test_rust_and_python_agree_on_every_number_of_the_rings() -> None:
    source = (Path(__file__).parents[1] / "rust/ring/src/spec.rs").read_text()
    python: dict[str, int] = {"MAX_SIZE": spec.MAX_QUEUE_SIZE, "DESCRIPTOR_SIZE": spec.DESCRIPTOR_SIZE}
    for prefix, names in RUST_PREFIXES.items():
        python |= {prefix + name: value.value for name, value in names.__members__.items()}
    constants = re.findall(r"^pub const (\w+): \w+ = (\d+)(?: << (\d+))?;", source, flags=re.MULTILINE)
    rust = {name: int(value) << int(shift or 0) for name, value, shift in constants}
    assert len(rust) == source.count("pub const ") > 12
    rust.pop("MAX_CHAIN")  # a choice, not a number of the specification
    assert rust == {name: python[name] for name in rust}


@pytest.mark.parametrize("size", [1, 2, 256, 32768])
def test_rust_lays_a_ring_out_as_the_numbers_say(size: int) -> None:
    event = 2  # used_event, avail_event: there whether or not EVENT_IDX is negotiated (2.7)
    split = (
        spec.DESCRIPTOR_SIZE * size,
        spec.RING_HEADER_SIZE + 2 * size + event,
        spec.RING_HEADER_SIZE + spec.USED_ELEMENT_SIZE * size + event,
    )
    assert _core.layout(size) == tuple(zip(split, spec.SPLIT_ALIGNMENT, strict=True))
    packed = (spec.DESCRIPTOR_SIZE * size, spec.EVENT_SUPPRESSION_SIZE, spec.EVENT_SUPPRESSION_SIZE)
    assert _core.layout(size, features=Features({Feature.RING_PACKED})) == tuple(zip(packed, spec.PACKED_ALIGNMENT, strict=True))
