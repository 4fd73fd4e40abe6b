"""A front-end that vanishes after any byte of a session with every request in it, and one whose memory goes away under the device."""

import os
import socket
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from tests.leftovers import all_closed
from tests.vhost_user.frontend import GUEST, PROTOCOL, SIZE, USER, Frontend
from virtio import Burst, EventFd, Feature, Memory, NetDevice
from virtio.devices.net import NetFeature
from virtio.features import Features
from virtio.vhost_user import message as wire
from virtio.vhost_user.backend import Backend
from virtio.vhost_user.message import FrontendRequest as F
from virtio.vhost_user.message import ProtocolFeature, Region

MORE = PROTOCOL | {ProtocolFeature.RARP, ProtocolFeature.MTU, ProtocolFeature.DEVICE_STATE}


class Echo(NetDevice):
    """Sends everything back, and notes what it is told."""

    def __init__(self) -> None:
        super().__init__(slots=64)
        self.told: list[object] = []
        self.on_rarp = self.told.append
        self.on_mtu = self.told.append

    def on_frames(self, burst: Burst) -> None:
        """Back."""
        self.send(burst)


@pytest.fixture
def device() -> Echo:
    return Echo()


@pytest.fixture
def backend(path: str, device: Echo, errors: list[Exception]) -> Iterator[Backend]:
    """One device; nothing is left open in the end."""
    assert device.pool.slots
    with all_closed(), Backend(path, device, report=errors.append) as made:
        yield made


def exchange(frontend: Frontend) -> None:
    """One frame there and back."""
    place, asked = frontend.room(128), frontend.room(72, bytes(12) + b"f" * 60)
    received, transmitted = frontend.queues[-2:]
    received.add(place, writable=[place])
    received.publish()
    transmitted.add("sent", readable=[asked])
    transmitted.publish()
    frontend.turn()
    assert received.pop_used() == [(place, 72)]
    assert frontend.look(place, 72)[12:] == b"f" * 60
    frontend.turn()
    assert transmitted.pop_used() == [("sent", 0)]


def session(frontend: Frontend, keep: list[int]) -> None:
    """Every request that the back-end knows, with traffic between them. What is opened for it goes to `keep`."""
    features = Features({Feature.VERSION_1, NetFeature.MAC})
    frontend.negotiate(features, MORE)
    for request in (F.GET_QUEUE_NUM, F.GET_MAX_MEM_SLOTS):
        assert frontend.ask(request)
    ours, theirs = socket.socketpair()
    keep += [ours.detach(), theirs.detach()]
    assert not frontend.refused(F.SET_BACKEND_REQ_FD, descriptors=keep[-1:])
    assert frontend.ask(F.GET_CONFIG, wire.Config(0, 6, 0, bytes(6)))
    assert not frontend.refused(F.SET_STATUS, wire.U64(15))
    assert frontend.ask(F.GET_STATUS)
    area, descriptor = frontend.track(2)
    keep.append(descriptor)
    assert not frontend.refused(F.SET_INFLIGHT_FD, area, [descriptor])
    log = Memory((GUEST + 2 * SIZE) // 4096 // 8)
    keep.append(os.dup(log.fileno()))
    assert frontend.ask(F.SET_LOG_BASE, wire.Log(log.size, 0), keep[-1:])
    log.close()
    assert not frontend.refused(F.SET_LOG_FD, descriptors=keep[:1])
    assert not frontend.refused(F.SET_FEATURES, wire.U64(int(features) | 1 << 30 | 1 << 26))
    for index in range(2):
        frontend.start(frontend.queue(index))
    exchange(frontend)
    assert not frontend.refused(F.SEND_RARP, wire.U64(int.from_bytes(bytes.fromhex("525400000001"), "little")))
    assert not frontend.refused(F.NET_SET_MTU, wire.U64(1400))
    more = wire.SingleRegion(GUEST + SIZE, SIZE, USER + SIZE, 0)
    assert not frontend.refused(F.ADD_MEM_REG, more, [frontend.memory.fileno()])
    exchange(frontend)
    assert not frontend.refused(F.REM_MEM_REG, more)
    bases = [frontend.stop(index) for index in range(2)]
    reader, writer = os.pipe()
    os.close(writer)
    keep.append(reader)
    reply = frontend.ask(F.SET_DEVICE_STATE_FD, wire.DeviceStateTransfer(1, 0), [reader])
    assert reply is not None and reply.payload.value == wire.VRING_NO_DESCRIPTOR
    checked = frontend.ask(F.CHECK_DEVICE_STATE)
    assert checked is not None and checked.payload.value == 0
    for queue, base in zip(frontend.queues[:2], bases, strict=True):
        frontend.start(queue, base=base)
    exchange(frontend)
    assert not frontend.refused(F.RESET_DEVICE)


@pytest.mark.parametrize("step", [17, pytest.param(1, marks=pytest.mark.slow)])
def test_the_front_end_may_vanish_after_any_byte_of_any_request(
    path: str, backend: Backend, device: Echo, errors: list[Exception], step: int
) -> None:
    stream: list[tuple[bytes, tuple[int, ...]]] = []
    keep: list[int] = []
    with Frontend.at(path, backend) as frontend:
        plain = frontend.raw

        def record(data: bytes, descriptors: Iterable[int] = ()) -> None:
            stream.append((data, tuple(descriptors)))
            plain(*stream[-1])

        frontend.raw = record  # type: ignore[method-assign]
        session(frontend, keep)
        assert device.told == [bytes.fromhex("525400000001"), 1400]
        frontend.socket.close()
        frontend.turn()
        assert backend.connections == 0
        spare = EventFd()
        ready = len(os.listdir("/proc/self/fd"))
        for end in range(0, sum(len(data) for data, _ in stream), step):
            with socket.socket(socket.AF_UNIX) as half:
                half.connect(path)
                left = end
                for data, passed in stream:
                    if left > 0:
                        socket.send_fds(half, [data[:left]], list(passed))
                        frontend.turn()
                    left -= len(data)
            frontend.turn()
            assert backend.connections == 0, end
            assert len(os.listdir("/proc/self/fd")) <= ready, end
        spare.close()
    for descriptor in keep:
        os.close(descriptor)
    errors.clear()  # rings of memory that was used before are not as a new ring is
    with Frontend.at(path, backend) as frontend:
        keep = []
        session(frontend, keep)
        for descriptor in keep:
            os.close(descriptor)
    assert not errors


def test_device_state_that_is_not_ours_is_not_taken(path: str, backend: Backend, errors: list[Exception]) -> None:
    with Frontend.at(path, backend) as frontend:
        frontend.negotiate(Features({Feature.VERSION_1}), MORE)
        for data, closed, failed in ((b"state", True, 1), (b"", False, 1), (b"", True, 0)):
            reader, writer = os.pipe()
            os.write(writer, data)
            if closed:
                os.close(writer)
            assert frontend.ask(F.SET_DEVICE_STATE_FD, wire.DeviceStateTransfer(1, 0), [reader])
            checked = frontend.ask(F.CHECK_DEVICE_STATE)
            assert checked is not None and checked.payload.value == failed
            os.close(reader)
            if not closed:
                os.close(writer)
        reader, writer = os.pipe()
        assert frontend.ask(F.SET_DEVICE_STATE_FD, wire.DeviceStateTransfer(0, 0), [writer])
        os.close(writer)
        assert os.read(reader, 1) == b""  # nothing is saved
        os.close(reader)
    assert not errors


def test_device_24_guest_memory_that_is_truncated_harms_nobody_else(path: str, tmp_path: Path, ring_features: Features) -> None:
    errors: list[Exception] = []
    with (
        Backend(str(tmp_path / "two"), Echo, report=errors.append) as backend,
        Frontend.at(str(tmp_path / "two"), backend) as other,
        Frontend.at(str(tmp_path / "two"), backend) as frontend,
    ):
        file = os.memfd_create("guest")
        os.ftruncate(file, SIZE)
        whole, frontend.memory = frontend.memory, Memory.from_fd(file, SIZE)
        for each in (frontend, other):
            each.negotiate(ring_features)
            for index in range(2):
                each.start(each.queue(index))
            exchange(each)
        os.ftruncate(file, 0)
        frontend.kicks[1].signal()
        exchange(other)
        assert any("was taken away" in str(error) for error in errors)
        assert len(errors) == 1
        assert frontend.errors[1].drain()
        exchange(other)
        status = frontend.ask(F.GET_STATUS)
        assert status is not None and status.payload.value & 0x40
        # With other memory it goes on.
        assert not frontend.refused(F.RESET_DEVICE)
        for queue in frontend.queues:
            queue.close()
        frontend.queues.clear()
        frontend.memory.close()
        frontend.memory = whole
        frontend.map([Region(GUEST, SIZE, USER, 0)])
        for index in range(2):
            frontend.start(frontend.queue(index))
        exchange(frontend)
        exchange(other)
        assert len(errors) == 1
        os.close(file)


def test_a_used_ring_is_logged_where_the_front_end_says(path: str, backend: Backend, errors: list[Exception]) -> None:
    with Frontend.at(path, backend) as frontend:
        frontend.negotiate(Features({Feature.VERSION_1}))
        end = (GUEST + SIZE) // 4096
        log = Memory(end // 8 + 8)
        assert frontend.ask(F.SET_LOG_BASE, wire.Log(log.size, 0), [log.fileno()])
        assert not frontend.refused(F.SET_FEATURES, wire.U64(1 << 32 | 1 << 30 | 1 << 26))
        queues = [frontend.queue(index) for index in range(2)]
        for queue in queues:
            frontend.start(queue)
        descriptor, driver, used = (area - GUEST + USER for area in queues[1].areas)
        place = wire.VringAddr(1, wire.VRING_LOG, descriptor, used, driver, (end + 9) * 4096)  # beyond the guest's memory
        assert not frontend.refused(F.SET_VRING_ADDR, place)
        beyond = wire.VringAddr(1, wire.VRING_LOG, descriptor, used, driver, log.size * 8 * 4096 - 1)
        assert frontend.refused(F.SET_VRING_ADDR, beyond)
        errors.clear()
        exchange(frontend)
        frontend.stop(1)
        marked = struct.unpack(f"{log.size}B", log.read(0, log.size))
        assert marked[(end + 9) // 8] >> (end + 9) % 8 & 1
        log.close()
    assert not errors
