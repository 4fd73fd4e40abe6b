"""A hostile driver before its queue runs: impossible sizes, areas and features (device-01, device-02, device-04)."""

import pytest

from tests.hostile.sides import BASE, DeviceSide, features
from virtio import (
    Device,
    DeviceId,
    DeviceQueue,
    DriverQueue,
    EventFd,
    Feature,
    Features,
    GuestMemory,
    Memory,
    Requires,
    Status,
    StatusError,
    layout,
)
from virtio.device import DeviceState
from virtio.transport.loopback import LoopbackTransport

MEMORY = 1 << 20


class Toy(Device):
    device_id = DeviceId.ENTROPY
    queues = ("queue",)
    queue_size = 16

    def on_queue(self, queue: DeviceQueue) -> None:
        queue.pop()


def named(number: int) -> str:
    """Matches a message that says the number, in decimal or hexadecimal."""
    return rf"(?<![\da-f]){number}(?!\d)|{number:#x}(?![\da-f])"


@pytest.fixture
def guest() -> GuestMemory:
    guest = GuestMemory()
    guest.add(BASE, Memory(MEMORY))
    return guest


AREAS = (BASE, BASE + 0x8_0000, BASE + 0xA_0000)
"""Room for any size that fits at all."""

BAD_SIZES = {
    "split": (-1, 0, 3, 6, 12, 255, 32767, 32769, 65535, 65536, 65536 + 8, (1 << 32) + 8, 1 << 32, 1 << 64, (1 << 64) + 8, 1 << 200),
    "packed": (-1, 0, 32769, 65535, 65536, 65536 + 7, (1 << 32) + 7, 1 << 32, 1 << 64, (1 << 64) + 7, 1 << 200),
}
GOOD_SIZES = {"split": (1, 2, 4, 256, 16384), "packed": (1, 2, 3, 5, 7, 255, 1000, 16384)}


def test_device_01_sizes_that_no_queue_has_are_refused(ring_format: str, guest: GuestMemory) -> None:
    bits = features(ring_format)
    for size in BAD_SIZES[ring_format]:
        with pytest.raises(ValueError, match=named(size)):
            DeviceQueue(guest, size, AREAS, features=bits)
        with pytest.raises(ValueError, match=named(size)):
            layout(size, features=bits)
        memory = Memory(MEMORY)
        with pytest.raises(ValueError, match=named(size)):
            DriverQueue(memory, size, features=bits)
        memory.close()  # nothing was left behind that uses it
    for size in GOOD_SIZES[ring_format]:
        assert DeviceQueue(guest, size, AREAS, features=bits).size == size


@pytest.mark.parametrize("size", [None, "8", 8.0, b"8"])
def test_device_01_a_size_that_is_no_number_is_refused(ring_format: str, guest: GuestMemory, size: object) -> None:
    with pytest.raises(TypeError):
        DeviceQueue(guest, size, AREAS, features=features(ring_format))  # type: ignore[arg-type]


def test_device_01_the_largest_size_works(ring_format: str) -> None:
    memory, guest, bits = Memory(1 << 21), GuestMemory(), features(ring_format)
    guest.add(BASE, memory)
    queue = DeviceQueue(guest, 32768, (BASE, BASE + (1 << 19), BASE + (1 << 20)), features=bits)
    assert queue.size == 32768 and queue.pop() == []


def test_device_01_the_devices_maximum_holds_at_full_width(ring_format: str, guest: GuestMemory) -> None:
    bits = features(ring_format)
    assert DeviceQueue(guest, 16, AREAS, features=bits, max_size=16).size == 16
    for size in (17, 32, 65536 + 16, (1 << 32) + 16):
        with pytest.raises(ValueError, match=rf"\b{size}\b.*\b16\b"):
            DeviceQueue(guest, size, AREAS, features=bits, max_size=16)
    for most in (0, -1, 32769, 65536):
        with pytest.raises(ValueError, match=str(most)):
            DeviceQueue(guest, 8, AREAS, features=bits, max_size=most)


def test_device_01_a_refused_size_leaves_a_device_as_it_was(ring_format: str) -> None:
    device = Toy()
    transport = LoopbackTransport(device)
    memory = Memory(MEMORY)
    base = transport.attach(memory)
    negotiated(device, features(ring_format))
    areas = (base, base + 0x8_0000, base + 0xA_0000)
    for size in (0, 17, 32, 65536 + 8, (1 << 32) + 16, -8, *((3, 12) if ring_format == "split" else ())):
        with pytest.raises(ValueError, match=str(size)):
            transport.queue_setup(0, size, areas)
        assert device.queue(0) is None and device.state is DeviceState.FEATURES_OK
    transport.queue_setup(0, 16, areas)
    queue = device.queue(0)
    assert queue is not None and queue.size == 16 and queue.ring_format == ring_format
    transport.close()


ALIGNMENT = {"split": (16, 2, 4), "packed": (16, 4, 4)}


@pytest.mark.parametrize("area", [0, 1, 2])
def test_device_02_an_unaligned_area_is_refused(ring_format: str, guest: GuestMemory, area: int) -> None:
    align = ALIGNMENT[ring_format][area]
    for offset in range(1, 17):
        areas = [BASE + 0x1000, BASE + 0x2000, BASE + 0x3000]
        areas[area] += offset
        if offset % align:
            with pytest.raises(ValueError, match=rf"{areas[area]:#x}.*\b{align}\b"):
                DeviceQueue(guest, 8, (areas[0], areas[1], areas[2]), features=features(ring_format))
        else:
            assert DeviceQueue(guest, 8, (areas[0], areas[1], areas[2]), features=features(ring_format)).areas[area] == areas[area]


@pytest.mark.parametrize("area", [0, 1, 2])
@pytest.mark.parametrize("size", [1, 8, 256])
def test_device_02_an_area_lies_in_memory_to_its_last_byte(ring_format: str, guest: GuestMemory, area: int, size: int) -> None:
    bits = features(ring_format)
    length, align = layout(size, features=bits)[area]
    assert (
        length
        == {
            "split": (16 * size, 6 + 2 * size, 6 + 8 * size),
            "packed": (16 * size, 4, 4),
        }[ring_format][area]
    ), "16n, 6 + 2n, 6 + 8n bytes (2.7), or 16n, 4, 4 (2.8.10.1)"
    areas = [BASE + 0x8000, BASE + 0x1_0000, BASE + 0x2_0000]
    last = (BASE + MEMORY - length) // align * align
    areas[area] = last
    assert DeviceQueue(guest, size, (areas[0], areas[1], areas[2]), features=bits).pop() == []
    beyond = (last + align, BASE + MEMORY - align, BASE + MEMORY, BASE - align, BASE - length // align * align, 0, 1 << 63)
    overflowing = [(1 << 64) - align, (1 << 64) - (length // align) * align]
    for address in (*beyond, *overflowing):
        if BASE <= address and address + length <= BASE + MEMORY:
            continue
        areas[area] = address
        with pytest.raises(ValueError, match=rf"{address:#x}.*\b{length}\b"):
            DeviceQueue(guest, size, (areas[0], areas[1], areas[2]), features=bits)


@pytest.mark.parametrize("area", [0, 1, 2])
def test_device_02_addresses_have_64_bits(ring_format: str, guest: GuestMemory, area: int) -> None:
    for address in (-16, 1 << 64, (1 << 64) + BASE, 1 << 128):
        areas = [BASE, BASE + 0x1000, BASE + 0x2000]
        areas[area] = address
        with pytest.raises(ValueError, match=rf"{address}|{address:#x}"):
            DeviceQueue(guest, 8, (areas[0], areas[1], areas[2]), features=features(ring_format))
    with pytest.raises(ValueError, match="3"):
        DeviceQueue(guest, 8, (BASE, BASE), features=features(ring_format))  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        DeviceQueue(guest, 8, (BASE, BASE, None), features=features(ring_format))  # type: ignore[arg-type]


@pytest.mark.parametrize("area", [0, 1, 2])
def test_device_02_an_area_does_not_reach_over_a_hole(ring_format: str, area: int) -> None:
    guest, bits = GuestMemory(), features(ring_format)
    guest.add(BASE, Memory(0x1_0000))
    guest.add(BASE + 0x1_1000, Memory(0x1_0000))
    length, align = layout(256, features=bits)[area]
    areas = [BASE, BASE + 0x2000, BASE + 0x4000]
    for address in (BASE + 0x1_0000 - align, BASE + 0x1_0000, BASE + 0x1_1000 - align):
        areas[area] = address
        if address + length > BASE + 0x1_0000:
            with pytest.raises(ValueError, match=f"{address:#x}"):
                DeviceQueue(guest, 256, (areas[0], areas[1], areas[2]), features=bits)
    areas[area] = BASE + 0x1_1000
    assert DeviceQueue(guest, 256, (areas[0], areas[1], areas[2]), features=bits).pop() == []


def test_device_02_refused_areas_leave_a_device_as_it_was(ring_format: str) -> None:
    device = Toy()
    transport = LoopbackTransport(device)
    memory = Memory(MEMORY)
    base = transport.attach(memory)
    negotiated(device, features(ring_format))
    good = (base, base + 0x1000, base + 0x2000)
    for area in range(3):
        for wrong in (good[area] + 1, base + MEMORY - 2, (1 << 64) - 16, base - 16):
            areas = [*good]
            areas[area] = wrong
            with pytest.raises(ValueError, match=f"{wrong:#x}"):
                transport.queue_setup(0, 16, (areas[0], areas[1], areas[2]))
            assert device.queue(0) is None and device.state is DeviceState.FEATURES_OK
    transport.queue_setup(0, 16, good)
    assert device.queue(0) is not None
    transport.close()


def test_device_02_memory_that_goes_away_while_the_ring_is_used_stays_until_it_is_let_go(ring_format: str) -> None:
    side = DeviceSide(ring_format)
    side.offer(side.buffer())
    side.guest.remove(BASE)
    assert side.take("batch") == 1, "the ring's areas are counted by the queue that uses them"


def negotiated(device: Device, accepted: Features) -> None:
    device.write_status(Status.ACKNOWLEDGE | Status.DRIVER)
    device.accept(accepted)
    device.write_status(device.status | Status.FEATURES_OK)
    assert Status.FEATURES_OK in device.status


def test_device_04_no_bit_that_was_not_offered_lets_features_ok_stick() -> None:
    device = Toy()
    transport = LoopbackTransport(device)
    transport.status = Status.ACKNOWLEDGE | Status.DRIVER
    for bit in range(128):
        transport.accept(Features({Feature.VERSION_1, bit}))
        transport.status = device.status | Status.FEATURES_OK
        if bit in device.offered:
            assert Status.FEATURES_OK in transport.status
            transport.reset()
            transport.status = Status.ACKNOWLEDGE | Status.DRIVER
        else:
            assert transport.status == Status.ACKNOWLEDGE | Status.DRIVER
            assert device.refused is not None and device.refused.missing == {bit}
            with pytest.raises(StatusError):
                transport.status = device.status | Status.DRIVER_OK
            with pytest.raises(StatusError):
                transport.queue_setup(0, 8, AREAS)
    transport.close()


def test_device_04_features_do_not_change_any_more_once_they_stick(ring_format: str) -> None:
    device = Toy()
    transport = LoopbackTransport(device)
    memory = Memory(MEMORY)
    base = transport.attach(memory)
    accepted = features(ring_format)
    negotiated(device, accepted)
    transport.queue_setup(0, 8, (base, base + 0x1000, base + 0x2000))
    for status in (Status(0), Status.DRIVER_OK):
        transport.status = device.status | status
        for other in (Features(), accepted | {Feature.EVENT_IDX}, accepted ^ {Feature.RING_PACKED}, Features(range(128))):
            with pytest.raises(StatusError, match="out of order"):
                transport.accept(other)
            assert device.accepted == accepted
        with pytest.raises(StatusError):  # nor may FEATURES_OK be taken back, to change them then
            transport.status = Status.ACKNOWLEDGE | Status.DRIVER
        assert Status.FEATURES_OK in device.status
    queue = device.queue(0)
    assert queue is not None and queue.ring_format == ring_format
    transport.close()


def test_device_04_the_rules_between_features_are_checked_by_the_device() -> None:
    class Ruled(Toy):
        features = (1, 2, 3)
        rules = (Requires(Feature.EVENT_IDX, Feature.INDIRECT_DESC, section="5.0"),)

    for accepted, sticks in (
        ({Feature.VERSION_1, Feature.EVENT_IDX}, False),
        ({Feature.VERSION_1, Feature.EVENT_IDX, Feature.INDIRECT_DESC}, True),
        ({Feature.VERSION_1, Feature.INDIRECT_DESC}, True),
        ({Feature.EVENT_IDX, Feature.INDIRECT_DESC}, False),
        (set[int](), False),
    ):
        device = Ruled()
        device.write_status(Status.ACKNOWLEDGE | Status.DRIVER)
        device.accept(Features(accepted))
        device.write_status(device.status | Status.FEATURES_OK)
        assert (Status.FEATURES_OK in device.status) is sticks
        assert (device.refused is None) is sticks


def test_device_04_steps_of_the_status_that_were_skipped_are_refused() -> None:
    ready = Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK
    for status in (Status.DRIVER, Status.FEATURES_OK, Status.DRIVER_OK, Status.ACKNOWLEDGE | Status.FEATURES_OK, ready - 1):
        device = Toy()
        with pytest.raises(StatusError):
            device.write_status(status)
        assert device.status == 0
    device = Toy()
    device.write_status(ready | Status.DRIVER_OK)  # in one write: no feature was accepted, so none of the rest sticks either
    assert device.status == Status.ACKNOWLEDGE | Status.DRIVER
    with pytest.raises(StatusError):
        device.setup_queue(0, 8, AREAS, doorbell=EventFd(), interrupt=None)
    for wide in (256, 256 + 15, -1):
        with pytest.raises(ValueError, match=f"{wide:#x}"):
            device.write_status(wide)
