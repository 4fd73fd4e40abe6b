"""O_NONBLOCK belongs to the open file, so a peer may clear it on whatever it passed or was passed: nobody here waits for it.

What waits in such a call holds the interpreter's lock, so only a clock outside of it can end a test that fails.
"""

import faulthandler
import os
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.vhost_user.frontend import GUEST, PROTOCOL, Frontend
from tests.vhost_user.hostile import ByHand
from tests.vhost_user.serving import PATIENCE, until
from virtio import Chain, DeviceId, DeviceQueue, EventFd, Feature, NetDevice, NetDriver
from virtio.device import Device
from virtio.errors import DeviceNeedsReset
from virtio.features import Features
from virtio.transport.vhost_user import VhostUserTransport
from virtio.vhost_user import message as wire
from virtio.vhost_user.backend import Backend
from virtio.vhost_user.message import FrontendRequest as F
from virtio.vhost_user.message import ProtocolFeature

FULL = (1 << 64) - 2
"""What a write can fill it with; the kernel itself may add one more."""
FEATURES = Features({Feature.VERSION_1})


@pytest.fixture(autouse=True)
def _clock() -> Iterator[None]:
    faulthandler.dump_traceback_later(PATIENCE, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


class Two(Device):
    """A device of two queues, which answers at once."""

    device_id, queues = 42, ("first", "second")

    def on_first(self, queue: DeviceQueue) -> None:
        chains: list[Chain] = queue.pop()
        for chain in chains:
            queue.complete(chain, 0)
        queue.publish()

    on_second = on_first


def fill(event: EventFd) -> None:
    """So that it holds all it can."""
    event.drain()
    os.eventfd_write(event.fileno(), FULL)


@pytest.mark.parametrize("passed", [False, True])
def test_an_eventfd(passed: bool) -> None:
    far = EventFd()
    near = EventFd.from_fd(far.fileno()) if passed else far
    os.set_blocking(far.fileno(), True)
    assert near.drain() == 0
    fill(far)
    near.signal()
    assert near.drain() >= FULL


@pytest.mark.parametrize("poll", [False, True])
def test_device_23_a_front_end_makes_its_kicks_blocking(poll: bool, tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with Backend(path, Two(), poll=poll) as backend, Frontend.at(path, backend) as frontend:
        frontend.negotiate(FEATURES)
        for index in (0, 1):
            frontend.start(frontend.queue(index))
        frontend.turn()
        os.set_blocking(frontend.kicks[1].fileno(), True)
        os.set_blocking(frontend.kicks[0].fileno(), True)
        for event in (frontend.calls[0], frontend.errors[0]):
            os.set_blocking(event.fileno(), True)
            fill(event)
        frontend.queues[0].add(None, readable=[frontend.room(8)])
        frontend.queues[0].publish()
        frontend.turn()
        assert frontend.queues[0].pop_used() == [(None, 0)]
        frontend.memory.store(frontend.queues[0].areas[1] - GUEST + 2, 2, 999)  # more than the ring has: it breaks, and says so
        frontend.kicks[0].signal()
        frontend.turn()
        assert frontend.errors[0].drain() >= FULL


def test_a_front_end_makes_a_ring_that_is_emptied_blocking(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with Backend(path, NetDevice()) as backend, Frontend.at(path, backend) as frontend:
        frontend.negotiate(FEATURES)
        queue = frontend.queue(1)
        os.set_blocking(frontend.kicks[1].fileno(), True)
        frontend.start(queue, enabled=False)
        queue.add(None, readable=[frontend.room(64)])
        queue.publish()
        os.set_blocking(frontend.kicks[1].fileno(), True)
        frontend.turn()
        assert queue.pop_used() == [(None, 0)]


def test_device_23_a_front_end_leaves_its_channel_blocking_and_full(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    device = NetDevice()
    with Backend(path, device) as backend, Frontend.at(path, backend) as frontend:
        frontend.negotiate(FEATURES)
        near, far = socket.socketpair()
        with near, far:
            frontend.ask(F.SET_BACKEND_REQ_FD, None, [far.fileno()])
            far.setblocking(False)
            for size in (4096, 1):
                with suppress(BlockingIOError):
                    while True:
                        far.send(bytes(size))
            far.setblocking(True)
            frontend.start(frontend.queue(0))
            device.link = False
            frontend.turn()
            assert frontend.ask(F.GET_FEATURES) is not None


@pytest.mark.parametrize("kind", ["pipe", "socket", "terminal"])  # the kernel knows no RWF_NOWAIT of the last
def test_device_23_a_front_end_makes_state_that_never_ends_blocking(kind: str, tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with Backend(path, Two()) as backend, Frontend.at(path, backend) as frontend:
        frontend.negotiate(FEATURES, PROTOCOL | {ProtocolFeature.DEVICE_STATE})
        near, far = os.pipe() if kind == "pipe" else os.openpty() if kind == "terminal" else map(socket.socket.detach, socket.socketpair())
        assert frontend.ask(F.SET_DEVICE_STATE_FD, wire.DeviceStateTransfer(1, 0), [near])
        os.set_blocking(near, True)
        checked = frontend.ask(F.CHECK_DEVICE_STATE)
        assert checked is not None and checked.payload.value == 1
        for end in (near, far):
            os.close(end)


def test_a_back_end_makes_what_it_was_passed_blocking() -> None:
    with (
        ByHand() as far,
        VhostUserTransport(far.near.detach(), DeviceId.NETWORK, timeout=PATIENCE) as transport,
        NetDriver(transport) as net,
    ):
        for event in far.events.values():
            os.set_blocking(event, True)
        os.eventfd_write(far.events[0], 1)
        until(lambda: transport.status & 64)
        with pytest.raises(DeviceNeedsReset):
            net.check()
        net.restart()
        net.check()
