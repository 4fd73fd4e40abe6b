"""Two processes, Python at both ends, polling: each round is a whole run, which checks that nothing was lost."""

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from virtio.bench.pair import Pair

TOTAL = 1 << 19


@pytest.mark.benchmark(group="two processes")
@pytest.mark.parametrize("burst", [1, 8, 32, 64, 256])
@pytest.mark.parametrize("payload", [0, 60, 1514])
def test_pair(benchmark: BenchmarkFixture, ring_format: str, burst: int, payload: int) -> None:
    total = TOTAL if burst >= 32 else TOTAL >> 3
    pair = Pair(ring_format, size=256 if burst < 256 else 1024, burst=burst, payload=payload, total=total)
    nanoseconds = benchmark.pedantic(pair.measure, rounds=5, iterations=1, warmup_rounds=1)
    assert nanoseconds > 0
    assert benchmark.stats is not None
    benchmark.extra_info["nanoseconds a buffer"] = benchmark.stats.stats.median / total * 1e9
