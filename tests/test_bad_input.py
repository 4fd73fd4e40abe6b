"""Every wrong argument is refused with an exception that names the value and the limit, and nothing has changed."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest

from tests.pair import BASE, PAYLOAD, Pair, fill
from virtio import (
    BufferPool,
    Burst,
    DeviceQueue,
    DriverQueue,
    EventFd,
    Feature,
    GuestMemory,
    Memory,
    QueueFull,
    StatusError,
    layout,
    need_event,
)

HUGE = 1 << 200
MEMORY = 1 << 20


class Stage(NamedTuple):
    """A pair with chains in flight, its bursts, and a stranger of each kind."""

    pair: Pair
    other: Pair
    tx: Burst
    rx: Burst
    free: Burst
    foreign: Burst

    def state(self) -> dict[str, Any]:
        """All that a refused call must leave as it is."""
        bursts = [(b.count, list(b.slots), list(b.offsets), list(b.lengths), list(b.more)) for b in (self.tx, self.rx, self.free)]
        return {**self.pair.state(), "bursts": bursts, "regions": self.pair.guest.regions, "memory": self.pair.memory.read(0, MEMORY)}


def stage(ring_format: str, tokens: bool = False) -> Stage:
    pair, other = Pair(ring_format, 8, Feature.INDIRECT_DESC), Pair(ring_format, 8)
    tx, rx, free, foreign = pair.pool.burst(4), pair.far.burst(4), pair.pool.burst(4), other.pool.burst(4)
    fill(foreign, [b"elsewhere"])
    if tokens:
        pair.driver.add("token", readable=[(BASE, 4)], writable=[(BASE + 64, 10)])
        pair.driver.publish()
    else:
        fill(tx, [b"one", b"two"])
        assert (pair.driver.add_burst(tx), pair.device.pop_burst(rx)) == (2, 2)
    fill(free, [b"three", b"four", b"five"])
    return Stage(pair, other, tx, rx, free, foreign)


Call = Callable[[Stage], object]
Case = tuple[str, Call, type[Exception] | tuple[type[Exception], ...], tuple[object, ...]]


def case(name: str, call: Call, kind: type[Exception] | tuple[type[Exception], ...], *parts: object) -> Any:
    return pytest.param((name, call, kind, parts), id=name)


def refused(here: Stage, what: Case) -> None:
    _, call, kind, parts = what
    before = here.state()
    with pytest.raises(kind) as caught:
        call(here)
    for part in parts:
        assert re.search(rf"(?<!\w){re.escape(str(part))}(?!\w)", str(caught.value)), f"{part} is not in: {caught.value}"
    assert here.state() == before


def driver(s: Stage, size: Any = 8, **more: Any) -> DriverQueue:
    return DriverQueue(s.pair.memory, size, **{"features": s.pair.features, "address": BASE, **more})


def device(s: Stage, size: Any = 8, **more: Any) -> DeviceQueue:
    areas = more.pop("areas", s.pair.driver.areas)
    return DeviceQueue(s.pair.guest, size, areas, **{"features": s.pair.features, **more})


def area(s: Stage, place: int, value: int) -> tuple[int, ...]:
    areas = list(s.pair.driver.areas)
    areas[place] = value
    return tuple(areas)


def sizes(make: Callable[..., object]) -> list[Any]:
    """A queue that cannot be so large, from either side."""
    wrong: list[tuple[Any, type[Exception], *tuple[object, ...]]] = [
        *((size, ValueError, size, 32768) for size in (0, -1, 65536, 32769, 1 << 32)),
        (HUGE, ValueError, hex(HUGE), 32768),
        *((size, TypeError) for size in (8.0, "8", None)),
    ]
    return [case(f"{make.__name__} size {size!r:.12}", partial(make, size=size), kind, *parts) for size, kind, *parts in wrong]


SETUP = [
    *sizes(driver),
    *sizes(device),
    case("driver index", lambda s: driver(s, index=65536), ValueError, 65536, 65535),
    case("driver address over the end", lambda s: driver(s, address=(1 << 64) - MEMORY + 1), ValueError, hex((1 << 64) - MEMORY + 1)),
    case("driver address beyond 64 bits", lambda s: driver(s, address=1 << 64), ValueError, 1 << 64),
    case("driver address unaligned", lambda s: driver(s, address=BASE + 8), ValueError, 16),
    case("driver features negative", lambda s: driver(s, features=-1), ValueError, -1),
    case("driver features too wide", lambda s: driver(s, features=1 << 128), ValueError, hex(1 << 128)),
    case("driver features a bit", lambda s: driver(s, features=Feature.RING_PACKED), TypeError, "features", "1 << Feature.RING_PACKED"),
    case("device features a bit", lambda s: device(s, features=Feature.RING_PACKED), TypeError, "features", "1 << Feature.RING_PACKED"),
    case("layout features a bit", lambda s: layout(8, features=Feature.RING_PACKED), TypeError, "features", "1 << Feature.RING_PACKED"),
    case("driver indirect limit", lambda s: driver(s, indirect_limit=9), ValueError, 9, 8),
    case("driver indirect limit without the feature", lambda s: driver(s, features=0, indirect_limit=4), ValueError, "INDIRECT_DESC"),
    case("driver without room", lambda s: driver(s, 32768), ValueError, MEMORY),
    case("driver memory of another kind", lambda s: DriverQueue(s.pair.guest, 8), TypeError),  # type: ignore[arg-type]
    case("device memory of another kind", lambda s: DeviceQueue(s.pair.memory, 8, (0, 0, 0)), TypeError),  # type: ignore[arg-type]
    case("device size above its maximum", lambda s: device(s, 8, max_size=4), ValueError, 8, 4),
    case("device maximum", lambda s: device(s, max_size=65536), ValueError, 65536, 32768),
    case("device chain limit 0", lambda s: device(s, chain_limit=0), ValueError, 0),
    case("device chain limit", lambda s: device(s, chain_limit=1025), ValueError, 1025, 1024),
    case("device base", lambda s: device(s, base=1 << 32), ValueError, 1 << 32),
    case("device index", lambda s: device(s, index=-1), ValueError, -1, 65535),
    case("descriptor area unaligned", lambda s: device(s, areas=area(s, 0, BASE + 8)), ValueError, "descriptor", hex(BASE + 8), 16),
    case("driver area unaligned", lambda s: device(s, areas=area(s, 1, BASE + 1)), ValueError, "driver", hex(BASE + 1)),
    case("device area unaligned", lambda s: device(s, areas=area(s, 2, BASE + 2)), ValueError, "device", hex(BASE + 2), 4),
    case("area outside memory", lambda s: device(s, areas=area(s, 0, 0x1000)), ValueError, "descriptor", "0x1000", 128),
    case("area half outside", lambda s: device(s, areas=area(s, 0, BASE + MEMORY - 16)), ValueError, hex(BASE + MEMORY - 16), 128),
    case("area over the end", lambda s: device(s, areas=area(s, 0, (1 << 64) - 16)), ValueError, hex((1 << 64) - 16)),
    case("area beyond 64 bits", lambda s: device(s, areas=area(s, 2, 1 << 64)), ValueError, 1 << 64),
    case("two areas", lambda s: device(s, areas=s.pair.driver.areas[:2]), (TypeError, ValueError), 3),
    case("layout size", lambda s: layout(65536), ValueError, 65536, 32768),
    case("need_event", lambda s: need_event(0, 65536, 0), ValueError, 65536, 65535),
]


@pytest.mark.parametrize("what", SETUP)
def test_setting_up_a_queue(ring_format: str, what: Case) -> None:
    refused(stage(ring_format), what)


@pytest.mark.parametrize("size", [3, 12, 32767])
def test_split_rings_have_a_power_of_two_of_entries(size: int) -> None:
    here = stage("split")
    for make in (driver, device):
        refused(here, ("", lambda s, make=make: make(s, size), ValueError, (size, "power of two")))  # type: ignore[misc]
    assert layout(size, features=1 << Feature.RING_PACKED)[0] == (16 * size, 16)


TOKENS = [
    case("no segments", lambda s: s.pair.driver.add(1), ValueError, "at least one"),
    case("zero-length segment", lambda s: s.pair.driver.add(1, readable=[(BASE, 1), (BASE, 0)]), ValueError, 0),
    case("negative length", lambda s: s.pair.driver.add(1, writable=[(BASE, -5)]), ValueError, -5),
    case("length beyond 32 bits", lambda s: s.pair.driver.add(1, writable=[(BASE, 1 << 32)]), ValueError, 1 << 32, (1 << 32) - 1),
    case("segment outside memory", lambda s: s.pair.driver.add(1, readable=[(BASE - 1, 2)]), ValueError, hex(BASE - 1), 2),
    case("segment over memory's end", lambda s: s.pair.driver.add(1, readable=[(BASE + MEMORY - 1, 2)]), ValueError, 2),
    case("negative address", lambda s: s.pair.driver.add(1, readable=[(-1, 2)]), ValueError, -1),
    case("address over the end", lambda s: s.pair.driver.add(1, readable=[((1 << 64) - 1, 2)]), ValueError, hex((1 << 64) - 1)),
    case("too many segments", lambda s: s.pair.driver.add(1, readable=[(BASE, 1)] * 9), ValueError, 9, 8),
    case("too many indirect segments", lambda s: s.pair.driver.add(1, readable=[(BASE, 1)] * 9, indirect=True), ValueError, 9, 8),
    case("no free descriptors", lambda s: s.pair.driver.add(1, readable=[(BASE, 1)] * 8), QueueFull, 8, 6),
    case("segment of three", lambda s: s.pair.driver.add(1, readable=[(BASE, 1, 2)]), (TypeError, ValueError)),  # type: ignore[list-item]
    case("segments of floats", lambda s: s.pair.driver.add(1, readable=[(BASE, 1.5)]), TypeError),  # type: ignore[list-item]
    case("no iterable", lambda s: s.pair.driver.add(1, readable=7), TypeError),  # type: ignore[arg-type]
    case("negative pop limit", lambda s: s.pair.driver.pop_used(-1), ValueError, -1),
    case("negative device limit", lambda s: s.pair.device.pop(-1), ValueError, -1),
    case("huge device limit", lambda s: s.pair.device.pop(HUGE), ValueError, hex(HUGE)),
    case("rewind what is not there", lambda s: s.pair.device.rewind(1), ValueError, 1),
    case("rewind a negative count", lambda s: s.pair.device.rewind(-1), ValueError, -1, 8),
    case("no doorbell", lambda s: s.pair.driver.connect(3), TypeError),  # type: ignore[arg-type]
    case("closed doorbell", lambda s: s.pair.driver.connect(closed_event()), StatusError, "closed"),
    case("batch capacity", lambda s: s.pair.device.batch(0), ValueError, 0, 32768),
    case("another queue's batch", lambda s: s.pair.device.pop_batch(s.other.device.batch()), ValueError, "another"),
    case("burst while tokens are out", lambda s: s.pair.driver.add_burst(s.free), ValueError, 1, "tokens"),
]


def closed_event() -> EventFd:
    event = EventFd()
    event.close()
    return event


@pytest.mark.parametrize("what", TOKENS)
def test_chains_with_tokens(ring_format: str, what: Case) -> None:
    refused(stage(ring_format, tokens=True), what)


def test_a_chain_of_more_bytes_than_a_used_length_can_say(ring_format: str) -> None:
    with Memory(1 << 32) as memory:  # never touched, but for the ring
        queue = DriverQueue(memory, 8, features=1 << Feature.RING_PACKED if ring_format == "packed" else 0)
        before = (queue.snapshot(), queue.counters)
        with pytest.raises(ValueError, match=r"4294967296 bytes is longer than 4294967295"):
            queue.add(1, writable=[(0, 1 << 31), (0, 1 << 31)])
        assert (queue.snapshot(), queue.counters) == before
        queue.close()


def test_lengths_and_chains_of_a_device(ring_format: str) -> None:
    here, there = stage(ring_format, tokens=True), stage(ring_format, tokens=True)
    (chain,), (stranger,) = here.pair.device.pop(), there.pair.device.pop()
    cases: list[tuple[Callable[[Stage], object], type[Exception], tuple[object, ...]]] = [
        (lambda s: s.pair.device.complete(chain, 11), ValueError, (11, 10)),
        (lambda s: s.pair.device.complete(chain, -1), ValueError, (-1, 10)),
        (lambda s: s.pair.device.complete(chain, HUGE), ValueError, (hex(HUGE), 10)),
        (lambda s: s.pair.device.complete(stranger), ValueError, ("another",)),
        (lambda s: s.pair.device.complete("chain"), TypeError, ()),  # type: ignore[arg-type]
        (lambda s: chain.read(5), ValueError, (5, 4)),
        (lambda s: chain.read(1, offset=4), ValueError, (1, 4)),
        (lambda s: chain.read(-1), ValueError, (-1,)),
        (lambda s: chain.read(offset=5), ValueError, (5, 4)),
        (lambda s: chain.write(bytes(11)), ValueError, (11, 10)),
        (lambda s: chain.write(b"x", offset=10), ValueError, (1, 10)),
        (lambda s: chain.write(b"x", offset=-1), ValueError, (-1,)),
        (lambda s: chain.write("text"), TypeError, ()),  # type: ignore[arg-type]
    ]
    for call, kind, parts in cases:
        refused(here, ("", call, kind, parts))
    here.pair.device.complete(chain, 10)
    for call in (lambda s: chain.read(), lambda s: chain.write(b"x")):
        refused(here, ("", call, StatusError, (chain.head, "in flight")))
    refused(here, ("", lambda s: s.pair.device.complete(chain), ValueError, (chain.head,)))


def test_used_lengths_of_a_batch(ring_format: str) -> None:
    here = stage(ring_format, tokens=True)
    here.pair.driver.add("second", writable=[(BASE + 128, 20)])
    here.pair.driver.publish()
    batch = here.pair.device.batch(4)
    assert here.pair.device.pop_batch(batch) == 2
    for row, value, limit in ((0, 11, 10), (1, 21, 20), (1, -1, 20), (0, (1 << 32) + 1, 10)):
        batch.used[:2] = 0
        batch.used[row] = value
        batch.writable[:] = 1 << 40  # the column is not what counts
        refused(here, ("", lambda s: s.pair.device.complete_batch(batch), ValueError, (row, value, limit)))
        assert batch.count == 2
    for count in (3, -1):
        with pytest.raises(ValueError, match=rf"{count} is not in 0 to 2"):
            batch.count = count
    batch.used[:2] = (10, 20)
    assert here.pair.device.complete_batch(batch) == 2


def spoil(column: str, row: int, value: int) -> Callable[[Stage], None]:
    def call(s: Stage) -> None:
        getattr(s.free, column)[row] = value

    return call


ROWS = [
    ("slots", 1, -1, (1, "slot", -1, 63)),
    ("slots", 2, 64, (2, "slot", 64, 63)),
    ("slots", 0, 1 << 40, (0, "slot", 1 << 40, 63)),
    ("slots", 0, "free", (0, "slot", "does not belong")),
    ("slots", 0, "in flight", (0, "slot", "does not belong")),
    ("slots", 1, "twice", (1, "slot", "earlier row")),
    ("offsets", 1, -1, (1, "offset", -1, 255)),
    ("offsets", 1, 256, (1, "offset", 256, 255)),
    ("lengths", 0, 0, (0, "length", 0, PAYLOAD)),
    ("lengths", 0, -5, (0, "length", -5, PAYLOAD)),
    ("lengths", 2, PAYLOAD + 1, (2, "length", PAYLOAD + 1, PAYLOAD)),
    ("lengths", 2, (1 << 63) - 1, (2, "length", (1 << 63) - 1, PAYLOAD)),
    ("more", 0, 2, (0, "more", 2, 1)),
    ("more", 2, 1, (2, "more", 1)),
]


@pytest.mark.parametrize(("column", "row", "value", "parts"), ROWS, ids=[f"{column} {value}" for column, _, value, _ in ROWS])
def test_rows_of_a_burst(ring_format: str, column: str, row: int, value: int | str, parts: tuple[object, ...]) -> None:
    here = stage(ring_format)
    stranger = here.pair.pool.burst(1)
    here.pair.pool.take(stranger)
    slot = int(stranger.slots[0])
    here.pair.pool.give(stranger)
    held = set(here.free.slots) | {slot}
    in_flight = next(s for s in range(here.pair.pool.slots) if s not in held and s in set(here.tx.slots))
    getattr(here.free, column)[row] = {"free": slot, "in flight": in_flight, "twice": here.free.slots[0]}.get(str(value), value)
    for call in (here.pair.driver.add_burst, here.pair.driver.add_writable_burst, here.pair.device.fill_burst):
        refused(here, ("", lambda s, call=call: call(s.free), ValueError, ("row", *parts)))  # type: ignore[misc]


BURSTS = [
    case("pool of other memory", lambda s: s.pair.driver.add_burst(s.foreign), ValueError, "memory"),
    case("length 0", lambda s: s.pair.driver.add_burst(s.free, 0), ValueError, 0, 256),
    case("length negative", lambda s: s.pair.driver.add_writable_burst(s.free, -1), ValueError, -1, 256),
    case("length beyond the slot", lambda s: s.pair.driver.add_burst(s.free, length=257), ValueError, 257, 256),
    case("length beyond a row's room", lambda s: s.pair.driver.add_burst(s.free, 193), ValueError, "row 0", 193, 192),
    case("length to write beyond a row's room", lambda s: s.pair.driver.add_writable_burst(s.free, 256), ValueError, 256, 192),
    case("length no number", lambda s: s.pair.driver.add_burst(s.free, "60"), TypeError),  # type: ignore[arg-type]
    case("pool of other memory to receive", lambda s: s.pair.driver.pop_used_burst(s.foreign), ValueError, "memory"),
    case("second pool while slots are out", lambda s: s.pair.driver.add_burst(second_pool(s)), ValueError, 2),
    case("second pool while chains are lent", lambda s: s.pair.device.pop_burst(s.free), ValueError, 2),
    case("take by another pool", lambda s: s.pair.pool.take(s.foreign), ValueError, "another pool"),
    case("give by another pool", lambda s: s.pair.pool.give(s.rx), ValueError, "another pool"),
    case("no burst", lambda s: s.pair.driver.add_burst([1, 2]), TypeError),  # type: ignore[arg-type]
    case("no burst for the device", lambda s: s.pair.device.pop_burst(None), TypeError),  # type: ignore[arg-type]
    case("tokens while bursts are out", lambda s: s.pair.driver.add(1, readable=[(BASE, 1)]), ValueError, 2, "bursts"),
    case("burst capacity 0", lambda s: s.pair.pool.burst(0), ValueError, 0, 32768),
    case("burst capacity", lambda s: s.pair.pool.burst(32769), ValueError, 32769, 32768),
    case("pool without slots", lambda s: BufferPool(s.pair.memory, 0), ValueError, 0, 1 << 20),
    case("pool of too many", lambda s: BufferPool(s.pair.memory, (1 << 20) + 1), ValueError, (1 << 20) + 1, 1 << 20),
    case("pool slots too small", lambda s: BufferPool(s.pair.memory, 1, slot_size=64), ValueError, 64, 128),
    case("pool slots uneven", lambda s: BufferPool(s.pair.memory, 1, slot_size=200), ValueError, 200, 64),
    case("pool slots too large", lambda s: BufferPool(s.pair.memory, 1, slot_size=1 << 18), ValueError, 1 << 18, 1 << 17),
    case("pool without room", lambda s: BufferPool(s.pair.memory, 1024), ValueError, 1024 * 2048),
]


def second_pool(s: Stage) -> Burst:
    pool = BufferPool(s.pair.memory, 4, slot_size=256)
    burst = pool.burst(1)
    pool.take(burst)
    return burst


@pytest.mark.parametrize("what", BURSTS)
def test_bursts_and_pools(ring_format: str, what: Case) -> None:
    refused(stage(ring_format), what)


def test_a_packet_of_more_rows_than_entries(ring_format: str) -> None:
    pair = Pair(ring_format, 2)
    burst = pair.pool.burst(8)
    fill(burst, [b"x", b"y" * (3 * PAYLOAD)])
    here = Stage(pair, pair, burst, pair.far.burst(1), burst, burst)
    refused(here, ("", lambda s: s.pair.driver.add_burst(s.tx), ValueError, (3, 2)))


MEMORIES = [
    case("memory size 0", lambda s: Memory(0), ValueError, 0),
    case("memory size negative", lambda s: Memory(-4096), ValueError, -4096),
    case("memory size huge", lambda s: Memory(HUGE), ValueError, hex(HUGE)),
    case("memory name", lambda s: Memory(4096, name="x" * 250), ValueError, 249),
    case("memory name with NUL", lambda s: Memory(4096, name="a\0b"), ValueError, "NUL"),
    case("descriptor negative", lambda s: Memory.from_fd(-1, 4096), ValueError, -1),
    case("descriptor that is none", lambda s: Memory.from_fd(1 << 20, 4096), OSError),
    case("mapping beyond the file", lambda s: Memory.from_fd(s.pair.memory.fileno(), MEMORY + 1), ValueError, MEMORY + 1, MEMORY),
    case("mapping over the end", lambda s: Memory.from_fd(s.pair.memory.fileno(), 16, offset=(1 << 63) - 1), ValueError),
    case("mapping of nothing", lambda s: Memory.from_fd(s.pair.memory.fileno(), 0), ValueError, 0),
    case("allocation of 0", lambda s: s.pair.memory.allocate(0), ValueError, 0, MEMORY),
    case("allocation too large", lambda s: s.pair.memory.allocate(MEMORY + 1), ValueError, MEMORY + 1, MEMORY),
    case("alignment", lambda s: s.pair.memory.allocate(16, 24), ValueError, 24),
    case("free of nothing", lambda s: s.pair.memory.free(MEMORY - 1), ValueError, MEMORY - 1),
    case("read outside", lambda s: s.pair.memory.read(MEMORY - 1, 2), ValueError, MEMORY - 1, 2, MEMORY),
    case("read at a negative offset", lambda s: s.pair.memory.read(-1, 2), ValueError, -1),
    case("read of far too much", lambda s: s.pair.memory.read(0, 1 << 62), ValueError, 1 << 62, MEMORY),
    case("write outside", lambda s: s.pair.memory.write(MEMORY - 1, b"ab"), ValueError, MEMORY - 1, 2, MEMORY),
    case("write of no bytes-like", lambda s: s.pair.memory.write(0, "text"), TypeError),  # type: ignore[arg-type]
    case("write of strided bytes", lambda s: s.pair.memory.write(0, memoryview(b"abcd")[::2]), BufferError),
    case("load width", lambda s: s.pair.memory.load(0, 3), ValueError, 3, 8),
    case("load width 0", lambda s: s.pair.memory.load(0, 0), ValueError, 0, 8),
    case("load unaligned", lambda s: s.pair.memory.load(2, 4), ValueError, "0x2", 4),
    case("store outside", lambda s: s.pair.memory.store(MEMORY, 1, 0), ValueError, MEMORY),
    case("store value", lambda s: s.pair.memory.store(0, 2, 65536), ValueError, 65536, 65535),
    case("store negative", lambda s: s.pair.memory.store(0, 2, -1), ValueError, -1),
    case("close in use", lambda s: s.pair.memory.close(), BufferError, "in use"),
    case("region overlaps", lambda s: s.pair.guest.add(BASE + 4096, s.other.memory), ValueError, hex(BASE + 4096), hex(BASE)),
    case("region over the end", lambda s: s.pair.guest.add((1 << 64) - 4096, s.other.memory), ValueError, hex((1 << 64) - 4096)),
    case("region outside its memory", lambda s: s.pair.guest.add(0, s.other.memory, offset=1, length=MEMORY), ValueError, MEMORY),
    case("region past its memory", lambda s: s.pair.guest.add(0, s.other.memory, offset=MEMORY), ValueError, MEMORY),
    case("region of nothing", lambda s: s.pair.guest.add(0, s.other.memory, length=0), ValueError, 0),
    case("region that is not there", lambda s: s.pair.guest.remove(1), ValueError, "0x1"),
    case("regions that overlap", lambda s: s.pair.guest.replace([(0, s.other.memory, 0, 9), (8, s.other.memory, 0, 9)]), ValueError, "0x8"),
    case("regions of another shape", lambda s: s.pair.guest.replace([(0, s.other.memory)]), (TypeError, ValueError)),  # type: ignore[list-item]
    case("unmapped bytes", lambda s: s.pair.guest.write(BASE - 1, b"ab"), ValueError, hex(BASE - 1), 2),
    case("dirty pages", lambda s: s.pair.guest.start_dirty_log((1 << 30) + 1), ValueError, (1 << 30) + 1, 1 << 30),
    case("timeout", lambda s: EventFd().wait(-1.0), ValueError, -1),
    case("timeout that is no number", lambda s: EventFd().wait(float("nan")), ValueError),
]


@pytest.mark.parametrize("what", MEMORIES)
def test_memories(what: Case) -> None:
    refused(stage("split"), what)


def test_a_refused_region_does_not_hold_the_memory() -> None:
    guest, memory = GuestMemory(), Memory(4096)
    for arguments in ({"length": 4097}, {"offset": 4096}, {"length": 0}):
        with pytest.raises(ValueError, match=r"409[67]|\b0\b"):
            guest.add(0, memory, **arguments)
    for size in (8, 65536):
        with pytest.raises(ValueError, match="1"):
            DriverQueue(memory, size, address=1)
    with pytest.raises(ValueError, match="slots"):
        BufferPool(memory, 0)
    assert memory.allocate(4096) == 0
    memory.close()


def test_after_close_everything_is_refused(ring_format: str) -> None:
    pair = Pair(ring_format)
    batch, burst, far = pair.device.batch(), pair.pool.burst(1), pair.far.burst(1)
    pair.driver.close()
    pair.device.close()
    driver, device = pair.driver, pair.device
    calls: list[Callable[[], object]] = [
        lambda: driver.add(1, readable=[(BASE, 1)]),
        driver.publish,
        driver.pop_used,
        lambda: driver.add_burst(burst),
        lambda: driver.add_writable_burst(burst),
        lambda: driver.pop_used_burst(burst),
        driver.arm,
        driver.disarm,
        driver.snapshot,
        lambda: driver.connect(None),
        lambda: driver.outstanding,
        lambda: driver.notification_value,
        device.pop,
        device.rewind,
        device.publish,
        device.batch,
        lambda: device.pop_batch(batch),
        lambda: device.complete_batch(batch),
        lambda: device.pop_burst(far),
        lambda: device.complete_burst(far),
        lambda: device.fill_burst(far),
        device.arm,
        device.disarm,
        device.snapshot,
        lambda: device.connect(None),
        lambda: device.outstanding,
    ]
    for call in calls:
        with pytest.raises(StatusError, match="the queue is closed"):
            call()
