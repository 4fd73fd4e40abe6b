"""The command as a process of its own, and what it must not leave behind."""

import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from time import monotonic, sleep
from typing import Any

MARK = "VIRTIO_TEST_MARK"
LIMIT = 180


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "virtio", *words]


def environment(**more: str) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "VIRTIO_TRACEBACK")}
    return {**clean, "TERM": "xterm", **more}


def run(*words: str, before: Sequence[str] = (), **more: str) -> subprocess.CompletedProcess[str]:
    """Runs the command to its end. `before`: a command that runs it; `more`: environment variables."""
    return subprocess.run(
        [*before, *command(*words)], capture_output=True, text=True, timeout=LIMIT, env=environment(**more), stdin=subprocess.DEVNULL
    )


@contextmanager
def started(words: Sequence[str], **options: Any) -> Iterator["subprocess.Popen[Any]"]:
    """A process beside the test. At the end it is none any more, by force if need be: so a test that fails tells why, and nothing else."""
    with subprocess.Popen(words, **options) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def beside(*words: str, **more: str) -> AbstractContextManager["subprocess.Popen[str]"]:
    """The command beside the test, its output and errors in pipes. `more`: environment variables."""
    return started(command(*words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(**more))


def failed(done: subprocess.CompletedProcess[str], code: int) -> str:
    """The one line of a failure."""
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    assert done.stderr.startswith("virtio: ") and done.stderr.count("\n") == 1 and done.stderr.endswith("\n"), done.stderr
    return done.stderr.strip()


def marked(mark: str) -> list[str]:
    """Running processes that have the mark in their environment: those that a marked one started have it too."""
    found = []
    needle = f"{MARK}={mark}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if needle in (folder / "environ").read_bytes().split(b"\0"):
                found.append(f"{folder.name} {(folder / 'cmdline').read_bytes()!r}")
        except OSError:
            continue
    return found


def _interfaces() -> set[str]:
    return {line.split(":")[0].strip() for line in Path("/proc/net/dev").read_text().splitlines() if ":" in line}


def _kept_namespaces() -> list[str]:
    """Namespaces with a name, and file systems that a guest has its files in."""
    return [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if " nsfs " in line or " - tmpfs virtio " in line]


@contextmanager
def nothing_left(folder: Path) -> Iterator[dict[str, str]]:
    """Gives environment variables for commands; at the end no process, interface, named namespace or temporary file of theirs is there."""
    mark = uuid.uuid4().hex
    temporary = folder / f"tmp-{mark}"
    temporary.mkdir(mode=0o1777)
    interfaces, namespaces = _interfaces(), _kept_namespaces()
    yield {MARK: mark, "TMPDIR": str(temporary)}
    deadline = monotonic() + 60

    def left() -> list[str]:
        return [*marked(mark), *((_interfaces() - interfaces) & {"vn0", "peer0"})]

    while left() and monotonic() < deadline:  # the kernel ends them, in a while
        sleep(0.02)
    assert not left()
    assert not list(temporary.iterdir())
    assert _kept_namespaces() == namespaces


def until_it_listens(process: "subprocess.Popen[str]") -> None:
    """Returns once the command looks after signals: before that, Python is starting, and they are Python's."""
    deadline = monotonic() + LIMIT
    while monotonic() < deadline:
        status = Path(f"/proc/{process.pid}/status").read_text()
        caught = int(next(line for line in status.splitlines() if line.startswith("SigCgt:")).split()[1], 16)
        if caught >> signal.SIGTERM - 1 & 1:
            return
        sleep(0.005)
    raise AssertionError("the command does not come up")
