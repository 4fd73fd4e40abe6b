"""DPDK's testpmd as a program to talk to: `with Testpmd("net_virtio_user0,path=...", mode="txonly") as testpmd`. No huge pages, no PCI."""

import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from itertools import count
from types import TracebackType
from typing import Self

import pytest

LIMIT = 60.0
"""Seconds for what comes at once."""
_NUMBERS = count()


class Testpmd:
    """On one core of its own, in forward mode `mode`. While something of it is waited for, `pump` is called over and over."""

    __test__ = False

    def __init__(self, device: str, *, mode: str, pump: Callable[[], object], queues: int = 1, options: str = "") -> None:
        if (program := shutil.which("dpdk-testpmd")) is None:
            pytest.fail("DPDK is not installed: run scripts/dpdk.sh, or `make dpdk-tools`")
        prefix = f"test-{os.getpid()}-{next(_NUMBERS)}"
        core = max(os.sched_getaffinity(0))
        own = ["--no-huge", "--no-pci", "--no-telemetry", "-m", "512", "--lcores", f"0@{core},1@{core}", f"--file-prefix={prefix}"]
        port = ["-i", "--no-mlockall", "--total-num-mbufs=8192", f"--forward-mode={mode}", f"--rxq={queues}", f"--txq={queues}"]
        self._pump = pump
        self._output = tempfile.TemporaryFile("w+b")  # noqa: SIM115
        self._seen = 0
        self.process = subprocess.Popen(
            ["stdbuf", "-oL", program, *own, f"--vdev={device}", "--", *port, *options.split()],
            stdin=subprocess.PIPE,
            stdout=self._output,
            stderr=subprocess.STDOUT,
        )

    def ready(self) -> Self:
        """Once it takes commands."""
        self.wait("testpmd> ")
        return self

    def say(self, command: str) -> None:
        """A command."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{command}\n".encode())
        self.process.stdin.flush()

    def wait(self, pattern: str) -> re.Match[str]:
        """Until it has printed this, behind what was waited for before."""
        limit = time.monotonic() + LIMIT
        while (found := re.compile(pattern).search(self.output, self._seen)) is None:
            assert self.process.poll() is None and time.monotonic() < limit, f"testpmd said no {pattern!r}:\n{self.output[-2000:]}"
            self._pump()
        self._seen = found.end()
        return found

    def start(self, first: int = 0) -> None:
        """Begins to forward; with `first`, by sending so many bursts of 32 frames."""
        self.say(f"start tx_first {first}" if first else "start")
        self.wait("testpmd> ")

    def stop(self) -> tuple[int, int]:
        """Ends forwarding; how many frames it has received and sent since it began."""
        self.say("stop")
        found = self.wait(r"Accumulated forward statistics[^\n]*\n\s*RX-packets: (\d+)[^\n]*\n\s*TX-packets: (\d+)")
        self.wait("testpmd> ")
        return int(found[1]), int(found[2])

    def received(self) -> int:
        """How many frames it has received, by the counters of its port."""
        self.say("show port stats 0")
        found = self.wait(r"RX-packets: (\d+)")
        self.wait("testpmd> ")
        return int(found[1])

    @property
    def output(self) -> str:
        """All that it printed so far."""
        descriptor = self._output.fileno()
        return os.pread(descriptor, os.fstat(descriptor).st_size, 0).decode(errors="replace")

    def kill(self) -> None:
        """At once, as a crash does."""
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.kill()
        assert self.process.stdin is not None
        self.process.stdin.close()
        self._output.close()
