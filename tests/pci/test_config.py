"""Configuration space as bytes: the walk of the capability list, and what is usable of virtio's (driver-08)."""

from collections.abc import Callable
from struct import pack, pack_into

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtio import TransportError
from virtio.pci.config import SPACE_SIZE, CfgType, Layout, capabilities, device_type, parse
from virtio.pci.function import Bar
from virtio.testing import RawPciFunction

SIZE = 0x4000


def legal(*, without: CfgType | None = None) -> RawPciFunction:
    """A function with one structure of each type in BAR 0, unless one is left out."""
    function = RawPciFunction(bars={0: SIZE})
    for number, kind in enumerate((CfgType.COMMON, CfgType.NOTIFY, CfgType.ISR, CfgType.DEVICE)):
        if kind is not without:
            function.add_structure(kind, 0, number * 0x1000, 0x1000, extra=pack("<I", 4) if kind is CfgType.NOTIFY else b"")
    return function


def space(function: RawPciFunction) -> bytes:
    return bytes(function.bytes[None][:SPACE_SIZE])


def layout(function: RawPciFunction) -> Layout:
    return parse(space(function), function.bars)


def test_all_structures_are_found() -> None:
    function = legal()
    window = function.add_structure(CfgType.PCI, 0, 0, 0, extra=bytes(4))
    function.add_capability(0x11, pack("<HII", 2, 0x2000, 0x2800))
    function.add_structure(CfgType.SHARED_MEMORY, 0, 0x100, 0x200, extra=pack("<II", 0, 0), identity=7)
    found = layout(function)
    assert (found.common.offset, found.notify.offset, found.isr.offset) == (0, 0x1000, 0x2000)
    assert found.notify.multiplier == 4 and found.pci_cfg == window
    assert found.device is not None and found.device[2:6] == (0, 0, 0x3000, 0x1000)
    assert found.msix is not None and (found.msix.size, found.msix.table_offset, found.msix.pending_offset) == (3, 0x2000, 0x2800)
    assert found.shared_memory[7].offset == 0x100 and found.skipped == []


def test_ids_tell_the_type() -> None:
    for pci_id, subsystem, expected in ((0x1041, 0, 1), (0x107F, 9, 63), (0x1000, 1, 1), (0x1005, 4, 4)):
        function = legal()
        pack_into("<H", function.bytes[None], 2, pci_id)
        pack_into("<H", function.bytes[None], 0x2E, subsystem)
        assert device_type(space(function)) == expected


@pytest.mark.parametrize(
    ("offset", "data", "message"),
    [
        (0, b"\x86\x80", "8086:1044 is not a virtio device"),
        (2, b"\xff\x0f", "1af4:0fff is not a virtio device"),
        (2, b"\x80\x10", "1af4:1080 is not a virtio device"),
        (0, b"\xff\xff\xff\xff", "all ones"),
        (0x0E, b"\x01", "header type is 1"),
    ],
)
def test_what_is_no_virtio_device_is_said_so(offset: int, data: bytes, message: str) -> None:
    function = legal()
    function.bytes[None][offset : offset + len(data)] = data
    with pytest.raises(TransportError, match=message):
        device_type(space(function))


def test_a_device_without_virtio_capabilities_is_a_legacy_one() -> None:
    function = RawPciFunction(bars={0: SIZE})
    function.add_capability(0x05, bytes(12))
    with pytest.raises(TransportError, match="legacy"):
        layout(function)
    pack_into("<H", function.bytes[None], 6, 0)  # no capability list at all
    with pytest.raises(TransportError, match="legacy"):
        layout(function)


@pytest.mark.parametrize("cfg_type", [CfgType.COMMON, CfgType.NOTIFY, CfgType.ISR, CfgType.DEVICE])
@pytest.mark.parametrize("cap_len", [0, 3, 15])
def test_driver_08_a_short_cap_len_is_passed_over(cfg_type: CfgType, cap_len: int) -> None:
    function = legal(without=cfg_type)
    function.add_structure(cfg_type, 0, 0x3000, 0x1000, extra=pack("<I", 4), cap_len=cap_len)
    if cfg_type is CfgType.DEVICE:
        assert layout(function).device is None
    else:
        with pytest.raises(TransportError, match=rf"no usable {cfg_type.name} structure.*cap_len is {cap_len}, less than"):
            layout(function)


@pytest.mark.parametrize(("cfg_type", "least"), [(CfgType.NOTIFY, 20), (CfgType.PCI, 20), (CfgType.SHARED_MEMORY, 24)])
def test_driver_08_longer_types_have_longer_minimums(cfg_type: CfgType, least: int) -> None:
    def built(cap_len: int) -> Layout:
        function = legal()
        function.add_structure(cfg_type, 0, 0x100, 0x100, extra=bytes(12), cap_len=cap_len)
        return layout(function)

    assert any(f"cap_len is {least - 1}" in reason for reason in built(least - 1).skipped)
    assert built(least).skipped == [] == built(least + 4).skipped


def test_driver_08_larger_capabilities_are_accepted() -> None:
    function = RawPciFunction(bars={0: SIZE})
    for number, kind in enumerate((CfgType.COMMON, CfgType.NOTIFY, CfgType.ISR)):
        function.add_structure(kind, 0, number * 0x1000, 0x1000, extra=pack("<I", 8) + bytes(28))
    assert layout(function).notify.multiplier == 8


def test_driver_08_a_cap_len_beyond_configuration_space_is_passed_over() -> None:
    function = legal(without=CfgType.ISR)
    function.add_capability(0x09, pack("<BBBB2xII", 20, CfgType.ISR, 0, 0, 0, 4), place=0xF0)
    with pytest.raises(TransportError, match="cap_len is 20, but configuration space ends after 16 bytes"):
        layout(function)


@pytest.mark.parametrize("place", [0xF4, 0xFC])
def test_driver_08_capabilities_at_the_end_of_configuration_space(place: int) -> None:
    for identity in (0x09, 0x11):
        function = legal()
        function.bytes[None][0xFC:0x100] = bytes([identity, 0, 16, 1])
        function.add_capability(identity, b"\x10\x01", place=place)
        assert layout(function).common.offset == 0


@pytest.mark.parametrize("bar", [6, 7, 0xFF])
@pytest.mark.parametrize("cfg_type", [CfgType.COMMON, CfgType.NOTIFY, CfgType.ISR])
def test_driver_08_reserved_bars_are_skipped(cfg_type: CfgType, bar: int) -> None:
    function = RawPciFunction(bars={0: SIZE})
    function.add_structure(cfg_type, bar, 0x0, 0x1000, extra=pack("<I", 2))
    for kind in (CfgType.COMMON, CfgType.NOTIFY, CfgType.ISR):
        function.add_structure(kind, 0, 0x1000, 0x1000, extra=pack("<I", 2))
    found = layout(function)
    assert {found.common.bar, found.notify.bar, found.isr.bar} == {0} and len(found.skipped) == 1


@pytest.mark.parametrize("cfg_type", [0, 6, 7, 9, 10, 255])
def test_driver_08_reserved_types_are_skipped(cfg_type: int) -> None:
    function = RawPciFunction(bars={0: SIZE})
    function.add_structure(cfg_type, 5, 0xFFFF_FFFF, 0xFFFF_FFFF, cap_len=4)
    for number, kind in enumerate((CfgType.COMMON, CfgType.NOTIFY, CfgType.ISR)):
        function.add_structure(kind, 0, number * 0x1000, 0x1000, extra=pack("<I", 0))
    assert len(layout(function).skipped) == 1


@pytest.mark.parametrize(
    ("cfg_type", "bar", "offset", "length"),
    [
        (CfgType.COMMON, 0, 2, 0x1000),  # alignment
        (CfgType.COMMON, 0, 0, 55),
        (CfgType.COMMON, 0, SIZE - 0x40, 0x44),
        (CfgType.COMMON, 0, SIZE, 56),
        (CfgType.COMMON, 0, 0xFFFF_FFFC, 56),
        (CfgType.COMMON, 0, 4, 0xFFFF_FFFC),
        (CfgType.COMMON, 1, 0, 56),  # no such BAR
        (CfgType.NOTIFY, 0, 1, 2),
        (CfgType.NOTIFY, 0, 0, 1),
        (CfgType.NOTIFY, 0, SIZE - 2, 4),
        (CfgType.ISR, 0, 0, 0),
        (CfgType.ISR, 0, SIZE, 1),
        (CfgType.DEVICE, 0, 2, 4),
        (CfgType.DEVICE, 0, SIZE - 4, 8),
        (CfgType.DEVICE, 0, 0, 0),
    ],
)
def test_driver_08_the_first_usable_structure_wins(cfg_type: CfgType, bar: int, offset: int, length: int) -> None:
    function = RawPciFunction(bars={0: SIZE})
    function.add_structure(cfg_type, bar, offset, length, extra=pack("<I", 2))
    for at in (0x1000, 0x2000):
        for kind in (CfgType.COMMON, CfgType.NOTIFY, CfgType.ISR, CfgType.DEVICE):
            function.add_structure(kind, 0, at, 0x100, extra=pack("<I", 2) if kind is CfgType.NOTIFY else b"")
    found = layout(function)
    assert {found.common.offset, found.notify.offset, found.isr.offset} == {0x1000} and len(found.skipped) == 1
    assert found.device is not None and found.device.offset == 0x1000


@pytest.mark.parametrize("multiplier", [1, 3, 6, 0x8000_0001, 0xFFFF_FFFF])
def test_driver_08_an_odd_notify_multiplier_is_passed_over(multiplier: int) -> None:
    function = legal(without=CfgType.NOTIFY)
    function.add_structure(CfgType.NOTIFY, 0, 0, 0x100, extra=pack("<I", multiplier))
    with pytest.raises(TransportError, match=f"notify_off_multiplier {multiplier}"):
        layout(function)


def test_driver_08_64_bit_shared_memory_is_inside_its_bar() -> None:
    function = legal()
    for identity, (offset, length) in enumerate([(1 << 32, 1 << 33), (1 << 32, 1 << 34), ((1 << 64) - 4, 1 << 63)]):
        function.add_structure(
            CfgType.SHARED_MEMORY,
            4,
            offset & 0xFFFF_FFFF,
            length & 0xFFFF_FFFF,
            extra=pack("<II", offset >> 32, length >> 32),
            identity=identity,
        )
    found = parse(space(function), {**function.bars, 4: Bar(4, 1 << 40, 1 << 34, "memory64", True)})
    assert {key: (each.offset, each.length) for key, each in found.shared_memory.items()} == {0: (1 << 32, 1 << 33)}


@pytest.mark.parametrize(("table", "pending"), [(6, 0), (0, 7), (SIZE, 0), (SIZE - 32, 0), (0, SIZE), (1, 0)])
def test_driver_08_an_msix_table_outside_its_bar_is_no_msix(table: int, pending: int) -> None:
    function = legal()
    function.add_capability(0x11, pack("<HII", 2, table, pending))
    assert layout(function).msix is None


@pytest.mark.parametrize("length", [1, 2, 5])
def test_driver_08_a_list_that_loops_is_an_error(length: int) -> None:
    function = legal()
    places = [function.add_capability(0x01, bytes(6)) for _ in range(length)]
    function.bytes[None][places[-1] + 1] = places[0]
    with pytest.raises(TransportError, match="loops"):
        layout(function)


def test_driver_08_a_list_that_leads_into_the_header_is_an_error() -> None:
    function = legal()
    function.bytes[None][0x34] = 0x10
    with pytest.raises(TransportError, match="into the header"):
        layout(function)


def test_the_low_bits_of_pointers_are_reserved() -> None:
    function = legal()
    function.bytes[None][0x34] |= 3
    assert layout(function).common.offset == 0


@given(st.binary(min_size=192, max_size=192), st.dictionaries(st.integers(0, 5), st.sampled_from([0x100, SIZE, 1 << 33])))
def test_driver_08_any_bytes_are_parsed_or_refused(body: bytes, sizes: dict[int, int]) -> None:
    header = bytearray(legal().bytes[None][:64])
    header[0x34] = 0x40
    bars = {index: Bar(index, 0, size, "memory64", False) for index, size in sizes.items()}
    outcome: Callable[[], Layout] = lambda: parse(bytes(header) + body, bars)  # noqa: E731
    assert len(list(_capabilities(bytes(header) + body))) <= 48
    try:
        found = outcome()
    except TransportError:
        return
    for structure in (found.common, found.notify, found.isr, found.device):
        assert structure is None or structure.offset + structure.length <= bars[structure.bar].size


def _capabilities(data: bytes) -> list[int]:
    found: list[int] = []
    try:
        for capability in capabilities(data):
            found.append(capability.place)
    except TransportError:
        pass
    return found
