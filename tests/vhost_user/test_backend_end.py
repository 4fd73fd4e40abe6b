"""No ring is served for a front-end that has gone or has stopped it: the memory may be a file that somebody else has by now."""

import errno
import gc
import os
import socket
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path

import pytest

from tests.leftovers import descriptors
from tests.vhost_user.frontend import GUEST, Frontend
from virtio import DriverQueue, Feature, NetDevice
from virtio.devices.rng import RngDevice
from virtio.features import Features
from virtio.vhost_user import message as wire
from virtio.vhost_user.backend import FRESH, Backend
from virtio.vhost_user.connection import LONG, MESSAGES
from virtio.vhost_user.message import FrontendRequest as F
from virtio.vhost_user.socket import Source

FEATURES = Features({Feature.VERSION_1})


class Waiting:
    """A front-end of a random generator, with a buffer in its ring that nobody has looked at yet."""

    def __init__(self, path: str, backend: Backend) -> None:
        self.frontend = Frontend.at(path, backend)
        self.frontend.negotiate(FEATURES)
        self.queue: DriverQueue = self.frontend.queue(0)
        self.frontend.start(self.queue)
        self.place = self.frontend.room(16)

    def ask(self) -> None:
        self.queue.add(None, writable=[self.place])
        self.queue.publish()

    def say(self, request: F, payload: wire.Payload) -> None:
        """Without waiting until it is heard."""
        self.frontend.raw(wire.encode(request, payload))

    def vanish(self) -> None:
        self.frontend.socket.close()

    def served(self) -> int:
        """Buffers that the device gave back."""
        return self.frontend.memory.load(self.queue.areas[2] - GUEST + 2, 2)

    def close(self) -> None:
        self.frontend.close()


@pytest.mark.parametrize("poll", [False, True], ids=["kicked", "polled"])
@pytest.mark.parametrize("does", ["vanishes", "disables"])
def test_whoever_goes_while_another_is_served_is_not_served_any_more(does: str, poll: bool, tmp_path: Path) -> None:
    calls: list[Callable[[], None]] = []

    def source(count: int) -> bytes:
        """What one device does lasts; the other's front-end does not wait for it."""
        if calls:
            calls.pop()()
            time.sleep(2 * FRESH)
        return bytes(count)

    with Backend(str(tmp_path / "s"), lambda: RngDevice(source), poll=poll) as backend:
        both = [Waiting(str(tmp_path / "s"), backend) for _ in range(2)]
        for each in both:
            each.ask()

        def other_goes() -> None:
            for each in both:
                if does == "vanishes":
                    each.vanish()
                else:
                    each.say(F.SET_VRING_ENABLE, wire.VringState(0, 0))

        calls.append(other_goes)
        while backend.process():
            pass
        assert not calls and sorted(each.served() for each in both) == [0, 1]
        for each in both:
            each.close()


@pytest.mark.parametrize("many", [1, 200, *range(MESSAGES // 2 - 4, MESSAGES // 2 + 1)])
@pytest.mark.parametrize("ends", [True, False], ids=["ends", "goes on"])
def test_whoever_says_much_is_served_when_it_has_said_it(many: int, ends: bool, tmp_path: Path) -> None:
    with Backend(str(tmp_path / "s"), lambda: RngDevice(bytes)) as backend:
        waiting = Waiting(str(tmp_path / "s"), backend)
        waiting.ask()
        for _ in range(many):
            waiting.say(F.SET_VRING_ENABLE, wire.VringState(0, 1))
        if not ends:
            while backend.process():
                pass
            assert waiting.served() == 1
            waiting.ask()
        waiting.vanish()
        while backend.process():
            pass
        assert backend.connections == 0 and waiting.served() == (0 if ends else 1)
        waiting.close()


def test_messages_that_take_long_are_not_all_heard_in_one_turn(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    written: list[int] = []

    class Slow(RngDevice):
        def write_config(self, offset: int, data: bytes | bytearray | memoryview) -> None:
            written.append(offset)
            time.sleep(2 * LONG)

    with Backend(path, Slow()) as backend, Frontend.at(path, backend) as frontend:
        frontend.negotiate(FEATURES)
        frontend.raw(wire.encode(F.SET_CONFIG, wire.Config(0, 1, 0, b"x")) * 3)
        for number in range(1, 4):
            backend.process()
            assert len(written) == number


@pytest.mark.parametrize(
    "raised", [RuntimeError("cannot be"), SystemExit(3), KeyboardInterrupt()], ids=lambda raised: type(raised).__name__
)
def test_whatever_devices_raise_when_they_are_reset_all_connections_are_closed(raised: BaseException, tmp_path: Path) -> None:
    class Raising(RngDevice):
        armed = False

        def was_reset(self) -> None:
            if self.armed:
                raise raised

    path, made, errors, before = str(tmp_path / "s"), list[Raising](), list[Exception](), descriptors()

    def next_device() -> Raising:
        made.append(Raising())
        return made[-1]

    backend = Backend(path, next_device, report=errors.append)
    both = [Waiting(path, backend) for _ in range(2)]
    for device in made:
        device.armed = True
    for each in both:
        each.ask()
    with nullcontext() if isinstance(raised, Exception) else pytest.raises(type(raised)):
        backend.close()
    assert not os.path.exists(path) and backend.connections == 0
    assert errors == ([raised] * 2 if isinstance(raised, Exception) else [])
    for each in both:
        assert each.frontend.socket.recv(1) == b"" and each.served() == 0
        each.close()
    gc.collect()
    assert descriptors() <= before


@pytest.mark.parametrize("watched", range(3))
def test_a_device_is_free_again_though_its_connection_could_not_be_watched(
    watched: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, device, errors, before = str(tmp_path / "s"), RngDevice(bytes), list[Exception](), descriptors()
    with Backend(path, device, report=errors.append) as backend:
        watch, left = backend.watch, list(range(watched))

        def refuse(descriptor: int, call: Callable[[], object]) -> None:
            if not left:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            left.pop()
            watch(descriptor, call)

        monkeypatch.setattr(backend, "watch", refuse)
        with Frontend.at(path, backend) as frontend:
            assert frontend.gone
        assert [type(error) for error in errors] == [OSError] and not device.connected
        monkeypatch.undo()
        waiting = Waiting(path, backend)
        waiting.ask()
        waiting.frontend.turn()
        assert waiting.served() == 1
        waiting.close()
    assert descriptors() <= before


@pytest.mark.parametrize("kind", ["back-end", "front-end"])
def test_a_path_that_is_somebody_elses_by_now_stays(tmp_path: Path, kind: str) -> None:
    path = str(tmp_path / "s")
    first = Backend(path, RngDevice()) if kind == "back-end" else Source(path, listens=True)
    os.unlink(path)
    with Backend(path, RngDevice()):
        first.close()
        with socket.socket(socket.AF_UNIX) as frontend:
            frontend.connect(path)
        first.close()
        assert os.path.exists(path)
    assert not os.path.exists(path)


def test_device_23_who_reads_no_replies_is_read_no_further_and_served_all_the_same(tmp_path: Path) -> None:
    """The kernel has room for so many messages and no more: the front-end waits, the back-end keeps nothing and sleeps."""
    path, errors = str(tmp_path / "s"), list[Exception]()
    with Backend(path, RngDevice(), report=errors.append) as backend:
        waiting = Waiting(path, backend)
        request = wire.encode(F.GET_CONFIG, wire.Config(0, 200, 0, bytes(200)))
        for number, data in enumerate((request, wire.encode(F.GET_FEATURES))):
            sent = 0
            for _ in range(1000):  # as long as it takes more
                before = sent
                while True:
                    try:
                        count = waiting.frontend.socket.send(data)
                    except BlockingIOError:
                        break
                    assert count == len(data)
                    sent += 1
                waiting.frontend.turn()
                if sent == before:
                    break
            else:
                raise AssertionError(f"{sent} messages, and no end")
            assert sent > 100
            assert backend.process(0.0) == 0 and backend.wait_time is None, "nothing wakes it"
            waiting.ask()
            waiting.frontend.turn()
            assert waiting.served() == number + 1
            for _ in range(sent):
                reply, body = wire.HEADER.unpack(take(waiting.frontend, wire.HEADER.size)), b""
                body = take(waiting.frontend, reply[2])
                assert reply[0] == wire.HEADER.unpack(data[: wire.HEADER.size])[0] and len(body) == reply[2]
            assert waiting.frontend.ask(F.GET_FEATURES) is not None
        assert not errors
        waiting.close()


def test_device_23_who_vanishes_with_replies_unread_is_gone(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with Backend(path, RngDevice()) as backend:
        waiting = Waiting(path, backend)
        for _ in range(100):
            with suppress(BlockingIOError):
                while True:
                    waiting.frontend.socket.send(wire.encode(F.GET_FEATURES))
            waiting.frontend.turn()
        waiting.vanish()
        while backend.connections:
            backend.process(60.0)
        waiting.close()


def test_device_23_who_reads_no_news_of_the_configuration_has_one_message_waiting(tmp_path: Path) -> None:
    path, errors, device = str(tmp_path / "s"), list[Exception](), NetDevice()
    with Backend(path, device, report=errors.append) as backend, Frontend.at(path, backend) as frontend:
        frontend.negotiate(FEATURES)
        frontend.start(frontend.queue(0))
        near, far = socket.socketpair()
        with near, far:
            frontend.ask(F.SET_BACKEND_REQ_FD, None, [far.fileno()])
            news, unread = wire.encode(wire.BackendRequest.CONFIG_CHANGE_MSG), 0
            far.setblocking(False)
            with suppress(BlockingIOError):
                while True:
                    unread += far.send(news)
            for number in range(20):
                device.link = bool(number % 2)
                frontend.turn()
            assert backend.process(0.0) == 0 and backend.wait_time is None, "nothing wakes it"
            near.settimeout(60.0)
            while unread:
                unread -= len(near.recv(min(unread, 1 << 16)))
            frontend.turn()
            assert near.recv(100) == news
            device.link = False
            frontend.turn()
            assert near.recv(100) == news
            near.setblocking(False)
            with pytest.raises(BlockingIOError):
                near.recv(100)
        assert not errors
        device.link = True  # nobody is there any more
        frontend.turn()
        assert len(errors) == 1
        assert frontend.ask(F.GET_FEATURES) is not None


def take(frontend: Frontend, count: int) -> bytes:
    """So many bytes of replies, letting the back-end go on meanwhile."""
    data = b""
    while len(data) < count:
        try:
            data += frontend.socket.recv(count - len(data))
        except BlockingIOError:
            assert frontend.backend.process(60.0)
    return data
