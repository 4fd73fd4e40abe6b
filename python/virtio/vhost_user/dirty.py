"""A connection's dirty log: the front-end's record of what a device writes, for live migration."""

from collections.abc import Iterable
from typing import Final

from virtio._core import GuestMemory, Memory
from virtio.vhost_user.message import LOG_PAGE, Log

MOST_PAGES: Final = 1 << 30


class DirtyLog:
    """What is written to `memory` is logged while there is a log (`place`) and the front-end wants it (`wanted`)."""

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self._log: Memory | None = None
        self.wanted = False
        """Whether writes are to be logged, and `flush` is to be called now and then. `start` follows a change."""

    def place(self, described: Log, descriptor: int) -> None:
        """The log is here from now on. ValueError, OSError: it cannot be mapped; all stays as it was."""
        made = Memory.from_fd(descriptor, described.size, offset=described.offset)
        self.flush()
        if self._log is not None:
            self._log.close()
        self._log = made
        self.start()

    def start(self) -> None:
        """Begins anew, as far as the memory reaches now; or ends."""
        if self._log is not None and self.wanted:
            end = max((start + length for start, length in self._memory.regions), default=0)
            self._memory.start_dirty_log(min(self._log.size * 8, MOST_PAGES, end // LOG_PAGE + 1))
        else:
            self._memory.stop_dirty_log()

    def flush(self, also: Iterable[tuple[int, int, int]] = ()) -> None:
        """Carries the marks of what was written over. `also`: (address, length, log address) of used rings logged elsewhere too."""
        if self._log is not None and self.wanted:
            self._memory.merge_dirty_log(self._log, also=list(also))

    def close(self) -> None:
        """Marks nothing any more; unmaps the log."""
        self._memory.stop_dirty_log()
        if self._log is not None:
            self._log.close()
