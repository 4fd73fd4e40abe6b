"""TCP streams between a guest and the far end of its cable, for as long as a test likes; every byte is compared."""

import hashlib
import os
import socket
import threading
import time

from tests.guest.far import FAR
from tests.guest.machines import Machine
from virtio.netdev import Namespace

BLOCK = "".join(f"{number}\n" for number in range(1, 10001)).encode()
"""What `seq 1 10000` prints."""


class Streams:
    """A TCP stream from the guest, compared byte for byte as it comes, and one to it, whose digest the guest tells at its end."""

    def __init__(self, machine: Machine, namespace: Namespace) -> None:
        self._machine = machine
        with namespace.entered():
            self._listeners = [socket.create_server((FAR, port)) for port in (5001, 5002)]
        self.up = self.down = 0
        """Bytes that came, and that were taken to be sent."""
        self.wrong: str | None = None
        self._digest = hashlib.md5(usedforsecurity=False)
        self._over = threading.Event()
        works = zip((self._take, self._give), self._listeners, strict=True)
        self._threads = [threading.Thread(target=work, args=(listener,), daemon=True) for work, listener in works]
        for thread in self._threads:
            thread.start()
        machine.read(f"(while [ ! -e /tmp/stop ]; do seq 1 10000; done | nc {FAR} 5001) & sleep 0")
        machine.read(f"(nc {FAR} 5002 </dev/null | md5sum >/tmp/sum) & sleep 0")

    def _take(self, listener: socket.socket) -> None:
        connected, _ = listener.accept()
        with connected:
            while data := connected.recv(1 << 16):
                place = self.up % len(BLOCK)
                if data != (BLOCK * (len(data) // len(BLOCK) + 2))[place : place + len(data)]:
                    self.wrong = f"at byte {self.up}: {data[:40]!r}"
                    return
                self.up += len(data)

    def _give(self, listener: socket.socket) -> None:
        connected, _ = listener.accept()
        with connected:
            while not self._over.is_set():
                data = os.urandom(1 << 14)
                connected.sendall(data)
                self._digest.update(data)
                self.down += len(data)

    def until_moved(self, more: int) -> None:
        """Waits until so many bytes have passed each way since now."""
        up, down, limit = self.up + more, self.down + more, time.monotonic() + 60
        while self.up < up or self.down < down:
            assert self.wrong is None, self.wrong
            assert time.monotonic() < limit, f"{self.up} of {up} bytes up, {self.down} of {down} down"
            time.sleep(0.005)

    def end(self) -> None:
        """Both end, and all of it was as it should be."""
        self._over.set()
        self._machine.read("touch /tmp/stop")
        assert self._machine.run("wait", limit=120)[0] == 0
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive()
        assert self.wrong is None, self.wrong
        assert self._machine.read("cat /tmp/sum").split()[0] == self._digest.hexdigest()
        for listener in self._listeners:
            listener.close()
