"""What this process has open, and what a test may not leave of it."""

import gc
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def descriptors() -> set[str]:
    """Numbers and what they stand for; those that only garbage held, of this test or of another, are closed."""
    gc.collect()
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the folder itself
            found.add(f"{entry.name} {os.readlink(entry)}")
    return found


@contextmanager
def all_closed() -> Iterator[None]:
    """No descriptor and no thread is left of what is done meanwhile. What another test left may end."""
    files, threads = descriptors(), set(threading.enumerate())
    yield
    assert descriptors() <= files, "descriptors are left"
    assert set(threading.enumerate()) <= threads, "a thread is left"
