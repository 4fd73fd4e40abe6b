"""Benchmarks run on one core."""

import os

import pytest


@pytest.fixture(autouse=True, scope="session")
def pinned() -> None:
    os.sched_setaffinity(0, {0})


@pytest.fixture(params=["split", "packed"])
def ring_format(request: pytest.FixtureRequest) -> str:
    return str(request.param)
