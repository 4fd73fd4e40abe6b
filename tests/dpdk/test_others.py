"""Devices of other people's that are no network devices: rust-vmm's random generator under our driver, QEMU's disk to be looked at."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from virtio import DeviceId, Feature
from virtio.devices.rng import RngDriver
from virtio.transport.vhost_user import VhostUserTransport

pytestmark = pytest.mark.dpdk

LIMIT = 60.0
VENV = Path(__file__).parents[2] / ".venv"


def program(name: str, *places: Path) -> str:
    """Where a program is: on the path, or in one of the folders."""
    found = next((str(place / name) for place in places if (place / name).exists()), None) or shutil.which(name)
    if found is None:
        pytest.fail(f"{name} is not installed: run scripts/dpdk.sh, or `make dpdk-tools`")
    return found


@contextmanager
def running(path: Path, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    """A program, once a socket is at `path`."""
    process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        end = time.monotonic() + LIMIT
        while not path.exists():
            assert time.monotonic() < end and process.poll() is None, process.stdout and process.stdout.read()
            time.sleep(0.01)
        yield process
    finally:
        process.kill()
        process.communicate()


def generator(tmp_path: Path) -> tuple[Path, list[str]]:
    """Where it listens, and how it is started."""
    return tmp_path / "rng0", [program("vhost-device-rng", VENV / "bin"), "-s", str(tmp_path / "rng")]


def test_a_random_generator_by_others(tmp_path: Path) -> None:
    """A connection for each driver: that back-end never forgets how far a ring was used, whatever it is told.

    It makes its socket anew for each, so that nobody may listen for a while.
    """
    path, words = generator(tmp_path)
    with running(path, *words):
        for _ in range(2):
            with (
                VhostUserTransport(str(path), DeviceId.ENTROPY, timeout=LIMIT, connect_timeout=LIMIT) as transport,
                RngDriver(transport) as rng,
            ):
                assert {Feature.EVENT_IDX, Feature.INDIRECT_DESC} <= rng.features and Feature.RING_PACKED not in rng.features
                pieces = [rng.read(64) for _ in range(500)]
                assert len(set(pieces)) == 500 and {len(piece) for piece in pieces} == {64}


def probe(target: str) -> dict[str, object]:
    """What the command tells, as soon as somebody listens: a socket is there a little earlier."""
    words, end = [sys.executable, "-m", "virtio", "probe", target, "--json"], time.monotonic() + LIMIT
    while True:
        done = subprocess.run(words, capture_output=True, text=True, timeout=LIMIT)
        if "Connection refused" not in done.stderr or time.monotonic() > end:
            break
    assert done.returncode == 0, done.stderr
    report: dict[str, object] = json.loads(done.stdout)
    return report


def test_what_qemus_disk_says_of_itself(tmp_path: Path) -> None:
    image, path = tmp_path / "image", tmp_path / "disk"
    image.write_bytes(bytes(1 << 20))
    daemon = (
        program("qemu-storage-daemon", VENV / "qemu-7.2/usr/bin") if shutil.which("qemu-storage-daemon") is None else "qemu-storage-daemon"
    )
    export = f"type=vhost-user-blk,id=e0,node-name=disk,addr.type=unix,addr.path={path},writable=on,num-queues=2"
    with running(path, daemon, "--blockdev", f"driver=file,node-name=disk,filename={image}", "--export", export):
        report = probe(f"vhost-user:{path},type=blk")
        assert report["device"] == {"type": DeviceId.BLOCK, "name": "virtio-blk", "id": "BLOCK"}
        assert report["config"] == {"capacity": 2048, "blk_size": 512, "num_queues": 2}
        assert report["queues"] == [{"index": index, "name": f"requestq{index + 1}", "size": None} for index in range(2)]
        assert isinstance(report["vhost_user"], dict) and report["vhost_user"]["queues"] == 2


def test_what_a_generator_by_others_says_of_itself(tmp_path: Path) -> None:
    path, words = generator(tmp_path)
    with running(path, *words):
        report = probe(f"vhost-user:{path},type=rng")
        assert report["config"] == {} and report["queues"] == [{"index": 0, "name": "requestq", "size": None}]
