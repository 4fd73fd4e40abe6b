"""A file that is truncated under a mapping: whoever looked there says so once, and hands out none of the zeros (device-24)."""

import os
from collections.abc import Callable, Iterator

import pytest

from tests.pair import BASE, SLOT_SIZE, fill
from virtio import BufferPool, Chain, DeviceQueue, DriverQueue, Feature, Features, GuestMemory, Memory, SpecViolation, StatusError

SIZE = 1 << 16
DATA = BASE + SIZE
"""Buffers stand in a file of their own, so that the ring's file can stay."""


class Stage:
    """Both ends over two files that anybody can truncate, one for the ring and one for the buffers."""

    def __init__(self, ring_format: str) -> None:
        self.files = [os.memfd_create(name) for name in ("ring", "data")]
        for fd in self.files:
            os.ftruncate(fd, SIZE)
        features = Features([Feature.RING_PACKED] if ring_format == "packed" else [])
        self.memory, self.data = (Memory.from_fd(fd, SIZE) for fd in self.files)
        self.driver = DriverQueue(self.memory, 8, features=features, address=BASE)
        self.guest = GuestMemory()
        self.guest.add(BASE, self.memory)
        self.guest.add(DATA, self.data)
        self.device = DeviceQueue(self.guest, 8, self.driver.areas, features=features)
        self.far = BufferPool(Memory(1 << 16), 16, slot_size=SLOT_SIZE)

    def offer(self, chains: int, *, writable: bool = False) -> None:
        """Makes chains available whose bytes are in the second file: past the driver's queue, whose own memory that is not."""
        descriptor, available, _ = (area - BASE for area in self.driver.areas)
        if self.driver.ring_format == "split":
            for i in range(chains):
                at = descriptor + 16 * i
                self.memory.store(at, 8, DATA + 4096 * i)
                self.memory.store(at + 8, 4, 100)
                self.memory.store(at + 12, 2, 2 * writable)
                self.memory.store(available + 4 + 2 * i, 2, i)
            self.memory.store(available + 2, 2, chains)
        else:
            for i in range(chains):
                at = descriptor + 16 * i
                self.memory.store(at, 8, DATA + 4096 * i)
                self.memory.store(at + 8, 4, 100)
                self.memory.store(at + 12, 2, i)
                self.memory.store(at + 14, 2, 1 << 7 | 2 * writable)

    def truncate(self, file: int) -> None:
        os.ftruncate(self.files[file], 0)


@pytest.fixture
def stage(ring_format: str) -> Iterator[Stage]:
    made = Stage(ring_format)
    yield made
    for fd in made.files:
        os.close(fd)


def lost(call: Callable[[], object], queue: DriverQueue | DeviceQueue, address: int) -> None:
    """The call breaks the queue, with the place in the message."""
    with pytest.raises(SpecViolation, match=rf"(?i){address:#x}.*{SIZE}|{SIZE}.*{address:#x}") as raised:
        call()
    assert queue.broken is raised.value
    assert type(raised.value) is SpecViolation, "whoever owns the file did that, and need not be the other end"


@pytest.mark.parametrize("name", ["add", "publish", "pop_used", "arm"])
def test_a_driver_whose_memory_is_gone_says_so_once(stage: Stage, name: str) -> None:
    driver = stage.driver
    for token in ("a", "b"):
        driver.add(token, readable=[(BASE + SIZE - 100, 10)])
    driver.publish()
    stage.truncate(0)
    stage.memory.read(0, 1)  # whoever meets it first
    assert stage.memory.poisoned
    calls: dict[str, Callable[[], object]] = {
        "add": lambda: driver.add("c", readable=[(BASE, 10)]),
        "publish": driver.publish,
        "pop_used": driver.pop_used,
        "arm": driver.arm,
    }
    lost(calls[name], driver, BASE)
    assert (driver.publish(), driver.pop_used(), driver.arm()) == (False, [], True)
    with pytest.raises(StatusError):
        driver.add("c", readable=[(BASE, 10)])
    assert sorted(driver.reset()) == ["a", "b"]


def test_a_driver_that_meets_the_zeros_itself(stage: Stage) -> None:
    driver = stage.driver
    for token in ("a", "b"):
        driver.add(token, readable=[(BASE + SIZE - 100, 10)])
    driver.publish()
    for chain in stage.device.pop():
        stage.device.complete(chain)
    stage.device.publish()
    stage.truncate(0)
    lost(driver.pop_used, driver, BASE)
    assert (driver.outstanding, driver.pop_used()) == (2, [])
    assert sorted(driver.reset()) == ["a", "b"]


@pytest.mark.parametrize("taken", [0, 1])
@pytest.mark.parametrize("name", ["pop", "pop_batch", "pop_burst", "fill_burst"])
def test_a_device_that_meets_the_zeros_itself(stage: Stage, name: str, taken: int) -> None:
    stage.offer(3, writable=name == "fill_burst")
    device, burst, batch = stage.device, stage.far.burst(8), stage.device.batch(8)
    device.pop(taken)
    fill(burst, [b"waits"])
    before = device.base, device.outstanding, device.counters
    stage.truncate(0)
    calls: dict[str, Callable[[], object]] = {
        "pop": device.pop,
        "pop_batch": lambda: device.pop_batch(batch),
        "pop_burst": lambda: device.pop_burst(burst),
        "fill_burst": lambda: device.fill_burst(burst),
    }
    lost(calls[name], device, BASE)
    assert (device.base, device.outstanding, device.counters, batch.count) == (*before, 0)
    assert burst.count == (name != "pop_burst")
    assert (device.pop(), device.pop_batch(batch), device.arm()) == ([], 0, True)


@pytest.mark.parametrize("name", ["read", "write"])
def test_bytes_of_a_chain_are_not_made_up(stage: Stage, name: str) -> None:
    stage.offer(1, writable=name == "write")
    chain = stage.device.pop()[0]
    stage.truncate(1)
    calls: dict[str, Callable[[Chain], object]] = {"read": lambda chain: chain.read(), "write": lambda chain: chain.write(b"x" * 100)}
    lost(lambda: calls[name](chain), stage.device, DATA)
    with pytest.raises(StatusError):
        calls[name](chain)
    assert (stage.device.pop(), stage.device.publish()) == ([], False)


def test_packets_of_a_burst_are_not_made_up(stage: Stage) -> None:
    stage.offer(3)
    stage.truncate(1)
    burst = stage.far.burst(8)
    lost(lambda: stage.device.pop_burst(burst), stage.device, DATA)
    assert (burst.count, stage.far.available) == (0, 16)
    assert (stage.device.pop_burst(burst), stage.device.complete_burst(burst)) == (0, 0)


def test_long_packets_of_a_burst_are_not_made_up(stage: Stage) -> None:
    stage.far = BufferPool(Memory(1 << 16), 16, slot_size=128)
    stage.offer(3)
    stage.truncate(1)
    burst = stage.far.burst(8)
    lost(lambda: stage.device.pop_burst(burst), stage.device, DATA)
    assert (burst.count, stage.far.available) == (0, 16)


def test_packets_that_went_nowhere_stay(stage: Stage) -> None:
    stage.offer(3, writable=True)
    stage.truncate(1)
    burst = stage.far.burst(8)
    fill(burst, [b"a" * 10, b"b" * 20])
    lost(lambda: stage.device.fill_burst(burst), stage.device, DATA)
    assert [burst.tobytes(row) for row in range(burst.count)] == [b"a" * 10, b"b" * 20]
    assert stage.device.fill_burst(burst) == 0
    assert stage.device.counters["used"] == 0


def test_nothing_is_published_over_lost_memory(stage: Stage) -> None:
    stage.offer(1)
    stage.device.complete(stage.device.pop()[0])
    stage.truncate(1)
    stage.data.read(0, 1)
    lost(stage.device.publish, stage.device, DATA)
    assert stage.device.counters["used"] == 0
