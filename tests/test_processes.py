"""Two processes share a memory, by fork and by a descriptor that was passed; what is one process's own is refused in the other."""

import array
import os
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable

import pytest

from tests.pair import BASE, SLOT_SIZE, Pair, fill, packets_of
from virtio import BufferPool, DeviceQueue, DriverQueue, EventFd, Features, GuestMemory, Memory, StatusError
from virtio._core import _hold

ROUNDS = 50


def in_child(work: Callable[[], None]) -> int:
    """Forks a child that does `work` and leaves; gives its process id."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # there are other threads: the child touches nothing of theirs
        pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def joined(pid: int) -> None:
    """Waits for the child, which has to have done its work."""
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def until(look: Callable[[], int], pid: int) -> int:
    """Polls until there is something, or the child is gone."""
    while not (found := look()):
        assert os.waitpid(pid, os.WNOHANG) == (0, 0), "the child is gone"
        time.sleep(0)
    return found


def serve(guest: GuestMemory, areas: tuple[int, int, int], features: Features, doorbell: EventFd, interrupt: EventFd) -> None:
    """A device that answers each request with its bytes reversed, then one that copies bursts into received packets."""
    queue = DeviceQueue(guest, 8, areas, features=features)
    queue.connect(interrupt)
    done = 0
    while done < ROUNDS:
        if not queue.arm():
            assert doorbell.wait(60)
        doorbell.drain()
        for chain in queue.pop():
            queue.complete(chain, chain.write(chain.read()[::-1]))
            done += 1
        queue.publish()
    pool = BufferPool(Memory(8 * SLOT_SIZE), 8, slot_size=SLOT_SIZE)
    burst = pool.burst(8)
    seen: list[bytes] = []
    while len(seen) < ROUNDS:
        queue.pop_burst(burst)
        seen += packets_of(burst)
        if not burst.count:
            time.sleep(0)
    queue.complete_burst(burst)
    assert seen == [b"packet %d" % number for number in range(ROUNDS)]


def drive(pair: Pair, doorbell: EventFd, interrupt: EventFd, pid: int) -> None:
    """The driver's half of the above."""
    pair.driver.connect(doorbell)
    request, answer = pair.place(b"request"), pair.room(7)
    for number in range(ROUNDS):
        pair.driver.add(number, readable=[request], writable=[answer])
        pair.driver.publish()
        if not pair.driver.arm():
            assert interrupt.wait(60)
        interrupt.drain()
        used = until(lambda: len(found) if (found := pair.driver.pop_used()) else 0, pid)
        assert (used, pair.look(answer)) == (1, b"tseuqer")
    tx, back = pair.pool.burst(4), pair.pool.burst(8)
    for number in range(ROUNDS):
        fill(tx, [b"packet %d" % number])
        until(lambda: pair.driver.add_burst(tx) or (pair.driver.pop_used_burst(back) and 0), pid)
    until(lambda: pair.driver.pop_used_burst(back) and not pair.driver.outstanding, pid)
    joined(pid)


def test_a_forked_child_is_the_device(ring_format: str) -> None:
    pair = Pair(ring_format)
    doorbell, interrupt = EventFd(), EventFd()
    drive(pair, doorbell, interrupt, in_child(lambda: serve(pair.guest, pair.driver.areas, pair.features, doorbell, interrupt)))


def test_a_process_that_was_passed_the_descriptor_is_the_device(ring_format: str) -> None:
    pair = Pair(ring_format)
    doorbell, interrupt = EventFd(), EventFd()
    ours, theirs = socket.socketpair()

    def work() -> None:
        # What the child has by the fork it does not use: all comes by the socket.
        _, ancillary, _, _ = theirs.recvmsg(1, socket.CMSG_SPACE(3 * 4))
        ((_, _, data),) = ancillary
        memory_fd, doorbell_fd, interrupt_fd = array.array("i", data)
        memory, guest = Memory.from_fd(memory_fd, 1 << 20), GuestMemory()
        assert memory.foreign
        guest.add(BASE, memory)
        serve(guest, pair.driver.areas, pair.features, EventFd.from_fd(doorbell_fd), EventFd.from_fd(interrupt_fd))

    pid = in_child(work)
    descriptors = array.array("i", [pair.memory.fileno(), doorbell.fileno(), interrupt.fileno()])
    ours.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)])
    drive(pair, doorbell, interrupt, pid)
    ours.close()
    theirs.close()


def test_a_forked_child_signals_what_its_parent_did() -> None:
    mine = EventFd()
    shared = EventFd.from_fd(mine.fileno())
    shared.signal()

    def work() -> None:
        for _ in range(1000):  # more than the kernel keeps results of
            shared.signal()

    joined(in_child(work))
    for _ in range(1000):
        shared.signal()
    assert mine.drain() == 2001


def test_what_is_the_parents_is_refused_in_the_child(ring_format: str) -> None:
    pair = Pair(ring_format)
    burst, far, batch = pair.pool.burst(4), pair.far.burst(4), pair.device.batch(4)
    fill(burst, [b"x"])
    pair.driver.add_burst(burst)
    pair.device.pop_burst(far)
    other = Pair(ring_format)
    other.driver.add("token", readable=[other.place(b"x")])
    other.driver.publish()
    chain = other.device.pop()[0]
    other.device.close()
    parent = os.getpid()

    def work() -> None:
        calls: list[Callable[[], object]] = [
            lambda: pair.driver.add("token", readable=[(BASE, 1)]),
            pair.driver.publish,
            pair.driver.pop_used,
            lambda: pair.driver.add_burst(burst),
            lambda: pair.driver.add_writable_burst(burst),
            lambda: pair.driver.pop_used_burst(burst),
            pair.driver.arm,
            pair.driver.disarm,
            pair.driver.snapshot,
            lambda: pair.driver.counters,
            lambda: pair.driver.broken,
            pair.driver.reset,
            pair.driver.close,
            pair.device.pop,
            pair.device.publish,
            lambda: pair.device.pop_batch(batch),
            lambda: pair.device.complete_batch(batch),
            lambda: pair.device.pop_burst(far),
            lambda: pair.device.complete_burst(far),
            lambda: pair.device.fill_burst(far),
            lambda: chain.completed,
            lambda: pair.device.base,
            pair.device.reset,
            pair.device.close,
            lambda: pair.pool.available,
            lambda: pair.pool.take(burst),
            lambda: pair.pool.give(burst),
            pair.pool.burst,
            pair.pool.close,
            lambda: burst.write(b"x"),
            lambda: burst.tobytes(0),
            lambda: pair.memory.allocate(16),
            lambda: pair.memory.free(0),
            lambda: DriverQueue(pair.memory, 8),
            lambda: BufferPool(pair.memory, 1),
        ]
        for call in calls:
            with pytest.raises(StatusError, match=f"{parent}.*{os.getpid()}"):
                call()
        # Memory is shared, and a new queue over it may be made.
        pair.memory.write(0, b"from the child")
        DeviceQueue(pair.guest, 8, pair.driver.areas, features=pair.features).close()

    joined(in_child(work))
    assert pair.memory.read(0, 14) == b"from the child"
    assert (pair.device.complete_burst(far), pair.far.available) == (1, 64)


def test_a_child_that_drops_the_parents_objects_changes_nothing(ring_format: str) -> None:
    pair = Pair(ring_format)
    burst = pair.pool.burst(4)
    fill(burst, [b"x"])
    pair.driver.add_burst(burst)
    before = pair.state()

    def work() -> None:
        vars(pair).clear()
        nonlocal burst
        del burst

    joined(in_child(work))
    assert pair.state() == before


def test_a_child_forked_while_locks_are_held_does_not_hang(ring_format: str) -> None:
    pair = Pair(ring_format)
    bursts = [pair.pool.burst(4)]
    holders = [threading.Thread(target=_hold, args=(one, 0.3)) for one in (pair.driver, pair.device, pair.pool)]
    for holder in holders:
        holder.start()
    time.sleep(0.05)

    def work() -> None:
        calls: list[Callable[[], object]] = [pair.driver.publish, pair.device.publish, lambda: pair.pool.take(bursts[0])]
        for call in calls:
            with pytest.raises(StatusError):
                call()
        bursts.clear()
        vars(pair).clear()

    joined(in_child(work))
    for holder in holders:
        holder.join()
    assert pair.pool.take(bursts[0]) == 4
