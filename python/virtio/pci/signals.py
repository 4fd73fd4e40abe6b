"""Where interrupts of an emulated function go: MSI-X vectors, their pending bits, or the ISR and the interrupt pin (4.1.4.5, 4.1.5.1.2).

Queues signal eventfds, and which one is changed under them: a vector's own, one that only remembers while the vector is masked, or one that
stands for a bit of the ISR. So a device that runs in another thread, or in Rust, needs nobody here to deliver what it has to say.
"""

import select
from collections.abc import Callable, Sequence
from contextlib import suppress
from threading import Thread
from typing import Final

from virtio._core import EventFd
from virtio.device import Device
from virtio.errors import StatusError, TransportError
from virtio.pci.config import CONFIG, ISR_CONFIG, ISR_QUEUE, NO_VECTOR

FRUITLESS_CALLS: Final = 1000
"""Calls of a handler in a row that leave the line high, after which nobody is asked any more."""


class Signals:
    """Sources (queues and the configuration), the vectors they are mapped to, and what these signal."""

    def __init__(self, device: Device, vectors: int, *, pin: bool) -> None:
        """StatusError: the device is on a transport already."""
        self._config_route = EventFd()
        device.connect(self._config_route)
        self._device = device
        self._isr = {ISR_QUEUE: EventFd(), ISR_CONFIG: self._config_route}
        self._pin = pin
        self._targets = [EventFd() for _ in range(vectors)]
        self._remembered = [EventFd() for _ in range(vectors)]
        self._mapped: dict[int, int] = {}
        self._msix = False
        self._masked = [True] * vectors
        self._pin_enabled = False
        self._handler: Thread | None = None
        self._change = EventFd()
        self._stopping = False

    @property
    def vectors(self) -> int:
        """How many vectors the table has."""
        return len(self._targets)

    @property
    def pending(self) -> int:
        """The pending bits, as one number."""
        return sum(1 << vector for vector, event in enumerate(self._remembered) if event.wait(0))

    @property
    def line(self) -> bool:
        """Whether a bit of the ISR is set, which is Interrupt Status in configuration space."""
        return any(event.wait(0) for event in self._isr.values())

    @property
    def started(self) -> bool:
        """Whether a handler for the pin is there."""
        return self._handler is not None

    def target(self, vector: int) -> EventFd:
        """What a vector signals."""
        return self._targets[vector]

    def vector(self, source: int) -> int:
        """The vector of a source, or `NO_VECTOR`."""
        return self._mapped.get(source, NO_VECTOR)

    def map(self, source: int, vector: int) -> None:
        """Maps a source, or unmaps it: with any number that is not a vector's."""
        self._mapped.pop(source, None)
        if 0 <= vector < self.vectors:
            self._mapped[source] = vector
        self._connect(source)

    def reset(self) -> None:
        """What a device reset does: all sources are unmapped, the ISR is 0. Vectors stay masked or not, and pending is forgotten."""
        self._mapped.clear()
        for event in (*self._isr.values(), *self._remembered):
            event.drain()
        self._connect(CONFIG)

    def take_isr(self) -> int:
        """Reads the ISR, which clears it and lowers the line (4.1.4.5.1)."""
        return sum(bit for bit, event in self._isr.items() if event.drain())

    def update(self, *, msix: bool, masked: Sequence[bool], pin_enabled: bool) -> None:
        """Takes over what the registers say."""
        if msix != self._msix or list(masked) != self._masked:
            self._msix, self._masked = msix, list(masked)
            for source in (CONFIG, *range(len(self._device.queues))):
                self._connect(source)
            for vector, event in enumerate(self._remembered):  # after the sources are connected, so that nothing stays behind
                if msix and not self._masked[vector] and event.drain():
                    self._targets[vector].signal()
        if pin_enabled != self._pin_enabled:
            self._pin_enabled = pin_enabled
            self._change.signal()

    def route(self, source: int) -> EventFd | None:
        """What a source is to signal now."""
        if not self._msix:
            return self._isr[ISR_CONFIG if source == CONFIG else ISR_QUEUE]
        vector = self._mapped.get(source)
        if vector is None:
            return None
        return (self._remembered if self._masked[vector] else self._targets)[vector]

    def start(self, handler: Callable[[], None]) -> None:
        """Calls `handler` while the line is high, in a thread. TransportError: there is no pin."""
        if not self._pin:
            raise TransportError("the function has no interrupt pin")
        self._stopping = False
        self._handler = Thread(target=self._run, args=(handler,), name="virtio-pci-intx", daemon=True)
        self._handler.start()

    def stop(self) -> None:
        """Ends the handler's thread."""
        handler, self._handler = self._handler, None
        if handler is not None:
            self._stopping = True
            self._change.signal()
            handler.join()

    def close(self) -> None:
        """Closes all eventfds."""
        for event in (*self._isr.values(), *self._targets, *self._remembered, self._change):
            event.close()

    def _connect(self, source: int) -> None:
        route = self.route(source)
        if source != CONFIG:
            if (queue := self._device.queue(source)) is not None:
                with suppress(StatusError):  # closed by a reset in another thread
                    queue.connect(route)
            return
        before = self._said()
        self._device.connect(None)
        self._device.connect(route)
        if route is not None and self._said() != before:  # it was said in between, to nobody
            route.signal()

    def _said(self) -> tuple[int, int]:
        return self._device.config_generation, int(self._device.status)

    def _run(self, handler: Callable[[], None]) -> None:
        wake, lines = select.poll(), select.poll()
        for poll in (wake, lines):
            poll.register(self._change.fileno(), select.POLLIN)
        for event in self._isr.values():
            lines.register(event.fileno(), select.POLLIN)
        fruitless = 0
        while not self._stopping and fruitless < FRUITLESS_CALLS:
            (lines if self._pin_enabled else wake).poll()
            if self._change.drain() or not self._pin_enabled:
                continue
            handler()
            fruitless = fruitless + 1 if self.line else 0
