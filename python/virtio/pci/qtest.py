"""QEMU's device models without a guest: QEMU is started, driven over qtest, and its PCI bus is set up as firmware would.

    with QemuMachine(["virtio-rng-pci"]) as machine:
        (function,) = machine.functions()

The machine's RAM is a `Memory`. Its processors do nothing; time is real time. QEMU ends with this process, however that ends.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from socket import AF_UNIX, SOCK_DGRAM, SOCK_STREAM, socket, socketpair
from threading import RLock
from types import TracebackType
from typing import Any, Final, Self

from virtio._core import Memory
from virtio.arguments import instance, number, strings
from virtio.errors import StatusError, TransportError
from virtio.pci import config
from virtio.pci.bus import Bus, Found, Place, Range, Windows
from virtio.pci.qtest_function import LETTER, Helper, QtestFunction
from virtio.pci.qtest_link import Bells, Qmp, Qtest

BINARY: Final = "qemu-system-x86_64"
MEMORY_SIZE: Final = 1 << 28
"""Bytes of RAM, unless told otherwise. Pages that nobody touches cost nothing."""
LARGEST_MEMORY: Final = 1 << 31
"""More would not be all below the addresses of PCI devices."""
RESERVED: Final = 1 << 20
"""The first bytes of RAM, which nothing is allocated in: some of them are ROM, and address 0 means "none" to devices."""
MESSAGE: Final = 2000
"""Most characters of what QEMU printed that go into an exception."""
END_TIMEOUT: Final = 10.0
"""Seconds that a killed process may take to end."""

BIOS: Final = b"\xf4" * 0xFFF0 + b"\xfa\xf4\xeb\xfd" + b"\xf4" * 12
"""64 KiB whose every instruction halts the processor; the last 16 bytes are the first to run (cli, hlt, and back)."""

ECAM: Final = 0xB000_0000
"""Where q35's extended configuration space is put: 256 buses of 1 MiB."""
PCIEXBAR: Final = 0x60
LOW: Final = (0xC000_0000, 0xFE00_0000)
HIGH: Final = (1 << 34, 1 << 38)
PORTS: Final = (0xC000, 0x1_0000)
"""What BARs get: memory below 4 GiB, memory above, and I/O ports that nothing else on either board has."""
PIRQ_ROUTES: Final = (0x60, 0x0A0A_0B0B)
"""Register of the pc's ISA bridge by which interrupt pins get lines: 11 and 10, which nobody else has."""

_Operation = tuple[Place, int, int, int | None]


class QemuMachine:
    """A QEMU process with the devices that were asked for, on machine `q35` (PCI Express, extended configuration space) or `pc`.

    Functions belong to the machine, and are closed with it. Any thread may use them. TransportError, from whatever call: QEMU ended; the
    message has its exit status, and what it printed.
    """

    def __init__(
        self,
        devices: Sequence[str] = (),
        *,
        machine: str = "q35",
        wires: Sequence[str] = (),
        netdevs: Sequence[str] = (),
        options: Sequence[str] = (),
        pass_fds: Sequence[int] = (),
        binary: str = BINARY,
        memory_size: int = MEMORY_SIZE,
    ) -> None:
        """`devices`, `netdevs`: the text behind `-device` and `-netdev`; `options`: more arguments; `pass_fds`: descriptors they name.

        `machine`: `q35` or `pc`, with properties behind commas. `wires`: ids of netdevs that lead to sockets of ours (`wire`).
        `binary`: a file, or a name on PATH. `memory_size`: bytes of RAM, a multiple of 1 MiB up to 2 GiB.

        ValueError: a machine or size that cannot be. TransportError: there is no such program, or it does not start, with its own message.
        """
        for what, texts in (("devices", devices), ("wires", wires), ("netdevs", netdevs), ("options", options)):
            strings(what, texts, "['virtio-rng-pci']" if what == "devices" else "a list of them")
        number("memory_size", memory_size)
        instance("machine", machine, str, "a string")
        instance("binary", binary, str, "a string")
        self._kind = machine.split(",")[0]
        if self._kind not in ("q35", "pc"):
            raise ValueError(f"machine {self._kind!r} is neither q35 nor pc")
        if memory_size % (1 << 20) or not 2 * RESERVED <= memory_size <= LARGEST_MEMORY:
            raise ValueError(f"memory size {memory_size} is not a multiple of 1 MiB in {2 * RESERVED}..{LARGEST_MEMORY}")
        if (program := shutil.which(binary)) is None:
            found = "is no program" if os.path.exists(binary) else "not found"
            raise TransportError(f"{binary} {found}: install the Debian package qemu-system-x86")
        self._lock = RLock()
        self._closed = False
        self._ended: str | None = None
        self._ecam = False
        self._functions: list[QtestFunction] = []
        self._wires: dict[str, socket] = {}
        self.memory: Final = Memory(memory_size, name="qemu-ram")
        """The RAM, which the devices reach from address 0 on."""
        self._stack = ExitStack()
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self.memory.allocate(RESERVED, RESERVED)
            self._start(program, machine, devices, wires, netdevs, options, pass_fds)
            self._set_up()
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """QEMU's process. StatusError: the machine is closed."""
        self._check_open()
        if self._process is None:
            raise StatusError("the machine is closed")
        return self._process.pid

    def functions(self) -> list[QtestFunction]:
        """The functions of the devices that were asked for, by ascending address; not bridges, nor what is the board's.

        StatusError: the machine is closed.
        """
        self._check_open()
        return list(self._functions)

    def wire(self, name: str) -> socket:
        """Our end of a wire: a datagram socket, one frame each. It stays the machine's. ValueError: no such wire."""
        if name not in self._wires:
            raise ValueError(f"there is no wire {name!r}, but {sorted(self._wires)}")
        return self._wires[name]

    def qmp(self, command: str, **arguments: Any) -> Any:
        """Gives a command to QEMU's monitor: `qmp("set_link", name="n0", up=False)`. ValueError: QEMU refuses it."""
        instance("command", command, str, "a string")
        self._check_open()
        return self._qmp.run(command.replace("_", "-") if command.startswith("query_") else command, arguments)

    def configure(self, operations: Sequence[_Operation]) -> list[int]:
        """Accesses configuration space (`virtio.pci.bus.Access`)."""
        commands: list[str] = []
        results: list[int] = []
        for place, offset, width, value in operations:
            function = place.bus << 8 | place.device << 3 | place.function
            if self._ecam:
                where, verbs = ECAM + (function << 12) + offset, ("read", "write")
            else:
                if offset >= config.SPACE_SIZE:
                    raise ValueError(f"offset {offset:#x}: machine {self._kind} has no extended configuration space")
                commands.append(f"outl 0xcf8 {0x8000_0000 | function << 8 | offset & ~3:#x}")
                where, verbs = 0xCFC + (offset & 3), ("in", "out")
            results.append(len(commands))
            letter = LETTER[width]
            commands.append(f"{verbs[0]}{letter} {where:#x}" if value is None else f"{verbs[1]}{letter} {where:#x} {value:#x}")
        numbers = self._qtest.numbers(commands)
        return [numbers[place] for place in results]

    def close(self) -> None:
        """Ends QEMU and closes all functions. Again does nothing.

        BufferError: somebody still uses the RAM; all else is done, and closing again closes it.
        """
        with self._lock:
            if not self._closed:
                self._closed = True
                self._ended = "QEMU was ended by closing its machine"
                self._stack.close()
            self.memory.close()

    def __enter__(self) -> Self:
        self._check_open()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self.close()
        except BufferError:
            if error is None:  # else what is on its way says more, and holds the frames whose objects use the RAM
                raise

    def _check_open(self) -> None:
        if self._closed:
            raise StatusError("the machine is closed")

    def _start(
        self,
        program: str,
        machine: str,
        devices: Sequence[str],
        wires: Sequence[str],
        netdevs: Sequence[str],
        options: Sequence[str],
        pass_fds: Sequence[int],
    ) -> None:
        theirs: list[socket] = []
        ends = ExitStack()

        def pair(kind: int = SOCK_STREAM) -> tuple[socket, int]:
            ours, end = socketpair(AF_UNIX, kind)
            theirs.append(ends.enter_context(end))
            return ours, end.fileno()

        def file(name: str, content: bytes) -> int:
            descriptor = os.memfd_create(name)
            self._stack.callback(os.close, descriptor)
            os.write(descriptor, content)
            return descriptor

        bios, self._printed, shared = file("bios", BIOS), file("stderr", b""), file("ivshmem", bytes(4096))
        self._bells = Bells(shared)
        self._stack.callback(self._bells.close)
        with ends:
            (qtest, qtest_fd), (monitor, monitor_fd) = pair(), pair()
            self._qtest = Qtest(qtest, self._explain)
            self._stack.callback(self._qtest.close)
            self._qmp = Qmp(monitor, self._explain)
            self._stack.callback(self._qmp.close)
            ram, size = self.memory.fileno(), self.memory.size >> 20
            arguments = [program, "-accel", "tcg", "-bios", f"/proc/self/fd/{bios}", "-machine", f"{machine},memory-backend=ram"]
            arguments += ["-m", f"{size}M", "-object", f"memory-backend-file,id=ram,mem-path=/proc/self/fd/{ram},size={size}M,share=on"]
            arguments += ["-nodefaults", "-no-user-config", "-display", "none", "-global", "pci-device.romfile="]  # nobody runs ROMs
            arguments += ["-chardev", f"socket,id=virtio-qtest,fd={qtest_fd}"]
            arguments += ["-object", "qtest,id=virtio-qtest,chardev=virtio-qtest,log=/dev/null"]
            arguments += ["-chardev", f"socket,id=virtio-qmp,fd={monitor_fd}", "-mon", "chardev=virtio-qmp,mode=control"]
            arguments += ["-chardev", f"socket,id=virtio-bells,fd={self._bells.theirs.fileno()}"]
            arguments += [
                "-device",
                f"ivshmem-doorbell,id=virtio-bells,chardev=virtio-bells,vectors={Bells.VECTORS},ioeventfd=off,addr=1e.0",
            ]
            for name in wires:
                self._wires[name], far = pair(SOCK_DGRAM)
                self._stack.callback(self._wires[name].close)
                arguments += ["-netdev", f"dgram,id={name},local.type=fd,local.str={far}"]
            for option in netdevs:
                arguments += ["-netdev", option]
            for option in devices:
                arguments += ["-device", option]
            arguments += options
            arguments = _ending_with_us(arguments)
            inherited = [bios, ram, self._bells.theirs.fileno(), *(end.fileno() for end in theirs), *pass_fds]

            def begin() -> None:
                self._process = subprocess.Popen(
                    arguments,
                    stdin=subprocess.DEVNULL,
                    stdout=self._printed,
                    stderr=self._printed,
                    pass_fds=inherited,
                    start_new_session=True,  # Ctrl-C is for us: QEMU ends when we are done with it
                )

            self._helper = Helper(begin)
            self._stack.callback(self._helper.stop)
            self._stack.callback(self._kill)
            try:
                self._helper.launch()
            except OSError as error:
                raise TransportError(f"{program} does not start: {error}") from None
        self._bells.theirs.close()
        self._qtest.run(["inb 0x80"])  # the first answer: it is up, and takes all options

    def _set_up(self) -> None:
        if self._kind == "q35":
            bridge = Place(0, 0, 0)
            self.configure([(bridge, PCIEXBAR + 4, 4, 0), (bridge, PCIEXBAR, 4, ECAM | 1)])
            self._ecam = True
            lines = frozenset(range(16, 24))
        else:
            offset, routes = PIRQ_ROUTES
            self.configure([(Place(0, 1, 0), offset, 4, routes)])
            lines = frozenset((10, 11))
        bus = Bus(self)
        found = bus.scan()
        bus.assign(Windows(Range(*PORTS), Range(*LOW), Range(*HIGH)))
        self._helper.serve(self._qtest, lines)
        register = next(each.bars[0].address for each in found if each.place == BELLS) + Bells.REGISTER
        for each in found:
            if each.header == 0 and not _of_the_board(each):
                function = QtestFunction(
                    each,
                    access=self,
                    qtest=self._qtest,
                    helper=self._helper,
                    memory=self.memory,
                    bells=self._bells,
                    register=register,
                    ended=self._has_ended,
                )
                self._functions.append(function)
                self._stack.callback(function.close)

    def _has_ended(self) -> bool:
        return self._process is not None and self._process.poll() is not None

    def _explain(self) -> str:
        """Why the connection ended."""
        if self._ended is None and (process := self._process) is not None:
            try:
                status = process.wait(END_TIMEOUT)
            except subprocess.TimeoutExpired:
                return "QEMU closed its connection, but runs on"
            printed = os.pread(self._printed, 1 << 16, 0).decode(errors="replace").strip()[-MESSAGE:]
            how = f"QEMU was ended by signal {-status}" if status < 0 else f"QEMU ended with status {status}"
            self._ended = f"{how}: {printed}" if printed else how
        return self._ended or "QEMU did not start"

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(END_TIMEOUT)


EXEC: Final = """\
import ctypes, os, sys
if ctypes.CDLL(None, use_errno=True).prctl(1, 9, 0, 0, 0):
    sys.exit("prctl(PR_SET_PDEATHSIG): " + os.strerror(ctypes.get_errno()))
if os.getppid() != int(sys.argv[1]):
    sys.exit("whoever started this has ended")
os.execv(sys.argv[2], sys.argv[2:])
"""
"""What setpriv does, for where it is not."""


def _ending_with_us(arguments: list[str]) -> list[str]:
    """A command that is killed when the thread that starts it ends: our helper's. TransportError: nothing here arranges for that."""
    if (setpriv := shutil.which("setpriv")) is not None:
        return [setpriv, "--pdeathsig", "KILL", *arguments]
    if not sys.executable:
        raise TransportError("setpriv not found: install the Debian package util-linux")
    return [sys.executable, "-I", "-S", "-c", EXEC, str(os.getpid()), *arguments]


BELLS: Final = Place(0, 0x1E, 0)


def _of_the_board(found: Found) -> bool:
    """Whether a function is there without being asked for: the two boards' own, and the bells."""
    bus, device, _ = found.place
    isa = device == 1 and found.vendor == 0x8086 and found.device in (0x7000, 0x7010, 0x7113)  # pc: ISA bridge, IDE, power management
    return bus == 0 and (device in (0, 0x1F) or isa or found.place == BELLS)
