"""A user's class under `virtio serve`: what it raises is told with its place, and ends no more than it has to."""

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from virtio.cli.output import DEVELOPER, CommandError, words
from virtio.cli.signals import Interrupted
from virtio.device import check_device
from virtio.errors import VirtioError

if TYPE_CHECKING:
    from virtio import Device

PACKAGE: Final = str(Path(__file__).resolve().parents[1])


class EndsProgramError(CommandError):
    """The class asked for the end of the program, of which it is a part only."""


def made_by(make: "Callable[[], Device]") -> "Device":
    """A device; SystemExit and KeyboardInterrupt of its handlers are `EndsProgramError`, as they are here.

    TypeError: its constructor does not call the base class's.
    """
    device: Device = guarded(make)()
    check_device(device)
    device.__class__ = _guarding(type(device))  # not functions in the device, which would keep it alive
    return device


def _guarding(kind: "type[Device]") -> "type[Device]":
    def handler(self: "Device", index: int) -> Any:
        return guarded(kind.handler(self, index))

    def config_written(self: "Device", offset: int, data: bytes) -> None:
        guarded(kind.config_written)(self, offset, data)

    def was_reset(self: "Device") -> None:
        guarded(kind.was_reset)(self)

    def hook(name: str) -> Callable[["Device", Any], None]:
        return lambda self, value: guarded(getattr(kind, name))(self, value)

    hooks = {name: hook(name) for name in ("on_rarp", "on_mtu") if callable(getattr(kind, name, None))}
    return type(kind.__name__, (kind,), {each.__name__: each for each in (handler, config_written, was_reset)} | hooks)


def guarded(call: Callable[..., Any]) -> Callable[..., Any]:
    """`call`, whose SystemExit and KeyboardInterrupt are `EndsProgramError`, and what else is no `Exception`. A signal is none of them."""

    def guard(*values: Any) -> Any:
        try:
            return call(*values)
        except (Exception, Interrupted):
            raise
        except BaseException as error:
            code = f" ({error})" if str(error) else ""
            raise EndsProgramError(f"{type(error).__name__}{code}: a device does not end the program") from error

    return guard


def told(error: Exception) -> str:
    """The line for it: of what a user's code raised also the type and the place. A traceback before it, if `DEVELOPER` is set."""
    if os.environ.get(DEVELOPER):
        traceback.print_exception(error, file=sys.stderr)
    text = words(error)
    cause = error.__cause__ if isinstance(error, EndsProgramError) else error
    frames = [
        each for each in traceback.extract_tb(cause.__traceback__ if cause else None) if not each.filename.startswith(PACKAGE + os.sep)
    ]
    if not frames:
        return text
    last = [each for each in frames if each.filename == frames[0].filename][-1]  # not what the user's file calls
    if not isinstance(error, VirtioError | CommandError):
        text = type(error).__name__ + (f": {error}" if str(error) else "")
    return f"{text} ({os.path.basename(last.filename)}:{last.lineno}, {last.name})"
