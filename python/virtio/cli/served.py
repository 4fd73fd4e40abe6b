"""What `virtio serve` serves, as its command line is carried out: sockets, with their devices and what is at the far ends."""

import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from virtio.cli.output import CommandError
from virtio.cli.own import told
from virtio.cli.serve_views import View
from virtio.spec import Feature

if TYPE_CHECKING:
    from virtio import Device
    from virtio.cli.serving import End
    from virtio.cli.switch import Patch
    from virtio.vhost_user.backend import Backend


class Place(NamedTuple):
    """Where front-ends are."""

    socket_path: str | None
    fd: int | None
    client: bool
    packed: bool

    @property
    def name(self) -> str:
        """As it is shown."""
        return f"descriptor {self.fd}" if self.socket_path is None else self.socket_path


class Served:
    """What is to be served, and what becomes of it, as a context: `add` sockets, then `run`. All that is on its `stack` ends with it."""

    def __init__(self, shown: View) -> None:
        from virtio.cli.serving import Serving

        self.stack, self._signals, self._view = ExitStack(), ExitStack(), shown
        self._sockets: list[Serving] = []
        self.patches: list[Patch] = []
        self.ends: list[End] = []
        self.begin: Callable[[], object] = lambda: None
        """Called once everything is there, before anybody is served."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._signals:  # what asked for the end once more does not disturb it
            self.stack.close()

    def report(self, name: str, error: Exception) -> None:
        """A front-end's mistake, or a driver's, at the socket of this name. Any thread may tell."""
        self._view.emit("error", socket=name, text=told(error))

    def add(self, where: Place, device: "Device | Callable[[], Device]", counted: Any, what: str, withheld: Any = ()) -> "Backend":
        """CommandError, TransportError: the socket cannot be had."""
        from virtio.cli.serving import Serving
        from virtio.features import Features
        from virtio.vhost_user.backend import Backend

        if where.client and where.socket_path is not None and os.path.exists(where.socket_path) and not _is_socket(where.socket_path):
            raise CommandError(f"cannot connect to {where.socket_path}: it is not a socket")
        target: str | int = where.fd if where.socket_path is None else where.socket_path  # type: ignore[assignment]
        # QEMU would offer RING_RESET to its guest, and keep from a back-end that a queue was reset.
        kept = Features(withheld) | {Feature.RING_RESET} | (set() if where.packed else {Feature.RING_PACKED})
        errors: list[Exception] = []
        backend = Backend(target, device, where.client, report=errors.append, withheld=kept)
        self.stack.enter_context(backend)
        self._sockets.append(Serving(where.name, backend, counted, what, "connecting" if where.client else "serving", errors))
        return backend

    def run(self) -> None:
        """Until a signal, or until no front-end can come any more."""
        from virtio.cli.serving import Server, stopping

        self.begin()
        asked = self._signals.enter_context(stopping())
        with self._view.showing():
            Server(self._sockets, self._view.emit, self.report, patches=self.patches, ends=self.ends).run(asked)


def _is_socket(path: str) -> bool:
    return Path(path).is_socket()
