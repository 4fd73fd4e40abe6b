"""TAP interfaces: made, told what offloads they may use, given an address, brought up. By ioctls: nothing but the kernel is needed."""

import errno
import fcntl
import os
import socket
import struct
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from ipaddress import IPv4Interface, IPv6Interface, ip_interface
from typing import Final

from virtio import arguments
from virtio.features import Features
from virtio.netdev.namespace import bring_up, inside
from virtio.netdev.tun_info import tun_info

TUN: Final = "/dev/net/tun"
MAX_QUEUES: Final = 256
"""Queues of a TAP, at most."""
LONGEST_NAME: Final = 15
"""Bytes of an interface's name, at most."""

_TUNSETIFF: Final = 0x4004_54CA
_TUNSETOFFLOAD: Final = 0x4004_54D0
_TUNSETQUEUE: Final = 0x4004_54D9
_TUNSETVNETHDRSZ: Final = 0x4004_54D8
_TUNGETVNETHDRSZ: Final = 0x8004_54D7
_TUNSETCARRIER: Final = 0x4004_54E2
_IFF_TAP: Final = 2
_IFF_MULTI_QUEUE: Final = 0x0100
_IFF_ATTACH_QUEUE: Final = 0x0200
_IFF_DETACH_QUEUE: Final = 0x0400
_IFF_NO_PI: Final = 0x1000
_IFF_VNET_HDR: Final = 0x4000
_SIOCSIFADDR: Final = 0x8916
_SIOCSIFNETMASK: Final = 0x891C
_SIOCGIFMTU: Final = 0x8921
_SIOCSIFMTU: Final = 0x8922
_SIOCSIFHWADDR: Final = 0x8924
_SIOCGIFHWADDR: Final = 0x8927
_SIOCGIFINDEX: Final = 0x8933
_ARPHRD_ETHER: Final = 1

_CSUM: Final = 1
_TSO4: Final = 2
_TSO6: Final = 4
_ECN: Final = 8
_USO: Final = 0x60
"""USO4 and USO6: the kernel takes both or neither."""
SEGMENTATION: Final = _TSO4 | _TSO6 | _USO
"""Those that make a TAP's frames as long as 64 KiB."""

# What a TAP may leave undone is what the frames' taker said it completes: for each the feature bits (5.1.3) that it needs.
_TO_DEVICE: Final = {_CSUM: (0,), _TSO4: (11,), _TSO6: (12,), _ECN: (13,), _USO: (56,)}
_TO_DRIVER: Final = {_CSUM: (1,), _TSO4: (7,), _TSO6: (8,), _ECN: (9,), _USO: (54, 55)}


class TapError(OSError):
    """An interface cannot be had; says why in one line, with what would help."""

    def __str__(self) -> str:
        return str(self.strerror)


class TapPermissionError(TapError, PermissionError):
    """/dev/net/tun is closed to this user, or the user may not make interfaces in this namespace."""


class NameTakenError(TapError, FileExistsError):
    """An interface of that name is there already, or in use."""


def check_name(name: str) -> str:
    """`name`, if an interface may be called so. ValueError: empty, longer than 15 bytes, or with a character that no name has.

    TypeError: no string.
    """
    data = os.fsencode(arguments.instance("interface name", name, str, "a string"))
    if not 1 <= len(data) <= LONGEST_NAME:
        raise ValueError(f"interface name {name!r} has {len(data)} bytes: it may have 1 to {LONGEST_NAME}")
    if name in (".", "..") or any(byte in b"/:%\0" or byte <= 0x20 for byte in data):
        raise ValueError(f"interface name {name!r} is '.' or '..', or has one of '/', ':', '%', or a blank in it")
    return name


def open_tap(name: str, *, namespace: int | None = None, header: bool = True, existing: bool = False) -> int:
    """Makes a TAP interface; returns its descriptor, which does not block. The interface ends when that is closed.

    With `existing` one that is there and persistent, and that nobody has open, is taken, and stays, whether it was made for several
    queues or not; if there is none, one is made.
    `namespace` is a descriptor of the network namespace where it is to be: without it, that of the calling thread. With `header` each frame
    has a header before it (IFF_VNET_HDR). ValueError: no such name can be. TapPermissionError, NameTakenError, TapError: it cannot be had.
    """
    return open_queues(name, 1, namespace=namespace, header=header, existing=existing)[0]


def open_queues(name: str, queues: int, *, namespace: int | None = None, header: bool = True, existing: bool = False) -> list[int]:
    """As `open_tap`, with so many queues (`MAX_QUEUES` at most), a descriptor each. The kernel sends a flow to the queue where it wrote."""
    found: list[int] = []
    try:
        for _ in range(queues):
            found.append(_open_queue(name, namespace, header=header, several=queues > 1, existing=existing or bool(found)))
        if existing:
            with _in(namespace):
                about = tun_info(name)
            if about is not None and about.queues > queues:  # one with multi_queue takes everybody, and deals frames out among them
                raise NameTakenError(errno.EBUSY, f"interface {name} is in use: another program has it")
    except BaseException:
        for descriptor in found:
            os.close(descriptor)
        raise
    return found


def _open_queue(name: str, namespace: int | None, *, header: bool, several: bool, existing: bool) -> int:
    data = os.fsencode(check_name(name))
    flags = _IFF_TAP | _IFF_NO_PI | (_IFF_VNET_HDR if header else 0) | (_IFF_MULTI_QUEUE if several else 0)
    with _in(namespace):
        try:
            tap = os.open(TUN, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            number = error.errno or 0
            if number in (errno.EACCES, errno.EPERM):
                text = f"{TUN} is closed to this user ({error.strerror}): its mode has to be 0666, or run it as root"
                raise TapPermissionError(number, text) from None
            raise TapError(number, f"{TUN} cannot be opened ({error.strerror}): the kernel's module tun is not there") from None
        try:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
                if not existing and _exists(any_socket, name):  # one that is persistent and free would be taken over, not made
                    raise NameTakenError(errno.EEXIST, f"interface {name} is there already: choose another name")
            try:
                fcntl.ioctl(tap, _TUNSETIFF, struct.pack("16sH22x", data, flags))
            except OSError as error:
                if not existing or several or error.errno != errno.EINVAL:
                    raise
                fcntl.ioctl(tap, _TUNSETIFF, struct.pack("16sH22x", data, flags | _IFF_MULTI_QUEUE))  # one that was made for several
        except OSError as error:
            os.close(tap)
            raise (_not_taken(name, error, several=several) if existing else _refused(name, error)) from None
    return tap


def _in(namespace: int | None) -> AbstractContextManager[None]:
    return nullcontext() if namespace is None else inside(namespace)


def _refused(name: str, error: OSError) -> OSError:
    number = error.errno or 0
    if isinstance(error, TapError):
        return error
    if number == errno.EPERM:
        text = f"interface {name} cannot be made: this user may not make interfaces here (CAP_NET_ADMIN): unshare -Urn COMMAND would help"
        return TapPermissionError(number, text)
    if number in (errno.EBUSY, errno.EEXIST):
        return NameTakenError(number, f"interface {name} is there already: choose another name")
    return TapError(number, f"interface {name} cannot be made: {error.strerror}")


def _not_taken(name: str, error: OSError, *, several: bool) -> OSError:
    number = error.errno or 0
    if number == errno.EBUSY:
        return NameTakenError(number, f"interface {name} is in use: another program has it")
    if number == errno.EINVAL:
        kind = "TAP for several queues (multi_queue)" if several else "TAP"
        return NameTakenError(number, f"interface {name} is there already, and is no {kind}: choose another name")
    if number == errno.EPERM and (about := tun_info(name)) is not None:
        whose = [f"{kind} {found}" for kind, found in (("user", about.owner), ("group", about.group)) if found is not None]
        return TapPermissionError(number, f"interface {name} is for {' and '.join(whose)}, or who has CAP_NET_ADMIN: choose another name")
    return _refused(name, error)


def _exists(any_socket: socket.socket, name: str) -> bool:
    try:
        fcntl.ioctl(any_socket, _SIOCGIFINDEX, struct.pack("16s24x", os.fsencode(name)))
    except OSError as error:
        if error.errno == errno.ENODEV:
            return False
        raise
    return True


def offloads(features: Features, *, driver: bool) -> int:
    """What a TAP may leave to others, as TUNSETOFFLOAD counts it, if its frames go to the device (`driver`), or else to the driver."""
    found = sum(bit for bit, needs in (_TO_DEVICE if driver else _TO_DRIVER).items() if all(need in features for need in needs))
    if not found & _CSUM:
        return 0
    return found if found & (_TSO4 | _TSO6) else found & ~_ECN


def set_offloads(tap: int, header_size: int, wanted: int) -> int:
    """Tells a TAP how long its headers are, and what it may leave to others; returns what of that the kernel took."""
    fcntl.ioctl(tap, _TUNSETVNETHDRSZ, struct.pack("i", header_size))
    try:
        fcntl.ioctl(tap, _TUNSETOFFLOAD, wanted)
    except OSError as error:
        if error.errno != errno.EINVAL or not wanted & _USO:
            raise
        wanted &= ~_USO  # kernels before 6.2
        fcntl.ioctl(tap, _TUNSETOFFLOAD, wanted)
    return wanted


def attach_queue(tap: int, attached: bool) -> None:
    """Has the kernel send frames to this queue, or not any more; nothing is written to a queue either that is not attached."""
    fcntl.ioctl(tap, _TUNSETQUEUE, struct.pack("16sH22x", b"", _IFF_ATTACH_QUEUE if attached else _IFF_DETACH_QUEUE))


def set_carrier(tap: int, up: bool) -> None:
    """Plugs the cable in, or pulls it."""
    fcntl.ioctl(tap, _TUNSETCARRIER, struct.pack("i", up))


def announce(tap: int, mac: bytes) -> None:
    """Has the network learn where an address lives now: a broadcast RARP request (RFC 903) of `mac` for itself, as if it had sent that.

    For a TAP whose frames have headers.
    """
    (header_size,) = struct.unpack("i", fcntl.ioctl(tap, _TUNGETVNETHDRSZ, bytes(4)))
    body = struct.pack(">HHBBH", 1, 0x0800, 6, 4, 3) + 2 * (mac + bytes(4))
    os.write(tap, bytes(header_size) + (b"\xff" * 6 + mac + b"\x80\x35" + body).ljust(60, b"\0"))


class Interface:
    """An interface of a namespace, by name. Every call may raise an OSError: it is gone, or the kernel does not allow it."""

    def __init__(self, name: str, namespace: int | None = None) -> None:
        self.name = name
        self._namespace = namespace

    @property
    def mac(self) -> bytes:
        """Its Ethernet address."""
        return self._ask(socket.AF_INET, _SIOCGIFHWADDR, struct.pack("24x"))[18:24]

    @mac.setter
    def mac(self, mac: bytes) -> None:
        self._ask(socket.AF_INET, _SIOCSIFHWADDR, struct.pack("H6s16x", _ARPHRD_ETHER, mac))

    @property
    def mtu(self) -> int:
        """Bytes of the longest packet in a frame."""
        (found,) = struct.unpack_from("i", self._ask(socket.AF_INET, _SIOCGIFMTU, bytes(24)), 16)
        return int(found)

    def set_mtu(self, mtu: int) -> None:
        """Sets that. What is so already is left alone."""
        if mtu != self.mtu:
            self._ask(socket.AF_INET, _SIOCSIFMTU, struct.pack("i20x", mtu))

    def up(self) -> None:
        """Brings it up."""
        with self._inside():
            bring_up(self.name)

    def add_addresses(self, addresses: Iterable[str]) -> None:
        """Gives it addresses with their prefix lengths, "192.0.2.1/24" or "2001:db8::1/64"; one of IPv4 at most. ValueError: not such."""
        for address in addresses:
            match ip_interface(address):
                case IPv4Interface() as four:
                    for request, part in ((_SIOCSIFADDR, four.ip), (_SIOCSIFNETMASK, four.netmask)):
                        self._ask(socket.AF_INET, request, struct.pack("HH4s16x", socket.AF_INET, 0, part.packed))
                case IPv6Interface() as six:
                    answer = self._ask(socket.AF_INET6, _SIOCGIFINDEX, bytes(24))
                    (index,) = struct.unpack_from("i", answer, 16)
                    self._call(socket.AF_INET6, _SIOCSIFADDR, struct.pack("16sIi", six.ip.packed, six.network.prefixlen, index))

    def _ask(self, family: int, request: int, rest: bytes) -> bytes:
        return self._call(family, request, struct.pack("16s", os.fsencode(self.name)) + rest)

    def _call(self, family: int, request: int, argument: bytes) -> bytes:
        with self._inside(), socket.socket(family, socket.SOCK_DGRAM) as any_socket:
            return fcntl.ioctl(any_socket, request, argument)

    def _inside(self) -> AbstractContextManager[None]:
        return _in(self._namespace)


def each(addresses: str | Iterable[str] | None) -> tuple[str, ...]:
    """One address, several or none, checked. ValueError: not an address with its prefix length, or two of IPv4. TypeError: no string."""
    if addresses is None:
        return ()
    found = arguments.strings("address", [addresses] if isinstance(addresses, str) else addresses, "'198.51.100.1/24'")
    for address in found:
        if "/" not in address:
            raise ValueError(f"address {address!r} has no prefix length, as '198.51.100.1/24' has")
    if sum(isinstance(ip_interface(address), IPv4Interface) for address in found) > 1:
        raise ValueError(f"address {found} has more than one of IPv4")
    return tuple(found)
