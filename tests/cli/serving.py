"""`virtio serve` beside a test, and front-ends of it: by hand, over its sockets."""

import json
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from tests.cli.run import LIMIT, command, environment, started
from tests.vhost_user.frontend import Frontend
from tests.vhost_user.guest import eventually
from virtio import Feature
from virtio.features import Features
from virtio.netdev import Namespace

WAIT = 60.0
SPLIT = Features({Feature.VERSION_1})


class Remote(Frontend):
    """A front-end whose back-end is another process."""

    def __init__(self, connected: socket.socket) -> None:
        super().__init__(connected, None)  # type: ignore[arg-type]  # nothing to move on: it moves by itself
        connected.settimeout(WAIT)

    @classmethod
    def to(cls, path: Path) -> "Remote":
        """Connects to who listens."""
        connected = socket.socket(socket.AF_UNIX)
        connected.connect(str(path))
        return cls(connected)

    def turn(self) -> None:
        """The other process does that."""


class Serving:
    """The command at work: its events as they come."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process
        self.seen: list[dict[str, Any]] = []

    def event(self) -> dict[str, Any]:
        """The next one."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.process.communicate(timeout=LIMIT)
        found: dict[str, Any] = json.loads(line)
        self.seen.append(found)
        return found

    def until(self, kind: str, **values: Any) -> dict[str, Any]:
        """The next event of a kind, whose first device counted at least so much."""
        while True:
            found = self.event()
            if found["event"] == kind and all(found["devices"][0][name] >= value for name, value in values.items()):
                return found

    def end(self, number: signal.Signals = signal.SIGTERM) -> list[dict[str, Any]]:
        """Asks it to end, which it does cleanly; what it told since."""
        self.process.send_signal(number)
        return self.ended()

    def ended(self) -> list[dict[str, Any]]:
        """It has ended cleanly; what it told since, the last event last."""
        events = [self.event()]
        while events[-1]["event"] != "end":
            events.append(self.event())
        out, said = self.process.communicate(timeout=LIMIT)
        assert (self.process.returncode, out, said) == (0, "", ""), (self.process.returncode, out, said)
        return events


@contextmanager
def serving(*words: str, sockets: int = 1, namespace: Namespace | None = None, **options: Any) -> Iterator[Serving]:
    """`virtio serve` with these words, once it serves so many sockets (or connects to them), in a network namespace if one is given."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with ExitStack() as stack:
        with nullcontext() if namespace is None else namespace.entered():
            process = stack.enter_context(started(command("serve", *words), **pipes, text=True, env=environment(), **options))
        made = Serving(process)
        for _ in range(sockets):
            assert made.event()["event"] == ("connecting" if "--client" in words else "serving")
        yield made


def read(frontend: Remote, count: int) -> bytes:
    """From an entropy device whose ring is there."""
    queue, place = frontend.queues[0], frontend.room(count)
    queue.add(None, writable=[place])
    queue.publish()
    queue.arm()
    found: list[tuple[object, int]] = []

    def used() -> bool:
        found.extend(queue.pop_used())
        return bool(found)

    eventually(used)
    return frontend.look(place, found[0][1])


def with_ring(path: Path) -> Remote:
    """A front-end of who listens at `path`, with one split ring that is in use."""
    frontend = Remote.to(path)
    frontend.negotiate(SPLIT)
    frontend.start(frontend.queue(0))
    return frontend
