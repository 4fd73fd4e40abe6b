"""Any thread may use anything: nothing is lost or doubled, and nobody waits with the GIL in hand."""

import os
import shutil
import subprocess
import sysconfig
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import thread_work
from tests.pair import Pair
from virtio._core import BufferPool, DeviceQueue, DriverQueue, _hold

ROOT = Path(__file__).parents[1]


@pytest.fixture
def format_bit(ring_format: str) -> int:
    return thread_work.PACKED if ring_format == "packed" else 0


def test_eight_threads_share_a_queue_of_tokens(format_bit: int) -> None:
    thread_work.tokens(format_bit)


def test_eight_threads_share_a_queue_of_bursts(format_bit: int) -> None:
    thread_work.bursts(format_bit)


@pytest.mark.parametrize("kind", ["driver", "device", "pool"])
def test_a_lock_is_waited_for_without_the_gil(ring_format: str, kind: str) -> None:
    pair = Pair(ring_format)
    choices: dict[str, tuple[DriverQueue | DeviceQueue | BufferPool, Callable[[], object]]] = {
        "driver": (pair.driver, pair.driver.snapshot),
        "device": (pair.device, pair.device.snapshot),
        "pool": (pair.pool, lambda: pair.pool.available),
    }
    held, use = choices[kind]
    steps, done = [0], threading.Event()

    def step() -> None:
        while not done.wait(0.001):
            steps[0] += 1

    stepper = threading.Thread(target=step)
    stepper.start()
    try:
        for _ in range(100):  # how often the holder may be too late
            holder = threading.Thread(target=_hold, args=(held, 0.05))
            holder.start()
            before = steps[0]
            use()
            during = steps[0] - before
            holder.join()
            if during:
                break
        assert during, "no other thread ran while this one waited"
    finally:
        done.set()
        stepper.join()


def test_under_a_free_threaded_interpreter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        return  # all of the above ran there
    found = next((path for version in (15, 14) if (path := shutil.which(f"python3.{version}t"))), None)
    if found is None:
        with capsys.disabled():
            print(" [no free-threaded Python is installed: the threads did not run there]", end="")
        return
    subprocess.run(["maturin", "build", "--quiet", "--interpreter", found, "--out", tmp_path], cwd=ROOT, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), str(ROOT)]), "PYTHON_GIL": "0"}
    result = subprocess.run([found, "-m", "tests.thread_work"], env=environment, check=True, capture_output=True, text=True)
    assert result.stdout == "done\n"
