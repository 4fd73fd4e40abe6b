"""The driver's side of a network device by hand, over a front-end by hand: frames that are numbers."""

import time
from collections.abc import Callable

from tests.netdev.wires import frame, number_of
from tests.vhost_user.frontend import GUEST, SIZE, USER, Frontend
from virtio import Feature
from virtio.features import Features
from virtio.vhost_user.message import Region

HEADER, ROOM = 12, 2048


def eventually(what: Callable[[], bool]) -> None:
    """What happens in another thread, or in the kernel's own time."""
    deadline = time.monotonic() + 60
    while not what():
        assert time.monotonic() < deadline, "sixty seconds have passed"
        time.sleep(0.002)


class Guest:
    """The driver's side by hand: both queues, and frames that are numbers."""

    def __init__(self, frontend: Frontend, ring_features: Features) -> None:
        self.frontend = frontend
        frontend.negotiate(ring_features | {Feature.EVENT_IDX})
        self.receiveq, self.transmitq = frontend.queue(0, 32), frontend.queue(1, 32)
        self._rooms = [frontend.room(ROOM) for _ in range(48)]
        for token, place in enumerate(self._rooms[:16]):
            self.receiveq.add(token, writable=[place])
        self.receiveq.publish()
        self.free = list(range(16, 48))
        self.frames: list[int] = []

    def start(self) -> None:
        """Hands both rings over, for the first time."""
        for queue in (self.receiveq, self.transmitq):
            self.frontend.start(queue)

    def send(self, number: int, meanwhile: Callable[[], object] = lambda: None) -> None:
        """Waits for room in the ring, which a device gives that somebody else moves. `meanwhile` is done again and again."""
        eventually(lambda: (meanwhile(), self._reclaimed(), bool(self.free))[-1])  # type: ignore[func-returns-value]
        token = self.free.pop()
        data = bytes(HEADER) + frame(number)
        self.frontend.memory.write(self._rooms[token][0] - GUEST, data)
        self.transmitq.add(token, readable=[(self._rooms[token][0], len(data))])
        self.transmitq.publish()

    def break_a_rule(self) -> None:
        """Sends what lies in memory that the device does not have."""
        self.frontend.map([Region(GUEST, SIZE // 2, USER, 0)])
        self.transmitq.add(99, readable=[(GUEST + SIZE - 4096, 100)])
        self.transmitq.publish()

    def _reclaimed(self) -> None:
        self.free += [int(token) for token, _ in self.transmitq.pop_used()]

    def receive(self) -> list[int]:
        """What has come so far, its buffers given back."""
        for token, length in self.receiveq.pop_used():
            self.frames.append(number_of(self.frontend.look(self._rooms[token], length)[HEADER:]))
            self.receiveq.add(token, writable=[self._rooms[token]])
        self.receiveq.publish()
        return self.frames

    def expect(self, numbers: list[int]) -> None:
        """Exactly these, in this order."""
        eventually(lambda: len(self.receive()) >= len(numbers))
        assert self.frames == numbers
        self.frames = []
