"""No allocation and no Python object per packet, shown by counting calls of the C allocator.

A child runs with every Python allocation going to malloc, and with a library before the C library that counts the calls. Each hot call is
made with one packet and with 256: the counts have to be equal, and are those of making no call at all.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

COUNTER = r"""
#include <stddef.h>
void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t), *__libc_realloc(void *, size_t), *__libc_memalign(size_t, size_t);
unsigned long allocator_calls;
static void count(void) { __atomic_fetch_add(&allocator_calls, 1, __ATOMIC_RELAXED); }
void *malloc(size_t n) { count(); return __libc_malloc(n); }
void *calloc(size_t m, size_t n) { count(); return __libc_calloc(m, n); }
void *realloc(void *p, size_t n) { count(); return __libc_realloc(p, n); }
void *aligned_alloc(size_t a, size_t n) { count(); return __libc_memalign(a, n); }
int posix_memalign(void **p, size_t a, size_t n) { count(); return (*p = __libc_memalign(a, n)) ? 0 : 12; }
"""

CHILD = r"""
import ctypes, json, sys
from virtio import BufferPool, DeviceQueue, DriverQueue, EventFd, GuestMemory, Memory

CALLS = ctypes.c_ulong.in_dll(ctypes.CDLL(None), "allocator_calls")
LAPS, BASE = 8, 1 << 32
features = int(sys.argv[1])

memory, guest, own = Memory(1 << 22), GuestMemory(), Memory(1 << 20)
guest.add(BASE, memory)
driver = DriverQueue(memory, 512, features=features, address=BASE)
device = DeviceQueue(guest, 512, driver.areas, features=features)
driver.connect(EventFd())
device.connect(EventFd())
near, far = BufferPool(memory, 2048, slot_size=256), BufferPool(own, 1024, slot_size=256)
counts = {}

def measure(name, count, call, *arguments):
    before = CALLS.value
    result = call(*arguments)
    after = CALLS.value
    assert result is None or result == count, (name, result)
    counts.setdefault(name, {}).setdefault(str(count), []).append(after - before)

def nothing(argument):
    pass

def planted(burst):
    for row in range(len(burst)):
        object()

for count in (1, 256):
    tx, rx, back, free = near.burst(count), far.burst(count), near.burst(count), near.burst(count)
    batch = device.batch(count)
    for lap in range(LAPS):
        measure("no call", count, nothing, tx)
        measure("take", count, near.take, tx)
        measure("planted in Python", count, planted, tx)
        measure("add_burst", count, driver.add_burst, tx)
        measure("pop_burst", count, device.pop_burst, rx)
        measure("complete_burst", count, device.complete_burst, rx)
        measure("pop_used_burst", count, driver.pop_used_burst, back)
        near.take(tx)
        driver.add_burst(tx)
        measure("pop_batch", count, device.pop_batch, batch)
        measure("complete_batch", count, device.complete_batch, batch)
        driver.pop_used_burst(back)
        near.take(free)
        measure("add_writable_burst", count, driver.add_writable_burst, free)
        far.take(rx)
        rx.lengths[:] = 60
        measure("fill_burst", count, device.fill_burst, rx)
        measure("pop_used_burst after fill_burst", count, driver.pop_used_burst, back)
        measure("give", count, near.give, back)
        near.take(tx)
        driver.add_burst(tx)
        before = CALLS.value
        chains = device.pop()
        counts.setdefault("planted in Rust: pop", {}).setdefault(str(count), []).append(CALLS.value - before)
        for chain in chains:
            device.complete(chain)
        del chains
        device.publish()
        driver.pop_used_burst(back)
        near.give(back)
        measure("driver's disarm", count, driver.disarm)
        measure("device's disarm", count, device.disarm)
print(json.dumps(counts))
"""

WARM = 2
"""Laps in which something is made once."""


Counts = dict[str, dict[str, list[int]]]


def check(name: str, counts: Counts) -> None:
    """One packet and 256 cost as many allocator calls in every lap, and as many as making no call."""
    few, many, none = (set(counts[of][count][WARM:]) for of, count in ((name, "1"), (name, "256"), ("no call", "1")))
    assert few == many == none, f"{name}: {few} calls for one packet, {many} for 256, {none} for doing nothing"


@pytest.fixture(scope="module")
def counter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The counting library."""
    folder = tmp_path_factory.mktemp("allocator")
    source, library = folder / "counter.c", folder / "counter.so"
    source.write_text(COUNTER)
    compiler = os.environ.get("CC", "cc")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-fno-builtin", "-o", library, source], check=True)
    return library


@pytest.mark.parametrize("more", [(), (29,), (35,)], ids=["plain", "event index", "in order"])
def test_hot_calls_allocate_nothing_for_one_packet_or_many(ring_format: str, more: tuple[int, ...], counter: Path) -> None:
    features = sum(1 << bit for bit in (*more, *([34] if ring_format == "packed" else [])))
    environment = {**os.environ, "PYTHONMALLOC": "malloc", "LD_PRELOAD": str(counter)}
    command = [sys.executable, "-c", CHILD, str(features)]
    counts = json.loads(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)
    assert len(counts) == 16
    for name in counts:
        if not name.startswith("planted"):
            check(name, counts)
    for name in ("planted in Python", "planted in Rust: pop"):
        with pytest.raises(AssertionError, match=name):
            check(name, counts)
