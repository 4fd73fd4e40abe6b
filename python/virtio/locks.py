"""A lock on a file or folder that is open, among processes. It leaves nothing behind."""

import fcntl
from typing import IO


def lock(opened: int | IO[bytes]) -> bool:
    """Whether it is this caller's alone from now until it is closed. Nobody waits; where a file system has no locks, it is anybody's."""
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True
