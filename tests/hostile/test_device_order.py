"""Used runs under IN_ORDER, a device that needs a reset, and memory that goes away (device-21, device-22, device-24)."""

import mmap
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from itertools import permutations
from random import Random

import pytest

from tests.hostile.sides import BASE, BUFFERS, DEVICE_PATHS, MEMORY, PAYLOAD, DeviceSide, features, raises_once
from virtio import (
    BufferPool,
    Chain,
    Device,
    DeviceId,
    DeviceNeedsReset,
    DeviceQueue,
    Driver,
    EventFd,
    Feature,
    GuestMemory,
    MalformedChain,
    Memory,
    SpecViolation,
    Status,
    layout,
)
from virtio.device import DeviceState
from virtio.testing import RawPackedDriver, RawSplitDriver, Segment
from virtio.testing.packed import used_flags
from virtio.transport.loopback import LoopbackTransport

SIZE = 8

# device-21


class InOrderDriver:
    """What a driver may conclude from used elements if IN_ORDER was negotiated (2.7.9, 2.8.8)."""

    def __init__(self, side: DeviceSide) -> None:
        self.side = side
        self.outstanding: list[tuple[int, int, int]] = []
        """(head or id, ring slots, writable bytes), oldest first."""
        self.position, self.wrap = 0, 1
        self.elements = 0

    def offer(self, *buffers: list[Segment]) -> None:
        names = self.side.offer(*buffers)
        for name, segments in zip(names, buffers, strict=True):
            self.outstanding.append((name, len(segments), sum(length for _, length, writable in segments if writable)))

    def element(self) -> tuple[int, int] | None:
        ring = self.side.ring
        if isinstance(ring, RawSplitDriver):
            return ring.used_element(self.position) if self.position != ring.used_idx else None
        descriptor = ring.descriptor(self.position)
        if descriptor.flags & used_flags(1) != used_flags(self.wrap):
            return None
        return descriptor.id, descriptor.length

    def used(self) -> list[tuple[int, int]]:
        """(name, length) of all chains that came back, runs taken apart: all of a run but the last one are taken for filled."""
        found = []
        while (element := self.element()) is not None:
            name, length = element
            assert name in [each[0] for each in self.outstanding], f"{name} is not outstanding"
            self.elements += 1
            while True:
                first, slots, writable = self.outstanding.pop(0)
                self.step(slots)
                if first == name:
                    break
                found.append((first, writable))
            found.append((name, length))
        return found

    def step(self, slots: int) -> None:
        if isinstance(self.side.ring, RawPackedDriver):
            self.position, self.wrap = self.side.ring.step(self.position, self.wrap, slots)
        else:
            self.position = (self.position + 1) % 65536


KINDS: list[list[Segment]] = [
    [(BUFFERS, 16, False)],
    [(BUFFERS, 16, True)],
    [(BUFFERS, 8, False), (BUFFERS, 8, True)],
    [(BUFFERS, 8, False)] * 2,
]


def in_order(ring_format: str) -> DeviceSide:
    return DeviceSide(ring_format, Feature.IN_ORDER, size=SIZE)


@pytest.mark.parametrize("filled", [0, 1, 2, 3])
def test_device_21_a_run_holds_no_chain_that_was_not_filled(ring_format: str, filled: int) -> None:
    """`filled` of the first three chains are; whatever elements the device chooses, lengths come out right."""
    for full in permutations([True] * filled + [False] * (3 - filled)):
        side = in_order(ring_format)
        driver = InOrderDriver(side)
        driver.offer(*[[(BUFFERS, 16, True)]] * 4)
        chains = side.queue.pop()
        lengths = [16 if each else 15 for each in full] + [0]
        for chain, length in zip(chains, lengths, strict=True):
            side.queue.complete(chain, length)
        side.queue.publish()
        assert [length for _, length in driver.used()] == lengths
        assert driver.elements >= 1 + full.count(False)


@pytest.mark.parametrize("seed", range(10))
def test_device_21_runs_say_what_was_done_whatever_the_order(ring_format: str, seed: int) -> None:
    random = Random(seed)
    side = in_order(ring_format)
    driver = InOrderDriver(side)
    popped: list[Chain] = []
    expected: list[int] = []
    done: dict[int, int] = {}
    taken = returned = slots = 0
    for _ in range(600):
        step = random.randrange(4)
        if step == 0:
            buffer = random.choice(KINDS)
            if slots + len(buffer) <= SIZE:
                driver.offer(buffer)
                slots += len(buffer)
        elif step == 1:
            popped += side.queue.pop(random.randrange(1, 4))
        elif step == 2 and len(done) < len(popped):
            number = random.choice([each for each in range(len(popped)) if each not in done])
            done[number] = random.choice([0, popped[number].writable, random.randrange(popped[number].writable + 1)])
            side.queue.complete(popped[number], done[number])
        else:
            side.queue.publish()
            while taken in done:
                expected.append(done[taken])
                taken += 1
            before = sum(each[1] for each in driver.outstanding)
            used = driver.used()
            slots -= before - sum(each[1] for each in driver.outstanding)
            assert [length for _, length in used] == expected[returned:]
            returned = len(expected)
    assert returned > 50 and side.queue.broken is None


def test_device_21_a_chain_done_before_its_turn_is_not_told(ring_format: str) -> None:
    side = in_order(ring_format)
    driver = InOrderDriver(side)
    driver.offer(*[[(BUFFERS, 16, True)]] * 3)
    first, second, third = side.queue.pop()
    for chain in (third, second):
        side.queue.complete(chain, 16)
        side.queue.publish()
        assert driver.used() == []
        with pytest.raises(ValueError, match="completed"):
            side.queue.complete(chain, 16)
    side.queue.complete(first, 3)
    side.queue.publish()
    assert [length for _, length in driver.used()] == [3, 16, 16]


def test_device_21_without_in_order_each_chain_has_its_element(ring_format: str) -> None:
    side = DeviceSide(ring_format, size=SIZE)
    names = side.offer(*[[(BUFFERS, 16, False)]] * 4)
    chains = side.queue.pop()
    for chain in reversed(chains):
        side.queue.complete(chain)
    side.queue.publish()
    assert side.ring.used() == [(name, 0) for name in reversed(names)]


# device-22


class Reader(Device):
    """Takes its queue's chains by one of the paths."""

    device_id = DeviceId.CONSOLE
    queues = ("queue",)
    queue_size = SIZE

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path
        self.pool = BufferPool(Memory(1 << 16), 16)

    def on_queue(self, queue: DeviceQueue) -> None:
        if self.path == "token":
            queue.pop()
        elif self.path == "batch":
            queue.pop_batch(queue.batch(4))
        elif self.path == "burst":
            queue.pop_burst(self.pool.burst(4))
        else:
            burst = self.pool.burst(4)
            self.pool.take(burst)
            queue.fill_burst(burst)


@pytest.mark.parametrize("path", DEVICE_PATHS)
def test_device_22_a_hostile_chain_sets_needs_reset_and_notifies_once(ring_format: str, path: str) -> None:
    device = Reader(path)
    transport = LoopbackTransport(device)
    driver = Driver(transport)
    driver.negotiate(wanted=features(ring_format))
    queue = driver.setup_queue(0, size=SIZE)
    driver.driver_ok()
    raw = RawPackedDriver if ring_format == "packed" else RawSplitDriver
    ring = raw(driver.memory, SIZE, queue.areas, address=driver.address)
    head = ring.add_indirect(driver.address, [(driver.address, 16, True)])
    if isinstance(ring, RawSplitDriver):
        ring.make_available(head)
    with pytest.raises(SpecViolation) as caught:
        device.poll()
    raises_once(MalformedChain, caught.value, ring_format, ())
    assert device.state is DeviceState.NEEDS_RESET and Status.NEEDS_RESET | Status.DRIVER_OK in device.status
    assert transport.config_interrupt.drain() == 1
    for _ in range(3):
        assert device.poll() == 0
    assert transport.config_interrupt.drain() == 0
    broken = device.queue(0)
    assert broken is not None and broken.broken is caught.value
    with pytest.raises(DeviceNeedsReset):
        driver.check()
    driver.reset()
    assert device.status == 0 and device.queue(0) is None
    driver.close()
    transport.close()


# device-24


PAGE = mmap.PAGESIZE


class Foreign:
    """A device over a file that somebody else owns, who may cut it off."""

    def __init__(self, ring_format: str) -> None:
        self.fd = os.memfd_create("guest")
        os.ftruncate(self.fd, MEMORY)
        self.memory = Memory.from_fd(self.fd, MEMORY)
        self.guest = GuestMemory()
        self.guest.add(BASE, self.memory)
        bits = features(ring_format, Feature.INDIRECT_DESC)
        places = [BASE + PAGE * (1 + number) for number, _ in enumerate(layout(SIZE, features=bits))]
        areas = (places[0], places[1], places[2])
        raw = RawPackedDriver if ring_format == "packed" else RawSplitDriver
        self.ring = raw(self.guest, SIZE, areas)
        self.queue = DeviceQueue(self.guest, SIZE, areas, features=bits)
        self.interrupt = EventFd()
        self.queue.connect(self.interrupt)
        self.pool = BufferPool(Memory(1 << 18), 64)
        self.burst = self.pool.burst(16)

    def offer(self, segments: list[Segment]) -> None:
        head = self.ring.add(segments)
        if isinstance(self.ring, RawSplitDriver):
            self.ring.make_available(head)

    def take(self, path: str) -> None:
        if path == "token":
            for chain in self.queue.pop():
                chain.read()
                chain.write(bytes(chain.writable))
        elif path == "batch":
            self.queue.pop_batch(self.queue.batch(SIZE))
        elif path == "burst":
            self.queue.pop_burst(self.burst)
        else:
            self.pool.take(self.burst)
            self.burst.lengths[:] = PAYLOAD
            self.queue.fill_burst(self.burst)

    def breaks(self, path: str) -> None:
        """The bytes that were there read as zeros now; the next look at the queue finds out, and says so once."""
        with pytest.raises(SpecViolation) as caught:
            for _ in range(2):
                self.take(path)
        assert type(caught.value) is SpecViolation and self.queue.broken is caught.value
        for each in DEVICE_PATHS:
            self.take(each)
        assert self.queue.publish() is False and self.queue.arm() is True
        assert self.memory.poisoned


@pytest.fixture
def foreign(ring_format: str) -> Iterator[Foreign]:
    foreign = Foreign(ring_format)
    yield foreign
    os.close(foreign.fd)


@pytest.mark.parametrize("path", DEVICE_PATHS)
@pytest.mark.parametrize("size", [0, 2 * PAGE, MEMORY // 2])
def test_device_24_a_truncated_file_breaks_the_queue(foreign: Foreign, path: str, size: int) -> None:
    """Cut off are all areas, all but the descriptors, or only the buffers."""
    foreign.offer([(BUFFERS, PAYLOAD, path == "fill")])
    if path == "batch":  # moves no byte of a buffer, and reads nothing but descriptors of a packed ring
        size = min(size, PAGE)
    os.ftruncate(foreign.fd, size)
    foreign.breaks(path)


@pytest.mark.parametrize("path", ["token", "burst"])
def test_device_24_a_table_that_was_cut_off_breaks_the_queue(foreign: Foreign, path: str) -> None:
    table = BUFFERS + 0x1_0000
    if isinstance(foreign.ring, RawPackedDriver):
        foreign.ring.add_indirect(table, [(BUFFERS, PAYLOAD, False)])
    else:
        foreign.ring.make_available(foreign.ring.add_indirect(table, [(BUFFERS, PAYLOAD, False)]))
    os.ftruncate(foreign.fd, MEMORY // 2)
    foreign.breaks(path)


@pytest.mark.parametrize("call", ["arm", "disarm", "publish", "snapshot"])
def test_device_24_calls_that_only_touch_the_ring_survive_too(foreign: Foreign, call: str) -> None:
    foreign.offer([(BUFFERS, PAYLOAD, False)])
    (chain,) = foreign.queue.pop()
    foreign.queue.complete(chain)
    os.ftruncate(foreign.fd, 0)
    getattr(foreign.queue, call)()
    with pytest.raises(SpecViolation):
        foreign.queue.pop()
    assert foreign.queue.broken is not None


def test_device_24_setting_up_over_a_file_that_was_cut_off_survives(ring_format: str) -> None:
    fd = os.memfd_create("guest")
    os.ftruncate(fd, MEMORY)
    guest = GuestMemory()
    memory = Memory.from_fd(fd, MEMORY)
    guest.add(BASE, memory)
    os.ftruncate(fd, 0)
    try:
        queue = DeviceQueue(guest, SIZE, (BASE, BASE + PAGE, BASE + 2 * PAGE), features=features(ring_format), base=0)
        queue.pop()
    except (SpecViolation, ValueError):
        pass
    assert guest.read(BASE, 64) == bytes(64) and memory.poisoned
    with pytest.raises(ValueError, match=str(MEMORY)):
        Memory.from_fd(fd, MEMORY)
    os.close(fd)


def test_device_24_another_memory_is_not_concerned(foreign: Foreign, ring_format: str) -> None:
    other = DeviceSide(ring_format)
    foreign.offer([(BUFFERS, PAYLOAD, False)])
    os.ftruncate(foreign.fd, 0)
    foreign.breaks("token")
    other.offer(other.buffer())
    assert other.take("token") == 1 and other.chains[0].read() == bytes(PAYLOAD)


def test_device_24_a_sigbus_of_somebody_else_goes_where_it_went_before() -> None:
    program = textwrap.dedent(
        """
        import mmap, os
        from virtio import Memory
        ours = os.memfd_create("ours")
        os.ftruncate(ours, 4096)
        memory = Memory.from_fd(ours, 4096)
        os.ftruncate(ours, 0)
        assert memory.read(0, 8) == bytes(8) and memory.poisoned
        theirs = os.memfd_create("theirs")
        os.ftruncate(theirs, 4096)
        mapped = mmap.mmap(theirs, 4096)
        os.ftruncate(theirs, 0)
        print("alive", flush=True)
        mapped[0]
        """
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.stdout == "alive\n", result.stderr
    assert result.returncode == -signal.SIGBUS
