"""Both ends of a queue through the binding: chains with tokens, bursts and batches, in both formats."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.pair import BASE, PAYLOAD, Pair, fill, packets_of
from virtio import Chain, DeviceQueue, DriverQueue, EventFd, Feature, GuestMemory, Memory, QueueFull, StatusError, layout, need_event
from virtio._core import Burst, ChainBatch


class Token:
    """Something that can be watched."""


def test_a_token_travels_with_its_chain(ring_format: str) -> None:
    pair = Pair(ring_format)
    answer, token = pair.room(32), {"any": "object"}
    pair.driver.add(token, readable=[pair.place(b"hello "), pair.place(b"world")], writable=[answer])
    assert (pair.driver.free, pair.driver.outstanding, pair.device.pop()) == (5, 1, [])
    pair.driver.publish()
    (chain,) = pair.device.pop()
    assert isinstance(chain, Chain)
    assert (chain.readable, chain.writable, chain.completed) == (11, 32, False)
    assert [(length, writable) for _, length, writable in chain.segments] == [(6, False), (5, False), (32, True)]
    assert (chain.read(), chain.read(3, offset=5), chain.read(offset=11)) == (b"hello world", b" wo", b"")
    assert (chain.write(b"answer"), chain.write(bytearray(b"!"), offset=6)) == (6, 1)
    pair.device.complete(chain, 7)
    assert chain.completed
    assert pair.driver.pop_used() == []
    pair.device.publish()
    ((returned, length),) = pair.driver.pop_used()
    assert returned is token and length == 7 and pair.look(answer)[:8] == b"answer!\0"
    assert (pair.driver.free, pair.driver.outstanding, pair.device.outstanding) == (8, 0, 0)


def test_many_chains_wrap_and_lengths_belong_to_them(ring_format: str) -> None:
    pair = Pair(ring_format, 8)
    segments = [pair.room(64) for _ in range(8)]
    for lap in range(200):
        for number in range(1 + lap % 7):
            pair.driver.add((lap, number), writable=[segments[number]])
        pair.driver.publish()
        chains = pair.device.pop()
        for number, chain in reversed(list(enumerate(chains))):
            pair.device.complete(chain, number)
        pair.device.publish()
        assert sorted(pair.driver.pop_used()) == [((lap, number), number) for number in range(1 + lap % 7)]
    assert pair.driver.counters["used"] == pair.device.counters["popped"] == pair.device.counters["used"] == pair.driver.counters["added"]


def test_limits_are_kept(ring_format: str) -> None:
    pair = Pair(ring_format)
    for token in range(5):
        pair.driver.add(token, readable=[pair.place(b"x")])
    pair.driver.publish()
    assert pair.device.pop(0) == []
    chains = [*pair.device.pop(2), *pair.device.pop(limit=10)]
    assert len(chains) == 5
    for chain in chains:
        pair.device.complete(chain)
    pair.device.publish()
    assert pair.driver.pop_used(0) == []
    assert [token for token, _ in [*pair.driver.pop_used(3), *pair.driver.pop_used()]] == list(range(5))


def test_a_full_queue_says_so_and_takes_nothing(ring_format: str) -> None:
    pair = Pair(ring_format, 4)
    segment = pair.place(b"x")
    pair.driver.add("three", readable=[segment] * 3)
    with pytest.raises(QueueFull, match="needs 2 descriptors, 1 are free"):
        pair.driver.add("two", readable=[segment] * 2)
    assert (pair.driver.outstanding, pair.driver.free) == (1, 1)


def test_indirect_chains_take_one_descriptor(ring_format: str) -> None:
    pair = Pair(ring_format, 8, Feature.INDIRECT_DESC)
    for number in range(8):
        pair.driver.add(number, readable=[pair.place(bytes([number, part])) for part in range(7)], writable=[pair.room(9)], indirect=True)
    assert pair.driver.free == 0
    pair.driver.publish()
    chains = []
    while popped := pair.device.pop():
        chains += popped
    assert [chain.read() for chain in chains] == [bytes(byte for part in range(7) for byte in (number, part)) for number in range(8)]
    assert all(len(chain.segments) == 8 for chain in chains)


def test_in_order_completions_come_back_in_order(ring_format: str) -> None:
    pair = Pair(ring_format, 8, Feature.IN_ORDER)
    for number in range(6):
        pair.driver.add(number, readable=[pair.place(b"x")])
    pair.driver.publish()
    for chain in pair.device.pop():
        pair.device.complete(chain)
    pair.device.publish()
    assert [token for token, _ in pair.driver.pop_used()] == list(range(6))


def test_rewound_chains_come_again(ring_format: str) -> None:
    pair = Pair(ring_format)
    for number in range(4):
        pair.driver.add(number, readable=[pair.place(bytes([number]))])
    pair.driver.publish()
    chains = pair.device.pop()
    pair.device.rewind(2)
    assert [chain.completed for chain in chains] == [False, False, True, True]
    with pytest.raises(StatusError, match="not in flight"):
        chains[3].read()
    assert [chain.read() for chain in pair.device.pop()] == [b"\2", b"\3"]
    assert pair.device.counters["popped"] == 4
    pair.device.complete(chains[1])
    with pytest.raises(ValueError, match="5 chains cannot be handed back"):
        pair.device.rewind(5)


@pytest.mark.parametrize("event_idx", [False, True])
def test_notifications_come_when_they_are_asked_for(ring_format: str, event_idx: bool) -> None:
    pair = Pair(ring_format, 8, *([Feature.EVENT_IDX] if event_idx else []))
    doorbell, interrupt = EventFd(), EventFd()
    pair.driver.connect(doorbell)
    pair.device.connect(interrupt)
    segment = pair.place(b"x")

    def send() -> bool:
        pair.driver.add("token", readable=[segment])
        wanted = pair.driver.publish()
        assert wanted == bool(doorbell.drain())
        return wanted

    def serve() -> bool:
        for chain in pair.device.pop():
            pair.device.complete(chain)
        wanted = pair.device.publish()
        assert wanted == bool(interrupt.drain())
        pair.driver.pop_used()
        return wanted

    assert not pair.device.arm() and not pair.driver.arm()
    assert send() and serve()
    pair.device.disarm()
    pair.driver.disarm()
    assert not send() and pair.device.arm() and not serve()
    assert not pair.driver.arm() and not pair.device.arm()
    assert send() and serve()
    assert not pair.driver.publish() and not pair.device.publish(), "nothing new"
    pair.driver.connect(None)
    pair.device.arm()
    pair.driver.add("token", readable=[segment])
    assert pair.driver.publish() and not doorbell.drain(), "wanted, but nobody is connected"
    counters = pair.driver.counters
    assert (counters["notified"], counters["suppressed"]) == (3, 1)


def test_reset_gives_the_tokens_back(ring_format: str) -> None:
    pair = Pair(ring_format)
    tokens = [Token() for _ in range(3)]
    watched = [weakref.ref(token) for token in tokens]
    for token in tokens:
        pair.driver.add(token, readable=[pair.place(b"x")])
    pair.driver.publish()
    counters = pair.driver.counters
    returned = pair.driver.reset()
    assert {id(token) for token in returned} == {id(token) for token in tokens}
    assert (pair.driver.reset(), pair.driver.counters, pair.driver.broken) == ([], counters, None)
    del token, tokens, returned
    assert [reference() for reference in watched] == [None] * 3
    with pytest.raises(StatusError, match="the queue is closed"):
        pair.driver.publish()


def test_tokens_die_with_the_queue_even_in_a_circle(ring_format: str) -> None:
    pair = Pair(ring_format)
    dropped, circle = Token(), Token()
    pair.driver.add(dropped, readable=[pair.place(b"x")])
    watched = weakref.ref(dropped)
    del dropped
    pair.driver.close()
    assert watched() is None

    queue = DriverQueue(pair.memory, 8)
    circle.queue = queue  # type: ignore[attr-defined]
    queue.add(circle, readable=[(0, 1)])
    watched = weakref.ref(circle)
    del queue, circle
    gc.collect()
    assert watched() is None


def test_close_frees_the_areas(ring_format: str) -> None:
    features = [Feature.RING_PACKED] if ring_format == "packed" else []
    with Memory(1 << 16) as memory:
        for _ in range(100):
            queue = DriverQueue(memory, 256, features=sum(1 << bit for bit in (*features, Feature.INDIRECT_DESC)), indirect_limit=4)
            queue.close()
            queue.close()
        for _ in range(100):
            DriverQueue(memory, 256, features=sum(1 << bit for bit in features))
        assert memory.allocate(1 << 16) == 0
        memory.free(0)


def test_what_stays_after_close(ring_format: str) -> None:
    pair = Pair(ring_format)
    pair.driver.add("token", readable=[pair.place(b"x")])
    pair.driver.publish()
    (chain,) = pair.device.pop()
    base = pair.device.base
    pair.device.close()
    pair.device.close()
    assert (pair.device.base, pair.device.counters["popped"], pair.device.broken, pair.device.size) == (base, 1, None, 8)
    assert chain.completed
    uses: list[Callable[[], object]] = [pair.device.pop, pair.device.snapshot, pair.device.arm, chain.read, lambda: pair.device.outstanding]
    uses += [pair.driver.snapshot, lambda: pair.driver.free, lambda: pair.driver.add(1, readable=[(BASE, 1)])]
    pair.driver.close()
    assert (pair.driver.counters["added"], pair.driver.areas[0] >= BASE, pair.driver.ring_format) == (1, True, ring_format)
    for use in uses:
        with pytest.raises(StatusError, match="the queue is closed"):
            use()


def test_a_ring_resumes_from_its_base(ring_format: str) -> None:
    pair = Pair(ring_format, 4)
    segment = pair.place(b"x")
    for lap in range(11):
        pair.driver.add(lap, readable=[segment])
        pair.driver.publish()
        (chain,) = pair.device.pop()
        pair.device.complete(chain)
        pair.device.publish()
        assert pair.driver.pop_used() == [(lap, 0)]
        base = pair.device.base
        pair.device.close()
        pair.device = DeviceQueue(pair.guest, 4, pair.driver.areas, features=pair.features, base=base)
        assert pair.device.base == base


def test_packets_go_through_bursts(ring_format: str) -> None:
    pair = Pair(ring_format, 8)
    tx, rx, back = pair.pool.burst(8), pair.far.burst(8), pair.pool.burst(8)
    for lap in range(50):
        sent = [bytes([lap, number]) * (1 + 7 * number) for number in range(1 + lap % 8)]
        fill(tx, sent)
        assert (pair.driver.add_burst(tx), tx.count, pair.driver.outstanding) == (len(sent), 0, len(sent))
        assert (pair.device.pop_burst(rx), packets_of(rx)) == (len(sent), sent)
        assert (pair.driver.pop_used_burst(back), pair.device.complete_burst(rx)) == (0, len(sent))
        assert (pair.driver.pop_used_burst(back), back.count) == (len(sent), len(sent))
        assert not back.lengths[: back.count].any()
    for burst in (tx, back):
        pair.pool.give(burst)
    assert (pair.pool.available, pair.far.available, pair.pool.drops, pair.far.drops) == (64, 64, 0, 0)


def test_one_length_for_all_rows_stands_for_the_column(ring_format: str) -> None:
    pair = Pair(ring_format, 4)
    tx, rx, back = pair.pool.burst(6), pair.far.burst(6), pair.pool.burst(6)
    fill(tx, [bytes([number]) * 9 for number in range(6)])
    tx.lengths[:] = 0  # not looked at
    assert (pair.driver.add_burst(tx, 5), list(tx.lengths[: tx.count])) == (4, [5, 5])
    assert (pair.driver.add_burst(tx, length=7), list(tx.lengths[: tx.count])) == (0, [7, 7])
    assert (pair.device.pop_burst(rx), packets_of(rx)) == (4, [bytes([number]) * 5 for number in range(4)])
    assert (pair.device.complete_burst(rx), pair.driver.pop_used_burst(back)) == (4, 4)
    assert (pair.driver.add_burst(tx), pair.device.pop_burst(rx), packets_of(rx)) == (2, 2, [b"\4" * 7, b"\5" * 7])
    # In a packet of several rows it is each row's.
    fill(tx, [b"a" * (PAYLOAD + 3)])
    assert (pair.driver.add_burst(tx, 3), pair.device.pop_burst(rx), packets_of(rx)) == (1, 1, [b"a" * 6])


@pytest.mark.parametrize("indirect", [False, True])
def test_long_packets_keep_their_rows_together(ring_format: str, indirect: bool) -> None:
    pair = Pair(ring_format, 8, *([Feature.INDIRECT_DESC] if indirect else []))
    tx, rx, back = pair.pool.burst(8), pair.far.burst(8), pair.pool.burst(8)
    sent = [b"a" * (2 * PAYLOAD + 1), b"b", b"c" * (3 * PAYLOAD)]
    fill(tx, sent)
    assert (pair.driver.add_burst(tx), pair.driver.free) == (3, 5 if indirect else 1)
    assert (pair.device.pop_burst(rx), rx.count, packets_of(rx)) == (3, 7, sent)
    assert (pair.device.complete_burst(rx), pair.driver.pop_used_burst(back)) == (3, 3)
    assert list(back.more[:7]) == [1, 1, 0, 0, 1, 1, 0]


def test_what_does_not_fit_stays_and_is_counted_if_nobody_sends_it(ring_format: str) -> None:
    pair = Pair(ring_format, 4)
    tx, rx = pair.pool.burst(16), pair.far.burst(16)
    sent = [bytes([number]) for number in range(6)]
    fill(tx, sent)
    assert (pair.driver.add_burst(tx), packets_of(tx), pair.driver.add_burst(tx)) == (4, sent[4:], 0)
    assert (pair.device.pop_burst(rx), pair.device.complete_burst(rx), pair.pool.drops) == (4, 4, 0)
    pair.driver.pop_used_burst(pair.pool.burst(4))
    assert pair.driver.add_burst(tx) == 2
    fill(tx, sent)
    assert pair.driver.add_burst(tx) == 2
    pair.pool.take(tx)
    assert pair.pool.drops == 4


def test_the_device_fills_what_was_posted(ring_format: str) -> None:
    pair = Pair(ring_format, 8)
    free, rx, tx = pair.pool.burst(4), pair.pool.burst(4), pair.far.burst(8)
    pair.pool.take(free)
    assert (pair.driver.add_writable_burst(free), free.count) == (4, 0)
    sent = [b"one", b"three", b"seven!!"]
    fill(tx, sent)
    assert (pair.device.fill_burst(tx), tx.count, pair.far.available) == (3, 0, 59), "five that were taken were not used"
    assert (pair.driver.pop_used_burst(rx), packets_of(rx)) == (3, sent)
    fill(tx, sent)
    assert (pair.device.fill_burst(tx), packets_of(tx)) == (1, sent[1:])


def test_a_posted_buffer_that_is_too_short_costs_one_packet(ring_format: str) -> None:
    pair = Pair(ring_format, 8)
    free, rx, tx = pair.pool.burst(4), pair.pool.burst(4), pair.far.burst(8)
    pair.pool.take(free)
    free.lengths[:2] = 5
    assert pair.driver.add_writable_burst(free) == 4
    fill(tx, [b"123456", b"12345", bytes(PAYLOAD + 1), b"last", b"waits"])
    assert (pair.device.fill_burst(tx), packets_of(tx), pair.device.outstanding) == (2, [b"waits"], 0)
    assert (pair.device.counters["used"], pair.device.counters["dropped"], pair.far.drops) == (4, 2, 2)
    assert (pair.driver.pop_used_burst(rx), list(rx.lengths)) == (4, [0, 5, 0, 4])


def test_slots_forwarded_to_another_queue_complete_their_chain(ring_format: str) -> None:
    left, right = Pair(ring_format), Pair(ring_format)
    tx, middle, free, rx = left.pool.burst(4), left.far.burst(4), right.pool.burst(4), right.pool.burst(4)
    fill(tx, [b"first", b"second"])
    left.driver.add_burst(tx)
    right.pool.take(free)
    right.driver.add_writable_burst(free)
    assert (left.device.pop_burst(middle), right.device.fill_burst(middle)) == (2, 2)
    assert (right.driver.pop_used_burst(rx), packets_of(rx)) == (2, [b"first", b"second"])
    assert left.device.complete_burst(middle) == 2


def test_what_no_burst_holds_is_dropped_and_counted(ring_format: str) -> None:
    pair = Pair(ring_format)
    tx, rx = pair.pool.burst(8), pair.far.burst(2)
    fill(tx, [b"l" * (3 * PAYLOAD), b"short"])
    pair.driver.add_burst(tx)
    assert (pair.device.pop_burst(rx), packets_of(rx), pair.device.counters["dropped"]) == (1, [b"short"], 1)


def test_batches_carry_descriptors_only(ring_format: str) -> None:
    pair = Pair(ring_format, 8)
    batch = pair.device.batch(6)
    assert (batch.capacity, batch.count, len(batch)) == (6, 0, 0)
    for number in range(8):
        pair.driver.add(number, readable=[pair.place(b"x" * (number + 1))], writable=[])
    pair.driver.publish()
    assert (pair.device.pop_batch(batch), batch.count) == (6, 6)
    assert list(batch.readable) == [1, 2, 3, 4, 5, 6] and not batch.writable.any() and not batch.used.any()
    assert (pair.device.complete_batch(batch), batch.count) == (6, 0)
    assert [token for token, _ in pair.driver.pop_used()] == list(range(6))
    assert (pair.device.pop_batch(batch), pair.device.pop_batch(batch), pair.device.complete_batch(batch)) == (2, 0, 2)

    pair.driver.pop_used()
    rooms = [pair.room(10 * number) for number in range(1, 6)]
    for number, room in enumerate(rooms):
        pair.driver.add(number, writable=[room])
    pair.driver.publish()
    assert pair.device.pop_batch(batch) == 5
    batch.used[:5] = batch.writable[:5] - 1
    batch.count = 2
    assert (pair.device.complete_batch(batch), batch.count, list(batch.writable[:3])) == (2, 3, [30, 40, 50])
    assert list(batch.used[:3]) == [29, 39, 49] and batch.used.dtype == np.int64 and batch.used is batch.used
    assert pair.driver.pop_used() == [(0, 9), (1, 19)]
    assert (pair.device.complete_batch(batch), pair.driver.pop_used()) == (3, [(2, 29), (3, 39), (4, 49)])


def with_six_chains(ring_format: str) -> tuple[Pair, ChainBatch]:
    """A batch that holds all chains of its queue, of 10, 20 to 60 writable bytes; their tokens are 0 to 5."""
    pair = Pair(ring_format, 8)
    batch = pair.device.batch(6)
    for number in range(6):
        pair.driver.add(number, writable=[pair.room(10 * (number + 1))])
    pair.driver.publish()
    assert pair.device.pop_batch(batch) == 6
    return pair, batch


def test_rewound_chains_leave_their_batch(ring_format: str) -> None:
    pair, batch = with_six_chains(ring_format)
    pair.device.rewind(4)
    assert (pair.device.pop_batch(batch), batch.count, list(batch.writable)) == (4, 6, [10, 20, 30, 40, 50, 60])
    batch.used[:] = batch.writable
    pair.device.rewind(2)
    assert (pair.device.complete_batch(batch), batch.count) == (4, 0)
    assert pair.driver.pop_used() == [(number, 10 * (number + 1)) for number in range(4)]
    assert (pair.device.pop_batch(batch), list(batch.writable[:2]), pair.device.complete_batch(batch)) == (2, [50, 60], 2)
    assert (pair.driver.pop_used(), pair.device.outstanding) == ([(4, 0), (5, 0)], 0)


def test_rewound_chains_that_were_not_meant_leave_their_batch(ring_format: str) -> None:
    pair, batch = with_six_chains(ring_format)
    batch.count = 1
    assert (pair.device.complete_batch(batch), batch.count) == (1, 5)
    batch.count = 2
    pair.device.rewind(2)
    assert (pair.device.complete_batch(batch), batch.count, list(batch.writable[:1])) == (2, 1, [40])
    assert (pair.device.pop_batch(batch), batch.count, list(batch.writable[:3])) == (2, 3, [40, 50, 60])


def test_tokens_and_bursts_do_not_mix(ring_format: str) -> None:
    pair = Pair(ring_format)
    burst, rx = pair.pool.burst(2), pair.far.burst(2)
    pair.driver.add("token", readable=[pair.place(b"x")])
    pair.driver.publish()
    fill(burst, [b"x"])
    for call in (pair.driver.add_burst, pair.driver.add_writable_burst, pair.driver.pop_used_burst):
        with pytest.raises(ValueError, match="1 chains with tokens are outstanding"):
            call(burst)
    (chain,) = pair.device.pop()
    pair.device.complete(chain)
    pair.device.publish()
    assert (pair.driver.pop_used(), pair.driver.add_burst(burst)) == ([("token", 0)], 1)
    for refused in (pair.driver.pop_used, lambda: pair.driver.add("token", readable=[pair.place(b"x")])):
        with pytest.raises(ValueError, match="1 chains of bursts are outstanding"):
            refused()
    assert (pair.device.pop_burst(rx), pair.device.complete_burst(rx), pair.driver.pop_used_burst(burst)) == (1, 1, 1)
    pair.driver.add("token", readable=[pair.place(b"x")])


def test_reset_sends_burst_slots_home(ring_format: str) -> None:
    pair = Pair(ring_format)
    tx, rx = pair.pool.burst(8), pair.far.burst(8)
    fill(tx, [b"a" * (2 * PAYLOAD), b"b"])
    pair.driver.add_burst(tx)
    pair.device.pop_burst(rx)
    pair.device.reset()
    pair.pool.give(tx)
    assert pair.pool.available == 61
    assert (pair.driver.reset(), pair.pool.available) == ([], 64)
    pair.far.give(rx)
    assert pair.far.available == 64


def test_chains_in_bursts_are_not_handed_back(ring_format: str) -> None:
    pair = Pair(ring_format)
    tx, rx = pair.pool.burst(2), pair.far.burst(2)
    fill(tx, [b"a", b"b"])
    pair.driver.add_burst(tx)
    pair.device.pop_burst(rx)
    with pytest.raises(ValueError, match="2 chains stand in bursts"):
        pair.device.rewind(1)


def test_a_region_taken_away_breaks_what_used_it(ring_format: str) -> None:
    pair, other = Pair(ring_format), Memory(4096)
    pair.driver.add("token", readable=[pair.place(b"x")])
    pair.driver.publish()
    (chain,) = pair.device.pop()
    pair.guest.remove(BASE)
    pair.guest.add(0, other)
    with pytest.raises(Exception, match="not all in mapped memory") as caught:
        chain.read()
    assert pair.device.broken is caught.value
    assert type(caught.value).__name__ == "MalformedChain"
    assert (pair.device.pop(), pair.device.publish(), pair.device.arm()) == ([], False, True)
    assert pair.memory.read(0, 1) is not None, "the ring itself stays mapped: the queue uses it"


def test_snapshots_show_shadows_beside_the_shared_state(ring_format: str) -> None:
    pair = Pair(ring_format)
    pair.driver.add("token", readable=[pair.place(b"x")])
    driver, device = pair.driver.snapshot(), pair.device.snapshot()
    assert driver["ring_format"] == device["ring_format"] == ring_format
    assert (driver["private"]["outstanding"], driver["private"]["free"], device["private"]["in_flight"]) == (1, 7, 0)
    assert driver["shared"] == device["shared"]
    if ring_format == "split":
        assert driver["shared"]["avail.idx"] == 0
        pair.driver.publish()
        assert pair.device.snapshot()["shared"]["avail.idx"] == 1


def test_sizes_of_all_kinds(ring_format: str) -> None:
    sizes = [1, 2, 256, 32768] + ([3, 7, 1000] if ring_format == "packed" else [])
    for size in sizes:
        pair = Pair(ring_format, size, memory_size=1 << 21)
        tx, rx = pair.pool.burst(1), pair.far.burst(1)
        for _ in range(5):
            fill(tx, [b"x"])
            assert (pair.driver.add_burst(tx), pair.device.pop_burst(rx), packets_of(rx)) == (1, 1, [b"x"])
            assert (pair.device.complete_burst(rx), pair.driver.pop_used_burst(tx)) == (1, 1)


def test_the_notification_value_follows_the_features(ring_format: str) -> None:
    pair = Pair(ring_format, 4, Feature.NOTIFICATION_DATA)
    queue = DriverQueue(pair.memory, 4, features=pair.features, address=BASE, index=5)
    plain = DriverQueue(pair.memory, 4, features=pair.features - {Feature.NOTIFICATION_DATA}, address=BASE, index=5)
    for number in range(5):
        position = number if ring_format == "split" else (number % 4) | (number < 4) << 15
        assert (queue.notification_value, plain.notification_value) == (5 | position << 16, 5)
        if number == 4:
            break
        queue.add(number, readable=[(BASE, 1)])
        queue.publish()


def test_the_numbers_that_both_languages_spell_are_the_same(ring_format: str) -> None:
    packed = ring_format == "packed"
    bits = 1 << Feature.RING_PACKED if packed else 0
    assert layout(8, features=bits) == (((128, 16), (4, 4), (4, 4)) if packed else ((128, 16), (22, 2), (70, 4)))
    memory, guest = Memory(1 << 16), GuestMemory()
    guest.add(0, memory)
    for bit in Feature:
        queue = DriverQueue(memory, 4, features=bits | 1 << bit)
        assert queue.ring_format == ("packed" if packed or bit == Feature.RING_PACKED else "split")
        try:
            queue.add(1, readable=[(0, 1)], indirect=True)
        except ValueError:
            assert bit != Feature.INDIRECT_DESC
        else:
            assert bit == Feature.INDIRECT_DESC
        assert (queue.notification_value != 0) == (bit == Feature.NOTIFICATION_DATA and queue.ring_format == "packed")
        queue.close()
    assert Burst is not None and need_event(5, 6, 5) and not need_event(5, 5, 4) and need_event(65535, 0, 65535)


def test_every_feature_set_has_an_index() -> None:
    class Bits:
        def __index__(self) -> int:
            return 1 << 34 | 1 << 127

    assert DriverQueue(Memory(4096), 3, features=Bits()).ring_format == "packed"
    refused: list[Any] = [1 << 128, -1]
    for bits in refused:
        with pytest.raises(ValueError, match="features"):
            layout(4, features=bits)
