"""What the kernel tells of a TUN or TAP interface that is there, by rtnetlink: whose it is, and how many queues programs have of it."""

import socket
import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

_RTM_NEWLINK: Final = 16
_RTM_GETLINK: Final = 18
_NLM_F_REQUEST: Final = 1
_LINKINFO: Final = 18
_INFO_DATA: Final = 2
_OWNER, _GROUP, _QUEUES, _DISABLED = 1, 2, 8, 9
_HEADER: Final = struct.Struct("=IHHII")
_LINK: Final = struct.Struct("=BxHiII")
_ATTRIBUTE: Final = struct.Struct("=HH")
_NESTED: Final = 0x8000


class TunInfo(NamedTuple):
    """Numbers of the user and the group that may open it (None: any), and queues that are open (0 of one without multi_queue)."""

    owner: int | None
    group: int | None
    queues: int


def tun_info(name: str) -> TunInfo | None:
    """Of that in the calling thread's network namespace. None: there is none, it is of another kind, or the kernel is silent."""
    try:
        request = _LINK.pack(socket.AF_UNSPEC, 0, socket.if_nametoindex(name), 0, 0)
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as link:
            link.settimeout(1.0)
            link.sendto(_HEADER.pack(_HEADER.size + len(request), _RTM_GETLINK, _NLM_F_REQUEST, 1, 0) + request, (0, 0))
            answer = link.recv(1 << 16)
    except OSError:
        return None
    if len(answer) < _HEADER.size or _HEADER.unpack_from(answer)[1] != _RTM_NEWLINK:
        return None
    about = dict(_attributes(dict(_attributes(answer[_HEADER.size + _LINK.size :])).get(_LINKINFO, b"")))
    if about.get(1, b"").rstrip(b"\0") != b"tun":
        return None
    found = {kind: int.from_bytes(value, "little") for kind, value in _attributes(about.get(_INFO_DATA, b""))}
    return TunInfo(found.get(_OWNER), found.get(_GROUP), found.get(_QUEUES, 0) + found.get(_DISABLED, 0))


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Kinds and values, as they follow each other, each padded to four bytes."""
    while len(data) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(data)
        if length < _ATTRIBUTE.size:
            return
        yield kind & ~_NESTED, data[_ATTRIBUTE.size : length]
        data = data[length + -length % 4 :]
