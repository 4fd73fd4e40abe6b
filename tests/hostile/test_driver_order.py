"""A hostile device around what it has to give back: ids, tables, order (driver-04, driver-05, driver-14)."""

from itertools import permutations

import pytest

from tests.hostile.sides import BASE, BUFFERS, DRIVER_PATHS, PAYLOAD, DriverSide
from virtio import BufferPool, DriverQueue, Feature, Memory, QueueFull, SpecViolation
from virtio.testing import RawPackedDevice, RawSplitDevice
from virtio.testing.packed import used_flags

SIZE = 8


@pytest.fixture(params=DRIVER_PATHS)
def path(request: pytest.FixtureRequest) -> str:
    """Chains with tokens, or slots in bursts."""
    return str(request.param)


@pytest.fixture
def side(ring_format: str) -> DriverSide:
    return DriverSide(ring_format, size=SIZE)


# driver-04


def test_driver_04_slots_come_from_the_private_table() -> None:
    """The device makes lists in the ring look shorter and longer; the place of the next used descriptor does not move."""
    for order in permutations(range(3)):
        side = DriverSide("packed", size=7)
        for _ in range(6):
            for number in range(3):
                side.queue.add(number, writable=[(BUFFERS, 8)] * (1 + number))
            side.queue.publish()
            chains = side.available()
            side.scribble()
            for number in order:
                side.use(chains[number], number)
                assert side.queue.pop_used() == [(number, number)]
            assert side.queue.free == 7


@pytest.mark.parametrize("id", [0, 1, 2, 3, 6, 7, 8, 255, 256, 32768, 65535])
def test_driver_04_an_id_that_is_not_in_use_breaks_the_queue(path: str, id: int) -> None:
    side = DriverSide("packed", size=7)
    side.packed.set_descriptor(0, 0, 0, id, used_flags(1))
    side.breaks(path, id)


def test_driver_04_used_flags_of_another_lap_mean_nothing(path: str) -> None:
    side = DriverSide("packed", size=3)
    for lap in range(6):
        wrap = 1 - lap % 2
        side.add(path, 3)
        chains = side.available()
        kept = side.packed.descriptor(0)
        for flags in (used_flags(1 - wrap), 0x80 if wrap else 0x8000, 0x8000 if wrap else 0x80):
            side.packed.set_descriptor(0, 0, 5, chains[0].id, flags)
            assert side.take(path) == []
            assert side.queue.arm() is False
        side.packed.set_descriptor(0, *kept[:3], kept.flags)
        for chain in chains:
            side.use(chain, 1)
        assert side.take(path) == [1, 1, 1]


# driver-05


def test_driver_05_a_full_queue_stays_full_until_a_buffer_comes_back(ring_format: str) -> None:
    side = DriverSide(ring_format, size=4)
    side.add("token", 4)
    chains = side.available()
    before = side.state()
    with pytest.raises(QueueFull, match=r"\b1\b.*\b0\b"):
        side.queue.add("more", writable=[(BUFFERS, 1)])
    assert side.state() == before
    side.use(chains[2])
    with pytest.raises(QueueFull):
        side.queue.add("more", writable=[(BUFFERS, 1)])  # it was used, but not taken back
    assert side.queue.pop_used() == [(2, 0)]
    side.queue.add("more", writable=[(BUFFERS, 1)])
    with pytest.raises(QueueFull):
        side.queue.add("too many", writable=[(BUFFERS, 1)])
    assert len(side.queue.reset()) == 4


def test_driver_05_slots_of_bursts_are_the_devices_until_they_come_back(ring_format: str) -> None:
    memory = Memory(1 << 20)
    queue = DriverQueue(memory, 4, features={"packed": 1 << 34, "split": 0}[ring_format], address=BASE)
    raw = RawPackedDevice if ring_format == "packed" else RawSplitDevice
    ring = raw(memory, 4, queue.areas, address=BASE)
    pool = BufferPool(memory, 8, slot_size=128)
    burst = pool.burst(8)
    pool.take(burst)
    lent = burst.slots[:4].tolist()
    assert queue.add_writable_burst(burst) == 4 and burst.count == 4
    pool.give(burst)
    assert pool.available == 4
    seen = set()
    for _ in range(10):
        pool.take(burst)
        seen |= set(burst.slots[: burst.count].tolist())
        assert queue.add_writable_burst(burst) == 0
    assert not seen & set(lent), "no slot is given out twice"
    pool.give(burst)
    ring.use(999)
    with pytest.raises(SpecViolation):
        queue.pop_used_burst(burst)
    assert pool.available == 4, "a broken queue gives nothing back: the device may still write there"
    assert queue.reset() == [] and pool.available == 8


def test_driver_05_a_table_is_not_written_again_before_its_chain_came_back(ring_format: str) -> None:
    """Its slot in the packed ring is free as soon as any chain was used: the table is not."""
    side = DriverSide(ring_format, Feature.INDIRECT_DESC, size=2)
    segments = [[(BUFFERS + 256 * number, 8), (BUFFERS + 256 * number + 64, 8)] for number in range(12)]
    for number in (0, 1):
        side.queue.add(number, writable=segments[number], indirect=True)
    side.queue.publish()
    slow, quick = side.available()
    expected = [(address, 8, True) for address, _ in segments[0]]
    table = [side.ring.descriptor(slow.id if ring_format == "split" else 0)][0].address
    for number in range(2, 12):
        side.use(quick)
        assert side.queue.pop_used() == [(number - 1, 0)]
        side.queue.add(number, writable=segments[number], indirect=True)
        side.queue.publish()
        (quick,) = side.available()
        assert quick.segments == [(address, 8, True) for address, _ in segments[number]]
        assert [(side.memory.load(table - BASE + 16 * entry, 8), 8, True) for entry in range(2)] == expected, "the slow chain's table"
    side.use(slow, 16)
    assert side.queue.pop_used() == [(0, 16)]


def test_driver_05_reset_hands_everything_back_whatever_the_device_did(side: DriverSide) -> None:
    side.add("token", 5)
    chains = side.available()
    side.use(chains[4], 3)
    assert side.queue.pop_used() == [(4, 3)]
    side.add("token", 2, publish=False)
    side.scribble()
    assert sorted(side.queue.reset()) == [0, 1, 2, 3, 5, 6]
    assert side.queue.reset() == []


# driver-14


def in_order(ring_format: str, *more: Feature, size: int = SIZE) -> DriverSide:
    return DriverSide(ring_format, Feature.IN_ORDER, *more, size=size)


@pytest.mark.parametrize("indirect", [False, True])
def test_driver_14_split_descriptors_are_taken_in_ring_order(indirect: bool) -> None:
    side = in_order("split", Feature.INDIRECT_DESC)
    expected = 0
    for number in range(60):
        length = 1 + number % 4
        side.queue.add(number, writable=[(BUFFERS + 64 * place, 8) for place in range(length)], indirect=indirect)
        side.queue.publish()
        (chain,) = side.available()
        assert chain.id == expected % SIZE, "heads, too, follow each other round the table"
        assert [address for address, *_ in chain.segments] == [BUFFERS + 64 * place for place in range(length)]
        if not indirect:
            for place in range(length - 1):
                assert side.split.descriptor((expected + place) % SIZE).next == (expected + place + 1) % SIZE
        expected += 1 if indirect else length
        side.use(chain)
        assert side.queue.pop_used() == [(number, 0)]


@pytest.mark.parametrize("runs", [[1, 1, 1, 1], [4], [2, 2], [1, 3], [3, 1]])
def test_driver_14_one_element_for_a_run_or_one_each(ring_format: str, path: str, runs: list[int]) -> None:
    for lap in range(2 * SIZE):
        side = in_order(ring_format, size=7 if ring_format == "packed" else SIZE)
        for _ in range(lap):  # any place in the ring
            side.add(path, 1)
            side.use(side.available()[0])
            assert side.take(path) == [0]
        side.add(path, 4)
        chains = side.available()
        expected = []
        for run in runs:
            used, chains = chains[:run], chains[run:]
            if isinstance(side.ring, RawSplitDevice):
                index = side.ring.used_idx
                side.ring.set_used_element(index, used[-1].id, 5)
                side.ring.used_idx = index + run
            else:
                side.ring.use(used[-1].id, 5, slots=sum(chain.slots for chain in used))
            expected += [PAYLOAD] * (run - 1) + [5]
        assert side.take(path) == expected, "all but the last of a run were filled"
        assert side.queue.free == side.queue.size and side.queue.outstanding == 0


def test_driver_14_a_run_may_be_taken_in_pieces(ring_format: str) -> None:
    side = in_order(ring_format)
    side.add("token", 6)
    chains = side.available()
    if isinstance(side.ring, RawSplitDevice):
        side.ring.set_used_element(0, chains[4].id, 99)
        side.ring.used_idx = 5
    else:
        side.ring.use(chains[4].id, 99, slots=5)
    assert side.queue.pop_used(2) == [(0, PAYLOAD), (1, PAYLOAD)]
    assert side.queue.counters["clamped"] == 0
    assert side.queue.arm() is True
    side.scribble()
    assert side.queue.pop_used(2) == [(2, PAYLOAD), (3, PAYLOAD)]
    side.add("token", 2)
    assert side.queue.pop_used() == [(4, PAYLOAD)]
    assert side.queue.counters["clamped"] == 1
    assert side.queue.pop_used() == [] and side.queue.outstanding == 3


@pytest.mark.parametrize("shown", [1, 2, 3])
def test_driver_14_a_run_beyond_the_used_index_breaks_the_queue(path: str, shown: int) -> None:
    side = in_order("split")
    side.add(path, 5)
    chains = side.available()
    for named in range(shown, 5):
        side = in_order("split")
        side.add(path, 5)
        side.split.set_used_element(0, chains[named].id, 0)
        side.split.used_idx = shown
        side.breaks(path, chains[named].id, named + 1, shown)


@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize("id", [SIZE, 255, 65535])
def test_driver_14_a_run_to_an_id_that_no_queue_has_breaks_the_queue(ring_format: str, path: str, id: int, before: int) -> None:
    side = in_order(ring_format)
    side.add(path, 4)
    for chain in side.available()[:before]:
        side.use(chain, 1)
    side.use_id(id)
    if before:
        assert side.take(path) == [1] * before
    side.breaks(path, id)


def test_driver_14_a_chain_that_came_back_is_no_runs_end(ring_format: str, path: str) -> None:
    side = in_order(ring_format)
    side.add(path, 4)
    chains = side.available()
    side.use(chains[0])
    side.use(chains[1])
    assert side.take(path) == [0, 0]
    side.use(chains[0])
    side.breaks(path, chains[0].id)


def test_driver_14_the_same_id_twice_at_once_is_no_run(ring_format: str, path: str) -> None:
    side = in_order(ring_format)
    side.add(path, 4)
    chains = side.available()
    side.use(chains[1], 1) if ring_format == "split" else side.packed.use(chains[1].id, 1, slots=2)
    if isinstance(side.ring, RawSplitDevice):
        side.ring.used_idx = 2
        side.ring.set_used_element(2, chains[1].id, 1)
        side.ring.used_idx = 3
    else:
        side.ring.use(chains[1].id, 1)
    assert side.take(path) == [PAYLOAD, 1]
    side.breaks(path, chains[1].id)


def test_driver_14_a_run_does_not_reach_what_was_not_published(ring_format: str) -> None:
    side = in_order(ring_format)
    side.add("token", 2)
    side.add("token", 2, publish=False)
    hidden = 3  # the fourth chain's head or id, as ring order makes them
    if isinstance(side.ring, RawSplitDevice):
        side.ring.set_used_element(0, hidden, 0)
        side.ring.used_idx = 4
        side.breaks("token", 4, 2)
    else:
        side.ring.use(hidden, 0)
        side.breaks("token", hidden)


def test_driver_14_packed_a_run_to_the_middle_of_a_list_breaks_the_queue() -> None:
    side = in_order("packed")
    for number in range(2):
        side.queue.add(number, writable=[(BUFFERS, 8)] * 3)
    side.queue.publish()
    first, second = side.available()
    middle = next(id for id in range(SIZE) if id not in (first.id, second.id))
    side.packed.use(middle, 0)
    side.breaks("token", middle)


@pytest.mark.parametrize("size", [3, 5, 8])
def test_driver_14_packed_runs_go_round_rings_of_any_size(size: int) -> None:
    side = in_order("packed", size=size)
    token = 0
    for lap in range(40):
        lengths = [1 + (lap + number) % 2 for number in range(max(1, size // 2))]
        for length in lengths:
            side.queue.add(token, writable=[(BUFFERS, 8)] * length)
            token += 1
        side.queue.publish()
        chains = side.available()
        side.packed.use(chains[-1].id, 3, slots=sum(lengths))
        used = side.queue.pop_used()
        first = token - len(lengths)
        assert used == [(first + number, 8 * length if number + 1 < len(lengths) else 3) for number, length in enumerate(lengths)]
