"""Linux's own virtio_net, in QEMU, on a device in Python."""

import runpy
import threading
from pathlib import Path

import pytest

from tests.guest.machines import Machine
from virtio import Feature, NetDevice
from virtio.cli.initrd import Kernel
from virtio.features import Features
from virtio.vhost_user.backend import Backend

pytestmark = pytest.mark.guest

EXAMPLE = Path(__file__).parents[2] / "examples/answer.py"


def test_linux_pings_a_device_in_python(kernel: Kernel, tmp_path: Path, ring_features: Features, ring_format: str) -> None:
    answer: type[NetDevice] = runpy.run_path(str(EXAMPLE))["Answer"]
    device = answer(offered=NetDevice.features | {Feature.EVENT_IDX, Feature.INDIRECT_DESC, *ring_features})
    errors: list[Exception] = []
    with Backend(path := str(tmp_path / "net"), device, report=errors.append) as backend:
        thread = threading.Thread(target=backend.serve)
        thread.start()
        try:
            with Machine(kernel, path, card=",packed=on") as machine:
                machine.guest.wait_ready()
                machine.read("ip link set eth0 up && ip addr add 192.168.90.1/24 dev eth0")
                status, lines = machine.run("ping -n -c 5 -i 0.1 -w 30 192.168.90.2")
                assert status == 0 and any("5 received" in line for line in lines), lines
                queue = device.queue(0)
                assert queue is not None and queue.ring_format == ring_format
        finally:
            backend.stop()
            thread.join()
    assert not errors
