"""Part of a test in a process that sees no /proc. It alone tells kinds of descriptors, so a socket may be taken for an eventfd there."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]


def without_proc(part: Callable[[], None]) -> None:
    """Calls this function of a module there."""
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from {part.__module__} import {part.__name__} as part; part()"
    hidden = ["unshare", "-Urm", "sh", "-c", 'mount -t tmpfs none /proc && exec "$@"', "sh"]
    done = subprocess.run([*hidden, sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
