"""The back-end is killed under load and started again: the guest's streams go on. QEMU's card asks for no in-flight tracking."""

import hashlib
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.guest import far
from tests.guest.far import FAR, listening
from tests.guest.machines import Machine
from virtio import Feature
from virtio.cli.initrd import Kernel
from virtio.features import Features
from virtio.netdev import Namespace

pytestmark = pytest.mark.guest

MIB = 1 << 20
ROOT = Path(__file__).parents[2]


@contextmanager
def back_end(path: str, namespace: Namespace, rings: Features) -> Iterator["subprocess.Popen[str]"]:
    """Serves in a process of its own, in `namespace`."""
    with namespace.entered():
        process = subprocess.Popen([sys.executable, "-m", far.__name__, path, str(int(rings))], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert process.stdout is not None and process.stdout.readline() == "serving\n"
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


@contextmanager
def back_ends(path: str, namespace: Namespace, rings: Features) -> Iterator[Callable[[], None]]:
    """As `back_end`, one after the other: what is given kills one by SIGKILL, and returns when the next one serves."""
    command = [sys.executable, "-m", far.__name__, path, str(int(rings)), "again"]
    with namespace.entered():
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdin is not None and process.stdout is not None
    written, read = process.stdin, process.stdout

    def kill() -> None:
        written.write("\n")
        written.flush()
        assert read.readline() == "serving\n"

    try:
        assert read.readline() == "serving\n"
        yield kill
    finally:
        written.close()
        assert process.wait(60) == 0
        read.close()


BLOCK = "".join(f"{number}\n" for number in range(1, 10001)).encode()
"""What `seq 1 10000` prints."""


class Streams:
    """A TCP stream from the guest, compared byte for byte as it comes, and one to it, whose digest the guest tells at its end."""

    def __init__(self, machine: Machine, namespace: Namespace) -> None:
        self._machine = machine
        with namespace.entered():
            self._listeners = [socket.create_server((FAR, port)) for port in (5001, 5002)]
        self.up = self.down = 0
        """Bytes that came, and that were taken to be sent."""
        self.wrong: str | None = None
        self._digest = hashlib.md5(usedforsecurity=False)
        self._over = threading.Event()
        works = zip((self._take, self._give), self._listeners, strict=True)
        self._threads = [threading.Thread(target=work, args=(listener,)) for work, listener in works]
        for thread in self._threads:
            thread.start()
        machine.read(f"(while [ ! -e /tmp/stop ]; do seq 1 10000; done | nc {FAR} 5001) & sleep 0")
        machine.read(f"(nc {FAR} 5002 </dev/null | md5sum >/tmp/sum) & sleep 0")

    def _take(self, listener: socket.socket) -> None:
        connected, _ = listener.accept()
        with connected:
            while data := connected.recv(1 << 16):
                place = self.up % len(BLOCK)
                if data != (BLOCK * (len(data) // len(BLOCK) + 2))[place : place + len(data)]:
                    self.wrong = f"at byte {self.up}: {data[:40]!r}"
                    return
                self.up += len(data)

    def _give(self, listener: socket.socket) -> None:
        connected, _ = listener.accept()
        with connected:
            while not self._over.is_set():
                data = os.urandom(1 << 14)
                connected.sendall(data)
                self._digest.update(data)
                self.down += len(data)

    def until_moved(self, more: int) -> None:
        """Waits until so many bytes have passed each way since now."""
        up, down, limit = self.up + more, self.down + more, time.monotonic() + 60
        while self.up < up or self.down < down:
            assert self.wrong is None, self.wrong
            assert time.monotonic() < limit, f"{self.up} of {up} bytes up, {self.down} of {down} down"
            time.sleep(0.005)

    def end(self) -> None:
        """Both end, and all of it was as it should be."""
        self._over.set()
        self._machine.read("touch /tmp/stop")
        assert self._machine.run("wait", limit=120)[0] == 0
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive()
        assert self.wrong is None, self.wrong
        assert self._machine.read("cat /tmp/sum").split()[0] == self._digest.hexdigest()
        for listener in self._listeners:
            listener.close()


@pytest.mark.slow
def test_streams_are_whole_over_a_hundred_kills(kernel: Kernel, tmp_path: Path, ring_features: Features) -> None:
    """Both ways at once: nothing is lost for good, changed or out of place, whatever QEMU's card, which tracks nothing, has done twice."""
    path, dice = str(tmp_path / "net"), random.Random(11)
    card = f",packed={'on' if Feature.RING_PACKED in ring_features else 'off'}"
    with (
        Namespace() as namespace,
        back_ends(path, namespace, ring_features) as kill,
        Machine(kernel, path, card=card, chardev=",reconnect-ms=10") as machine,
    ):
        machine.boot()
        machine.ping()
        streams = Streams(machine, namespace)
        for _ in range(100):
            streams.until_moved(1 << 16)
            time.sleep(dice.random() * 0.02)
            kill()
        streams.until_moved(MIB)
        streams.end()
        machine.ping()


def arrived(namespace: Namespace) -> int:
    """Bytes that passed the interface since the back-end started."""
    counted = namespace.counters("peer0")
    return counted["received_bytes"] + counted["sent_bytes"]


def until_moved(namespace: Namespace, more: int) -> None:
    """Waits until so many bytes have passed since now."""
    wanted, limit = arrived(namespace) + more, time.monotonic() + 60
    while arrived(namespace) < wanted:
        assert time.monotonic() < limit, f"{arrived(namespace)} of {wanted} bytes"
        time.sleep(0.05)


def test_streams_go_on_behind_a_back_end_that_was_killed(kernel: Kernel, tmp_path: Path, ring_features: Features) -> None:
    """Of packed rings QEMU forgets the position when its back-end vanishes: the descriptors tell it."""
    path = str(tmp_path / "net")
    card = f",packed={'on' if Feature.RING_PACKED in ring_features else 'off'}"
    with Namespace() as namespace, ExitStack() as running:
        running.enter_context(back_end(path, namespace, ring_features))
        with Machine(kernel, path, card=card, chardev=",reconnect-ms=100") as machine:
            machine.boot()
            machine.ping()
            for way in ("", "-R"):
                with listening(namespace):
                    machine.read(f"iperf3 -c {FAR} -t 8 {way} >/tmp/stream 2>&1 & sleep 0")
                    for _ in range(2):
                        until_moved(namespace, MIB)
                        running.close()  # by SIGKILL
                        running.enter_context(back_end(path, namespace, ring_features))
                    until_moved(namespace, MIB)
                    assert machine.run("wait %1", limit=90)[0] == 0, machine.read("cat /tmp/stream")
                machine.ping()
