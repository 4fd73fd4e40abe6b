"""Rings of a back-end that was killed, from a front-end that has forgotten where they were, as QEMU's network card does."""

from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.vhost_user.frontend import GUEST, USER, Frontend
from virtio import DriverQueue, Feature, NetDevice
from virtio.features import Features
from virtio.vhost_user import message as wire
from virtio.vhost_user.backend import Backend
from virtio.vhost_user.message import FrontendRequest as F

SIZE = 16
AVAIL, USED = 1 << 7, 1 << 15
SINGLES = Features({Feature.VERSION_1, Feature.RING_PACKED, Feature.INDIRECT_DESC})


def frame(frontend: Frontend, number: int) -> tuple[int, int]:
    return frontend.room(72, bytes(12) + bytes([number]) * 60)


def send(frontend: Frontend, queue: DriverQueue, numbers: range) -> None:
    for number in numbers:
        queue.add(number, readable=[frame(frontend, number)])
    queue.publish()


def drop(frontend: Frontend, queue: DriverQueue, number: int) -> None:
    """What QEMU's card does with a chain that it transmits itself, the link being down: used in its own place, of length 0."""
    place = queue.areas[0] - GUEST + 16 * (number % SIZE)
    frontend.memory.store(place + 8, 4, 0)
    frontend.memory.store(place + 14, 2, AVAIL | USED if number // SIZE % 2 == 0 else 0)


@pytest.mark.parametrize("told", [0x8000_8000, 0x8001_8001, 0x0001_0001, 0x0007_0007, 0x800F_800F])
@pytest.mark.parametrize("dropped", [range(0), range(16, 17), range(13, 16), range(14, 18)])
def test_a_packed_ring_goes_on_though_another_has_transmitted_of_it(path: str, told: int, dropped: range) -> None:
    """Whatever base the front-end believes in: each chain is completed once, and what was not dropped is received, in order."""
    device = NetDevice()
    with Backend(path, device) as backend, Frontend.at(path, backend) as frontend:
        frontend.negotiate(SINGLES)
        queues = [frontend.queue(index, SIZE) for index in range(2)]
        for queue in queues:
            frontend.start(queue)
        burst = device.pool.burst(SIZE)
        received: list[int] = []

        def receive() -> None:
            frontend.turn()
            for index in range(device.receive(burst)):
                received.append(burst.tobytes(index)[0])
            device.take(burst)

        send(frontend, queues[1], range(10))
        receive()
        assert [token for token, _ in queues[1].pop_used()] == [*range(10)]
        frontend.stop(1)
        send(frontend, queues[1], range(10, 19))
        for number in dropped:
            drop(frontend, queues[1], number)
        frontend.start(queues[1], base=told)
        receive()
        assert received == [number for number in range(19) if number not in dropped]
        assert [token for token, _ in queues[1].pop_used()] == [*dropped, *(number for number in range(10, 19) if number not in dropped)]
        send(frontend, queues[1], range(19, 32))
        receive()
        assert received[-13:] == [*range(19, 32)]
        assert len(queues[1].pop_used()) == 13


@pytest.mark.parametrize("told", [0, 5])
def test_a_notification_that_a_killed_back_end_owed_is_made_up_for(path: str, ring_features: Features, told: int) -> None:
    """All is used, but the driver was not told: nothing else will. Of a ring that begins it needs to be told nothing."""
    packed = Feature.RING_PACKED in ring_features
    with Backend(path, NetDevice()) as backend, Frontend.at(path, backend) as frontend:
        frontend.negotiate(ring_features | {Feature.VERSION_1})
        queue = frontend.queue(0, SIZE)
        if not packed:
            frontend.memory.store(queue.areas[2] - GUEST + 2, 2, told)  # what was used
        frontend.start(queue, base=0x8000_8000 | told << 16 | told if packed else told)
        assert bool(frontend.calls[0].drain()) == bool(told)


CHAINS = SINGLES | {Feature.IN_ORDER}


def send_three(frontend: Frontend, queue: DriverQueue, *, two: int | None) -> None:
    """Three chains, one of them of two descriptors."""
    for number in range(3):
        queue.add(number, readable=[frontend.room(12), frontend.room(60)] if number == two else [frame(frontend, number)])
    queue.publish()


@pytest.mark.parametrize("features", [SINGLES, CHAINS], ids=["any order", "in order"])
@pytest.mark.parametrize("again", ["address", "error", "another back-end"])
def test_a_front_end_that_knows_the_base_is_believed(path: str, tmp_path: Path, features: Features, again: str) -> None:
    """Whatever the descriptors look like: what is left of longer chains, or of what one used descriptor stands for."""
    with ExitStack() as stack:
        device = NetDevice()
        backend = stack.enter_context(Backend(path, device))
        frontend = stack.enter_context(Frontend.at(path, backend))
        frontend.negotiate(features)
        queues = [frontend.queue(index, SIZE) for index in range(2)]
        for queue in queues:
            frontend.start(queue)
        send_three(frontend, queues[1], two=None if features == CHAINS else 1)
        frontend.turn()
        burst = device.pool.burst(SIZE)
        assert device.receive(burst) == 3
        device.take(burst)
        table = queues[1].areas[0] - GUEST
        before = frontend.memory.read(table, 16 * 4)
        if again == "address":
            descriptor, driver, used = (area - GUEST + USER for area in queues[1].areas)
            frontend.ask(F.SET_VRING_ADDR, wire.VringAddr(1, 0, descriptor, used, driver, 0))
        elif again == "error":
            frontend.ask(F.SET_VRING_ERR, wire.U64(1), [frontend.errors[1].fileno()])
        else:
            bases = [frontend.stop(index) for index in range(2)]
            device = NetDevice()
            backend = stack.enter_context(Backend(str(tmp_path / "other"), device))
            other = stack.enter_context(Frontend.at(str(tmp_path / "other"), backend))
            own = {name: getattr(other, name) for name in ("memory", "kicks", "calls", "errors")}
            stack.callback(vars(other).update, own)
            vars(other).update({name: getattr(frontend, name) for name in own})
            other.negotiate(features)
            for queue, base in zip(queues, bases, strict=True):
                other.start(queue, base=base)
            frontend = other
            burst = device.pool.burst(SIZE)
        assert frontend.memory.read(table, 16 * 4) == before
        send(frontend, queues[1], range(3, 5))
        frontend.turn()
        assert [burst.tobytes(index)[0] for index in range(device.receive(burst))] == [3, 4]
        device.take(burst)
        assert [token for token, _ in queues[1].pop_used()] == [*range(5)]


@pytest.mark.parametrize("base", [0, 0x8000])
def test_a_ring_that_was_stopped_before_it_ran_begins_as_it_was_told(path: str, base: int) -> None:
    """However its front-end spells the beginning of a packed ring."""
    device = NetDevice()
    with Backend(path, device) as backend, Frontend.at(path, backend) as frontend:
        frontend.negotiate(SINGLES)
        queue = frontend.queue(0, SIZE)
        frontend.start(frontend.queue(1, SIZE))
        frontend.start(queue, base=base, enabled=False)
        frontend.start(queue, base=frontend.stop(0))
        queue.add("room", writable=[frontend.room(200)])
        queue.publish()
        frontend.turn()
        assert device.send_frames([b"f" * 60]) == 1
        assert queue.pop_used() == [("room", 72)]
