"""How `virtio serve` shows what happens: a table that moves on a terminal, else a line of JSON for each event."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any, Protocol

from rich.console import Console
from rich.live import Live
from rich.table import Table

from virtio.cli.output import Output, aside, console, one_line


class View(Protocol):
    """Takes events."""

    def showing(self) -> Any:
        """A context in which they are shown."""

    def emit(self, kind: str, /, **values: Any) -> None:
        """One of them."""


class Lines:
    """JSON, a line an event: its `event`, and its values. Events may come from any thread."""

    def __init__(self, descriptor: int) -> None:
        self._out = Output(descriptor, "w", closefd=False)
        self._lock = Lock()

    @contextmanager
    def showing(self) -> Iterator[None]:
        """Nothing moves."""
        yield

    def emit(self, kind: str, /, **values: Any) -> None:
        """Written at once."""
        with self._lock:
            self._out.write_all(json.dumps({"event": kind, **values}).encode() + b"\n")


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
