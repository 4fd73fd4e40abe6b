"""Who listens at a path: one of those that ask for it, at once or one after another."""

import fcntl
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.leftovers import all_closed
from virtio.vhost_user import socket as sockets
from virtio.vhost_user.socket import listen

ROUNDS = 100
SERVER = """
import sys
from virtio.errors import TransportError
from virtio.vhost_user.socket import listen

while path := sys.stdin.readline().strip():
    made = None
    try:
        made = listen(path)
        print("listens", flush=True)
    except TransportError as error:
        print(error, flush=True)
    sys.stdin.readline()
    if made is not None:
        made.close()
    print("closed", flush=True)
"""


def stale(path: Path) -> None:
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))


def test_of_several_processes_at_once_one_listens(tmp_path: Path) -> None:
    """On a path that a dead one left, and where there is nothing."""
    words = [sys.executable, "-c", SERVER]
    servers = [subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(3)]

    def tell(text: str) -> list[str]:
        for server in servers:
            assert server.stdin is not None
            server.stdin.write(f"{text}\n")
            server.stdin.flush()
        return [server.stdout.readline().strip() for server in servers if server.stdout is not None]

    try:
        for number in range(ROUNDS):
            path = tmp_path / f"s{number}"
            if number % 4:
                stale(path)
            assert sorted(tell(str(path))) == [f"cannot listen on {path}: it is in use"] * 2 + ["listens"]
            with socket.socket(socket.AF_UNIX) as machine:
                machine.connect(str(path))
            assert tell("close") == ["closed"] * 3
    finally:
        for server in servers:
            server.communicate("\n")


def test_a_folder_that_somebody_keeps_locked_keeps_nobody_from_listening(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_SH)
    monkeypatch.setattr(sockets, "LOCKED", 0.1)
    with all_closed():
        listen(str(tmp_path / "s")).close()
    os.close(folder)
