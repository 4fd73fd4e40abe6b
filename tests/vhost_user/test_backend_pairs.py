"""The back-end with several queue pairs: rings enabled one by one, and a control queue that the front-end passes through or keeps."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.net.flows import udp
from tests.vhost_user.frontend import Frontend
from virtio import Burst, DriverQueue, Feature, NetDevice, NetFeature
from virtio.features import Features
from virtio.vhost_user import message as wire
from virtio.vhost_user.backend import Backend
from virtio.vhost_user.message import FrontendRequest as F

HEADER = 12
FLOWS = [udp(flow) for flow in range(16)]
KEPT = {NetFeature.MQ}
"""What a front-end passes that keeps the control queue to itself (QEMU)."""
PASSED = {NetFeature.MQ, NetFeature.CTRL_VQ}


class Echo(NetDevice):
    def on_frames(self, burst: Burst) -> None:
        self.send(burst)


class Guest:
    """Rings of a driver with two pairs, behind a front-end."""

    def __init__(self, frontend: Frontend, features: Features) -> None:
        self.frontend = frontend
        frontend.negotiate(features)
        self.queues: dict[int, DriverQueue] = {}

    def start(self, *indexes: int, enabled: bool = True) -> None:
        for index in indexes:
            queue = self.queues[index] = self.frontend.queue(index)
            self.frontend.start(queue, enabled=enabled)

    def enable(self, *indexes: int, on: bool = True) -> None:
        for index in indexes:
            assert not self.frontend.refused(F.SET_VRING_ENABLE, wire.VringState(index, int(on)))

    def fill(self, index: int, count: int) -> None:
        queue = self.queues[index]
        for _ in range(count):
            place = self.frontend.room(128)
            queue.add(place, writable=[place])
        queue.publish()
        self.frontend.turn()

    def frames(self, index: int) -> list[bytes]:
        self.frontend.turn()
        queue = self.queues[index]
        queue.arm()
        return [self.frontend.look(place, length)[HEADER:] for place, length in queue.pop_used()]

    def transmit(self, index: int, *frames: bytes) -> int:
        """How many came back."""
        queue = self.queues[index]
        for frame in frames:
            queue.add(None, readable=[self.frontend.room(HEADER + len(frame), bytes(HEADER) + frame)])
        queue.publish()
        queue.arm()
        self.frontend.turn()
        return len(queue.pop_used())

    def set_pairs(self, pairs: int, index: int = 4) -> int:
        """The answer of the control queue."""
        queue = self.queues[index]
        answer = self.frontend.room(1, b"\xee")
        queue.add(None, readable=[self.frontend.room(4, bytes([4, 0, pairs, 0]))], writable=[answer])
        queue.publish()
        queue.arm()
        self.frontend.turn()
        assert queue.pop_used() == [(None, 1)]
        return self.frontend.look(answer, 1)[0]


@pytest.fixture
def errors() -> Iterator[list[Exception]]:
    found: list[Exception] = []
    yield found
    assert not found


@pytest.fixture(params=[False, True], ids=["asleep", "polling"])
def poll(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def test_rings_that_are_enabled_are_the_pairs_in_use(tmp_path: Path, errors: list[Exception], ring_features: Features, poll: bool) -> None:
    device = NetDevice(queue_pairs=2)
    path = str(tmp_path / "s")
    with Backend(path, device, report=errors.append, poll=poll) as backend, Frontend.at(path, backend) as frontend:
        guest = Guest(frontend, ring_features | KEPT)
        reply = frontend.ask(F.GET_QUEUE_NUM)
        assert reply is not None and reply.payload == wire.U64(2)
        guest.start(0, 1)
        guest.start(2, 3, enabled=False)
        guest.fill(0, 16)
        guest.fill(2, 16)
        assert device.send_frames(FLOWS[:8]) == 8
        assert guest.frames(0) == FLOWS[:8] and guest.frames(2) == []
        assert guest.transmit(3, FLOWS[0]) == 1, "what a disabled ring sends is discarded"
        assert guest.transmit(1, FLOWS[1]) == 0 and device.receive_frames() == [FLOWS[1]] and device.receive_frames() == []
        guest.enable(2, 3)
        assert guest.transmit(3, FLOWS[2]) == 0 and device.receive_frames() == [FLOWS[2]]
        assert device.send_frames([udp(2, back=True)]) == 1 and guest.frames(2) == [udp(2, back=True)]
        assert device.send_frames(FLOWS[8:]) == 8
        first, second = guest.frames(0), guest.frames(2)
        assert sorted(first + second) == sorted(FLOWS[8:]) and first and second
        guest.enable(2, 3, on=False)
        guest.fill(0, 8)
        assert device.send_frames(FLOWS[:8]) == 8 and guest.frames(0) == FLOWS[:8]
        frontend.stop(0)
        assert device.send_frames(FLOWS[:1]) == 0


def test_a_control_queue_that_is_passed_through(tmp_path: Path, errors: list[Exception], ring_features: Features, poll: bool) -> None:
    """Also of a device that is driven by hand."""
    for device in (NetDevice(queue_pairs=2), Echo(queue_pairs=2)):
        path = str(tmp_path / type(device).__name__)
        with Backend(path, device, report=errors.append, poll=poll) as backend, Frontend.at(path, backend) as frontend:
            guest = Guest(frontend, ring_features | PASSED)
            guest.start(0, 1, 2, 3, 4)
            guest.fill(0, 16)
            guest.fill(2, 16)
            assert device.send_frames(FLOWS) == 16 and guest.frames(0) == FLOWS and guest.frames(2) == []
            assert guest.set_pairs(3) == 1 and device.active_pairs == 1
            assert guest.set_pairs(2) == 0 and device.active_pairs == 2
            guest.fill(0, 16)
            assert device.send_frames(FLOWS) == 16
            first, second = guest.frames(0), guest.frames(2)
            assert sorted(first + second) == sorted(FLOWS) and first and second
            guest.fill(2, 8)
            done = guest.transmit(3, *FLOWS[:4])
            if isinstance(device, Echo):
                assert done == 4 and guest.frames(2) == FLOWS[:4]
            else:
                assert device.receive_frames() == FLOWS[:4]
            assert guest.set_pairs(1) == 0
            frontend.stop(4)
            assert device.active_pairs == 1, "the command holds while the queue is gone"


def test_the_control_queue_is_behind_one_pair_without_mq(tmp_path: Path, errors: list[Exception], ring_features: Features) -> None:
    device = NetDevice(queue_pairs=2)
    path = str(tmp_path / "s")
    with Backend(path, device, report=errors.append) as backend, Frontend.at(path, backend) as frontend:
        guest = Guest(frontend, ring_features | {NetFeature.CTRL_VQ})
        guest.start(0, 1, 2)
        assert guest.set_pairs(1, index=2) == 1
        guest.fill(0, 4)
        assert device.send_frames(FLOWS[:4]) == 4 and guest.frames(0) == FLOWS[:4]


def test_a_ring_that_is_not_there_breaks_alone(tmp_path: Path, ring_features: Features) -> None:
    """Without MQ there is one pair, whatever the front-end enables."""
    errors: list[Exception] = []
    device = NetDevice(queue_pairs=2)
    path = str(tmp_path / "s")
    with Backend(path, device, report=errors.append) as backend, Frontend.at(path, backend) as frontend:
        guest = Guest(frontend, ring_features)
        guest.start(0, 1, 2)
        assert frontend.errors[2].wait(0) and not frontend.errors[0].wait(0)
        assert [str(error) for error in errors] == ["queue 2 does not exist: the device has 2"]
        guest.fill(0, 4)
        assert device.send_frames(FLOWS[:4]) == 4 and guest.frames(0) == FLOWS[:4]
        for index in (5, 255):
            assert frontend.refused(F.SET_VRING_ENABLE, wire.VringState(index, 1))


def test_one_pair_offers_no_control_queue(tmp_path: Path) -> None:
    for pairs in (1, 2):
        device = NetDevice(queue_pairs=pairs)
        path = str(tmp_path / str(pairs))
        with Backend(path, device) as backend, Frontend.at(path, backend) as frontend:
            reply = frontend.ask(F.GET_FEATURES)
            assert reply is not None
            offered = Features.from_mask(int(reply.payload.value))
            assert (NetFeature.CTRL_VQ in offered) == (NetFeature.MQ in offered) == (pairs > 1)
            assert Feature.RING_PACKED in offered


def test_polling_never_sleeps_while_a_ring_runs_and_wants_no_kicks(
    tmp_path: Path, errors: list[Exception], ring_features: Features
) -> None:
    for more in (set(), {Feature.EVENT_IDX}):
        path = str(tmp_path / f"s{len(more)}")
        with Backend(path, Echo(), report=errors.append, poll=True) as backend, Frontend.at(path, backend) as frontend:
            guest = Guest(frontend, ring_features | more)
            assert backend.wait_time is None
            guest.start(0, 1)
            assert backend.wait_time == 0.0
            guest.fill(0, 8)
            guest.transmit(1, FLOWS[0])
            before = [guest.queues[index].counters["notified"] for index in (0, 1)]
            for frame in FLOWS:
                guest.fill(0, 1)
                guest.transmit(1, frame)
                assert guest.frames(0)[-1] == frame
            assert [guest.queues[index].counters["notified"] for index in (0, 1)] == before
            frontend.stop(0)
            frontend.stop(1)
            assert backend.wait_time is None


@pytest.mark.parametrize("poll", [False, True])
def test_who_serves_frames_may_come_and_go_while_a_ring_runs(tmp_path: Path, poll: bool, ring_features: Features) -> None:
    device, found = NetDevice(), list[int]()
    path = str(tmp_path / "s")
    with Backend(path, device, poll=poll) as backend, Frontend.at(path, backend) as frontend:
        frontend.negotiate(ring_features)
        queue = frontend.queue(1)
        for each in (frontend.queue(0), queue):
            frontend.start(each)
        expected = list[int]()
        for turn in range(3):
            for served in (False, True):
                device.on_frames = (lambda burst: found.extend(burst.lengths[: burst.count])) if served else None
                queue.add(None, readable=[frontend.room(12 + 60 + turn)])
                queue.publish()
                expected.append(60 + turn)
                frontend.turn()
                backend.process(0.0)
                assert found == (expected if served else expected[:-1])
            queue.pop_used()
