"""How an interface goes with its device: pumps begin when the port is live, and let go before a queue is taken off."""

from __future__ import annotations

import logging
import os
import select
from collections.abc import Callable, Collection
from contextlib import suppress
from typing import Any, Final, Protocol, runtime_checkable

from virtio._core import EventFd
from virtio.errors import SpecViolation, StatusError, TransportError, VirtioError
from virtio.netdev.running import Life
from virtio.netdev.tap import announce

PAUSE: Final = 0.5
"""Seconds without queues that do not show at the carrier: a transport moves them."""

_log = logging.getLogger("virtio.netdev")


@runtime_checkable
class Watched(Protocol):
    """A port that tells before its queues are taken off: `NetDevice`, and whatever has these."""

    def watch_port(self, call: Callable[[Collection[int]], object]) -> None:
        """As `NetDevice.watch_port`."""

    def unwatch_port(self, call: Callable[[Collection[int]], object]) -> None:
        """As `NetDevice.unwatch_port`."""


class Follower:
    """Begins and halts the pumps of one interface. Its thread tells of errors: it alone waits for the device while it does so."""

    def __init__(self, interface: Any, report: Callable[[Exception], object] | None) -> None:
        """TypeError: the interface's port tells nobody when its queues go."""
        if not isinstance(interface.port, Watched):
            raise TypeError(f"{type(interface.port).__name__} is no device's end of a network device: start its interface when it is live")
        self._port: Watched = interface.port
        self._interface = interface
        self._report = report
        self._look = EventFd()
        self._over = False
        self._met: list[BaseException] = []
        """What ended pumps, and is to be told. It changes with the interface locked."""

    def hook(self) -> None:
        """Hears of the port from now on."""
        if getattr(self._port, "on_rarp", self) is None:  # somebody's own goes first
            self._port.on_rarp = self._announce  # type: ignore[attr-defined]
        self._port.watch_port(self._told)
        if self._over:  # stopped meanwhile
            self.unhook()

    def unhook(self) -> None:
        """No more."""
        with self._interface._lock:
            self._over = True
        self._port.unwatch_port(self._told)
        if getattr(self._port, "on_rarp", None) == self._announce:
            self._port.on_rarp = None  # type: ignore[attr-defined]

    def _announce(self, mac: bytes) -> None:
        """By the transport: a machine with this address has moved here, and does not say so itself."""
        interface = self._interface
        if os.getpid() != interface._process:
            return
        with interface._lock:
            if self._over or interface._life is None:
                return
            try:
                announce(interface._taps[0], mac)
            except OSError as error:
                self._tell(TransportError(f"the network is not told of {mac.hex(':')}: {error.strerror}"))

    def _told(self, pairs: Collection[int]) -> None:
        """By the port, in the thread that changes the device, with the device locked. Pumps of pairs that stay as they are go on."""
        interface = self._interface
        if os.getpid() != interface._process:  # a forked child: pumps are its parent's
            return
        with interface._lock:
            life = interface._life
            if self._over or not pairs:
                interface._halt()
            else:
                try:
                    interface._begin(pairs)
                except BaseException as error:
                    self._give_up(error)
            self._gather(life)
            self._look.signal()

    def _gather(self, life: Life | None) -> None:
        """With the interface locked: keeps the errors of what was ended in this life, or with it."""
        if life is not None:
            self._met += life.take_late()
            if self._interface._life is not life:
                self._met += life.errors

    def watch(self, stop: EventFd) -> None:
        """Until `stop` is signalled: tells of errors, pulls the cable after a while without a port, and notices that the TAP is gone."""
        interface = self._interface
        tap = interface._taps[0]
        try:
            while True:
                life = interface._life
                idle = life is None and interface._plugged
                failures = [] if life is None else life.failures  # held, so that they stay open
                sleep_on = select.poll()
                for descriptor in (stop.fileno(), self._look.fileno(), *(event.fileno() for event in failures)):
                    sleep_on.register(descriptor, select.POLLIN)
                if life is None and not self._over:  # its end wakes who waits for this kind of data, of which there is none
                    sleep_on.register(tap, select.POLLRDBAND)
                ready = {descriptor for descriptor, _ in sleep_on.poll(PAUSE * 1000 if idle else None)}
                if stop.fileno() in ready:
                    return
                self._look.drain()
                if tap in ready:
                    self._give_up(TransportError("the TAP is gone"))
                elif life is not None or self._met:
                    self._settle()
                elif not ready:
                    with interface._lock:
                        if interface._life is None:
                            interface._unplug()
        except BaseException as error:  # what `report` raises, too
            self._give_up(error)
        finally:
            self._look.close()

    def _settle(self) -> None:
        """Halts what has ended in part, and tells why. Whoever changes the device meanwhile, or while that is told, leaves it here too."""
        interface = self._interface
        with interface._lock:
            life = interface._life
            if life is not None and life.errors:
                interface._halt()
            self._gather(life)
            errors, self._met = self._met, []
        for error in errors:
            if not isinstance(error, SpecViolation | StatusError | OSError):  # OSError: of a notification
                self._give_up(error)
                return
            self._tell(error)
        if errors:
            with suppress(VirtioError):
                interface._end.failed()

    def _tell(self, error: Exception) -> None:
        if self._report is not None:
            self._report(error)
        else:
            _log.warning("%s", error)

    def _give_up(self, error: BaseException) -> None:
        interface = self._interface
        with interface._lock:
            if self._over:
                return
            self._over = True
            interface._error = error
            interface._halt()
            interface._unplug()
            interface._ended.signal()
