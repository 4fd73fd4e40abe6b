"""A back-end's rings after its device was reset, or came to need that: none runs on that was not set up anew."""

from pathlib import Path

import pytest

from tests.vhost_user.frontend import Frontend
from virtio import DriverQueue, NetDevice
from virtio.device import Device, DeviceState
from virtio.devices.rng import RngDevice
from virtio.features import Features
from virtio.vhost_user import message as wire
from virtio.vhost_user.backend import Backend
from virtio.vhost_user.message import FrontendRequest as F

RESETS = [(F.SET_STATUS, wire.U64(0)), (F.RESET_DEVICE, None)]


def give(frontend: Frontend, queue: DriverQueue, *, writable: bool) -> list[tuple[object, int]]:
    """Makes a buffer available and kicks; what came back."""
    place = frontend.room(64)
    queue.add("buffer", readable=[] if writable else [place], writable=[place] if writable else [])
    queue.publish()
    frontend.kicks[queue.index].signal()
    frontend.turn()
    return queue.pop_used()


@pytest.mark.parametrize(("request_", "payload"), RESETS, ids=["SET_STATUS", "RESET_DEVICE"])
@pytest.mark.parametrize(("make", "index"), [(RngDevice, 0), (NetDevice, 0), (NetDevice, 1)], ids=["requestq", "receiveq", "transmitq"])
def test_after_a_reset_no_ring_runs_until_it_has_a_kick_again(
    tmp_path: Path, ring_features: Features, make: type[Device], index: int, request_: F, payload: wire.Payload | None
) -> None:
    path, device, errors = str(tmp_path / "s"), make(), list[Exception]()
    with Backend(path, device, report=errors.append) as backend, Frontend.at(path, backend) as frontend:
        frontend.negotiate(ring_features)
        queue, writable = frontend.queue(index), index == 0
        frontend.start(queue)
        served = give(frontend, queue, writable=writable)
        assert bool(served) == (make is RngDevice)
        assert not frontend.refused(request_, payload)
        for _ in range(2):
            assert device.state is DeviceState.RESET and device.queue(index) is None
            assert give(frontend, queue, writable=writable) == []
            assert not frontend.refused(F.SET_VRING_ENABLE, wire.VringState(index, 1))
        assert not frontend.refused(F.SET_FEATURES, wire.U64(int(ring_features) | 1 << wire.PROTOCOL_FEATURES_BIT))  # nothing runs
        again = frontend.queue(index)
        frontend.start(again)
        assert device.state is DeviceState.DRIVER_OK and device.queue(index) is not None
        assert bool(give(frontend, again, writable=writable)) == (make is RngDevice)
    assert not errors
