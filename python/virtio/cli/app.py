"""The command line: the group of subcommands, and what becomes of their errors."""

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Final

import click

from virtio.cli.completion import completion
from virtio.cli.demo import demo
from virtio.cli.output import DEVELOPER, explain, fail, tell_of_errors
from virtio.cli.probe import probe
from virtio.cli.serve import serve
from virtio.cli.signals import Quiet, check

NAME: Final = "virtio"


def _show_version(context: click.Context, option: click.Parameter, wanted: bool) -> None:
    if wanted and not context.resilient_parsing:
        from virtio import __version__

        click.echo(f"{NAME} {__version__}")
        context.exit()


@click.group(name=NAME, context_settings={"help_option_names": ["-h", "--help"]}, invoke_without_command=True)
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_show_version, help="Show the version and exit.")
@click.pass_context
def cli(context: click.Context) -> None:
    """Virtio devices: what they are, one at work, and some for virtual machines."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


for subcommand in (probe, demo, serve, completion):
    cli.add_command(subcommand)


def run(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    tell_of_errors()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # no text of a device's is worth an exception
    try:
        code = cli.main(args=None if arguments is None else list(arguments), prog_name=NAME, standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except SystemExit as end:  # of click's shell completion
        return end.code if isinstance(end.code, int) else 1
    except BrokenPipeError:
        with Quiet():
            raise  # whoever read has seen enough
        return 1
    except Exception as error:
        check()  # whose consequence it may be
        if os.environ.get(DEVELOPER):
            traceback.print_exc()
        code, text = explain(error)
        with Quiet():
            fail(text)
        return code
