"""Back-ends that are killed under load, by SIGKILL at any moment, and started again: nothing is lost, nothing comes twice."""

import random
import time
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest

from tests.vhost_user.line import RESPONSE
from tests.vhost_user.machine import GUEST, Line, Machine, until
from virtio import DriverQueue, Feature
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
            self.machine.memory.write(asked[0] - GUEST, self.next.to_bytes(8, "little"))
            self.machine.memory.write(answer[0] - GUEST, bytes(ANSWER))
            self.queue.add((self.next, asked, answer), readable=[asked], writable=[answer])
            self.next += 1
        self.queue.publish()

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


HEADER = bytes(12)


def frame(number: int) -> bytes:
    """What no other frame looks like."""
    return number.to_bytes(8, "little") + bytes((number * 7 + at) % 256 for at in range(52))


class Frames:
    """Numbered frames to a device that sends them back."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.received, self.transmitted = machine.queues
        self.next = 0
        self.done: list[int] = []
        self.first: list[int] = []
        self.seen: set[int] = set()
        self.free = [machine.room(128) for _ in range(32)]
        for _ in range(self.received.size):
            place = machine.room(128)
            self.received.add(place, writable=[place])
        self.received.publish()

    def go(self) -> bool:
        """Takes what came and sends again; true."""
        self.look()
        while self.free:
            place = self.free.pop()
            self.machine.memory.write(place[0] - GUEST, HEADER + frame(self.next))
            self.transmitted.add((self.next, place), readable=[(place[0], len(HEADER) + 60)])
            self.next += 1
        self.transmitted.publish()
        return True

    def reach(self, count: int) -> bool:
        """Goes on; whether so many are done."""
        return self.go() and len(self.done) >= count

    def look(self) -> bool:
        """Whether all that was sent is done, and came back at least once."""
        for place, length in self.received.pop_used():
            data = self.machine.look(place, length)[len(HEADER) :]
            number = int.from_bytes(data[:8], "little")
            assert data == frame(number)
            if number not in self.seen:
                self.first.append(number)
                self.seen.add(number)
            self.received.add(place, writable=[place])
        self.received.publish()
        for (number, place), _ in self.transmitted.pop_used():
            self.done.append(number)
            self.free.append(place)
        return not self.transmitted.outstanding and len(self.seen) == self.next


def run_frames(tmp_path: Path, features: Features, kills: int, tracked: bool) -> None:
    path, dice = str(tmp_path / "s"), random.Random(3)
    with Line("echo", path), Machine(path, features, [256, 64], tracked=tracked) as machine:
        frames = Frames(machine)
        calls = [event.fileno() for event in machine.calls.values()]
        for _ in range(kills):
            until(partial(frames.reach, len(frames.done) + 1), "it stalls", *calls)
            kill_at = time.monotonic() + dice.random() * 0.004
            while time.monotonic() < kill_at:
                frames.go()
            machine.kill()
        until(frames.look, "frames are lost", *calls)
        assert sorted(frames.done) == list(range(frames.next)), "each once"
        assert frames.first == list(range(frames.next)), "in order, none lost"
        assert frames.received.outstanding == frames.received.size


def test_tracked_frames_are_not_lost(tmp_path: Path, ring_features: Features) -> None:
    run_frames(tmp_path, ring_features, 10, tracked=True)


def test_untracked_frames_are_not_lost(tmp_path: Path) -> None:
    run_frames(tmp_path, Features({Feature.VERSION_1}), 10, tracked=False)


@SLOW
def test_tracked_frames_are_not_lost_over_a_hundred_kills(tmp_path: Path, ring_features: Features) -> None:
    run_frames(tmp_path, ring_features, 100, tracked=True)


@SLOW
def test_untracked_frames_are_not_lost_over_a_hundred_kills(tmp_path: Path) -> None:
    run_frames(tmp_path, Features({Feature.VERSION_1}), 100, tracked=False)
