"""The other side of a guest's cable: our device on a back-end, its frames on a TAP in a namespace, and iperf3 that listens there.

`python far.py PATH FEATURES` does that in a process of its own, in the caller's network namespace, and can be killed. With a third word
each line of standard input kills it, and the next one serves at once: forks of one process, so that this is quick.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from threading import Thread
from types import TracebackType
from typing import Any, Self

from virtio import Feature, NetDevice, NetFeature
from virtio.devices.net import CHECKSUMS, GUEST_OFFLOADS, HOST_OFFLOADS
from virtio.features import Features
from virtio.netdev import Namespace, Netdev
from virtio.vhost_user.backend import Backend

NEAR, FAR = "192.0.2.1", "192.0.2.2"
"""Addresses of the guest, and of who is at the other end of its cable."""
PEER_MAC = bytes.fromhex("020000000002")
RINGS = Features({Feature.EVENT_IDX, Feature.INDIRECT_DESC, Feature.RING_RESET})


def device_for(rings: Features, *, offloads: bool = True, **options: Any) -> NetDevice:
    """A device that offers rings of one format, and all that it can do with frames, or all but checksums and segmentation."""
    unsaid = {bit for name, bit in (("mtu", NetFeature.MTU), ("speed", NetFeature.SPEED_DUPLEX)) if name not in options}
    features = Features(NetDevice.features) - unsaid - (() if offloads else GUEST_OFFLOADS | HOST_OFFLOADS | CHECKSUMS)
    return NetDevice(offered=RINGS | rings | features, **options)


class Far:
    """Serves at `path` in a thread until it is closed. `errors`: what it met meanwhile."""

    def __init__(self, path: str, device: NetDevice, *, namespace: Namespace | None = None) -> None:
        self.device = device
        self.errors: list[Exception] = []
        with ExitStack() as stack:
            self.namespace = stack.enter_context(Namespace()) if namespace is None else namespace
            self.peer = Netdev(device, "peer0", namespace=self.namespace, mtu=device.mtu, mac=PEER_MAC, address=f"{FAR}/24")
            stack.enter_context(self.peer)
            self.peer.follow(self.errors.append)
            self.backend = stack.enter_context(Backend(path, device, report=self.errors.append))
            thread = Thread(target=self.backend.serve)
            stack.callback(thread.join)
            stack.callback(self.backend.stop)
            thread.start()
            self._stack = stack.pop_all()

    @contextmanager
    def iperf3(self) -> Iterator[None]:
        """A server listens while the context lasts."""
        with listening(self.namespace):
            yield

    def close(self) -> None:
        """Ends it."""
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


@contextmanager
def listening(namespace: Namespace) -> Iterator[None]:
    """An iperf3 server in a namespace, which is ready."""
    words = ["iperf3", "-s", "--forceflush"]
    with namespace.entered():
        server = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert server.stdout is not None
    drain = Thread(target=server.stdout.read)
    try:
        said = next((line for line in server.stdout if "listening" in line), None)
        assert said is not None, "iperf3 does not listen"
        drain.start()
        yield
    finally:
        server.kill()
        server.wait()
        if drain.ident is not None:
            drain.join()
        server.stdout.close()


def main() -> None:
    """Serves for ever: whoever started it ends it."""
    device = device_for(Features.from_mask(int(sys.argv[2])))
    errors: list[Exception] = []
    with Netdev(device, "peer0", mac=PEER_MAC, address=f"{FAR}/24") as peer, Backend(sys.argv[1], device, report=errors.append) as backend:
        peer.follow(errors.append)
        print("serving", flush=True)
        backend.serve()


def again() -> None:
    """As `main`, over and over, until standard input ends."""
    while True:
        if not (child := os.fork()):
            main()
        more = sys.stdin.readline()
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if not more:
            return


if __name__ == "__main__":
    again() if len(sys.argv) > 3 else main()
