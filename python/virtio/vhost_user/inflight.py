"""Where the fields of the in-flight area lie, in both formats: offsets in bytes, from a queue's region or from an entry's start.

A region is a header and an entry for each descriptor; the queues' regions follow each other. The text does not say how they are aligned:
here each begins at a multiple of 64.
"""

from enum import IntEnum
from typing import Final

VERSION: Final = 1
"""0 is an area that nobody has initialized yet."""
ALIGNMENT: Final = 64


class Split(IntEnum):
    """Header of a split queue's region."""

    FEATURES = 0
    VERSION = 8
    DESC_NUM = 10
    LAST_BATCH_HEAD = 12
    USED_IDX = 14
    ENTRIES = 16


class SplitEntry(IntEnum):
    """An entry of a split queue's region."""

    INFLIGHT = 0
    NEXT = 6
    COUNTER = 8
    SIZE = 16


class Packed(IntEnum):
    """Header of a packed queue's region; 7 bytes of padding, and 3 that C's alignment adds, come before the entries."""

    FEATURES = 0
    VERSION = 8
    DESC_NUM = 10
    FREE_HEAD = 12
    OLD_FREE_HEAD = 14
    USED_IDX = 16
    OLD_USED_IDX = 18
    USED_WRAP_COUNTER = 20
    OLD_USED_WRAP_COUNTER = 21
    ENTRIES = 32


class PackedEntry(IntEnum):
    """An entry of a packed queue's region."""

    INFLIGHT = 0
    NEXT = 2
    LAST = 4
    NUM = 6
    COUNTER = 8
    ID = 16
    FLAGS = 18
    LEN = 20
    ADDR = 24
    SIZE = 32


def region_size(queue_size: int, packed: bool) -> int:
    """Bytes of one queue's region, as a multiple of `ALIGNMENT`."""
    size = Packed.ENTRIES + queue_size * PackedEntry.SIZE if packed else Split.ENTRIES + queue_size * SplitEntry.SIZE
    return -(-size // ALIGNMENT) * ALIGNMENT
