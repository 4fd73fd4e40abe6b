"""A hostile driver around what a device publishes: positions, order, and who is told (device-17 to device-20)."""

from itertools import product

import pytest

from tests.hostile.sides import BASE, BUFFERS, PAYLOAD, DeviceSide, raises_once
from virtio import Feature, SpecViolation
from virtio.errors import MalformedChain
from virtio.spec import RingEvent
from virtio.testing import PackedEvent, RawPackedDriver, RawSplitDriver
from virtio.testing.packed import used_flags

SIZE = 8
EVENT_IDX = Feature.EVENT_IDX


def serve(side: DeviceSide, count: int, slots: int = 1, *, publish: bool = True) -> bool:
    """Makes `count` chains available, completes them all, and publishes once; tells whether the driver was notified."""
    side.offer(*[[(BUFFERS + PAYLOAD * number, PAYLOAD, False) for number in range(slots)] for _ in range(count)])
    taken = 0
    while chains := side.queue.pop():
        for chain in chains:
            side.queue.complete(chain)
            taken += 1
    assert taken == count
    if not publish:
        return False
    side.interrupt.drain()
    notified = side.queue.publish()
    assert side.interrupt.drain() == notified, "the answer, and what was signalled, are one"
    assert len(side.ring.used()) == count
    return notified


def at(start: int, *more: Feature, size: int = SIZE) -> DeviceSide:
    """A split queue at some position, whose first decision is behind it."""
    side = DeviceSide("split", *more, size=size)
    side.split.avail_idx = side.split.used_idx = side.split.used_position = start - 1
    side.split.next_descriptor = (start - 1) % size
    side.restart(base=(start - 1) % 65536)
    assert serve(side, 1)
    return side


# device-17


def test_device_17_positions_are_not_read_back(ring_format: str) -> None:
    side = DeviceSide(ring_format, size=SIZE)
    for number in range(5 * SIZE):
        (name,) = side.offer([(BUFFERS, PAYLOAD, True)])
        (chain,) = side.queue.pop()
        if isinstance(side.ring, RawSplitDriver):
            side.ring.used_idx = 40000 + number
            for position in range(SIZE):
                side.ring.set_used_element(position, 0xFFFF_FFFF, 0xFFFF_FFFF)
        else:
            for position in range(SIZE):  # what stands there may be scribbled over: only what is available counts
                side.packed.set_descriptor(position, 0, 0, 0xFFFF, used_flags(side.packed.used_wrap ^ 1))
        side.queue.complete(chain, number % 17)
        side.queue.publish()
        if isinstance(side.ring, RawSplitDriver):
            assert side.ring.used_idx == number + 1
            assert side.ring.used_element(number) == (name, number % 17)
            side.ring.used_position = number + 1
        else:
            assert side.packed.used()[0] == (name, number % 17)
    assert side.queue.broken is None


@pytest.mark.parametrize("base", [0, 1, 7, 8, 32768, 65535])
def test_device_17_a_restored_split_queue_reads_the_used_index_once_and_checks_it(base: int) -> None:
    side = DeviceSide("split", size=SIZE)
    for behind in (0, 1, SIZE - 1, SIZE):
        side.split.used_idx = base - behind
        side.split.avail_idx = base
        side.restart(base=base)
        assert side.queue.base == base and side.queue.pop() == []
        side.split.used_idx = 12345
        side.split.used_position = base - behind
        side.split.next_descriptor = base % SIZE
        assert serve(side, 1), "and the first decision notifies"
        assert side.split.used_idx == (base - behind + 1) % 65536
    for behind in (SIZE + 1, SIZE + 2, 32768, 65535):
        side.split.used_idx = base - behind
        with pytest.raises(SpecViolation) as caught:
            side.restart(base=base)
        raises_once(MalformedChain, caught.value, "split", [base, behind, (base - behind) % 65536, SIZE])


@pytest.mark.parametrize("base", [-1, 65536, 1 << 32])
def test_device_17_a_split_base_is_an_index(base: int) -> None:
    side = DeviceSide("split", size=SIZE)
    with pytest.raises(ValueError, match=str(base)):
        side.restart(base=base)


@pytest.mark.parametrize("size", [5, 8, 4095])
def test_device_17_a_packed_base_names_places_in_the_ring(size: int) -> None:
    side = DeviceSide("packed", size=size)
    assert side.queue.base == 0x8000_8000, "both start at 0 with a wrap counter of 1"
    for avail, used in ((size, 0), (0, size), (0x7FFF, 0), (0, 0x7FFF)):
        with pytest.raises(ValueError, match=str(max(avail, used))):
            side.restart(base=avail | used << 16)
    for base in (-1, 1 << 32):
        with pytest.raises(ValueError, match=str(base)):
            side.restart(base=base)
    side.restart(base=(size - 1) | (size - 1 | 0x8000) << 16)
    assert side.queue.base == (size - 1) | (size - 1 | 0x8000) << 16


def test_device_17_a_restored_queue_goes_on_where_the_saved_one_was(ring_format: str) -> None:
    side = DeviceSide(ring_format, size=SIZE)
    for number in range(50):
        serve(side, 1 + number % 3)
        base = side.queue.base
        side.queue.close()
        assert side.queue.base == base
        side.restart(base=base)
        assert side.queue.broken is None
        assert serve(side, 1), "the first decision after a restore notifies"


@pytest.mark.parametrize("event_idx", [False, True])
def test_device_17_the_first_decision_notifies_whatever_the_driver_asks_for(ring_format: str, event_idx: bool) -> None:
    side = DeviceSide(ring_format, *([EVENT_IDX] if event_idx else []), size=SIZE)
    if isinstance(side.ring, RawPackedDriver):
        side.ring.driver_event = PackedEvent(RingEvent.DISABLE)
    else:
        side.ring.avail_flags, side.ring.used_event = 1, 1000
    assert serve(side, 1)
    assert not serve(side, 1)


# device-18


def test_device_18_nothing_is_seen_before_it_is_published_and_then_all_of_it(ring_format: str) -> None:
    side = DeviceSide(ring_format, size=SIZE)
    for lap in range(10):
        count = 1 + lap % SIZE
        names = side.offer(*[[(BUFFERS, PAYLOAD, True)]] * count)
        chains = side.queue.pop()
        for number, chain in enumerate(chains):
            side.queue.complete(chain, number)
            assert side.ring.used() == []
        side.queue.publish()
        assert side.ring.used() == [(name, number) for number, name in enumerate(names)]


def test_device_18_what_was_completed_is_there_when_the_index_says_so(ring_format: str) -> None:
    """Elements stand in memory before the one store that shows them: they are there, unpublished."""
    side = DeviceSide(ring_format, size=SIZE)
    names = side.offer(*[[(BUFFERS, PAYLOAD, True)]] * 3)
    chains = side.queue.pop()
    for number, chain in enumerate(chains):
        side.queue.complete(chain, 1 + number)
    if isinstance(side.ring, RawSplitDriver):
        assert [side.ring.used_element(number) for number in range(3)] == [(name, 1 + number) for number, name in enumerate(names)]
        assert side.ring.used_idx == 0
    else:
        later = [side.packed.descriptor(number) for number in (1, 2)]
        assert [(each.id, each.length) for each in later] == [(names[1], 2), (names[2], 3)]
        assert side.packed.descriptor(0).flags & used_flags(1) != used_flags(1), "the first one's flags come last"


def test_device_18_an_empty_publish_stores_and_tells_nothing(ring_format: str) -> None:
    side = DeviceSide(ring_format, size=SIZE)
    serve(side, 1)
    side.interrupt.drain()
    if isinstance(side.ring, RawSplitDriver):
        side.ring.used_idx = 0xBEEF
    before = side.memory.read(0, 0x1_0000)
    for _ in range(3):
        assert side.queue.publish() is False
    assert side.memory.read(0, 0x1_0000) == before
    assert side.interrupt.drain() == 0


# device-19


@pytest.mark.parametrize("start", [1, 4, 65520, 65528, 65529, 65535, 65536])
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_device_19_an_event_within_the_batch_is_told_one_outside_is_not(start: int, batch: int) -> None:
    for offset in range(-10, 11):
        side = at(start, EVENT_IDX)
        side.split.used_event = start + offset
        assert serve(side, batch) is (0 <= offset < batch), f"event {start + offset}, published {start}..{start + batch}"


@pytest.mark.parametrize("event", range(65528, 65535))
def test_device_19_a_batch_of_eight_over_the_wrap_is_not_missed(event: int) -> None:
    """The test `used_idx >= used_event + 1` on wrapping numbers misses these."""
    side = at(event, EVENT_IDX)
    side.split.used_event = event
    assert serve(side, 8)


def test_device_19_an_event_passed_since_the_last_decision_counts() -> None:
    """A driver that was told of a batch arms late: what was decided before is behind it."""
    side = at(65530, EVENT_IDX)
    side.split.used_event = 65531
    assert serve(side, 1) is False
    assert serve(side, 1) is True
    assert serve(side, 1) is False
    side.split.used_event = 65532
    assert serve(side, 1) is False, "65532 was published and decided already"


@pytest.mark.parametrize("size", [5, 8])
@pytest.mark.parametrize("slots", [1, 2, 3])
def test_device_19_packed_ranges_run_over_slots(size: int, slots: int) -> None:
    """A chain of several slots cannot step over the event offset."""
    count = size // slots
    for start, ahead in product(range(2 * size), range(-size, size)):
        side = DeviceSide("packed", EVENT_IDX, size=size)
        side.packed.driver_event = PackedEvent(RingEvent.DISABLE)
        for _ in range(max(start, 1)):
            serve(side, 1)
        begin = max(start, 1)
        position, wrap = side.packed.step(0, 1, (begin + ahead) % (2 * size))
        side.packed.driver_event = PackedEvent(RingEvent.DESC, position, wrap)
        batch = 1 + start % count
        assert serve(side, batch, slots) is (0 <= ahead < batch * slots), f"event {ahead} from {begin}, {batch} chains of {slots}"


def test_device_19_many_publishes_between_two_decisions_of_a_full_lap() -> None:
    side = DeviceSide("packed", EVENT_IDX, size=5)
    serve(side, 1)
    for event in range(5):
        position, wrap = side.packed.step(side.packed.used_position, side.packed.used_wrap, event)
        side.packed.driver_event = PackedEvent(RingEvent.DESC, position, wrap)
        assert serve(side, 5), "a whole lap passes every place in it"


# device-20


def test_device_20_no_interrupt_counts_without_event_idx() -> None:
    side = at(3)
    for flags, expected in ((1, False), (0, True), (0xFFFF, False), (0xFFFE, True)):
        side.split.avail_flags = flags
        side.split.used_event = side.split.used_idx  # means nothing
        assert serve(side, 2) is expected


def test_device_20_flags_mean_nothing_with_event_idx() -> None:
    side = at(3, EVENT_IDX)
    for flags in (0, 1, 0xFFFF):
        side.split.avail_flags = flags
        side.split.used_event = side.split.used_idx + 1
        assert serve(side, 2) is True
        assert serve(side, 2) is False


@pytest.mark.parametrize("event_idx", [False, True])
def test_device_20_flags_of_a_split_ring_stay_0_with_event_idx(event_idx: bool) -> None:
    side = DeviceSide("split", *([EVENT_IDX] if event_idx else []), size=SIZE)
    for number in range(20):
        side.queue.disarm()
        assert side.split.used_flags == (0 if event_idx else 1)
        if event_idx:
            parked = (side.split.avail_event - side.split.avail_idx) % 65536
            assert parked > SIZE, f"parked {parked} before the next entry, which would pass it"
        assert side.queue.arm() is False
        assert side.split.used_flags == 0
        if event_idx:
            assert side.split.avail_event == side.split.avail_idx, "the very next entry is told"
        serve(side, 1 + number % SIZE)


@pytest.mark.parametrize("event_idx", [False, True])
def test_device_20_the_packed_structure_is_written_as_it_may_be(event_idx: bool) -> None:
    side = DeviceSide("packed", *([EVENT_IDX] if event_idx else []), size=5)
    for number in range(20):
        side.queue.disarm()
        assert side.packed.device_event.flags == RingEvent.DISABLE
        assert side.queue.arm() is False
        event = side.packed.device_event
        assert event.flags == (RingEvent.DESC if event_idx else RingEvent.ENABLE), "DESC only with EVENT_IDX"
        if event_idx:
            assert (event.offset, event.wrap) == (side.packed.position, side.packed.wrap)
        serve(side, 1 + number % 5)


@pytest.mark.parametrize("event_idx", [False, True])
def test_device_20_packed_flags_that_make_no_sense_mean_notify(event_idx: bool) -> None:
    side = DeviceSide("packed", *([EVENT_IDX] if event_idx else []), size=5)
    serve(side, 1)
    side.packed.driver_event = PackedEvent(RingEvent.DISABLE)
    assert serve(side, 1) is False
    senseless = [PackedEvent(3, offset, wrap) for offset in (0, 4, 0x7FFF) for wrap in (0, 1)]
    senseless += [PackedEvent(RingEvent.DESC, offset, wrap) for offset in (5, 6, 0x7FFF) for wrap in (0, 1)]
    if not event_idx:
        senseless += [PackedEvent(RingEvent.DESC, offset, wrap) for offset in range(5) for wrap in (0, 1)]
    for event in senseless:
        side.packed.driver_event = event
        assert serve(side, 1) is True, f"{event}"
        assert side.queue.broken is None
    side.packed.driver_event = PackedEvent(RingEvent.ENABLE, 0x7FFF, 1)
    assert serve(side, 1) is True
    for reserved in range(2, 16):
        side.memory.store(side.ring.areas[1] - BASE, 4, (RingEvent.DISABLE | 1 << reserved) << 16)
        assert serve(side, 1) is False, "reserved bits mean nothing"


def test_device_20_a_driver_that_scribbles_over_the_devices_wishes_only_hurts_itself(ring_format: str) -> None:
    side = DeviceSide(ring_format, EVENT_IDX, size=SIZE)
    for value in (0, 0x1234_5678, 0xFFFF_FFFF):
        if isinstance(side.ring, RawSplitDriver):
            side.ring.used_flags, side.ring.avail_event = value & 0xFFFF, value >> 16
        else:
            side.memory.store(side.ring.areas[2] - BASE, 4, value)
        assert serve(side, 3) in (True, False) and side.queue.arm() is False


def test_device_20_a_queue_over_zeroed_memory_starts_with_notifications_on(ring_format: str) -> None:
    side = DeviceSide(ring_format, size=SIZE)
    assert serve(side, 1) and serve(side, 1)
