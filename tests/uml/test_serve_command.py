"""`virtio serve` under Linux's own virtio_net, in User-Mode Linux: the far end is an interface, or another machine."""

import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.cli.serving import serving
from tests.guest.far import FAR, NEAR, listening
from virtio.cli.guest import Guest, uml_guest
from virtio.netdev import Namespace

pytestmark = pytest.mark.uml
NET = 1


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    with Namespace() as made:
        yield made


def machine(stack: ExitStack, folder: Path, path: Path, device: int = NET) -> Guest:
    """A guest that is up, with its device at `path`."""
    folder.mkdir()
    guest = stack.enter_context(uml_guest(folder, {str(path): device}))
    guest.wait_ready()
    return guest


def up(guest: Guest, address: str) -> None:
    guest.read(f"ip link set eth0 up && ip addr add {address}/24 dev eth0")


def ping(guest: Guest, address: str) -> None:
    status, lines = guest.run(f"ping -n -c 3 -i 0.1 -W 10 -w 30 {address}")
    assert status == 0 and any("3 received" in line for line in lines), lines


def test_an_interface_is_the_far_end_of_the_recipe(folder: Path, namespace: Namespace) -> None:
    path = folder / "s"
    with ExitStack() as stack:
        served = stack.enter_context(serving("net", "--socket-path", str(path), "--tap", "tap0", namespace=namespace))
        with namespace.entered():
            subprocess.run(["ip", "addr", "add", f"{FAR}/24", "dev", "tap0"], check=True)
        guest = machine(stack, folder / "uml", path)
        up(guest, NEAR)
        ping(guest, FAR)
        with listening(namespace):
            for words in ("", "-R"):
                status, lines = guest.run(f"iperf3 -c {FAR} -t 1 --connect-timeout 60000 {words}")
                assert status == 0 and any("receiver" in line for line in lines), lines
        found = served.until("counters", received_bytes=1 << 20, sent_bytes=1 << 20)["devices"][0]
        assert found["received_bytes"] / found["received_frames"] > 2000  # segmentation offloads are on
        served.end()
        # This kernel does not connect again, and says so no further: its card is there, and nothing moves any more.
        served = stack.enter_context(serving("net", "--socket-path", str(path), "--tap", "tap0", namespace=namespace))
        status, lines = guest.run(f"ping -n -c 1 -W 3 {FAR}")
        assert status != 0 and [event["event"] for event in served.end()] == ["end"]


@pytest.mark.parametrize("words", [(), ("--no-offloads",), ("--packed",)], ids=["offloads", "plain", "packed"])
def test_two_machines_are_each_others_far_end(folder: Path, words: tuple[str, ...]) -> None:
    one, other, capture = folder / "a", folder / "b", folder / "c.pcap"
    capturing = ("--pcap", str(capture)) if words == ("--no-offloads",) else ()
    with ExitStack() as stack:
        served = stack.enter_context(serving("net", "--socket-path", str(one), "--peer", str(other), *capturing, *words, sockets=2))
        near = machine(stack, folder / "one", one)
        far = machine(stack, folder / "other", other)
        up(near, NEAR)
        up(far, FAR)
        ping(near, FAR)
        ping(far, NEAR)
        far.read("iperf3 -s -D -1 --logfile /tmp/log")
        far.read("until grep -qs ':1451 .* 0A ' /proc/net/tcp /proc/net/tcp6; do sleep 0.1; done")  # it listens
        status, lines = near.run(f"iperf3 -c {FAR} -t 2 --connect-timeout 60000")
        assert status == 0 and any("receiver" in line for line in lines), lines
        served.until("counters", received_bytes=1 << 20)
        served.end()
    if capturing:
        done = subprocess.run(["tcpdump", "-r", capture, "-nn", "icmp"], capture_output=True, text=True, check=True)
        assert done.stdout.count("ICMP echo request") == done.stdout.count("ICMP echo reply") == 6
