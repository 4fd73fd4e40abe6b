"""A back-end's rings after its device was reset, or came to need that: none runs on that was not set up anew. And after a refused request,
when all run on as before."""

import socket
import tempfile

import pytest

from tests.vhost_user.frontend import GUEST, SIZE, USER, Frontend
from tests.vhost_user.serving import Echo
from tests.without_proc import without_proc
from virtio import DriverQueue, Feature, NetDevice
from virtio.device import Device, DeviceState
from virtio.devices.rng import RngDevice
from virtio.features import Features
from virtio.spec import Status
from virtio.vhost_user import message as wire
from virtio.vhost_user.backend import Backend
from virtio.vhost_user.message import FrontendRequest as F
from virtio.vhost_user.message import Region

FEATURES = Features({Feature.VERSION_1})
AVAIL, INDIRECT = 1 << 7, 1 << 2
SECTIONS = {"split": "2.7.6", "packed": "2.8.19"}
"""Where the rule stands that `break_ring` breaks."""
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
    path: str,
    errors: list[Exception],
    ring_features: Features,
    make: type[Device],
    index: int,
    request_: F,
    payload: wire.Payload | None,
) -> None:
    device = make()
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


def two_rings(frontend: Frontend, features: Features, *, both: bool = True) -> list[DriverQueue]:
    """Started; the first one enabled only with `both`."""
    frontend.negotiate(features)
    queues = [frontend.queue(index) for index in range(2)]
    for queue in queues:
        frontend.start(queue, enabled=both or queue.index == 1)
    return queues


def break_ring(frontend: Frontend, queue: DriverQueue) -> None:
    """As only a hostile driver would, in a new ring: an available index beyond the ring (device-05), a table where none was negotiated."""
    if queue.ring_format == "split":
        frontend.memory.store(queue.areas[1] - GUEST + 2, 2, 999)
    else:
        frontend.memory.store(queue.areas[0] - GUEST + 8, 8, 16 | (AVAIL | INDIRECT) << 48)
    frontend.kicks[queue.index].signal()
    frontend.turn()


def needs_reset(frontend: Frontend) -> bool:
    reply = frontend.ask(F.GET_STATUS)
    assert reply is not None
    return bool(reply.payload.value & Status.NEEDS_RESET)


@pytest.mark.parametrize("enabled", [True, False], ids=["a ring breaks", "the device says so while one is disabled"])
def test_device_22_a_device_that_needs_a_reset_stays_so_whatever_is_enabled(
    path: str, errors: list[Exception], ring_features: Features, *, enabled: bool
) -> None:
    device = Echo()
    with Backend(path, device, report=errors.append) as backend, Frontend.at(path, backend) as frontend:
        queues = two_rings(frontend, ring_features, both=enabled)
        assert not needs_reset(frontend)
        if enabled:
            break_ring(frontend, queues[1])
            assert frontend.errors[1].drain()
        else:
            device.need_reset()
        for index in (0, 1, 0, 1):
            for value in (0, 1):
                assert not frontend.refused(F.SET_VRING_ENABLE, wire.VringState(index, value))
                frontend.kicks[index].signal()
                frontend.turn()
                assert needs_reset(frontend)
        frontend.map([Region(GUEST, SIZE // 2, USER, 0), Region(GUEST + SIZE // 2, SIZE // 2, USER + SIZE // 2, SIZE // 2)])
        assert needs_reset(frontend)
        section = SECTIONS[queues[1].ring_format]
        assert [section in str(error) for error in errors] == [True] * enabled, "told once"
        assert not frontend.errors[1].drain()


@pytest.mark.parametrize("stops", [True, False], ids=["stops", "disables"])
def test_device_22_without_a_reset_rings_that_are_set_up_anew_run_and_no_other(
    path: str, errors: list[Exception], ring_features: Features, *, stops: bool
) -> None:
    """There are front-ends that can say no more than that."""
    device = Echo()
    with Backend(path, device, report=errors.append) as backend, Frontend.at(path, backend) as frontend:
        queues = two_rings(frontend, ring_features)
        break_ring(frontend, queues[1])
        assert errors.pop() and needs_reset(frontend)
        for index in range(2):
            if stops:
                frontend.stop(index)
            else:
                assert not frontend.refused(F.SET_VRING_ENABLE, wire.VringState(index, 0))
        again = frontend.queue(0)
        frontend.start(again)
        assert not needs_reset(frontend) and device.queue(1) is None
        assert not frontend.refused(F.SET_VRING_ENABLE, wire.VringState(1, 1))
        frontend.kicks[1].signal()
        frontend.turn()
        assert not needs_reset(frontend) and device.queue(1) is None
        if not stops:
            assert not frontend.refused(F.SET_VRING_ENABLE, wire.VringState(1, 0))
        transmitq = frontend.queue(1)
        frontend.start(transmitq)
        again.add("room", writable=[frontend.room(200)])
        again.publish()
        transmitq.add("frame", readable=[frontend.room(72, bytes(12) + b"f" * 60)])
        transmitq.publish()
        frontend.kicks[1].signal()
        frontend.turn()
        assert again.pop_used() == [("room", 72)]
    assert not errors


def keeps_its_call() -> None:
    with (
        tempfile.TemporaryDirectory() as folder,
        Backend(f"{folder}/s", Echo()) as backend,
        Frontend.at(f"{folder}/s", backend) as frontend,
        socket.socket(socket.AF_UNIX) as nobody,
    ):
        frontend.negotiate(FEATURES)
        queue = frontend.queue(1)
        frontend.start(frontend.queue(0))
        frontend.start(queue)
        for enabled in (0, 1):  # emptied, and on the device
            frontend.ask(F.SET_VRING_ENABLE, wire.VringState(1, enabled))
            frontend.calls[1].drain()
            assert frontend.refused(F.SET_VRING_CALL, wire.U64(1), [nobody.fileno()])
            assert give(frontend, queue, writable=False) == [("buffer", 0)]
            assert frontend.calls[1].drain()


def test_a_call_descriptor_that_is_refused_changes_nothing() -> None:
    without_proc(keeps_its_call)


def ring_is_emptied_for_a_deaf_one() -> None:
    told: list[Exception] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        Backend(f"{folder}/s", NetDevice(), report=told.append) as backend,
        Frontend.at(f"{folder}/s", backend) as frontend,
    ):
        frontend.negotiate(FEATURES)
        queue = frontend.queue(1)
        frontend.start(queue, enabled=False)
        frontend.deafen(1)
        assert give(frontend, queue, writable=False) == [("buffer", 0)]
        assert [type(error) for error in told] == [OSError] and frontend.errors[1].drain() and backend.connections == 1


def test_a_ring_whose_front_end_cannot_be_told_that_it_was_emptied_breaks() -> None:
    without_proc(ring_is_emptied_for_a_deaf_one)
