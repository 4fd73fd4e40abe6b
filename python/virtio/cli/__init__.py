"""The `virtio` command, a file a subcommand. Nothing else of the package imports click or rich.

Exit codes: 0 done; 1 it could not be done, or was interrupted; 2 the command line is wrong. What went wrong is one line on standard error.
"""

import os
import sys
from collections.abc import Sequence

from virtio.cli.signals import Caught, Interrupted, Quiet


def _open_what_is_closed() -> None:
    """Standard streams that were closed for us: what is opened next must not be taken for them, and output is refused as it should be."""
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_WRONLY if name == "stderr" else os.O_RDONLY)  # the lowest number that is free: this one
            os.set_inheritable(null, True)
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115


def serve_net() -> int:
    """The program `virtio-serve-net`: `virtio serve net`, for who starts back-ends without a word before the options."""
    return main(["serve", "net", *sys.argv[1:]])


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command with `arguments`, by default the process's own; returns the exit code. Signals that end it are handled inside."""
    _open_what_is_closed()
    try:
        with Caught():
            from virtio.cli.app import run

            return run(arguments)
    except Interrupted as signal:
        with Quiet():
            print(f"virtio: {signal}", file=sys.stderr, flush=True)
        return 1
