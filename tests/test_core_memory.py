"""Memory, guest memory and eventfds, as Python sees them."""

import errno
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from tests.pair import SLOT_SIZE
from virtio import BufferPool, DriverQueue, EventFd, GuestMemory, Memory, StatusError


@contextmanager
def memfd(size: int) -> Iterator[int]:
    """A peer's file."""
    fd = os.memfd_create("peer")
    try:
        os.ftruncate(fd, size)
        yield fd
    finally:
        os.close(fd)


def test_bytes_go_in_and_out() -> None:
    with Memory(1 << 16, name="test") as memory:
        assert (memory.size, memory.foreign, memory.poisoned, memory.closed) == (1 << 16, False, False, False)
        assert memory.read(0, 16) == bytes(16)
        memory.write(5, b"hello")
        memory.write(10, bytearray(b" world"))
        memory.write(16, memoryview(b"!?")[:1])
        memory.write(64, np.arange(4, dtype="<u4").data)
        assert memory.read(5, 12) == b"hello world!"
        assert memory.read(64, 16).hex() == "00000000010000000200000003000000"
        assert memory.read(1 << 16, 0) == b""
    assert memory.closed


def test_words_are_little_endian_and_of_every_width() -> None:
    with Memory(4096) as memory:
        memory.store(8, 8, 0x0102030405060708)
        assert memory.read(8, 8) == bytes([8, 7, 6, 5, 4, 3, 2, 1])
        assert [memory.load(8, width) for width in (1, 2, 4, 8)] == [0x08, 0x0708, 0x05060708, 0x0102030405060708]
        for width in (1, 2, 4, 8):
            memory.store(16, width, (1 << 8 * width) - 1)
            assert memory.load(16, width) == (1 << 8 * width) - 1


def test_bytes_come_from_any_buffer_and_nothing_keeps_it() -> None:
    memory, source, grows = Memory(64), Memory(8), bytearray(b"12345678")
    source.write(0, b"12345678")
    for data in (b"12345678", grows, memoryview(source), np.frombuffer(b"12345678", np.uint8).data):
        memory.write(0, bytes(8))
        memory.write(0, data)
        assert memory.read(0, 8) == b"12345678"
    grows += b"9"
    del data
    source.close()


def test_memory_overlapping_itself_is_copied_as_it_was() -> None:
    with Memory(4096) as memory:
        memory.write(0, bytes(range(32)))
        with memoryview(memory) as view:
            memory.write(4, view[:32])
        assert memory.read(4, 32) == bytes(range(32))


def test_allocations_do_not_overlap_and_come_back() -> None:
    with Memory(4096) as memory:
        first, second, aligned = memory.allocate(100), memory.allocate(1), memory.allocate(10, align=1024)
        assert first % 16 == second % 16 == aligned % 1024 == 0
        assert len({first, second, aligned}) == 3
        with pytest.raises(ValueError, match=r"no room for 4096 bytes: the largest gap has \d+"):
            memory.allocate(4096)
        for offset in (second, first, aligned):
            memory.free(offset)
        assert memory.allocate(4096) == 0


def test_what_queues_and_pools_own_is_theirs_to_free() -> None:
    memory = Memory(1 << 16)
    queue, pool = DriverQueue(memory, 8), BufferPool(memory, 4, slot_size=SLOT_SIZE)
    for area in queue.areas:
        with pytest.raises(ValueError, match=f"offset {area} belongs to a queue"):
            memory.free(area)
    with pytest.raises(ValueError, match=f"offset {pool.offset} belongs to a buffer pool"):
        memory.free(pool.offset)
    own = memory.allocate(64)
    memory.free(own)
    areas = queue.areas
    queue.close()
    del queue
    with pytest.raises(ValueError, match=f"{areas[0]}"):
        memory.free(areas[0])
    assert memory.allocate(64, align=64) == areas[0]
    memory.free(areas[0])


def test_views_look_into_the_memory_itself_and_keep_it() -> None:
    memory = Memory(4096)
    view = memoryview(memory)
    assert (view.nbytes, view.readonly) == (4096, False)
    view[7:10] = b"abc"
    array = np.frombuffer(memoryview(memory), np.uint8)
    array[10] = ord("d")
    assert memory.read(7, 4) == b"abcd"
    with pytest.raises(BufferError, match="in use by 2 "):
        memory.close()
    assert not memory.closed
    del array
    with pytest.raises(BufferError, match="in use by 1 "):
        memory.close()
    view.release()
    memory.close()
    memory.close()


def test_close_waits_for_nobody_but_refuses() -> None:
    memory, guest = Memory(1 << 20), GuestMemory()
    queue = DriverQueue(memory, 8)
    pool = BufferPool(memory, 4)
    guest.add(0, memory)
    with pytest.raises(BufferError):
        memory.close()
    queue.close()
    guest.remove(0)
    with pytest.raises(BufferError, match="in use by 1 "):
        memory.close()
    pool.close()
    del pool
    memory.close()
    uses: list[Callable[[], object]] = [
        lambda: memory.read(0, 1),
        memory.fileno,
        lambda: memory.allocate(1),
        lambda: memoryview(memory),
        lambda: guest.add(0, memory),
    ]
    for use in uses:
        with pytest.raises((StatusError, BufferError), match="the memory is closed"):
            use()


def test_a_descriptor_maps_the_same_bytes() -> None:
    with Memory(8192) as memory:
        with Memory.from_fd(memory.fileno(), 4096, offset=100) as peer:
            assert (peer.size, peer.foreign) == (4096, True)
            memory.write(100, b"from here")
            assert peer.read(0, 9) == b"from here"
            peer.store(8, 4, 77)
            assert memory.read(108, 4) == bytes([77, 0, 0, 0])
            with pytest.raises(BufferError, match="peer"):
                memoryview(peer)
        with pytest.raises(ValueError, match=r"4096 bytes at offset 4097 .* 8192"):
            Memory.from_fd(memory.fileno(), 4096, offset=4097)


def test_nobody_can_resize_own_memory() -> None:
    with Memory(8192) as memory:
        for size in (0, 16384):
            with pytest.raises(PermissionError):
                os.ftruncate(memory.fileno(), size)


def test_device_24_a_truncated_file_reads_as_zeros_and_is_known() -> None:
    with memfd(8192) as fd, Memory.from_fd(fd, 8192) as peer:
        peer.write(0, b"x" * 8192)
        os.ftruncate(fd, 0)
        assert peer.read(0, 8192) == bytes(8192)
        assert peer.poisoned
        peer.write(0, b"into the void")


def test_huge_pages_that_are_not_there_say_so() -> None:
    size = 1 << 21
    try:
        memory = Memory(size, huge_page_size=size)
    except OSError as error:
        assert f"no huge pages of {size} bytes" in str(error)
        assert error.errno in (errno.ENOMEM, errno.EINVAL, errno.ENOSYS, errno.EPERM)
    else:
        memory.close()
    with pytest.raises((OSError, ValueError), match="3000"):
        Memory(4096, huge_page_size=3000)


def test_guest_addresses_lead_into_memories() -> None:
    guest, low, high = GuestMemory(), Memory(4096), Memory(8192)
    guest.add(0x1000, low)
    guest.add(0x2000, high, offset=4096, length=100)
    assert guest.regions == [(0x1000, 4096), (0x2000, 100)]
    guest.write(0x1FFE, b"abcd")
    assert (low.read(4094, 2), high.read(4096, 2), guest.read(0x1FFE, 4)) == (b"ab", b"cd", b"abcd")
    guest.store(0x2004, 4, 0xDEADBEEF)
    assert (high.load(4100, 4), guest.load(0x2004, 2)) == (0xDEADBEEF, 0xBEEF)
    for refused in (lambda: guest.read(0x2000, 101), lambda: guest.write(0xFFF, b"ab"), lambda: guest.read(0x9000, 1)):
        with pytest.raises(ValueError, match="not all in mapped memory"):
            refused()
    with pytest.raises(ValueError, match="overlaps"):
        guest.add(0x1800, high)
    guest.replace([(0x8000, low, 0, 4096)])
    assert guest.regions == [(0x8000, 4096)]
    high.close()
    with pytest.raises(ValueError, match="overlaps"):
        guest.replace([(0, low, 0, 4096), (100, low, 0, 10)])
    assert guest.regions == [(0x8000, 4096)]
    guest.remove(0x8000)
    with pytest.raises(ValueError, match="0x8000"):
        guest.remove(0x8000)
    low.close()


def test_the_dirty_log_names_the_pages_written() -> None:
    guest, memory = GuestMemory(), Memory(1 << 16)
    guest.add(0x10000, memory)
    with pytest.raises(StatusError):
        guest.take_dirty_log()
    guest.start_dirty_log(32)
    guest.write(0x10FFF, b"ab")
    guest.store(0x15000, 2, 1)
    guest.read(0x18000, 10)
    assert guest.take_dirty_log() == [(0, 0b100011 << 16)]
    assert guest.take_dirty_log() == []
    log = Memory(3)
    log.write(0, b"\x01\x00\x80")
    guest.write(0x10FFF, b"ab")
    guest.write(0x1F000, b"a")
    guest.merge_dirty_log(log, also=[(0x10000, 1, 0x3000), (0x11000, 0x2001, 0x8FFF), (0x12000, 1, 0)])
    assert log.read(0, 3) == bytes([0b1001, 0b111, 0b10000011]), "bits that others set stay"
    guest.write(0x1F000, b"a")
    guest.merge_dirty_log(Memory(1))
    assert guest.take_dirty_log() == []
    with pytest.raises(ValueError, match="length"):
        guest.merge_dirty_log(log, also=[(0, 0, 0)])
    guest.stop_dirty_log()
    with pytest.raises(StatusError):
        guest.merge_dirty_log(log)
    guest.write(0x10000, b"a")
    with pytest.raises(StatusError):
        guest.take_dirty_log()


def test_eventfds_count_signals_for_whoever_shares_them() -> None:
    event = EventFd()
    shared = EventFd.from_fd(event.fileno())
    assert (event.drain(), event.wait(0)) == (0, False)
    event.signal()
    event.signal()
    assert (shared.wait(), shared.wait(10), shared.drain(), event.wait(0)) == (True, True, 2, False)
    event.close()
    event.close()
    for use in (event.signal, event.drain, event.fileno, event.wait):
        with pytest.raises(StatusError, match="closed"):
            use()
    shared.signal()
    assert shared.drain() == 1


def test_a_look_at_an_eventfd_is_not_interrupted_by_a_signal() -> None:
    rang = 0

    def ring(*_: object) -> None:
        nonlocal rang
        rang += 1

    before, event = signal.signal(signal.SIGALRM, ring), EventFd()
    try:
        signal.setitimer(signal.ITIMER_REAL, 1e-5, 1e-5)
        while rang < 1000:
            assert not event.wait(0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_waiting_lets_signal_handlers_run() -> None:
    class Rang(Exception):
        pass

    def ring(*_: object) -> None:
        raise Rang

    before = signal.signal(signal.SIGALRM, ring)
    try:
        with pytest.raises(Rang):
            signal.setitimer(signal.ITIMER_REAL, 0.01)
            EventFd().wait()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
