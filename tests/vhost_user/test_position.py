"""Where a packed ring goes on, told by its descriptors alone: a model of driver and device, stopped anywhere."""

from hypothesis import given
from hypothesis import strategies as st

from virtio.vhost_user.position import AVAIL, START, USED, packed_base

NEXT = 1


class Ring:
    """What both ends leave in the descriptors' flags when each chain takes one descriptor and is used in order."""

    def __init__(self, size: int) -> None:
        self.flags = [0] * size
        self.added = self.used = 0

    def add(self) -> None:
        if self.added - self.used < len(self.flags):
            self.flags[self.added % len(self.flags)] = AVAIL if self.wrap(self.added) else USED
            self.added += 1

    def use(self) -> None:
        if self.used < self.added:
            self.flags[self.used % len(self.flags)] = AVAIL | USED if self.wrap(self.used) else 0
            self.used += 1

    def wrap(self, count: int) -> bool:
        return count // len(self.flags) % 2 == 0

    @property
    def base(self) -> int:
        half = self.used % len(self.flags) | self.wrap(self.used) << 15
        return half << 16 | half


@given(st.integers(1, 9), st.lists(st.booleans(), max_size=200), st.integers(0, 6))
def test_the_descriptors_tell_where_the_device_was(size: int, steps: list[bool], first: int) -> None:
    ring = Ring(size)
    for step in [True] * first + steps:
        ring.add() if step else ring.use()
    told = packed_base(ring.flags)
    if ring.added == ring.used and ring.used % size == 0:  # looks as one that was never used, or cleared
        assert told == START
    else:
        assert told == ring.base


def test_a_ring_that_tells_nothing_clearly_begins_anew() -> None:
    available, used = AVAIL, AVAIL | USED
    assert packed_base([0] * 4) == START
    assert packed_base([used] * 4) == START
    assert packed_base([used, available, used, available, 0]) == START  # what is left of longer chains
    assert packed_base([used, available | NEXT, used, 0]) == START
    assert packed_base([0, available, 0, 0]) == START  # nobody leaves that


@given(st.lists(st.integers(0, 0xFFFF), min_size=1, max_size=20))
def test_any_flags_give_a_position_of_the_ring(flags: list[int]) -> None:
    told = packed_base(flags)
    assert told >> 16 == told & 0xFFFF and told & 0x7FFF < len(flags)
