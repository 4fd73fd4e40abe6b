"""What a Linux guest starts from: Debian's kernel, and an initial RAM disk of busybox, programs of this machine and the kernel's modules.

The RAM disk is a cpio archive (newc, as in the kernel's Documentation/driver-api/early-userspace/buffer-format.rst), not compressed: an
emulated processor takes longer to unpack it than this takes to be read.
"""

import lzma
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from virtio.cli.output import CommandError

KERNEL_PACKAGE: Final = "linux-image-cloud-amd64"
CLONE: Final = Path(__file__).resolve().parents[3]
"""Where the project is, if the package was not installed but is used from there."""
MODULES: Final = ("virtio_pci", "virtio_net")
"""What a guest with our network device loads, after what these need."""
PROGRAMS: Final = {"busybox": "busybox-static", "ping": "iputils-ping", "iperf3": "iperf3"}
"""Programs in the RAM disk, and the Debian packages that have them."""
_DEPENDS: Final = re.compile(rb"\0depends=([^\0]*)\0")
_TRAILER: Final = "TRAILER!!!"
_BLOCK: Final = 512


class Kernel(NamedTuple):
    """A kernel's image, its modules, and its release ("6.1.0-56-cloud-amd64")."""

    image: Path
    modules: Path
    release: str


def places() -> list[Path]:
    """Where kernels are looked for: where scripts/guest.sh unpacks one, in the environment of this Python; then what is installed."""
    return [Path(sys.prefix) / "guest", Path("/")]


def find_kernel(where: Path | None = None) -> Kernel:
    """The newest kernel in `where`, a folder with boot/ and lib/modules/ (a package that was unpacked), or in the first of `places`.

    CommandError: there is none, or it cannot be read.
    """
    for root in places() if where is None else [where]:
        found = []
        for image in root.glob("boot/vmlinuz-*"):
            release = image.name.removeprefix("vmlinuz-")
            folders = [folder for lib in ("lib", "usr/lib") if (folder := root / lib / "modules" / release).is_dir()]
            if folders:
                found.append(Kernel(image, folders[0], release))
        if found:
            return max(found, key=lambda kernel: [int(each) for each in re.findall(r"\d+", kernel.release)])
    if where is None:
        ours = f"make guest-tools in {CLONE} unpacks one, or " if (CLONE / "scripts/guest.sh").exists() else ""
        raise CommandError(
            f"no kernel for the guest: {ours}install the Debian package {KERNEL_PACKAGE}, "
            "or unpack what that depends on (dpkg-deb -x) and name the folder by --kernel"
        )
    raise CommandError(f"no kernel in {where}: unpack the Debian package that {KERNEL_PACKAGE} depends on there (dpkg-deb -x)")


def modules_of(kernel: Kernel, names: Iterable[str], *, package: str = KERNEL_PACKAGE) -> list[Path]:
    """Files of these modules and of all that they need, in the order in which they are loaded; less what is in the kernel itself.

    CommandError: one is not there.
    """
    files = {module_name(path): path for path in kernel.modules.rglob("*.ko*")}
    builtin = kernel.modules / "modules.builtin"
    inside = {module_name(Path(line)) for line in builtin.read_text().split()} if builtin.exists() else set[str]()
    loaded: dict[str, Path] = {}

    def load(name: str) -> None:
        if name in loaded or name in inside:
            return
        if (path := files.get(name)) is None:
            raise CommandError(f"kernel {kernel.release} has no module {name}: install the Debian package {package}")
        needs = _DEPENDS.search(module_content(path))
        for each in needs[1].decode().split(",") if needs else ():
            if each:
                load(each.replace("-", "_"))
        loaded[name] = path

    for name in names:
        load(name)
    return list(loaded.values())


def module_name(path: Path) -> str:
    """What the kernel calls a module."""
    return path.name.split(".")[0].replace("-", "_")


def module_content(path: Path) -> bytes:
    """A module as insmod takes it. CommandError: it is compressed in a way that is not known here."""
    match path.suffix:
        case ".ko":
            return path.read_bytes()
        case ".xz":
            return lzma.decompress(path.read_bytes())
    raise CommandError(f"{path}: modules that are compressed as {path.suffix} cannot be read: use the Debian package {KERNEL_PACKAGE}")


def make_initrd(kernel: Kernel, start: str, *, modules: Sequence[str] = MODULES, programs: Iterable[str] = PROGRAMS) -> bytes:
    """A RAM disk that loads `modules` and goes on with `start`, lines of busybox's shell, as process 1.

    CommandError: a program or a module is not there.
    """
    archive = Archive()
    for folder in ("dev", "proc", "sys", "tmp", "usr/bin", "modules"):
        archive.folder(folder)
    names = list(programs)
    for name in names:
        archive.program(name, _program(name))
    lines = ["#!/bin/busybox sh", "export PATH=/bin:/usr/bin", "/bin/busybox --install -s /usr/bin"]
    lines += ["mount -t proc none /proc", "mount -t sysfs none /sys", "mount -t devtmpfs none /dev", "mount -t tmpfs none /tmp"]
    for path in modules_of(kernel, modules):
        name = f"modules/{module_name(path)}.ko"
        archive.file(name, module_content(path))
        lines.append(f"insmod /{name}")
    lines += [f'{name}() {{ /bin/{name} "$@"; }}' for name in names if name != "busybox"]  # whose shell would run its own ones
    archive.file("init", "\n".join([*lines, start, ""]).encode(), mode=0o755)
    return archive.pack()


def _program(name: str) -> Path:
    if (found := shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin:/usr/bin:/bin")) is None:
        raise CommandError(f"{name} not found: install the Debian package {PROGRAMS.get(name, name)}")
    return Path(found)


def libraries(program: Path) -> list[Path]:
    """The shared libraries that a program of this machine loads, its loader too; none if it needs none."""
    said = subprocess.run(
        ["ldd", program], stdin=subprocess.DEVNULL, capture_output=True, text=True, env={"LC_ALL": "C", "PATH": "/usr/bin:/bin"}
    )
    if "not found" in said.stdout:
        raise CommandError(f"{program} lacks a library: {next(line.strip() for line in said.stdout.splitlines() if 'not found' in line)}")
    return [Path(path) for path in re.findall(r"(?:=> |^\s+)(/\S+) \(0x", said.stdout, flags=re.MULTILINE)]


class Archive:
    """A cpio archive in the making; folders above a name are made as they are needed."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._names: set[str] = set()

    def folder(self, name: str) -> None:
        """A folder, if it is not there already."""
        if name and name not in self._names:
            self.folder(name.rpartition("/")[0])
            self._add(name, stat.S_IFDIR | 0o755, b"")

    def file(self, name: str, content: bytes, mode: int = 0o644) -> None:
        """A file. The first of a name stays."""
        if name not in self._names:
            self.folder(name.rpartition("/")[0])
            self._add(name, stat.S_IFREG | mode, content)

    def program(self, name: str, path: Path) -> None:
        """A program as /bin/`name`, and its libraries where it looks for them."""
        self.file(f"bin/{name}", path.read_bytes(), mode=0o755)
        for library in libraries(path):
            self.file(str(library).lstrip("/"), library.read_bytes(), mode=0o755)

    def pack(self) -> bytes:
        """The whole of it."""
        self._add(_TRAILER, 0, b"")
        data = b"".join(self._parts)
        return data + bytes(-len(data) % _BLOCK)

    def _add(self, name: str, mode: int, content: bytes) -> None:
        self._names.add(name)
        coded = name.encode() + b"\0"
        links = 2 if stat.S_ISDIR(mode) else 1
        # inode, mode, user, group, links, time, size, device, its minor number, special's, its minor number, length of the name, checksum
        numbers = (len(self._names), mode, 0, 0, links, 0, len(content), 0, 0, 0, 0, len(coded), 0)
        head = b"070701" + b"".join(b"%08x" % number for number in numbers) + coded
        self._parts += [head, bytes(-len(head) % 4), content, bytes(-len(content) % 4)]
