"""Where a packed ring goes on whose front-end has forgotten it: QEMU, when its back-end vanished without telling (2.8.1).

QEMU tells then where its own device of the card stood, and that one may have dropped what was transmitted meanwhile: it has written used
descriptors where it believed to be, in the midst of what the back-end still owes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Final

from virtio._core import GuestMemory
from virtio.spec import DescriptorFlag

AVAIL: Final = int(DescriptorFlag.AVAIL)
USED: Final = int(DescriptorFlag.USED)
START: Final = 1 << 31 | 1 << 15
"""The base of a ring that nobody has used: position 0 and wrap counter 1, for available and for used descriptors."""
DESCRIPTOR: Final = 16
ID_AT: Final = 12
FLAGS_AT: Final = 14
PLACE: Final = 0x7FFF
"""Of the lower half of a base: the position, less the wrap counter."""


@dataclass(frozen=True)
class Position:
    """What the flags tell. `owed`: places of available descriptors, oldest first, up to `taken`, used ones that stand behind them."""

    base: int
    owed: tuple[int, ...] = ()
    taken: tuple[int, ...] = ()


def find_position(flags: Sequence[int]) -> Position | None:
    """Where the ring goes on that has these descriptors' flags: at the first one which is available. None: they do not tell it clearly.

    They do, if each chain takes one descriptor of the ring (an indirect one, or a single segment) and was used in order but for those of
    `Position.taken`. What has been taken and not used yet is available still. A ring whose driver did not clear it tells what it was.
    """
    size = len(flags)
    rounds = [bool(each & AVAIL) for each in flags]
    available = [bool(each & AVAIL) != bool(each & USED) for each in flags]
    turns = [index for index in range(1, size) if rounds[index] != rounds[index - 1]]
    if len(turns) > 1 or any(here and each & DescriptorFlag.NEXT for here, each in zip(available, flags, strict=True)):
        return None
    oldest = turns[0] if turns else 0  # where the driver writes next
    order = [*range(oldest, size), *range(oldest)]
    runs = [(key, tuple(indices)) for key, indices in groupby(order, available.__getitem__)]
    if runs[0][0]:
        runs.insert(0, (False, ()))
    if len(runs) == 1:
        return Position(_base(oldest, not rounds[oldest]))
    if len(runs) > 4:
        return None
    owed = runs[1][1]
    return Position(_base(owed[0], rounds[owed[0]]), owed, runs[2][1] if len(runs) > 2 else ())


def may_be_right(memory: GuestMemory, table: int, size: int, position: Position, told: int) -> bool:
    """Whether a front-end may be right that tells this base. The oldest of what looks owed may be what is left of a chain of two
    descriptors: it has the id of the used one before it, and is no table. The ring then goes on behind that and what was used since."""
    owed, taken = position.owed, position.taken
    if not owed or (len(owed) > 1 and taken):
        return False
    first, before = owed[0], (owed[0] - 1) % size
    end = owed[1] if len(owed) > 1 else (first + len(taken) + 1) % size
    same = memory.load(table + DESCRIPTOR * first + ID_AT, 2) == memory.load(table + DESCRIPTOR * before + ID_AT, 2)
    is_table = memory.load(table + DESCRIPTOR * first + FLAGS_AT, 2) & DescriptorFlag.INDIRECT
    return told & PLACE == end and same and not is_table


def put_in_order(memory: GuestMemory, table: int, position: Position) -> int:
    """Makes the ring, whose descriptors lie at `table`, as if what is `taken` had been used first; the base of what is owed then.

    The driver looks at the first of these places alone, which is written last.
    """
    if not position.taken:
        return position.base
    places = position.owed + position.taken
    held = [memory.read(table + DESCRIPTOR * index, DESCRIPTOR) for index in position.taken + position.owed]
    for number in reversed(range(len(places))):
        place, descriptor = table + DESCRIPTOR * places[number], held[number]
        wrap = bool(memory.load(place + FLAGS_AT, 2) & AVAIL)
        flags = int.from_bytes(descriptor[FLAGS_AT:], "little") & ~(AVAIL | USED)
        used = number < len(position.taken)
        memory.write(place, descriptor[:FLAGS_AT])
        memory.store(place + FLAGS_AT, 2, flags | AVAIL * wrap | USED * (wrap == used))
    first = places[len(position.taken)]
    return _base(first, bool(memory.load(table + DESCRIPTOR * first + FLAGS_AT, 2) & AVAIL))


def _base(position: int, wrap: bool) -> int:
    half = position | wrap << 15
    return half << 16 | half
