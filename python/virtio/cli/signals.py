"""Ctrl-C, and the other polite ways to end the command: an exception, once. Little is imported here: until then a signal is Python's."""

import os
import signal
import sys
from types import FrameType, TracebackType
from typing import Final

SIGNALS: Final = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated", signal.SIGHUP: "hung up"}


class Interrupted(BaseException):
    """A signal asks the command to end. The first one is the last: whoever cleans up is not disturbed."""

    seen: "Interrupted | None" = None
    """The one that was raised. What raises it may run where exceptions get lost, so loops that wait look here too."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number

    def __str__(self) -> str:
        return SIGNALS[signal.Signals(self.number)]


def _ignore() -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _raise(number: int, frame: FrameType | None) -> None:
    _ignore()
    Interrupted.seen = Interrupted(number)
    raise Interrupted.seen


class Caught:
    """A context in which `SIGNALS` are `Interrupted`, but for those that are ignored already (nohup, background jobs).

    Once one came, nothing but that goes out of the context, whatever became of its exception inside. At the end all are ignored: what is
    left is to say how it ended.
    """

    def __enter__(self) -> None:
        Interrupted.seen = None
        self._hook = sys.unraisablehook
        sys.unraisablehook = self._unraisable
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, _raise)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        _ignore()
        sys.unraisablehook = self._hook
        if Interrupted.seen is not error:
            check()

    def _unraisable(self, lost: "sys.UnraisableHookArgs") -> None:
        if not isinstance(lost.exc_value, Interrupted):  # that one is not lost: see `check`
            self._hook(lost)


def check() -> None:
    """Interrupted: a signal came, even if its exception got lost."""
    if Interrupted.seen is not None:
        raise Interrupted.seen


class Quiet:
    """A context for the last words: who does not read them gets no others instead, neither now nor when the interpreter ends."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        try:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            broken = isinstance(error, OSError | ValueError)
        except (OSError, ValueError):
            broken = True
        if broken:
            for stream in (sys.stdout, sys.stderr):
                try:
                    null = os.open(os.devnull, os.O_WRONLY)
                    os.dup2(null, stream.fileno())
                    os.close(null)
                except (OSError, ValueError):
                    continue
        return isinstance(error, OSError | ValueError)
