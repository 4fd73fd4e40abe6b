"""The Rust core: memory, buffer pools, and both ends of a virtqueue in both ring formats.

Section numbers are of VIRTIO 1.4 (CS01). Addresses are what the *device* sees; offsets count from a memory's first byte; lengths are in
bytes. Integers may be anything with `__index__`; one out of range raises `ValueError` with the value and the limit, whatever its size.

Every class may be used from any thread. Queues, pools and bursts, and a memory's allocator, belong to the process that made them: in a
forked child they raise `StatusError`, as does everything that was closed. An argument of the wrong type raises `TypeError`. A call that
raises any of these has changed nothing.

A mistake of the peer raises a `SpecViolation` once, from the call that meets it: `MalformedChain` for a driver's, `BadUsedElement` for a
device's, neither of them for memory that its owner truncated, whoever that is. The queue keeps it in `broken` and stands still from then
on: calls that count return 0, `pop` and `pop_used` return [], `publish` returns False, `arm` returns True (there is something to look at),
and `add` raises `StatusError`.
"""

import sys
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any, Literal, Self, SupportsIndex, final

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Buffer, disjoint_base

__all__ = [
    "BufferPool",
    "Burst",
    "Chain",
    "ChainBatch",
    "DevicePort",
    "DeviceQueue",
    "DriverPort",
    "DriverQueue",
    "EventFd",
    "GuestMemory",
    "Memory",
    "PortGroup",
    "Pump",
    "PumpRunner",
    "__version__",
    "_hold",
    "layout",
    "need_event",
    "net_header_size",
]

__version__: str
"""The package's version."""

@disjoint_base
class Memory(Buffer):
    """Memory that this process maps and may share: one memfd, or a descriptor that somebody passed.

    What a peer may touch is exactly this. Own memory has the buffer protocol (`memoryview(memory)`: `size` writable bytes); foreign memory
    (from `from_fd`) does not: no Python view ever points into a peer's memory. A foreign file that is truncated later reads as zeros and
    makes the memory `poisoned`; queues that meet it break.
    """

    def __new__(cls, size: int, *, name: str = "virtio", huge_page_size: int | None = None) -> Self:
        """New zeroed memory of `size` bytes: a memfd, sealed against resizing. `name` shows in /proc/self/maps (at most 249 bytes).

        `huge_page_size`: bytes of a huge page (2097152, say), of which `size` is a multiple. ValueError: a size that cannot be. OSError: no
        such huge pages are to be had, or no memory.
        """
    @classmethod
    def from_fd(cls, fd: int, size: int, *, offset: int = 0) -> Memory:
        """Maps `size` bytes of a file that somebody passed, from `offset` on (no alignment needed). The descriptor is duplicated.

        ValueError: the file does not hold these bytes. OSError: no descriptor, or not one that can be mapped for reading and writing.
        """
    @property
    def size(self) -> int:
        """Bytes."""
    @property
    def foreign(self) -> bool:
        """Whether a peer passed it."""
    @property
    def poisoned(self) -> bool:
        """Whether its owner truncated the file under it. StatusError: closed."""
    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
    def fileno(self) -> int:
        """The descriptor to pass on; it stays this memory's. StatusError: closed."""
    def allocate(self, size: int, align: int = 16) -> int:
        """Takes `size` bytes at a multiple of `align` (a power of two); returns their offset. They hold what they held before.

        ValueError: no such room (the message names the largest gap), or the alignment is no power of two. StatusError: closed, or another
        process's.
        """
    def free(self, offset: int) -> None:
        """Gives back what `allocate` returned. ValueError: not allocated, or by a queue or pool. StatusError: as `allocate`."""
    def read(self, offset: int, length: int) -> bytes:
        """A copy of `length` bytes. ValueError: they are not all inside. StatusError: closed."""
    def write(self, offset: int, data: Buffer) -> None:
        """Copies `data` in. ValueError: it does not fit inside. BufferError: its bytes are not one after another. StatusError: closed."""
    def load(self, offset: int, width: int) -> int:
        """One atomic little-endian load of `width` bytes (1, 2, 4, 8), with acquire. ValueError: outside, unaligned, or no such width."""
    def store(self, offset: int, width: int, value: int) -> None:
        """One atomic little-endian store, with release. ValueError: as `load`, or the value does not fit into `width` bytes."""
    def close(self) -> None:
        """Unmaps the memory and closes its descriptor; again does nothing. BufferError: queues, pools, regions or views use it."""
    def __enter__(self) -> Self:
        """The memory itself. StatusError: closed."""
    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """As `close`."""
    if sys.version_info >= (3, 12):
        def __buffer__(self, flags: int, /) -> memoryview:
            """The bytes, writable. BufferError: foreign memory. StatusError: closed."""

@final
class GuestMemory:
    """What a device can reach: a table of regions, each a guest address range over part of a `Memory`.

    Regions may come and go while queues use it: each call of a queue sees the table as it is then. A `Memory` cannot be closed while a
    region lies in it.
    """

    def __new__(cls) -> Self:
        """A guest without memory."""
    def add(self, address: int, memory: Memory, *, offset: int = 0, length: int | None = None) -> None:
        """Adds a region: `length` bytes (by default all) of `memory` from `offset`, which the device sees at `address`.

        ValueError: it overlaps another region, runs over 2^64, or is not inside `memory`. StatusError: the memory is closed.
        """
    def remove(self, address: int) -> None:
        """Removes the region that starts at `address`. ValueError: none does."""
    def replace(self, regions: Iterable[tuple[int, Memory, int, int]]) -> None:
        """Puts these regions in the place of all others: (address, memory, offset, length) each. ValueError, StatusError: as `add`."""
    @property
    def regions(self) -> list[tuple[int, int]]:
        """(address, length) of each region, by ascending address."""
    def read(self, address: int, length: int) -> bytes:
        """A copy of `length` bytes, which may lie in several regions that follow each other. ValueError: some are not mapped."""
    def write(self, address: int, data: Buffer) -> None:
        """Copies `data` in, and marks it dirty. ValueError: some of it is not mapped; nothing is written."""
    def load(self, address: int, width: int) -> int:
        """One atomic little-endian load of `width` bytes (1, 2, 4, 8). ValueError: not mapped, unaligned, or no such width."""
    def store(self, address: int, width: int, value: int) -> None:
        """One atomic little-endian store, marked dirty. ValueError: as `load`, or the value does not fit."""
    def start_dirty_log(self, pages: int) -> None:
        """Marks what a device writes, in pages of 4096 bytes from address 0 on, up to `pages` (at most 2^30). A new log starts clear."""
    def take_dirty_log(self) -> list[tuple[int, int]]:
        """The marks since the last call, as words that have some, each behind its number: page p is bit p % 64 of word p // 64.

        StatusError: no log was started.
        """
    def merge_dirty_log(self, log: Memory, *, also: Sequence[tuple[int, int, int]] = ()) -> None:
        """Carries the marks since the last call over to `log`, by atomic ORs: others may write there too.

        Page p is bit p % 8 of byte p // 8 there. Pages that the log does not cover are left out. `also`: (address, length, log address) of
        bytes whose marks are wanted under another address too (a used ring's). StatusError: no log was started, or the memory is closed.
        """
    def stop_dirty_log(self) -> None:
        """Marks nothing any more."""

@final
class EventFd:
    """An eventfd: a doorbell or an interrupt (2.3). Non-blocking; `wait` blocks without the GIL.

    A queue that it is connected to keeps the descriptor open until it is disconnected. OSError: as the kernel answers.
    """

    def __new__(cls) -> Self:
        """A new one, not signalled."""
    @classmethod
    def from_fd(cls, fd: int, *, stream: bool = False) -> EventFd:
        """One that somebody passed: the descriptor is duplicated, and made non-blocking for all who share it.

        `stream`: a pipe or a socket is taken too; a signal is 8 bytes written into it.
        """
    def fileno(self) -> int:
        """The descriptor: readable when signalled. StatusError: closed, here as in all that follows."""
    def signal(self) -> None:
        """Signals it. Never blocks."""
    def drain(self) -> int:
        """Takes the signals; how many there were, 0 if none."""
    def wait(self, timeout: float | None = None) -> bool:
        """Waits until it is signalled, at most `timeout` seconds; True if it is. The signals stay.

        ValueError: a negative timeout, or NaN. StatusError: closed, by another thread meanwhile too.
        """
    def tell_closed(self, event: EventFd) -> None:
        """Signals `event` when this one is closed; at once if it is. For those who sleep on the descriptor."""
    def close(self) -> None:
        """Closes it, which wakes who sleeps in `wait`; again does nothing."""

@disjoint_base
class BufferPool:
    """`slots` equal buffers in one `Memory`, each with `HEADROOM` bytes before the frame. The pool owns every slot.

    A slot is free, or on loan to a burst or a queue. What a burst holds comes back when the burst is filled again or goes out of use:
    a lost burst leaks nothing.
    """

    HEADROOM: int
    """Bytes before the frame in each slot: 64."""

    def __new__(cls, memory: Memory, slots: int, *, slot_size: int = 2048) -> Self:
        """A pool in newly allocated bytes of `memory`. `slots`: 1 to 2^20. `slot_size`: a multiple of 64 in 128 to 131072.

        ValueError: numbers out of range, no room, or foreign memory. StatusError: the memory is closed, or another process's.
        """
    @property
    def memory(self) -> Memory:
        """Where the slots are."""
    @property
    def slots(self) -> int:
        """How many slots there are."""
    @property
    def slot_size(self) -> int:
        """Bytes of a slot, headroom included."""
    @property
    def offset(self) -> int:
        """Where slot 0 starts in `memory`; slot n starts at `offset + n * slot_size`."""
    @property
    def available(self) -> int:
        """How many slots are free. StatusError: closed, or another process's; here as in all that follows."""
    @property
    def drops(self) -> int:
        """Packets that were given back while they waited to be sent or met too short a chain, and chains that no burst could hold."""
    @property
    def frames(self) -> NDArray[np.uint8]:
        """The slots without their headroom: shape (slots, slot_size - HEADROOM), column 0 the first byte of a frame. A writable view."""
    def burst(self, capacity: int = 64) -> Burst:
        """A new, empty burst of this pool with room for `capacity` rows (1 to 32768)."""
    def take(self, burst: Burst) -> int:
        """Takes back what the burst holds, and fills it with free slots; returns how many, 0 to its capacity.

        A row each: offset `HEADROOM`, length all that follows it, `more` 0. ValueError: another pool's burst.
        """
    def give(self, burst: Burst) -> None:
        """Takes back what the burst holds; it has no rows then. ValueError: another pool's burst."""
    def close(self) -> None:
        """Ends the use of the pool and its bursts. Its bytes are free in `memory` once no burst, queue or view holds on to them."""

@final
class Burst:
    """Rows of (slot, offset, length, more): the currency of every hot call. Columns are int64 numpy views, made once.

    `count` rows are valid. A row is `lengths` bytes of slot `slots`, from `offsets` bytes after the slot's start; `more` is 1 where the
    packet continues in the next row. A packet of several rows is never split by a call. The columns are open to everybody: each call checks
    all valid rows, and raises ValueError with row, column, value and limit if one is not legal (the slot is this burst's and stands in one
    row; the bytes, at least one, are inside it; the last row ends its packet). StatusError: the pool is closed, or another process's.

    A burst is filled by one call and emptied by the next: what a call does not take stays at the front, and counts in `BufferPool.drops` if
    it is not sent before the burst is filled again.
    """

    @property
    def pool(self) -> BufferPool:
        """Whose slots the rows name."""
    @property
    def capacity(self) -> int:
        """How many rows there is room for."""
    @property
    def count(self) -> int:
        """How many rows are valid. May be set, from 0 to the capacity; ValueError beyond."""
    @count.setter
    def count(self, value: SupportsIndex) -> None: ...
    @property
    def slots(self) -> NDArray[np.int64]:
        """Slot numbers; shape (capacity,), as of all columns."""
    @property
    def offsets(self) -> NDArray[np.int64]:
        """Where the bytes start, from the slot's start."""
    @property
    def lengths(self) -> NDArray[np.int64]:
        """Bytes."""
    @property
    def more(self) -> NDArray[np.int64]:
        """1 where the packet continues in the next row, else 0."""
    def __len__(self) -> int:
        """`count`."""
    def write(self, data: Buffer) -> None:
        """Copies `data` to every row's offset, and makes it the row's length. ValueError: no bytes, or more than the slot has there."""
    def header(self, data: Buffer) -> None:
        """Puts `data` before the first row of each packet: its offset shrinks and its length grows by as much.

        ValueError: there is no such room before an offset.
        """
    def scatter(self, headers: Buffer) -> None:
        """As `header`, with as many bytes for each packet, one after the other. ValueError: not a multiple of the packets."""
    def tobytes(self, row: int) -> bytes:
        """A copy of a row's bytes. ValueError: no such valid row, or not a legal one."""

@final
class DriverQueue:
    """The driver's side of one virtqueue (2.7, 2.8): adds buffers, publishes them, takes back used ones.

    Chains with tokens (`add`, `pop_used`) and chains of bursts do not mix while any of the other kind are outstanding: ValueError.
    """

    def __new__(
        cls,
        memory: Memory,
        size: int,
        *,
        features: SupportsIndex = 0,
        address: int = 0,
        index: int = 0,
        indirect_limit: int = 0,
        resumable: bool = False,
    ) -> Self:
        """A queue of `size` entries, its areas newly allocated in `memory`, whose first byte the device sees at `address`.

        `size`: 1 to 32768, a power of two unless RING_PACKED. `features`: the accepted bits, of which RING_PACKED, EVENT_IDX,
        INDIRECT_DESC, IN_ORDER and NOTIFICATION_DATA count here: a mask (`1 << Feature.RING_PACKED`) or a `Features` set; TypeError for a
        bare `Feature`, which is the number of a bit. `index`: the queue's number (0 to 65535), for notifications. `indirect_limit`:
        segments of the longest indirect chain, up to `size`; 0 stands for 16 with INDIRECT_DESC. `resumable`: for `resume`.

        ValueError: a number out of range, areas unaligned at that address, no room in memory, or a limit without INDIRECT_DESC.
        StatusError: the memory is closed, or another process's.
        """
    @property
    def size(self) -> int:
        """How many entries there are."""
    @property
    def index(self) -> int:
        """The queue's number."""
    @property
    def ring_format(self) -> Literal["split", "packed"]:
        """Which format it is."""
    @property
    def areas(self) -> tuple[int, int, int]:
        """Addresses of the descriptor, driver and device area (2.6)."""
    @property
    def free(self) -> int:
        """How many ring descriptors are free. StatusError: closed; here as in all that follows but `broken`, `counters` and `close`."""
    @property
    def outstanding(self) -> int:
        """How many chains were added and not popped."""
    @property
    def broken(self) -> Exception | None:
        """The device's first mistake, or that the memory was lost (its file was truncated), once a call raised it. Stays after `close`."""
    @property
    def notification_value(self) -> int:
        """What an available-buffer notification carries now: the index, with NOTIFICATION_DATA also the next position (2.9)."""
    def resume(self, *, tracked: bool) -> int:
        """Where another device takes the ring over, once the one before is gone for good: vhost-user's vring base (both positions).

        All that was published and not used is made available again, oldest first: it may be done twice. With `tracked` the ring stays as it
        is: somebody else knows what the other device had begun. Chains that were used are still to be popped.

        ValueError: a packed queue that was not made `resumable`. StatusError: the queue is broken. BadUsedElement: as `pop_used`, by the
        device that is gone.
        """
    def connect(self, doorbell: EventFd | None) -> None:
        """What `publish` and burst calls signal when the device wants to know; None for nothing."""
    def add(
        self,
        token: Any,
        *,
        readable: Iterable[tuple[int, int]] = (),
        writable: Iterable[tuple[int, int]] = (),
        indirect: bool = False,
    ) -> None:
        """Adds one chain: (address, length) of each segment (2.7.13, 2.8.21). Not visible before `publish`; `pop_used` returns the token.

        `indirect`: in a table, taking one ring descriptor. ValueError: no segments, one without bytes or outside the queue's memory, more
        than the limit, or more than 2^32 - 1 bytes. QueueFull: not enough free descriptors. StatusError: the queue is broken.
        """
    def publish(self) -> bool:
        """Makes all added chains visible with one store, and notifies the device if it wants it (2.7.13.3, 2.7.10); returns whether."""
    def pop_used(self, limit: int | None = None) -> list[tuple[Any, int]]:
        """Takes used chains, at most `limit`: (token, bytes that the device wrote, at most those posted) (2.7.14, 2.8.22).

        BadUsedElement: the device used what it does not have.
        """
    def add_burst(self, burst: Burst, length: int | None = None) -> int:
        """Adds the burst's packets as readable chains, publishes, and notifies; returns how many chains. What did not fit stays in front.

        `length`, 1 to the slot size, stands for every row's in place of the column, and is written there for rows that stay. The slots are
        the device's until they come back. ValueError: a length out of range, an illegal row, a packet of more rows than the queue has
        entries, or a pool that is not in the queue's memory or not the one of outstanding chains.
        """
    def add_writable_burst(self, burst: Burst, length: int | None = None) -> int:
        """As `add_burst`, with chains for the device to write: `lengths` are the bytes posted."""
    def pop_used_burst(self, burst: Burst) -> int:
        """Gives back what the burst holds, and fills it with slots of used chains; returns how many chains.

        `lengths` are the bytes that the device wrote to each slot: 0 for readable chains. A chain of more slots than the burst has rows
        goes to the pool and counts as a drop. ValueError: as `add_burst`. BadUsedElement: as `pop_used`.
        """
    def arm(self) -> bool:
        """Asks for a notification at the next used chain; True if there is something to look at already (2.7.7.1, 2.8.10)."""
    def disarm(self) -> None:
        """Asks for no notifications; the device may send some nevertheless."""
    def reset(self) -> list[Any]:
        """After a device or queue reset: closes the queue and returns the outstanding tokens. Slots of bursts go to their pool."""
    def snapshot(self) -> dict[str, Any]:
        """For people: `ring_format`, `private` and `shared` numbers by name, the latter as they stand in shared memory."""
    @property
    def counters(self) -> dict[str, int]:
        """Chains `added` and `used`; publishes `notified` and `suppressed`; used lengths `clamped`. Stays after `close`."""
    def close(self) -> None:
        """Ends the queue, frees its areas, and forgets tokens; again does nothing. The device must not use the queue any more."""

@final
class Chain:
    """One buffer that the driver made available: readable bytes first, then writable ones (2.7.4.2).

    Its bytes may be used until it is completed or handed back, or its queue is closed: StatusError afterwards. MalformedChain: a segment of
    it lies outside the device's memory; the queue breaks.
    """

    @property
    def head(self) -> int:
        """The ring's name for it while it is in flight."""
    @property
    def readable(self) -> int:
        """How many bytes the device may read. The driver chose it: up to 2^32 - 1."""
    @property
    def writable(self) -> int:
        """How many bytes the device may write."""
    @property
    def segments(self) -> list[tuple[int, int, bool]]:
        """(address, length, writable) of each segment that is not empty."""
    @property
    def completed(self) -> bool:
        """Whether it is not in flight any more. StatusError: another process's queue."""
    def read(self, length: int | None = None, *, offset: int = 0) -> bytes:
        """A copy of readable bytes: `length` of them (by default all) from `offset`. ValueError: there are not so many.

        SpecViolation: they are not mapped, or their file was truncated; the queue is broken then.
        """
    def write(self, data: Buffer, *, offset: int = 0) -> int:
        """Copies `data` to the writable bytes from `offset`; returns its length. ValueError: there is no such room.

        SpecViolation: as `read`.
        """

@final
class ChainBatch:
    """Chains of one queue without an object each: columns `readable`, `writable`, `used` (int64 numpy views, bytes)."""

    @property
    def capacity(self) -> int:
        """How many chains there is room for."""
    @property
    def count(self) -> int:
        """How many chains are in; if set lower, how many the next `complete_batch` means. ValueError: more than are in."""
    @count.setter
    def count(self, value: SupportsIndex) -> None: ...
    @property
    def readable(self) -> NDArray[np.int64]:
        """Readable bytes of each chain; shape (capacity,), as of all columns. Written by `pop_batch`."""
    @property
    def writable(self) -> NDArray[np.int64]:
        """Writable bytes of each chain. Written by `pop_batch`."""
    @property
    def used(self) -> NDArray[np.int64]:
        """Bytes written to each chain: 0 after `pop_batch`, for the caller to set, read by `complete_batch`."""
    def __len__(self) -> int:
        """`count`."""

@final
class DeviceQueue:
    """The device's side of one virtqueue (2.7, 2.8): pops chains, completes them, publishes the used ones.

    The driver is not trusted: whatever stands in the ring is read once and checked. MalformedChain: it broke a rule.
    """

    def __new__(
        cls,
        memory: GuestMemory,
        size: int,
        areas: tuple[int, int, int],
        *,
        features: SupportsIndex = 0,
        index: int = 0,
        max_size: int = 32768,
        chain_limit: int | None = None,
        base: int | None = None,
        inflight: tuple[Memory, int] | None = None,
    ) -> Self:
        """A queue at the addresses of the descriptor, driver and device area (2.6). `features`, `index`: as of `DriverQueue`.

        `max_size`: the most entries that the driver may choose. `chain_limit`: the most descriptors of a chain, indirect ones included: by
        default `size`, up to 1024 on request. `base` resumes a ring from there (the property of this name); by default it is a new one.
        `inflight`: a memory that outlives the queue, and the offset of this queue's region in it (`virtio.vhost_user.inflight`), in which
        chains in flight are tracked. If an earlier queue was, the ring resumes where that one was, whatever `base` says, and what it had in
        flight is popped again before anything new, in the same order.

        ValueError: a number out of range, an area that is unaligned or not inside one region. MalformedChain: the used index in memory does
        not fit the base, or the in-flight area cannot be an earlier queue's.
        """
    @property
    def size(self) -> int:
        """How many entries there are."""
    @property
    def index(self) -> int:
        """The queue's number."""
    @property
    def ring_format(self) -> Literal["split", "packed"]:
        """Which format it is."""
    @property
    def areas(self) -> tuple[int, int, int]:
        """Addresses of the descriptor, driver and device area."""
    @property
    def outstanding(self) -> int:
        """How many chains are in flight.

        StatusError: closed; as in all that follows but `broken`, `base`, `counters`, `progress`, `reset`, `close`.
        """
    @property
    def broken(self) -> Exception | None:
        """The driver's first mistake, once a call raised it. Stays after `close`."""
    @property
    def base(self) -> int:
        """Where to resume: the next available index; packed: offset and wrap counter of it in bits 0 to 15, of the used side above.

        It knows nothing of chains in flight: a queue that resumes from it never sees them again. Complete them and publish, or rewind them,
        before it is saved.
        """
    def connect(self, interrupt: EventFd | None) -> None:
        """What `publish` and burst calls signal when the driver wants to know; None for nothing."""
    def pop(self, limit: int | None = None) -> list[Chain]:
        """Takes available chains, at most `limit`; [] if there are none.

        One call has room for as many segments as size and chain limit together, so it may give fewer chains than are available: the next
        one goes on. A mistake of the driver is raised once no good chain is before it.
        """
    def complete(self, chain: Chain, length: int = 0) -> None:
        """Gives a chain back, `length` bytes of it written. Not visible before `publish`.

        ValueError: more than its writable bytes, another queue's chain, or one that is not in flight.
        """
    def rewind(self, count: int = 1) -> None:
        """Hands the `count` newest chains back to the ring, as if they had not been popped.

        Batches forget them at their next use. ValueError: fewer are in flight, one of them was completed, or chains stand in bursts.
        """
    def settle(self) -> None:
        """Completes, with length 0, every chain that stands in bursts, although its slots did not come back, and publishes.

        For a queue that is about to move elsewhere: what bursts hold are copies.
        """
    def publish(self) -> bool:
        """Makes all completed chains visible with one store, and notifies the driver if it wants it (2.7.7.2, 2.8.10); returns whether."""
    def batch(self, capacity: int = 64) -> ChainBatch:
        """A new, empty batch for this queue with room for `capacity` chains (1 to 32768)."""
    def pop_batch(self, batch: ChainBatch) -> int:
        """Takes available chains, behind those that are in the batch; returns how many.

        One call has room for as many segments as capacity and chain limit together, so it may give fewer chains than are available and fit:
        the next one goes on. ValueError: another queue's batch.
        """
    def complete_batch(self, batch: ChainBatch) -> int:
        """Gives back the batch's first `count` chains with the lengths in `used`, publishes, and notifies; returns how many.

        Chains behind `count` move to the front. ValueError: a length below 0 or above the chain's writable bytes, or another queue's batch.
        """
    def pop_burst(self, burst: Burst) -> int:
        """As `complete_burst`; then takes available chains and copies their readable bytes into slots; returns how many chains.

        Each fills as many rows as it takes, at offset `HEADROOM`. A chain that does not fit any more stays in the ring; one without
        readable bytes, or with more than a burst or the pool can hold, is completed with length 0 and counted as `dropped`. A chain in a
        burst is completed when all its slots have come back, whatever way they took, at the next of these calls. ValueError: a burst of
        another pool than chains in flight.
        """
    def complete_burst(self, burst: Burst) -> int:
        """Gives back what the burst holds; completes, with length 0, and publishes every chain whose slots came back; returns how many."""
    def fill_burst(self, burst: Burst) -> int:
        """Copies the burst's packets into writable chains, one each, completes, publishes, and notifies; returns how many were copied.

        The slots of what was sent are free again; what found no chain stays in front, and so may some that would find one, if chains have
        many segments: room is as for `pop_batch`, and the next call goes on. A packet that is longer than its chain's writable
        bytes is lost: the chain is completed with length 0, and that counts as `dropped` and in `BufferPool.drops`. ValueError: an illegal
        row.
        """
    def arm(self) -> bool:
        """Asks for a notification at the next available chain; True if there is something to look at already (2.7.10.2, 2.8.10)."""
    def disarm(self) -> None:
        """Asks for no notifications; the driver may send some nevertheless."""
    def reset(self) -> None:
        """After a device or queue reset: forgets all chains in flight and closes the queue."""
    def snapshot(self) -> dict[str, Any]:
        """For people: `ring_format`, `private` and `shared` numbers by name, the latter as they stand in shared memory."""
    @property
    def counters(self) -> dict[str, int]:
        """Chains `popped`, `used` and `dropped`; publishes `notified` and `suppressed`. Stays after `close`."""
    @property
    def progress(self) -> tuple[int, int]:
        """Chains popped and chains used since set-up. Two of the counters, for those who ask often."""
    def close(self) -> None:
        """Ends the queue; again does nothing. Chains in flight are neither completed nor handed back."""

@final
class DriverPort:
    """The driver's end of a network device's queue pair (5.1.6): each call is one crossing for a whole burst.

    The header before each frame ends where the frame begins: a packet's first row is at offset `HEADROOM`, its chain starts `header_size`
    before. Rows of later receive buffers of a packet start there too. The port keeps receive buffers with the device: `refill` at the
    start, every receiving call afterwards.

    ValueError: a burst of another pool. BadUsedElement: the device broke a rule. StatusError: a queue or the pool is closed.
    """

    def __new__(
        cls,
        receiveq: DriverQueue,
        transmitq: DriverQueue,
        pool: BufferPool,
        *,
        features: SupportsIndex,
        buffer_size: int = 1,
        buffers: int = 32768,
    ) -> Self:
        """`features`: what was accepted, VERSION_1 included. `buffer_size`: the least bytes of a receive buffer, header included: it takes
        as many slots as that needs. `buffers`: the most buffers that the device has at one time.

        ValueError: no VERSION_1, one queue twice, a pool outside the queues' memory, or a buffer of more slots than queue or pool have.
        """
    @property
    def receiveq(self) -> DriverQueue:
        """Where frames come from."""
    @property
    def transmitq(self) -> DriverQueue:
        """Where frames go."""
    @property
    def pool(self) -> BufferPool:
        """Whose slots they are in."""
    @property
    def header_size(self) -> int:
        """Bytes of the header (5.1.6)."""
    def refill(self) -> int:
        """Gives the device receive buffers, as many as it is to have and the pool has slots for; returns how many."""
    def take(self, burst: Burst) -> int:
        """Frees the slots of what was sent, takes back what the burst holds, and fills it with slots whose headers are zero; how many."""
    def send(self, burst: Burst) -> int:
        """Sends the burst's packets, publishes, and notifies; returns how many. What did not fit stays in front.

        The header before each packet is made fit for the device: a checksum that it would not complete is completed here; segmentation that
        it did not accept, and claims that cannot be, are dropped and counted. ValueError: an illegal row, a packet of more rows than the
        queue has entries, or no room for a header before one.
        """
    def receive(self, burst: Burst) -> int:
        """Gives back what the burst holds, fills it with received packets, and gives the device new buffers; returns how many packets.

        The header before each is what is believed of it; packets whose header is not, or that have more rows than the burst, are dropped
        and counted. `num_buffers` counts only with MRG_RXBUF.
        """
    def send_frames(self, frames: Iterable[Buffer]) -> int:
        """Copies and sends frames; returns how many fitted, from the first on. ValueError: one without bytes, or too long for any slots."""
    def receive_frames(self, limit: int = 64) -> list[bytes]:
        """Copies of received frames, at most `limit`; their slots are the device's again."""
    @property
    def counters(self) -> dict[str, Any]:
        """`sent_frames`, `sent_bytes`, `sent_drops` (by reason: short, long, checksum, gso, num_buffers, missing, offload); so received."""

@final
class DevicePort:
    """The device's end of a network device's queue pair (5.1.6): as `DriverPort`, with the names of the driver's queues.

    What the driver transmitted is copied once, into slots of the burst's pool, and its chain is completed when these have come back, at the
    next `receive` or `take`. MalformedChain: the driver broke a rule. StatusError: a queue or the pool is closed.
    """

    def __new__(cls, receiveq: DeviceQueue, transmitq: DeviceQueue, *, features: SupportsIndex) -> Self:
        """`features`: what was accepted, VERSION_1 included. ValueError: it is not, or one queue twice."""
    @property
    def receiveq(self) -> DeviceQueue:
        """Where frames go: the queue from which the driver receives."""
    @property
    def transmitq(self) -> DeviceQueue:
        """Where frames come from."""
    @property
    def header_size(self) -> int:
        """Bytes of the header (5.1.6)."""
    def take(self, burst: Burst) -> int:
        """Takes back what the burst holds, completes chains whose slots came back, and fills it with slots whose headers are zero."""
    def send(self, burst: Burst) -> int:
        """Copies the burst's packets into receive buffers, publishes, and notifies; returns how many. What found no buffer stays in front.

        With MRG_RXBUF a packet may take several buffers, all but the last filled completely. Headers as in `DriverPort.send`; a packet
        longer than the driver's buffer is dropped and counted. ValueError: an illegal row, or no room for a header before one.
        """
    def receive(self, burst: Burst) -> int:
        """Gives back what the burst holds, completes chains whose slots came back, and fills it with transmitted packets; how many.

        Packets that are not believed, or that no burst holds, are completed, dropped and counted. ValueError: a burst of another pool than
        chains in flight.
        """
    def send_frames(self, frames: Iterable[Buffer]) -> int:
        """Copies frames into receive buffers; returns how many are done with, from the first on: one longer than the driver's buffer is
        dropped and counted. ValueError: one without bytes, or longer than 65589."""
    def receive_frames(self, limit: int = 64) -> list[bytes]:
        """Copies of transmitted frames, at most `limit`; their chains are completed."""
    @property
    def counters(self) -> dict[str, Any]:
        """As of `DriverPort`."""

@final
class PortGroup:
    """The ports of several queue pairs as one: what comes is taken in turn, what goes keeps each flow on one pair (5.1.6.5.5).

    A flow has the same two ends in both directions: addresses and ports of TCP, UDP and SCTP, addresses of other IP packets, Ethernet
    addresses of the rest. At a device's end it goes to the pair from which it last came, if that is known.
    """

    def __new__(cls, ports: tuple[DriverPort, ...] | tuple[DevicePort, ...], senders: SupportsIndex | None = None) -> Self:
        """`senders`: how many of them, from the first on, are sent by; None: all. ValueError: not 1 to 32768 ports, or more senders."""
    def one(self, pair: SupportsIndex) -> PortGroup:
        """One of the pairs as a group, which shares with this one what is known of flows. ValueError: there is no such pair."""
    def take(self, burst: Burst) -> int:
        """Fills the burst by the first pair that can, and takes back on the way what others hold; returns how many slots there are."""
    def send(self, burst: Burst) -> int:
        """Sends each packet by its flow's pair; returns how many. The others stay in the burst, those of one pair in their order.

        ValueError: an illegal row, of which nothing is sent, or what a port refuses. SpecViolation: as of the port that meets it.
        """
    def receive(self, burst: Burst) -> int:
        """Gives back what the burst holds, and fills it by the first pair that has something, in turn; returns how many packets.

        SpecViolation: as of the port that meets it; the next call begins with another.
        """
    def send_frames(self, frames: Iterable[Buffer]) -> int:
        """Copies and sends frames, each by its flow's pair, up to the first for which there is no room; returns how many."""
    def receive_frames(self, limit: int = 64) -> list[bytes]:
        """Copies of the frames of the first pair that has some, in turn, at most `limit`."""

@final
class Pump:
    """Frames between one queue of a network device (5.1.6) and a TAP, in a loop without the GIL, and without a copy of ours.

    The TAP has IFF_VNET_HDR and a header of the queue's size (`net_header_size`); any descriptor that reads and writes whole frames will
    do. It is duplicated, made non-blocking for all who share it, and closed with the pump. It does nothing until a `PumpRunner` runs it.
    Its queue may be looked at, and reset, by anybody meanwhile; chains with tokens do not go together with a driver's pump.

    A header is copied, judged and only then passed on. A TAP is told to complete checksums that the other end does not take: frames for
    which it would have to be done here are dropped. Making one raises ValueError for features without VERSION_1, StatusError for what is
    closed, OSError for a bad descriptor.
    """

    @staticmethod
    def driver_transmit(queue: DriverQueue, pool: BufferPool, tap: int, *, features: SupportsIndex, interrupt: EventFd) -> Pump:
        """From the TAP to a driver's transmit queue.

        A frame takes as many slots as it needs: with segmentation negotiated up to 65589 bytes (one slot of 65664 bytes, or many), without
        one slot; a longer one is dropped. `interrupt`: what the device signals for this queue. ValueError: the longest frame takes more
        slots than the queue has entries, or the pool slots.
        """
    @staticmethod
    def driver_receive(queue: DriverQueue, pool: BufferPool, tap: int, *, features: SupportsIndex, interrupt: EventFd) -> Pump:
        """From a driver's receive queue to the TAP; the buffers are given to the device again.

        A queue without buffers is given some, of half of the pool's slots at most: of one slot each with MRG_RXBUF, else long enough for
        any frame. `interrupt`: what the device signals for this queue. ValueError: such a buffer takes too many slots.
        """
    @staticmethod
    def device_transmit(queue: DeviceQueue, tap: int, *, features: SupportsIndex, doorbell: EventFd) -> Pump:
        """From a driver's transmitted chains to the TAP. `doorbell`: what the driver rings for this queue."""
    @staticmethod
    def device_receive(queue: DeviceQueue, tap: int, *, features: SupportsIndex, doorbell: EventFd, longest: int) -> Pump:
        """From the TAP to the receive buffers of a driver. `doorbell`: what the driver rings for this queue.

        `longest`: bytes of the longest frame, 1 to 65589, its header not counted; a longer one is dropped. So is, after a moment, one for
        which the driver keeps too few buffers. Without any buffer the TAP is not read. ValueError: `longest` outside its range.
        """
    @property
    def statistics(self) -> dict[str, Any]:
        """`frames`, `bytes`, `drops` (by reason, as a port's), `refused` (by the TAP), `steps`, and its runner's `sleeps`."""
    @property
    def error(self) -> BaseException | None:
        """What stopped it: `queue.broken`, StatusError if the queue was closed, TransportError if the TAP is gone, or OSError."""
    @property
    def running(self) -> bool:
        """Whether a runner has it, and it has not stopped with an error."""
    def close(self) -> None:
        """Closes the TAP's duplicate; in a forked child, its own. StatusError: a runner has the pump; one that has returned has not."""

@final
class PumpRunner:
    """Runs pumps, on the one thread that calls `run`. Asleep while none has anything to do."""

    def __new__(cls, pumps: list[Pump]) -> Self:
        """ValueError: no pump, more than 31, or one twice."""
    def run(self) -> None:
        """Moves frames, without the GIL, until `stop` or until every pump has stopped with an error; then raises the first error, if any.

        A pump that fails does not end the others. In the main thread signal handlers run meanwhile, a fraction of a second late; one that
        raises something ends it, and that is raised. StatusError: a pump is closed or runs already, or its queue is closed; then none was
        started.
        """
    def stop(self) -> None:
        """Ends `run`, now and for good: a later one ends at once. From any thread; does not wait for it."""
    @property
    def failed(self) -> EventFd:
        """Signalled whenever a pump stops with an error, which its `error` then tells."""

def net_header_size(features: SupportsIndex) -> int:
    """Bytes of the header before each frame under these features, for both sides (5.1.6): 10, 12, 20, 24 or 32."""

def need_event(event: int, new: int, old: int) -> bool:
    """Whether going from index `old` to `new` passes `event`, all of 16 bits (2.7.7.1). ValueError: beyond 65535."""

def layout(size: int, *, features: SupportsIndex = 0) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """(bytes, alignment) of the descriptor, driver and device area (2.7, 2.8.10.1). ValueError: as the size of `DriverQueue`."""

def _hold(object: DriverQueue | DeviceQueue | BufferPool, seconds: float) -> None:
    """For tests: holds an object's lock for so long, without the GIL, so that other threads have to wait for it."""
