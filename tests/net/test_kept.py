"""Ends that nobody keeps: their memory and descriptors go at once, not when the collector finds them."""

import gc
import weakref
from collections.abc import Iterator
from functools import partial

import pytest

from virtio import NetDevice, NetDriver, StatusError
from virtio.pci.emulated import EmulatedFunction
from virtio.transport.loopback import LoopbackTransport
from virtio.transport.pci import PciTransport


@pytest.fixture(autouse=True)
def _no_collector() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("pairs", [1, 2])
@pytest.mark.parametrize("over", ["loopback", "pci"])
def test_ends_that_were_closed_are_gone_with_their_last_name(over: str, pairs: int) -> None:
    device = NetDevice(queue_pairs=pairs)
    transport = LoopbackTransport(device) if over == "loopback" else PciTransport(EmulatedFunction(device))
    driver = NetDriver(transport, queue_pairs=pairs)
    driver.send_frames([bytes(60)])
    assert len(device.receive_frames()) == 1
    driver.close()
    transport.close()
    left = [weakref.ref(each) for each in (driver, device, transport)]
    del driver, device, transport
    assert [each() for each in left] == [None] * 3


def test_a_pair_does_not_keep_its_end() -> None:
    pair = NetDevice(queue_pairs=2).pair(1)
    for call in (partial(getattr, pair, "pool"), pair.fileno, pair.need_reset):
        with pytest.raises(StatusError, match="queue pair 1 was kept"):
            call()
