"""Where a packed ring goes on whose front-end has forgotten it: QEMU, when its back-end vanished without telling (2.8.1)."""

from collections.abc import Sequence
from typing import Final

AVAIL: Final = 1 << 7
USED: Final = 1 << 15
START: Final = 1 << 31 | 1 << 15
"""The base of a ring that nobody has used: position 0 and wrap counter 1, for available and for used descriptors."""


def packed_base(flags: Sequence[int]) -> int:
    """The base that the descriptors' flags tell: that of the first one which is available; `START` if they tell nothing, or not clearly.

    They do, if each chain takes one descriptor of the ring (an indirect one, or a single segment) and was used in order: then available
    ones stand in one run, used ones of this round before it, and behind it those of the round before. What has been taken and not used
    yet is available still.
    """
    rounds = [bool(each & AVAIL) for each in flags]
    available = [bool(each & AVAIL) != bool(each & USED) for each in flags]
    begins = [index for index in range(len(flags)) if available[index] and not available[index - 1]]
    if len(begins) > 1:
        return START
    position = begins[0] if begins else next((index for index in range(1, len(flags)) if rounds[index] != rounds[index - 1]), 0)
    if not any(available) and not position:  # all of one round: new, or used to the end, or never cleared
        return START
    wrap = rounds[position] == available[position]
    for index in range(len(flags)):
        # Behind the position, what is available is of this round, and what is used of the one before; before it, of the next and of this.
        if rounds[index] != (wrap if (index >= position) == available[index] else not wrap):
            return START
    half = position | wrap << 15
    return half << 16 | half
