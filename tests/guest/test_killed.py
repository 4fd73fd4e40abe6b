"""The back-end is killed under load and started again: the guest's streams go on. QEMU's card asks for no in-flight tracking."""

import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.guest import far
from tests.guest.machines import Machine
from tests.guest.streams import Streams
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


@pytest.mark.slow
def test_streams_are_whole_over_a_hundred_kills(kernel: Kernel, tmp_path: Path, ring_features: Features) -> None:
    """Both ways at once: nothing is lost for good, changed or out of place, whatever QEMU's card, which tracks nothing, has done twice. Of
    packed rings the card tells then where it transmitted itself for a moment, while there was no back-end."""
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


def test_streams_go_on_behind_a_back_end_that_was_killed(kernel: Kernel, tmp_path: Path, ring_features: Features) -> None:
    """Of packed rings QEMU forgets the position when its back-end vanishes: the descriptors tell it."""
    path = str(tmp_path / "net")
    card = f",packed={'on' if Feature.RING_PACKED in ring_features else 'off'}"
    with Namespace() as namespace, ExitStack() as running:
        running.enter_context(back_end(path, namespace, ring_features))
        with Machine(kernel, path, card=card, chardev=",reconnect-ms=100") as machine:
            machine.boot()
            machine.ping()
            streams = Streams(machine, namespace)
            for _ in range(3):
                streams.until_moved(MIB)
                running.close()  # by SIGKILL
                running.enter_context(back_end(path, namespace, ring_features))
            streams.until_moved(MIB)
            streams.end()
            machine.ping()
