"""A machine whose back-end is another process, which may be killed and started again: its memory, rings and in-flight area stay."""

import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Self

from tests.readable import readable
from tests.vhost_user.frontend import GUEST, PROTOCOL, SIZE, USER, Frontend
from virtio import DriverQueue, Feature
from virtio.features import Features
from virtio.vhost_user import message as wire
from virtio.vhost_user.frontend_session import FrontendSession
from virtio.vhost_user.message import FrontendRequest as F
from virtio.vhost_user.message import ProtocolFeature, Region

LIMIT = 60.0


class Machine(Frontend):
    """Listens at `path`, where the back-end connects. `tracked`: it keeps an in-flight area."""

    def __init__(self, path: str, features: Features, sizes: Iterable[int], *, tracked: bool) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen()
        self._listener.settimeout(LIMIT)
        super().__init__(self._accept(), None)  # type: ignore[arg-type]
        self.socket.settimeout(LIMIT)
        self.features, self.tracked = features, tracked
        self.area: tuple[wire.Inflight, int] | None = None
        self.protocol = PROTOCOL if tracked else PROTOCOL - [ProtocolFeature.INFLIGHT_SHMFD]
        for index, size in enumerate(sizes):
            self.queue(index, size)
        self._begin()

    def _accept(self) -> socket.socket:
        connected, _ = self._listener.accept()
        connected.settimeout(LIMIT)
        self.peer = struct.unpack("iII", connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
        return connected

    def turn(self) -> None:
        """The back-end runs by itself."""

    def _begin(self) -> None:
        """As QEMU begins, anew or again: a split ring resumes at its used index, a packed one where it was once begun."""
        self.negotiate(self.features, self.protocol)
        if self.tracked and self.area is None:
            self.area = self.track(len(self.queues), max(queue.size for queue in self.queues))
        if self.area is not None:
            assert not self.refused(F.SET_INFLIGHT_FD, self.area[0], [self.area[1]])
        packed = Feature.RING_PACKED in self.features
        for queue in self.queues:
            used = self.memory.load(queue.areas[2] - GUEST + 2, 2)
            # Enabled first, as QEMU has it: what a started ring holds while it is disabled is discarded.
            assert not self.refused(F.SET_VRING_ENABLE, wire.VringState(queue.index, 1))
            self.start(queue, base=None if packed else used)

    def kill(self) -> None:
        """By SIGKILL; then waits until the next one has taken over."""
        self.end()
        self.socket = self._accept()
        self.session = FrontendSession()
        self._begin()

    def end(self) -> None:
        """By SIGKILL."""
        os.kill(self.peer, signal.SIGKILL)
        self.socket.close()

    def close(self) -> None:
        """Vanishes."""
        super().close()
        self._listener.close()
        if self.area is not None:
            os.close(self.area[1])


class Line:
    """Back-ends one after the other: as soon as one is dead, the next is there. All are forks of one process, so that this is quick."""

    def __init__(self, program: str, *arguments: str, descriptors: Iterable[int] = ()) -> None:
        command = [sys.executable, "-m", "tests.vhost_user.line", program, *arguments]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=tuple(descriptors))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()  # which it is watching
        assert self._process.wait(LIMIT) == 0


def until(done: Callable[[], bool], what: str, *events: int) -> None:
    """Waits until something is so, looking whenever one of the descriptors is readable."""
    end = time.monotonic() + LIMIT
    while not done():
        assert time.monotonic() < end, what
        readable(*events, seconds=0.05)


__all__ = ["GUEST", "SIZE", "USER", "DriverQueue", "Line", "Machine", "Region", "until"]
