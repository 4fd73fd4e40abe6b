"""The back-end with a front-end by hand: what it does when all is well, and what remains whole when nothing is."""

import os
import resource
import select
import socket
import struct
import threading
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from tests.leftovers import all_closed, descriptors
from tests.readable import readable
from tests.vhost_user.frontend import GUEST, SIZE, USER, Frontend
from virtio import Burst, EventFd, Feature, Memory, NetDevice
from virtio.device import Device
from virtio.devices.rng import RngDevice
from virtio.errors import TransportError
from virtio.features import Features
from virtio.vhost_user import message as wire
from virtio.vhost_user.backend import Backend
from virtio.vhost_user.connection import PROTOCOL
from virtio.vhost_user.message import FrontendRequest as F
from virtio.vhost_user.message import ProtocolFeature, Region

BYTES = b"0123456789abcdef"
ON = 1


class Echo(NetDevice):
    def on_frames(self, burst: Burst) -> None:
        self.send(burst)


def rng() -> RngDevice:
    return RngDevice(lambda count: (BYTES * count)[:count])


@pytest.fixture
def backend(path: str, errors: list[Exception]) -> Iterator[Backend]:
    """A random generator for each front-end; in the end nothing is left open."""
    with all_closed(), Backend(path, rng, report=errors.append) as made:
        yield made


@pytest.fixture
def frontend(backend: Backend, path: str) -> Iterator[Frontend]:
    with Frontend.at(path, backend) as made:
        yield made


def live(frontend: Frontend, ring_features: Features = Features({Feature.VERSION_1})) -> Callable[[int], bytes]:  # noqa: B008  # immutable
    """Sets the generator up; the function reads from it."""
    frontend.negotiate(ring_features)
    queue = frontend.queue(0)
    frontend.start(queue)
    place = frontend.room(4096)

    def read(count: int) -> bytes:
        queue.add(None, writable=[(place[0], count)])
        queue.publish()
        queue.arm()
        frontend.turn()
        [(_, length)] = queue.pop_used()
        return frontend.look(place, length)

    return read


def test_a_device_answers_in_both_formats(frontend: Frontend, ring_features: Features) -> None:
    read = live(frontend, ring_features | {Feature.EVENT_IDX})
    for _ in range(50):  # more than once around
        assert read(16) == BYTES
        assert frontend.calls[0].drain()


def test_a_ring_is_stopped_and_resumes_where_it_was(frontend: Frontend, ring_features: Features) -> None:
    frontend.negotiate(ring_features)
    queue, place = frontend.queue(0), frontend.room(16)
    frontend.start(queue)
    for number in range(40):
        queue.add(number, writable=[place])
        queue.publish()
        if number % 3 == 0:
            base = frontend.stop(0)
            queue.add(-number, writable=[place])  # while nobody listens
            queue.publish()
            frontend.start(queue, base=base)
        frontend.turn()
        assert [token for token, _ in queue.pop_used()] == [number, -number][: 2 - bool(number % 3)]


@pytest.mark.parametrize("base", [0, 1 << 15, 1 << 31 | 1 << 15])
def test_a_packed_ring_begins_however_its_front_end_spells_the_beginning(frontend: Frontend, base: int) -> None:
    frontend.negotiate(Features({Feature.VERSION_1, Feature.RING_PACKED}))
    queue, place = frontend.queue(0), frontend.room(16)
    frontend.start(queue, base=base)
    for number in range(3 * queue.size):
        queue.add(number, writable=[place])
        queue.publish()
        frontend.turn()
        assert [token for token, _ in queue.pop_used()] == [number]


def test_device_17_a_base_that_does_not_fit_the_used_index_breaks_the_ring(frontend: Frontend, errors: list[Exception]) -> None:
    frontend.negotiate(Features({Feature.VERSION_1}))
    frontend.start(frontend.queue(0), base=1000)
    assert frontend.errors[0].drain()
    assert "1000" in str(errors.pop())
    assert not errors


def test_device_22_a_broken_ring_signals_its_error(frontend: Frontend, errors: list[Exception]) -> None:
    frontend.negotiate(Features({Feature.VERSION_1}))
    queue = frontend.queue(0)
    frontend.start(queue)
    queue.add(None, readable=[frontend.room(16)])  # nothing to write to
    queue.publish()
    frontend.turn()
    assert frontend.errors[0].drain() == ON
    assert "5.4.6.1" in str(errors.pop())
    status = frontend.ask(F.GET_STATUS)
    assert status is not None and status.payload.value & 0x40
    frontend.ask(F.RESET_DEVICE)  # it is usable again
    live_again = frontend.queue(0)
    frontend.start(live_again)
    live_again.add(None, writable=[frontend.room(16)])
    live_again.publish()
    frontend.turn()
    assert len(live_again.pop_used()) == 1
    assert not errors


def test_device_23_a_kick_before_enable_is_served_when_enabled(frontend: Frontend) -> None:
    frontend.negotiate(Features({Feature.VERSION_1}))
    queue = frontend.queue(0)
    frontend.start(queue, enabled=False)
    queue.add(None, writable=[frontend.room(16)])
    queue.publish()
    frontend.turn()
    assert not queue.pop_used()
    frontend.ask(F.SET_VRING_ENABLE, wire.VringState(0, 1))
    assert len(queue.pop_used()) == 1


def test_device_23_memory_comes_moves_and_goes_while_a_ring_runs(frontend: Frontend, errors: list[Exception]) -> None:
    read = live(frontend)
    assert not frontend.refused(F.ADD_MEM_REG, wire.SingleRegion(GUEST + SIZE, SIZE, USER + SIZE, 0), [frontend.memory.fileno()])
    assert read(16) == BYTES
    assert not frontend.refused(F.REM_MEM_REG, wire.SingleRegion(GUEST + SIZE, SIZE, USER + SIZE, 0))
    assert read(16) == BYTES
    frontend.map([Region(GUEST, SIZE // 2, USER, 0), Region(GUEST + SIZE // 2, SIZE // 2, USER + SIZE // 2, SIZE // 2)])
    assert read(16) == BYTES
    assert frontend.refused(F.REM_MEM_REG, wire.SingleRegion(GUEST + 1, SIZE, USER, 0))
    assert errors.pop()
    assert read(16) == BYTES
    frontend.map([])
    assert frontend.errors[0].drain() == ON
    assert errors.pop()
    assert not errors


@pytest.mark.parametrize("ring_features", [Features(), Features({Feature.RING_PACKED})])
def test_device_23_a_ring_goes_on_in_another_file_at_its_addresses(frontend: Frontend, ring_features: Features) -> None:
    frontend.negotiate(ring_features | {Feature.VERSION_1})
    queue, before = frontend.queue(0), frontend.memory
    frontend.start(queue)
    for number in range(3):
        queue.add(number, writable=[frontend.room(16)])
        queue.publish()
        frontend.turn()
        assert [token for token, _ in queue.pop_used()] == [number]
    with Memory(SIZE) as copy:
        copy.write(0, before.read(0, SIZE))
        frontend.memory = copy
        frontend.map([Region(GUEST, SIZE, USER, 0)])
        frontend.memory = before
        place = frontend.room(16)
        queue.add(3, writable=[place])
        queue.publish()
        frontend.turn()
        assert not queue.pop_used()
        copy.write(0, before.read(0, SIZE))
        frontend.kicks[0].signal()
        frontend.turn()
        assert copy.read(place[0] - GUEST, 16) == BYTES
        assert not queue.pop_used()


def test_configuration_and_its_changes(path: str) -> None:
    device = Echo(mac=bytes(range(0, 12, 2)), mtu=1400)
    with Backend(path, device) as backend, Frontend.at(path, backend) as frontend:
        frontend.negotiate(Features({Feature.VERSION_1}))
        reply = frontend.ask(F.GET_CONFIG, wire.Config(0, 12, 0, bytes(12)))
        assert reply is not None and isinstance(reply.payload, wire.Config)
        assert reply.payload.data == device.read_config(0, 12)
        ours, theirs = socket.socketpair()
        with ours, theirs:
            frontend.ask(F.SET_BACKEND_REQ_FD, None, [theirs.fileno()])
            for index in range(2):
                frontend.start(frontend.queue(index))
            device.link = False
            frontend.turn()
            ours.settimeout(60)
            [message] = wire.Decoder().feed(ours.recv(100))
            assert message.request == wire.BackendRequest.CONFIG_CHANGE_MSG


def test_device_23_a_disabled_transmit_ring_discards_and_a_receive_ring_keeps(path: str, ring_features: Features) -> None:
    with Backend(path, Echo()) as backend, Frontend.at(path, backend) as frontend:
        frontend.negotiate(ring_features)
        receiveq, transmitq = frontend.queue(0), frontend.queue(1)
        frontend.start(receiveq)
        frontend.start(transmitq, enabled=False)
        receiveq.add("room", writable=[frontend.room(200)])
        frame = frontend.room(72, bytes(12) + b"f" * 60)

        def send() -> list[tuple[object, int]]:
            transmitq.add("frame", readable=[frame])
            transmitq.publish()
            frontend.turn()
            return transmitq.pop_used()

        receiveq.publish()
        assert send() == [("frame", 0)]
        assert not receiveq.pop_used()
        frontend.ask(F.SET_VRING_ENABLE, wire.VringState(1, 1))
        assert send() in ([("frame", 0)], [])
        assert receiveq.pop_used() == [("room", 72)]


def test_frames_that_somebody_holds_are_completed_when_the_ring_stops(path: str, ring_features: Features) -> None:
    """A device that is driven by hand, with a burst in its hands."""
    device = NetDevice()
    with Backend(path, device) as backend, Frontend.at(path, backend) as frontend:
        frontend.negotiate(ring_features)
        queues = [frontend.queue(index) for index in range(2)]
        for queue in queues:
            frontend.start(queue)
        frame = frontend.room(72, bytes(12) + b"f" * 60)
        for number in range(3):
            queues[1].add(number, readable=[frame])
        queues[1].publish()
        frontend.turn()
        burst = device.pool.burst(8)
        assert device.wait(60)
        assert device.receive(burst) == 3
        base = frontend.stop(1)
        assert queues[1].pop_used() == [(0, 0), (1, 0), (2, 0)]
        assert burst.tobytes(2) == b"f" * 60
        frontend.start(queues[1], base=base)
        queues[1].add("next", readable=[frame])
        queues[1].publish()
        assert device.receive(burst) == 1
        device.take(burst)
        assert queues[1].pop_used() == [("next", 0)]


def test_dirty_pages_are_logged(frontend: Frontend) -> None:
    frontend.negotiate(Features({Feature.VERSION_1}))
    log = Memory((GUEST + SIZE) // 4096 // 8)
    assert frontend.ask(F.SET_LOG_BASE, wire.Log(log.size, 0), [log.fileno()])
    assert not frontend.refused(F.SET_FEATURES, wire.U64(1 << 32 | 1 << 30 | 1 << 26))
    queue, place = frontend.queue(0), frontend.room(16)
    frontend.start(queue)
    queue.add(None, writable=[place])
    queue.publish()
    frontend.turn()
    frontend.stop(0)

    def marked(address: int) -> bool:
        return bool(log.read(address // 4096 // 8, 1)[0] >> address // 4096 % 8 & 1)

    assert len(queue.pop_used()) == 1
    assert marked(place[0]) and marked(queue.areas[2])
    assert not marked(GUEST + SIZE - 4096)


def test_a_dirty_log_costs_what_is_written_not_how_far_the_guest_reaches(frontend: Frontend, monkeypatch: pytest.MonkeyPatch) -> None:
    end = 1 << 42
    monkeypatch.setattr("tests.vhost_user.frontend.GUEST", end - SIZE)
    frontend.negotiate(Features({Feature.VERSION_1}))
    log = Memory(end // 4096 // 8)
    tracemalloc.start()
    try:
        assert frontend.ask(F.SET_LOG_BASE, wire.Log(log.size, 0), [log.fileno()])
        assert not frontend.refused(F.SET_FEATURES, wire.U64(1 << 32 | 1 << 30 | 1 << 26))
        queue, place = frontend.queue(0), frontend.room(16)
        frontend.start(queue)
        queue.add(None, writable=[place])
        queue.publish()
        frontend.turn()
        frontend.stop(0)
        assert tracemalloc.get_traced_memory()[1] < log.size // 64
    finally:
        tracemalloc.stop()
    for address in (place[0], queue.areas[2]):
        assert log.read(address // 4096 // 8, 1)[0] >> address // 4096 % 8 & 1


def test_idle_it_sleeps(backend: Backend, frontend: Frontend) -> None:
    assert live(frontend)(16) == BYTES
    frontend.turn()
    sleeper = select.poll()
    sleeper.register(backend.fileno(), select.POLLIN)
    assert not sleeper.poll(0)  # nothing to wake it, nothing to look at by itself
    assert backend.wait_time is None


def test_stop_ends_serve_from_another_thread(backend: Backend) -> None:
    thread = threading.Thread(target=backend.serve)
    thread.start()
    backend.stop()
    thread.join(60)
    assert not thread.is_alive()


# Bad input.


@pytest.mark.parametrize("connect", [False, True])
def test_a_path_that_is_too_long(connect: bool) -> None:
    with pytest.raises(ValueError, match="socket path of 108 bytes, not 1 to 107"):
        Backend("/" + "x" * 107, rng(), connect)


def test_paths_that_cannot_be(backend: Backend, path: str, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("kept")
    for where, why in ((str(plain), "not a socket"), (path, "in use"), (str(tmp_path / "none/s"), "No such file")):
        with pytest.raises(TransportError, match=why):
            Backend(where, rng())
    assert plain.read_text() == "kept"
    backend.process()


def test_a_path_that_a_dead_process_left_is_used_again(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(path)
    with Backend(path, rng()):
        pass
    assert not os.path.exists(path)


def test_it_connects_when_somebody_listens_and_again(path: str) -> None:
    with Backend(path, rng(), connect=True) as backend:
        backend.process()
        assert not backend.connections
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen()
            for _ in range(2):
                while not backend.connections:
                    backend.process(1.0)
                with Frontend(listener.accept()[0], backend) as frontend:
                    assert live(frontend)(16) == BYTES
                frontend.turn()


def test_a_device_that_fails_ends_its_own_connection_only(path: str, errors: list[Exception]) -> None:
    made: list[RngDevice] = []

    def next_device() -> RngDevice:
        made.append(rng())
        return made[-1]

    with (
        Backend(path, next_device, report=errors.append) as backend,
        Frontend.at(path, backend) as first,
        Frontend.at(path, backend) as second,
    ):
        reads = [live(each) for each in (first, second)]
        made[0].source = lambda count: b""
        with pytest.raises(ValueError, match="unpack"):
            reads[0](16)
        assert first.gone
        assert "gave none" in str(errors.pop())
        assert reads[1](16) == BYTES
    assert not errors


def test_a_factory_that_fails_ends_the_connection(path: str, errors: list[Exception]) -> None:
    def fail() -> RngDevice:
        raise LookupError("no device to be had")

    with Backend(path, fail, report=errors.append) as backend, Frontend.at(path, backend) as frontend:
        assert frontend.gone
        assert "no device to be had" in str(errors)


def test_what_is_no_socket(path: str) -> None:
    with open("/dev/null") as file, pytest.raises(TransportError, match="not a socket"):
        Backend(file.fileno(), rng())
    Path(path).write_text("")
    with Backend(path, rng(), connect=True) as backend:  # may become one
        backend.process()
        assert not backend.connections


def test_a_polled_device_needs_no_kicks(path: str) -> None:
    with Backend(path, rng(), poll=True) as backend, Frontend.at(path, backend) as frontend:
        frontend.negotiate(Features({Feature.VERSION_1}))
        queue = frontend.queue(0)
        frontend.start(queue)
        queue.connect(None)
        assert backend.wait_time == 0.0
        queue.add(None, writable=[frontend.room(16)])
        queue.publish()
        backend.process()
        backend.process()
        assert len(queue.pop_used()) == 1


@pytest.mark.parametrize("poll", [False, True])
def test_a_polled_ring_that_broke_lets_it_sleep(path: str, errors: list[Exception], poll: bool) -> None:
    with Backend(path, rng(), poll=poll, report=errors.append) as backend, Frontend.at(path, backend) as frontend:
        frontend.negotiate(Features({Feature.VERSION_1}))
        queue = frontend.queue(0)
        frontend.start(queue)
        if not poll:
            frontend.raw(wire.encode(F.SET_VRING_KICK, wire.U64(1 << 8)))
            backend.process()
        assert backend.wait_time == 0.0
        queue.add(None, readable=[frontend.room(16)])  # nothing to write to
        queue.publish()
        while not errors:
            backend.process()
        assert backend.wait_time is None
        frontend.ask(F.RESET_DEVICE)
        frontend.start(frontend.queue(0))
        assert backend.wait_time == (0.0 if poll else None)


def test_protocol_features_that_it_does_not_have(path: str) -> None:
    with pytest.raises(ValueError, match=rf"protocol features \[{int(ProtocolFeature.BACKEND_SEND_FD)}\]"):
        Backend(path, rng, protocol_features=PROTOCOL | {ProtocolFeature.BACKEND_SEND_FD})
    assert not os.path.exists(path)


def test_a_descriptor_of_a_connection(errors: list[Exception]) -> None:
    ours, theirs = socket.socketpair()
    with Backend(theirs.detach(), rng(), report=errors.append) as backend, Frontend(ours, backend) as frontend:
        assert live(frontend)(16) == BYTES
        frontend.close()
        backend.serve()  # nothing can come any more
    assert not errors


HEADER = struct.Struct("=III")


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (HEADER.pack(F.SET_FEATURES, 1, (1 << 32) - 1), "payload of 4294967295 bytes is longer"),
        (HEADER.pack(F.SET_FEATURES, 2, 8), "version 2"),
        (HEADER.pack(F.SET_FEATURES, 1, 4) + bytes(4), "4 bytes where U64 has 8"),
        (wire.encode(F.SET_FEATURES, wire.U64(1 << 60)), "60"),
        (wire.encode(F.SET_VRING_KICK, wire.U64(255 | 256)), "vring 255, of 1"),
        (wire.encode(F.SET_VRING_ENABLE, wire.VringState(255, 1)), "vring 255, of 1"),
        (wire.encode(F.SET_MEM_TABLE, wire.Regions([Region(0, 4096, 0, 0)])), "1 regions with 0 descriptors"),
    ],
    ids=["4 GiB", "version", "short payload", "features", "kick of queue 255", "queue 255", "no descriptor"],
)
def test_device_23_what_nobody_may_send_ends_one_connection(
    backend: Backend, path: str, errors: list[Exception], data: bytes, why: str
) -> None:
    with Frontend.at(path, backend) as other, Frontend.at(path, backend) as frontend:
        read = live(other)
        frontend.raw(data)
        assert frontend.gone
        assert why in str(errors.pop()) or why in str(errors.pop())
        assert read(16) == BYTES


def test_device_23_refusals_with_an_acknowledgement_change_nothing(frontend: Frontend, errors: list[Exception]) -> None:
    read = live(frontend)
    memory = [frontend.memory.fileno()]
    for request, payload, passed in (
        (F.SET_FEATURES, wire.U64(1 << 60), []),
        (F.SET_FEATURES, wire.U64(1 << 34 | 1 << 32 | 1 << 30), []),  # packed after split
        (F.SET_VRING_ENABLE, wire.VringState(255, 1), []),
        (F.SET_MEM_TABLE, wire.Regions([Region(GUEST, 2 * SIZE, USER, 0)]), memory),  # beyond its file
        (F.SET_MEM_TABLE, wire.Regions([Region(GUEST, 4096, USER, (1 << 64) - 4096)]), memory),
        (F.ADD_MEM_REG, wire.SingleRegion(GUEST + 4096, SIZE, USER + SIZE, 0), memory),  # over another
        (F.SET_VRING_KICK, wire.U64(0), memory),  # no eventfd
        (F.SET_VRING_NUM, wire.VringState(0, 1 << 20), []),
    ):
        assert frontend.refused(request, payload, passed), request
        assert errors
        errors.clear()
        if request != F.SET_VRING_KICK:
            assert read(16) == BYTES


def test_device_23_superfluous_descriptors_are_closed(frontend: Frontend) -> None:
    event = EventFd()
    frontend.turn()
    before = descriptors()
    frontend.raw(wire.encode(F.GET_FEATURES), [event.fileno()] * 9)
    frontend.turn()
    assert descriptors() == before
    event.close()


def test_the_front_end_may_vanish_after_any_byte(path: str, errors: list[Exception]) -> None:
    """A whole set-up is recorded, and played up to every byte."""
    stream: list[tuple[bytes, tuple[int, ...]]] = []
    with Backend(path, rng, report=errors.append) as backend, Frontend.at(path, backend) as frontend:
        plain = frontend.raw

        def record(data: bytes, descriptors: Iterable[int] = ()) -> None:
            stream.append((data, tuple(descriptors)))
            plain(*stream[-1])

        frontend.raw = record  # type: ignore[method-assign]
        live(frontend)
        frontend.turn()
        ready = len(descriptors())
        total = sum(len(data) for data, _ in stream)
        for end in range(total):
            with socket.socket(socket.AF_UNIX) as half:
                half.connect(path)
                left = end
                for data, passed in stream:
                    if left > 0:
                        socket.send_fds(half, [data[:left]], list(passed))
                    left -= len(data)
                while backend.process():
                    pass
            while backend.process():
                pass
        assert len(descriptors()) == ready
        assert backend.connections == ON
    assert not errors


def test_without_descriptors_it_says_so_once_and_sleeps_until_there_are_some(backend: Backend, path: str, errors: list[Exception]) -> None:
    with socket.socket(socket.AF_UNIX) as waiting:
        waiting.connect(path)
        was = resource.getrlimit(resource.RLIMIT_NOFILE)
        least = os.dup(waiting.fileno())
        os.close(least)
        resource.setrlimit(resource.RLIMIT_NOFILE, (least, was[1]))
        try:
            for _ in range(20):
                backend.process()
                assert not readable(backend.fileno())
                assert backend.wait_time is not None
            for _ in range(3):
                backend.process(None)  # sleeps, and tries again
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, was)
        assert [type(error) for error in errors] == [OSError]
        while not backend.accepted:
            backend.process(None)
    assert backend.connections == 1
    while backend.connections:
        backend.process(None)
    assert backend.wait_time is None
    assert len(errors) == 1


def test_one_device_has_one_connection_at_a_time(path: str, errors: list[Exception]) -> None:
    device: Device = rng()
    with Backend(path, device, report=errors.append) as backend, Frontend.at(path, backend) as second:
        with Frontend.at(path, backend) as first:
            first.turn()
            assert backend.connections == 1
        second.turn()
        assert live(second)(16) == BYTES
    assert not errors
