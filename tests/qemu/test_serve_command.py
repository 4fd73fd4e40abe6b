"""`virtio serve rng` as QEMU's vhost-user-rng-pci, with our driver in the place of a guest."""

import shutil
from pathlib import Path

import pytest

from tests.cli.serving import serving
from tests.qemu.conftest import Machines, only
from virtio.devices.rng import RngDriver

pytestmark = pytest.mark.qemu


def test_qemus_entropy_card_is_served(machines: Machines, binary: str, tmp_path: Path) -> None:
    path = str(tmp_path / "rng.sock")
    vectors = "" if binary == shutil.which("qemu-system-x86_64") else ",vectors=0"  # as of network cards
    options = ["-chardev", f"socket,id=rng0,path={path}"]
    with serving("rng", "--socket-path", path) as served:
        for turn in range(2):
            with machines(f"vhost-user-rng-pci,chardev=rng0{vectors}", options=options) as machine:
                with only(machine) as transport, RngDriver(transport) as rng:
                    assert len(rng.read(1000)) == 1000
                    assert rng.read(64) != rng.read(64)
                served.until("counters", requestq=3 * turn + 3)
            served.until("disconnected")
        served.end()
