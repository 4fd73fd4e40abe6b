"""The same as `test_differential`, through bursts: packets of one slot or more, sent and received, over split and packed rings."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from tests.model import ModelChain, ModelQueue, Notifications
from tests.test_differential import BASE, SIZES, Sleeper
from virtio import BufferPool, Burst, DeviceQueue, DriverQueue, Feature, Features, GuestMemory, Memory

PAYLOAD = 64
"""Bytes of a slot after its headroom, at both ends."""
SLOTS = 24
ROWS = 8
"""Rows of a burst."""
INDIRECT_LIMIT = 2

Packet = list[int]
"""Bytes in each row."""


def rows_of(burst: Burst) -> list[tuple[int, int, int, int]]:
    return [(int(burst.slots[i]), int(burst.offsets[i]), int(burst.lengths[i]), int(burst.more[i])) for i in range(burst.count)]


def packets_of(burst: Burst) -> list[tuple[tuple[int, ...], bytes]]:
    """(slots, bytes) of each packet in the burst."""
    packets, slots, content = [], [], b""
    for row, (slot, _, _, more) in enumerate(rows_of(burst)):
        slots.append(slot)
        content += burst.tobytes(row)
        if not more:
            packets.append((tuple(slots), content))
            slots, content = [], b""
    assert not slots, "no call splits a packet"
    return packets


def bytes_of(token: int, length: int) -> bytes:
    return bytes((token * 11 + number) % 253 for number in range(length))


class System:
    """Both ends of one queue, both pools, and the model."""

    def __init__(self, size: int, features: Features) -> None:
        self.model = ModelQueue(size, in_order=Feature.IN_ORDER in features, event_idx=Feature.EVENT_IDX in features)
        self.indirect = min(size, INDIRECT_LIMIT) if Feature.INDIRECT_DESC in features else 0
        self.memory, self.guest = Memory(1 << 16), GuestMemory()
        self.guest.add(BASE, self.memory)
        self.driver = DriverQueue(self.memory, size, features=features, address=BASE, indirect_limit=self.indirect)
        self.device = DeviceQueue(self.guest, size, self.driver.areas, features=features)
        self.device_end, self.driver_end = Sleeper("the device"), Sleeper("the driver")
        self.driver.connect(self.device_end.event)
        self.device.connect(self.driver_end.event)
        self.driver_pool = BufferPool(self.memory, SLOTS, slot_size=64 + PAYLOAD)
        self.device_pool = BufferPool(Memory(1 << 16), SLOTS, slot_size=64 + PAYLOAD)
        self.driver_burst = self.driver_pool.burst(ROWS)
        self.fill_burst = self.device_pool.burst(ROWS)
        self.lost = 0
        self.device_bursts = [self.device_pool.burst(ROWS), self.device_pool.burst(3)]
        self.held: list[list[ModelChain]] = [[], []]
        """Chains whose slots are in each of the device's bursts."""
        self.slots: dict[int, tuple[int, ...]] = {}
        """Of the driver's pool, by token."""
        self.fetched: list[ModelChain] = []
        """Chains that are out of the ring, but not in a burst yet."""

    def put(self, burst: Burst, pool: BufferPool, packets: list[Packet], tokens: list[int] | None) -> list[Packet]:
        """Fills a burst with as many of the packets as it and the pool hold."""
        available = pool.take(burst)
        row, held = 0, []
        for number, packet in enumerate(packets):
            if row + len(packet) > available:
                break
            done = 0
            for place, length in enumerate(packet):
                burst.lengths[row], burst.more[row] = length, place + 1 < len(packet)
                if tokens is not None:
                    content = bytes_of(tokens[number], sum(packet))
                    pool.frames[burst.slots[row], :length] = list(content[done : done + length])
                done, row = done + length, row + 1
            held.append(packet)
        burst.count = row
        return held

    def add(self, packets: list[Packet], tokens: list[int], writable: bool) -> int:
        """Sends packets, or posts buffers of that shape: as many as fit, in one call that also publishes."""
        burst = self.driver_burst
        packets = self.put(burst, self.driver_pool, packets, None if writable else tokens)
        too_long = next((packet for packet in packets if len(packet) > self.model.size), None)
        if too_long is not None:
            before = self.shown()
            with pytest.raises(ValueError, match=rf"\b{len(too_long)} rows.*\b{self.model.size}\b"):
                (self.driver.add_writable_burst if writable else self.driver.add_burst)(burst)
            assert self.shown() == before
            self.driver_pool.give(burst)
            return 0
        rows, added = rows_of(burst), []
        row = 0
        for token, packet in zip(tokens, packets, strict=False):
            slots = 1 if len(packet) <= self.indirect else len(packet)
            if slots > self.model.free:
                break
            segments = [(length, writable) for length in packet]
            content = b"" if writable else bytes_of(token, sum(packet))
            added.append(ModelChain(token, slots, content, sum(packet) if writable else 0, segments))
            self.slots[token] = tuple(slot for slot, *_ in rows[row : row + len(packet)])
            self.model.add(added[-1])
            row += len(packet)
        self.expect(self.model.publish_available(), len(added), self.driver)
        assert (self.driver.add_writable_burst if writable else self.driver.add_burst)(burst) == len(added)
        self.decided(self.model.to_device, self.device_end, self.driver)
        assert rows_of(burst) == rows[row:], "what did not fit is at the front"
        self.driver_pool.give(burst)
        return len(added)

    def expect(self, expected: bool | None, count: int, queue: DriverQueue | DeviceQueue) -> None:
        """The next call on `queue` publishes `count` chains beside its work, and must decide so."""
        self.expected = expected, count, queue.counters["notified"]

    def decided(self, notifications: Notifications, sleeper: Sleeper, queue: DriverQueue | DeviceQueue) -> None:
        """What that call decided, by its counters."""
        expected, count, before = self.expected
        notified = queue.counters["notified"] > before
        assert expected is None or notified is expected, f"{sleeper.name}: {notifications}"
        sleeper.published(count, notified)
        notifications.count(count, notified)
        assert (queue.counters["notified"], queue.counters["suppressed"]) == (notifications.told, notifications.silent)

    def give_back(self, which: int, give: Callable[[Burst], Any]) -> Any:
        """The slots of a device's burst come back, and so their chains are used, with length 0; then `give` does what it does."""
        for chain in self.held[which]:
            self.model.complete(chain, 0)
        self.held[which] = []
        count = len(self.model.finished)
        self.expect(self.model.publish_used(), count, self.device)
        result = give(self.device_bursts[which])
        self.decided(self.model.to_driver, self.driver_end, self.device)
        return result

    def receive(self, which: int) -> None:
        """The device pops packets into one of its bursts, whose old ones are done by that."""
        burst = self.device_bursts[which]
        count = self.give_back(which, self.device.pop_burst)
        packets = packets_of(burst)
        expected = self.model.pop(count)
        assert [content for _, content in packets] == [chain.readable for chain in expected]
        self.held[which] = expected
        if not count and self.model.available:
            rows = -(-len(self.model.available[0].readable) // PAYLOAD)
            assert rows > min(burst.capacity, self.device_pool.available), "there was room for it"

    def complete(self, which: int) -> int:
        held = len(self.held[which])
        assert self.give_back(which, self.device.complete_burst) == held
        return held

    def fill(self, packets: list[Packet], tokens: list[int]) -> None:
        """The device sends packets into posted buffers; one that is longer than its buffer is lost.

        One call may send fewer than there are buffers for, if these have many segments, but never none.
        """
        burst = self.fill_burst
        packets = self.put(burst, self.device_pool, packets, tokens)
        rows, before = rows_of(burst), self.device.counters
        notified, pairs = before["notified"], min(len(packets), len(self.model.available))
        drops = self.device_pool.drops
        filled = self.device.fill_burst(burst)
        dropped = self.device.counters["dropped"] - before["dropped"]
        assert filled + dropped <= pairs and (filled + dropped or not pairs)
        sent = lost = 0
        for packet, token, chain in zip(packets, tokens, self.model.pop(filled + dropped), strict=False):
            fits = sum(packet) <= chain.writable
            chain.written = bytes_of(token, sum(packet)) if fits else b""
            self.model.complete(chain, len(chain.written))
            sent += len(packet)
            lost += not fits
        assert lost == dropped == self.device_pool.drops - drops
        self.lost += lost
        count = len(self.model.finished)
        self.expected = self.model.publish_used(), count, notified
        self.decided(self.model.to_driver, self.driver_end, self.device)
        assert rows_of(burst) == rows[sent:], "what found no buffer is at the front"
        self.device_pool.give(burst)

    def pop_used(self) -> None:
        """The driver takes back what was used, and frees it. What the ring gave and the burst does not hold comes with the next call."""
        self.fetched = self.fetched or self.model.pop_used(ROWS)
        count = self.driver.pop_used_burst(self.driver_burst)
        returned, self.fetched = self.fetched[:count], self.fetched[count:]
        packets = packets_of(self.driver_burst)
        assert [slots for slots, _ in packets] == [self.slots.pop(chain.token) for chain in returned]
        assert [content for _, content in packets] == [chain.written or b"" for chain in returned]
        if self.fetched:
            assert len(self.slots[self.fetched[0].token]) > ROWS - self.driver_burst.count, "there was room for it"
        self.driver_pool.give(self.driver_burst)

    def shown(self) -> tuple[Any, ...]:
        """All that a refused call must leave alone."""
        pools = self.driver_pool.available, self.device_pool.available
        return (self.driver.snapshot(), self.device.snapshot(), self.driver.counters, self.device.counters, pools)

    def check(self) -> None:
        """Nothing is lost and nothing is doubled."""
        model = self.model
        assert self.driver.broken is None and self.device.broken is None
        assert self.driver.outstanding == len(model.outstanding) + len(self.fetched) and self.driver.free == model.free
        assert self.device.outstanding == len(model.popped)
        assert self.driver_pool.available == SLOTS - sum(map(len, self.slots.values()))
        assert self.device_pool.available == SLOTS - sum(burst.count for burst in self.device_bursts)
        assert (self.driver.counters["added"], self.driver.counters["used"]) == (model.adds, model.returns)
        assert (self.device.counters["popped"], self.device.counters["used"]) == (model.pops, model.uses)
        assert (self.device.counters["dropped"], self.driver.counters["clamped"]) == (self.lost, 0)


PACKETS = st.lists(st.lists(st.integers(1, PAYLOAD), min_size=1, max_size=3), min_size=1, max_size=5)


class Histories(RuleBasedStateMachine):
    """Random histories of a queue that carries packets one way, over three rings."""

    systems: list[System]

    @initialize(
        sizes=st.sampled_from(SIZES), in_order=st.booleans(), event_idx=st.booleans(), indirect=st.booleans(), receives=st.booleans()
    )
    def set_up(self, sizes: tuple[int, int], in_order: bool, event_idx: bool, indirect: bool, receives: bool) -> None:
        chosen = {Feature.IN_ORDER: in_order, Feature.EVENT_IDX: event_idx, Feature.INDIRECT_DESC: indirect}
        common = {Feature.VERSION_1, *(feature for feature, on in chosen.items() if on)}
        packed = Features(common | {Feature.RING_PACKED})
        self.systems = [System(sizes[0], Features(common)), System(sizes[0], packed), System(sizes[1], packed)]
        self.receives = receives
        self.tokens = 0

    def new_tokens(self, count: int) -> list[int]:
        self.tokens += count
        return [*range(self.tokens - count, self.tokens)]

    @rule(packets=PACKETS)
    def add(self, packets: list[Packet]) -> None:
        tokens = self.new_tokens(len(packets))
        answers = [system.add(packets, tokens, self.receives) for system in self.systems]
        assert answers[0] == answers[1], "split and packed of one size take as many"

    @rule(which=st.integers(0, 1))
    @precondition(lambda self: not self.receives)
    def receive(self, which: int) -> None:
        for system in self.systems:
            system.receive(which)

    @rule(which=st.integers(0, 1))
    @precondition(lambda self: not self.receives)
    def complete(self, which: int) -> None:
        for system in self.systems:
            system.complete(which)

    @rule(packets=PACKETS)
    @precondition(lambda self: self.receives)
    def fill(self, packets: list[Packet]) -> None:
        tokens = self.new_tokens(len(packets))
        for system in self.systems:
            system.fill(packets, tokens)

    @rule()
    def pop_used(self) -> None:
        for system in self.systems:
            system.pop_used()

    @rule(driver=st.booleans(), device=st.booleans())
    def arm(self, driver: bool, device: bool) -> None:
        for system in self.systems:
            for wanted, queue, wish, sleeper in (
                (driver, system.driver, system.model.to_driver, system.driver_end),
                (device, system.device, system.model.to_device, system.device_end),
            ):
                if wanted:
                    found = queue.arm()
                    assert found is (wish.arm() or (queue is system.driver and bool(system.fetched)))
                    sleeper.armed(found)
                else:
                    queue.disarm()
                    wish.disarm()
                    sleeper.asleep = False

    @invariant()
    def counts_agree(self) -> None:
        for system in getattr(self, "systems", []):
            system.check()

    def teardown(self) -> None:
        for system in getattr(self, "systems", []):
            assert system.driver.reset() == []
            system.driver_pool.give(system.driver_burst)
            assert system.driver_pool.available == SLOTS, "the slots of what is outstanding come back at reset"
            system.device.reset()
            for burst in system.device_bursts:
                system.device_pool.give(burst)
            assert system.device_pool.available == SLOTS


def test_bursts_tell_the_same_story_over_every_ring() -> None:
    run_state_machine_as_test(Histories, settings=settings(max_examples=120, stateful_step_count=50))
