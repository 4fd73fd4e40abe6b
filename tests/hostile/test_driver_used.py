"""A hostile device uses what it may not: lies in the ring, in ids and in lengths (driver-01, driver-02, driver-03, driver-13)."""

import pytest

from tests.hostile.sides import BASE, BUFFERS, DRIVER_PATHS, PAYLOAD, WRITE, DeviceSide, DriverSide
from virtio import DeviceQueue, Feature, GuestMemory
from virtio.testing import RawSplitDevice
from virtio.testing.packed import used_flags

SIZE = 8


@pytest.fixture(params=DRIVER_PATHS)
def path(request: pytest.FixtureRequest) -> str:
    """Chains with tokens, or slots in bursts."""
    return str(request.param)


@pytest.fixture
def side(ring_format: str) -> DriverSide:
    return DriverSide(ring_format, size=SIZE)


# driver-01


def test_driver_01_what_was_written_is_not_read_back(side: DriverSide, path: str) -> None:
    for _ in range(5):
        side.add(path, 4)
        chains = side.available()
        side.scribble()
        for number in (2, 0, 3, 1):
            side.use(chains[number], number)
        assert side.take(path) == [2, 0, 3, 1]
        assert side.queue.free == SIZE and side.queue.outstanding == 0


@pytest.mark.parametrize("indirect", [False, True])
def test_driver_01_lists_and_tables_come_back_whole(ring_format: str, indirect: bool) -> None:
    side = DriverSide(ring_format, Feature.INDIRECT_DESC, size=SIZE)
    for lap in range(40):
        lengths = [1 + (lap + number) % 3 for number in range(2)]
        for number, length in enumerate(lengths):
            segments = [(BUFFERS + PAYLOAD * place, PAYLOAD) for place in range(length)]
            side.queue.add((lap, number), writable=segments, indirect=indirect)
        side.queue.publish()
        chains = side.available()
        assert [len(chain.segments) for chain in chains] == lengths
        side.scribble()
        side.memory.write(side.areas[2] - BASE + 1024, b"\xff" * 1024)  # the tables lie behind the areas
        for number in (1, 0):
            side.use(chains[number], PAYLOAD * lengths[number])
        assert side.queue.pop_used() == [((lap, number), PAYLOAD * lengths[number]) for number in (1, 0)]
        assert side.queue.free == SIZE


def test_driver_01_what_is_added_afterwards_is_written_anew(side: DriverSide, path: str) -> None:
    side.add(path, 4)
    chains = side.available()
    side.scribble()
    side.use(chains[1], 1)
    assert side.take(path) == [1]
    side.add(path, 1)
    (chain,) = side.available()
    ((address, length, writable),) = chain.segments
    assert BASE <= address and length == PAYLOAD and writable


def test_driver_01_rubbish_in_areas_of_the_driver_changes_nothing(side: DriverSide) -> None:
    side.add("token", 2)
    chains = side.available()
    before = side.queue.snapshot()["private"]
    if isinstance(side.ring, RawSplitDevice):
        side.ring.avail_idx, side.ring.avail_flags, side.ring.used_event = 0xDEAD, 0xFFFF, 0xBEEF
    else:
        side.memory.store(side.areas[1] - BASE, 4, 0xFFFF_FFFF)
    assert side.queue.snapshot()["private"] == before
    side.use(chains[0])
    assert side.queue.pop_used() == [(0, 0)]
    side.add("token", 1)
    if isinstance(side.ring, RawSplitDevice):
        assert side.ring.avail_idx == 3


# driver-02


def far_along(steps: int) -> DriverSide:
    """A split queue whose used index has come that far, through the hands of an honest device."""
    side, guest = DriverSide("split", size=SIZE), GuestMemory()
    guest.add(BASE, side.memory)
    device = DeviceQueue(guest, SIZE, side.areas)
    batch = device.batch(SIZE)
    while steps:
        count = min(SIZE, steps)
        side.pool.take(side.burst)
        side.burst.count = count
        assert side.queue.add_writable_burst(side.burst) == count
        assert device.pop_batch(batch) == device.complete_batch(batch) == count
        assert side.queue.pop_used_burst(side.burst) == count
        steps -= count
    side.pool.give(side.burst)
    side.split.avail_position = side.split.avail_idx
    return side


@pytest.mark.parametrize("outstanding", [0, 1, 3, SIZE])
@pytest.mark.parametrize("ahead", [1, 2, 8, 32768, 65536 - SIZE - 1])
def test_driver_02_a_used_index_beyond_what_is_in_flight_breaks_the_queue(path: str, outstanding: int, ahead: int) -> None:
    side = DriverSide("split", size=SIZE)
    if outstanding:
        side.add(path, outstanding)
    for number, chain in enumerate(side.available()):
        side.split.set_used_element(number, chain.id, 0)
    side.split.used_idx = outstanding + ahead
    side.breaks(path, (outstanding + ahead) % 65536, outstanding)


@pytest.mark.parametrize("start", [65528, 65532, 65535, 65536])
def test_driver_02_the_used_index_is_compared_in_16_bits(start: int, path: str) -> None:
    for lie in (0, 1):
        side = far_along(start)
        side.add(path, 5)
        for number, chain in enumerate(side.available()):
            side.split.set_used_element(start + number, chain.id, number)
        side.split.used_idx = start + 5 + lie
        if lie:
            side.breaks(path, (start + 6) % 65536, start % 65536, 5)
        else:
            assert side.take(path) == [0, 1, 2, 3, 4]


def test_driver_02_a_used_index_that_goes_back_breaks_the_queue(path: str) -> None:
    side = DriverSide("split", size=SIZE)
    side.add(path, 4)
    for chain in side.available()[:2]:
        side.use(chain)
    assert len(side.take(path)) == 2
    side.split.used_idx = 1
    side.breaks(path, 1, 2)


@pytest.mark.parametrize("id", [SIZE, SIZE + 1, 255, 65535])
@pytest.mark.parametrize("before", [0, 2])
def test_driver_02_an_id_that_no_queue_has_breaks_the_queue(side: DriverSide, path: str, id: int, before: int) -> None:
    side.add(path, 4)
    chains = side.available()
    for chain in chains[:before]:
        side.use(chain, 5)
    side.use_id(id, 5)
    if before:
        assert side.take(path) == [5] * before, "what stands before it comes back"
    side.breaks(path, id)


@pytest.mark.parametrize("high", [1, 0x8000, 0xFFFF])
def test_driver_02_an_id_is_compared_with_all_its_bits(path: str, high: int) -> None:
    side = DriverSide("split", size=SIZE)
    side.add(path, 1)
    (chain,) = side.available()
    side.use_id(high << 16 | chain.id)
    side.breaks(path, high << 16 | chain.id, SIZE)


@pytest.mark.parametrize("what", ["free", "used", "used twice at once", "within a chain", "not published"])
def test_driver_02_an_id_that_is_not_outstanding_breaks_the_queue(ring_format: str, what: str) -> None:
    side = DriverSide(ring_format, size=SIZE)
    side.queue.add("list", writable=[(BUFFERS, 8)] * 3)
    side.queue.add("other", writable=[(BUFFERS, 8)])
    side.queue.publish()
    first, other = side.available()
    if what == "free":
        outstanding = {first.id, other.id}
        if isinstance(side.ring, RawSplitDevice):
            outstanding |= {side.ring.descriptor(first.id).next, side.ring.descriptor(side.ring.descriptor(first.id).next).next}
        bad = next(id for id in range(SIZE) if id not in outstanding)
    elif what == "used":
        side.use(other, 8)
        assert side.queue.pop_used() == [("other", 8)]
        bad = other.id
    elif what == "used twice at once":
        side.use(other, 8)
        side.ring.use(other.id, 8)
        assert side.queue.pop_used() == [("other", 8)]
        bad = other.id
    elif what == "within a chain":
        bad = side.ring.descriptor(first.id).next if isinstance(side.ring, RawSplitDevice) else first.id ^ 4
        assert bad not in (first.id, other.id)
    else:
        before = {first.id, other.id}
        side.queue.add("hidden", writable=[(BUFFERS, 8)])
        bad = next(id for id in hidden_ids(side) if id not in before)
    if what != "used twice at once":
        side.ring.use(bad, 8)
    side.breaks("token", bad)


def hidden_ids(side: DriverSide) -> list[int]:
    """Ids that stand in the ring, published or not: a device can see them."""
    if isinstance(side.ring, RawSplitDevice):
        return [side.ring.avail_element(number) for number in range(SIZE)]
    return [*range(SIZE)]


def test_driver_02_what_was_not_published_cannot_come_back(ring_format: str) -> None:
    for id in range(SIZE):
        side = DriverSide(ring_format, size=SIZE)
        side.queue.add("hidden", writable=[(BUFFERS, 8)])
        side.ring.use(id, 8)
        side.breaks("token")


# driver-03 and driver-13


@pytest.mark.parametrize("length", [PAYLOAD + 1, 2 * PAYLOAD, 65536, 65536 + 1, 0x8000_0000, 0xFFFF_FFFF])
def test_driver_03_a_longer_used_length_is_clamped_and_counted(side: DriverSide, path: str, length: int) -> None:
    side.add(path, 4)
    for chain, said in zip(side.available(), (PAYLOAD, length, 0, length), strict=True):
        side.use(chain, said)
    assert side.take(path) == [PAYLOAD, PAYLOAD, 0, PAYLOAD]
    assert side.queue.counters["clamped"] == 2 and side.queue.broken is None


@pytest.mark.parametrize("length", [1, PAYLOAD, 0xFFFF_FFFF])
def test_driver_03_nothing_was_written_where_nothing_is_writable(side: DriverSide, path: str, length: int) -> None:
    side.add(path, 2, writable=False)
    first, second = side.available()
    side.use(first, length)
    side.use(second, 0)
    assert side.take(path) == [0, 0]
    assert side.queue.counters["clamped"] == 1


def test_driver_03_only_writable_bytes_count(ring_format: str) -> None:
    side = DriverSide(ring_format, Feature.INDIRECT_DESC, size=SIZE)
    for indirect in (False, True):
        for said, length in ((39, 39), (40, 40), (41, 40), (104, 40)):
            segments = [(BUFFERS, 32), (BUFFERS + 32, 32)], [(BUFFERS + 64, 16), (BUFFERS + 80, 24)]
            side.queue.add("token", readable=segments[0], writable=segments[1], indirect=indirect)
            side.queue.publish()
            (chain,) = side.available()
            side.use(chain, said)
            assert side.queue.pop_used() == [("token", length)]
    assert side.queue.counters["clamped"] == 4


def test_driver_03_a_burst_says_for_each_slot_what_was_written_there(side: DriverSide) -> None:
    burst = side.pool.burst(3)
    for said, expected in ((0, [0, 0, 0]), (5, [5, 0, 0]), (16, [16, 0, 0]), (33, [16, 16, 1]), (48, [16, 16, 16]), (1000, [16, 16, 16])):
        side.pool.take(burst)
        burst.lengths[:], burst.more[:] = PAYLOAD, [1, 1, 0]
        assert side.queue.add_writable_burst(burst) == 1
        (chain,) = side.available()
        assert len(chain.segments) == 3
        side.use(chain, said)
        assert side.queue.pop_used_burst(side.burst) == 1
        assert side.burst.lengths[:3].tolist() == expected and side.burst.more[:3].tolist() == [1, 1, 0]
    assert side.queue.counters["clamped"] == 1


@pytest.mark.parametrize("length", [0, 1, PAYLOAD, PAYLOAD + 1])
def test_driver_13_the_length_counts_with_and_without_write(path: str, length: int) -> None:
    side = DriverSide("packed", size=SIZE)
    for flags in (0, WRITE, 0x7F7F & ~WRITE, 0x7F7F):
        side.add(path, 1)
        (chain,) = side.available()
        side.packed.use(chain.id, length, flags=flags | used_flags(side.packed.wrap))
        assert side.take(path) == [min(length, PAYLOAD)]


def test_driver_13_our_device_sets_write_exactly_where_something_was_written() -> None:
    side = DeviceSide("packed", size=SIZE)
    for length in (0, 1, PAYLOAD, 0):
        position = side.packed.position
        side.offer([(BUFFERS, PAYLOAD, True)])
        (chain,) = side.queue.pop()
        side.queue.complete(chain, length)
        side.queue.publish()
        assert bool(side.packed.descriptor(position).flags & WRITE) is (length > 0)
        side.packed.used()
