"""Frames as a capture that tcpdump reads: the classic file format, with times in nanoseconds."""

import os
import stat
import struct
import time
from types import TracebackType
from typing import Final, Self

from virtio import BufferPool, Burst, EventFd
from virtio.cli.output import CommandError
from virtio.locks import lock

MAGIC: Final = 0xA1B2_3C4D
"""Times are in nanoseconds."""
LONGEST: Final = 1 << 18
"""Bytes of a frame that are kept."""
ETHERNET: Final = 1
_FILE: Final = struct.Struct("=IHHiIII")
_FRAME: Final = struct.Struct("=IIII")


class Capture:
    """Writes whole frames into a file, each burst at once."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Opens the file, or makes it. What is in it stays until `begin`. CommandError: that cannot be, or another writes it."""
        self._path = os.fspath(path)
        self._error: CommandError | None = None
        self._failed = EventFd()
        try:
            self._file = open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666), "wb", buffering=0)  # noqa: SIM115  # see `close`
        except (OSError, ValueError) as error:  # ValueError: a NUL in the name
            raise CommandError(f"cannot write {self._path}: {error.strerror if isinstance(error, OSError) else error}") from None
        if self._regular and not lock(self._file):  # another would write into it
            self._file.close()
            raise CommandError(f"cannot write {self._path}: it is in use")
        self.frames = 0

    def begin(self) -> None:
        """Replaces what is in the file by a capture without frames. CommandError: the file does not take it."""
        if self._regular:
            self._file.truncate(0)
        self._write(_FILE.pack(MAGIC, 2, 4, 0, 0, LONGEST, ETHERNET))

    @property
    def _regular(self) -> bool:
        return stat.S_ISREG(os.fstat(self._file.fileno()).st_mode)

    def fileno(self) -> int:
        """Readable when the file took no more."""
        return self._failed.fileno()

    def check(self) -> None:
        """CommandError: the file took no more."""
        if self._error is not None:
            raise self._error

    def write(self, burst: Burst, pool: BufferPool) -> None:
        """The packets of a burst, as they lie in the pool's slots. CommandError: the file does not take them, nor others then."""
        self.check()
        seconds, nanoseconds = divmod(time.time_ns(), 10**9)
        count, frames = burst.count, pool.frames
        columns = (burst.slots, burst.lengths, burst.offsets, burst.more)
        rows = zip(*(column[:count].tolist() for column in columns), strict=True)
        found: list[bytes] = []
        pieces: list[bytes] = []
        for slot, length, offset, more in rows:
            begin = offset - BufferPool.HEADROOM
            pieces.append(frames[slot, begin : begin + length].tobytes())
            if not more:
                data = b"".join(pieces)
                pieces.clear()
                kept = data[:LONGEST]
                found += (_FRAME.pack(seconds, nanoseconds, len(kept), len(data)), kept)
                self.frames += 1
        self._write(b"".join(found))

    def _write(self, data: bytes) -> None:
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[self._file.write(rest) or 0 :]
        except OSError as error:
            self._error = CommandError(f"cannot write {self._path}: {error.strerror}")
            self._failed.signal()
            raise self._error from None

    def close(self) -> None:
        """Again does nothing."""
        self._file.close()
        self._failed.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
