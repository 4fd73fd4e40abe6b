"""A port as a kernel interface (`vn0`): a TAP whose frames, headers included, go straight between the kernel and the ring's buffers.

    with NetDriver(transport, slot_size=SLOT_SIZE, slots=128) as net, Netdev(net, "vn0", address="192.0.2.1/24") as vn0:
        vn0.start()
        vn0.wait()  # until something ends it, and raises that

Either end of a network device will do; both ends of one device, in this process, are best run together (`Netdev.pair`). Checksums and
segmentation pass through as far as they were negotiated: frames are then as long as 64 KiB, which is fastest in slots that hold one each
(`SLOT_SIZE`), and few enough of these for a cache.

The loops run in Rust, in threads of their own, without the GIL; when nothing moves they sleep. While an interface is started, the port's
queues are its own: no `send`, `receive`, `wait` or `poll` beside it. Before `restart` or `close` of a port, stop its interface.

    DriverEnd, DeviceEnd            what a port has to have
    Namespace, unshare_as_user      network namespaces held by descriptors (`virtio.netdev.namespace`)
    open_tap                        just a TAP, without a port
    TapPermissionError, NameTakenError, NamespaceError, TapError    OSErrors whose text is one line for the user
"""

from __future__ import annotations

import os
import select
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from math import ceil
from threading import Lock, RLock, Thread, current_thread
from types import TracebackType
from typing import Any, Final, Self
from weakref import WeakMethod, WeakValueDictionary

from virtio._core import EventFd, Pump, PumpRunner
from virtio.driver import LONGEST_SLEEP
from virtio.errors import StatusError, VirtioError
from virtio.netdev import tap
from virtio.netdev.ends import SLOT_SIZE, DeviceEnd, DriverEnd, Pumps, end_of
from virtio.netdev.namespace import Namespace, NamespaceError, unshare_as_user
from virtio.netdev.tap import Interface, NameTakenError, TapError, TapPermissionError, open_tap
from virtio.port import add_statistics

__all__ = [
    "SLOT_SIZE",
    "DeviceEnd",
    "DriverEnd",
    "NameTakenError",
    "Namespace",
    "NamespaceError",
    "Netdev",
    "NetdevPair",
    "TapError",
    "TapPermissionError",
    "open_tap",
    "unshare_as_user",
]


_claiming = Lock()
_claims: WeakValueDictionary[int, Netdev] = WeakValueDictionary()
"""The interface that is started on each port, by the port's identity."""


class _Running:
    """Starts and stops the pumps of one interface or of several, with one thread for each direction and one that watches devices."""

    def __init__(self, *members: Netdev) -> None:
        self._members = members
        self._runners: list[PumpRunner] = []
        self._threads: list[Thread] = []
        self._lock = RLock()  # start, stop and close
        self._failing = Lock()
        self._error: BaseException | None = None
        self._ended = EventFd()
        self._ended.signal()
        self._closed = False
        self._process = os.getpid()
        self._stop_watching: EventFd | None = None

    @property
    def running(self) -> bool:
        """Whether it was started, and nothing has ended it since."""
        return bool(self._runners) and not self._ended.wait(0)

    @property
    def error(self) -> BaseException | None:
        """What ended it; None if nothing did. Starting it again forgets that."""
        return self._error

    def fileno(self) -> int:
        """For a selector: readable when it does not run."""
        return self._ended.fileno()

    def start(self) -> None:
        """Plugs the cables in: frames move from now on. StatusError, ValueError, TapError: as `Netdev.start`."""
        self._check_caller()
        with self._lock:
            if self._closed:
                raise StatusError("the interface is closed")
            if self.running:
                raise StatusError("the interface runs already")
            self.stop()
            groups: list[list[Pump]] = [[], []]
            try:
                for member in self._members:
                    pumps = member._plug()
                    groups[0].append(pumps.transmit)
                    groups[1].append(pumps.receive)
                # The end that writes frames to the queue goes first, so that the other finds them in the same round.
                self._runners = [PumpRunner(group) for group in groups]
            except BaseException:
                self._unplug()
                raise
            self._error = None
            self._ended.drain()
            stop = EventFd()
            self._stop_watching = stop
            threads = [Thread(target=self._run, args=(runner,), name="virtio-pump", daemon=True) for runner in self._runners]
            threads.append(Thread(target=self._watch, args=(stop,), name="virtio-link", daemon=True))
            for thread in threads:
                self._threads.append(thread)
                try:
                    thread.start()
                except BaseException:  # no more threads to be had
                    self._threads.pop()
                    self.stop()
                    raise

    def stop(self) -> None:
        """Pulls the cable: returns once nothing moves any more. The interface stays, and can be started again.

        StatusError, here as for `start` and `close`: called from a port's `on_link`, which runs in the interface's own thread. Here as for
        `start`: called in a forked child of the process that made the interface.
        """
        self._check_caller()
        with self._lock:
            for runner in self._runners:
                runner.stop()
            if self._stop_watching is not None:
                self._stop_watching.signal()
            for thread in self._threads:
                thread.join()
            if self._stop_watching is not None:
                self._stop_watching.close()
                self._stop_watching = None
            self._unplug()
            self._threads, self._runners = [], []
            if not self._closed:
                self._ended.signal()

    def close(self) -> None:
        """Stops it and removes the interface. Closing twice is closing once; what ended it is in `error`.

        A forked child lets go of its own descriptors, and no more: interface, threads and port are its parent's.
        """
        if os.getpid() != self._process:
            self._let_go()
            return
        self._check_caller()
        with self._lock:
            if not self._closed:
                self.stop()
                self._closed = True
                for member in self._members:
                    member._remove()
                self._ended.close()

    def check(self) -> None:
        """Raises what ended it: SpecViolation or StatusError of a queue, DeviceNeedsReset, TransportError (device or TAP is gone)."""
        if self._error is not None:
            raise self._error

    def wait(self, timeout: float | None = None) -> bool:
        """Sleeps until it has ended, and raises what ended it; true if it was stopped, false if `timeout` seconds have passed."""
        if self._closed:
            self.check()
            return True
        sleep_on = select.poll()
        sleep_on.register(self._ended.fileno(), select.POLLIN)
        ready = sleep_on.poll(None if timeout is None else ceil(min(max(timeout, 0.0), LONGEST_SLEEP) * 1000))
        self.check()
        return bool(ready)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _let_go(self) -> None:
        """Closes the descriptors that a forked child has. Locks and threads are the parent's: nobody here would ever free or end them."""
        if self._closed:
            return
        self._closed = True
        self._threads, self._runners = [], []
        for event in (self._stop_watching, self._ended):
            if event is not None:
                event.close()
        for member in self._members:
            for pump in member._pumps or ():
                pump.close()
            member._remove()

    def _check_caller(self) -> None:
        if os.getpid() != self._process:
            raise StatusError(f"the interface was made in process {self._process}: its forked child {os.getpid()} can only close it")
        if current_thread() in self._threads:  # it would wait for itself, or for one who waits for it
            raise StatusError("an interface is not started, stopped or closed from its own thread, where on_link is called")

    def _unplug(self) -> None:
        for member in self._members:
            member._pull()

    def _run(self, runner: PumpRunner) -> None:
        try:
            runner.run()
        except BaseException as error:
            self._fail(error)

    def _watch(self, stop: EventFd) -> None:
        """Looks at a device's status and link when its configuration changed, and stops everything when one pump has ended."""
        with self._interrupts() as interrupts:
            failed = {runner.failed.fileno() for runner in self._runners}
            sleep_on = select.poll()
            for descriptor in (stop.fileno(), *failed, *interrupts):
                sleep_on.register(descriptor, select.POLLIN)
            try:
                while stop.fileno() not in (ready := {descriptor for descriptor, _ in sleep_on.poll()}):
                    if ready & failed:
                        pumps = [pump for member in self._members for pump in member._pumps or ()]
                        raise next((pump.error for pump in pumps if pump.error is not None), StatusError("a pump has ended"))
                    for descriptor in ready:
                        event, member = interrupts[descriptor]
                        event.drain()
                        member._end.check()
            except BaseException as error:
                self._fail(error)

    @contextmanager
    def _interrupts(self) -> Iterator[dict[int, tuple[EventFd, Netdev]]]:
        """The ends' configuration interrupts, as descriptors of our own: theirs may be closed while we sleep on them."""
        found: dict[int, tuple[EventFd, Netdev]] = {}
        try:
            for member in self._members:
                if (interrupt := member._end.config_interrupt) is not None:
                    event = EventFd.from_fd(interrupt.fileno())
                    found[event.fileno()] = event, member
            yield found
        finally:
            for event, _ in found.values():
                event.close()

    def _fail(self, error: BaseException) -> None:
        with self._failing:
            if self._error is None:
                self._error = error
        for runner in self._runners:
            runner.stop()
        for member in self._members:
            with suppress(VirtioError, OSError):
                member._end.failed()
            member._carry(False)
        self._ended.signal()


class Netdev(_Running):
    """A kernel interface whose cable leads to a port: `NetDriver`, `NetDevice`, or whatever has what `DriverEnd` or `DeviceEnd` names.

    It ends with `close`, or with the process.
    """

    def __init__(
        self,
        port: DriverEnd | DeviceEnd,
        name: str = "vn0",
        *,
        namespace: int | Namespace | None = None,
        mac: bytes | None = None,
        mtu: int | None = None,
        address: str | Iterable[str] | None = None,
    ) -> None:
        """Makes the interface; `start` brings it up.

        `namespace` is where it is to be: a descriptor of a network namespace, or the calling thread's. `mac` is a driver's own if not
        given, and on a device's side a random one: the interface there is not the device, but what the device is plugged into. `mtu` is the
        port's if not given. `address` are addresses with their prefix lengths, "192.0.2.1/24".

        TypeError: not a port. ValueError: a name, MTU or address that cannot be. NamespaceError: no such namespace. TapPermissionError,
        NameTakenError, TapError: the interface cannot be had.
        """
        self._tap = -1
        self._namespace = -1
        self._end = end_of(port)
        self.port: Final = port
        self.name: Final = tap.check_name(name)
        addresses = tap.each(address)
        self.mtu: Final = self._end.mtu(mtu)
        if mac is None:
            mac = self._end.mac
        elif len(mac) != 6 or mac[0] & 1:
            raise ValueError(f"{mac.hex(':')} is not the address of one interface")
        self._pumps: Pumps | None = None
        self._totals: dict[str, Any] = {}
        self._carrier = True
        self._plugged = False
        self._carrying = Lock()
        self._owner: NetdevPair | None = None
        self._linked_before: Callable[[bool], None] | None = None
        self._link_hook: Callable[[bool], None] | None = None
        super().__init__(self)
        try:
            if namespace is not None:
                self._namespace = os.dup(namespace if isinstance(namespace, int) else namespace.fileno())
            self._interface = Interface(name, self._namespace if namespace is not None else None)
            self._tap = open_tap(name, namespace=self._namespace if namespace is not None else None)
            with self._setting():
                if mac is not None:
                    self._interface.mac = mac
                self._interface.set_mtu(self.mtu)
                self._interface.add_addresses(addresses)
            self._hook()
        except BaseException:
            self._remove()
            self._ended.close()
            self._closed = True
            raise

    @staticmethod
    def pair(one: Netdev, other: Netdev) -> NetdevPair:
        """Both ends of one device, in one process: two threads for the two of them, one for each direction."""
        return NetdevPair(one, other)

    @property
    def mac(self) -> bytes:
        """The interface's Ethernet address. TapError: it is gone."""
        with self._setting():
            return self._interface.mac

    @property
    def carrier(self) -> bool:
        """Whether the kernel sees a cable that is plugged in: frames move, and the port's link is up."""
        return self._plugged and self._carrier

    @property
    def statistics(self) -> dict[str, Any]:
        """Of each direction, as the port sees it, what its pump counted: `transmit` serves transmitq1, `receive` receiveq1.

        Both go on over stops.
        """
        return add_statistics(self._totals, self._counted())

    def start(self) -> None:
        """Plugs it in: frames move from now on, and the carrier follows the port's link.

        StatusError: it runs, is closed or belongs to a pair, the port is not live, or another interface on it is started and not stopped
        yet. ValueError: a driver's slots are too small for what was negotiated. TapError: the interface is gone.
        """
        if self._owner is not None:
            raise StatusError(f"{self.name} belongs to a pair: start that")
        super().start()

    def stop(self) -> None:
        """Pulls the cable: returns once nothing moves any more. The interface stays, and can be started again.

        StatusError: it belongs to a pair, which is stopped as one; or as `start`, from its own thread or in a forked child.
        """
        if self._owner is not None:
            raise StatusError(f"{self.name} belongs to a pair: stop that")
        super().stop()

    def close(self) -> None:
        """Stops it and removes the interface, those of its pair too. Closing twice is closing once; what ended it is in `error`."""
        if self._owner is not None:
            self._owner.close()
        super().close()

    def __del__(self) -> None:
        with suppress(AttributeError, OSError):
            self._remove()

    @contextmanager
    def _setting(self) -> Iterator[None]:
        try:
            yield
        except NamespaceError:
            raise
        except OSError as error:
            raise TapError(error.errno, f"interface {self.name} cannot be set up: {error.strerror}") from None

    def _counted(self) -> dict[str, Any]:
        pumps = self._pumps
        return {} if pumps is None else {"transmit": pumps.transmit.statistics, "receive": pumps.receive.statistics}

    def _plug(self) -> Pumps:
        """Makes the pumps, and brings the interface up."""
        with _claiming:
            if (other := _claims.setdefault(id(self.port), self)) is not self:
                raise StatusError(f"{self.name}: {other.name} is started on the same port: stop that first")
        with self._setting():
            self._pumps = self._end.pumps(self._tap, self.mtu)
            self._plugged = True
            self._carry(self.port.link)
            self._interface.up()
        return self._pumps

    def _pull(self) -> None:
        """The pumps have ended."""
        if (pumps := self._pumps) is not None:
            self._carry(False)
            self._plugged = False
            self._totals = self.statistics
            self._pumps = None
            for pump in pumps:
                pump.close()
        with _claiming:
            if _claims.get(id(self.port)) is self:
                del _claims[id(self.port)]

    def _hook(self) -> None:
        """Hears of the port's link from now on. The port does not keep the interface alive for that."""
        weak, before = WeakMethod(self._linked), self.port.on_link

        def linked(up: bool) -> None:
            if (heard := weak() or before) is not None:
                heard(up)

        self._linked_before, self._link_hook = before, linked
        self.port.on_link = linked

    def _linked(self, up: bool) -> None:
        """Called by the port: its link went up or down."""
        if self.running or (self._owner is not None and self._owner.running):
            self._carry(up)
        if self._linked_before is not None:
            self._linked_before(up)

    def _carry(self, up: bool) -> None:
        if os.getpid() != self._process:  # the cable is the parent's
            return
        with self._carrying, suppress(OSError):  # an interface that is gone is noticed by its pumps
            if up != self._carrier and self._tap >= 0:
                self._carrier = up
                tap.set_carrier(self._tap, up)

    def _remove(self) -> None:
        for descriptor in (self._tap, self._namespace):
            if descriptor >= 0:
                os.close(descriptor)
        self._tap = self._namespace = -1
        if self._link_hook is not None and self.port.on_link is self._link_hook:
            self.port.on_link = self._linked_before


class NetdevPair(_Running):
    """Two interfaces that are started, stopped and closed together: what the one sends the other receives, in one thread a direction."""

    def __init__(self, one: Netdev, other: Netdev) -> None:
        """StatusError: one of them runs, is closed, or belongs to a pair."""
        for member in (one, other):
            if member._closed or member.running or member._owner is not None:
                raise StatusError(f"{member.name} is closed, runs, or belongs to a pair already")
        super().__init__(one, other)
        one._owner = other._owner = self

    def close(self) -> None:
        """Stops both and removes both interfaces. Closing twice is closing once; what ended them is in `error`."""
        super().close()
        for member in self._members:
            member._owner = None
            member.close()

    @property
    def statistics(self) -> dict[str, Any]:
        """Those of both, by their names."""
        return {member.name: member.statistics for member in self._members}
