"""A port under several threads at once, and a device's port whose driver truncates its memory."""

import os
import threading
from collections import Counter
from collections.abc import Callable
from functools import partial

import pytest

from virtio import BufferPool, DeviceQueue, DriverQueue, Feature, Features, GuestMemory, Memory, NetDevice, NetDriver, SpecViolation
from virtio._core import DevicePort
from virtio.devices.net import WANTED
from virtio.transport.loopback import LoopbackTransport

THREADS = 4
EACH = 2_000


@pytest.mark.parametrize("by_bursts", [False, True], ids=["frames", "bursts"])
def test_four_threads_on_one_port_lose_and_double_nothing(ring_format: str, by_bursts: bool) -> None:
    """Four threads send to and receive from the driver's port, while one echoes at the device's."""
    device = NetDevice()
    wanted = WANTED - ([Feature.RING_PACKED] if ring_format == "split" else [])
    with LoopbackTransport(device) as transport, NetDriver(transport, wanted=wanted) as net:
        found: list[Counter[bytes]] = [Counter() for _ in range(THREADS)]
        errors: list[BaseException] = []
        left = threading.Semaphore(0)
        over = threading.Event()

        def work(number: int) -> None:
            frames = [number.to_bytes(2, "big") + each.to_bytes(4, "big") + bytes(54) for each in range(EACH)]
            burst = net.pool.burst(16)
            while not over.is_set():
                frames = frames[net.send_frames(frames[:16]) :]
                if by_bursts:
                    net.receive(burst)
                    got = [burst.tobytes(row) for row in range(burst.count)]
                else:
                    got = net.receive_frames(16)
                found[number].update(got)
                for _ in got:
                    left.release()

        def echo() -> None:
            burst = device.pool.burst(32)
            while not over.is_set():
                device.receive(burst)
                while burst.count and not over.is_set():
                    device.send(burst)

        def guarded(body: Callable[[], None]) -> None:
            try:
                body()
            except BaseException as error:
                errors.append(error)
                over.set()

        bodies = [echo, *(partial(work, number) for number in range(THREADS))]
        threads = [threading.Thread(target=guarded, args=(body,)) for body in bodies]
        for thread in threads:
            thread.start()
        for _ in range(THREADS * EACH):
            assert left.acquire(timeout=60), errors
        over.set()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
        assert not errors
        whole = sum(found, Counter())
        assert set(whole.values()) == {1}
        assert whole.keys() == {n.to_bytes(2, "big") + e.to_bytes(4, "big") + bytes(54) for n in range(THREADS) for e in range(EACH)}
        assert net.statistics["sent_frames"] == net.statistics["received_frames"] == THREADS * EACH


SIZE = 1 << 16
BASE = 1 << 32
DATA = BASE + SIZE


class Lost:
    """A device's port over a driver whose rings are in one file and buffers in another, both of which it can truncate."""

    def __init__(self, ring_format: str) -> None:
        self.files = [os.memfd_create(name) for name in ("rings", "data")]
        for file in self.files:
            os.ftruncate(file, SIZE)
        features = Features({Feature.VERSION_1, *([Feature.RING_PACKED] if ring_format == "packed" else [])})
        self.rings, self.data = (Memory.from_fd(file, SIZE) for file in self.files)
        guest = GuestMemory()
        guest.add(BASE, self.rings)
        guest.add(DATA, self.data)
        self.drivers = [DriverQueue(self.rings, 8, features=features, address=BASE) for _ in range(2)]
        self.queues = [DeviceQueue(guest, 8, driver.areas, features=features) for driver in self.drivers]
        self.port = DevicePort(self.queues[0], self.queues[1], features=features)
        self.pool = BufferPool(Memory(1 << 16), 16, slot_size=256)
        self.ring_format = ring_format

    def offer(self, queue: int, writable: bool) -> None:
        """One chain of 100 bytes in the second file."""
        descriptor, available, _ = (area - BASE for area in self.drivers[queue].areas)
        self.rings.store(descriptor, 8, DATA)
        self.rings.store(descriptor + 8, 4, 100)
        if self.ring_format == "split":
            self.rings.store(descriptor + 12, 2, 2 * writable)
            self.rings.store(available + 4, 2, 0)
            self.rings.store(available + 2, 2, 1)
        else:
            self.rings.store(descriptor + 14, 2, 1 << 7 | 2 * writable)


@pytest.mark.parametrize("file", [0, 1], ids=["rings", "buffers"])
@pytest.mark.parametrize("call", ["send", "send_frames", "receive", "receive_frames"])
def test_memory_that_is_lost_breaks_a_devices_port_once(ring_format: str, call: str, file: int) -> None:
    end = Lost(ring_format)
    sends = call.startswith("send")
    end.offer(0 if sends else 1, sends)
    queue = end.queues[0 if sends else 1]
    assert queue.arm()
    burst = end.pool.burst(4)
    if call == "send":
        end.pool.take(burst)
        burst.count = 1
        burst.lengths[0] = 60
    os.ftruncate(end.files[file], 0)
    calls: dict[str, Callable[[], object]] = {
        "send": lambda: end.port.send(burst),
        "send_frames": lambda: end.port.send_frames([bytes(60)]),
        "receive": lambda: end.port.receive(burst),
        "receive_frames": end.port.receive_frames,
    }
    with pytest.raises(SpecViolation) as raised:
        calls[call]()
    assert type(raised.value) is SpecViolation and queue.broken is raised.value
    assert not calls[call](), "once, then nothing"
    for each in end.files:
        os.close(each)
