"""A peer that writes anything anywhere between any two calls: whatever happens is one of the two answers, and nothing hangs."""

from random import Random

import pytest

from tests.hostile.sides import BASE, BUFFERS, MEMORY, PAYLOAD, features, raises_once
from virtio import (
    BadUsedElement,
    BufferPool,
    Burst,
    ChainBatch,
    DeviceQueue,
    DriverQueue,
    Feature,
    GuestMemory,
    MalformedChain,
    Memory,
    QueueFull,
    SpecViolation,
    layout,
)

SIZES = {"split": 8, "packed": 7}
ROUNDS = 300
LIKELY = [0, 1, 2, 3, 4, 5, 7, 8, 9, 16, 32, 0x80, 0x81, 0x82, 0x84, 0x8000, 0x8001, 0x8002, 0x8080, 0x8082, 0xFFFF]
LIKELY += [BUFFERS >> shift & 0xFFFF for shift in (0, 16, 32, 48)]


def scribble(random: Random, memory: Memory, ring_format: str, places: list[tuple[int, int]]) -> None:
    """Writes some 16-bit words, most of them likely ones, into areas given by offset and bytes."""
    for _ in range(random.choice([0, 1, 2, 4, 8])):
        offset, length = random.choice(places)
        value = random.choice(LIKELY) if random.random() < 0.95 else random.randrange(65536)
        memory.store(offset + 2 * random.randrange(length // 2), 2, value)
    if ring_format == "packed":  # few words there mean anything: a descriptor that looks available or used, with a likely length
        place = places[0][0] + 16 * random.randrange(places[0][1] // 16)
        memory.store(place, 8, BUFFERS)
        flags = random.choice([0x80, 0x8000, 0x8080, 0]) | random.choice([0, 0, 1, 2, 4])
        memory.store(place + 8, 8, random.choice([1, 16, 16, 32]) | random.randrange(9) << 32 | flags << 48)


@pytest.mark.parametrize("in_order", [False, True])
def test_a_device_survives_a_driver_that_writes_anything(ring_format: str, in_order: bool) -> None:
    size = SIZES[ring_format]
    memory, guest, random = Memory(MEMORY), GuestMemory(), Random(size)
    guest.add(BASE, memory)
    bits = features(ring_format, Feature.INDIRECT_DESC, Feature.EVENT_IDX, *([Feature.IN_ORDER] if in_order else []))
    pool = BufferPool(Memory(1 << 18), 64, slot_size=128)
    broken = popped = 0
    places = [(0x400 * area, length) for area, (length, _) in enumerate(layout(size, features=bits))]
    for _ in range(ROUNDS):
        memory.write(0, bytes(0x1000))
        queue = DeviceQueue(guest, size, (BASE, BASE + 0x400, BASE + 0x800), features=bits)
        burst, batch = pool.burst(16), queue.batch(size)
        try:
            for _ in range(40):
                scribble(random, memory, ring_format, places)
                device_step(queue, random.randrange(7), pool, burst, batch)
        except SpecViolation as error:
            raises_once(MalformedChain, error, ring_format, ())
            assert queue.broken is error
            assert queue.pop() == [] and queue.pop_burst(burst) == 0
            broken += 1
        assert queue.outstanding <= size
        popped += queue.counters["popped"]
        queue.reset()
        pool.give(burst)
        assert pool.available == pool.slots
    assert broken > ROUNDS // 10 and popped > ROUNDS // 10, "it was hostile, but not only that"


def device_step(queue: DeviceQueue, step: int, pool: BufferPool, burst: Burst, batch: ChainBatch) -> None:
    """One thing that a device does."""
    if step == 0:
        for chain in queue.pop(limit=3):
            chain.read(min(chain.readable, 64))
            queue.complete(chain, chain.write(bytes(min(chain.writable, 64))))
    elif step == 1:
        queue.pop_burst(burst)
    elif step == 2:
        pool.take(burst)
        queue.fill_burst(burst)
    elif step == 3:
        queue.pop_batch(batch)
        queue.complete_batch(batch)
    elif step == 4:
        queue.publish()
    elif step == 5:
        queue.arm()
        queue.snapshot()
    else:
        queue.disarm()


@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("path", ["token", "burst"])
def test_a_driver_survives_a_device_that_writes_anything(ring_format: str, in_order: bool, path: str) -> None:
    size = SIZES[ring_format]
    memory, random = Memory(MEMORY), Random(size)
    bits = features(ring_format, Feature.INDIRECT_DESC, Feature.EVENT_IDX, *([Feature.IN_ORDER] if in_order else []))
    pool = BufferPool(memory, 64, slot_size=128)
    burst = pool.burst(16)
    broken = returned = 0
    for _ in range(ROUNDS):
        queue = DriverQueue(memory, size, features=bits, address=BASE)
        places = [(area - BASE, length) for area, (length, _) in zip(queue.areas, layout(size, features=bits), strict=True)]
        places += places[:1] * 3 if ring_format == "packed" else places[2:] * 3  # where used ones are looked for
        tokens: set[int] = set()
        try:
            for number in range(40):
                driver_step(queue, random, pool, burst if path == "burst" else None, tokens, number)
                scribble(random, memory, ring_format, places)
        except SpecViolation as error:
            raises_once(BadUsedElement, error, ring_format, ())
            assert queue.broken is error and queue.publish() is False
            broken += 1
        returned += queue.counters["used"]
        pool.give(burst)
        assert set(queue.reset()) == tokens, "what did not come back comes back now, once"
        assert pool.available == pool.slots
        queue.close()
    assert broken > ROUNDS // 10 and returned > 0, "it was hostile, but not only that"


def driver_step(queue: DriverQueue, random: Random, pool: BufferPool, burst: Burst | None, tokens: set[int], number: int) -> None:
    """One thing that a driver does."""
    step = random.randrange(5)
    if step in (0, 1) and burst is not None:
        pool.take(burst)
        (queue.add_burst if step else queue.add_writable_burst)(burst)
    elif step in (0, 1):
        segments = [(BUFFERS + PAYLOAD * place, PAYLOAD) for place in range(random.randrange(1, 4))]
        try:
            queue.add(number, readable=segments[:step], writable=segments[step:], indirect=random.random() < 0.5)
            tokens.add(number)
        except QueueFull:
            pass
    elif step == 2:
        queue.publish()
    elif step == 3 and burst is not None:
        queue.pop_used_burst(burst)
    elif step == 3:
        for token, length in queue.pop_used():
            tokens.remove(token)
            assert length <= 3 * PAYLOAD
    else:
        queue.arm() if random.random() < 0.5 else queue.disarm()
