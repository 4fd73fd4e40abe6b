"""A hostile driver makes impossible things available: indexes, heads and chains without end (device-05, device-06, device-07)."""

import pytest

from tests.hostile.sides import BASE, BUFFERS, DEVICE_PATHS, INDIRECT, NEXT, PAYLOAD, WRITE, DeviceSide
from virtio import Feature
from virtio.testing import RawPackedDriver

SIZE = 8
STARTS = (0, 5, 65528, 65531, 65535)
"""Positions of the avail index from which a step is tried: at the start, in a lap, and around the wrap of 16 bits."""


def from_position(start: int, size: int = SIZE) -> DeviceSide:
    """A split queue that has come as far as `start`, as a saved state says it."""
    side = DeviceSide("split", size=size)
    side.split.avail_idx = side.split.used_idx = side.split.used_position = start
    side.restart(base=start)
    side.split.next_descriptor = start % size
    return side


@pytest.fixture(params=DEVICE_PATHS)
def path(request: pytest.FixtureRequest) -> str:
    """Token by token, in batches, in bursts, or filling writable buffers from bursts."""
    return str(request.param)


# device-05


@pytest.mark.parametrize("start", STARTS)
def test_device_05_an_index_one_queue_ahead_is_full(path: str, start: int) -> None:
    side = from_position(start)
    side.offer(*[side.buffer(path, number) for number in range(SIZE)])
    assert side.take(path) == SIZE
    assert side.queue.broken is None


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("ahead", [SIZE + 1, SIZE + 2, 2 * SIZE, 32767, 32768, 32769, 65534, 65535])
def test_device_05_an_index_further_ahead_breaks_the_queue(path: str, start: int, ahead: int) -> None:
    side = from_position(start)
    for number in range(SIZE):  # legal, were it not for the index
        side.split.set_avail_element(start + number, side.split.add(side.buffer(path, number)))
    side.split.avail_idx = start + ahead
    side.breaks(path, (start + ahead) % 65536, start, ahead, SIZE)


def test_device_05_an_index_that_goes_back_breaks_the_queue(path: str) -> None:
    side = from_position(65534)
    side.offer(*[side.buffer(path, number) for number in range(4)])
    assert side.take(path) == 4
    side.split.avail_idx = 1
    side.breaks(path, 1, 2, SIZE)


def test_device_05_what_is_there_counts_from_what_was_taken(path: str) -> None:
    side = from_position(0)
    side.offer(*[side.buffer(path, number) for number in range(4)])
    assert side.take(path, 3) == 3
    side.split.avail_idx = 3 + SIZE + 1
    taken = 0
    while side.queue.broken is None and taken < 2:  # what was seen before the lie is still delivered
        try:
            taken += side.take(path)
        except Exception:
            break
    assert taken <= 1
    assert side.queue.broken is not None and str(3 + SIZE + 1) in str(side.queue.broken)


def test_device_05_the_index_is_16_bits_and_all_of_them_count(path: str) -> None:
    side = from_position(255)
    side.offer(side.buffer(path))  # 255 -> 256: read as two bytes it would pass through 511 or 0
    assert side.take(path) == 1
    assert side.queue.base == 256


# device-06


@pytest.mark.parametrize("head", [SIZE, SIZE + 1, 2 * SIZE, 32768, 65535])
@pytest.mark.parametrize("before", [0, 3])
def test_device_06_a_head_beyond_the_table_breaks_the_queue(path: str, head: int, before: int) -> None:
    side = from_position(65534)
    side.offer(*[side.buffer(path, number) for number in range(before)])
    side.split.make_available(head)
    if before:
        assert side.take(path) == before, "what stands before it is delivered"
    side.breaks(path, head, SIZE)


def test_device_06_the_last_head_is_legal(path: str) -> None:
    side = from_position(0)
    (segment,) = side.buffer(path)
    side.split.set_descriptor(SIZE - 1, segment[0], segment[1], WRITE if segment[2] else 0)
    side.split.make_available(SIZE - 1)
    assert side.take(path) == 1


@pytest.mark.parametrize("path", ["token", "batch", "burst"])
def test_device_06_a_head_twice_in_one_batch_breaks_the_queue(path: str) -> None:
    side = from_position(65535)
    head = side.split.add(side.buffer(path))
    side.split.make_available(head, head)
    assert side.take(path) == 1
    side.breaks(path, head)


@pytest.mark.parametrize("path", ["token", "batch", "burst"])
def test_device_06_a_head_that_is_in_flight_breaks_the_queue(path: str) -> None:
    side = from_position(0)
    (head,) = side.offer(side.buffer(path))
    assert side.take(path) == 1
    side.split.make_available(side.split.add(side.buffer(path, 1)))
    assert side.take(path) == 1
    side.split.make_available(head)
    side.breaks(path, head)


def test_device_06_a_head_that_was_used_may_come_again() -> None:
    side = from_position(65533)
    head = side.split.add(side.buffer())
    for _ in range(3 * SIZE):
        side.split.make_available(head)
        (chain,) = side.queue.pop()
        side.queue.complete(chain)
        side.queue.publish()
        assert side.split.used() == [(head, 0)]


@pytest.mark.parametrize("path", ["token", "batch", "burst"])
def test_device_06_chains_that_share_descriptors_do_not_exceed_the_ring(path: str) -> None:
    """Each chain is short enough, but together they have more descriptors than there are."""
    side = from_position(0, 4)
    side.split.set_descriptor(0, BUFFERS, 8, NEXT, 2)
    side.split.set_descriptor(1, BUFFERS, 8, NEXT, 2)
    side.split.set_descriptor(2, BUFFERS, 8, NEXT, 3)
    side.split.set_descriptor(3, BUFFERS, 8, 0, 0)
    side.split.make_available(0, 1)
    assert side.take(path) == 1
    side.breaks(path, 6, 4)


@pytest.mark.parametrize("path", ["token", "batch", "burst"])
def test_device_06_a_full_ring_has_no_room_for_one_more(ring_format: str, path: str) -> None:
    side = DeviceSide(ring_format, size=4)
    side.offer(*[side.buffer(path, number) for number in range(4)])
    assert side.take(path) == 4
    if isinstance(side.ring, RawPackedDriver):
        side.offer(side.buffer(path))  # the next lap, over what is in flight
        side.breaks(path, 5, 4)
    else:
        side.ring.avail_idx += 1
        side.breaks(path)  # the oldest head again, which is in flight


@pytest.mark.parametrize("path", ["token", "batch", "burst"])
def test_device_06_lists_count_all_their_slots(path: str) -> None:
    side = DeviceSide("packed", size=5)
    three = [(BUFFERS + PAYLOAD * number, PAYLOAD, False) for number in range(3)]
    side.offer(three)
    assert side.take(path) == 1
    side.offer(three)  # slots 3, 4 and, in the next lap, 0
    side.breaks(path, 6, 5)


@pytest.mark.parametrize("path", ["token", "batch", "burst"])
def test_device_06_an_indirect_table_counts_as_one(ring_format: str, path: str) -> None:
    side = DeviceSide(ring_format, Feature.INDIRECT_DESC, size=4)
    table = BUFFERS + 0x1_0000
    length = side.ring.write_table(table, [(BUFFERS + PAYLOAD * number, PAYLOAD, False) for number in range(4)])
    for number in range(4):
        side.offer_list((table, length, INDIRECT), id=number)
    assert sum(iter(lambda: side.take(path), 0)) == 4
    assert side.queue.outstanding == 4 and side.queue.broken is None


def test_device_06_what_was_handed_back_is_not_in_flight(ring_format: str) -> None:
    side = DeviceSide(ring_format, size=4)
    side.offer(*[side.buffer("token", number) for number in range(4)])
    for _ in range(10):
        chains = side.queue.pop()
        assert len(chains) == 4
        side.queue.rewind(4)
        assert side.queue.outstanding == 0
        assert all(chain.completed for chain in chains)
    assert side.take("token") == 4


# device-07


def test_device_07_a_chain_of_the_whole_queue_is_legal(ring_format: str, path: str) -> None:
    side = DeviceSide(ring_format, size=SIZE)
    side.offer([(BUFFERS + PAYLOAD * number, PAYLOAD, path == "fill") for number in range(SIZE)])
    assert side.take(path) == 1 and side.queue.broken is None


LOOPS = {
    "itself": {0: 0},
    "two": {0: 1, 1: 0},
    "all": {number: (number + 1) % SIZE for number in range(SIZE)},
    "tail": {0: 1, 1: 2, 2: 2},
}


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("before", [0, 1])
def test_device_07_a_loop_ends(path: str, loop: str, before: int) -> None:
    side = from_position(65535)
    flags = NEXT | (WRITE if path == "fill" else 0)
    for number, next in LOOPS[loop].items():
        side.split.set_descriptor(number, BUFFERS, PAYLOAD, flags, next)
    if before:
        (segment,) = side.buffer(path)
        side.split.set_descriptor(SIZE - 1, segment[0], segment[1], flags & WRITE)
        side.split.make_available(SIZE - 1)
        if loop == "all":
            side.split.set_descriptor(SIZE - 2, BUFFERS, PAYLOAD, flags, 0)
    side.split.make_available(0)
    if before:
        assert side.take(path) == 1
    side.breaks(path, SIZE)


def test_device_07_a_list_that_never_ends_breaks_the_queue(path: str) -> None:
    side = DeviceSide("packed", size=7)
    side.offer_list(*[(BUFFERS, PAYLOAD, NEXT | (WRITE if path == "fill" else 0))] * 7)
    side.breaks(path, 7)


def test_device_07_a_loop_of_empty_descriptors_ends(ring_format: str, path: str) -> None:
    side = DeviceSide(ring_format, size=SIZE)
    side.offer_list(*[(BUFFERS, 0, NEXT)] * SIZE)  # the last leads back to the first
    side.breaks(path, SIZE)


@pytest.mark.parametrize("next", [SIZE, SIZE + 1, 255, 256, 32768, 65535])
def test_device_07_next_beyond_the_table_breaks_the_queue(path: str, next: int) -> None:
    side = from_position(0)
    side.split.set_descriptor(0, BUFFERS, PAYLOAD, NEXT, next)
    side.split.make_available(0)
    side.breaks(path, next, SIZE)


@pytest.mark.parametrize("limit", [1, 2, SIZE - 1])
def test_device_07_a_lower_limit_holds_for_direct_chains(ring_format: str, path: str, limit: int) -> None:
    side = DeviceSide(ring_format, size=SIZE, chain_limit=limit)
    segments = [(BUFFERS + PAYLOAD * number, PAYLOAD, path == "fill") for number in range(limit + 1)]
    side.offer(segments[:limit])
    assert side.take(path) == 1
    side = DeviceSide(ring_format, size=SIZE, chain_limit=limit)
    side.offer(segments)
    side.breaks(path, limit)


@pytest.mark.parametrize(("size", "limit"), [(8, None), (8, 1), (8, 16), (4, 1024), (1024, 1024), (1, 1024)])
def test_device_07_a_table_has_as_many_entries_as_the_limit(ring_format: str, path: str, size: int, limit: int | None) -> None:
    most = limit or size
    entries = [(BUFFERS + number % 64, 1, path == "fill") for number in range(most + 1)]
    table = BUFFERS + 0x1_0000
    side = DeviceSide(ring_format, Feature.INDIRECT_DESC, size=size, chain_limit=limit)
    side.offer_table(table, side.ring.write_table(table, entries[:most]))
    if path == "fill":
        side.memory.write(BUFFERS - BASE, bytes(64))
    fits = path != "fill" or most >= PAYLOAD
    assert (side.take(path), side.queue.counters["dropped"], side.queue.broken) == (fits, not fits, None)
    side = DeviceSide(ring_format, Feature.INDIRECT_DESC, size=size, chain_limit=limit)
    side.offer_table(table, side.ring.write_table(table, entries))
    side.breaks(path, most)


@pytest.mark.parametrize("direct", [1, 4, SIZE - 1])
def test_device_07_descriptors_before_a_table_count(path: str, direct: int) -> None:
    """Split only: there any number of direct descriptors may precede the table (2.7.5.3)."""
    table = BUFFERS + 0x1_0000
    writable = path == "fill"
    for entries in (SIZE - direct, SIZE - direct + 1):
        side = DeviceSide("split", Feature.INDIRECT_DESC, size=SIZE)
        length = side.ring.write_table(table, [(BUFFERS, 4, writable)] * entries)
        side.offer_list(*[(BUFFERS, 4, NEXT | (WRITE if writable else 0))] * direct, (table, length, INDIRECT))
        if direct + entries <= SIZE:
            assert side.take(path) == 1 and side.queue.broken is None
        else:
            side.breaks(path, SIZE - direct)


@pytest.mark.parametrize("next", [3, 4, 255, 65535])
def test_device_07_next_beyond_an_indirect_table_breaks_the_queue(path: str, next: int) -> None:
    side = DeviceSide("split", Feature.INDIRECT_DESC, size=SIZE)
    table = BUFFERS + 0x1_0001
    length = side.write_table(table, (BUFFERS, 4, NEXT, 2), (BUFFERS, 4, 0, 0), (BUFFERS, 4, NEXT, next))
    side.offer_table(table, length)
    side.breaks(path, next, 3)


@pytest.mark.parametrize("loop", [(0,), (1, 0), (2, 1, 1)])
def test_device_07_a_loop_in_an_indirect_table_ends(path: str, loop: tuple[int, ...]) -> None:
    side = DeviceSide("split", Feature.INDIRECT_DESC, size=SIZE, chain_limit=1024)
    table = BUFFERS + 0x1_0000
    length = side.write_table(table, *[(BUFFERS, 4, NEXT, next) for next in loop])
    side.offer_table(table, length)
    side.breaks(path, 1024)


@pytest.mark.parametrize("limit", [-1, 0, 1025, 65536, 65536 + 8])
def test_device_07_a_limit_that_no_chain_can_have_is_refused(ring_format: str, limit: int) -> None:
    side = DeviceSide(ring_format, size=SIZE)
    with pytest.raises(ValueError, match=rf"{limit}.*1024|{limit}.*32768"):
        side.restart(chain_limit=limit)
    with pytest.raises(TypeError):
        side.restart(chain_limit="8")
