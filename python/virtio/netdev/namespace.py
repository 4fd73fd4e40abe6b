"""Network namespaces without a name: each is held by a descriptor, and ends with it.

    with Namespace() as far, far.entered():
        subprocess.run(["ip", "link"])  # sees nothing but its own loopback interface

Making one needs CAP_SYS_ADMIN; `unshare_as_user` gives a process that to any user, if the kernel's settings allow it.
"""

import ctypes
import errno
import fcntl
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Final, Self

from virtio import arguments
from virtio.errors import StatusError

CLONE_NEWNS: Final = 0x0002_0000
CLONE_NEWUSER: Final = 0x1000_0000
CLONE_NEWPID: Final = 0x2000_0000
CLONE_NEWNET: Final = 0x4000_0000

_SIOCGIFFLAGS: Final = 0x8913
_SIOCSIFFLAGS: Final = 0x8914
_IFF_UP: Final = 1
_OWN: Final = "/proc/thread-self/ns/net"
_COUNTERS: Final = {"received_bytes": 0, "received_frames": 1, "received_drops": 3, "sent_bytes": 8, "sent_frames": 9, "sent_drops": 11}

_libc = ctypes.CDLL(None, use_errno=True)


class NamespaceError(OSError):
    """A namespace cannot be had, or is none; says why in one line."""

    def __str__(self) -> str:
        return str(self.strerror)


def unshare(flags: int) -> None:
    """Gives the calling thread new namespaces (CLONE_NEW...). NamespaceError: that cannot be."""
    _call("unshare", _libc.unshare(flags))


def setns(descriptor: int, flags: int) -> None:
    """Moves the calling thread into a namespace. NamespaceError: that cannot be, or the descriptor is not one's."""
    _call("setns", _libc.setns(descriptor, flags))


def _call(name: str, result: int) -> None:
    if result:
        number = ctypes.get_errno()
        raise NamespaceError(number, f"{name}: {os.strerror(number)}")


def _why_not(number: int) -> str:
    """Why there is no new namespace, and what would help."""
    match number:
        case errno.EPERM:
            return f"{os.strerror(number)}: run it as root, or in a user namespace, by unshare -Urn COMMAND"
        case errno.ENOSPC | errno.EUSERS:  # "no space left on device" is about no device
            return "as many are in use as /proc/sys/user/max_net_namespaces and its neighbours allow"
    return os.strerror(number)


def unshare_as_user(flags: int) -> None:
    """As `unshare`, in a user namespace of its own if the process may not otherwise; it then is root there, and nobody elsewhere.

    Only in a process of a single thread. NamespaceError: that cannot be had.
    """
    user, group = os.geteuid(), os.getegid()
    try:
        unshare(flags)
        return
    except NamespaceError as error:
        if error.errno != errno.EPERM:
            raise NamespaceError(error.errno, f"no namespaces to be had: {_why_not(error.errno or 0)}") from None
    try:
        unshare(CLONE_NEWUSER | flags)
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    except OSError as error:
        number = error.errno or 0
        why = os.strerror(number) if number == errno.EPERM else _why_not(number)
        text = f"this user may have no user and network namespace of its own ({why}): run it as root"
        raise NamespaceError(number, text) from None


@contextmanager
def inside(namespace: int) -> Iterator[None]:
    """The calling thread, and processes that it starts, are in this network namespace while the context lasts.

    NamespaceError: `namespace` is not a descriptor of one, or it may not be entered.
    """
    before = os.open(_OWN, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            setns(namespace, CLONE_NEWNET)
        except NamespaceError as error:
            number = error.errno or 0
            why = "it may not be entered" if number == errno.EPERM else "there is no network namespace behind that descriptor"
            raise NamespaceError(number, f"namespace {namespace}: {why} ({os.strerror(number)})") from None
        try:
            yield
        finally:
            setns(before, CLONE_NEWNET)
    finally:
        os.close(before)


def bring_up(name: str) -> None:
    """Brings an interface of the calling thread's namespace up. OSError: it is not there, or that is not allowed."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        answer = fcntl.ioctl(any_socket, _SIOCGIFFLAGS, struct.pack("16s24x", os.fsencode(name)))
        (flags,) = struct.unpack_from("H", answer, 16)
        if not flags & _IFF_UP:
            fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sH22x", os.fsencode(name), flags | _IFF_UP))


class Namespace:
    """A network namespace of one's own, with its loopback interface up, as long as this or a process or an interface in it lasts."""

    def __init__(self) -> None:
        """The calling thread stays where it was. NamespaceError: it cannot be had."""
        self._descriptor = -1
        before = os.open(_OWN, os.O_RDONLY | os.O_CLOEXEC)
        try:
            try:
                unshare(CLONE_NEWNET)
            except NamespaceError as error:
                raise NamespaceError(error.errno, f"no network namespace to be had: {_why_not(error.errno or 0)}") from None
            try:
                self._descriptor = os.open(_OWN, os.O_RDONLY | os.O_CLOEXEC)
                bring_up("lo")
            finally:
                setns(before, CLONE_NEWNET)
        except BaseException:
            self.close()
            raise
        finally:
            os.close(before)

    def fileno(self) -> int:
        """Its descriptor, for `setns`, and for a `Netdev`. StatusError: it is closed."""
        if self._descriptor < 0:
            raise StatusError("the namespace is closed")
        return self._descriptor

    @contextmanager
    def entered(self) -> Iterator[Self]:
        """The calling thread, and processes that it starts, are inside while the context lasts."""
        with inside(self.fileno()):
            yield self

    def counters(self, interface: str) -> dict[str, int]:
        """What the kernel counted at an interface: frames, bytes and drops that it received and sent; zeros if it is not there."""
        with self.entered(), open("/proc/thread-self/net/dev") as file:
            for line in file:
                name, _, numbers = line.partition(":")
                if name.strip() == interface:
                    found = numbers.split()
                    return {key: int(found[place]) for key, place in _COUNTERS.items()}
        return dict.fromkeys(_COUNTERS, 0)

    def close(self) -> None:
        """Lets go of it. Closing twice is closing once."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        with suppress(AttributeError, OSError):
            self.close()


def copied(namespace: int | Namespace) -> int:
    """A descriptor of one's own of the same. TypeError: no namespace. ValueError, NamespaceError, StatusError: no open one."""
    if not isinstance(namespace, int) and not hasattr(namespace, "fileno"):
        raise arguments.wrong_type("namespace", namespace, "a Namespace, or a namespace's descriptor")
    descriptor = arguments.integer("namespace", namespace, 0, (1 << 31) - 1) if isinstance(namespace, int) else namespace.fileno()
    try:
        return os.dup(descriptor)
    except OSError as error:
        raise NamespaceError(error.errno, f"namespace {descriptor}: {os.strerror(error.errno or 0)}") from None
