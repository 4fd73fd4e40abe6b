"""What a burst call costs, and what a whole round costs, by format, burst and payload."""

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from virtio.bench.calls import Boundary, round_trip

BURSTS = [1, 8, 32, 64, 256]


@pytest.mark.benchmark(group="call without ring work")
@pytest.mark.parametrize("items", BURSTS)
@pytest.mark.parametrize("call", ["pop_batch", "pop_used_burst", "add_burst"])
def test_boundary(benchmark: BenchmarkFixture, call: str, items: int) -> None:
    boundary = Boundary(items)
    assert benchmark(boundary.calls()[call]) == 0
    boundary.check()


@pytest.mark.benchmark(group="round in one thread")
@pytest.mark.parametrize("items", BURSTS)
@pytest.mark.parametrize("payload", [0, 60, 1514])
def test_round(benchmark: BenchmarkFixture, ring_format: str, items: int, payload: int) -> None:
    assert benchmark(round_trip(ring_format, items, payload)) == items
    assert benchmark.stats is not None
    benchmark.extra_info["nanoseconds a buffer"] = benchmark.stats.stats.median / items * 1e9
