"""Any thread may use anything: nothing is lost or doubled, and nobody waits with the GIL in hand."""

import contextlib
import os
import shutil
import subprocess
import sysconfig
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import thread_work
from tests.pair import SLOT_SIZE, Pair
from virtio import Memory
from virtio._core import BufferPool, DeviceQueue, DriverQueue, _hold

ROOT = Path(__file__).parents[1]


@pytest.fixture
def format_bit(ring_format: str) -> int:
    return thread_work.PACKED if ring_format == "packed" else 0


def test_eight_threads_share_a_queue_of_tokens(format_bit: int) -> None:
    thread_work.tokens(format_bit)


def test_eight_threads_share_a_queue_of_bursts(format_bit: int) -> None:
    thread_work.bursts(format_bit)


def test_a_pool_that_closes_while_others_begin_to_use_it() -> None:
    thread_work.closes()


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


@pytest.mark.parametrize("call", ["write", "header", "scatter"])
def test_columns_that_change_meanwhile_lead_nowhere_else(call: str) -> None:
    """numpy computes without the GIL: what a call checked is what it does, whatever another thread puts into the columns."""
    rows = 128
    pool = BufferPool(Memory(1 << 20), 3 * rows, slot_size=SLOT_SIZE)
    low, burst, high = pool.burst(rows), pool.burst(rows), pool.burst(rows)
    for one in (low, burst, high):
        pool.take(one)
    beside = [pool.offset + int(slot) * SLOT_SIZE for one in (low, high) for slot in one.slots]
    for at in beside:
        pool.memory.write(at, b"." * SLOT_SIZE)
    edge = int(burst.slots.argmax() if call == "write" else burst.slots.argmin())
    data = {"write": b"x" * SLOT_SIZE, "header": b"x" * 64, "scatter": b"x" * 64 * rows}[call]
    done = threading.Event()

    def spoil(column: np.ndarray[Any, Any], values: tuple[int, int]) -> None:
        cell = np.lib.stride_tricks.as_strided(column[edge : edge + 1], shape=(1 << 18, 2), strides=(0, 0), writeable=True)
        while not done.is_set():
            np.copyto(cell, values)

    spoilers = [threading.Thread(target=spoil, args=(burst.offsets, (0, SLOT_SIZE - 1)))]
    if call == "scatter":
        spoilers.append(threading.Thread(target=spoil, args=(burst.more, (0, 1))))
    for thread in spoilers:
        thread.start()
    try:
        for _ in range(1000):
            time.sleep(0)  # lets numpy start again
            burst.offsets[:] = 0 if call == "write" else 64
            burst.lengths[:] = 1
            with contextlib.suppress(ValueError):
                getattr(burst, call)(data)
    finally:
        done.set()
        for thread in spoilers:
            thread.join()
    assert all(pool.memory.read(at, SLOT_SIZE) == b"." * SLOT_SIZE for at in beside)
