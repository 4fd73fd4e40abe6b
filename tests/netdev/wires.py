"""The far end of an interface: frames as bytes, sent and received at the interface itself."""

import socket
import struct
import subprocess
import time
from types import TracebackType
from typing import Self

from virtio.netdev import Namespace

KIND = 0x88B5
"""An Ethernet type for experiments: the kernel has no answer to it."""
PATIENCE = 60.0


class Wire:
    """At the interface `name` of a namespace, which is up. Frames are told apart by their numbers."""

    def __init__(self, namespace: Namespace, name: str) -> None:
        self._namespace, self._name = namespace, name
        with namespace.entered():
            self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(KIND))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        self._socket.bind((name, KIND))
        self._socket.settimeout(PATIENCE)

    def ready(self) -> "Wire":
        """Once the kernel has noticed that there is a cable: before, it drops what is sent."""
        deadline = time.monotonic() + PATIENCE
        while not carrier(self._namespace, self._name):
            assert time.monotonic() < deadline, f"{self._name} has no carrier"
            time.sleep(0.01)
        return self

    def send(self, number: int) -> None:
        """Through the interface, towards the device."""
        self._socket.send(frame(number))

    def receive(self, count: int) -> list[int]:
        """The numbers of the next frames that came out of the device."""
        found: list[int] = []
        while len(found) < count:
            data, address = self._socket.recvfrom(2048)
            if address[2] != socket.PACKET_OUTGOING:
                found.append(number_of(data))
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._socket.close()


def carrier(namespace: Namespace, name: str) -> bool:
    """Whether the kernel has noticed that there is a cable."""
    with namespace.entered():
        shown = subprocess.run(["ip", "-o", "link", "show", name], stdout=subprocess.PIPE, check=True, text=True).stdout
    return "NO-CARRIER" not in shown


def frame(number: int) -> bytes:
    """60 to 1500 bytes, with a number in it."""
    return b"\x02" * 12 + struct.pack(">HI", KIND, number) + bytes(42 + number * 37 % 1400)


def number_of(data: bytes) -> int:
    """Of a frame that is whole."""
    (number,) = struct.unpack_from(">I", data, 14)
    assert data == frame(number)
    return int(number)
