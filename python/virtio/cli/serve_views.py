"""How `virtio serve` shows what happens: a table that moves on a terminal, else a line of JSON for each event."""

import errno
import json
import os
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Condition, Thread
from typing import Any, Final, Protocol

from rich.console import Console
from rich.live import Live
from rich.table import Table

from virtio.cli.output import Output, OutputError, aside, console, one_line

MOST: Final = 1024
"""Events that wait for whoever reads them."""
PATIENCE: Final = 0.5
"""Seconds that the first of them is waited for."""
LAST: Final = 2.0
"""Seconds that whoever reads may take for all of them at the end."""


class View(Protocol):
    """Takes events."""

    def showing(self) -> Any:
        """A context in which they are shown."""

    def emit(self, kind: str, /, **values: Any) -> None:
        """One of them."""


class Lines:
    """JSON, a line an event: its `event`, and its values. Events may come from any thread. Who does not read them stops nobody: a thread
    writes, and `MOST` wait for it; behind those, events are lost and counted."""

    def __init__(self, descriptor: int) -> None:
        self._out = Output(os.dup(descriptor), "w")  # its own: the thread may be in a write for as long as it likes
        self._news = Condition()
        self._lines: deque[bytes] = deque()
        self._lost = 0
        self._late = self._ended = False
        self._error: Exception | None = None
        Thread(target=self._write, name="virtio-events", daemon=True).start()

    @contextmanager
    def showing(self) -> Iterator[None]:
        """Leaves once all is written. OutputError: nobody reads."""
        try:
            yield
        finally:
            with self._news:
                self._ended = True
                self._news.notify_all()
        with self._news:
            written = self._news.wait_for(self._settled, LAST)
            self._check()
        if not written:
            raise OutputError(errno.EAGAIN, "cannot write to standard output: nobody reads it")

    def emit(self, kind: str, /, **values: Any) -> None:
        """Written at once, if somebody reads. OutputError, BrokenPipeError: it, or one before it, cannot be."""
        line = _line(kind, values)
        with self._news:
            if kind == "end" and self._lost:
                self._lines.append(self._gap())
            if self._lost or (len(self._lines) >= MOST and kind != "end"):
                self._lost += 1
            else:
                self._lines.append(line)
            self._news.notify_all()
            if not self._late:
                self._late = not self._news.wait_for(self._settled, PATIENCE)
            self._check()

    def _settled(self) -> bool:
        return self._error is not None or not (self._lines or self._lost)

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _gap(self) -> bytes:
        line = _line("lost", {"events": self._lost})
        self._lost = 0
        return line

    def _write(self) -> None:
        try:
            while True:
                with self._news:
                    self._news.wait_for(lambda: self._lines or self._lost or self._ended)
                    if self._lost and not self._lines:
                        self._lines.append(self._gap())
                    if not self._lines:
                        return self._out.close()
                    line = self._lines[0]
                self._out.write_all(line)
                with self._news:
                    self._lines.popleft()
                    self._late = self._late and not self._settled()
                    self._news.notify_all()
        except OSError as error:
            with self._news:
                self._error = error
                self._news.notify_all()


def _line(kind: str, values: dict[str, Any]) -> bytes:
    return json.dumps({"event": kind, **values}).encode() + b"\n"


class Screen:
    """Lines for what happens, and below them the counters."""

    def __init__(self, out: Console) -> None:
        self._out = out
        self._live = Live(console=out, auto_refresh=False, transient=False)

    @contextmanager
    def showing(self) -> Iterator[None]:
        """The counters are there while the context lasts, and stay behind it as they were last."""
        with self._live:
            yield

    def emit(self, kind: str, /, **values: Any) -> None:
        """Shown at once."""
        match kind:
            case "serving":
                self._say(f"{values['what']} at {values['socket']}")
            case "connecting":
                self._say(f"{values['what']}, connecting to {values['socket']} whenever somebody listens there")
            case "connected" | "disconnected":
                self._say(f"{values['socket']}: {kind}, {values['connections']} connected now")
            case "error":
                self._say(f"{values['socket']}: {one_line(values['text'])}", style="red")
            case "counters" | "end":
                self._live.update(table(values["devices"]), refresh=True)

    def _say(self, text: str, style: str | None = None) -> None:
        self._out.print(text, style=style, soft_wrap=True)


def table(devices: list[dict[str, Any]]) -> Table:
    """The counters of every socket, in columns."""
    made = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    made.add_column("")
    for device in devices:
        made.add_column(f"{device['socket']} ({'live' if device['live'] else 'no driver'})", justify="right")
    names = dict.fromkeys(name for device in devices for name in device if name not in ("socket", "live"))
    for name in names:
        made.add_row(name.replace("_", " "), *(f"{device.get(name, 0):,}" for device in devices))
    return made


@contextmanager
def shown() -> Iterator[View]:
    """By where standard output goes. Lines of JSON have that for themselves: what a user's class prints goes to standard error."""
    if sys.stdout.isatty():
        yield Screen(console())
    else:
        with aside() as out:
            yield Lines(out)
