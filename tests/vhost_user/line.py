"""Back-ends in forks of this process, the next as soon as one has died, until standard input ends. `program` is one of `PROGRAMS`."""

import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable

from virtio import Burst, Chain, DeviceQueue, NetDevice
from virtio.device import Device
from virtio.netdev import Netdev
from virtio.vhost_user.backend import Backend

RESPONSE = b"answer: "


class Shuffler(Device):
    """Answers each request with its own first 8 bytes, in any order. Notes in a file which requests it has seen."""

    device_id = 42
    queues = ("requestq",)

    def __init__(self, notes: str) -> None:
        super().__init__()
        self.dice = random.Random(os.getpid())
        self.notes = os.open(notes, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(self.notes, b"began\n")

    def on_requestq(self, queue: DeviceQueue) -> None:
        """Keeps some back while more come."""
        held: list[tuple[Chain, bytes]] = []
        while new := [(chain, chain.read(8)) for chain in queue.pop(limit=self.dice.randrange(1, 20))]:
            os.write(self.notes, b"".join(b"%d\n" % int.from_bytes(data, "little") for _, data in new))
            held += new
            self.dice.shuffle(held)
            self.answer(queue, held, self.dice.randrange(len(held) + 1))
        self.answer(queue, held, len(held))

    def answer(self, queue: DeviceQueue, held: list[tuple[Chain, bytes]], count: int) -> None:
        """Some of them, shown one by one or together."""
        for _ in range(count):
            chain, data = held.pop()
            queue.complete(chain, chain.write(RESPONSE + data))
            if self.dice.random() < 0.3:
                queue.publish()
                time.sleep(self.dice.random() * 0.0002)  # so that it is not done whenever it is killed
        queue.publish()


class Echo(NetDevice):
    """Sends everything back."""

    def on_frames(self, burst: Burst) -> None:
        """What the driver has no buffers for waits for them: nothing is lost."""
        while burst.count:
            self.send(burst)


_kept: list[Netdev] = []


def pump(namespace: str) -> Device:
    """Moves frames between the rings and `tap0` there, which outlives it."""
    device = NetDevice()
    _kept.append(Netdev(device, "tap0", namespace=int(namespace), existing=True))
    _kept[0].follow()
    return device


PROGRAMS: dict[str, Callable[..., Device]] = {
    "shuffler": Shuffler,
    "echo": lambda: Echo(mac=bytes.fromhex("525400000001"), slots=256),
    "pump": pump,
}


def main(program: str, path: str, *arguments: str) -> None:
    """Ends, with the fork that runs, when standard input does."""
    child = 0

    def watch() -> None:
        sys.stdin.buffer.read()
        os.kill(child, signal.SIGKILL)
        os._exit(0)

    first = True
    while True:
        child = os.fork()
        if not child:
            with Backend(path, PROGRAMS[program](*arguments), connect=True) as backend:
                backend.serve()
            os._exit(1)
        if first:  # a thread would not survive the fork, nor be needed there
            first = False
            threading.Thread(target=watch, daemon=True).start()
        os.waitpid(child, 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
