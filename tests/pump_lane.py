"""Queues with pumps at both ends. Pairs of datagram sockets stand for the TAPs: both move whole frames."""

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator

from tests.pair import BASE
from virtio import BufferPool, DeviceQueue, DriverQueue, EventFd, Feature, Features, GuestMemory, Memory, NetFeature
from virtio._core import Pump, PumpRunner

HEADER = bytes(12)
TSO = (NetFeature.CSUM, NetFeature.GUEST_CSUM, NetFeature.HOST_TSO4, NetFeature.GUEST_TSO4)


class Tap:
    """A descriptor for a pump, and its far end."""

    def __init__(self) -> None:
        self.near, self.far = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        for end in (self.near, self.far):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        self.far.settimeout(60)

    def __del__(self) -> None:
        self.near.close()
        self.far.close()

    def send(self, frame: bytes, header: bytes = HEADER) -> None:
        self.far.send(header + frame)

    def receive(self) -> bytes:
        """The next frame, whose header claims nothing."""
        data = self.far.recv(1 << 17)
        assert data[:12] == HEADER
        return data[12:]


class Lane:
    """A queue with both its ends, their pumps, and a TAP at each: `way` is from the driver ("transmit") or to it ("receive")."""

    def __init__(self, ring_format: str, way: str, *more: int, size: int = 64, slots: int = 256, slot_size: int = 2048) -> None:
        packed = [Feature.RING_PACKED] if ring_format == "packed" else []
        self.features = Features({Feature.VERSION_1, *more, *packed})
        self.memory = Memory((1 << 20) + slots * slot_size)
        self.guest = GuestMemory()
        self.guest.add(BASE, self.memory)
        self.driver = DriverQueue(self.memory, size, features=self.features, address=BASE)
        self.device = DeviceQueue(self.guest, size, self.driver.areas, features=self.features)
        self.pool = BufferPool(self.memory, slots, slot_size=slot_size)
        self.doorbell, self.interrupt = EventFd(), EventFd()
        self.driver.connect(self.doorbell)
        self.device.connect(self.interrupt)
        self.near, self.far = Tap(), Tap()
        self.way = way
        make = Pump.driver_transmit if way == "transmit" else Pump.driver_receive
        tap = self.near.near.fileno()
        self.near_pump = make(self.driver, self.pool, tap, features=self.features, interrupt=self.interrupt)
        tap = self.far.near.fileno()
        if way == "transmit":
            self.far_pump = Pump.device_transmit(self.device, tap, features=self.features, doorbell=self.doorbell)
        else:
            self.far_pump = Pump.device_receive(self.device, tap, features=self.features, doorbell=self.doorbell, longest=65589)
        self.pumps = [self.near_pump, self.far_pump]
        self.source, self.sink = (self.near, self.far) if way == "transmit" else (self.far, self.near)


@contextlib.contextmanager
def running(*pumps: Pump) -> Iterator[PumpRunner]:
    """A runner in a thread; what its `run` raises is raised at the end."""
    runner, raised = PumpRunner(list(pumps)), list[BaseException]()

    def run() -> None:
        try:
            runner.run()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield runner
    finally:
        runner.stop()
        thread.join(60)
        assert not thread.is_alive()
    if raised:
        raise raised[0]


def until(condition: Callable[[], bool]) -> None:
    """Waits for what another thread does."""
    gate = threading.Event()
    for _ in range(6000):
        if condition():
            return
        gate.wait(0.01)
    raise AssertionError("it never happened")


def asleep(pump: Pump) -> None:
    """Waits until nothing moves any more."""
    seen: list[int] = []

    def quiet() -> bool:
        seen.append(pump.statistics["steps"])
        return len(seen) > 10 and len(set(seen[-10:])) == 1 and pump.statistics["sleeps"] > 0

    until(quiet)
