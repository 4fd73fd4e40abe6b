"""The codec: every request there and back, arbitrary bytes, and the bounds of device-23."""

from contextlib import suppress

from hypothesis import given
from hypothesis import strategies as st

from virtio.vhost_user import message as wire
from virtio.vhost_user.message import (
    BACKEND_RULES,
    FRONTEND_RULES,
    BackendRequest,
    Decoder,
    FrontendRequest,
    Payload,
    Region,
    Regions,
    Rule,
)

WIDTHS = {"B": 8, "H": 16, "I": 32, "Q": 64}
RULES = [*FRONTEND_RULES.values(), *BACKEND_RULES.values()]


def payloads(kind: type[Payload]) -> st.SearchStrategy[Payload]:
    if kind is Regions:
        return st.lists(payloads(Region), max_size=8).map(Regions)  # type: ignore[arg-type]
    if kind is wire.Opaque:
        return st.binary(max_size=64).map(wire.Opaque)
    if kind is wire.Config:
        words = st.integers(0, 2**32 - 1)
        return st.builds(lambda offset, flags, data: wire.Config(offset, len(data), flags, data), words, words, st.binary(max_size=64))
    letters = [letter for letter in kind.LAYOUT.format.lstrip("=") if letter in WIDTHS]
    return st.tuples(*(st.integers(0, 2 ** WIDTHS[letter] - 1) for letter in letters)).map(lambda fields: kind(*fields))


@given(st.sampled_from(RULES).flatmap(lambda rule: st.tuples(st.just(rule), payloads(rule.payload))), st.booleans(), st.integers(1, 40))
def test_every_request_comes_back_as_it_went(case: tuple[Rule, Payload], flag: bool, step: int) -> None:
    rule, payload = case
    data = wire.encode(rule.request, payload, need_reply=flag)
    decoder = Decoder()
    found = [message for at in range(0, len(data), step) for message in decoder.feed(data[at : at + step])]
    assert len(found) == 1
    assert found[0].need_reply is flag and not found[0].reply
    assert rule.payload.unpack(found[0].body) == payload and found[0].request == rule.request


@given(st.lists(st.tuples(st.binary(max_size=80), st.integers(0, 10)), max_size=12))
def test_arbitrary_bytes_lose_no_descriptor(pieces: list[tuple[bytes, int]]) -> None:
    decoder, sent, number = Decoder(), [], 100
    seen: list[int] = []
    for data, count in pieces:
        fresh = list(range(number, number + count))
        number += count
        sent += fresh
        for message in decoder.feed(data, fresh):
            seen += message.descriptors
            for rules in (FRONTEND_RULES, BACKEND_RULES):
                if rule := rules.get(message.request):
                    with suppress(ValueError):
                        rule.payload.unpack(message.body)
    decoder.close()
    assert sorted(seen + decoder.discarded) == sent


def test_each_request_of_the_text_is_in_the_table() -> None:
    assert FRONTEND_RULES.keys() == {int(each) for each in FrontendRequest} == set(range(1, 45))
    assert BACKEND_RULES.keys() == {int(each) for each in BackendRequest} == set(range(1, 11))


def test_device_23_a_payload_of_4_gib_ends_the_stream() -> None:
    for size in (wire.MAX_BODY + 1, 2**32 - 1):
        decoder = Decoder()
        assert decoder.feed(wire.HEADER.pack(1, 1, size) + bytes(50), [7, 8]) == []
        assert decoder.broken is not None and str(size) in str(decoder.broken)
        assert decoder.discarded == [7, 8]
        assert decoder.feed(wire.encode(1), [9]) == [] and decoder.discarded == [7, 8, 9]


def test_device_23_another_version_ends_the_stream() -> None:
    decoder = Decoder()
    decoder.feed(wire.HEADER.pack(1, 2, 0))
    assert decoder.broken is not None and "version 2" in str(decoder.broken)


def test_device_23_the_ninth_descriptor_is_discarded() -> None:
    decoder = Decoder()
    [message] = decoder.feed(wire.encode(FrontendRequest.SET_MEM_TABLE, Regions()), range(10, 19))
    assert message.descriptors == tuple(range(10, 18)) and decoder.discarded == [18]


def test_needed_never_reads_into_the_next_message() -> None:
    stream = wire.encode(1) + wire.encode(2, wire.U64(5)) + wire.encode(3)
    decoder, found = Decoder(), []
    while stream:
        count = decoder.needed
        found += [message.request for message in decoder.feed(stream[:count])]
        stream = stream[count:]
    assert found == [1, 2, 3]
