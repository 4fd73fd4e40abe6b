"""Back-ends that are killed under load, by SIGKILL at any moment, and started again: nothing is lost, nothing comes twice."""

import random
import time
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest

from tests.vhost_user.line import RESPONSE
from tests.vhost_user.machine import Line, Machine, until
from virtio import DriverQueue
from virtio.features import Features

REQUEST, ANSWER = 64, 32
SLOW = pytest.mark.slow


class Requests:
    """Numbered requests on a ring, as many at a time as it holds."""

    def __init__(self, machine: Machine, queue: DriverQueue) -> None:
        self.machine, self.queue = machine, queue
        self.next = 0
        self.answered: list[int] = []
        self.places = [(machine.room(REQUEST), machine.room(ANSWER)) for _ in range(queue.size // 2)]
        self.free = list(self.places)

    def send(self) -> None:
        """As many as there is room for."""
        while self.free:
            asked, answer = self.free.pop()
            self.machine.memory.write(asked[0] - self.base, self.next.to_bytes(8, "little"))
            self.machine.memory.write(answer[0] - self.base, bytes(ANSWER))
            self.queue.add((self.next, asked, answer), readable=[asked], writable=[answer])
            self.next += 1
        self.queue.publish()

    @property
    def base(self) -> int:
        """Where the memory begins."""
        return 0x4000_0000

    def reach(self, count: int) -> bool:
        """Goes on; whether there are so many answers."""
        self.send()
        self.receive()
        return len(self.answered) >= count

    def receive(self) -> bool:
        """Each answer is that of its request. Whether there is one for all."""
        for (number, asked, answer), length in self.queue.pop_used():
            assert length == len(RESPONSE) + 8
            assert self.machine.look(answer, length) == RESPONSE + number.to_bytes(8, "little")
            self.answered.append(number)
            self.free.append((asked, answer))
        return not self.queue.outstanding


def run(tmp_path: Path, features: Features, kills: int) -> None:
    path, notes = str(tmp_path / "s"), tmp_path / "notes"
    dice = random.Random(7)
    with Line("shuffler", path, str(notes)), Machine(path, features, [256], tracked=True) as machine:
        requests = Requests(machine, machine.queues[0])
        for _ in range(kills):
            call = machine.calls[0].fileno()
            until(partial(requests.reach, len(requests.answered) + 1), "it stalls", call)
            time.sleep(dice.random() * 0.003)
            machine.kill()
        requests.send()
        until(requests.receive, "requests are lost", machine.calls[0].fileno())
        assert sorted(requests.answered) == list(range(requests.next)), "each once"
    lives = notes.read_text().split("began\n")[1:]
    seen = [[int(line) for line in life.split()] for life in lives]
    assert len(seen) >= kills
    assert all(life == sorted(life) for life in seen), "in order"
    repeated = [after for before, after in pairwise(seen) if before and after and after[0] <= before[-1]]
    assert len(repeated) > kills // 5, "few kills hit anything"


def test_tracked_requests_are_answered_once_each(tmp_path: Path, ring_features: Features) -> None:
    run(tmp_path, ring_features, 10)


@SLOW
def test_tracked_requests_are_answered_once_each_over_a_hundred_kills(tmp_path: Path, ring_features: Features) -> None:
    run(tmp_path, ring_features, 100)
