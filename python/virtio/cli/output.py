"""What the command shows: rich on a terminal, plain text in a pipe or file."""

import errno
import io
import json
import os
import re
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Any, Final

import click
from rich.console import Console

from virtio.errors import VirtioError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

DEVELOPER: Final = "VIRTIO_TRACEBACK"
"""Environment variable: if set, tracebacks are shown before the one line."""

_ERRNO: Final = re.compile(r"^\[Errno \d+\] ")
PLAIN_WIDTH: Final = 140
"""Columns of what goes to no terminal, unless COLUMNS says otherwise."""


class CommandError(Exception):
    """What the user asked for cannot be done; the message is the one line that says why."""


class OutputError(OSError):
    """Standard output takes nothing; says why in one line."""

    def __str__(self) -> str:
        return str(self.strerror)


class Output(io.FileIO):
    """Standard output, whose errors say what it is that could not be written."""

    def write(self, data: "ReadableBuffer", /) -> int | None:  # type: ignore[override]  # None: it would block
        """As of any file. OutputError; BrokenPipeError: whoever reads has seen enough."""
        try:
            return super().write(data)
        except (BrokenPipeError, BlockingIOError):
            raise
        except OSError as error:
            why = "it is closed" if error.errno == errno.EBADF else error.strerror
            raise OutputError(error.errno, f"cannot write to standard output: {why}") from None

    def write_all(self, data: bytes) -> None:
        """Nothing less."""
        rest = memoryview(data)
        while rest:
            if (written := self.write(rest)) is None:  # somebody made it non-blocking
                self._wait()
                continue
            rest = rest[written:]

    def _wait(self) -> None:
        room = select.poll()
        room.register(self.fileno(), select.POLLOUT)
        room.poll()


def tell_of_errors() -> None:
    """Makes standard output an `Output`, if it is a file at all."""
    old = sys.stdout
    if isinstance(old, io.TextIOWrapper) and isinstance(getattr(old.buffer, "raw", old.buffer), io.FileIO):
        raw = Output(old.fileno(), "w", closefd=False)
        layers: Any = raw if old.write_through else io.BufferedWriter(raw)
        sys.stdout = io.TextIOWrapper(layers, old.encoding, line_buffering=old.line_buffering, write_through=old.write_through)


@contextmanager
def aside() -> Iterator[int]:
    """A context in which what is printed goes to standard error, also by programs that are started: what is to be read by programs stays
    by itself. Gives a descriptor of standard output."""
    sys.stdout.flush()
    number = sys.stdout.fileno()
    kept = os.dup(number)
    try:
        os.dup2(sys.stderr.fileno(), number)
        with redirect_stdout(sys.stderr):
            yield kept
    finally:
        os.dup2(kept, number)
        os.close(kept)


def console() -> Console:
    """Standard output, as it is now. Colour, and anything that moves, only on a terminal; NO_COLOR and TERM=dumb are honoured."""
    made = Console(highlight=False, markup=False, emoji=False)
    if not made.is_terminal:
        made = Console(highlight=False, markup=False, emoji=False, width=PLAIN_WIDTH, force_terminal=False, color_system=None)
    return made


def show_json(value: Any) -> None:
    """One JSON document on standard output."""
    print(json.dumps(value, indent=2), flush=True)


def one_line(text: str) -> str:
    """`text` on one line, without characters that a terminal would obey."""
    return " ".join("".join(each if each.isprintable() else " " for each in text).split())


def fail(text: str) -> None:
    """The one line of a failure, on standard error."""
    print(f"virtio: {one_line(text)}", file=sys.stderr, flush=True)


def words(error: Exception) -> str:
    """What an error says, less the number of a system call's."""
    return _ERRNO.sub("", str(error)) or type(error).__name__


def explain(error: Exception) -> tuple[int, str]:
    """Exit code and line for what went wrong."""
    match error:
        case click.UsageError():
            where = error.ctx.command_path if error.ctx is not None else "virtio"
            return 2, f"{error.format_message()} ({where} --help tells more)"
        case click.ClickException():
            return 1, error.format_message()
        case CommandError() | VirtioError() | OSError():
            return 1, words(error)
        case MemoryError():
            return 1, "no memory is left"
        case RuntimeError() if "can't start new thread" in str(error):
            return 1, "no thread can be had: the limit of processes or of memory is reached"
    return 1, f"internal error, {type(error).__name__}: {error} ({DEVELOPER}=1 shows where)"
