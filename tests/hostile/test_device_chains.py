"""A hostile driver's tables and segments: what a chain may be made of (device-08, device-09)."""

import pytest

from tests.hostile.sides import BASE, BUFFERS, DEVICE_PATHS, INDIRECT, MEMORY, NEXT, PAYLOAD, WRITE, DeviceSide, DriverSide, features
from virtio import DriverQueue, Feature, Memory
from virtio.spec import DescriptorFlag

SIZE = 8
TABLE = BUFFERS + 0x1_0000
IN_TABLE_ONLY_WRITE_COUNTS = DescriptorFlag.AVAIL | DescriptorFlag.USED | INDIRECT | NEXT | 0x7F78
"""Every other bit of a packed table's flags is reserved and ignored (2.8.7)."""


@pytest.fixture(params=DEVICE_PATHS)
def path(request: pytest.FixtureRequest) -> str:
    """Token by token, in batches, in bursts, or filling writable buffers from bursts."""
    return str(request.param)


@pytest.fixture
def flags(path: str) -> int:
    """What makes a segment one that `path` carries."""
    return int(WRITE) if path == "fill" else 0


@pytest.fixture
def side(ring_format: str) -> DeviceSide:
    return DeviceSide(ring_format, Feature.INDIRECT_DESC, size=SIZE)


def bare(ring_format: str) -> DeviceSide:
    """INDIRECT_DESC was not negotiated."""
    return DeviceSide(ring_format, size=SIZE)


# device-08


@pytest.mark.parametrize("before", [0, 2])
def test_device_08_a_table_that_was_not_negotiated_breaks_the_queue(ring_format: str, path: str, flags: int, before: int) -> None:
    side = bare(ring_format)
    side.offer(*[side.buffer(path, number) for number in range(before)])
    length = side.ring.write_table(TABLE, [(BUFFERS, PAYLOAD, bool(flags))])
    side.offer_table(TABLE, length)
    if before:
        assert side.take(path) == before
    side.breaks(path)


def test_device_08_indirect_later_in_a_list_needs_negotiation_too(ring_format: str, path: str, flags: int) -> None:
    side = bare(ring_format)
    length = side.ring.write_table(TABLE, [(BUFFERS, PAYLOAD, bool(flags))])
    side.offer_list((BUFFERS, PAYLOAD, flags | NEXT), (TABLE, length, INDIRECT))
    side.breaks(path)


@pytest.mark.parametrize(
    "length", [0, 1, 8, 15, 17, 24, 31, 16 * SIZE + 1, 16 * SIZE + 16, 65536 * 16, 65536 * 16 + 16, 0xFFFF_FFF0, 0xFFFF_FFFF, 0x8000_0000]
)
def test_device_08_a_length_that_no_table_has_breaks_the_queue(side: DeviceSide, path: str, flags: int, length: int) -> None:
    side.ring.write_table(TABLE, [(BUFFERS, PAYLOAD, bool(flags))] * (SIZE + 1))
    side.offer_table(TABLE, length)
    error = side.breaks(path)
    assert str(length) in error.message or str(length // 16) in error.message


@pytest.mark.parametrize("entries", [1, SIZE - 1, SIZE])
def test_device_08_a_table_within_the_limits_is_legal(side: DeviceSide, path: str, flags: int, entries: int) -> None:
    length = side.ring.write_table(TABLE, [(BUFFERS + PAYLOAD * number, PAYLOAD, bool(flags)) for number in range(entries)])
    side.offer_table(TABLE, length)
    assert side.take(path) == 1 and side.queue.broken is None


@pytest.mark.parametrize("offset", [1, 2, 3, 4, 7, 8, 9, 15])
def test_device_08_a_table_needs_no_alignment(side: DeviceSide, path: str, flags: int, offset: int) -> None:
    side.memory.write(BUFFERS - BASE, bytes(range(64)))
    length = side.ring.write_table(TABLE + offset, [(BUFFERS + PAYLOAD * number, PAYLOAD, bool(flags)) for number in range(3)])
    side.offer_table(TABLE + offset, length)
    assert side.take(path) == 1
    if path == "token":
        assert side.chains[0].read() == bytes(range(48))


def test_device_08_write_on_the_descriptor_of_a_table_means_nothing(side: DeviceSide, path: str, flags: int) -> None:
    length = side.ring.write_table(TABLE, [(BUFFERS, PAYLOAD, bool(flags))])
    for write in (0, WRITE):
        side.offer_list((TABLE, length, INDIRECT | write), id=write)
        assert side.take(path) == 1
    length = side.ring.write_table(TABLE, [(BUFFERS, PAYLOAD, False), (BUFFERS, PAYLOAD, True)])
    side.offer_list((TABLE, length, INDIRECT | WRITE), id=9)
    (chain,) = side.queue.pop()
    assert (chain.readable, chain.writable) == (PAYLOAD, PAYLOAD)


def test_device_08_indirect_beside_next_breaks_the_queue(side: DeviceSide, path: str, flags: int) -> None:
    length = side.ring.write_table(TABLE, [(BUFFERS, PAYLOAD, bool(flags))])
    side.offer_list((TABLE, length, INDIRECT | NEXT), (BUFFERS, PAYLOAD, flags))
    side.breaks(path)


def test_device_08_split_direct_descriptors_may_come_before_a_table(path: str, flags: int) -> None:
    side = DeviceSide("split", Feature.INDIRECT_DESC, size=SIZE)
    length = side.ring.write_table(TABLE, [(BUFFERS + 32, PAYLOAD, bool(flags)), (BUFFERS + 48, PAYLOAD, True)])
    side.memory.write(BUFFERS - BASE, bytes(range(64)))
    side.offer_list((BUFFERS, PAYLOAD, flags | NEXT), (BUFFERS + 16, PAYLOAD, flags | NEXT), (TABLE, length, INDIRECT))
    assert side.take(path) == 1
    if path == "token":
        (chain,) = side.chains
        assert chain.segments == [(BUFFERS, 16, False), (BUFFERS + 16, 16, False), (BUFFERS + 32, 16, False), (BUFFERS + 48, 16, True)]
        assert chain.read() == bytes(range(48))


def test_device_08_packed_a_table_stands_alone(path: str, flags: int) -> None:
    for length in (2, 3):
        side = DeviceSide("packed", Feature.INDIRECT_DESC, size=SIZE)
        table = side.ring.write_table(TABLE, [(BUFFERS, PAYLOAD, bool(flags))])
        side.offer_list(*[(BUFFERS, PAYLOAD, flags | NEXT)] * (length - 1), (TABLE, table, INDIRECT))
        side.breaks(path)


@pytest.mark.parametrize("entry", [0, 1, 2])
def test_device_08_split_a_table_in_a_table_breaks_the_queue(path: str, flags: int, entry: int) -> None:
    side = DeviceSide("split", Feature.INDIRECT_DESC, size=SIZE)
    entries = [(BUFFERS, PAYLOAD, flags | NEXT, 1), (BUFFERS, PAYLOAD, flags | NEXT, 2), (BUFFERS, PAYLOAD, flags, 0)]
    entries[entry] = (TABLE, 48, INDIRECT, 0)
    side.offer_table(TABLE, side.write_table(TABLE, *entries))
    side.breaks(path)


def test_device_08_split_a_table_may_have_entries_that_nothing_leads_to(path: str, flags: int) -> None:
    side = DeviceSide("split", Feature.INDIRECT_DESC, size=SIZE)
    unread = (0xDEAD_BEEF, 0xFFFF_FFFF, 0xFFFF, 0xFFFF)
    entries = [(BUFFERS, PAYLOAD, flags | NEXT, 3), unread, unread, (BUFFERS + PAYLOAD, PAYLOAD, flags, 0xFFFF)]
    side.offer_table(TABLE, side.write_table(TABLE, *entries))
    assert side.take(path) == 1
    if path == "token":
        assert side.chains[0].segments == [(BUFFERS, PAYLOAD, False), (BUFFERS + PAYLOAD, PAYLOAD, False)]


def test_device_08_packed_all_entries_count_and_of_their_flags_only_write(path: str, flags: int) -> None:
    side = DeviceSide("packed", Feature.INDIRECT_DESC, size=7)
    entries = [(BUFFERS + PAYLOAD * number, PAYLOAD, flags | IN_TABLE_ONLY_WRITE_COUNTS, 0xFFFF - number) for number in range(6)]
    side.offer_table(TABLE, side.write_table(TABLE, *entries, (BUFFERS, PAYLOAD, 0xFFFF, 0)))
    assert side.take(path) == 1
    if path == "token":
        assert len(side.chains[0].segments) == 7 and side.chains[0].writable == PAYLOAD
        side.queue.complete(side.chains[0], 3)
        side.queue.publish()
        assert side.packed.used() == [(0, 3)], "the id is that of the descriptor in the ring"


@pytest.mark.parametrize(
    "table", [BASE + MEMORY - 47, BASE + MEMORY - 16, BASE + MEMORY, BASE - 16, BASE - 1, 0, (1 << 64) - 16, (1 << 64) - 48, (1 << 64) - 1]
)
@pytest.mark.parametrize("before", [0, 1])
def test_device_08_a_table_outside_memory_breaks_the_queue(side: DeviceSide, path: str, table: int, before: int) -> None:
    side.offer(*[side.buffer(path)] * before)
    side.offer_list((table, 48, INDIRECT), id=1)
    if before:
        assert side.take(path) == 1
    side.breaks(path, table)


def test_device_08_a_table_may_end_with_memory_and_reach_over_regions(side: DeviceSide, path: str, flags: int) -> None:
    entries = [(BUFFERS + PAYLOAD * number, PAYLOAD, bool(flags)) for number in range(3)]
    side.guest.add(BASE + MEMORY, Memory(4096))
    length = side.ring.write_table(TABLE, entries)
    for number, table in enumerate((BASE + MEMORY - 48, BASE + MEMORY - 24, BASE + MEMORY, BASE + MEMORY + 4096 - 48)):
        side.guest.write(table, side.guest.read(TABLE, length))
        side.offer_list((table, length, INDIRECT), id=number)
        assert side.take(path) == 1


# device-09


@pytest.mark.parametrize("position", [1, 2, SIZE - 1])
@pytest.mark.parametrize("indirect", [False, True])
def test_device_09_readable_after_writable_breaks_the_queue(side: DeviceSide, path: str, position: int, indirect: bool) -> None:
    segments = [(BUFFERS + PAYLOAD * number, PAYLOAD, True) for number in range(SIZE)]
    segments[position] = (*segments[position][:2], False)
    if indirect:
        side.offer_table(TABLE, side.ring.write_table(TABLE, segments))
    else:
        side.offer(segments)
    side.breaks(path, position)


def test_device_09_the_order_holds_across_a_table(path: str) -> None:
    side = DeviceSide("split", Feature.INDIRECT_DESC, size=SIZE)
    length = side.ring.write_table(TABLE, [(BUFFERS, PAYLOAD, False)])
    side.offer_list((BUFFERS, PAYLOAD, WRITE | NEXT), (TABLE, length, INDIRECT))
    side.breaks(path, 1)


def test_device_09_every_split_into_readable_and_writable_is_legal(side: DeviceSide) -> None:
    for readable in range(SIZE + 1):
        side.offer([(BUFFERS + PAYLOAD * number, PAYLOAD, number >= readable) for number in range(SIZE)])
        (chain,) = side.queue.pop()
        assert (chain.readable, chain.writable) == (PAYLOAD * readable, PAYLOAD * (SIZE - readable))
        side.queue.complete(chain, chain.writable)
        side.queue.publish()
        assert [length for _, length in side.ring.used()] == [PAYLOAD * (SIZE - readable)]


MOST = (1 << 32) - 1


@pytest.mark.parametrize("writable", [False, True])
@pytest.mark.parametrize("lengths", [(MOST,), (MOST - 1, 1), (1 << 31, (1 << 31) - 1), (MOST - 6, 1, 1, 1, 1, 1, 1)])
def test_device_09_a_chain_holds_as_much_as_a_used_length_can_say(side: DeviceSide, lengths: tuple[int, ...], writable: bool) -> None:
    side.offer([(BUFFERS, length, writable) for length in lengths])
    (chain,) = side.queue.pop()
    assert (chain.readable, chain.writable) == ((0, MOST) if writable else (MOST, 0))
    side.queue.complete(chain, chain.writable)
    side.queue.publish()
    assert [length for _, length in side.ring.used()] == [chain.writable]


def test_device_09_a_chain_that_no_burst_holds_is_dropped_and_given_back(side: DeviceSide) -> None:
    side.offer([(BUFFERS, MOST, False)], side.buffer("burst"), [(0, 1 << 31, False)])
    assert side.take("burst") == 1
    assert side.queue.counters["dropped"] == 2 and side.queue.broken is None
    assert len(side.ring.used()) == 2


@pytest.mark.parametrize("indirect", [False, True])
@pytest.mark.parametrize("lengths", [(MOST, 1), (1, MOST), (1 << 31, 1 << 31), (MOST, MOST), (MOST,) * SIZE])
@pytest.mark.parametrize("writable", [0, 1, 2])
def test_device_09_a_chain_of_more_bytes_breaks_the_queue(
    side: DeviceSide, path: str, lengths: tuple[int, ...], writable: int, indirect: bool
) -> None:
    segments = [(BUFFERS, length, number >= len(lengths) - writable) for number, length in enumerate(lengths)]
    if indirect:
        side.offer_table(TABLE, side.ring.write_table(TABLE, segments))
    else:
        side.offer(segments)
    side.breaks(path, MOST)


@pytest.mark.parametrize("indirect", [False, True])
def test_device_09_segments_without_bytes_are_skipped(side: DeviceSide, indirect: bool) -> None:
    side.memory.write(BUFFERS - BASE, b"abcdefgh")
    nowhere = (0xDEAD_0000_0000_0000, 0)
    segments = [
        (*nowhere, False),
        (BUFFERS, 4, False),
        (*nowhere, False),
        (BUFFERS + 4, 4, False),
        (*nowhere, True),
        (BUFFERS + 64, 8, True),
    ]
    if indirect:
        side.offer_table(TABLE, side.ring.write_table(TABLE, segments))
    else:
        side.offer(segments)
    (chain,) = side.queue.pop()
    assert chain.segments == [(BUFFERS, 4, False), (BUFFERS + 4, 4, False), (BUFFERS + 64, 8, True)]
    assert chain.read() == b"abcdefgh" and chain.write(b"ABCDEFGH") == 8
    assert side.memory.read(BUFFERS - BASE + 64, 8) == b"ABCDEFGH"


def test_device_09_a_chain_without_any_byte_goes_back(side: DeviceSide, path: str) -> None:
    """It is delivered empty, or counted as dropped where a packet must have bytes; it never stops the queue."""
    side.offer([(0, 0, False)], [(0, 0, True)], [(0, 0, False), (0, 0, True)])
    if path in ("token", "batch"):
        assert side.take(path) == 3
        assert all(chain.readable == chain.writable == 0 and chain.read() == b"" and chain.write(b"") == 0 for chain in side.chains)
        for chain in side.chains:
            side.queue.complete(chain)
        if path == "batch":
            side.queue.complete_batch(side.batch)
        side.queue.publish()
    else:
        assert side.take(path) == 0
        assert side.queue.counters["dropped"] == 3
    assert [length for _, length in side.ring.used()] == [0, 0, 0]
    side.offer(side.buffer(path))
    assert side.take(path) == 1 and side.queue.broken is None


@pytest.mark.parametrize("indirect", [False, True])
def test_device_09_our_driver_makes_no_chain_that_a_device_may_refuse(ring_format: str, indirect: bool) -> None:
    side = DriverSide(ring_format, Feature.INDIRECT_DESC, size=SIZE)
    side.add("token", 2)
    good = [(BUFFERS, 16)]
    wrong: list[tuple[list[tuple[int, int]], list[tuple[int, int]], str]] = [
        ([(BUFFERS, 0)], [], r"\b0\b"),
        (good, [(BUFFERS, 0)], r"\b0\b"),
        ([], [], "segment"),
        ([(BUFFERS, -1)], [], "-1"),
        ([(BUFFERS, 1 << 32)], [], rf"{1 << 32}"),
        ([(BUFFERS, (1 << 32) + 16)], [], rf"{(1 << 32) + 16}"),
        (good * SIZE, good, rf"{SIZE + 1}.*\b{SIZE}\b"),
        ([(BASE + MEMORY - 15, 16)], [], f"{BASE + MEMORY - 15:#x}"),
        ([(BASE + MEMORY, 1)], [], f"{BASE + MEMORY:#x}"),
        (good, [(BASE - 1, 2)], f"{BASE - 1:#x}"),
        ([(0x1000, 16)], [], "0x1000"),
        ([((1 << 64) - 8, 16)], [], f"{(1 << 64) - 8:#x}"),
        ([(1 << 64, 16)], [], "0x10000000000000000|18446744073709551616"),
        ([(-16, 16)], [], "-16|-0x10"),
    ]
    before = side.state()
    for readable, writable, message in wrong:
        with pytest.raises(ValueError, match=message):
            side.queue.add("wrong", readable=readable, writable=writable, indirect=indirect)
        assert side.state() == before
    for readable in ([(BUFFERS,)], [BUFFERS], 5, [(BUFFERS, 16, True)], [("a", 16)], [(BUFFERS, 1.0)]):  # type: ignore[assignment]
        with pytest.raises((TypeError, ValueError)):
            side.queue.add("wrong", readable=readable, indirect=indirect)
        assert side.state() == before
    assert len(side.available()) == 2
    bare = DriverSide(ring_format)
    with pytest.raises(ValueError, match="INDIRECT_DESC"):
        bare.queue.add("wrong", readable=good, indirect=True)
    assert bare.queue.free == SIZE and bare.queue.outstanding == 0


def test_device_09_our_driver_knows_how_much_a_used_length_can_say(ring_format: str) -> None:
    memory = Memory(1 << 32)  # pages that nobody touches cost nothing
    queue = DriverQueue(memory, SIZE, features=features(ring_format), address=BASE)
    half = 1 << 31
    with pytest.raises(ValueError, match=rf"{1 << 32}.*{MOST}"):
        queue.add("too long", readable=[(BASE, half)], writable=[(BASE + half, half)])
    assert queue.free == SIZE
    queue.add("as long as can be", readable=[(BASE, half)], writable=[(BASE + half, half - 1)])
    assert queue.outstanding == 1
