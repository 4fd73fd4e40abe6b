"""DPDK's vhost port as the device of a driver of ours: `with Vhost(path) as device`."""

import os
import time
from contextlib import suppress
from types import TracebackType
from typing import Self

import pytest

from tests.dpdk.testpmd import Testpmd

STARTS = 5
START_LIMIT = 30.0
"""Seconds that one start may take."""


class Vhost:
    """A network device at `path`, where it listens, or connects with `client`; what it does with frames is `mode`. It may be killed."""

    def __init__(self, path: str, *, mode: str = "macswap", client: bool = False) -> None:
        self._path, self._mode, self._client = path, mode, client
        self._testpmd: Testpmd | None = None
        self.start()

    def start(self) -> None:
        """Starts it, again after `kill`; it forwards when this returns."""
        if not self._client:
            with suppress(FileNotFoundError):
                os.unlink(self._path)  # which a killed one left, and the next does not replace
        for _ in range(STARTS):
            if self._starts():
                return
        pytest.fail(f"testpmd did not start, {STARTS} times")

    def _starts(self) -> bool:
        """Whether it does: one to which a driver connects while it starts has been seen to hang, or to die."""
        device = f"net_vhost0,iface={self._path},queues=1,client={int(self._client)}"
        # What is there already when forwarding starts is not to be thrown away.
        self._testpmd = Testpmd(device, mode=self._mode, pump=lambda: time.sleep(0.01), options="--no-flush-rx")
        limit = time.monotonic() + START_LIMIT
        while "testpmd> " not in self._testpmd.output:
            if self._testpmd.process.poll() is not None or time.monotonic() > limit:
                self.kill()
                return False
            time.sleep(0.02)
        self._testpmd.ready().start()
        return True

    def received(self) -> int:
        """Frames that it has received."""
        assert self._testpmd is not None
        return self._testpmd.received()

    def kill(self) -> None:
        """Ends it at once."""
        testpmd, self._testpmd = self._testpmd, None
        if testpmd is not None:
            testpmd.__exit__(None, None, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.kill()
