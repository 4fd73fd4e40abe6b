"""Two network namespaces without a name, TAP interfaces in them, and programs that run there. All of it ends with this process."""

import errno
import fcntl
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, Self

from virtio.cli.output import CommandError
from virtio.cli.worker import CLONE_NEWNET, setns, unshare

TUN: Final = "/dev/net/tun"
_TUNSETIFF: Final = 0x4004_54CA
_IFF_TAP: Final = 2
_IFF_NO_PI: Final = 0x1000
IFF_VNET_HDR: Final = 0x4000
_SIOCGIFFLAGS: Final = 0x8913
_SIOCSIFFLAGS: Final = 0x8914
_SIOCSIFADDR: Final = 0x8916
_SIOCSIFNETMASK: Final = 0x891C
_SIOCSIFMTU: Final = 0x8922
_SIOCSIFHWADDR: Final = 0x8924
_IFF_UP: Final = 1
_ARPHRD_ETHER: Final = 1
_COUNTERS: Final = {"received_bytes": 0, "received_frames": 1, "received_drops": 3, "sent_bytes": 8, "sent_frames": 9, "sent_drops": 11}


class Namespace:
    """A network namespace, kept by a descriptor of ours."""

    def __init__(self) -> None:
        """Makes it, with its loopback interface up; the calling thread stays where it was. OSError: it cannot be had."""
        before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            unshare(CLONE_NEWNET)
            self._descriptor = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            _change_flags("lo", _IFF_UP)
        finally:
            setns(before, CLONE_NEWNET)
            os.close(before)

    @contextmanager
    def entered(self) -> Iterator[Self]:
        """The calling thread, and processes that it starts, are inside while the context lasts."""
        before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            setns(self._descriptor, CLONE_NEWNET)
            yield self
        finally:
            setns(before, CLONE_NEWNET)
            os.close(before)

    def counters(self, interface: str) -> dict[str, int]:
        """What the kernel counted at an interface: frames and bytes are those that it received and sent."""
        with self.entered(), open("/proc/thread-self/net/dev") as file:
            for line in file:
                name, _, numbers = line.partition(":")
                if name.strip() == interface:
                    found = numbers.split()
                    return {key: int(found[place]) for key, place in _COUNTERS.items()}
        return dict.fromkeys(_COUNTERS, 0)


def open_tap(name: str, flags: int = 0) -> int:
    """A new TAP interface in the calling thread's namespace; it ends when the descriptor is closed. CommandError: it cannot be had."""
    try:
        descriptor = os.open(TUN, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM):
            raise CommandError(f"{TUN} is closed to this user ({error.strerror}): its mode has to be 0666, or run it as root") from None
        raise CommandError(f"{TUN} cannot be opened ({error.strerror}): the kernel's module tun is not there") from None
    try:
        fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TAP | _IFF_NO_PI | flags))
    except OSError as error:
        os.close(descriptor)
        raise CommandError(f"interface {name} cannot be made: {error.strerror}") from None
    return descriptor


def bring_up(name: str, address: str, *, mac: bytes | None = None, mtu: int = 1500) -> None:
    """Gives an interface of the calling thread's namespace an address of a /24, and brings it up. OSError: it cannot be."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for request, text in ((_SIOCSIFADDR, address), (_SIOCSIFNETMASK, "255.255.255.0")):
            if request == _SIOCSIFADDR and mac is not None:
                fcntl.ioctl(any_socket, _SIOCSIFHWADDR, struct.pack("16sH6s16x", name.encode(), _ARPHRD_ETHER, mac))
            fcntl.ioctl(any_socket, request, struct.pack("16sHH4s16x", name.encode(), socket.AF_INET, 0, socket.inet_aton(text)))
        fcntl.ioctl(any_socket, _SIOCSIFMTU, struct.pack("16si20x", name.encode(), mtu))
    _change_flags(name, _IFF_UP)


def _change_flags(name: str, flags: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        answer = fcntl.ioctl(any_socket, _SIOCGIFFLAGS, struct.pack("16sH22x", name.encode(), 0))
        (old,) = struct.unpack_from("H", answer, 16)
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sH22x", name.encode(), old | flags))
