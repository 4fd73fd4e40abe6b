"""Other cards of Linux guests in QEMU: several queue pairs, long packets."""

import runpy
import threading
from pathlib import Path

import pytest

from tests.guest.far import Far, device_for
from tests.guest.machines import Machine
from virtio import Feature, NetDevice
from virtio.cli.initrd import Kernel
from virtio.features import Features
from virtio.vhost_user.backend import Backend

pytestmark = pytest.mark.guest

EXAMPLE = Path(__file__).parents[2] / "examples/answer.py"
SPLIT = Features({Feature.VERSION_1})


def test_two_queue_pairs_both_carry_frames(kernel: Kernel, tmp_path: Path, ring_features: Features) -> None:
    """Linux has a pair for each processor, and sends from the one of the processor that it is on."""
    answer: type[NetDevice] = runpy.run_path(str(EXAMPLE))["Answer"]
    device = answer(queue_pairs=2)
    errors: list[Exception] = []
    card = f",mq=on,packed={'on' if Feature.RING_PACKED in ring_features else 'off'}"
    with Backend(path := str(tmp_path / "net"), device, report=errors.append) as backend:
        thread = threading.Thread(target=backend.serve)
        thread.start()
        try:
            with Machine(kernel, path, card=card, pairs=2, processors=2) as machine:
                machine.guest.wait_ready()
                machine.up("192.168.90.1")
                assert machine.read("ls -d /sys/class/net/eth0/queues/rx-* | wc -l") == "2"
                for processor in (1, 2):
                    machine.ping(10, before=f"taskset {processor}", address="192.168.90.2")
                    queue = device.queue(2 * processor - 1)
                    assert queue is not None and queue.counters["used"] >= 10
                    assert (queue.ring_format == "packed") == (Feature.RING_PACKED in ring_features)
        finally:
            backend.stop()
            thread.join()
    assert not errors


def test_packets_of_9000_bytes(kernel: Kernel, tmp_path: Path) -> None:
    """Without offloads: nothing cuts segments here, so packets are as long as they may be."""
    path = str(tmp_path / "net")
    with Far(path, device_for(SPLIT, mtu=9000, offloads=False)) as far, Machine(kernel, path, card=",host_mtu=9000") as machine:
        machine.boot()
        assert machine.read("cat /sys/class/net/eth0/mtu") == "9000"
        machine.ping(5, "-M do -s 8972")
        with far.iperf3():
            assert machine.iperf3(1) > 0
            assert machine.iperf3(1, "-R") > 0
        counted = far.peer.statistics  # of both streams, acknowledgements too
        assert min(counted[way]["bytes"] / counted[way]["frames"] for way in ("transmit", "receive")) > 2000
        assert not far.errors
