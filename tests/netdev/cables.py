"""Two namespaces, a device with its driver between them, and real traffic: sockets of the kernel's, made inside."""

from __future__ import annotations

import hashlib
import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from threading import Thread
from typing import Any, Self

from virtio import Feature, NetDevice, NetDriver, NetFeature
from virtio.devices.net import CHECKSUMS, GUEST_OFFLOADS, HOST_OFFLOADS
from virtio.netdev import SLOT_SIZE, Namespace, Netdev, NetdevPair
from virtio.pci.emulated import EmulatedFunction
from virtio.transport.loopback import LoopbackTransport
from virtio.transport.pci import PciTransport

OFFLOADS = GUEST_OFFLOADS | HOST_OFFLOADS | CHECKSUMS
NEAR, FAR = "192.0.2.1", "192.0.2.2"
PATIENCE = 60.0
"""Seconds after which a socket that hears nothing has failed."""
DATA = os.urandom(1 << 16) * 8


class Cable:
    """vn0 (driver) and peer0 (device), each in its namespace, with the ends of one device behind them. Not started."""

    def __init__(self, *features: int, ring_format: str = "split", transport: str = "loopback", **options: Any) -> None:
        self._stack = ExitStack()
        with ExitStack() as stack:
            self.near, self.far = stack.enter_context(Namespace()), stack.enter_context(Namespace())
            for namespace in (self.near, self.far):
                with namespace.entered():  # the kernel says nothing of its own accord
                    Path("/proc/sys/net/ipv6/conf/all/disable_ipv6").write_text("1")
                    Path("/proc/sys/net/ipv6/conf/default/disable_ipv6").write_text("1")
            self.device = NetDevice(**options)
            carrier: Any = LoopbackTransport(self.device) if transport == "loopback" else PciTransport(EmulatedFunction(self.device))
            stack.enter_context(carrier)
            self.wanted = {NetFeature.MAC, NetFeature.MTU, NetFeature.STATUS, Feature.EVENT_IDX, *features}
            if ring_format == "packed":
                self.wanted.add(Feature.RING_PACKED)
            self.driver = NetDriver(carrier, wanted=self.wanted, slots=64, slot_size=SLOT_SIZE)
            stack.enter_context(self.driver)
            self.vn0 = Netdev(self.driver, "vn0", namespace=self.near, address=f"{NEAR}/24")
            stack.enter_context(self.vn0)
            self.peer0 = Netdev(self.device, "peer0", namespace=self.far, address=f"{FAR}/24")
            stack.enter_context(self.peer0)
            self._stack = stack.pop_all()

    def pair(self) -> NetdevPair:
        """Both, started as a pair."""
        pair = Netdev.pair(self.vn0, self.peer0)
        self._stack.enter_context(pair)
        pair.start()
        return pair

    def ping(self, count: int = 3) -> str:
        """From vn0 to peer0; what ping says."""
        with self.near.entered():
            command = ["ping", "-n", "-c", str(count), "-i", "0.02", "-W", "30", FAR]
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120)
        assert done.returncode == 0 and f"{count} received" in done.stdout, done.stdout
        return done.stdout

    def transfer(self, *, back: bool = False, data: bytes = DATA) -> None:
        """Bytes over TCP between the namespaces: from the driver's to the device's, or `back`."""
        receiver, sender, address = (self.near, self.far, NEAR) if back else (self.far, self.near, FAR)
        with receiver.entered():
            server = socket.create_server((address, 0))
        with server, ExitStack() as stack:
            with sender.entered():
                client = socket.socket()
            stack.enter_context(client)
            server.settimeout(PATIENCE)
            client.settimeout(PATIENCE)
            client.connect(server.getsockname())
            other, _ = server.accept()
            stack.enter_context(other)
            other.settimeout(PATIENCE)

            def send() -> None:
                client.sendall(data)
                client.shutdown(socket.SHUT_WR)

            thread = Thread(target=send)
            thread.start()
            digest = hashlib.sha256()
            for part in received(other):
                digest.update(part)
            thread.join()
            assert digest.digest() == hashlib.sha256(data).digest()

    def close(self) -> None:
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def received(end: socket.socket) -> Iterator[bytes]:
    """What comes until the other end has no more."""
    while part := end.recv(1 << 18):
        yield part
