"""What one call of a device's queue does not do: give all chains at once, or remember those in flight."""

from collections.abc import Callable

import pytest

from tests.pair import Pair, fill
from virtio import DeviceQueue, Feature


def test_a_base_knows_nothing_of_chains_in_flight(ring_format: str) -> None:
    pair = Pair(ring_format, 4)
    for number in range(3):
        pair.driver.add(number, readable=[pair.place(bytes([number]))])
    pair.driver.publish()
    assert len(pair.device.pop(2)) == 2
    lost = pair.device.base
    pair.device.rewind(2)
    kept = pair.device.base
    for base, seen in ((lost, [b"\2"]), (kept, [b"\0", b"\1", b"\2"])):
        resumed = DeviceQueue(pair.guest, 4, pair.driver.areas, features=pair.features, base=base)
        assert [chain.read() for chain in resumed.pop()] == seen


def by_pop(pair: Pair) -> Callable[[], int]:
    return lambda: len(pair.device.pop())


def by_batch(pair: Pair) -> Callable[[], int]:
    batch = pair.device.batch(8)
    return lambda: pair.device.pop_batch(batch)


def by_burst(pair: Pair) -> Callable[[], int]:
    burst = pair.far.burst(8)
    fill(burst, [b"x"] * 8)
    return lambda: pair.device.fill_burst(burst)


@pytest.mark.parametrize("way", [by_pop, by_batch, by_burst])
def test_one_call_may_give_fewer_chains_than_are_available(ring_format: str, way: Callable[[Pair], Callable[[], int]]) -> None:
    pair = Pair(ring_format, 8, Feature.INDIRECT_DESC)
    for number in range(8):
        pair.driver.add(number, writable=[pair.room(1) for _ in range(8)], indirect=True)
    pair.driver.publish()
    take = way(pair)
    given = [take()]
    while given[-1]:
        given.append(take())
    assert 0 < given[0] < 8 and sum(given) == 8
