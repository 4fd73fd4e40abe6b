"""Work in a process of its own, so that the command can end at any moment and leave nothing behind.

The command itself only waits: for events from the worker, and for signals. The worker ends with the command, however that ends: the kernel
kills it (PR_SET_PDEATHSIG). It is the first process of a PID namespace, so that everything that it started dies with it, and may make
network namespaces, in a user namespace of its own if need be; namespaces, and TAP interfaces in them, last as long as their processes.

    command --- guard --- worker --- ping, iperf3, qemu
"""

import ctypes
import json
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import IO, Any, Final, NoReturn, Self

from virtio.cli.output import DEVELOPER, CommandError, explain
from virtio.cli.signals import SIGNALS, check
from virtio.netdev.namespace import CLONE_NEWPID, NamespaceError, unshare_as_user

Event = dict[str, Any]
Emit = Callable[..., None]
"""Called by the worker with the event's kind, and its values by name: what JSON can say."""
Task = Callable[[Emit], None]

_PR_SET_PDEATHSIG: Final = 1
PATIENCE: Final = 5.0
"""Seconds that a worker has for its end before it is killed."""
SIGNALLED: Final = 128
"""What a guard adds to the number of the signal that ended its worker."""
_LOOK: Final = 0.5

_libc = ctypes.CDLL(None, use_errno=True)


def _die_with_parent() -> None:
    if _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0):
        number = ctypes.get_errno()
        raise OSError(number, f"prctl: {os.strerror(number)}")


class Worker:
    """Runs `task` in a process of its own, as a context: inside, iterating gives the events that the task emits, until it has ended.

    `needs` are the kinds of namespace (`CLONE_NEW...`) that the task has to have, beside its PID namespace. If it needs none, it does
    without that too where it cannot be had.

    CommandError: the task raised something, or its process ended before its time. Leaving the context ends the worker, and waits until that
    is done.
    """

    def __init__(self, task: Task, *, needs: int = 0) -> None:
        self._task, self._needs = task, needs
        self._pid = 0
        self._events: IO[bytes] | None = None
        self._life = -1

    def __enter__(self) -> Self:
        sys.stdout.flush()
        sys.stderr.flush()
        events, report = os.pipe()
        alive, self._life = os.pipe()
        old = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            try:
                if not (pid := os.fork()):
                    os.close(events)
                    os.close(self._life)
                    _guard(self._task, self._needs, report, alive, old)
                self._pid = pid
            finally:
                os.close(report)
                os.close(alive)
                self._events = os.fdopen(events, "rb")
                signal.pthread_sigmask(signal.SIG_SETMASK, old)
        except BaseException:
            self._end()
            raise
        return self

    def __iter__(self) -> Iterator[Event]:
        assert self._events is not None
        rest = b""
        watch = select.poll()
        watch.register(self._events, select.POLLIN)
        while True:
            check()
            if not watch.poll(_LOOK * 1000):
                continue
            data = os.read(self._events.fileno(), 1 << 16)
            if not data:
                break
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                event: Event = json.loads(line)
                if event["kind"] == "done":
                    return
                if event["kind"] == "error":
                    raise CommandError(event["text"])
                yield event
        raise CommandError(f"the process at work ended before its time: {self._end()}")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end()

    def _end(self) -> str:
        """Ends the worker if it has not ended; tells how it did."""
        if self._events is not None:
            self._events.close()
            os.close(self._life)
            self._events = None
        if not self._pid:
            return ""
        end = os.pidfd_open(self._pid)
        try:
            watch = select.poll()
            watch.register(end, select.POLLIN)
            for request in (signal.SIGTERM, signal.SIGKILL):
                if not watch.poll(0):
                    os.kill(self._pid, request)
                if watch.poll(PATIENCE * 1000):
                    break
        finally:
            os.close(end)
        _, status = os.waitpid(self._pid, 0)
        self._pid = 0
        code = os.waitstatus_to_exitcode(status)
        number = -code if code < 0 else code - SIGNALLED
        return f"signal {signal.Signals(number).name}" if number > 0 else f"exit code {code}"


def _guard(task: Task, needs: int, report: int, alive: int, mask: set[int]) -> NoReturn:
    """The process between command and worker: it makes the namespaces, waits for the worker, and ends it when told to."""
    code = 1
    try:
        worker = 0

        def stop(number: int, frame: object) -> None:
            if worker:
                os.kill(worker, signal.SIGKILL)
            else:
                os._exit(1)

        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, stop)
        try:
            unshare_as_user(needs | CLONE_NEWPID)
        except NamespaceError as error:
            if needs:
                raise CommandError(str(error)) from None
            _work(task, report, alive, mask)
        _die_with_parent()  # after the user namespace: a change of credentials takes it back
        if not (worker := os.fork()):
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            _work(task, report, alive, mask)
        os.close(report)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        _, status = os.waitpid(worker, 0)  # the namespace's first process ends last
        code = os.waitstatus_to_exitcode(status)
    except CommandError as error:
        _emitter(report)("error", text=str(error))
    finally:
        os._exit(code if code >= 0 else SIGNALLED - code)


def _work(task: Task, report: int, alive: int, mask: set[int]) -> NoReturn:
    """The worker: runs the task, and ends."""
    code = 1
    try:
        _die_with_parent()
        os.setsid()  # Ctrl-C is the command's to hear
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        signal.set_wakeup_fd(-1)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.close(null)
        watch = select.poll()
        watch.register(alive, 0)
        if watch.poll(0):  # the command ended before the kernel was told
            os._exit(1)
        emit = _emitter(report)
        try:
            task(emit)
            emit("done")
            code = 0
        except Exception as error:
            if os.environ.get(DEVELOPER):
                traceback.print_exc()
            emit("error", text=explain(error)[1])
    finally:
        os._exit(code)


def _emitter(report: int) -> Emit:
    def emit(kind: str, /, **values: Any) -> None:
        data = memoryview(json.dumps({"kind": kind, **values}).encode() + b"\n")
        while data:
            data = data[os.write(report, data) :]

    return emit
