"""Pools and bursts: who has which slot, and what numpy sees of it."""

import gc
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest

from tests.pair import PAYLOAD, SLOT_SIZE, fill, packets_of
from virtio import BufferPool, DriverQueue, Memory, StatusError


@pytest.fixture
def pool() -> BufferPool:
    return BufferPool(Memory(1 << 16), 16, slot_size=SLOT_SIZE)


def test_a_pool_has_its_place_in_memory(pool: BufferPool) -> None:
    assert (pool.slots, pool.slot_size, pool.available, pool.drops, pool.HEADROOM) == (16, SLOT_SIZE, 16, 0, 64)
    assert pool.offset % 64 == 0
    assert (pool.frames.shape, pool.frames.dtype) == ((16, PAYLOAD), np.uint8)
    pool.frames[3, :4] = list(b"abcd")
    assert pool.memory.read(pool.offset + 3 * SLOT_SIZE + 64, 4) == b"abcd"
    assert pool.frames is pool.frames


def test_a_burst_takes_slots_and_gives_them_back(pool: BufferPool) -> None:
    burst, other = pool.burst(10), pool.burst(10)
    assert (burst.capacity, burst.count, len(burst), burst.pool) == (10, 0, 0, pool)
    assert (pool.take(burst), pool.take(other), pool.available) == (10, 6, 0)
    assert sorted([*burst.slots, *other.slots[:6]]) == list(range(16))
    assert set(burst.offsets) == {64} and set(burst.lengths) == {PAYLOAD} and set(burst.more) == {0}
    assert pool.take(burst) == 10
    pool.give(burst)
    assert (burst.count, pool.available) == (0, 10)
    del other
    gc.collect()
    assert pool.available == 16


def test_columns_are_int64_views_made_once(pool: BufferPool) -> None:
    burst = pool.burst(5)
    for name in ("slots", "offsets", "lengths", "more"):
        column = getattr(burst, name)
        assert column.dtype == np.int64 and column.shape == (5,) and column.flags.writeable
        assert getattr(burst, name) is column
    kept = burst.slots
    pool.take(burst)
    assert sorted(kept) == sorted(burst.slots)
    slots = list(kept)
    del burst
    gc.collect()
    assert (list(kept), pool.available) == (slots, 16), "the array outlives the burst, its slots do not"


def test_write_and_headers_reach_every_packet(pool: BufferPool) -> None:
    burst = pool.burst(4)
    fill(burst, [b"a" * 10, b"b" * (PAYLOAD + 5), b"c"])
    burst.header(b"HD")
    assert packets_of(burst) == [b"HD" + b"a" * 10, b"HD" + b"b" * (PAYLOAD + 5), b"HDc"]
    assert list(burst.offsets) == [62, 62, 64, 62]
    burst.scatter(b"123456")
    assert packets_of(burst) == [b"12HD" + b"a" * 10, b"34HD" + b"b" * (PAYLOAD + 5), b"56HDc"]
    pool.take(burst)
    burst.count = 3
    burst.write(b"template")
    assert packets_of(burst) == [b"template"] * 3
    burst.header(b"h" * 64)
    before = packets_of(burst)
    with pytest.raises(ValueError, match="header of 1 bytes does not fit before offset 0"):
        burst.header(b"x")
    with pytest.raises(ValueError, match=r"7 bytes .* 3 packets"):
        burst.scatter(b"1234567")
    with pytest.raises(ValueError, match=f"{SLOT_SIZE + 1} bytes do not fit into the slot's {SLOT_SIZE}"):
        burst.write(bytes(SLOT_SIZE + 1))
    with pytest.raises(ValueError, match="at least one byte"):
        burst.write(b"")
    assert packets_of(burst) == before


def test_rows_that_are_not_valid_cannot_be_read(pool: BufferPool) -> None:
    burst = pool.burst(4)
    pool.take(burst)
    burst.count = 2
    for row in (2, -1, 1 << 70):
        with pytest.raises(ValueError, match="burst row"):
            burst.tobytes(row)
    burst.lengths[0] = PAYLOAD + 1
    with pytest.raises(ValueError, match=f"length {PAYLOAD + 1} is not in 0 to {PAYLOAD}"):
        burst.tobytes(0)
    burst.slots[1] = 16
    with pytest.raises(ValueError, match="slot 16 does not belong"):
        burst.tobytes(1)
    for count in (5, -1, 1 << 80):
        with pytest.raises(ValueError, match=r"is not in 0 to 4"):
            burst.count = count
    assert burst.count == 2


def use_and_close(memory: Memory) -> int:
    """Leaves a closed pool behind, with a burst and a view that go out of use; gives its offset."""
    pool = BufferPool(memory, 16, slot_size=SLOT_SIZE)
    burst, frames = pool.burst(), pool.frames
    pool.take(burst)
    offset = pool.offset
    pool.close()
    pool.close()
    uses: list[Callable[[], object]] = [
        lambda: pool.available,
        lambda: pool.drops,
        lambda: pool.frames,
        lambda: pool.burst(),
        lambda: pool.take(burst),
        lambda: pool.give(burst),
        lambda: burst.write(b"x"),
        lambda: burst.tobytes(0),
    ]
    for use in uses:
        with pytest.raises(StatusError, match="the pool is closed"):
            use()
    assert memory.allocate(1) != offset
    with pytest.raises(BufferError):
        memory.close()
    frames[:] = 1
    return offset


def test_a_closed_pool_is_gone_when_its_last_user_is() -> None:
    memory = Memory(1 << 16)
    offset = use_and_close(memory)
    gc.collect()
    assert memory.allocate(16 * SLOT_SIZE, 64) == offset
    memory.close()


def test_a_closed_pool_that_nobody_uses_is_gone_though_its_object_is_kept() -> None:
    memory = Memory(1 << 16)
    pool = BufferPool(memory, 16, slot_size=SLOT_SIZE)
    burst, queue = pool.burst(4), DriverQueue(memory, 8)
    pool.take(burst)
    assert queue.add_burst(burst) == 4
    del burst
    pool.close()
    place = memory.allocate(16 * SLOT_SIZE, 64)
    assert place != pool.offset, "a queue has slots of it"
    memory.free(place)
    queue.close()
    pool.close()
    assert memory.allocate(16 * SLOT_SIZE, 64) == pool.offset
    memory.close()


def test_a_pool_needs_own_memory() -> None:
    with Memory(1 << 16) as memory, Memory.from_fd(memory.fileno(), 1 << 16) as foreign:
        with pytest.raises(ValueError, match="peer"):
            BufferPool(foreign, 4)
        assert foreign.allocate(1 << 16) == 0, "nothing is left of it"


def test_numpy_is_imported_for_the_first_array_only() -> None:
    program = """if True:
        import sys
        from virtio._core import BufferPool, DriverQueue, Memory
        memory = Memory(1 << 20)
        pool, queue = BufferPool(memory, 8), DriverQueue(memory, 8)
        burst = pool.burst(4)
        assert (pool.take(burst), queue.add_burst(burst), queue.pop_used_burst(burst)) == (4, 4, 0)
        assert "numpy" not in sys.modules
        burst.slots
        assert "numpy" in sys.modules
    """
    subprocess.run([sys.executable, "-c", program], check=True)
