"""Eight threads on one queue, to be run by any interpreter: needs nothing but the core. `python -m tests.thread_work` runs it all."""

import sys
import threading
from collections import Counter
from collections.abc import Callable

from virtio._core import BufferPool, DeviceQueue, DriverQueue, GuestMemory, Memory, _hold
from virtio.errors import QueueFull, StatusError

THREADS = 8
BASE = 1 << 32
PACKED = 1 << 34


class Ends:
    """Both ends of one queue, and a pool for each."""

    def __init__(self, features: int) -> None:
        memory, guest = Memory(1 << 20), GuestMemory()
        guest.add(BASE, memory)
        self.driver = DriverQueue(memory, 64, features=features, address=BASE)
        self.device = DeviceQueue(guest, 64, self.driver.areas, features=features)
        self.near = BufferPool(memory, 256, slot_size=128)
        self.far = BufferPool(Memory(1 << 16), 128, slot_size=128)
        self.address = BASE + memory.allocate(64)


def run(work: Callable[[int], None], held: list[DriverQueue | DeviceQueue | BufferPool]) -> None:
    """`work` in eight threads at once, while another one holds one lock after the other; raises what any of them raised."""
    errors: list[BaseException] = []
    start, done = threading.Barrier(THREADS), threading.Event()

    def body(number: int) -> None:
        try:
            start.wait()
            work(number)
        except BaseException as error:
            errors.append(error)

    def hold() -> None:
        while not done.is_set():
            for one in held:
                _hold(one, 0.0002)

    threads = [threading.Thread(target=body, args=(number,)) for number in range(THREADS)]
    holder = threading.Thread(target=hold)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in [*threads, holder]:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        done.set()
        holder.join()
        sys.setswitchinterval(interval)
    if errors:
        raise errors[0]


def tokens(features: int, each: int = 300) -> None:
    """Every thread adds, serves and takes back: each token comes back to somebody, once."""
    ends, returned = Ends(features), [Counter[tuple[int, int]]() for _ in range(THREADS)]
    driver, device = ends.driver, ends.device

    def pump(number: int) -> None:
        for chain in device.pop(limit=5):
            device.complete(chain, len(chain.read()) // 8)
        device.publish()
        returned[number].update(token for token, length in driver.pop_used(limit=7) if length == 1)

    def work(number: int) -> None:
        for sequence in range(each):
            while True:
                try:
                    driver.add((number, sequence), readable=[(ends.address, 8)], writable=[(ends.address + 8, 4)])
                    break
                except QueueFull:
                    pump(number)
            driver.publish()
            pump(number)

    run(work, [driver, device])
    while driver.outstanding:
        pump(0)
    assert sum(returned, Counter()) == Counter((number, sequence) for number in range(THREADS) for sequence in range(each))
    assert driver.counters["used"] == device.counters["used"] == THREADS * each
    assert (driver.broken, device.broken, driver.free) == (None, None, 64)


def bursts(features: int, each: int = 150) -> None:
    """Every thread sends, receives and reclaims: each packet arrives once, and every slot comes home."""
    ends = Ends(features)
    sent, received = ([Counter[bytes]() for _ in range(THREADS)] for _ in range(2))
    driver, device, near, far = ends.driver, ends.device, ends.near, ends.far

    def work(number: int) -> None:
        tx, rx, back = near.burst(8), far.burst(8), near.burst(8)

        def pump() -> None:
            if device.pop_burst(rx):
                received[number].update(rx.tobytes(row) for row in range(rx.count))
            device.complete_burst(rx)
            driver.pop_used_burst(back)
            near.give(back)

        for sequence in range(each):
            while not near.take(tx):
                pump()
            tx.count = min(len(tx), 1 + sequence % 8)
            tx.write(b"%d %d" % (number, sequence))
            sent[number][b"%d %d" % (number, sequence)] += len(tx)
            while driver.add_burst(tx) == 0 or len(tx):
                pump()
            pump()
        near.give(tx)

    run(work, [driver, device, near, far])
    rx, back = far.burst(64), near.burst(64)
    while driver.outstanding:
        device.pop_burst(rx)
        received[0].update(rx.tobytes(row) for row in range(rx.count))
        device.complete_burst(rx)
        driver.pop_used_burst(back)
    near.give(back)
    assert sum(received, Counter()) == sum(sent, Counter())
    assert (near.available, near.drops, far.available, far.drops, device.counters["dropped"]) == (256, 0, 128, 0, 0)


def closes(rounds: int = 300) -> None:
    """A pool closes while others begin to use it: its place goes to somebody else, or they have it, never both."""
    start = threading.Barrier(THREADS)
    for _ in range(rounds):
        memory = Memory(1 << 16)
        pool = BufferPool(memory, 256, slot_size=128)  # half of the memory: two such have room, three have not
        used, refused = list[object](), list[int]()

        def use(number: int, pool: BufferPool = pool, used: list[object] = used, refused: list[int] = refused) -> None:
            start.wait()
            try:
                if number:
                    used.append(pool.burst(8))
                else:
                    pool.close()
            except StatusError:
                refused.append(number)

        threads = [threading.Thread(target=use, args=(number,)) for number in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(used) + len(refused) == THREADS - 1
        others = list[BufferPool]()
        try:
            for _ in range(2):
                others.append(BufferPool(memory, 256, slot_size=128))
        except ValueError:
            assert used
        else:
            assert not used


if __name__ == "__main__":
    closes()
    for format_bit in (0, PACKED):
        tokens(format_bit)
        bursts(format_bit)
    print("done")
