"""Linux's own virtio_net, in User-Mode Linux, on our network device over vhost-user."""

import os
import runpy
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.uml.linux import Linux
from virtio import Feature, NetDevice
from virtio.features import Features
from virtio.vhost_user.backend import Backend

pytestmark = pytest.mark.uml

ROOT = Path(__file__).parents[2]
NET = 1
MAC = bytes.fromhex("020000000007")
PING = """
IF=$(ls /sys/class/net | grep -v lo | head -1)
cat /sys/class/net/$IF/address
ip link set $IF up; ip addr add 192.168.90.1/24 dev $IF
ping -c 5 -i 0.2 -W 5 -s 1200 192.168.90.2
"""


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "net")


@pytest.fixture
def answer() -> type[NetDevice]:
    found: type[NetDevice] = runpy.run_path(str(ROOT / "examples/answer.py"))["Answer"]
    assert issubclass(found, NetDevice)
    return found


def run(backend: Backend, linux: Linux, until: Callable[[], bool] = lambda: False, seconds: float = 60.0) -> None:
    """Serves until Linux ends."""
    limit = time.monotonic() + seconds
    while not linux.ended and not until():
        assert time.monotonic() < limit, linux.output
        backend.process(0.2)


def descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


@pytest.fixture
def errors() -> Iterator[list[Exception]]:
    found: list[Exception] = []
    yield found
    assert not found


def test_linux_pings_our_device(path: str, answer: type[NetDevice], errors: list[Exception], ring_features: Features) -> None:
    packed = Feature.RING_PACKED in ring_features
    device = answer(mac=MAC, offered=NetDevice.features | {Feature.EVENT_IDX, Feature.INDIRECT_DESC, *ring_features})
    with Backend(path, device, report=errors.append) as backend, Linux(PING, {path: NET}) as linux:
        seen: set[str] = set()

        def look() -> bool:
            if (queue := device.queue(0)) is not None:
                seen.add(queue.ring_format)
            return False

        run(backend, linux, look)
        assert "5 received" in linux.output, linux.output
        assert MAC.hex(":") in linux.output
        assert seen == {"packed" if packed else "split"}
        backend.process(0.0)
        assert not backend.connections
