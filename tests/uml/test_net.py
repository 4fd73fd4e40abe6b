"""Linux's own virtio_net, in User-Mode Linux, on our network device over vhost-user."""

import runpy
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.uml.linux import Linux
from virtio import Feature, NetDevice
from virtio.devices.net import MULTIQUEUE
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

AGAIN = (
    PING
    + """
ip link set $IF down; ip link set $IF up
ping -c 2 -i 0.2 -W 5 192.168.90.2
for time in 1 2; do
    echo virtio0 > /sys/bus/virtio/drivers/virtio_net/unbind
    echo virtio0 > /sys/bus/virtio/drivers/virtio_net/bind
    IF=$(ls /sys/class/net | grep -v lo | head -1)
    ip link set $IF up; ip addr add 192.168.90.1/24 dev $IF
    ping -c 3 -i 0.2 -W 5 192.168.90.2
done
"""
)

PAIRS = """
ethtool -l $IF | grep Combined
ethtool -L $IF combined 2 && echo two pairs
ping -c 5 -i 0.2 -W 5 192.168.90.2
ethtool -L $IF combined 1 && echo one pair
ping -c 2 -i 0.2 -W 5 192.168.90.2
"""


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "net")


@pytest.fixture
def answer() -> type[NetDevice]:
    found: type[NetDevice] = runpy.run_path(str(ROOT / "examples/answer.py"))["Answer"]
    assert issubclass(found, NetDevice)
    return found


def run(backend: Backend, linux: Linux, until: Callable[[], bool] = lambda: False, seconds: float = 120.0) -> None:
    """Serves until Linux ends."""
    limit = time.monotonic() + seconds
    while not linux.ended and not until():
        assert time.monotonic() < limit, linux.output
        backend.process(0.2)


def answered(linux: Linux) -> bool:
    return "1208 bytes from" in linux.output


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


def test_the_link_goes_down_and_up_and_the_driver_is_bound_again(path: str, answer: type[NetDevice], errors: list[Exception]) -> None:
    with Backend(path, answer(mac=MAC), report=errors.append) as backend, Linux(AGAIN, {path: NET}) as linux:
        run(backend, linux)
        assert "5 received" in linux.output, linux.output
        assert "2 received" in linux.output, linux.output
        assert linux.output.count("3 received") == 2, linux.output


def test_linux_may_be_killed_and_another_comes(path: str, answer: type[NetDevice], errors: list[Exception]) -> None:
    with Backend(path, answer(mac=MAC), report=errors.append) as backend:
        for kill in (True, False):
            with Linux(PING, {path: NET}) as linux:
                run(backend, linux, partial(answered, linux) if kill else lambda: False)
            while backend.connections:
                backend.process(1.0)
        assert errors == []


def test_two_cards_on_one_back_end(path: str, answer: type[NetDevice], errors: list[Exception]) -> None:
    both = PING.replace("head -1", "sort | head -1") + "ip link set $IF down\n" + PING.replace("head -1", "sort | tail -1")
    with Backend(path, answer, report=errors.append) as backend, Linux(both, {path: NET, f"{path[:-3]}./net": NET}) as linux:
        run(backend, linux)
        assert linux.output.count("5 received") == 2, linux.output


def test_linux_sets_its_queue_pairs_by_the_control_queue(
    path: str, answer: type[NetDevice], errors: list[Exception], ring_features: Features
) -> None:
    """It has one CPU, so it takes one pair until it is told otherwise."""
    offered = NetDevice.features | MULTIQUEUE | {Feature.EVENT_IDX, Feature.INDIRECT_DESC, *ring_features}
    device = answer(mac=MAC, queue_pairs=2, offered=offered)
    seen: list[int] = []

    def look() -> bool:
        if device.pair(1).statistics and (not seen or seen[-1] != device.active_pairs):
            seen.append(device.active_pairs)
        return False

    with Backend(path, device, report=errors.append) as backend, Linux(PING + PAIRS, {path: NET}) as linux:
        run(backend, linux, look)
        assert seen == [1, 2, 1], linux.output
        assert linux.output.count("5 received") == 2 and "2 received" in linux.output, linux.output
        assert "two pairs" in linux.output and "one pair" in linux.output, linux.output
