"""What the command shows: rich on a terminal, plain text in a pipe or file."""

import json
import sys
from typing import Any, Final

import click
from rich.console import Console

from virtio.errors import VirtioError

DEVELOPER: Final = "VIRTIO_TRACEBACK"
"""Environment variable: if set, tracebacks are shown before the one line."""

PLAIN_WIDTH: Final = 140
"""Columns of what goes to no terminal, unless COLUMNS says otherwise."""


class CommandError(Exception):
    """What the user asked for cannot be done; the message is the one line that says why."""


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


def explain(error: Exception) -> tuple[int, str]:
    """Exit code and line for what went wrong."""
    match error:
        case click.UsageError():
            where = error.ctx.command_path if error.ctx is not None else "virtio"
            return 2, f"{error.format_message()} ({where} --help tells more)"
        case click.ClickException():
            return 1, error.format_message()
        case CommandError() | VirtioError() | OSError():
            return 1, str(error) or type(error).__name__
        case MemoryError():
            return 1, "no memory is left"
        case RuntimeError() if "can't start new thread" in str(error):
            return 1, "no thread can be had: the limit of processes or of memory is reached"
    return 1, f"internal error, {type(error).__name__}: {error} ({DEVELOPER}=1 shows where)"
