"""A back-end of ours in a process of its own, which a test may kill: `with Serving(path, "net") as backend`.

As a program: serves what the options tell, until it is killed, or standard input ends.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from virtio import Burst, NetDevice
from virtio.device import Device
from virtio.devices.rng import RngDevice
from virtio.features import Features
from virtio.vhost_user.backend import Backend
from virtio.vhost_user.connection import PROTOCOL

PATIENCE = 60.0
"""Seconds that anything may take before a test gives up."""


class Echo(NetDevice):
    """Sends back what it gets; what finds no room is lost, as on a wire."""

    def on_frames(self, burst: Burst) -> None:
        self.send(burst)


class Serving:
    """Our back-end in another process. It can be killed and started again at the same place."""

    def __init__(self, path: str, kind: str = "net", *, connect: bool = False, **options: Any) -> None:
        self.path, self.connect = path, connect
        self._arguments = [
            sys.executable,
            "-m",
            "tests.vhost_user.serving",
            json.dumps({"path": path, "kind": kind, "connect": connect, **options}),
        ]
        self.process: subprocess.Popen[str] | None = None
        self.start()

    def start(self) -> None:
        """Starts it; it listens when this returns (a connecting one connects whenever it can)."""
        self.process = subprocess.Popen(
            self._arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def tell(self, word: str) -> None:
        """Says something to it: "link down", for one."""
        assert self.process is not None and self.process.stdin is not None
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        """Ends it at once: nothing in it is tidied up."""
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait(PATIENCE)
            for stream in (self.process.stdin, self.process.stdout):
                assert stream is not None
                stream.close()
            self.process = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.kill()


def until(what: Any, patience: float = PATIENCE) -> None:
    """Waits until `what()` is true."""
    end = time.monotonic() + patience
    while not what():
        assert time.monotonic() < end, "nothing came of it"
        time.sleep(0.01)


def _device(kind: str, options: dict[str, Any]) -> Device:
    offered = options.get("offered")
    if kind == "rng":
        numbers = iter(range(1 << 62))
        return RngDevice(lambda count: bytes(next(numbers) % 251 for _ in range(count)))
    mac = bytes.fromhex(options.get("mac", "02000000aa01"))
    return Echo(
        mac=mac, mtu=options.get("mtu"), queue_pairs=options.get("queue_pairs", 1), offered=None if offered is None else Features(offered)
    )


def _listen_to_input(backend: Backend, device: Device) -> None:
    for line in sys.stdin:
        if isinstance(device, NetDevice) and line.startswith("link "):
            device.link = line.strip() == "link up"
    os._exit(0)  # whoever started this is gone


def _main() -> None:
    options = json.loads(sys.argv[1])
    device = _device(options["kind"], options)
    protocol = PROTOCOL if "protocol" not in options else Features(options["protocol"])
    with Backend(options["path"], device, options["connect"], protocol_features=protocol) as backend:
        print("ready", flush=True)
        threading.Thread(target=_listen_to_input, args=(backend, device), daemon=True).start()
        backend.serve()


if __name__ == "__main__":
    _main()
