"""Pumps in threads: how an interface, or several together, is started, watched and stopped."""

from __future__ import annotations

import os
import select
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from threading import RLock, Thread, current_thread
from types import TracebackType
from typing import Final, Protocol, Self

from virtio import arguments
from virtio._core import EventFd, Pump, PumpRunner
from virtio.errors import StatusError, VirtioError
from virtio.netdev.ends import End, Lane, Pumps

TOGETHER: Final = 15
"""Pairs out of use of one interface that share a thread; a runner takes 31 pumps, and there may be two interfaces."""


class Member(Protocol):
    """An interface, for what runs it."""

    _end: End
    _pumps: dict[Lane, Pumps]

    def _lanes(self, live: Collection[int] | None) -> list[Lane]:
        """What pumps are for, of these pairs only if they are given. StatusError: none is live."""

    def _plug(self, lanes: Sequence[Lane]) -> None:
        """Gets ready for these, and brings the interface up."""

    def _pump(self, lane: Lane) -> Pumps:
        """Its pumps."""

    def _pull(self, lane: Lane) -> None:
        """Its pumps have ended."""

    def _unplug(self) -> None:
        """The cable is pulled."""

    def _remove(self) -> None:
        """The interface goes."""

    def _claim(self) -> None:
        """The port's queues are this interface's. StatusError: another has them."""

    def _release(self) -> None:
        """They are nobody's."""


Key = tuple[int, str]
"""A thread: the pair's number (below 0 for pairs out of use, some together), and the direction."""
Lanes = tuple[tuple[Member, Lane], ...]


class Run:
    """One thread, and what it moves frames of."""

    def __init__(self, lanes: Lanes, pumps: list[Pump]) -> None:
        self.lanes = lanes
        self.pumps = pumps
        self.runner = PumpRunner(pumps)
        self.thread: Thread | None = None
        self._raised: BaseException | None = None

    @property
    def errors(self) -> list[BaseException]:
        """What ended pumps, or the whole thread."""
        found = [pump.error for pump in self.pumps if pump.error is not None]
        return found or ([] if self._raised is None else [self._raised])

    def run(self) -> None:
        """In its thread. `runner.failed` tells of an error."""
        try:
            self.runner.run()
        except BaseException as error:
            self._raised = error.with_traceback(None)  # which leads to this, and stays with a queue
            self.runner.failed.signal()


class Life:
    """What runs from one start to the next stop: a thread for each direction of each queue pair. Pairs come and go meanwhile."""

    def __init__(self) -> None:
        self.runs: dict[Key, Run] = {}
        self._late: list[BaseException] = []

    @property
    def threads(self) -> list[Thread]:
        """Those that have begun."""
        return [run.thread for run in list(self.runs.values()) if run.thread is not None]

    def begin(self, key: Key, run: Run) -> None:
        """Starts one more thread. RuntimeError: no more of them are to be had; call `end`."""
        self.runs[key] = run
        thread = Thread(target=run.run, name="virtio-pump", daemon=True)
        thread.start()
        run.thread = thread

    def end(self, keys: Iterable[Key] | None = None) -> list[tuple[Member, Lane]]:
        """Returns once none of these threads, or of all, has a queue any more; whose pumps they were."""
        ended = [self.runs[key] for key in (list(self.runs) if keys is None else keys)]
        for run in ended:
            run.runner.stop()
        for run in ended:
            if run.thread is not None:
                run.thread.join()
        if keys is not None:
            self._late += [error for run in ended for error in run.errors]
            self.runs = {key: run for key, run in self.runs.items() if run not in ended}
        return [each for run in ended for each in run.lanes]

    @property
    def failures(self) -> list[EventFd]:
        """Readable once there are `errors`."""
        return [run.runner.failed for run in list(self.runs.values())]

    @property
    def errors(self) -> list[BaseException]:
        """What ended pumps, or whole threads."""
        return [error for run in list(self.runs.values()) for error in run.errors]

    def take_late(self) -> list[BaseException]:
        """What ended pumps that are not here any more, once. Not while another thread ends some."""
        late, self._late = self._late, []
        return late


class Running:
    """Starts and stops the pumps of one interface or of several, with one thread for each direction and one that watches devices.

    No thread that may have to wait for a device is joined under the lock here: who changes a device that is followed waits for that lock.
    """

    def __init__(self, *members: Member) -> None:
        self._members = members
        self._life: Life | None = None
        self._watcher: tuple[Thread, EventFd] | None = None
        self._lock = RLock()
        self._error: BaseException | None = None
        self._ended = EventFd()
        self._ended.signal()
        self._closed = False
        self._process = os.getpid()

    @property
    def running(self) -> bool:
        """Whether frames move: it was started, and nothing has ended it since."""
        return self._life is not None and not self._ended.wait(0)

    @property
    def error(self) -> BaseException | None:
        """What ended it; None if nothing did. Starting it again forgets that."""
        return self._error

    def fileno(self) -> int:
        """For a selector: readable when it has ended."""
        return self._ended.fileno()

    def start(self) -> None:
        """Plugs the cables in: frames move from now on. StatusError, ValueError, TapError: as `Netdev.start`."""
        with self._starting():
            self._begin()
            self._watch_with(self._watch)

    def stop(self) -> None:
        """Pulls the cable: returns once nothing moves any more. The interface stays, and can be started again.

        StatusError, here as for `start` and `close`: called from a port's `on_link`, which runs in the interface's own thread. Here as for
        `start`: called in a forked child of the process that made the interface.
        """
        self._check_caller()
        with self._lock:
            self._halt()
            for member in self._members:
                member._unplug()
                member._release()
            watcher, self._watcher = self._watcher, None
            with suppress(StatusError):  # closed before
                self._ended.signal()
        if watcher is not None:
            thread, stop = watcher
            stop.signal()
            thread.join()
            stop.close()

    def close(self) -> None:
        """Stops it and removes the interface. Closing twice is closing once; what ended it is in `error`.

        A forked child lets go of its own descriptors, and no more: interface, threads and port are its parent's.
        """
        if os.getpid() != self._process:
            self._let_go()
            return
        self._check_caller()
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self.stop()
        with self._lock:
            for member in self._members:
                member._remove()
            self._ended.close()

    def check(self) -> None:
        """Raises what ended it: SpecViolation or StatusError of a queue, DeviceNeedsReset, TransportError (device or TAP is gone), OSError
        (a notification failed)."""
        if self._error is not None:
            raise self._error

    def wait(self, timeout: float | None = None) -> bool:
        """Sleeps until it has ended, and raises what ended it; true if it was stopped or closed, false if `timeout` seconds have passed."""
        time, ready = None if timeout is None else arguments.seconds("timeout", timeout), True
        with suppress(StatusError):  # closed, now or meanwhile
            ready = self._ended.wait(time)
        self.check()
        return ready

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @contextmanager
    def _starting(self) -> Iterator[None]:
        """Makes sure that it may be started, and tidies up after what was before."""
        self._check_caller()
        with self._lock:
            self._check_idle()
        self.stop()
        with self._lock:
            self._check_idle()
            self._error = None
            self._ended.drain()
            try:
                for member in self._members:
                    member._claim()
                yield
            except BaseException:
                self._halt()
                for member in self._members:
                    member._unplug()
                    member._release()
                self._ended.signal()
                raise

    def _check_idle(self) -> None:
        if self._closed:
            raise StatusError("the interface is closed")
        if not self._ended.wait(0):
            raise StatusError("the interface runs already")

    def _let_go(self) -> None:
        """Closes the descriptors that a forked child has. Locks and threads are the parent's: nobody here would ever free or end them."""
        if self._closed:
            return
        self._closed = True
        watcher, self._watcher, self._life = self._watcher, None, None
        if watcher is not None:
            watcher[1].close()
        self._ended.close()
        for member in self._members:
            for pumps in member._pumps.values():
                for pump in pumps:
                    if pump is not None:
                        pump.close()
            member._remove()

    def _check_caller(self) -> None:
        if os.getpid() != self._process:
            raise StatusError(f"the interface was made in process {self._process}: its forked child {os.getpid()} can only close it")
        life, watcher = self._life, self._watcher
        threads = [*([] if life is None else life.threads), *([] if watcher is None else watcher[:1])]
        if current_thread() in threads:  # it would wait for itself, or for one who waits for it
            raise StatusError("an interface is not started, stopped or closed from its own thread, where on_link is called")

    def _begin(self, live: Collection[int] | None = None) -> None:
        """Starts pumps; of `live` pairs only, if they are given. Those that run already go on, if they are still wanted, or are stopped.

        StatusError, ValueError, TapError: as `Netdev.start`.
        """
        try:
            # The end that writes frames to the queue goes first, so that the other finds them in the same round.
            wanted: dict[Key, Lanes] = {}
            plan = [(member, member._lanes(live)) for member in self._members]
            for member, lanes in plan:
                for lane in lanes:
                    thread = lane.pair if lane.used else -1 - lane.pair // TOGETHER
                    for direction in ("transmit", "receive") if lane.used else ("transmit",):
                        wanted[thread, direction] = (*wanted.get((thread, direction), ()), (member, lane))
            life = self._life = self._life or Life()
            for member, lane in life.end([key for key, run in life.runs.items() if run.lanes != wanted.get(key)]):
                member._pull(lane)
            if not wanted:
                self._halt()
                return
            for member, lanes in plan:
                member._plug(lanes)
            for key, each in wanted.items():
                if key not in life.runs:
                    pumps = (getattr(member._pump(lane), key[1]) for member, lane in each)
                    life.begin(key, Run(each, list(pumps)))
        except BaseException:
            self._halt()
            raise

    def _halt(self) -> None:
        """Stops pumps: when it returns they have let go of their queues."""
        with self._lock:
            life, self._life = self._life, None
            if life is not None:
                life.end()
            for member in self._members:
                for lane in list(member._pumps):
                    member._pull(lane)

    def _watch_with(self, target: Callable[[EventFd], None]) -> None:
        """Has this run in a thread until its argument is signalled."""
        stop = EventFd()
        thread = Thread(target=target, args=(stop,), name="virtio-link", daemon=True)
        try:
            thread.start()
        except BaseException:  # no more threads to be had
            stop.close()
            raise
        self._watcher = thread, stop

    def _watch(self, stop: EventFd) -> None:
        """Looks at a device's status and link when its configuration changed, and stops everything when one pump has ended."""
        if (life := self._life) is None:
            return
        with self._interrupts() as interrupts:
            failures = {event.fileno() for event in life.failures}
            sleep_on = select.poll()
            for descriptor in (stop.fileno(), *failures, *interrupts):
                sleep_on.register(descriptor, select.POLLIN)
            try:
                while stop.fileno() not in (ready := {descriptor for descriptor, _ in sleep_on.poll()}):
                    if ready & failures:
                        raise next(iter(life.errors), StatusError("a pump has ended"))
                    for descriptor in ready:
                        event, member = interrupts[descriptor]
                        event.drain()
                        member._end.check()
            except BaseException as error:
                self._fail(life, error)

    @contextmanager
    def _interrupts(self) -> Iterator[dict[int, tuple[EventFd, Member]]]:
        """The ends' configuration interrupts, as descriptors of our own: theirs may be closed while we sleep on them."""
        found: dict[int, tuple[EventFd, Member]] = {}
        try:
            for member in self._members:
                if (interrupt := member._end.config_interrupt) is not None:
                    event = EventFd.from_fd(interrupt.fileno())
                    interrupt.tell_closed(event)  # with its transport: `check` then says so
                    found[event.fileno()] = event, member
            yield found
        finally:
            for event, _ in found.values():
                event.close()

    def _fail(self, life: Life, error: BaseException) -> None:
        self._error = error
        life.end()
        for member in self._members:
            with suppress(VirtioError, OSError):
                member._end.failed()
            member._unplug()
        self._ended.signal()
