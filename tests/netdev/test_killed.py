"""A back-end whose pumps move frames between tracked rings and an interface is killed, by SIGKILL at any moment, and started again."""

import random
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.netdev.wires import KIND, Wire, frame, number_of
from tests.vhost_user.machine import GUEST, Line, Machine, until
from virtio import Feature
from virtio.features import Features
from virtio.netdev import Namespace

HEADER, ROOM = bytes(12), 2048
ASKS = Features({Feature.EVENT_IDX, Feature.INDIRECT_DESC})


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    """With an interface that outlives whoever has it."""
    with Namespace() as made:
        with made.entered():
            Path("/proc/sys/net/ipv6/conf/default/disable_ipv6").write_text("1")
            subprocess.run(["ip", "tuntap", "add", "tap0", "mode", "tap"], check=True)
            subprocess.run(["ip", "link", "set", "tap0", "up"], check=True)
        yield made


class Traffic:
    """Numbered frames both ways between a driver's rings and the interface."""

    def __init__(self, machine: Machine, namespace: Namespace) -> None:
        self.machine = machine
        self.receiveq, self.transmitq = machine.queues
        with namespace.entered():
            self.wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(KIND))
        self.wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
        self.wire.bind(("tap0", KIND))
        self.wire.setblocking(False)
        self.sent = self.wired = 0
        """Frames that the driver sent, and that the interface sent to it."""
        self.done: list[int] = []
        """Those of which the device gave back the buffers."""
        self.first: list[int] = []
        """Those that came out of the interface, as they first did."""
        self.seen: set[int] = set()
        self.again = 0
        """How often one did that had come before."""
        self.received: list[int] = []
        self.free = [machine.room(ROOM) for _ in range(32)]
        for _ in range(self.receiveq.size):
            place = machine.room(ROOM)
            self.receiveq.add(place, writable=[place])
        self.receiveq.publish()

    def look(self) -> bool:
        """Takes what came; whether everything that the driver sent came out."""
        with suppress(BlockingIOError):
            while True:
                data, address = self.wire.recvfrom(ROOM)
                if address[2] != socket.PACKET_OUTGOING:
                    number = number_of(data)
                    if number in self.seen:
                        self.again += 1
                    else:
                        self.first.append(number)
                        self.seen.add(number)
        for (number, place), _ in self.transmitq.pop_used():
            self.done.append(number)
            self.free.append(place)
        for place, length in self.receiveq.pop_used():
            self.received.append(number_of(self.machine.look(place, length)[len(HEADER) :]))
            self.receiveq.add(place, writable=[place])
        self.receiveq.publish()
        return len(self.seen) == self.sent and not self.transmitq.outstanding

    def go(self) -> bool:
        """Takes what came, and sends more, both ways; true."""
        self.look()
        while self.free:
            place, data = self.free.pop(), HEADER + frame(self.sent)
            self.machine.memory.write(place[0] - GUEST, data)
            self.transmitq.add((self.sent, place), readable=[(place[0], len(data))])
            self.sent += 1
        self.transmitq.publish()
        for _ in range(4):
            with suppress(OSError):  # nobody is there to take it
                self.wire.send(frame(self.wired))
            self.wired += 1
        return True


def run(tmp_path: Path, namespace: Namespace, features: Features, kills: int) -> None:
    path, dice = str(tmp_path / "s"), random.Random(5)
    held = namespace.fileno()
    with Line("pump", path, str(held), descriptors=[held]), Machine(path, features, [128, 64], tracked=True) as machine:
        assert machine.area is not None
        traffic = Traffic(machine, namespace)
        calls = [*(event.fileno() for event in machine.calls.values()), traffic.wire.fileno()]
        for _ in range(kills):
            wanted = len(traffic.done) + 1, len(traffic.received) + 1
            until(lambda wanted=wanted: traffic.go() and (len(traffic.done), len(traffic.received)) >= wanted, "it stalls", *calls)  # type: ignore[misc]
            kill_at = time.monotonic() + dice.random() * 0.004
            while time.monotonic() < kill_at:
                traffic.go()
            machine.kill()
        until(traffic.look, "frames are lost", *calls)
        assert traffic.first == list(range(traffic.sent)), "in order, none lost"
        assert sorted(traffic.done) == list(range(traffic.sent)), "each buffer once"
        assert kills < 100 or traffic.again, "no kill hit anything"
        assert traffic.received == sorted(set(traffic.received)), "in order, none twice"
        assert traffic.receiveq.outstanding == traffic.receiveq.size
        with Wire(namespace, "tap0") as wire:  # every buffer is the device's again
            wire.ready()
            begin = traffic.wired
            for number in range(begin, begin + 2 * traffic.receiveq.size):
                wire.send(number)
                until(lambda number=number: traffic.look() and number in traffic.received[-1:], "a frame is lost", *calls)  # type: ignore[misc]
        traffic.wire.close()


def test_no_frame_of_the_drivers_is_lost_and_no_buffer(tmp_path: Path, namespace: Namespace, ring_features: Features) -> None:
    run(tmp_path, namespace, ring_features | ASKS, 10)


@pytest.mark.slow
def test_no_frame_of_the_drivers_is_lost_over_a_hundred_kills(tmp_path: Path, namespace: Namespace, ring_features: Features) -> None:
    run(tmp_path, namespace, ring_features | ASKS, 100)
