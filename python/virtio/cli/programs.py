"""ping and iperf3, run where the driver is, with their figures read from what they print; and programs of this machine in general."""

import os
import re
import select
import shlex
import signal
import subprocess
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from time import monotonic, sleep
from types import TracebackType
from typing import Any, Final, Protocol, Self

from virtio.cli.guest import Guest
from virtio.cli.output import CommandError
from virtio.cli.worker import Emit
from virtio.netdev.namespace import Namespace

DRIVER: Final = ("vn0", "192.168.90.1")
PEER: Final = ("peer0", "192.168.90.2")
PINGS: Final = 6
PING_SECONDS: Final = 20
GRACE: Final = 20.0
"""Seconds that a program may take longer than it was told to."""
LOOK: Final = 0.1
"""Seconds after which it is looked whether there is sense in going on."""
LONGEST_LINE: Final = 1 << 16
"""Bytes after which a line is cut."""
_RATE = re.compile(r"([\d.]+) ([KMGT]?)bits/sec.*\b(sender|receiver)\s*$")
_PING = re.compile(r"(\d+) packets transmitted, (\d+) received")
_RTT = re.compile(r"= ([\d.]+)/([\d.]+)/([\d.]+)")
_SCALE: Final = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_SIGNALLED: Final = 128
"""What a shell adds to the number of the signal that ended a program."""

Show = Callable[[str], object]


class Place(Protocol):
    """Where programs run."""

    def run(self, words: Sequence[str], limit: float, show: Show) -> tuple[int, list[str]]:
        """Exit status, or less than 0 the signal that ended it, and lines, each shown as it comes. CommandError: no end within `limit`."""


class Here:
    """A network namespace of this machine; None: the caller's.

    `check` is called again and again, and raises when there is no sense in going on.
    """

    def __init__(self, namespace: Namespace | None, check: Callable[[], object]) -> None:
        self._namespace, self._check = namespace, check

    def run(self, words: Sequence[str], limit: float, show: Show) -> tuple[int, list[str]]:
        """As of `Place`."""
        deadline = monotonic() + limit
        with self.start(words) as program:
            lines = self.lines(program, deadline, show)
            return program.status(deadline), lines

    def start(self, words: Sequence[str]) -> "Program":
        """Starts a program, for `lines`."""
        with nullcontext() if self._namespace is None else self._namespace.entered():
            return Program(words)

    def lines(self, program: "Program", deadline: float, show: Show, until: str | None = None) -> list[str]:
        """Lines up to the end of output, or to one with `until`. CommandError: that takes until after the deadline."""
        lines: list[str] = []
        while (line := program.line(deadline, self._check)) is not None:
            lines.append(line)
            show(line)
            if until is not None and until in line:
                break
        return lines


class InGuest:
    """A guest, whose shell knows the programs."""

    def __init__(self, guest: Guest) -> None:
        self._guest = guest

    def run(self, words: Sequence[str], limit: float, show: Show) -> tuple[int, list[str]]:
        """As of `Place`."""
        status, lines = self._guest.run(shlex.join(words), limit=limit, show=show)
        if status:
            self._guest.read("true")  # a guest that is dying takes its programs along: that is what is told then
        return (_SIGNALLED - status if status - _SIGNALLED in signal.valid_signals() else status), lines


class Programs:
    """Runs real programs at `near`, against the peer at `far`, and tells what they print, line by line."""

    def __init__(self, emit: Emit, near: Place, far: Here) -> None:
        self._emit, self._near, self._far = emit, near, far

    def ping(self) -> dict[str, Any]:
        """Pings the peer; what came back, and after how many milliseconds."""
        words = ["ping", "-n", "-c", str(PINGS), "-i", "0.2", "-w", str(PING_SECONDS), PEER[1]]
        lines = self.run(words, "ping", seconds=1.2, limit=PING_SECONDS, may_fail=True)
        text = "\n".join(lines)
        if (found := _PING.search(text)) is None:
            raise CommandError(f"ping failed: {lines[-1] if lines else 'it said nothing'}")
        if not int(found[2]):
            raise CommandError(f"none of {found[1]} pings was answered")
        times = _RTT.search(text)
        names = ("min_ms", "avg_ms", "max_ms")
        return {
            "sent": int(found[1]),
            "received": int(found[2]),
            **{name: float(times[place]) if times else None for place, name in enumerate(names, 1)},
        }

    def iperf3(self, seconds: int) -> list[dict[str, Any]]:
        """One TCP stream each way; bits per second that arrived."""
        found = []
        with ExitStack() as stack:
            server = stack.enter_context(self._far.start(["iperf3", "-s", "--forceflush"]))
            for direction, words in ((f"{DRIVER[0]} to {PEER[0]}", []), (f"{PEER[0]} to {DRIVER[0]}", ["-R"])):
                self._await(server, "Server listening")
                command = ["iperf3", "-c", PEER[1], "-t", str(seconds), "--connect-timeout", "5000", "--forceflush", *words]
                lines = self.run(command, f"iperf3, {direction}", seconds=seconds, limit=seconds)
                rates = {match[3]: float(match[1]) * _SCALE[match[2]] for line in lines if (match := _RATE.search(line))}
                if "receiver" not in rates:
                    raise CommandError(f"iperf3 told no rate from {direction}: {lines[-1] if lines else 'it said nothing'}")
                found.append({"direction": direction, "bits_per_second": rates["receiver"]})
        return found

    def run(self, words: Sequence[str], title: str, *, seconds: float, limit: float, may_fail: bool = False) -> list[str]:
        """Runs a program that takes about `seconds`; its lines. CommandError: it failed, or took longer than `limit` and `GRACE`."""
        self._emit("step", title=title, seconds=seconds, command=shlex.join(words))
        status, lines = self._near.run(words, limit + GRACE, lambda line: self._emit("output", text=line))
        if status < 0 or (status and not may_fail):
            said = next((line for line in reversed(lines) if line), "it said nothing")
            how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"failed: {said}"
            raise CommandError(f"{words[0]} {how}")
        return lines

    def _await(self, program: "Program", word: str) -> None:
        lines = self._far.lines(program, monotonic() + GRACE, lambda line: None, until=word)
        if not lines or word not in lines[-1]:
            raise CommandError(f"iperf3's server did not start: {' '.join(lines)}")


class Program:
    """A program at work, as a context at whose end it has ended."""

    def __init__(self, words: Sequence[str]) -> None:
        """OSError: there is none."""
        self._name = words[0]
        self._began = monotonic()
        self._rest = b""
        self._process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, "LC_ALL": "C"}, bufsize=0
        )

    def line(self, deadline: float, check: Callable[[], object]) -> str | None:
        """Its next line, however that ends; None: it prints no more. CommandError: none comes before the deadline."""
        assert self._process.stdout is not None
        watch = select.poll()
        watch.register(self._process.stdout, select.POLLIN)
        while b"\n" not in self._rest and len(self._rest) < LONGEST_LINE:
            check()
            self._look_at(deadline)
            if not watch.poll(LOOK * 1000):
                continue
            data = os.read(self._process.stdout.fileno(), 1 << 16)
            if not data:
                break
            self._rest += data
        else:
            end = self._rest.find(b"\n", 0, LONGEST_LINE) + 1 or LONGEST_LINE
            line, self._rest = self._rest[:end], self._rest[end:]
            return line.decode(errors="replace").rstrip()
        line, self._rest = self._rest, b""
        return line.decode(errors="replace").rstrip() if line else None

    def status(self, deadline: float) -> int:
        """How it ended. CommandError: it did not before the deadline."""
        while (status := self._process.poll()) is None:
            self._look_at(deadline)
            sleep(LOOK / 10)
        return status

    def _look_at(self, deadline: float) -> None:
        if (now := monotonic()) >= deadline:
            raise CommandError(f"no end of {self._name} after {now - self._began:.0f} s")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
