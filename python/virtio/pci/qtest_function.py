"""A PCI function in QEMU, driven over qtest, and the one thread that stands between its eventfds and its registers."""

import sys
import threading
from collections.abc import Callable, Mapping
from select import POLLIN, poll
from threading import Event, ExceptHookArgs, Lock, Thread, current_thread
from time import monotonic
from types import MappingProxyType
from typing import Final

from virtio._core import EventFd, Memory
from virtio.errors import StatusError, TransportError
from virtio.pci import config
from virtio.pci.bus import Access, Found, Place
from virtio.pci.function import Bar
from virtio.pci.qtest_link import Bells, Qtest

RINGING_TIMEOUT: Final = 5.0
"""Seconds within which QEMU has taken eventfds that were passed to it."""
ROUNDS: Final = 64
"""How often handlers are called in a row before other work has its turn."""
LETTER: Final = {1: "b", 2: "w", 4: "l"}
"""Widths in bytes, as qtest names them."""


class Helper(Thread):
    """Turns signals of doorbells into register writes, and raised interrupt lines into calls of handlers. It sleeps when there is none.

    MSI-X needs it not: QEMU signals those eventfds by itself (`Bells`).
    """

    def __init__(self, begin: Callable[[], None]) -> None:
        """`begin` is run in the thread first of all: a child process may be made there, that is to end with it."""
        super().__init__(name="virtio-qtest", daemon=True)
        self._begin = begin
        self._begun = Event()
        self._failure: BaseException | None = None
        self._qtest: Qtest | None = None
        self._lines: frozenset[int] = frozenset()
        self._wake = EventFd()
        self._stopped = False
        self._ending = False
        self._reason: str | None = None
        """Why the thread ended early."""
        self._lock = Lock()
        self._handling = Lock()
        self._doorbells: dict[int, tuple[EventFd, str]] = {}
        self._handlers: dict[object, tuple[Callable[[], bool], Callable[[], None]]] = {}
        self._waking: dict[object, list[EventFd]] = {}

    def launch(self) -> None:
        """Starts the thread, and returns when `begin` has run; what that raised comes through."""
        self.start()
        self._begun.wait()
        if self._failure is not None:
            raise self._failure

    def serve(self, qtest: Qtest, lines: frozenset[int]) -> None:
        """Begins to look after eventfds, and after these interrupt lines."""
        self._qtest, self._lines = qtest, lines
        if self._reason is not None:
            qtest.fail(self._reason)
        self._wake.signal()

    def ring(self, doorbell: EventFd, command: str) -> None:
        """From now on a signal of `doorbell` is that qtest command."""
        with self._lock:
            self._doorbells[doorbell.fileno()] = (doorbell, command)
        self._wake.signal()

    def forget(self, doorbell: EventFd) -> None:
        """Ends that, and closes the doorbell."""
        with self._lock:
            self._doorbells.pop(doorbell.fileno(), None)
            doorbell.close()  # under the lock: no number of a closed descriptor is ever polled as a doorbell's
        self._wake.signal()

    def handle(self, owner: object, asserted: Callable[[], bool], handler: Callable[[], None]) -> None:
        """From now on calls `handler` while `asserted` is true, whenever an interrupt line is high."""
        with self._lock:
            self._handlers[owner] = (asserted, handler)
        self._wake.signal()

    def wake_at_end(self, owner: object, events: list[EventFd]) -> None:
        """Signals these when QEMU ends, so that nobody waits for ever."""
        with self._lock:
            self._waking[owner] = events

    def release(self, owner: object) -> None:
        """Takes back `handle` and `wake_at_end`; returns once no handler runs any more."""
        with self._lock:
            self._handlers.pop(owner, None)
            self._waking.pop(owner, None)
        if current_thread() is not self:
            with self._handling:
                pass

    def ending(self) -> bool:
        """Whether the caller is this thread, telling everybody that QEMU is gone."""
        return self._ending and current_thread() is self

    def stop(self) -> None:
        """Ends the thread, and waits until it has."""
        self._stopped = True
        if self.is_alive():
            self._wake.signal()
            if current_thread() is not self:
                self.join()
        self._wake.close()

    def run(self) -> None:
        """The thread's own."""
        try:
            self._begin()
        except BaseException as failure:
            self._failure = failure
            return
        finally:
            self._begun.set()
        try:
            while not self._stopped:
                self._step()
        except TransportError as error:
            self._end(str(error))
        except Exception as error:
            self._end(f"the thread that looks after QEMU's interrupts and doorbells failed: {error!r}")

    def _step(self) -> None:
        """One sleep, and what woke it."""
        qtest = self._qtest
        watch = poll()
        watch.register(self._wake.fileno(), POLLIN)
        with self._lock:
            doorbells = dict(self._doorbells)
            handlers = list(self._handlers.items())
        timeout: float | None = None
        if qtest is not None:
            # Without handlers only its end counts: answers to other threads must not wake this one.
            watch.register(qtest.fileno(), POLLIN if handlers else 0)
            watch.register(qtest.changed.fileno(), POLLIN if handlers else 0)
            if handlers and self._lines & qtest.raised:
                timeout = 10  # a line that nobody lowered: look again by and by
        for descriptor in doorbells:
            watch.register(descriptor, POLLIN)
        ready = {descriptor for descriptor, _ in watch.poll(timeout)}
        if self._stopped or qtest is None:
            self._wake.drain()
            return
        if self._wake.fileno() in ready:
            self._wake.drain()
        commands = []
        with self._lock:
            for descriptor in ready & doorbells.keys() & self._doorbells.keys():
                doorbell, command = self._doorbells[descriptor]
                if doorbell.drain():
                    commands.append(command)
        if commands:
            qtest.run(commands)
        if qtest.fileno() in ready:
            qtest.look()
        if handlers:
            qtest.changed.drain()
            self._handle(qtest)

    def _handle(self, qtest: Qtest) -> None:
        for _ in range(ROUNDS):
            called = False
            with self._handling:
                with self._lock:
                    handlers = list(self._handlers.items())
                for owner, (asserted, handler) in handlers:
                    if not self._lines & qtest.raised or not asserted():
                        continue
                    called = True
                    self._call(owner, handler)
            if not called:
                return

    def _call(self, owner: object, handler: Callable[[], None]) -> None:
        try:
            handler()
        except TransportError:
            raise
        except Exception:  # the handler's own mistake ends its calls, and nobody else's
            with self._lock:
                self._handlers.pop(owner, None)
            threading.excepthook(ExceptHookArgs((*sys.exc_info(), self)))  # told as if the thread were the handler's alone

    def _end(self, reason: str) -> None:
        """QEMU is gone, or nobody looks after it: whoever waits shall look. This thread ends, and QEMU with it."""
        self._reason = reason
        if self._qtest is not None:
            self._qtest.fail(reason)
        self._ending = True
        with self._lock:
            waking = [event for events in self._waking.values() for event in events]
            handlers = [handler for _, handler in self._handlers.values()]
        with self._handling:
            for event in waking:
                try:
                    event.signal()
                except StatusError:  # closed meanwhile
                    continue
            for handler in handlers:
                try:
                    handler()  # reads all ones
                except Exception:
                    continue


class QtestFunction:
    """A `PciFunction` whose device is in QEMU. `QemuMachine` makes them."""

    access_platform: Final = True

    def __init__(
        self,
        found: Found,
        *,
        access: Access,
        qtest: Qtest,
        helper: Helper,
        memory: Memory,
        bells: Bells,
        register: int,
        ended: Callable[[], bool],
    ) -> None:
        """`register` is the address of the doorbell register of `bells`; `ended` tells whether QEMU has."""
        self._ended = ended
        self._found = found
        self._access, self._qtest, self._helper, self._bells, self._register = access, qtest, helper, bells, register
        self._memory = memory
        self._attached = False
        self._closed = False
        self._doorbells: dict[tuple[int, int, int, int], EventFd] = {}
        self._msix: config.Msix | None = None
        self._vectors: list[EventFd] = []
        self._peer: int | None = None
        self._intx = False

    def __repr__(self) -> str:
        return f"<QtestFunction {self.address} {self._found.vendor:04x}:{self._found.device:04x}>"

    @property
    def place(self) -> Place:
        """Where it is, as numbers."""
        return self._found.place

    @property
    def address(self) -> str:
        """Where it is: `0000:00:04.0`."""
        return str(self._found.place)

    @property
    def bars(self) -> Mapping[int, Bar]:
        """The BARs that have an address and decode it, by index."""
        return MappingProxyType(self._found.bars)

    @property
    def memory(self) -> Memory | None:
        """The machine's RAM: the only memory that QEMU's devices reach."""
        return self._memory

    @property
    def gone(self) -> bool:
        """Whether QEMU has ended: its devices write to no memory any more."""
        return self._ended()

    def config_read(self, offset: int, width: int) -> int:
        """Reads configuration space: `offset` 0 to 4095 on q35, to 255 on pc."""
        self._check(offset, width, 4096)
        return self._access.configure([(self._found.place, offset, width, None)])[0]

    def config_write(self, offset: int, width: int, value: int) -> None:
        """Writes configuration space."""
        self._check(offset, width, 4096, value)
        self._access.configure([(self._found.place, offset, width, value)])

    def bar_read(self, bar: int, offset: int, width: int) -> int:
        """Reads a register in BAR `bar`, `offset` bytes from its beginning. To an interrupt's handler, QEMU gone reads as all ones."""
        try:
            return self._qtest.numbers([self._command(bar, offset, width)])[0]
        except TransportError:
            if self._helper.ending():
                return (1 << 8 * width) - 1
            raise

    def bar_write(self, bar: int, offset: int, width: int, value: int) -> None:
        """Writes a register in BAR `bar`; QEMU has done it on return."""
        self._qtest.run([self._command(bar, offset, width, value)])

    def doorbell(self, bar: int, offset: int, width: int, value: int) -> EventFd:
        """An eventfd whose signal is that store to that register: the machine's helper thread does it."""
        command = self._command(bar, offset, width, value)
        key = (bar, offset, width, value)
        if key not in self._doorbells:
            self._doorbells[key] = EventFd()
            self._helper.ring(self._doorbells[key], command)
        return self._doorbells[key]

    def enable_msix(self, count: int) -> list[EventFd]:
        """Enables MSI-X with `count` vectors; QEMU signals the eventfds itself. TransportError: there are not so many."""
        self._open()
        if self._vectors or self._intx:
            raise StatusError(f"interrupts of {self.address} are enabled already")
        msix = self._find_msix()
        if not 1 <= count <= msix.size:
            raise TransportError(f"{self.address} has {msix.size} MSI-X vectors, not {count}")
        self._vectors = [EventFd() for _ in range(count)]
        try:
            self._peer = peer = self._bells.connect(self._vectors)
            self._await_bells(peer)
            commands = []
            for index in range(count):
                for offset, value in ((0, self._register), (4, 0), (8, self._bells.data(peer, index)), (12, 0)):
                    commands.append(self._entry(msix, index, offset, value))
            self._qtest.run(commands)
            self._msix = msix
            self._set_msix(config.MSIX_ENABLE)
        except BaseException:
            self.disable_interrupts()
            raise
        self._helper.wake_at_end(self, self._vectors)
        return list(self._vectors)

    def mask_vector(self, index: int, masked: bool) -> None:
        """Masks or unmasks one enabled MSI-X vector; QEMU sends what was pending at unmasking."""
        self._open()
        if self._msix is None or not 0 <= index < len(self._vectors):
            raise ValueError(f"vector {index} is not among the {len(self._vectors)} that are enabled")
        self._qtest.run([self._entry(self._msix, index, 12, int(masked))])

    def enable_intx(self, handler: Callable[[], None]) -> None:
        """Enables the interrupt pin; the machine's helper thread calls `handler` while the function asserts it."""
        self._open()
        if self._vectors or self._intx:
            raise StatusError(f"interrupts of {self.address} are enabled already")
        if not self.config_read(config.INTERRUPT_PIN, 1):
            raise TransportError(f"{self.address} has no interrupt pin")
        self._qtest.run(["irq_intercept_in ioapic"])
        self._intx = True
        self._helper.handle(self, self._asserted, handler)
        self._command_register(clear=config.COMMAND_INTX_DISABLE)

    def disable_interrupts(self) -> None:
        """Disables MSI-X or the pin, and returns once no handler runs any more. Again does nothing."""
        self._helper.release(self)
        vectors, self._vectors = self._vectors, []
        peer, self._peer = self._peer, None
        msix, self._msix = self._msix, None
        intx, self._intx = self._intx, False
        try:
            if msix is not None:
                self._access.configure([(self._found.place, msix.place + 2, 2, 0)])
            if intx:
                self._command_register(set=config.COMMAND_INTX_DISABLE)
        finally:
            if peer is not None:
                self._bells.disconnect(peer)
            for event in vectors:
                event.close()

    def attach(self, memory: Memory) -> int:
        """Turns bus mastering on; the guest-physical address of the RAM's first byte. ValueError: another memory, or attached already."""
        self._open()
        if memory is not self._memory:
            raise ValueError("QEMU's devices reach the machine's own RAM only: use the memory of the function")
        if self._attached:
            raise ValueError("the memory is attached already")
        self._command_register(set=config.COMMAND_MASTER)
        self._attached = True
        return 0

    def detach(self, memory: Memory) -> None:
        """Turns bus mastering off. ValueError: it is not attached."""
        if memory is not self._memory or not self._attached:
            raise ValueError("the memory is not attached")
        self._attached = False
        self._command_register(clear=config.COMMAND_MASTER)

    def close(self) -> None:
        """Disables interrupts, takes the memory away, and lets go of the function. QEMU may be gone by then. Again does nothing."""
        if self._closed:
            return
        try:
            self.disable_interrupts()
            if self._attached:
                self.detach(self._memory)
        except TransportError:
            self._attached = False
        for doorbell in self._doorbells.values():
            self._helper.forget(doorbell)
        self._doorbells.clear()
        self._closed = True

    def _open(self) -> None:
        if self._closed:
            raise StatusError(f"the function {self.address} is closed")

    def _check(self, offset: int, width: int, size: int, value: int = 0) -> None:
        self._open()
        if width not in LETTER:
            raise ValueError(f"width {width} is none of 1, 2, 4")
        if offset % width or not 0 <= offset <= size - width:
            raise ValueError(f"offset {offset:#x} is not a multiple of {width} within {size:#x} bytes")
        if not 0 <= value < 1 << 8 * width:
            raise ValueError(f"value {value:#x} does not fit into {width} bytes")

    def _command(self, bar: int, offset: int, width: int, value: int | None = None) -> str:
        """The qtest command for an access to a BAR."""
        self._open()
        if (known := self._found.bars.get(bar)) is None:
            raise ValueError(f"{self.address} has no BAR {bar} that decodes")
        self._check(offset, width, known.size, value or 0)
        verbs = ("in", "out") if known.kind == "io" else ("read", "write")
        if value is None:
            return f"{verbs[0]}{LETTER[width]} {known.address + offset:#x}"
        return f"{verbs[1]}{LETTER[width]} {known.address + offset:#x} {value:#x}"

    def _entry(self, msix: config.Msix, index: int, offset: int, value: int) -> str:
        return self._command(msix.table_bar, msix.table_offset + index * config.MSIX_ENTRY_SIZE + offset, 4, value)

    def _find_msix(self) -> config.Msix:
        place = self._found.place
        words = self._access.configure([(place, offset, 4, None) for offset in range(0, config.SPACE_SIZE, 4)])
        space = b"".join(word.to_bytes(4, "little") for word in words)
        for capability in config.capabilities(space):
            if capability.id == config.CAP_MSIX:
                try:
                    return config.parse_msix(capability, self._found.bars)
                except ValueError as error:
                    raise TransportError(f"the MSI-X capability of {self.address} cannot be used: {error}") from None
        raise TransportError(f"{self.address} has no MSI-X capability")

    def _set_msix(self, control: int) -> None:
        if self._msix is not None:
            self._access.configure([(self._found.place, self._msix.place + 2, 2, control)])

    def _await_bells(self, peer: int) -> None:
        """Returns when QEMU has taken the last of a peer's eventfds, which it does in order."""
        last = len(self._vectors) - 1
        deadline = monotonic() + RINGING_TIMEOUT
        while not self._vectors[last].wait(0):
            if monotonic() >= deadline:
                raise TransportError(f"QEMU has not taken {last + 1} eventfds within {RINGING_TIMEOUT} s")
            self._qtest.run([f"writel {self._register:#x} {self._bells.data(peer, last):#x}"])
        self._vectors[last].drain()

    def _asserted(self) -> bool:
        """Whether the function asserts its pin: the status register says so."""
        return bool(self._access.configure([(self._found.place, config.STATUS, 2, None)])[0] & config.STATUS_INTERRUPT)

    def _command_register(self, *, set: int = 0, clear: int = 0) -> None:
        place = self._found.place
        old = self._access.configure([(place, config.COMMAND, 2, None)])[0]
        self._access.configure([(place, config.COMMAND, 2, old & ~clear | set)])
