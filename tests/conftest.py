"""What all tests share: the two ring formats, and how hypothesis runs."""

import gc
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from tests.leftovers import descriptors
from virtio.features import Features
from virtio.spec import Feature

# The same examples in each run: a failure that comes and goes helps nobody. `--hypothesis-profile=explore` looks further.
settings.register_profile("repeatable", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("explore", deadline=None, max_examples=2000, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("repeatable")


@pytest.fixture(scope="module", autouse=True)
def _what_is_there_stays() -> None:
    """Who looks for garbage in a test looks at what this file's tests made, and not at what was collected and kept before: in a whole run
    that is ever more, of pytest and hypothesis."""
    gc.collect()
    gc.freeze()


LEFT = 200
"""Descriptors that a whole session may leave: many times what it does, and a tenth of what one kind of test that leaves some comes to."""


@pytest.fixture(scope="session", autouse=True)
def _nothing_piles_up() -> Iterator[None]:
    before = len(descriptors())
    yield
    left = descriptors()
    assert len(left) <= before + LEFT, f"{len(left) - before} descriptors are left of the whole session"


@pytest.fixture(params=["split", "packed"])
def ring_format(request: pytest.FixtureRequest) -> str:
    """Name of the format, for tests that hold in both."""
    return str(request.param)


@pytest.fixture
def ring_features(ring_format: str) -> Features:
    """The feature bits that select `ring_format`."""
    return Features({Feature.VERSION_1, Feature.RING_PACKED} if ring_format == "packed" else {Feature.VERSION_1})
