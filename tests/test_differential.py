"""Split, packed and the plain model are fed the same history, and have to tell the same story; nobody who sleeps is left asleep."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from tests.model import ModelChain, ModelQueue, Notifications
from virtio import Chain, ChainBatch, DeviceQueue, DriverQueue, EventFd, Feature, Features, GuestMemory, Memory, QueueFull

BASE = 1 << 40
BLOCK = 256
"""Bytes of memory for one chain."""
MOST_SEGMENTS = 6
SIZES = [(8, 7), (4, 3), (2, 5), (1, 1), (16, 11)]
"""Of the split ring, and of a packed one beside a packed one of the split ring's size."""


class Sleeper:
    """One end that may sleep: it armed, nothing was there, and since then nobody rang."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.event = EventFd()
        self.asleep = False

    def armed(self, found: bool) -> None:
        self.asleep = not found

    def published(self, count: int, notified: bool) -> None:
        """The other side has shown `count` chains, and says whether it rang."""
        assert bool(self.event.drain()) == notified, f"the answer {notified} and {self.name}'s eventfd differ"
        assert not (self.asleep and count and not notified), f"{self.name} sleeps, and {count} chains came unannounced"
        self.asleep = self.asleep and not notified


class System:
    """Both ends of one real queue, and the model that goes with it."""

    def __init__(self, size: int, features: Features) -> None:
        self.features = features
        self.model = ModelQueue(size, in_order=Feature.IN_ORDER in features, event_idx=Feature.EVENT_IDX in features)
        self.memory, self.guest = Memory(1 << 16), GuestMemory()
        self.guest.add(BASE, self.memory)
        self.driver = DriverQueue(self.memory, size, features=features, address=BASE, indirect_limit=min(size, MOST_SEGMENTS))
        self.device = DeviceQueue(self.guest, size, self.driver.areas, features=features)
        self.device_end, self.driver_end = Sleeper("the device"), Sleeper("the driver")
        self.driver.connect(self.device_end.event)
        self.device.connect(self.driver_end.event)
        self.blocks = [self.memory.allocate(BLOCK) for _ in range(size)]
        self.places: dict[int, int] = {}
        self.chains: dict[int, Chain] = {}
        self.batch: tuple[ChainBatch, list[ModelChain]] | None = None

    def fits(self, chain: ModelChain) -> bool:
        return chain.slots <= self.model.free

    def add(self, chain: ModelChain, indirect: bool) -> None:
        """Adds the chain, or is told that there is no room for it."""
        if self.fits(chain):
            place = self.places[chain.token] = self.blocks.pop()
            self.memory.write(place, chain.readable + bytes(chain.writable))
        else:
            place = 0
        readable: list[tuple[int, int]] = []
        writable: list[tuple[int, int]] = []
        for length, is_writable in chain.segments:
            (writable if is_writable else readable).append((BASE + place, length))
            place += length
        if self.fits(chain):
            self.driver.add(chain.token, readable=readable, writable=writable, indirect=indirect)
            self.model.add(chain)
            return
        before = self.shown()
        with pytest.raises(QueueFull, match=rf"\b{chain.slots}\b.*\b{self.model.free}\b"):
            self.driver.add(chain.token, readable=readable, writable=writable, indirect=indirect)
        assert self.shown() == before

    def publish_available(self) -> None:
        chains = list(self.model.added)
        self.decided(self.model.publish_available(), self.driver.publish(), chains, self.model.to_device, self.device_end)

    def publish_used(self) -> None:
        chains = list(self.model.finished)
        self.decided(self.model.publish_used(), self.device.publish(), chains, self.model.to_driver, self.driver_end)

    def decided(
        self, expected: bool | None, notified: bool, chains: list[ModelChain], notifications: Notifications, sleeper: Sleeper
    ) -> None:
        assert expected is None or notified is expected, f"{sleeper.name}: {notifications}"
        sleeper.published(len(chains), notified)
        notifications.count(len(chains), notified)

    def pop(self, limit: int) -> int:
        """Pops up to `limit`. One call may give fewer than there are, if they have many segments, but never none."""
        popped = 0
        while chains := self.device.pop(limit - popped):
            popped += len(chains)
            assert popped <= limit
            for chain, model in zip(chains, self.model.pop(len(chains)), strict=True):
                assert chain.read() == model.readable and (chain.readable, chain.writable) == (len(model.readable), model.writable)
                assert [(length, writable) for _, length, writable in chain.segments] == model.segments
                self.chains[model.token] = chain
        assert popped == limit or not self.model.available
        return popped

    def pop_batch(self, capacity: int) -> int:
        batch = self.device.batch(capacity)
        while self.device.pop_batch(batch):
            pass
        expected = self.model.pop(capacity)
        assert len(batch) == len(expected)
        assert batch.readable[: len(batch)].tolist() == [len(chain.readable) for chain in expected]
        assert batch.writable[: len(batch)].tolist() == [chain.writable for chain in expected]
        self.batch = batch, expected
        return len(batch)

    def complete_batch(self, share: int) -> None:
        assert self.batch is not None
        (batch, chains), self.batch = self.batch, None
        for row, chain in enumerate(chains):
            batch.used[row] = length = chain.writable * share // 4
            self.model.complete(chain, length)
        shown = list(self.model.finished)
        expected, before = self.model.publish_used(), self.device.counters["notified"]
        assert self.device.complete_batch(batch) == len(chains)
        notified = self.device.counters["notified"] > before
        self.decided(expected, notified, shown, self.model.to_driver, self.driver_end)

    def complete(self, token: int, share: int) -> None:
        chain = self.chains.pop(token)
        model = next(each for each in self.model.popped if each.token == token)
        length = model.writable * share // 4
        model.written = bytes((token + number) % 256 for number in range(length))
        assert chain.write(model.written) == length
        self.device.complete(chain, length)
        assert chain.completed
        self.model.complete(model, length)
        before = self.shown()
        with pytest.raises(ValueError, match="completed"):
            self.device.complete(chain, length)
        assert self.shown() == before

    def rewind(self, count: int) -> None:
        if count <= self.model.rewindable():
            self.device.rewind(count)
            for model in self.model.rewind(count):
                assert self.chains.pop(model.token).completed
            return
        before = self.shown()
        with pytest.raises(ValueError, match=str(count)):
            self.device.rewind(count)
        assert self.shown() == before

    def pop_used(self, limit: int) -> list[tuple[int, int]]:
        used = self.driver.pop_used(limit)
        expected = self.model.pop_used(limit)
        assert used == [(chain.token, chain.length) for chain in expected]
        for chain in expected:
            place = self.places.pop(chain.token)
            if chain.written is not None:
                assert self.memory.read(place + len(chain.readable), chain.length) == chain.written
            assert self.memory.read(place, len(chain.readable)) == chain.readable, "what is readable is not written"
            self.blocks.append(place)
        return used

    def shown(self) -> tuple[Any, ...]:
        """All that a refused call must leave alone."""
        return (self.driver.snapshot(), self.device.snapshot(), self.driver.counters, self.device.counters, self.memory.read(0, 4096))

    def check(self) -> None:
        """Counts and numbers are the model's."""
        model, driver, device = self.model, self.driver, self.device
        assert driver.broken is None and device.broken is None
        assert driver.outstanding == len(model.outstanding) and driver.free == model.free
        assert device.outstanding == len(model.popped)
        to_device, to_driver = model.to_device, model.to_driver
        assert driver.counters == {
            "added": model.adds,
            "used": model.returns,
            "notified": to_device.told,
            "suppressed": to_device.silent,
            "clamped": 0,
        }
        assert device.counters == {
            "popped": model.pops,
            "used": model.uses,
            "notified": to_driver.told,
            "suppressed": to_driver.silent,
            "dropped": 0,
        }


class Histories(RuleBasedStateMachine):
    """Random histories of one queue, told by three rings and three models."""

    systems: list[System]

    @initialize(sizes=st.sampled_from(SIZES), in_order=st.booleans(), event_idx=st.booleans())
    def set_up(self, sizes: tuple[int, int], in_order: bool, event_idx: bool) -> None:
        common = {Feature.VERSION_1, Feature.INDIRECT_DESC}
        common |= {Feature.IN_ORDER} if in_order else set()
        common |= {Feature.EVENT_IDX} if event_idx else set()
        packed = Features(common | {Feature.RING_PACKED})
        self.systems = [System(sizes[0], Features(common)), System(sizes[0], packed), System(sizes[1], packed)]
        self.tokens = 0

    def each(self, step: Callable[[System], Any]) -> list[Any]:
        """The same answer from each of them."""
        answers = [step(system) for system in self.systems]
        assert answers.count(answers[0]) == len(answers), f"split, packed, packed: {answers}"
        return answers

    @property
    def model(self) -> ModelQueue:
        """All models agree on chains; the first one's are shown."""
        return self.systems[0].model

    @rule(
        readable=st.lists(st.integers(1, 40), max_size=3),
        writable=st.lists(st.integers(1, 40), max_size=3),
        indirect=st.booleans(),
        publish=st.booleans(),
    )
    def add(self, readable: list[int], writable: list[int], indirect: bool, publish: bool) -> None:
        smallest = min(system.model.size for system in self.systems)
        segments = [(length, False) for length in readable] + [(length, True) for length in writable]
        if not 1 <= len(segments) <= smallest:
            return
        token, self.tokens = self.tokens, self.tokens + 1
        content = bytes((token * 7 + number) % 251 for number in range(sum(readable)))
        chains = [ModelChain(token, 1 if indirect else len(segments), content, sum(writable), segments) for _ in self.systems]
        fits = [system.fits(chain) for system, chain in zip(self.systems, chains, strict=True)]
        for system, chain, fit in zip(self.systems, chains, fits, strict=True):
            if all(fits) or not fit:  # where the smallest ring is full, no other one goes on alone
                system.add(chain, indirect)
        if publish:
            self.publish_available()

    @rule()
    def publish_available(self) -> None:
        self.each(System.publish_available)

    @rule()
    def publish_used(self) -> None:
        self.each(System.publish_used)

    @rule(limit=st.integers(0, 5))
    def pop(self, limit: int) -> None:
        self.each(lambda system: system.pop(limit))

    @rule(capacity=st.integers(1, 5))
    @precondition(lambda self: self.systems[0].batch is None)
    def pop_batch(self, capacity: int) -> None:
        self.each(lambda system: system.pop_batch(capacity))

    @rule(data=st.data(), share=st.integers(0, 4))
    @precondition(lambda self: self.systems[0].chains)
    def complete(self, data: st.DataObject, share: int) -> None:
        token = data.draw(st.sampled_from(sorted(self.systems[0].chains)))
        self.each(lambda system: system.complete(token, share))

    @rule(share=st.integers(0, 4), publish=st.booleans())
    def complete_oldest(self, share: int, publish: bool) -> None:
        for token in sorted(self.systems[0].chains)[:3]:
            self.each(lambda system, token=token: system.complete(token, share))  # type: ignore[misc]
        if publish:
            self.publish_used()

    @rule(share=st.integers(0, 4))
    @precondition(lambda self: self.systems[0].batch is not None)
    def complete_batch(self, share: int) -> None:
        self.each(lambda system: system.complete_batch(share))

    @rule(count=st.integers(0, 4))
    @precondition(lambda self: self.systems[0].batch is None)
    def rewind(self, count: int) -> None:
        self.each(lambda system: system.rewind(count))

    @rule(limit=st.integers(0, 20))
    def pop_used(self, limit: int) -> None:
        self.each(lambda system: system.pop_used(limit))

    @rule()
    def arm_device(self) -> None:
        def arm(system: System) -> bool:
            found = system.device.arm()
            assert found is system.model.to_device.arm()
            system.device_end.armed(found)
            return found

        self.each(arm)

    @rule()
    def arm_driver(self) -> None:
        def arm(system: System) -> bool:
            found = system.driver.arm()
            assert found is system.model.to_driver.arm()
            system.driver_end.armed(found)
            return found

        self.each(arm)

    @rule()
    def disarm_device(self) -> None:
        for system in self.systems:
            system.device.disarm()
            system.model.to_device.disarm()
            system.device_end.asleep = False

    @rule()
    def disarm_driver(self) -> None:
        for system in self.systems:
            system.driver.disarm()
            system.model.to_driver.disarm()
            system.driver_end.asleep = False

    @rule()
    def look_at_the_chains(self) -> None:
        tokens = sorted(self.systems[0].chains)
        self.each(lambda system: [system.chains[token].read() for token in tokens])

    @invariant()
    def counts_agree(self) -> None:
        for system in getattr(self, "systems", []):
            system.check()

    def teardown(self) -> None:
        for system in getattr(self, "systems", []):
            expected = sorted(chain.token for chain in system.model.outstanding)
            assert sorted(system.driver.reset()) == expected, "what is outstanding comes back at reset"
            system.device.reset()


def test_split_packed_and_the_model_tell_the_same_story() -> None:
    run_state_machine_as_test(Histories, settings=settings(max_examples=250, stateful_step_count=80))
