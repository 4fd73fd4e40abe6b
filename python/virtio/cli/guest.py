"""Linux as a guest: User-Mode Linux, which is an ordinary process, or Debian's kernel in QEMU. Its console is a shell that this drives.

with qemu_guest(kernel, options) as guest:
    guest.wait_ready()
    status, lines = guest.run("ping -c 1 192.0.2.2")
"""

import os
import re
import select
import shlex
import shutil
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from socket import socketpair
from time import monotonic
from types import TracebackType
from typing import Final, Self

from virtio.cli.initrd import MODULES, PROGRAMS, Kernel, make_initrd, modules_of
from virtio.cli.output import CommandError

QEMU: Final = "qemu-system-x86_64"
UML: Final = "linux.uml"
UML_PACKAGE: Final = "user-mode-linux"
PACKAGES: Final = {**PROGRAMS, QEMU: "qemu-system-x86", UML: UML_PACKAGE, "ip": "iproute2", "insmod": "kmod", "cc": "gcc"}
"""Programs, and the Debian packages that have them."""
SYSTEM_PATH: Final = "/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin"
UML_MODULES: Final = Path("/usr/lib/uml/modules")
CPUINFO: Final = Path("/proc/cpuinfo")
XSTATE: Final = Path(__file__).with_name("xstate.c")
BOOT_SECONDS: Final = 90.0
"""Seconds that a guest has until its shell is there: many times what it needs."""
SECONDS: Final = 60.0
"""Seconds that a command has, unless told otherwise."""
END_SECONDS: Final = 10.0
LOOK: Final = 0.1
"""Seconds after which it is looked whether there is sense in going on."""
LONGEST_LINE: Final = 1 << 16
"""Bytes of the console's line, after which it is cut."""
LONGEST: Final = 4000
"""Bytes of a command: a terminal's line has 4095."""
MOUNTS: Final = (("proc", "proc"), ("sysfs", "sys"), ("tmpfs", "tmp"))
_ASKING: Final = "@guest asks"
_READY: Final = "@guest ready"
_DONE: Final = re.compile(r"^(.*)@guest done (\d+)$")
SHELL: Final = (
    f"set +f; stty -echo -onlcr 2>/dev/null; echo; echo {_READY}; "
    'while read -r line; do eval "$line" </dev/null 2>&1; echo "@guest done $?"; done'
)
"""What the first process of a guest goes on with: a line is a command, and behind what it prints stands its exit status."""
FIRST: Final = f'"echo {_ASKING}; set -f; read -r line; eval $line"'
"""How the first process of User-Mode Linux begins, which has no file of ours: with a line that it asks for. Earlier ones get lost."""
CONSOLE: Final = ("console=ttyS0", "quiet", "loglevel=1", "panic=-1")
"""The kernel's command line in QEMU."""


class Guest:
    """A process whose standard input and output are a Linux console. As a context, it ends with that, and all that it started with it."""

    def __init__(
        self,
        words: Sequence[str],
        *,
        first: str = "",
        pass_fds: Sequence[int] = (),
        environment: Mapping[str, str] | None = None,
        check: Callable[[], object] = lambda: None,
    ) -> None:
        """Starts it. `first` is the line for who begins with `FIRST`.

        `check` is called again and again while something is awaited, and raises when there is no sense in going on.
        """
        self.words: Final = list(words)
        self.name: Final = os.path.basename(words[0])
        self._first, self._check = first, check
        self._rest = b""
        self._last = ""
        self._console, theirs = socketpair()
        self._complaints = os.memfd_create("stderr")
        try:
            with theirs:
                self.process: Final[subprocess.Popen[bytes]] = subprocess.Popen(
                    words,
                    stdin=theirs.fileno(),
                    stdout=theirs.fileno(),
                    stderr=self._complaints,
                    pass_fds=list(pass_fds),
                    env=None if environment is None else {**os.environ, **environment},
                    start_new_session=True,  # also so that its helpers can be ended with it
                )
        except BaseException:
            self._console.close()
            os.close(self._complaints)
            raise

    @property
    def pid(self) -> int:
        """The process."""
        return self.process.pid

    def wait_ready(self, limit: float = BOOT_SECONDS) -> None:
        """Returns once the guest's shell waits for commands. CommandError: the guest ended, or `limit` seconds have passed."""
        deadline = monotonic() + limit
        while (line := self._line(deadline, "did not start")) != _READY:
            if line == _ASKING:
                self.send(self._first)

    def send(self, line: str) -> None:
        """Types a line. ValueError: it is not one, or longer than `LONGEST` bytes. CommandError: the guest has ended."""
        data = line.encode()
        if b"\n" in data or len(data) > LONGEST:
            raise ValueError(f"a command is one line of {LONGEST} bytes at most")
        try:
            self._console.sendall(data + b"\n")
        except ConnectionError:
            raise CommandError(self._ending()) from None

    def run(
        self, command: str, *, limit: float = SECONDS, show: Callable[[str], object] = lambda line: None, rebooting: bool = False
    ) -> tuple[int, list[str]]:
        """Runs a line of shell in the guest; its exit status, and the lines that it printed, each shown as it comes.

        With `rebooting` it ends when the guest's shell is there anew. ValueError, CommandError: as of `send`, or it takes `limit` seconds.
        """
        self.send(command)
        deadline = monotonic() + limit
        lines: list[str] = []
        while True:
            line = self._line(deadline, f"did not finish {command.split()[0]!r}")
            if rebooting and line == _READY:
                return 0, lines
            if (done := _DONE.match(line)) is not None:
                if done[1]:  # printed without an end of line
                    lines.append(done[1])
                    show(done[1])
                return int(done[2]), lines
            lines.append(line)
            show(line)

    def read(self, command: str) -> str:
        """What a command prints, stripped. CommandError: it fails."""
        status, lines = self.run(command)
        if status:
            raise CommandError(f"the guest's {command!r} failed: {' '.join(lines)}")
        return "\n".join(lines).strip()

    def close(self) -> None:
        """Ends it, if it has not ended."""
        with suppress(ProcessLookupError):  # its own session: nobody else is in this group
            os.killpg(self.process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(END_SECONDS)
        self._console.close()
        if self._complaints >= 0:
            os.close(self._complaints)
            self._complaints = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _line(self, deadline: float, failing: str) -> str:
        """The next line of the console. CommandError: none comes."""
        watch = select.poll()
        watch.register(self._console, select.POLLIN)
        if monotonic() > deadline:  # also one that prints for ever
            raise CommandError(f"{self.name} {failing} in time{self._said()}")
        while b"\n" not in self._rest and len(self._rest) < LONGEST_LINE:
            self._check()
            if watch.poll(LOOK * 1000):
                data = self._received()
                if not data:
                    raise CommandError(self._ending())
                self._rest += data
            elif self.process.poll() is not None:  # helpers that are left may hold the console open
                raise CommandError(self._ending())
            elif monotonic() > deadline:
                raise CommandError(f"{self.name} {failing} in time{self._said()}")
        line, _, self._rest = self._rest.partition(b"\n")  # without an end it is longer than any line of ours
        text = line.decode(errors="replace").replace("\r", "")
        if text.strip():
            self._last = text.strip()
        return text

    def _received(self) -> bytes:
        try:
            return self._console.recv(1 << 16)
        except ConnectionError:
            return b""

    def _ending(self) -> str:
        if self._rest.strip():
            self._last = self._rest.decode(errors="replace").strip()
        try:
            status = self.process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            return f"{self.name} closed its console{self._said()}"
        how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        return f"{self.name} {how}{self._said()}"

    def _said(self) -> str:
        complaint = os.pread(self._complaints, LONGEST_LINE, 0).decode(errors="replace").strip().rpartition("\n")[2]
        said = complaint or self._last
        return f": {said}" if said and not said.startswith("@guest") else ""


def require(programs: Sequence[str], path: str | None = None) -> None:
    """CommandError: one of these is not installed (on PATH, if `path` is None); names the Debian package that has it."""
    for program in programs:
        if shutil.which(program, path=path) is None:
            raise CommandError(f"{program} not found: install the Debian package {PACKAGES[program]}")


def uml_programs() -> None:
    """CommandError: something that User-Mode Linux needs is not installed; guests look for programs in `SYSTEM_PATH`."""
    require([UML])
    require(["ip", "insmod", "ping", "iperf3"], SYSTEM_PATH)
    uml_modules()


def qemu_guest(
    kernel: Kernel,
    options: Sequence[str],
    *,
    memory: str = "256M",
    processors: int = 1,
    pass_fds: Sequence[int] = (),
    binary: str = QEMU,
    check: Callable[[], object] = lambda: None,
) -> Guest:
    """A guest of QEMU's, emulated, with shared memory. `memory` is what stands behind -m; `options` are further words.

    CommandError: QEMU, or something that goes into the guest's RAM disk, is not installed.
    """
    require([binary] if binary == QEMU else [])
    size = memory.split(",")[0]
    disk = os.memfd_create("initrd")
    try:
        with os.fdopen(os.dup(disk), "wb") as file:
            file.write(make_initrd(kernel, SHELL))
        words = [binary, "-accel", "tcg,thread=multi", "-machine", "q35,memory-backend=ram", "-m", memory, "-smp", str(processors)]
        words += ["-object", f"memory-backend-memfd,id=ram,size={size},share=on", "-nodefaults", "-no-user-config", "-display", "none"]
        words += ["-serial", "stdio", "-kernel", str(kernel.image), "-initrd", f"/proc/self/fd/{disk}", "-append", " ".join(CONSOLE)]
        return Guest([*words, *options], pass_fds=[disk, *pass_fds], check=check)
    finally:
        os.close(disk)


def uml_guest(folder: Path, devices: Mapping[str, int], *, memory: str = "256M", check: Callable[[], object] = lambda: None) -> Guest:
    """User-Mode Linux. Its files are this machine's, read only. `devices` are sockets of back-ends, and ids of device types.

    What it needs to start lies in `folder`. CommandError: something is not installed.
    """
    require([UML])
    steps = [f"mount -t {kind} none /{name}" for kind, name in MOUNTS]
    steps += [f"insmod {shlex.quote(str(path))}" for path in uml_modules()]
    words = [UML, f"mem={memory}", "rootfstype=hostfs", "rootflags=/", "ro", "con=null", "con0=fd:0,fd:1"]
    words += ["quiet", "loglevel=1", f"uml_dir={folder}", *(f"virtio_uml.device={path}:{device}" for path, device in devices.items())]
    words += ["init=/bin/sh", "--", "-c", FIRST]
    environment = {"TMPDIR": "/dev/shm", **xstate(folder)}
    # In an ordinary user's namespace root's files are nobody's, and mount, which has the set-user-ID bit, would run as nobody.
    first = f"export PATH={SYSTEM_PATH}; exec setpriv --no-new-privs /bin/sh -c {shlex.quote('; '.join([*steps, SHELL]))}"
    return Guest(words, first=first, environment=environment, check=check)


def uml_modules(names: Sequence[str] = MODULES[1:]) -> list[Path]:
    """Modules of User-Mode Linux, in the order in which they are loaded. CommandError: they are not installed."""
    folders = sorted(UML_MODULES.glob("*"))
    if not folders:
        raise CommandError(f"no modules in {UML_MODULES}: install the Debian package {UML_PACKAGE}")
    return modules_of(Kernel(Path(UML), folders[-1], folders[-1].name), names, package=UML_PACKAGE)


def xstate(folder: Path) -> dict[str, str]:
    """Environment of linux.uml: on processors with AMX it needs a library that completes what it writes into its processes' registers.

    CommandError: that has to be compiled, and there is no C compiler.
    """
    try:
        flags = re.search(r"^flags\s*:(.*)$", CPUINFO.read_text(), flags=re.MULTILINE)
    except OSError:
        flags = None
    if flags is None or "amx_tile" not in flags[1].split():
        return {}
    library = folder / "xstate.so"
    compiler = shutil.which("cc")
    if compiler is None:
        raise CommandError(
            f"{UML} on a processor with AMX needs a C compiler: install the Debian packages gcc and libc6-dev, or take --guest=qemu"
        )
    done = subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", "-o", library, XSTATE], stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    if done.returncode:
        raise CommandError(f"{compiler} failed on {XSTATE.name}, which {UML} needs on a processor with AMX: {done.stderr.strip()}")
    return {"LD_PRELOAD": str(library)}
