"""Where a packed ring goes on, told by its descriptors alone: a model of driver and device, stopped anywhere."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtio import GuestMemory, Memory
from virtio.vhost_user.position import AVAIL, DESCRIPTOR, START, USED, Position, find_position, put_in_order

NEXT, INDIRECT = 1, 4
TABLE = 64


class Ring:
    """What both ends leave in the descriptors when each chain takes one of them and is used in order. What is added has the next number as
    its id, modulo 65536."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.backing = Memory(4096)
        self.memory = GuestMemory()
        self.memory.add(0, self.backing)
        self.added = self.used = 0

    @property
    def flags(self) -> list[int]:
        return [self.memory.load(self.at(index) + 14, 2) for index in range(self.size)]

    def at(self, count: int) -> int:
        return TABLE + DESCRIPTOR * (count % self.size)

    def write(self, count: int, address: int, length: int, name: int, flags: int) -> None:
        place = self.at(count)
        self.memory.store(place, 8, address)
        self.memory.store(place + 8, 4, length)
        self.memory.store(place + 12, 2, name)
        self.memory.store(place + 14, 2, flags)

    def add(self) -> None:
        if self.added - self.used < self.size:
            wrap = self.wrap(self.added)
            self.write(self.added, 0x1000 + self.added, 60, self.added, INDIRECT | (AVAIL if wrap else USED))
            self.added += 1

    def use(self) -> None:
        if self.used < self.added:
            self.drop(self.used)
            self.used += 1

    def drop(self, count: int) -> None:
        """Marks the chain of number `count`, in its own place, as used."""
        self.write(count, 0, 0, count, AVAIL | USED if self.wrap(count) else 0)

    def wrap(self, count: int) -> bool:
        return count // self.size % 2 == 0

    def base(self, count: int) -> int:
        half = count % self.size | self.wrap(count) << 15
        return half << 16 | half


@given(st.integers(1, 9), st.lists(st.booleans(), max_size=200), st.integers(0, 6))
def test_the_descriptors_tell_where_the_device_was(size: int, steps: list[bool], first: int) -> None:
    ring = Ring(size)
    for step in [True] * first + steps:
        ring.add() if step else ring.use()
    found = find_position(ring.flags)
    assert found is not None and found.base == ring.base(ring.used) and not found.taken
    assert [place % size for place in range(ring.used, ring.added)] == list(found.owed)


@given(st.data(), st.integers(3, 9), st.integers(0, 40))
def test_what_another_has_used_in_between_is_as_if_it_had_come_first(data: st.DataObject, size: int, before: int) -> None:
    """As QEMU's card does, which transmits for a moment from where it believes to be."""
    ring = Ring(size)
    for _ in range(before):
        ring.add()
        ring.use()
    start = ring.used
    owed = data.draw(st.integers(1, size - 1), "owed")
    taken = data.draw(st.integers(1, size - owed), "taken")
    after = data.draw(st.integers(0, size - owed - taken), "after")
    for _ in range(owed + taken + after):
        ring.add()
    for count in range(start + owed, start + owed + taken):
        ring.drop(count)
    found = find_position(ring.flags)
    assert found is not None and found.base == ring.base(start) and len(found.owed) == owed and len(found.taken) == taken

    base = put_in_order(ring.memory, TABLE, found)

    assert base == ring.base(start + taken)
    names = [ring.memory.load(ring.at(start + number) + 12, 2) for number in range(owed + taken + after)]
    moved = [*range(start + owed, start + owed + taken), *range(start, start + owed)]
    assert names == [*moved, *range(start + owed + taken, start + owed + taken + after)]
    for number in range(owed + taken + after):
        wrap, place = ring.wrap(start + number), ring.at(start + number)
        flags = ring.memory.load(place + 14, 2)
        if number < taken:
            assert flags == (AVAIL | USED if wrap else 0)
        else:
            assert flags == INDIRECT | (AVAIL if wrap else USED)
            assert ring.memory.load(place, 8) == 0x1000 + names[number] and ring.memory.load(place + 8, 4) == 60
    again = find_position(ring.flags)
    assert again is not None and again.base == base and not again.taken


def test_a_ring_that_is_in_order_is_not_written() -> None:
    ring = Ring(4)
    ring.add()
    before = ring.memory.read(0, 4096)
    assert put_in_order(ring.memory, TABLE, Position(START, (0,))) == START
    assert ring.memory.read(0, 4096) == before


def test_a_ring_that_was_used_to_its_end_goes_on_in_the_next_round() -> None:
    used = AVAIL | USED
    assert find_position([0] * 4) == Position(START)
    assert find_position([used] * 4) == Position(0)


@pytest.mark.parametrize(
    "flags",
    [
        [AVAIL | USED, AVAIL | NEXT, AVAIL | USED, 0],  # what is left of a longer chain
        [AVAIL, AVAIL | USED, AVAIL, AVAIL | USED, AVAIL, 0],  # of several
        [0, AVAIL, 0, 0],  # nobody leaves that
    ],
)
def test_a_ring_that_tells_nothing_clearly(flags: list[int]) -> None:
    assert find_position(flags) is None


@given(st.lists(st.integers(0, 0xFFFF), min_size=1, max_size=20))
def test_any_flags_give_a_position_of_the_ring(flags: list[int]) -> None:
    if (found := find_position(flags)) is not None:
        assert found.base >> 16 == found.base & 0xFFFF and found.base & 0x7FFF < len(flags)
        places = found.owed + found.taken
        assert len(set(places)) == len(places) and set(places) <= set(range(len(flags)))
