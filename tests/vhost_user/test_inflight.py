"""The in-flight layouts, held against the C structures of the text as ctypes lays them out."""

import ctypes as c

from virtio.vhost_user.inflight import ALIGNMENT, Packed, PackedEntry, Split, SplitEntry, region_size

U8, U16, U32, U64 = c.c_uint8, c.c_uint16, c.c_uint32, c.c_uint64


class SplitState(c.Structure):
    _fields_ = [("inflight", U8), ("padding", U8 * 5), ("next", U16), ("counter", U64)]


class SplitRegion(c.Structure):
    _fields_ = [
        ("features", U64),
        ("version", U16),
        ("desc_num", U16),
        ("last_batch_head", U16),
        ("used_idx", U16),
        ("entries", SplitState * 1),
    ]


class PackedState(c.Structure):
    _fields_ = [
        ("inflight", U8),
        ("padding", U8),
        ("next", U16),
        ("last", U16),
        ("num", U16),
        ("counter", U64),
        ("id", U16),
        ("flags", U16),
        ("len", U32),
        ("addr", U64),
    ]


class PackedRegion(c.Structure):
    _fields_ = [
        ("features", U64),
        ("version", U16),
        ("desc_num", U16),
        ("free_head", U16),
        ("old_free_head", U16),
        ("used_idx", U16),
        ("old_used_idx", U16),
        ("used_wrap_counter", U8),
        ("old_used_wrap_counter", U8),
        ("padding", U8 * 7),
        ("entries", PackedState * 1),
    ]


def test_offsets_are_those_of_the_structures() -> None:
    pairs = ((Split, SplitRegion), (Packed, PackedRegion), (SplitEntry, SplitState), (PackedEntry, PackedState))
    for fields, structure in pairs:
        for each in fields:
            assert each.value == (c.sizeof(structure) if each.name == "SIZE" else getattr(structure, each.name.lower()).offset)


def test_a_region_holds_its_queue() -> None:
    for size in (1, 37, 256, 32768):
        assert region_size(size, packed=False) >= 16 + 16 * size and region_size(size, packed=True) >= 32 + 32 * size
        assert not region_size(size, packed=True) % ALIGNMENT and not region_size(size, packed=False) % ALIGNMENT
