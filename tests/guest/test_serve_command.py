"""`virtio serve` under Linux in QEMU, as docs/serving.md has it: with its interface, and through its end by SIGKILL while streams run."""

import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.cli.serving import Serving, serving
from tests.guest.far import FAR
from tests.guest.machines import Machine
from tests.guest.streams import Streams
from virtio.cli.initrd import Kernel
from virtio.netdev import Namespace

pytestmark = pytest.mark.guest
MIB = 1 << 20


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    """With an interface that outlives who serves."""
    with Namespace() as made:
        with made.entered():
            subprocess.run(["ip", "tuntap", "add", "tap0", "mode", "tap"], check=True)
            subprocess.run(["ip", "addr", "add", f"{FAR}/24", "dev", "tap0"], check=True)
        yield made


@pytest.mark.parametrize("listens", [False, True], ids=["qemu connects", "qemu listens"])
def test_streams_go_on_through_servers_that_are_killed(kernel: Kernel, tmp_path: Path, namespace: Namespace, listens: bool) -> None:
    path = str(tmp_path / "vm.sock")
    words = ("net", "--socket-path", path, "--tap", "tap0", *(("--client",) if listens else ()))

    def served(stack: ExitStack) -> Serving:
        return stack.enter_context(serving(*words, namespace=namespace))

    with ExitStack() as stack:
        server = served(stack)
        machine = stack.enter_context(Machine(kernel, path, chardev=",server=on,wait=off" if listens else ",reconnect=1"))
        machine.boot()
        machine.ping()
        streams = Streams(machine, namespace)
        for _ in range(3):
            streams.until_moved(MIB)
            server.process.kill()
            server.process.wait()
            server = served(stack)
            server.until("connected")
        streams.until_moved(MIB)
        streams.end()
        machine.ping()
        assert [event for event in server.end() if event["event"] == "error"] == []
