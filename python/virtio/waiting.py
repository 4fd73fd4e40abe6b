"""Sleeping on eventfds: how long, and how whoever sleeps learns that what it sleeps on is closed."""

import select
from collections.abc import Iterable
from math import ceil
from typing import Final

from virtio import arguments
from virtio._core import EventFd
from virtio.errors import StatusError

LONGEST_SLEEP: Final = 2_000_000.0
"""Seconds that one call sleeps at most: what `poll` can count."""


def milliseconds(timeout: float | None) -> int | None:
    """What `poll` takes for `timeout` seconds; None is for ever. One that has passed is 0. TypeError, ValueError: no number, or NaN."""
    return None if timeout is None else ceil(min(arguments.seconds("timeout", timeout), LONGEST_SLEEP) * 1000)


def sleep_on(events: Iterable[EventFd], time: int | None, *, over: EventFd | None = None) -> list[EventFd]:
    """Sleeps until one of `events` is signalled, or for `time` milliseconds; those that were are drained.

    StatusError: one of them is closed, or `over` was signalled, which it stays.
    """
    known = {event.fileno(): event for event in events}
    poll = select.poll()
    for descriptor in known:
        poll.register(descriptor, select.POLLIN)
    end = -1
    if over is not None:
        poll.register(end := over.fileno(), select.POLLIN)
    found = [descriptor for descriptor, _ in poll.poll(time)]
    if end in found:
        raise StatusError("closed while somebody waited")
    ready = [known[descriptor] for descriptor in found]
    for event in ready:
        event.drain()
    return ready


class Watch:
    """One descriptor for selectors over eventfds, and over `over`, whose signal wakes everybody and for ever.

    Whoever sleeps holds this, so that no descriptor in it is closed, and its number somebody else's, before the last one is awake.
    """

    def __init__(self, events: Iterable[EventFd], *, over: EventFd | None = None) -> None:
        self.over: Final = EventFd() if over is None else over
        self._epoll = select.epoll()
        for event in (self.over, *events):
            self.add(event)

    def add(self, event: EventFd) -> None:
        """From now on this too. StatusError: it is closed. OSError: it is there already."""
        self._epoll.register(event.fileno(), select.EPOLLIN)

    def remove(self, event: EventFd) -> None:
        """No more. StatusError, OSError: it is closed, or not there."""
        self._epoll.unregister(event.fileno())

    def fileno(self) -> int:
        """Readable when one of them is signalled."""
        return self._epoll.fileno()
