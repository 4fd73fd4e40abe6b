"""A hostile driver changes what it gave, points outside memory, and lies about availability (device-10, device-11, device-12)."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.hostile.sides import BASE, BUFFERS, INDIRECT, MEMORY, NEXT, PAYLOAD, WRITE, DeviceSide, raises_once
from tests.leftovers import descriptors
from virtio import Chain, Feature, MalformedChain, Memory, SpecViolation, StatusError
from virtio.spec import DescriptorFlag
from virtio.testing import RawPackedDriver, Segment
from virtio.testing.packed import available_flags, used_flags

SIZE = 8
TABLE = BUFFERS + 0x1_0000
END = BASE + MEMORY

# device-10


def rubbish(side: DeviceSide) -> None:
    """Overwrites every descriptor with one that nobody may use."""
    for position in range(side.ring.size):
        side.ring.set_descriptor(position, 0xBAD0_BAD0_BAD0_BAD0, 0xFFFF_FFFF, 0xFFFF, 0xFFFF)


@pytest.mark.parametrize("indirect", [False, True])
def test_device_10_what_was_popped_does_not_change_any_more(ring_format: str, indirect: bool) -> None:
    side = DeviceSide(ring_format, Feature.INDIRECT_DESC, size=SIZE)
    side.memory.write(BUFFERS - BASE, bytes(range(64)))
    segments = [(BUFFERS, 16, False), (BUFFERS + 32, 16, False), (BUFFERS + 64, 32, True)]
    if indirect:
        side.offer_list((TABLE, side.ring.write_table(TABLE, segments), INDIRECT), id=7)
    else:
        (name,) = side.offer(segments)
    (chain,) = side.queue.pop()
    rubbish(side)
    side.memory.write(TABLE - BASE, b"\xff" * 256)
    assert chain.segments == segments and (chain.readable, chain.writable) == (32, 32)
    assert chain.read() == bytes(range(16)) + bytes(range(32, 48))
    assert chain.write(b"x" * 32) == 32 and side.memory.read(BUFFERS - BASE + 64, 32) == b"x" * 32
    side.queue.complete(chain, 32)
    side.queue.publish()
    assert side.ring.used()[0] == (7 if indirect and ring_format == "packed" else 0 if indirect else name, 32)


def test_device_10_slots_are_given_back_as_they_were_counted(ring_format: str) -> None:
    """The driver makes a popped list look shorter or longer; positions go on by what was read once."""
    side = DeviceSide(ring_format, size=SIZE)
    for lap in range(20):
        side.offer([(BUFFERS, PAYLOAD, False)] * 3)
        (chain,) = side.queue.pop()
        for position in range(SIZE):
            descriptor = side.ring.descriptor(position)
            if isinstance(side.ring, RawPackedDriver):
                side.ring.set_flags(position, descriptor.flags ^ NEXT)
            else:
                side.ring.set_descriptor(position, descriptor.address, descriptor.length, descriptor.flags ^ NEXT, 0)
        side.queue.complete(chain)
        side.queue.publish()
        assert len(side.ring.used()) == 1, f"in lap {lap}"


def test_device_10_a_rewound_chain_is_read_again(ring_format: str) -> None:
    side = DeviceSide(ring_format, size=SIZE)
    side.offer([(BUFFERS, PAYLOAD, False)])
    (chain,) = side.queue.pop()
    side.queue.rewind()
    descriptor = side.ring.descriptor(0)
    side.ring.set_descriptor(0, BUFFERS + 512, PAYLOAD, *descriptor[2:])
    with pytest.raises(StatusError, match="not in flight"):
        chain.read()
    (again,) = side.queue.pop()
    assert again.segments == [(BUFFERS + 512, PAYLOAD, False)]


SCRIBBLER = """
import mmap, sys
memory = memoryview(mmap.mmap(int(sys.argv[1]), 0)).cast("Q")
words = [tuple(map(int, word.split(","))) for word in sys.argv[2:]]
print("ready", flush=True)
while True:
    for turn in (1, 2):
        for word in words:
            memory[word[0]] = word[turn]
"""


@contextmanager
def scribbler(memory: Memory, words: list[tuple[int, int, int]]) -> Iterator[None]:
    """Another process, which goes on flipping 64-bit words (offset, one value, other value) of the driver's memory."""
    arguments = [f"{offset // 8},{one},{other}" for offset, one, other in words]
    command = [sys.executable, "-c", SCRIBBLER, str(memory.fileno()), *arguments]
    with subprocess.Popen(command, pass_fds=[memory.fileno()], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
            yield
        finally:
            process.kill()


def test_device_10_descriptors_that_change_while_they_are_read(ring_format: str) -> None:
    """Whatever mixture is met, the chain agrees with itself; or the queue breaks, with the reason."""
    first = DeviceSide(ring_format, Feature.INDIRECT_DESC, size=SIZE)
    flags, shift = (available_flags(1), 48) if ring_format == "packed" else (0, 32)
    plain, write, linked, table = (16 | (flags | more) << shift for more in (0, WRITE, NEXT, INDIRECT))
    ring = first.ring.areas[0] - BASE
    words = [(ring, BUFFERS, TABLE), (ring + 8, plain, linked), (ring + 8, table, write), (ring + 24, plain, write)]
    words += [(TABLE - BASE + 8, plain, 1 << 31), (TABLE - BASE, BUFFERS, 1 << 63)]
    for offset, value, _ in words:
        first.memory.store(offset, 8, value)
    popped = broken = 0
    with scribbler(first.memory, words):
        for _ in range(500):
            side = DeviceSide(ring_format, Feature.INDIRECT_DESC, size=SIZE)
            side.guest, side.ring = first.guest, first.ring
            if ring_format == "split":
                first.split.avail_idx = 1
            side.restart()
            try:
                for chain in side.queue.pop(limit=1):
                    popped += 1
                    agrees(chain)
            except SpecViolation as error:
                raises_once(MalformedChain, error, ring_format, ())
                assert side.queue.broken is error
                broken += 1
    assert popped + broken > 0


def agrees(chain: Chain) -> None:
    """Sums and segments come from one reading, and the order of segments was checked on it."""
    segments = chain.segments
    assert chain.readable == sum(length for _, length, writable in segments if not writable)
    assert chain.writable == sum(length for _, length, writable in segments if writable)
    assert [writable for *_, writable in segments] == sorted(writable for *_, writable in segments)
    assert segments == chain.segments
    try:
        assert len(chain.read()) == chain.readable
    except SpecViolation as error:
        assert error.section == "2.6"


# device-11


OUTSIDE: dict[str, Segment] = {
    "ends one byte behind memory": (END - 15, 16, False),
    "begins where memory ends": (END, 1, False),
    "begins one byte before memory": (BASE - 1, 16, False),
    "ends where memory begins": (BASE - 16, 16, False),
    "nowhere": (0, 1, False),
    "reaches over the end of the address space": ((1 << 64) - 8, 16, False),
    "ends with the address space": ((1 << 64) - 16, 16, False),
    "is as long as can be, from the last address": ((1 << 64) - 1, 0xFFFF_FF00, False),
    "begins inside and is as long as can be": (END - 1, 0xFFFF_FF00, False),
}


@pytest.mark.parametrize("place", OUTSIDE)
@pytest.mark.parametrize("direction", ["read", "write"])
@pytest.mark.parametrize("before", [0, 16])
def test_device_11_a_span_outside_memory_breaks_the_queue_when_used(ring_format: str, place: str, direction: str, before: int) -> None:
    side = DeviceSide(ring_format, size=SIZE)
    address, length, _ = OUTSIDE[place]
    inside = [(BUFFERS, before, direction == "write")] if before else []
    side.offer([*inside, (address, length, direction == "write")])
    (chain,) = side.queue.pop()  # where it points matters when it is used
    side.chains.append(chain)
    image = side.memory.read(0, MEMORY)
    with pytest.raises(SpecViolation) as caught:
        if direction == "read":
            chain.read(before + min(length, 64))
        else:
            chain.write(b"\xff" * (before + min(length, 64)))
    raises_once(MalformedChain, caught.value, ring_format, [address])
    assert side.memory.read(0, MEMORY) == image, "no byte of it has moved"
    assert side.queue.broken is caught.value
    with pytest.raises(StatusError, match="broken"):
        chain.read() if direction == "read" else chain.write(b"\xff" * (before + min(length, 64)))
    side.stands_still(caught.value)


@pytest.mark.parametrize("outlives", ["queue", "chain"])
def test_a_mistake_that_was_caught_keeps_nothing_alive(ring_format: str, outlives: str) -> None:
    """Its traceback knows the chain and the queue, which keeps it: garbage, whichever of the two was let go first."""
    before = descriptors()

    def meet() -> None:
        side = DeviceSide(ring_format, size=SIZE)
        side.offer([(END, 16, False)])
        kept: list[object] = [*side.queue.pop()]
        if outlives == "queue":
            kept.append(side.queue)
        (chain, *_) = kept
        assert isinstance(chain, Chain)
        del side
        with pytest.raises(SpecViolation):
            chain.read()

    for _ in range(3):
        meet()
    assert descriptors() <= before


@pytest.mark.parametrize("place", [place for place in OUTSIDE if OUTSIDE[place][1] <= 16])
@pytest.mark.parametrize("path", ["burst", "fill"])
@pytest.mark.parametrize("before", [0, 1, 3])
@pytest.mark.parametrize("inside", [0, 8])
def test_device_11_bursts_deliver_what_comes_before(ring_format: str, place: str, path: str, before: int, inside: int) -> None:
    side = DeviceSide(ring_format, size=SIZE)
    address, length, _ = OUTSIDE[place]
    bad = [(BUFFERS, PAYLOAD - length, path == "fill")] if length < PAYLOAD else [(BUFFERS, inside, path == "fill")] if inside else []
    side.offer(*[side.buffer(path, number) for number in range(before)], [*bad, (address, length, path == "fill")], side.buffer(path))
    image = side.memory.read(MEMORY // 2, MEMORY // 2)
    if before:
        assert side.take(path) == before
    untouched = side.memory.read(MEMORY // 2 + PAYLOAD * before, MEMORY // 2 - PAYLOAD * before)
    assert untouched == image[PAYLOAD * before :]
    side.breaks(path, address)


@pytest.mark.parametrize("direction", ["read", "write"])
def test_device_11_the_whole_span_counts_if_a_byte_of_it_is_used(ring_format: str, direction: str) -> None:
    side = DeviceSide(ring_format, size=SIZE)
    side.offer([(BUFFERS, 16, direction == "write"), (END - 16, 17, direction == "write")])
    (chain,) = side.queue.pop()
    assert chain.read(16) == bytes(16) if direction == "read" else chain.write(b"x" * 16) == 16, "of the second one nothing is used"
    with pytest.raises(SpecViolation, match=f"{END - 16:#x}"):
        chain.read(1, offset=16) if direction == "read" else chain.write(b"y", offset=16)
    assert side.memory.read(MEMORY - 16, 16) == bytes(16)


def test_device_11_the_last_byte_of_memory_is_memory(ring_format: str) -> None:
    side = DeviceSide(ring_format, size=SIZE)
    side.memory.write(MEMORY - 32, bytes(range(32)))
    side.offer([(END - 32, 16, False), (END - 16, 16, True)])
    (chain,) = side.queue.pop()
    assert chain.read() == bytes(range(16))
    assert chain.write(b"w" * 16) == 16 and side.memory.read(MEMORY - 16, 16) == b"w" * 16
    side.offer([(END - 16, 16, False)], [(BASE, 1, False)])
    assert side.take("burst") == 2


def test_device_11_a_span_may_reach_over_regions_but_not_over_a_hole(ring_format: str) -> None:
    side = DeviceSide(ring_format, size=SIZE)
    more = Memory(4096)
    side.guest.add(END, more)
    side.memory.write(MEMORY - 4, b"abcd")
    more.write(0, b"efgh")
    side.offer([(END - 4, 8, False), (END - 2, 4, True)], [(END - 4, 8, False)])
    (chain,) = side.queue.pop(1)
    assert chain.read() == b"abcdefgh" and chain.write(b"WXYZ") == 4
    assert side.memory.read(MEMORY - 2, 2) + more.read(0, 2) == b"WXYZ"
    assert side.take("burst") == 1
    side.guest.remove(END)
    side.guest.add(END + 4096, more)
    with pytest.raises(SpecViolation, match=f"{END - 4:#x}"):
        chain.read()


def test_device_11_memory_that_was_taken_away_is_not_reached_any_more(ring_format: str) -> None:
    side = DeviceSide(ring_format, size=SIZE)
    more = Memory(4096)
    side.guest.add(END + 0x1_0000, more)
    side.offer([(END + 0x1_0000, 16, True)])
    (chain,) = side.queue.pop()
    assert chain.write(b"x" * 16) == 16
    side.guest.remove(END + 0x1_0000)
    with pytest.raises(SpecViolation) as caught:
        chain.write(b"y" * 16)
    assert more.read(0, 16) == b"x" * 16
    side.chains.append(chain)
    side.stands_still(caught.value)


def test_device_11_the_first_mistake_is_the_one_that_is_kept(ring_format: str) -> None:
    side = DeviceSide(ring_format, size=SIZE)
    side.offer([(0, 16, False)], [(1 << 40, 16, False)])
    first, second = side.queue.pop()
    side.offer_list((BUFFERS, 16, INDIRECT), id=5)
    with pytest.raises(MalformedChain) as caught:
        side.queue.pop()
    for chain in (first, second):
        with pytest.raises(StatusError, match="broken"):
            chain.read()
        assert side.queue.broken is caught.value
    side.chains += [first, second]
    side.stands_still(caught.value)


def test_device_11_what_was_popped_before_the_mistake_is_completed_no_more(ring_format: str) -> None:
    side = DeviceSide(ring_format, size=SIZE)
    side.offer(*[side.buffer("token", number) for number in range(6)])
    batch, burst = side.queue.batch(2), side.burst(2)
    assert side.queue.pop_batch(batch) == 2 and side.queue.pop_burst(burst) == 2
    side.chains += side.queue.pop()
    side.offer_list((BUFFERS, 16, INDIRECT), id=7)
    with pytest.raises(MalformedChain) as caught:
        side.queue.pop()
    assert side.queue.complete_batch(batch) == 0 and len(batch) == 2
    assert side.queue.complete_burst(burst) == 0 and burst.count == 0, "its slots are the pool's again"
    side.queue.rewind(1)
    assert side.queue.outstanding == 6 and side.ring.used() == []
    side.stands_still(caught.value)


# device-12

FLAGS = {wrap: available_flags(wrap) for wrap in (0, 1)}
EVERY = [avail | used for avail in (0, DescriptorFlag.AVAIL) for used in (0, DescriptorFlag.USED)]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("path", ["token", "batch", "burst"])
def test_device_12_one_pair_of_flags_means_available_in_each_lap(size: int, path: str) -> None:
    side = DeviceSide("packed", size=size)
    wrap, position = 1, 0
    for step in range(6 * size):
        for flags in EVERY:
            if flags == FLAGS[wrap]:
                continue
            side.packed.set_descriptor(position, BUFFERS, PAYLOAD, step, flags)
            assert side.take(path) == 0, f"flags {flags:#x} with wrap counter {wrap}"
            assert side.queue.arm() is False
        side.packed.set_descriptor(position, BUFFERS, PAYLOAD, step, FLAGS[wrap])
        assert side.queue.arm() is True
        assert side.take(path) == 1
        if path == "token":
            side.queue.complete(side.chains.pop())
        elif path == "batch":
            side.queue.complete_batch(side.batch)
        else:
            side.queue.complete_burst(side.bursts[-1])
        side.queue.publish()
        descriptor = side.packed.descriptor(position)
        assert (descriptor.id, descriptor.length) == (step, 0)
        assert descriptor.flags & used_flags(1) == used_flags(wrap), "AVAIL and USED are equal, and the wrap counter"
        position, wrap = side.packed.step(position, wrap, 1)


@pytest.mark.parametrize("id", [0, 1, 7, 8, 255, 256, 32767, 32768, 65535])
@pytest.mark.parametrize("length", [1, 2, 8])
def test_device_12_the_id_of_the_last_descriptor_is_given_back_as_it_came(id: int, length: int) -> None:
    side = DeviceSide("packed", size=SIZE)
    for start in range(3):
        side.offer([(BUFFERS, PAYLOAD, True)] * length)
        last = (side.packed.position - 1) % SIZE
        descriptor = side.packed.descriptor(last)
        for position in range(SIZE):
            if position != last and side.packed.descriptor(position).flags & NEXT:
                side.packed.set_descriptor(position, *side.packed.descriptor(position)[:2], 0xAAAA, side.packed.descriptor(position).flags)
        side.packed.set_descriptor(last, *descriptor[:2], id, descriptor.flags)
        side.packed.slots = {id: length}
        (chain,) = side.queue.pop()
        side.queue.complete(chain, start)
        side.queue.publish()
        assert side.packed.used() == [(id, start)]


def test_device_12_two_chains_of_one_id_are_both_given_back() -> None:
    """An id is the driver's own affair: whether it tells its buffers apart is not ours to check, and nothing is found by it."""
    side = DeviceSide("packed", size=SIZE)
    for number in range(SIZE):
        side.packed.add([(BUFFERS + number, 1, True)], 0xFFFF)
    chains = side.queue.pop()
    assert [chain.segments[0][0] - BUFFERS for chain in chains] == [*range(SIZE)]
    for chain in reversed(chains):
        side.queue.complete(chain, 1)
    side.queue.publish()
    assert [(side.packed.descriptor(position).id, side.packed.descriptor(position).length) for position in range(SIZE)] == [
        (0xFFFF, 1)
    ] * SIZE


@pytest.mark.parametrize("size", [3, 5, 6, 7, 255])
def test_device_12_the_wrap_counter_toggles_at_the_rings_size_whatever_that_is(size: int) -> None:
    side = DeviceSide("packed", size=size)
    slots = 0
    for number in range(4 * size):
        length = 1 + number % min(size, 3)
        side.packed.add([(BUFFERS, PAYLOAD, False)] * length, number)
        (chain,) = side.queue.pop()
        assert len(chain.segments) == length
        side.queue.complete(chain)
        side.queue.publish()
        assert side.packed.used() == [(number, 0)]
        slots += length
        position, wrap = slots % size, 1 ^ slots // size & 1
        assert side.queue.base == (position | wrap << 15) * 0x1_0001, "avail and used position, each with its wrap counter"
