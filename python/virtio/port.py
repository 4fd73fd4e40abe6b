"""What moves frames: the protocol that both ends of a network device keep, so that forwarding is two lines.

    a, b = NetDriver(one, pool=pool), NetDriver(other, pool=pool)
    burst = pool.burst(64)
    while a.wait():
        a.receive(burst)
        b.send(burst)

Frames are Ethernet frames without their checksum. A slot's frame begins after its headroom, and the header that was negotiated ends there.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from virtio._core import BufferPool, Burst, DevicePort, DeviceQueue, DriverPort, DriverQueue

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

ASYNC_BURST = 64
"""Rows of the bursts that asynchronous iteration gives."""


@runtime_checkable
class Port(Protocol):
    """One end of a network device: driver's or device's."""

    @property
    def pool(self) -> BufferPool:
        """Whose slots the bursts name."""

    @property
    def features(self) -> Any:
        """What was negotiated, or what is offered: `Features`."""

    @property
    def header_size(self) -> int:
        """Bytes of the header before each frame (5.1.6)."""

    @property
    def headers(self) -> NDArray[np.void]:
        """A structured view of the header before each slot's frame: shape (slots,)."""

    @property
    def statistics(self) -> dict[str, Any]:
        """Frames and bytes each way, drops by reason, notifications."""

    @property
    def link(self) -> bool:
        """Whether the link is up."""

    def link_events(self) -> list[bool]:
        """What the link became since this was last asked, oldest first."""

    def take(self, burst: Burst) -> int:
        """Takes completed slots back, and fills `burst` with free ones whose headers are zero; returns how many."""

    def send(self, burst: Burst) -> int:
        """Sends the burst's packets; returns how many. What did not fit stays in front; what cannot be sent at all is dropped."""

    def receive(self, burst: Burst) -> int:
        """Gives the burst's old slots back, and fills it with packets; returns how many."""

    def send_frames(self, frames: Iterable[bytes]) -> int:
        """Copies and sends frames; returns how many are done with, from the first on: a full queue is a count."""

    def receive_frames(self, limit: int = 64) -> list[bytes]:
        """Copies of received frames, at most `limit`."""

    def arm(self) -> bool:
        """Asks to be notified of frames; true if there is something to look at already."""

    def wait(self, timeout: float | None = None, *, room: bool = False) -> bool:
        """Sleeps until there may be frames, or with `room` also until there may be room to send, or the link changed.

        False: `timeout` seconds have passed.
        """

    def fileno(self) -> int:
        """One descriptor for a selector: readable when `wait` would not sleep, if `arm` was called before."""

    def __aiter__(self) -> AsyncIterator[Burst]:
        """Bursts of received packets, each valid until the next is asked for. One task at a time.

        StatusError: a driver, or its transport, was closed meanwhile. A device waits for the next driver.
        """


class Descriptor(Protocol):
    """What has a descriptor."""

    def fileno(self) -> int:
        """The descriptor."""


class AsyncBursts:
    """Asynchronous iteration over whatever else is a `Port`."""

    def __aiter__(self) -> AsyncIterator[Burst]:
        return self._bursts()

    async def _bursts(self: Any) -> AsyncIterator[Burst]:
        import asyncio

        burst = self.pool.burst(ASYNC_BURST)
        while True:
            if self.receive(burst):
                yield burst
                await asyncio.sleep(0)  # whoever else has something to do
            elif self.arm():
                self._check_whole()
                await asyncio.sleep(0)
            else:
                self._alternate()
                if not self.arm():
                    await readable(self._sleeps_on())
                self.wait(0)  # takes the notification, and looks at the link and at NEEDS_RESET

    def _sleeps_on(self: Any) -> Descriptor:
        """What is readable when `fileno` is, and stays open until nobody has it any more, though this is closed."""
        end: Descriptor = self
        return end

    def _alternate(self) -> None:
        """Runs the other end if it lives in this thread."""


async def readable(source: Descriptor) -> None:
    """Returns once the descriptor of `source` is readable. One task at a time for each."""
    import asyncio

    loop, descriptor = asyncio.get_running_loop(), source.fileno()
    event = asyncio.Event()
    loop.add_reader(descriptor, event.set)
    try:
        await event.wait()
    finally:
        loop.remove_reader(descriptor)


def add_statistics(total: dict[str, Any], counters: dict[str, Any]) -> dict[str, Any]:
    """`total` and `counters` together: numbers by name, drops by reason one level below."""
    found = dict(total)
    for name, value in counters.items():
        found[name] = add_statistics(found.get(name, {}), value) if isinstance(value, dict) else found.get(name, 0) + value
    return found


def counted(port: DriverPort | DevicePort | None) -> dict[str, Any]:
    """A port's counters, with its queues' notifications."""
    if port is None:
        return {}
    return {**port.counters, **add_statistics(notifications(port.receiveq), notifications(port.transmitq))}


def notifications(queue: DriverQueue | DeviceQueue) -> dict[str, Any]:
    """A queue's counts of notifications, under their names in a port's counters."""
    counters = queue.counters
    return {name: counters[name] for name in ("notified", "suppressed")}
