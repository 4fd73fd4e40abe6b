"""Frames as bytes, each end alone: nanoseconds a frame; the result is checked inside."""

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from virtio.bench.frames import CALLS, measure


@pytest.mark.benchmark(group="frames as bytes")
@pytest.mark.parametrize("length", [60, 1514])
def test_frames(benchmark: BenchmarkFixture, ring_format: str, length: int) -> None:
    found = benchmark.pedantic(measure, (ring_format, 64, length), rounds=3, warmup_rounds=1)
    assert set(found) == set(CALLS)
    benchmark.extra_info["nanoseconds a frame"] = found
