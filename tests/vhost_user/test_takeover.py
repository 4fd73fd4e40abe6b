"""Rings of a back-end that was killed, from a front-end that has forgotten where they were, as QEMU's network card does."""

import pytest

from tests.vhost_user.frontend import GUEST, Frontend
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


@pytest.mark.parametrize("features", [Features({Feature.VERSION_1}), SINGLES], ids=["split", "packed"])
def test_a_notification_that_a_killed_back_end_owed_is_made_up_for(path: str, features: Features) -> None:
    """All is used, but the driver was not told: nothing else will."""
    with Backend(path, NetDevice()) as backend, Frontend.at(path, backend) as frontend:
        frontend.negotiate(features)
        queue = frontend.queue(0, SIZE)
        frontend.start(queue)
        frontend.turn()
        base = frontend.stop(0)
        frontend.ask(F.SET_VRING_ENABLE, wire.VringState(0, 0))
        frontend.calls[0].drain()
        frontend.start(queue, base=base)  # enabled last
        assert frontend.calls[0].drain()
