"""Defects that other drivers and devices had, each kept away by a test: numbers that wrap, and notifications that get lost."""

from itertools import product

import numpy as np
import pytest

from tests.hostile.sides import BASE, BUFFERS, PAYLOAD, DeviceSide, DriverSide, features
from virtio import BufferPool, DeviceQueue, DriverQueue, EventFd, Feature, GuestMemory, Memory, need_event
from virtio.devices.rng import RngDevice, RngDriver
from virtio.spec import RingEvent
from virtio.testing import PackedEvent, RawSplitDevice
from virtio.transport.loopback import LoopbackTransport

SIZES = {"split": 256, "packed": 255}


class Pair:
    """Both ends of one queue in one process, with bursts."""

    def __init__(self, ring_format: str, *more: Feature, size: int | None = None) -> None:
        self.size = size or SIZES[ring_format]
        self.memory, self.guest = Memory(1 << 21), GuestMemory()
        self.guest.add(BASE, self.memory)
        bits = features(ring_format, *more)
        self.driver = DriverQueue(self.memory, self.size, features=bits, address=BASE)
        self.device = DeviceQueue(self.guest, self.size, self.driver.areas, features=bits)
        self.doorbell, self.interrupt = EventFd(), EventFd()
        self.driver.connect(self.doorbell)
        self.device.connect(self.interrupt)
        self.pool = BufferPool(self.memory, 2 * self.size, slot_size=128)
        self.burst = self.pool.burst(self.size)
        self.batch = self.device.batch(self.size)

    def run(self, count: int) -> None:
        """`count` readable buffers of different lengths go to the device and come back."""
        assert self.pool.take(self.burst) == self.size
        self.burst.count = count
        self.burst.lengths[:count] = lengths = 1 + np.arange(count) % 60
        assert self.driver.add_burst(self.burst) == count
        assert self.device.pop_batch(self.batch) == count
        assert (self.batch.readable[:count] == lengths).all()
        assert self.device.complete_batch(self.batch) == count
        assert self.driver.pop_used_burst(self.burst) == count


@pytest.mark.parametrize("in_order", [False, True])
def test_indexes_wrap_three_times(ring_format: str, in_order: bool) -> None:
    """An index reduced modulo 0xFFFF fails after 65,534 buffers, one that is never reduced after 65,536."""
    pair = Pair(ring_format, *([Feature.IN_ORDER] if in_order else []))
    done = 0
    for count in [pair.size] * (200_000 // pair.size + 1):
        pair.run(count)
        done += count
        assert pair.driver.outstanding == pair.device.outstanding == 0
    assert done >= 200_000
    assert pair.driver.counters["used"] == pair.device.counters["used"] == done
    if ring_format == "split":
        assert pair.driver.snapshot()["shared"]["avail.idx"] == done % 65536
        assert pair.device.base == done % 65536


def test_every_buffer_around_the_wrap_of_an_index_comes_back_by_itself(ring_format: str) -> None:
    pair = Pair(ring_format)
    for _ in range(65_500 // pair.size):
        pair.run(pair.size)
    for _ in range(300):
        pair.run(1)
    for count in range(1, 60):
        pair.run(count)


@pytest.mark.parametrize("others", [32760, 32766, 32767, 32768, 65530, 65534, 65535, 65536, 131072])
def test_a_chain_that_stays_out_while_numbers_go_round_comes_back(ring_format: str, others: int) -> None:
    """However many came and went meanwhile, it is outstanding, and never taken for one that was only added."""
    size = SIZES[ring_format]
    pair = Pair(ring_format, size=size)
    driver, device = pair.driver, pair.device
    driver.add("slow", writable=[(BASE, 8)])
    driver.publish()
    (slow,) = device.pop()
    done, others = 0, others - size // 2
    while done < others:
        count = min(size - 1, others - done)
        for number in range(count):
            driver.add(number, writable=[(BASE, 8)])
        driver.publish()
        assert device.pop_batch(pair.batch) == device.complete_batch(pair.batch) == count
        assert len(driver.pop_used()) == count
        done += count
    for number in range(size - 1):
        driver.add(number, writable=[(BASE, 8)])  # shown to nobody
    device.complete(slow, 8)
    device.publish()
    assert driver.pop_used() == [("slow", 8)]
    assert driver.outstanding == size - 1 and driver.broken is None


@pytest.mark.parametrize("event_idx", [False, True])
def test_notifications_do_not_stop_when_both_sides_sleep_each_time(ring_format: str, event_idx: bool) -> None:
    """A used_event that never moves stops interrupts after the first lap of the index; so does an avail_event."""
    pair = Pair(ring_format, *([Feature.EVENT_IDX] if event_idx else []), size=64)
    assert not pair.device.arm() and not pair.driver.arm()
    done = 0
    while done < 3 * 65536:
        count = 1 + done % 64
        pair.run(count)
        done += count
        assert pair.doorbell.drain() == 1, f"after {done}: the device asked for it, and sleeps"
        assert pair.interrupt.drain() == 1, f"after {done}: the driver asked for it, and sleeps"
        assert not pair.device.arm() and not pair.driver.arm()


@pytest.mark.parametrize("event_idx", [False, True])
def test_no_notification_comes_while_both_sides_poll(ring_format: str, event_idx: bool) -> None:
    pair = Pair(ring_format, *([Feature.EVENT_IDX] if event_idx else []), size=64)
    pair.run(1)  # the first decision of the device notifies
    done = 0
    while done < 2 * 65536:
        pair.driver.disarm()
        pair.device.disarm()
        pair.doorbell.drain(), pair.interrupt.drain()
        count = 1 + done % 64
        pair.run(count)
        done += count
        assert pair.doorbell.drain() == 0 and pair.interrupt.drain() == 0, f"after {done}"


@pytest.mark.parametrize("event", range(65528, 65535))
def test_a_batch_of_eight_over_the_wrap_passes_each_event(event: int) -> None:
    """The test `avail_idx >= avail_event + 1` on wrapping numbers misses these."""
    assert need_event(event, (event + 8) % 65536, event)
    assert need_event(event, 6, 65528) and not need_event(event, event, 65520)


def test_need_event_is_the_range_test() -> None:
    for old, count, offset in product((0, 1, 32767, 32768, 65528, 65535), (1, 2, 8, 32768), (-9, -1, 0, 1, 7, 8, 32767)):
        assert need_event((old + offset) % 65536, (old + count) % 65536, old) is (0 <= offset < count)
    for old in (0, 5, 65535):
        assert not any(need_event(event, old, old) for event in (old, (old + 1) % 65536, (old - 1) % 65536)), "nothing was published"


# The driver's decisions, which are the device's turned round (2.7.10, 2.8.10).


def publish(side: DriverSide, count: int, slots: int = 1) -> bool:
    """Adds `count` chains and publishes once; a device takes them back at once, without a word."""
    for number in range(count):
        side.queue.add(number, writable=[(BUFFERS + PAYLOAD * place, PAYLOAD) for place in range(slots)])
    side.doorbell.drain()
    notified = side.queue.publish()
    assert side.doorbell.drain() == notified
    for chain in side.available():
        side.use(chain)
    assert len(side.queue.pop_used()) == count
    return notified


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_a_driver_notifies_if_the_event_lies_in_what_it_published(batch: int) -> None:
    for ahead in range(-9, 10):
        side = DriverSide("split", Feature.EVENT_IDX)
        for _ in range(3):
            publish(side, 8)
        side.split.avail_event = 24 + ahead
        assert publish(side, batch) is (0 <= ahead < batch)


@pytest.mark.parametrize("size", [5, 8])
@pytest.mark.parametrize("slots", [1, 2, 3])
def test_a_drivers_chain_cannot_step_over_the_event_offset(size: int, slots: int) -> None:
    for start, ahead in product(range(2 * size), range(-size, size)):
        side = DriverSide("packed", Feature.EVENT_IDX, size=size)
        for _ in range(start):
            publish(side, 1)
        position, wrap = side.packed.step(0, 1, (start + ahead) % (2 * size))
        side.packed.device_event = PackedEvent(RingEvent.DESC, position, wrap)
        batch = 1 + start % (size // slots)
        assert publish(side, batch, slots) is (0 <= ahead < batch * slots), f"event {ahead} from {start}, {batch} chains of {slots}"


def test_a_driver_understands_the_devices_flags(ring_format: str) -> None:
    side = DriverSide(ring_format)
    assert publish(side, 1)
    if isinstance(side.ring, RawSplitDevice):
        for flags, expected in ((1, False), (0, True), (1, False)):
            side.ring.used_flags, side.ring.avail_event = flags, side.ring.avail_idx
            assert publish(side, 2) is expected
        side = DriverSide(ring_format, Feature.EVENT_IDX)
        for flags in (1, 0xFFFF, 0):
            side.split.used_flags, side.split.avail_event = flags, side.split.avail_idx
            assert publish(side, 2), "flags mean nothing with EVENT_IDX"
            assert not publish(side, 2)
        return
    for event in (PackedEvent(3, 0, 1), PackedEvent(RingEvent.DESC, 0, 1), PackedEvent(RingEvent.DESC, 0x7FFF, 0)):
        side.packed.device_event = PackedEvent(RingEvent.DISABLE)
        assert not publish(side, 2)
        side.packed.device_event = event
        assert publish(side, 2), "what makes no sense means: notify"
    side = DriverSide(ring_format, Feature.EVENT_IDX)
    for offset in (8, 9, 0x7FFF):
        for wrap in (0, 1):
            side.packed.device_event = PackedEvent(RingEvent.DESC, offset, wrap)
            assert publish(side, 1)


@pytest.mark.parametrize("event_idx", [False, True])
def test_a_drivers_flags_stay_0_with_event_idx(ring_format: str, event_idx: bool) -> None:
    side = DriverSide(ring_format, *([Feature.EVENT_IDX] if event_idx else []))
    taken = 0
    for _ in range(20):
        side.queue.disarm()
        if isinstance(side.ring, RawSplitDevice):
            assert side.ring.avail_flags == (0 if event_idx else 1)
            if event_idx:
                assert (side.ring.used_event - taken) % 65536 > side.ring.size
        else:
            assert side.packed.driver_event.flags == RingEvent.DISABLE
        assert side.queue.arm() is False
        if isinstance(side.ring, RawSplitDevice):
            assert side.ring.avail_flags == 0
            assert not event_idx or side.ring.used_event == taken
        else:
            expected = (RingEvent.DESC, side.packed.position, side.packed.wrap)
            assert side.packed.driver_event == expected if event_idx else side.packed.driver_event.flags == RingEvent.ENABLE
        publish(side, 3)
        taken = (taken + 3) % 65536


def test_an_empty_publish_of_a_driver_stores_and_tells_nothing(ring_format: str) -> None:
    side = DriverSide(ring_format)
    publish(side, 2)
    if isinstance(side.ring, RawSplitDevice):
        side.ring.avail_idx = 0xBEEF
    before = side.memory.read(0, 0x1_0000)
    assert side.queue.publish() is False and side.doorbell.drain() == 0
    assert side.memory.read(0, 0x1_0000) == before


def test_a_drivers_batch_is_seen_at_once_or_not_at_all(ring_format: str) -> None:
    side = DriverSide(ring_format)
    for lap in range(10):
        for number in range(1 + lap % 4):
            side.queue.add(number, writable=[(BUFFERS, 8)] * 2)
            assert side.available() == []
        side.queue.publish()
        chains = side.available()
        assert len(chains) == 1 + lap % 4
        for chain in chains:
            side.use(chain)
        side.queue.pop_used()


def test_what_is_optional_is_not_demanded(ring_format: str) -> None:
    """A driver that wants everything works with a device that has nothing; and a device that offers a feature has it."""
    with LoopbackTransport(RngDevice(offered=())) as transport, RngDriver(transport) as rng:
        assert len(rng.read(100)) == 100 and rng.features == {Feature.VERSION_1}
    for bit in sorted(RngDevice().offered):
        wanted = features(ring_format) | {bit}
        with LoopbackTransport(RngDevice()) as transport, RngDriver(transport, wanted=wanted) as rng:
            assert bit in rng.features and len(rng.read(100)) == 100


def test_ring_words_are_never_cleared_on_their_way() -> None:
    """`struct.pack_into` clears before it writes; whoever reads in between sees 0. A store here is one store."""
    side = DeviceSide("split")
    guest = side.guest
    for value in (0x0101, 0xFF00, 0x00FF, 0xFFFF):
        guest.store(side.ring.areas[1] + 2, 2, value)
        assert guest.load(side.ring.areas[1] + 2, 2) == value
    for width, address in ((2, 1), (4, 2), (8, 4)):
        with pytest.raises(ValueError, match=rf"{BASE + address:#x}|\b{address}\b"):
            guest.store(BASE + address, width, 0)
