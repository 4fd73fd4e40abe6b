"""A connection's in-flight area: made here or passed by the front-end, a region for each queue.

What the area says is read and written by the queues themselves (`DeviceQueue`); here is only where each has its region.
"""

from typing import Final, Self

from virtio._core import Memory
from virtio.errors import MalformedMessage
from virtio.vhost_user.inflight import Split, region_size
from virtio.vhost_user.message import Inflight

_SECTION: Final = "Inflight I/O tracking"


class InflightArea:
    """The area in `memory`, laid out for `packed` rings or for split ones."""

    def __init__(self, memory: Memory, described: Inflight) -> None:
        self._memory, self._described = memory, described
        self._written: dict[int, int] = {}

    @classmethod
    def make(cls, wanted: Inflight, *, packed: bool | None) -> Self:
        """A new one, as large as `wanted` says; for either format if it is not known yet."""
        size = region_size(wanted.queue_size, packed is not False) * max(1, wanted.queues)
        return cls(Memory(size, name="inflight"), Inflight(size, 0, wanted.queues, wanted.queue_size))

    @classmethod
    def passed(cls, described: Inflight, descriptor: int) -> Self:
        """One that the front-end kept. MalformedMessage: it is not aligned. ValueError, OSError: it cannot be mapped."""
        if described.offset % 8:
            raise MalformedMessage(f"an in-flight area at offset {described.offset} is not aligned to 8 bytes", _SECTION)
        return cls(Memory.from_fd(descriptor, described.size, offset=described.offset), described)

    @property
    def answer(self) -> tuple[Inflight, int]:
        """What the front-end is told of it."""
        return self._described, self._memory.fileno()

    def region(self, index: int, size: int, *, packed: bool) -> tuple[Memory, int] | None:
        """Where queue `index` has its region; None: the area is for fewer queues. MalformedMessage: the ring does not fit."""
        if index >= self._described.queues:
            return None
        if size > self._described.queue_size:
            raise MalformedMessage(f"vring {index} of {size} entries, the in-flight area is for {self._described.queue_size}", _SECTION)
        stride = region_size(self._described.queue_size, packed)
        if stride * (index + 1) > self._described.size:
            raise MalformedMessage(f"an in-flight area of {self._described.size} bytes has no {stride} bytes for vring {index}", _SECTION)
        self._written[index] = stride * index
        return self._memory, stride * index

    def forget(self, index: int) -> None:
        """A ring begins anew: its region, if this connection used it, is as if nobody had initialized it."""
        if (offset := self._written.pop(index, None)) is not None:
            self._memory.store(offset + Split.VERSION, 8, 0)  # with what is beside it: the queue writes this word as a whole

    def forget_all(self) -> None:
        """After a reset nothing is in flight, and positions begin anew."""
        for index in list(self._written):
            self.forget(index)

    def close(self) -> None:
        """Unmaps it. BufferError: a queue uses it."""
        self._memory.close()
