"""What a back-end's connection is made of: its rings, and the loop that it runs in."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from virtio._core import DeviceQueue, EventFd


class Loop(Protocol):
    """What a connection needs of who runs it."""

    def watch(self, descriptor: int, call: Callable[[], object]) -> None:
        """Calls `call` when `descriptor` is readable."""

    def await_room(self, descriptor: int, *, wanted: bool) -> None:
        """Calls what watches `descriptor` when there is room to write, not when it is readable; or, not `wanted`, as before."""

    def unwatch(self, descriptor: int) -> None:
        """No more."""

    def report(self, error: Exception) -> None:
        """Tells somebody."""


@dataclass
class Ring:
    """What the front-end said of a ring, and where it is served: nowhere, on the device, or here by discarding."""

    size: int = 0
    areas: tuple[int, int, int] | None = None
    log: int | None = None
    """Where writes to the device area are logged, if that is not where it lies."""
    base: int = 0
    exact: bool = False
    """Whether that is where it was taken off on this connection."""
    kick: EventFd | None = None
    call: EventFd | None = None
    error: EventFd | None = None
    polled: bool = False
    started: bool = False
    fresh: bool = False
    """Whether it was given a kick since the device needs a reset."""
    enabled: bool = False
    on: bool = False
    discarding: DeviceQueue | None = None
    watched: int | None = None
