"""Live migration between two QEMUs, each with a back-end of its own: what our device writes is in the dirty log, and the guest goes on."""

import fcntl
import hashlib
import os
import socket
import struct
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.guest.far import NEAR, Far, device_for
from tests.guest.machines import Machine
from virtio import Feature
from virtio.cli.initrd import Kernel
from virtio.features import Features

pytestmark = pytest.mark.guest

PORT = 5000
WORD = os.urandom(32000)
"""So much that the guest's kernel keeps it, though nobody there reads it yet."""
KEEP = f"nc -l -p {PORT} -e sh -c 'until [ -e /tmp/go ]; do sleep 0.1; done; sha256sum >/tmp/sum'"
NOISE = "yes | head -c 8388608 >/tmp/noise"
BUSY = "while dd if=/tmp/noise of=/dev/null bs=8M 2>/dev/null; do :; done"
"""Writes 8 MiB that are not zero all the time: they take a second to send, so that the migration does not end by itself."""


def until(condition: Callable[[], bool], what: Callable[[], Any], seconds: float = 90.0) -> None:
    """Waits for something. AssertionError: it does not come; says `what` instead."""
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, what()
        time.sleep(0.05)


def say(far: Far, data: bytes) -> None:
    """Sends `data` to the guest; all of it has arrived when this returns."""
    with far.namespace.entered():
        wire = socket.create_connection((NEAR, PORT), timeout=60)
    with wire:
        wire.sendall(data)
        wire.shutdown(socket.SHUT_WR)

        def unacknowledged() -> int:
            return int(struct.unpack("i", fcntl.ioctl(wire, termios.TIOCOUTQ, bytes(4)))[0])

        until(lambda: not unacknowledged(), unacknowledged)


def test_a_guest_moves_with_what_it_has_received(kernel: Kernel, tmp_path: Path, ring_features: Features) -> None:
    paths = [str(tmp_path / name) for name in ("old", "new")]
    way = f"unix:{tmp_path / 'migration'}"
    card = f",mac=02:00:00:00:00:01,packed={'on' if Feature.RING_PACKED in ring_features else 'off'}"
    with (
        Far(paths[0], device_for(ring_features)) as old,
        Far(paths[1], device_for(ring_features)) as new,
        Machine(kernel, paths[0], card=card, memory="128M") as source,
        Machine(kernel, paths[1], card=card, memory="128M", options=["-incoming", way]) as target,
    ):

        def state() -> Any:
            found = source.qmp("query_migrate")
            assert found["status"] not in ("failed", "cancelled"), found
            return found

        source.boot()
        source.ping()
        source.read("word=before; ping -n -i 0.02 -W 10 -w 600 192.0.2.2 >/tmp/pings 2>&1 & sleep 0")
        source.read(f"{KEEP} & sleep 0")
        source.read(NOISE)
        source.read(f"({BUSY}) & sleep 0")
        source.qmp("migrate_set_parameters", downtime_limit=1, max_bandwidth=8 << 20)
        source.qmp("migrate", uri=way)
        until(lambda: state().get("ram", {}).get("dirty-sync-count", 0) >= 3, state)  # all pages were sent once
        assert state()["status"] == "active"
        say(old, WORD)
        source.qmp("migrate_set_parameters", downtime_limit=10000, max_bandwidth=1 << 30)
        until(lambda: bool(state()["status"] == "completed"), state)
        until(lambda: bool(target.qmp("query_status")["running"]), lambda: target.qmp("query_status"))
        assert target.read('echo "$word"') == "before"  # the same shell
        target.read("touch /tmp/go")
        until(lambda: target.run("[ -s /tmp/sum ]")[0] == 0, lambda: target.run("ps")[1])
        assert target.read("cat /tmp/sum").split()[0] == hashlib.sha256(WORD).hexdigest()
        answered = int(target.read("grep -c 'bytes from' /tmp/pings"))
        target.ping(20)
        assert int(target.read("grep -c 'bytes from' /tmp/pings")) > answered  # what began before goes on
        assert new.peer.statistics["receive"]["frames"] >= 20
        assert not old.errors and not new.errors
