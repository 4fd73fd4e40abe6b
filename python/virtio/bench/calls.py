"""What one call from Python into the core costs, at several burst sizes, in one process."""

import time
from collections.abc import Callable

from virtio.bench.setup import Near


def cost(call: Callable[[], object], rounds: int = 15, calls: int = 2000) -> list[float]:
    """Nanoseconds a call, `calls` calls in each of `rounds` rounds, sorted."""
    samples = []
    for _ in range(rounds):
        start = time.perf_counter_ns()
        for _ in range(calls):
            call()
        samples.append((time.perf_counter_ns() - start) / calls)
    return sorted(samples)


class Boundary:
    """Burst calls without ring work: what the crossing costs. Each gives 0.

    `pop_batch` and `pop_used_burst` meet a ring with nothing to take. `add_burst` meets a full one: it reads and checks every row, finds no
    room, and keeps them all.
    """

    def __init__(self, items: int) -> None:
        self._items = items
        self._near = near = Near("split", size=256, burst=items)
        self._far = near.far()
        fill = near.pool.burst(256)
        near.pool.take(fill)
        if near.queue.add_burst(fill) != 256:
            raise RuntimeError("the ring is not full")
        self._rows, self._empty = near.pool.burst(items), near.pool.burst(items)
        near.pool.take(self._rows)
        self._idle = Near("split", size=256, burst=items)
        self._idle_far = self._idle.far()
        self._batch = self._idle_far.queue.batch(items)

    def calls(self) -> dict[str, Callable[[], int]]:
        """Functions to time, by name."""
        pop, pop_used, add = self._idle_far.queue.pop_batch, self._near.queue.pop_used_burst, self._near.queue.add_burst
        return {
            "pop_batch": lambda: pop(self._batch),
            "pop_used_burst": lambda: pop_used(self._empty),
            "add_burst": lambda: add(self._rows),
        }

    def check(self) -> None:
        """RuntimeError: a call did ring work after all."""
        if self._rows.count != self._items or self._near.queue.outstanding != 256:
            raise RuntimeError(f"{self._rows.count} rows stayed of {self._items}, {self._near.queue.outstanding} chains of 256")


def nothing() -> int:
    """What the loop and a Python function cost."""
    return 0


def round_trip(ring_format: str, items: int, payload: int = 0) -> Callable[[], int]:
    """Add, pop, complete and reclaim `items` buffers in this thread: a function to time; it gives how many came back."""
    near = Near(ring_format, size=256, burst=items)
    queue, far = near.queue, near.far()
    burst, served = near.pool.burst(items), far.pool.burst(items)
    batch = far.queue.batch(items)
    lengths, template = burst.lengths, bytes(payload)
    near.pool.take(burst)
    batch.used[:] = 0

    def descriptors() -> int:
        lengths[:] = 64
        queue.add_burst(burst)
        far.queue.pop_batch(batch)
        far.queue.complete_batch(batch)
        return queue.pop_used_burst(burst)

    def copied() -> int:
        lengths[:] = payload
        burst.write(template)
        queue.add_burst(burst)
        far.queue.pop_burst(served)
        far.queue.complete_burst(served)
        return queue.pop_used_burst(burst)

    return copied if payload else descriptors
