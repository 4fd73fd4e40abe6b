"""A port as a kernel interface (`vn0`): a TAP whose frames, headers included, go straight between the kernel and the ring's buffers.

    with NetDriver(transport, slot_size=SLOT_SIZE, slots=128) as net, Netdev(net, "vn0", address="192.0.2.1/24") as vn0:
        vn0.start()
        vn0.wait()  # until something ends it, and raises that

Either end of a network device will do; both ends of one device, in this process, are best run together (`Netdev.pair`). Checksums and
segmentation pass through as far as they were negotiated: frames are then as long as 64 KiB, which is fastest in slots that hold one each
(`SLOT_SIZE`), and few enough of these for a cache.

A device that a transport of its own serves, over vhost-user say, is followed rather than started:

    with Netdev(device, "tap0", address="192.0.2.2/24") as tap0, Backend("/run/net.sock", device) as backend:
        tap0.follow()
        backend.serve()

The loops run in Rust, in threads of their own, without the GIL; when nothing moves they sleep. While an interface is started, the port's
queues are its own: no `send`, `receive`, `wait` or `poll` beside it. Before `restart` or `close` of a port, stop its interface; one
that follows its port sees to that itself.

    DriverEnd, DeviceEnd            what a port has to have
    Namespace, unshare_as_user      network namespaces held by descriptors (`virtio.netdev.namespace`)
    open_tap                        just a TAP, without a port
    TapPermissionError, NameTakenError, NamespaceError, TapError    OSErrors whose text is one line for the user
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from threading import Lock
from typing import Any, Final
from weakref import WeakMethod, WeakValueDictionary

from virtio import arguments
from virtio.errors import StatusError
from virtio.netdev import tap
from virtio.netdev.ends import SLOT_SIZE, DeviceEnd, DriverEnd, Lane, Pumps, end_of
from virtio.netdev.follower import Follower
from virtio.netdev.namespace import Namespace, NamespaceError, copied, unshare_as_user
from virtio.netdev.running import Running
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


class Netdev(Running):
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
        existing: bool = False,
    ) -> None:
        """Makes the interface; `start` brings it up.

        `namespace` is where it is to be: a descriptor of a network namespace, or the calling thread's. `mac` is a driver's own if not
        given, and on a device's side a random one: the interface there is not the device, but what the device is plugged into. `mtu` is the
        port's if not given. `address` is an address with its prefix length, "192.0.2.1/24", or several, of which one may be of IPv4.
        With `existing` a persistent TAP of that name is taken as it is, if there is one, and outlives this; its MTU stays if none is given.

        It has as many queues as the port has queue pairs, 256 at most, and two threads run for each that is in use.

        TypeError: not a port, or an argument of another type. ValueError: a name, MTU or address that cannot be. NamespaceError: no such
        namespace. TapPermissionError, NameTakenError, TapError: the interface cannot be had.
        """
        self._taps: list[int] = []
        self._detached: set[int] = set()
        self._namespace = -1
        self._end = end_of(port)
        self.port: Final = port
        self.name: Final = tap.check_name(name)
        addresses = tap.each(address)
        self.mtu = self._end.mtu(mtu)
        mac = self._end.mac if mac is None else arguments.mac("mac", mac)
        self._pumps: dict[Lane, Pumps] = {}
        self._totals: dict[str, Any] = {}
        self._carrier = True
        self._plugged = False
        self._carrying = Lock()
        self._owner: NetdevPair | None = None
        self._follower: Follower | None = None
        self._linked_before: Callable[[bool], None] | None = None
        self._link_hook: Callable[[bool], None] | None = None
        super().__init__(self)
        try:
            if namespace is not None:
                self._namespace = copied(namespace)
            self._interface = Interface(name, self._namespace if namespace is not None else None)
            if existing and mtu is None:
                with suppress(OSError):  # it is not there
                    self.mtu = self._interface.mtu
            queues = min(self._end.queue_pairs, tap.MAX_QUEUES)
            self._taps = tap.open_queues(name, queues, namespace=self._namespace if namespace is not None else None, existing=existing)
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
        """Of each direction, as the port sees it, what its pumps counted: `transmit` serves the transmit queues, `receive` the others.

        Both go on over stops.
        """
        found = self._totals
        for pumps in list(self._pumps.values()):
            found = add_statistics(found, _counted(pumps))
        return dict(found)

    def start(self) -> None:
        """Plugs it in: frames move from now on, and the carrier follows the port's link.

        It takes the queue pairs that are in use then: for others stop it and start it again, or `follow`.

        StatusError: it runs, is closed or belongs to a pair, the port is not live, or another interface on it is started and not stopped
        yet. ValueError: a driver's slots are too small for what was negotiated. TapError: the interface is gone.
        """
        self._check_alone("start")
        super().start()

    def follow(self, report: Callable[[Exception], object] | None = None) -> None:
        """Keeps it plugged in whenever the port, a device's, is live, which it need not be yet, until `stop`, `close`, or the TAP is gone.

        The driver may reset the device, vanish and come again, and its transport may move queues and memory: pumps let go of a queue before
        it is taken off. Short pauses do not show at the carrier. What a driver does wrong makes the device need a reset, is told to
        `report` (or `logging`), and does not end this. Call `stop` and `close` from no handler of the device.

        TypeError: the port is no device's end. StatusError: it runs, is closed or belongs to a pair, or another interface on the port is
        started. TapError: the interface is gone.
        """
        self._check_alone("start")
        follower = Follower(self, report)
        with self._starting(), self._setting():
            self._carry(False)
            self._interface.up()
            self._follower = follower
            self._watch_with(follower.watch)
        follower.hook()

    def stop(self) -> None:
        """Pulls the cable: returns once nothing moves any more. The interface stays, and can be started again.

        StatusError: it belongs to a pair, which is stopped as one; or as `start`, from its own thread or in a forked child.
        """
        self._check_alone("stop")
        self._check_caller()
        follower, self._follower = self._follower, None
        if follower is not None:
            follower.unhook()
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
            gone = error.errno in (errno.ENODEV, errno.EBADFD, errno.EBADF)
            why = "is gone" if gone else f"cannot be set up: {error.strerror}"
            raise TapError(error.errno, f"interface {self.name} {why}") from None

    def _check_alone(self, step: str) -> None:
        if self._owner is not None:
            raise StatusError(f"{self.name} belongs to a pair: {step} that")

    def _claim(self) -> None:
        """A port's queues have one user."""
        with _claiming:
            if (other := _claims.setdefault(id(self.port), self)) is not self:
                raise StatusError(f"{self.name}: {other.name} is started on the same port: stop that first")

    def _release(self) -> None:
        with _claiming:
            if _claims.get(id(self.port)) is self:
                del _claims[id(self.port)]

    def _lanes(self, live: Collection[int] | None) -> list[Lane]:
        """What pumps are for. A pair keeps its queue of the TAP whatever others do, if there is one of its number."""
        pairs = self._end.live_pairs(live)
        own = {pair: self._taps[pair] for pair in pairs if pair < len(self._taps)}
        left = [queue for queue in self._taps if queue not in own.values()]
        return self._end.lanes(own | dict(zip((pair for pair in pairs if pair not in own), left, strict=False)), live)

    def _plug(self, lanes: Sequence[Lane]) -> None:
        """Gets ready for these, and brings the interface up."""
        used = [lane.descriptor for lane in lanes if lane.used]
        with self._setting():
            for queue in self._taps:  # no frames for pairs that are not in use
                if (queue in used) is (queue in self._detached):
                    tap.attach_queue(queue, queue in used)
                    self._detached ^= {queue}
            self._end.prepare(used[0], self.mtu)
            self._plugged = True
            self._carry(self.port.link)
            self._interface.up()

    def _pump(self, lane: Lane) -> Pumps:
        """Its pumps, made once."""
        if lane not in self._pumps:
            with self._setting():
                self._pumps[lane] = self._end.pumps(lane, self.mtu)
        return self._pumps[lane]

    def _pull(self, lane: Lane) -> None:
        """Its pumps have ended, all of them."""
        if (pumps := self._pumps.pop(lane, None)) is not None:
            self._totals = add_statistics(self._totals, _counted(pumps))
            for pump in pumps:
                if pump is not None:
                    pump.close()

    def _unplug(self) -> None:
        """The cable is pulled."""
        self._plugged = False
        self._carry(False)

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
            if up != self._carrier and self._taps:
                self._carrier = up
                tap.set_carrier(self._taps[0], up)

    def _remove(self) -> None:
        taps, self._taps = self._taps, []
        for descriptor in (*taps, self._namespace):
            if descriptor >= 0:
                os.close(descriptor)
        self._namespace = -1
        if self._link_hook is not None and self.port.on_link is self._link_hook:
            self.port.on_link = self._linked_before


def _counted(pumps: Pumps) -> dict[str, Any]:
    found = {"transmit": pumps.transmit.statistics}
    return found if pumps.receive is None else {**found, "receive": pumps.receive.statistics}


class NetdevPair(Running):
    """Two interfaces that are started, stopped and closed together: what the one sends the other receives, in one thread a direction."""

    def __init__(self, one: Netdev, other: Netdev) -> None:
        """StatusError: one of them runs, is closed, or belongs to a pair. TypeError: no interface. ValueError: one interface twice."""
        for place, member in enumerate((one, other)):
            arguments.instance(("one", "other")[place], member, Netdev, "a Netdev")
            if member._closed or member.running or member._owner is not None:
                raise StatusError(f"{member.name} is closed, runs, or belongs to a pair already")
        if one is other:
            raise ValueError(f"{one.name} is both ends of the pair")
        super().__init__(one, other)
        self._both = one, other
        one._owner = other._owner = self

    def close(self) -> None:
        """Stops both and removes both interfaces. Closing twice is closing once; what ended them is in `error`."""
        super().close()
        for member in self._both:
            member._owner = None
            member.close()

    @property
    def statistics(self) -> dict[str, Any]:
        """Those of both, by their names."""
        return {member.name: member.statistics for member in self._both}
