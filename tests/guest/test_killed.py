"""The back-end is killed under load and started again: the guest's streams go on. QEMU's card asks for no in-flight tracking."""

import subprocess
import sys
import time
from collections.abc import Iterator
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
