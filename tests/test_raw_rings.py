"""The hand-written rings of `virtio.testing`, against each other and against the specification's layout."""

import pytest

from virtio import GuestMemory, Memory, layout
from virtio.spec import DescriptorFlag, RingEvent
from virtio.testing import PackedDescriptor, PackedEvent, RawPackedDevice, RawPackedDriver, RawSplitDevice, RawSplitDriver, SplitDescriptor

BASE = 0x4000
BUFFERS = [(BASE + 0x8000, 64, False), (BASE + 0x8040, 32, True)]


@pytest.fixture
def memory() -> Memory:
    return Memory(1 << 16)


@pytest.fixture
def guest(memory: Memory) -> GuestMemory:
    guest = GuestMemory()
    guest.add(BASE, memory)
    return guest


def test_split_ends_understand_each_other_beyond_a_wrap_of_the_index(memory: Memory, guest: GuestMemory) -> None:
    driver = RawSplitDriver(memory, 4, address=BASE)
    device = RawSplitDevice(guest, 4, driver.areas)
    driver.avail_idx = device.avail_position = driver.used_idx = driver.used_position = 65530
    for number in range(20):
        head = driver.add(BUFFERS)
        driver.make_available(head)
        assert device.available() == [head]
        first, second = device.chain(head)
        assert (first.address, first.length, first.flags) == (*BUFFERS[0][:2], DescriptorFlag.NEXT)
        assert second == SplitDescriptor(*BUFFERS[1][:2], DescriptorFlag.WRITE)
        device.use(head, number)
        assert driver.used() == [(head, number)]
    assert driver.avail_idx == driver.used_idx == (65530 + 20) % 65536


@pytest.mark.parametrize("size", [1, 3, 4, 7])
def test_packed_ends_understand_each_other_round_and_round(memory: Memory, guest: GuestMemory, size: int) -> None:
    driver = RawPackedDriver(memory, size, address=BASE)
    device = RawPackedDevice(guest, size, driver.areas)
    buffers = BUFFERS[: min(size, 2)]
    for number in range(5 * size):
        position = driver.add(buffers, 1000 + number, visible=bool(number % 2))
        if not number % 2:
            assert device.available() == []
            driver.make_available(position)
        (found,) = device.available()
        assert [(each.address, each.length) for each in found] == [each[:2] for each in buffers]
        assert [bool(each.flags & DescriptorFlag.WRITE) for each in found] == [each[2] for each in buffers]
        assert found[-1].id == 1000 + number
        assert driver.used() == []
        device.use(found[-1].id, number, slots=len(found))
        assert driver.used() == [(1000 + number, number)]


def test_split_fields_lie_where_the_specification_puts_them(memory: Memory) -> None:
    ring = RawSplitDriver(memory, 8, (BASE, BASE + 0x100, BASE + 0x200), address=BASE)
    ring.set_descriptor(3, 0x1122334455667788, 0x99AABBCC, 0xDDEE, 0xFF01)
    assert memory.read(48, 16).hex() == "8877665544332211ccbbaa99eedd01ff"
    assert ring.descriptor(3) == SplitDescriptor(0x1122334455667788, 0x99AABBCC, 0xDDEE, 0xFF01)
    ring.avail_flags, ring.avail_idx, ring.used_event = 0x0102, 0x0304, 0x0506
    ring.set_avail_element(15, 0x0708)
    assert memory.read(0x100, 22).hex() == "02010403" + "0000" * 7 + "0807" + "0605"
    assert (ring.avail_flags, ring.avail_idx, ring.used_event, ring.avail_element(7)) == (0x0102, 0x0304, 0x0506, 0x0708)
    ring.used_flags, ring.used_idx, ring.avail_event = 0x1112, 0x1314, 0x1516
    ring.set_used_element(8, 0x21222324, 0x31323334)
    assert memory.read(0x200, 70).hex() == "12111413" + "2423222134333231" + "00" * 56 + "1615"
    assert (ring.used_flags, ring.used_idx, ring.avail_event, ring.used_element(0)) == (0x1112, 0x1314, 0x1516, (0x21222324, 0x31323334))


def test_packed_fields_lie_where_the_specification_puts_them(memory: Memory) -> None:
    ring = RawPackedDriver(memory, 5, (BASE, BASE + 0x100, BASE + 0x200), address=BASE)
    ring.set_descriptor(4, 0x1122334455667788, 0x99AABBCC, 0xDDEE, 0x0102)
    assert memory.read(64, 16).hex() == "8877665544332211ccbbaa99eedd0201"
    ring.set_flags(4, 0x8080)
    assert ring.descriptor(4) == PackedDescriptor(0x1122334455667788, 0x99AABBCC, 0xDDEE, 0x8080)
    ring.driver_event = PackedEvent(RingEvent.DESC, 3, 1)
    ring.device_event = PackedEvent(RingEvent.DISABLE)
    assert memory.read(0x100, 4).hex() == "03800200" and memory.read(0x200, 4).hex() == "00000100"
    assert ring.driver_event == (2, 3, 1) and ring.device_event == (1, 0, 0)


def test_tables_are_read_as_they_were_written(memory: Memory, guest: GuestMemory) -> None:
    split = RawSplitDriver(memory, 4, address=BASE)
    table = BASE + 0xC001  # no alignment is needed
    head = split.add_indirect(table, BUFFERS)
    device = RawSplitDevice(guest, 4, split.areas)
    (descriptor,) = device.chain(head)
    assert descriptor == SplitDescriptor(table, 32, DescriptorFlag.INDIRECT)
    assert device.table(descriptor) == [(*BUFFERS[0][:2], DescriptorFlag.NEXT, 1), (*BUFFERS[1][:2], DescriptorFlag.WRITE, 0)]
    packed = RawPackedDriver(memory, 4, address=BASE)
    packed.add_indirect(table, BUFFERS, 7)
    ((found,),) = RawPackedDevice(guest, 4, packed.areas).available()
    assert (found.address, found.length, found.id) == (table, 32, 7) and found.flags & DescriptorFlag.INDIRECT
    assert memory.read(table - BASE + 16 + 12, 4).hex() == "00000200"


def test_areas_are_allocated_zeroed_and_aligned(memory: Memory) -> None:
    memory.write(0, b"\xff" * memory.size)
    for ring in (RawSplitDriver(memory, 8, address=BASE), RawPackedDriver(memory, 7, address=BASE)):
        for place, (length, align) in zip(ring.areas, layout(ring.size, features=ring.features), strict=True):
            assert place % align == 0
            assert memory.read(place - BASE, length) == bytes(length)


def test_only_a_driver_owns_memory(guest: GuestMemory) -> None:
    with pytest.raises(TypeError, match="areas"):
        RawSplitDevice(guest, 4)
    with pytest.raises(ValueError, match="0x10"):
        RawSplitDevice(guest, 4, (BASE, BASE, BASE), address=16)


def test_a_value_that_does_not_fit_leaves_the_field_beside_it_alone() -> None:
    split, packed = RawSplitDriver(Memory(1 << 16), 8), RawPackedDriver(Memory(1 << 16), 8)
    for ring in (split, packed):
        for arguments, what in [
            ((0, 1 << 64, 1), "address 18446744073709551616 does not fit in 64 bits"),
            ((0, 0, 1 << 32), "length 4294967296 does not fit in 32 bits"),
            ((0, 0, 1, 1 << 16), "65536 does not fit in 16 bits"),
            ((0, 0, 1, 0, 1 << 16), "65536 does not fit in 16 bits"),
            ((8, 0, 1), "descriptor 8 is not in 0 to 7"),
            ((-1, 0, 1), "descriptor -1 is not in 0 to 7"),
        ]:
            with pytest.raises(ValueError, match=what):
                ring.set_descriptor(*arguments)
        assert tuple(ring.descriptor(0)) == (0, 0, 0, 0)
        with pytest.raises(ValueError, match="at least one segment"):
            ring.add([])
