"""Network devices whose frames go somewhere in this process: nowhere, into a capture, or to the device of another machine."""

import time
from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import Any, Final, Self

from virtio import BufferPool, Burst, DeviceQueue, Memory
from virtio.cli.capture import Capture
from virtio.devices.net import NetDevice
from virtio.devices.net_pairs import HANDLER_BURST, HANDLER_ROUNDS
from virtio.errors import VirtioError
from virtio.netdev import SLOT_SIZE

SLOTS: Final = 256
"""Of `SLOT_SIZE` each, for a queue pair of two machines: a burst of each, and as many to fill."""
MISTAKES: Final = (VirtioError, OSError)
"""What a machine's queues raise, OSError if it cannot be told of something."""
PATIENCE: Final = 2.0
"""Seconds that a machine's frames wait for the other to have room for any of them."""


class Sink(NetDevice):
    """Counts frames, writes them into a capture if there is one, and drops them."""

    def __init__(self, capture: Capture | None = None, **options: Any) -> None:
        super().__init__(**options)
        self._capture = capture

    def on_frames(self, burst: Burst) -> None:
        """They are looked at, and that is all."""
        if self._capture is not None:
            self._capture.write(burst, self.pool)


class _Lane:
    """What one queue pair of a machine sent, on its way to the other machine."""

    def __init__(self, patch: "Patch", number: int) -> None:
        self._patch, self._pair = patch, patch.pair(number)
        self._held: Burst = patch.pool.burst(HANDLER_BURST)
        self._since = 0.0

    @property
    def holds(self) -> bool:
        """Whether frames wait for room."""
        return self._held.count > 0

    def serve(self, queue: DeviceQueue) -> None:
        """Passes on what is there, as far as there is room."""
        held, patch = self._held, self._patch
        for _ in range(HANDLER_ROUNDS):
            before = held.count
            if not before:
                if not (before := self._pair.receive(held)):
                    return
                patch.capture_all(held)
                self._since = time.monotonic()
            if not patch.pass_on(held):
                self.drop()
            if held.count:
                if held.count < before:
                    self._since = time.monotonic()
                return

    def go_on(self) -> None:
        """Outside its handler; `poll` then asks for notifications again."""
        index = self._pair.indexes[1]
        queue, doorbell = self._patch.queue(index), self._patch.doorbell(index)
        if queue is not None and doorbell is not None:
            try:
                self.serve(queue)
            except MISTAKES as error:  # in the other machine's handler
                self._patch.report(error)
            doorbell.signal()
        elif not self._patch.pass_on(self._held):
            self.drop()

    def look(self) -> None:
        """Tries again, or gives up."""
        if time.monotonic() - self._since > PATIENCE:
            self.drop()
        self.go_on()

    def drop(self) -> None:
        """They go nowhere."""
        self._patch.dropped += int((self._held.more[: self._held.count] == 0).sum())
        self._patch.pool.give(self._held)


class Patch(NetDevice):
    """One end of a cable between two machines. A frame waits with its sender until the other machine has room, for a while; without another
    machine it is dropped."""

    def __init__(self, capture: Capture | None, report: Callable[[Exception], object], **options: Any) -> None:
        super().__init__(**options)
        self._capture, self.report = capture, report
        self._lanes = [_Lane(self, number) for number in range(self.queue_pairs)]
        self._other: Patch | None = None
        self._live = False
        self.dropped = 0
        """Frames of this machine that the other had no room for."""
        self.watch_port(self._ported)

    @classmethod
    def pair_of(
        cls,
        capture: Capture | None,
        reports: Iterable[Callable[[Exception], object]],
        *,
        macs: tuple[bytes | None, bytes | None],
        queue_pairs: int,
        **options: Any,
    ) -> tuple[Self, Self]:
        """Both ends, with one pool for their frames. Each tells of its own machine's mistakes."""
        slots = SLOTS * queue_pairs
        pool = BufferPool(Memory(slots * SLOT_SIZE + (1 << 12)), slots, slot_size=SLOT_SIZE)
        one, other = (
            cls(capture, report, pool=pool, mac=mac, queue_pairs=queue_pairs, **options) for report, mac in zip(reports, macs, strict=True)
        )
        one._other, other._other = other, one
        return one, other

    @property
    def holds(self) -> bool:
        """Whether frames of this machine wait for room."""
        return any(lane.holds for lane in self._lanes)

    def look(self) -> None:
        """Tries again: not all room is told of. To be called now and then while it `holds` some."""
        for lane in self._lanes:
            if lane.holds:
                lane.look()

    def handler(self, index: int) -> Callable[[DeviceQueue], None]:
        """As `Device.handler`: what is sent goes on, and who waits for room looks again."""
        if index // 2 >= self.queue_pairs:
            return super().handler(index)
        return partial(self._sent, index // 2) if index % 2 else self._filled

    def serves(self, index: int) -> bool:
        """All of them."""
        return True

    def capture_all(self, burst: Burst) -> None:
        """Into the capture, if there is one."""
        if self._capture is not None:
            self._capture.write(burst, self.pool)

    def pass_on(self, burst: Burst) -> bool:
        """To the other machine, as much as there is room for; false if that cannot be at all."""
        return self._other is not None and self._other._take(burst)

    def _take(self, burst: Burst) -> bool:
        if not self._live:
            return False
        try:
            self.send(burst)
            if burst.count and self._room():
                self.send(burst)
        except MISTAKES as error:  # this machine's, not that of who sends
            self.report(error)
            return False
        return self._live

    def _room(self) -> bool:
        """Asks to be told of buffers; whether there are some already."""
        queues = [self.queue(2 * number) for number in range(self.queue_pairs)]
        return sum(queue.arm() for queue in queues if queue is not None and queue.broken is None) > 0

    def _sent(self, number: int, queue: DeviceQueue) -> None:
        self._lanes[number].serve(queue)

    def _filled(self, queue: DeviceQueue) -> None:
        self._wake_other()

    def _ported(self, pairs: Collection[int]) -> None:
        self._live = bool(pairs)
        self._wake_other()

    def _wake_other(self) -> None:
        if self._other is not None:
            for lane in self._other._lanes:
                if lane.holds:
                    lane.go_on()
