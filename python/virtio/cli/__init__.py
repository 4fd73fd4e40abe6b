"""The `virtio` command, a file a subcommand. Nothing else of the package imports click or rich.

Exit codes: 0 done; 1 it could not be done, or was interrupted; 2 the command line is wrong. What went wrong is one line on standard error.
"""

from collections.abc import Sequence

from virtio.cli.signals import Caught, Interrupted, Quiet


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command with `arguments`, by default the process's own; returns the exit code. Signals that end it are handled inside."""
    from sys import stderr

    try:
        with Caught():
            from virtio.cli.app import run

            return run(arguments)
    except Interrupted as signal:
        with Quiet():
            print(f"virtio: {signal}", file=stderr, flush=True)
        return 1
