"""Frames between ports and TAP interfaces, as bytes through Python, in one thread for all of them. It sleeps when nothing moves."""

import os
import select
from collections import deque
from collections.abc import Sequence
from threading import Thread
from typing import TYPE_CHECKING, Any, Final

from virtio.features import Features

if TYPE_CHECKING:
    from virtio.devices.net import NetDevice, NetDriver

    NetPort = NetDriver | NetDevice

CARRIED: Final = Features()
"""Offloads that come through: none, since frames travel without their headers."""
LONGEST: Final = 1 << 16
BURST: Final = 64


class _End:
    """A port and its TAP. What one side has no room for waits here, and nothing more is read for it meanwhile."""

    def __init__(self, port: "NetPort", tap: int) -> None:
        self.port, self.tap = port, tap
        self._outward: deque[bytes] = deque()
        self.drops = 0

    def step(self) -> bool:
        """Moves what is there, a burst each way; whether anything moved."""
        moved = False
        while len(self._outward) < BURST:
            try:
                self._outward.append(os.read(self.tap, LONGEST))
            except BlockingIOError:
                break
        if self._outward:
            sent = self.port.send_frames(list(self._outward))
            for _ in range(sent):
                self._outward.popleft()
            moved = sent > 0
        for frame in self.port.receive_frames(BURST):
            moved = True
            try:
                os.write(self.tap, frame)
            except OSError:  # the interface is down, or its queue full
                self.drops += 1
        return moved

    @property
    def waits_for_room(self) -> bool:
        return bool(self._outward)


class Pump(Thread):
    """Moves frames between each port and its TAP, until it is stopped."""

    def __init__(self, ends: "Sequence[tuple[NetPort, int]]") -> None:
        super().__init__(name="virtio-pump", daemon=True)
        self._ends = [_End(port, tap) for port, tap in ends]
        self._wake, self._end = os.pipe()
        self.error: BaseException | None = None

    @property
    def drops(self) -> list[int]:
        """Frames that each TAP did not take."""
        return [end.drops for end in self._ends]

    def check(self) -> None:
        """Raises what ended it."""
        if self.error is not None:
            raise self.error

    def stop(self) -> None:
        """Ends it, and waits until it has."""
        os.close(self._end)
        self.join()
        os.close(self._wake)

    def run(self) -> None:
        """The thread's own."""
        try:
            while self._sleep():
                while self._step():
                    pass
        except BaseException as error:
            self.error = error

    def _step(self) -> bool:
        moved = [end.step() for end in self._ends]
        return any(moved)

    def _sleep(self) -> bool:
        """Until something may have come; false when it is to end."""
        watch = select.poll()
        watch.register(self._wake, select.POLLIN)
        busy = False
        for end in self._ends:
            port: Any = end.port
            busy |= port.arm(room=end.waits_for_room)
            if not end.waits_for_room:
                watch.register(end.tap, select.POLLIN)
            watch.register(port.fileno(), select.POLLIN)
        ready = {descriptor for descriptor, _ in watch.poll(0 if busy else None)}
        for end in self._ends:
            if end.port.fileno() in ready:
                end.port.wait(0, room=True)
        return self._wake not in ready
