"""A front-end truncates the file that its machine's memory is, under rings that run: its device needs a reset, others go on (device-24)."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.leftovers import all_closed
from tests.vhost_user.frontend import GUEST, SIZE, USER, Frontend
from virtio import Burst, Chain, DeviceQueue, DriverQueue, Feature, Memory, NetDevice, Status
from virtio.device import Device
from virtio.features import Features
from virtio.vhost_user import message as wire
from virtio.vhost_user.backend import Backend
from virtio.vhost_user.message import FrontendRequest as F
from virtio.vhost_user.message import Region


class Answers(Device):
    """Gives back what it reads."""

    device_id = 42
    queues = ("requestq",)

    def on_requestq(self, queue: DeviceQueue) -> None:
        """At once."""
        for chain in queue.pop():
            queue.complete(chain, chain.write(chain.read(8)))
        queue.publish()


class AnswersLate(Answers):
    """When the next ones come."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Chain] = []

    def on_requestq(self, queue: DeviceQueue) -> None:
        """Those that it had."""
        if not (new := queue.pop()):
            return
        kept, self.kept = self.kept, new
        for chain in kept:
            queue.complete(chain, chain.write(chain.read(8)))
        queue.publish()

    def was_reset(self) -> None:
        """Forgets them."""
        self.kept = []


class Swallows(NetDevice):
    """Takes frames in bursts."""

    def on_frames(self, burst: Burst) -> None:
        """Nothing to do: they are completed."""


@pytest.fixture(params=[False, True], ids=["asleep", "polling"])
def serve(request: pytest.FixtureRequest, tmp_path: Path, errors: list[Exception]) -> Iterator[Callable[[Callable[[], Device]], Backend]]:
    """A back-end whose connections have a device each; nothing of it is left open."""
    made: list[Backend] = []

    def start(device: Callable[[], Device]) -> Backend:
        made.append(Backend(str(tmp_path / "s"), device, poll=request.param, report=errors.append))
        return made[-1]

    with all_closed():
        yield start
        for backend in made:
            backend.close()
        made.clear()
        errors.clear()  # whose tracebacks know the devices


class Machine(Frontend):
    """Its memory is a file that can be truncated."""

    file = -1

    def give_memory(self) -> None:
        """Another file, in the place of what it had."""
        self.forget()
        self.file = os.memfd_create("guest")
        os.ftruncate(self.file, SIZE)
        self.memory.close()
        self.memory = Memory.from_fd(self.file, SIZE)

    def forget(self) -> None:
        """Closes its own descriptor of the file."""
        if self.file >= 0:
            os.close(self.file)
        self.file = -1

    def close(self) -> None:
        super().close()
        self.forget()


def machine(backend: Backend, tmp_path: Path, ring_features: Features) -> Machine:
    """As far as the memory table."""
    connected = Machine.at(str(tmp_path / "s"), backend)
    connected.give_memory()
    connected.negotiate(ring_features)
    return connected


def request(frontend: Frontend, queue: DriverQueue, number: int) -> tuple[int, int]:
    """Makes a request available; where its answer goes."""
    place = frontend.room(8)
    queue.add(None, readable=[frontend.room(8, number.to_bytes(8, "little"))], writable=[place])
    queue.publish()
    return place


def kick(frontend: Frontend) -> None:
    frontend.kicks[0].signal()
    frontend.turn()


def ask(frontend: Frontend, queue: DriverQueue, number: int) -> None:
    """A request, and its answer."""
    place = request(frontend, queue, number)
    kick(frontend)
    [(_, length)] = queue.pop_used()
    assert length == 8 and frontend.look(place, 8) == number.to_bytes(8, "little")


def needs_reset(frontend: Frontend, index: int) -> bool:
    """Whether both signs of it are there."""
    reply = frontend.ask(F.GET_STATUS)
    assert reply is not None and isinstance(reply.payload, wire.U64)
    told = bool(reply.payload.value & Status.NEEDS_RESET)
    assert bool(frontend.errors[index].drain()) is told
    return told


@pytest.mark.parametrize("device", [Answers, AnswersLate], ids=["before a chain is taken", "while a chain is in flight"])
def test_device_24_a_machine_truncates_its_memory(
    device: type[Answers],
    serve: Callable[[Callable[[], Device]], Backend],
    tmp_path: Path,
    errors: list[Exception],
    ring_features: Features,
) -> None:
    kinds = iter([device, Answers])
    backend = serve(lambda: next(kinds)())
    with machine(backend, tmp_path, ring_features) as victim, machine(backend, tmp_path, ring_features) as other:
        queue, others = victim.queue(0), other.queue(0)
        victim.start(queue)
        other.start(others)
        for number in range(20):
            ask(other, others, number)
        if device is Answers:
            ask(victim, queue, 1)
        else:
            request(victim, queue, 1)
            kick(victim)
        request(victim, queue, 2)
        os.ftruncate(victim.file, 0)
        kick(victim)
        assert len(errors) == 1, errors
        assert needs_reset(victim, 0) and not needs_reset(other, 0)
        for number in range(20):
            kick(victim)
            ask(other, others, number)
        assert len(errors) == 1 and backend.connections == 2, errors

        # What is there again after a reset is served again.
        assert not victim.refused(F.RESET_DEVICE)
        victim.stop(0)
        queue.close()
        victim.give_memory()
        victim.map([Region(GUEST, SIZE, USER, 0)])
        fresh = victim.queue(0)
        victim.start(fresh)
        for number in (3, 4):
            request(victim, fresh, number)
            kick(victim)
        assert len(fresh.pop_used()) == (2 if device is Answers else 1)
        assert not needs_reset(victim, 0) and len(errors) == 1
        ask(other, others, 5)


def test_device_24_a_machine_truncates_its_memory_under_frames(
    serve: Callable[[Callable[[], Device]], Backend], tmp_path: Path, errors: list[Exception], ring_features: Features
) -> None:
    backend = serve(lambda: Swallows(offered=NetDevice.features | {Feature.EVENT_IDX, Feature.INDIRECT_DESC, *ring_features}))
    with machine(backend, tmp_path, ring_features) as victim, machine(backend, tmp_path, ring_features) as other:
        queues = []
        for each in (victim, other):
            queues.append([each.queue(index) for index in range(2)])
            for queue in queues[-1]:
                each.start(queue)

        def send(frontend: Machine, queue: DriverQueue) -> None:
            queue.add(None, readable=[frontend.room(72, bytes(72))])
            queue.publish()

        def kicked(frontend: Machine) -> None:
            frontend.kicks[1].signal()
            frontend.turn()

        for each, (_, transmitq) in zip((victim, other), queues, strict=True):
            send(each, transmitq)
            kicked(each)
            assert len(transmitq.pop_used()) == 1
        send(victim, queues[0][1])
        os.ftruncate(victim.file, 0)
        kicked(victim)
        assert len(errors) == 1, errors
        assert needs_reset(victim, 1) and not needs_reset(other, 1)
        for _ in range(20):
            kicked(victim)
            send(other, queues[1][1])
            kicked(other)
            assert len(queues[1][1].pop_used()) == 1
        assert len(errors) == 1 and backend.connections == 2, errors
