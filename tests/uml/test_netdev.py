"""Linux's own virtio_net in User-Mode Linux, over vhost-user, with a kernel interface as the far end: ping and iperf3, all offloads."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import pytest

from tests.uml.linux import Linux
from virtio import Feature, NetDevice
from virtio.features import Features
from virtio.netdev import Namespace, Netdev
from virtio.vhost_user.backend import Backend

pytestmark = pytest.mark.uml
NET = 1
FAR = "192.168.90.2"
UP = """
IF=$(ls /sys/class/net | grep -v lo | head -1)
ip link set $IF up; ip addr add 192.168.90.1/24 dev $IF
"""
AGAIN = """
echo virtio0 > /sys/bus/virtio/drivers/virtio_net/unbind
echo virtio0 > /sys/bus/virtio/drivers/virtio_net/bind
"""
PING = f"""
ping -c 3 -i 0.2 -W 20 {FAR}
"""
LOAD = f"""
for way in "" -R; do
    iperf3 -c {FAR} -t 1 -J $way > /tmp/result
    echo; echo "BEGIN"; cat /tmp/result; echo "END"
done
"""


@contextmanager
def iperf3(namespace: Namespace) -> Iterator[None]:
    """A server in there, which listens."""
    with namespace.entered():
        server = subprocess.Popen(["iperf3", "-s", "-B", FAR, "--forceflush"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert server.stdout is not None
    try:
        for line in server.stdout:
            if "listening" in line:
                break
        else:
            pytest.fail("iperf3 did not start")
        yield
    finally:
        server.kill()
        server.wait()
        server.stdout.close()


def serve(backend: Backend, linux: Linux) -> None:
    """Until Linux ends."""
    serving = Thread(target=backend.serve)
    serving.start()
    try:
        linux.process.wait(120)
    finally:
        backend.stop()
        serving.join()


def test_ping_and_iperf3_both_ways_through_a_kernel_interface(tmp_path: Path, ring_features: Features) -> None:
    device = NetDevice(offered=NetDevice.features | {Feature.EVENT_IDX, Feature.INDIRECT_DESC, *ring_features})
    errors: list[Exception] = []
    path = str(tmp_path / "net")
    with Namespace() as namespace, Netdev(device, "tap0", namespace=namespace, address=f"{FAR}/24") as tap, iperf3(namespace):
        tap.follow(errors.append)
        with Backend(path, device, report=errors.append) as backend:
            for _ in range(2):  # another machine comes, and the interface is still there
                with Linux(UP + PING + AGAIN + UP + PING + LOAD, {path: NET}) as linux:
                    serve(backend, linux)
                    assert linux.output.count("3 received") == 2, linux.output
                    results = [json.loads(part.split("END")[0]) for part in linux.output.split("BEGIN")[1:]]
                    assert [result["start"]["test_start"]["reverse"] for result in results] == [0, 1], linux.output
                    for result in results:
                        received = result["end"]["sum_received"]
                        assert received["bytes"] > 1 << 20
                        print(f"{received['bits_per_second'] / 1e6:.0f} Mbit/s", file=sys.stderr)
        seen = tap.statistics
        for way in ("transmit", "receive"):  # frames of several segments each: the offloads are on
            assert seen[way]["bytes"] / seen[way]["frames"] > 2000, seen
        assert tap.error is None
    assert not errors
