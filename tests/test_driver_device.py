"""Both ends together over the loopback transport: queues, notifications, resets, configuration, and a peer that misbehaves."""

import select
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from virtio import (
    Device,
    DeviceId,
    DeviceNeedsReset,
    DeviceQueue,
    Driver,
    DriverQueue,
    Feature,
    Features,
    Memory,
    SpecViolation,
    Status,
    StatusError,
)
from virtio.device import POLL_ROUNDS, DeviceState
from virtio.driver import DriverState
from virtio.testing import RawPackedDevice, RawPackedDriver, RawSplitDevice, RawSplitDriver
from virtio.transport.loopback import LoopbackTransport


class Echo(Device):
    """Writes back, upside down, what it reads; two queues alike, and one whose handler a test may set."""

    device_id = DeviceId.CONSOLE
    queues = ("firstq", "secondq", "ownq")
    queue_size = 16
    config = bytes(range(8))

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[int] = []
        self.own: Callable[[DeviceQueue], None] = self.echo

    def echo(self, queue: DeviceQueue) -> None:
        self.calls.append(queue.index)
        for chain in queue.pop(limit=4):
            queue.complete(chain, chain.write(chain.read()[::-1]) if chain.writable else 0)
        queue.publish()

    on_firstq = on_secondq = echo

    def on_ownq(self, queue: DeviceQueue) -> None:
        self.own(queue)


class Pair:
    """A driver over a loopback transport over an `Echo`, with all queues set up."""

    def __init__(self, features: Features, *, live: bool = True) -> None:
        self.device = Echo()
        self.transport = LoopbackTransport(self.device)
        self.driver = Driver(self.transport)
        self.driver.negotiate(wanted=features | {Feature.RING_RESET})
        self.queues = [self.driver.setup_queue(index, size=8) for index in range(3)]
        if live:
            self.driver.driver_ok()

    def ask(self, queue: DriverQueue, text: bytes) -> int:
        """Adds and publishes a request to be echoed; returns where the answer will be."""
        memory, base = self.driver.memory, self.driver.address
        place = memory.allocate(2 * len(text))
        memory.write(place, text)
        queue.add((place + len(text), text), readable=[(base + place, len(text))], writable=[(base + place + len(text), len(text))])
        queue.publish()
        return place + len(text)

    def answers(self, queue: DriverQueue) -> list[bytes]:
        return [self.driver.memory.read(place, length) for (place, _), length in self.driver.wait_used(queue, timeout=0)]

    def raw_driver(self, queue: DriverQueue) -> RawSplitDriver | RawPackedDriver:
        raw = RawPackedDriver if queue.ring_format == "packed" else RawSplitDriver
        return raw(self.driver.memory, queue.size, queue.areas, address=self.driver.address)

    def raw_device(self, queue: DriverQueue) -> RawSplitDevice | RawPackedDevice:
        raw = RawPackedDevice if queue.ring_format == "packed" else RawSplitDevice
        return raw(self.driver.memory, queue.size, queue.areas, address=self.driver.address)

    def break_a_rule(self, queue: DriverQueue) -> None:
        """Makes an indirect table available, which was not negotiated."""
        raw = self.raw_driver(queue)
        head = raw.add_indirect(self.driver.address + self.driver.memory.allocate(16), [(self.driver.address, 16, True)])
        if isinstance(raw, RawSplitDriver):
            raw.make_available(head)

    def close(self) -> None:
        self.driver.close()
        self.transport.close()


@pytest.fixture
def pair(ring_features: Features) -> Iterator[Pair]:
    pair = Pair(ring_features)
    yield pair
    pair.close()


def test_two_queues_work_side_by_side(pair: Pair, ring_format: str) -> None:
    first, second, _ = pair.queues
    for number in range(40):
        pair.ask(first, b"first %d" % number)
        pair.ask(second, b"second %d" % number)
        assert pair.driver.wait(timeout=60.0)
        assert pair.answers(first) == [(b"first %d" % number)[::-1]]
        assert pair.answers(second) == [(b"second %d" % number)[::-1]]
    assert first.ring_format == second.ring_format == ring_format
    assert set(pair.device.calls) == {0, 1}


def test_nothing_is_served_or_rung_before_driver_ok(ring_features: Features) -> None:
    pair = Pair(ring_features, live=False)
    queue = pair.queues[0]
    pair.ask(queue, b"early")
    assert pair.device.poll() == 0 and pair.device.calls == [] and queue.outstanding == 1
    assert not pair.transport.doorbell(0).drain()
    pair.driver.driver_ok()
    assert pair.transport.doorbell(0).drain() == 2, "rung by the driver, which has a buffer there, and by the device for itself"
    assert pair.transport.doorbell(1).drain() == 1, "rung by the device alone"
    assert pair.driver.wait(timeout=60.0, queues=[queue])
    assert pair.answers(queue) == [b"ylrae"]
    pair.close()


def test_reset_hands_every_outstanding_buffer_back(pair: Pair, ring_features: Features) -> None:
    first, second, third = pair.queues
    for text in (b"one", b"two", b"three"):
        pair.ask(first, text)
    pair.ask(third, b"four")
    tokens = pair.driver.reset()
    assert [sorted(text for _, text in tokens[index]) for index in range(3)] == [[b"one", b"three", b"two"], [], [b"four"]]
    assert pair.driver.state is DriverState.RESET and pair.device.state is DeviceState.RESET
    assert not pair.driver.queues and not pair.driver.features and not pair.device.accepted
    for queue in (first, second, third):
        with pytest.raises(StatusError):
            queue.publish()
    assert pair.device.poll() == 0

    pair.driver.negotiate(wanted=ring_features)
    queue = pair.driver.setup_queue(0, size=4)
    pair.driver.driver_ok()
    pair.ask(queue, b"again")
    assert pair.driver.wait(timeout=60.0) and pair.answers(queue) == [b"niaga"]


def test_device_22_a_broken_rule_sets_needs_reset_and_notifies(pair: Pair, ring_features: Features) -> None:
    queue = pair.queues[0]
    kept = pair.queues[1]
    kept.add("kept", writable=[(pair.driver.address, 16)])
    pair.break_a_rule(queue)
    with pytest.raises(SpecViolation, match="INDIRECT") as violation:
        pair.device.poll()
    assert violation.value.section
    assert pair.device.state is DeviceState.NEEDS_RESET
    assert Status.NEEDS_RESET | Status.DRIVER_OK in pair.device.status
    broken = pair.device.queue(0)
    assert broken is not None and isinstance(broken.broken, SpecViolation)
    assert pair.transport.config_interrupt.drain() == 1, "one configuration-change notification"
    assert pair.device.poll() == 0, "it stands still"
    pair.device.need_reset()
    assert pair.transport.config_interrupt.drain() == 0, "told once"

    with pytest.raises(DeviceNeedsReset, match="0x4f"):
        pair.driver.check()
    with pytest.raises(StatusError, match="in state needs reset; allowed there: reset"):
        pair.driver.wait(timeout=0)
    assert pair.driver.reset()[1] == ["kept"]
    pair.driver.negotiate(wanted=ring_features)
    queue = pair.driver.setup_queue(0, size=8)
    pair.driver.driver_ok()
    pair.ask(queue, b"fine")
    assert pair.driver.wait(timeout=60.0) and pair.answers(queue) == [b"enif"]


def test_device_22_a_sleeping_driver_is_woken(pair: Pair) -> None:
    pair.device.own = lambda queue: pair.device.need_reset()
    pair.ask(pair.queues[2], b"text")
    with pytest.raises(DeviceNeedsReset):
        pair.driver.wait(timeout=60.0)


def test_device_22_every_waiting_thread_is_woken(pair: Pair) -> None:
    with ThreadPoolExecutor(2) as threads:
        waits = [threads.submit(pair.driver.wait, 60.0, queues=[queue]) for queue in pair.queues[:2]]
        pair.device.need_reset()
        assert {type(wait.exception(timeout=60.0)) for wait in waits} <= {DeviceNeedsReset, StatusError}


def test_device_22_a_violation_that_a_handler_keeps_to_itself_counts(pair: Pair) -> None:
    def quiet(queue: DeviceQueue) -> None:
        with pytest.raises(SpecViolation):
            queue.pop()

    pair.device.own = quiet
    pair.break_a_rule(pair.queues[2])
    pair.device.poll()
    assert pair.device.state is DeviceState.NEEDS_RESET
    assert pair.transport.config_interrupt.drain() == 1


def test_device_22_a_violation_found_outside_the_handlers_counts(pair: Pair) -> None:
    queue = pair.device.queue(2)
    assert queue is not None
    pair.break_a_rule(pair.queues[2])
    with pytest.raises(SpecViolation):
        queue.pop()
    assert pair.device.poll() == 0
    assert pair.device.state is DeviceState.NEEDS_RESET and pair.transport.config_interrupt.drain() == 1


def test_device_22_there_is_no_notification_before_driver_ok(ring_features: Features) -> None:
    pair = Pair(ring_features, live=False)
    pair.device.need_reset()
    assert Status.NEEDS_RESET in pair.device.status
    assert pair.transport.config_interrupt.drain() == 0
    with pytest.raises(DeviceNeedsReset):
        pair.driver.check()
    pair.close()


def test_a_handlers_own_exception_comes_through_and_loses_nothing(pair: Pair) -> None:
    def fails(queue: DeviceQueue) -> None:
        raise KeyError("a mistake in the handler")

    queue = pair.queues[2]
    pair.device.own = fails
    pair.ask(queue, b"text")
    with pytest.raises(KeyError, match="a mistake in the handler"):
        pair.device.poll()
    assert pair.device.state is DeviceState.DRIVER_OK
    assert pair.transport.doorbell(2).wait(timeout=0), "whoever sleeps on the doorbell comes back"
    with pytest.raises(KeyError, match="a mistake in the handler"):
        pair.driver.wait(timeout=1.0, queues=[queue])
    pair.device.own = pair.device.echo
    assert pair.driver.wait(timeout=60.0, queues=[queue])
    assert pair.answers(queue) == [b"txet"]


def test_a_handler_may_leave_buffers_in_its_queue(pair: Pair) -> None:
    calls: list[int] = []
    queue = pair.queues[2]
    pair.device.own = lambda queue: calls.append(queue.index)
    pair.ask(queue, b"text")
    # It looks a second time with the queue armed, so that nothing comes unseen in between.
    assert pair.device.poll() == 1 and calls == [2, 2]
    pair.device.own = pair.device.echo
    assert pair.device.poll() == 1
    assert pair.answers(queue) == [b"txet"]


def test_a_device_that_is_serving_a_queue_does_not_want_to_be_told(pair: Pair) -> None:
    told: list[bool] = []
    queue = pair.queues[2]

    def busy(far_end: DeviceQueue) -> None:
        if not told:
            queue.add((0, b""), writable=[(pair.driver.address, 1)])
            told.append(queue.publish())
        pair.device.echo(far_end)

    pair.device.own = busy
    pair.ask(queue, b"text")
    pair.device.poll()
    assert told == [False] and queue.pop_used() and not queue.outstanding
    pair.ask(queue, b"text")
    assert pair.transport.doorbell(2).drain() == 1, "and afterwards it does"


def test_a_driver_that_never_stops_does_not_keep_the_device_for_ever(pair: Pair) -> None:
    queue = pair.queues[2]

    def refilled(far_end: DeviceQueue) -> None:
        pair.device.echo(far_end)
        queue.pop_used()
        queue.add(None, writable=[(pair.driver.address, 1)])
        queue.publish()

    pair.device.own = refilled
    pair.ask(queue, b"text")
    assert pair.device.poll() == POLL_ROUNDS
    assert pair.transport.doorbell(2).drain(), "the rest is looked at in the next poll"
    assert pair.device.poll() == POLL_ROUNDS


def test_a_driver_sees_what_breaks_its_queue_once_and_then_that_it_is_broken(pair: Pair) -> None:
    queue = pair.queues[2]
    pair.device.own = lambda queue: None
    pair.ask(queue, b"text")
    pair.raw_device(queue).use(7, 4)
    with pytest.raises(SpecViolation, match="7"):
        pair.driver.wait_used(queue, timeout=60.0)
    assert pair.driver.wait(timeout=60.0, queues=[queue]), "a broken queue does not sleep"
    with pytest.raises(StatusError, match=r"queue 2 is broken until the device is reset: .*7"):
        pair.driver.wait_used(queue, timeout=60.0)
    (token,) = pair.driver.reset()[2]
    assert token[1] == b"text"


def test_only_queues_of_the_driver_are_waited_for(pair: Pair, ring_features: Features) -> None:
    other = Pair(ring_features)
    with pytest.raises(ValueError, match="not a queue that is set up here"):
        pair.driver.wait(timeout=0, queues=other.queues)
    with pytest.raises(ValueError, match="not a queue that is set up here"):
        pair.driver.arm(other.queues)
    other.close()


def test_waiting_in_vain_ends_with_nothing(pair: Pair) -> None:
    pair.device.own = lambda queue: None
    pair.ask(pair.queues[2], b"text")
    assert not pair.driver.wait(timeout=0)
    assert pair.driver.wait_used(pair.queues[2], timeout=0.01) == []


@pytest.mark.parametrize("timeout", [-1.0, -float("inf")])
def test_a_time_that_has_passed_is_not_waited_for(pair: Pair, timeout: float) -> None:
    assert not pair.driver.wait(timeout=timeout)


def test_a_wait_for_ever_is_one_too(pair: Pair) -> None:
    pair.ask(pair.queues[0], b"text")
    assert pair.driver.wait(timeout=float("inf"))


def test_an_alarm_from_another_queue_does_not_end_a_wait_for_one(pair: Pair) -> None:
    first, second, _ = pair.queues
    pair.ask(first, b"first")
    pair.device.poll()
    pair.ask(second, b"second")
    assert [token[1] for token, _ in pair.driver.wait_used(second, timeout=60.0)] == [b"second"]
    assert pair.answers(first) == [b"tsrif"]


def test_a_selector_sees_notifications(pair: Pair) -> None:
    selector = select.poll()
    selector.register(pair.driver.fileno(), select.POLLIN)
    pair.ask(pair.queues[0], b"text")
    assert not pair.driver.arm()
    assert not selector.poll(0)
    pair.device.poll()
    assert selector.poll(0)
    assert pair.driver.arm(), "used buffers are there"
    assert pair.answers(pair.queues[0]) == [b"txet"]


def test_a_queue_is_lowered_to_what_the_device_allows_and_never_raised(ring_features: Features, ring_format: str) -> None:
    class Odd(Echo):
        pass

    device = Odd()
    Odd.queue_size = 12  # as others' devices with packed rings may have it; ours would be refused
    driver = Driver(LoopbackTransport(device))
    driver.negotiate(wanted=ring_features)
    assert driver.setup_queue(0, size=256).size == (12 if ring_format == "packed" else 8)
    assert driver.setup_queue(1, size=4).size == 4


@pytest.mark.parametrize("size", [0, -1, 32769, 65536])
def test_a_queue_size_that_nobody_has_is_refused(pair: Pair, size: int, ring_features: Features) -> None:
    pair.driver.reset()
    pair.driver.negotiate(wanted=ring_features)
    with pytest.raises(ValueError, match=rf"{size} .*32768"):
        pair.driver.setup_queue(0, size=size)
    assert not pair.driver.queues
    assert pair.driver.setup_queue(0).size == 16


def test_a_queue_that_is_not_there_is_refused(ring_features: Features) -> None:
    pair = Pair(ring_features, live=False)
    for index in (3, 65535, -1):
        assert pair.transport.queue_max(index) == 0
        with pytest.raises(ValueError, match=f"no queue {index}"):
            pair.driver.setup_queue(index)
        with pytest.raises(ValueError, match=f"queue {index} does not exist"):
            pair.transport.interrupt(index)
    pair.close()


def test_an_enabled_queue_keeps_its_size_and_areas(ring_features: Features) -> None:
    pair = Pair(ring_features, live=False)
    before = pair.device.queue(0)
    with pytest.raises(StatusError, match="queue 0 is set up already"):
        pair.driver.setup_queue(0, size=4)
    with pytest.raises(StatusError, match="queue 0 is enabled"):
        pair.transport.queue_setup(0, 4, pair.queues[1].areas)
    pair.driver.driver_ok()
    with pytest.raises(StatusError, match="out of order in state driver ok"):
        pair.transport.queue_setup(0, 4, pair.queues[1].areas)
    assert pair.device.queue(0) is before and before is not None and before.size == 8
    pair.close()


@pytest.mark.parametrize("size", [0, 3, 32, 65536 + 8])
def test_a_device_refuses_sizes_that_its_queue_may_not_have(size: int) -> None:
    pair = Pair(Features())
    areas = pair.queues[0].areas
    pair.driver.reset_queue(0)
    with pytest.raises(ValueError, match=str(size)):
        pair.transport.queue_setup(0, size, areas)
    assert pair.device.queue(0) is None
    pair.close()


def test_one_queue_is_reset_and_set_up_again_while_the_device_is_live(pair: Pair) -> None:
    first, second, own = pair.queues
    pair.device.own = lambda queue: None
    pair.ask(own, b"lost")
    assert [text for _, text in pair.driver.reset_queue(2)] == [b"lost"]
    with pytest.raises(StatusError):
        own.publish()
    with pytest.raises(StatusError, match="queue 2 is not set up"):
        pair.driver.reset_queue(2)
    pair.device.own = pair.device.echo
    own = pair.driver.setup_queue(2, size=4)
    pair.transport.doorbell(2).drain()  # what rang before
    pair.ask(own, b"on")
    assert pair.transport.doorbell(2).drain() == 1
    assert pair.driver.wait(timeout=60.0, queues=[own]) and pair.answers(own) == [b"no"]
    for queue in (first, second, own):
        pair.ask(queue, b"on")
        assert pair.driver.wait(timeout=60.0, queues=[queue]) and pair.answers(queue) == [b"no"]


def test_a_queue_is_not_reset_without_ring_reset() -> None:
    device = Echo()
    driver = Driver(LoopbackTransport(device))
    driver.negotiate()
    driver.setup_queue(0)
    with pytest.raises(StatusError, match=r"RING_RESET \(bit 40\) was not negotiated"):
        driver.reset_queue(0)
    with pytest.raises(StatusError, match=r"RING_RESET \(bit 40\) was not negotiated"):
        device.reset_queue(0)
    assert device.queue(0) is not None


def test_a_changed_configuration_wakes_the_driver(pair: Pair) -> None:
    generation = pair.transport.config_generation
    pair.device.change_config(b"new bits")
    assert pair.transport.config_generation != generation
    assert pair.driver.wait(timeout=60.0)
    assert pair.driver.read_config(0, 8) == b"new bits"
    assert not pair.driver.wait(timeout=0)


def test_a_handler_that_goes_round_the_ring_is_called_again(ring_format: str) -> None:
    """Progress is not told by positions: those come round again, in a packed ring of one entry after two buffers."""
    left = [0]

    class Greedy(Device):
        device_id = DeviceId.ENTROPY
        queues = ("requestq",)

        def on_requestq(self, queue: DeviceQueue) -> None:
            for _ in range(2):
                for chain in queue.pop(limit=1):
                    queue.complete(chain)
                    queue.publish()
                    refill()

    def refill() -> None:
        if queue.pop_used() and left[0]:
            left[0] -= 1
            queue.add(None, writable=[(driver.address + place, 16)])
            queue.publish()

    with LoopbackTransport(Greedy()) as transport, Driver(transport) as driver:
        packed = {Feature.RING_PACKED} if ring_format == "packed" else set()
        driver.negotiate(required=packed, wanted={Feature.EVENT_IDX})
        queue = driver.setup_queue(0, size=1)
        driver.driver_ok()
        place = driver.memory.allocate(16)
        left[0] = 6
        queue.add(None, writable=[(driver.address + place, 16)])
        queue.publish()
        transport.device.poll()
        assert (left[0], queue.outstanding) == (0, 0)


@pytest.mark.parametrize(("limit", "fits"), [(None, False), (6, True)])
def test_a_device_may_ask_for_longer_chains(ring_format: str, limit: int | None, fits: bool) -> None:
    """A table of 6 in a ring of 4: more than the ring has entries, so it takes a limit of its own (device-07)."""

    class Patient(Device):
        device_id = DeviceId.ENTROPY
        queues = ("requestq",)
        chain_limit = limit

        def on_requestq(self, queue: DeviceQueue) -> None:
            for chain in queue.pop():
                queue.complete(chain, chain.write(bytes(chain.writable)))
            queue.publish()

    with LoopbackTransport(Patient()) as transport:
        accepted = {Feature.VERSION_1, Feature.INDIRECT_DESC} | ({Feature.RING_PACKED} if ring_format == "packed" else set())
        memory = Memory(1 << 16)
        address = transport.attach(memory)
        transport.status = Status.ACKNOWLEDGE
        transport.status = Status.ACKNOWLEDGE | Status.DRIVER
        transport.accept(Features(accepted))
        transport.status = Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK
        ring = (RawPackedDriver if ring_format == "packed" else RawSplitDriver)(memory, 4, address=address)
        transport.queue_setup(0, 4, ring.areas)
        transport.status = Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK | Status.DRIVER_OK
        table, data = memory.allocate(96), memory.allocate(64)
        head = ring.add_indirect(address + table, [(address + data, 8, True)] * 6)
        if isinstance(ring, RawSplitDriver):
            ring.make_available(head)
        if fits:
            assert transport.device.poll() >= 1 and len(ring.used()) == 1
        else:
            with pytest.raises(SpecViolation):
                transport.device.poll()


def test_a_handler_that_leaves_a_buffer_is_woken_by_the_next(pair: Pair) -> None:
    """It waits for two: the one that it handed back keeps it neither busy nor asleep."""
    calls: list[int] = []

    def twos(far_end: DeviceQueue) -> None:
        calls.append(far_end.index)
        chains = far_end.pop(limit=2)
        if len(chains) < 2:
            if chains:
                far_end.rewind()
            return
        for chain in chains:
            far_end.complete(chain, chain.write(chain.read()[::-1]))
        far_end.publish()

    queue, doorbell = pair.queues[2], pair.transport.doorbell(2)
    pair.device.own = twos
    for _ in range(20):
        pair.device.poll()
        doorbell.drain()
        calls.clear()
        pair.ask(queue, b"one")
        assert doorbell.wait(timeout=0)
        pair.device.poll()
        assert 1 <= len(calls) <= 2 and not doorbell.wait(timeout=0), "it does not call itself again and again"
        pair.ask(queue, b"two")
        assert doorbell.wait(timeout=0), "the next buffer rings"
        pair.device.poll()
        assert pair.answers(queue) == [b"eno", b"owt"]


def test_a_device_that_was_reset_behind_the_drivers_back_is_noticed(pair: Pair, ring_features: Features) -> None:
    pair.queues[1].add("kept", writable=[(pair.driver.address, 16)])
    pair.device.reset()
    with pytest.raises(DeviceNeedsReset, match="lost DRIVER_OK"):
        pair.driver.wait(timeout=0.01)
    with pytest.raises(StatusError, match="in state needs reset"):
        pair.driver.wait(timeout=0)
    assert pair.driver.reset()[1] == ["kept"]
    pair.driver.negotiate(wanted=ring_features)
    queue = pair.driver.setup_queue(0, size=8)
    pair.driver.driver_ok()
    pair.ask(queue, b"fine")
    assert pair.driver.wait(timeout=60.0) and pair.answers(queue) == [b"enif"]
