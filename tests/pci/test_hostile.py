"""Hostile functions: capabilities, registers and answers that lie, before a device that is legal otherwise (driver-06 to -10)."""

from collections.abc import Iterator
from contextlib import suppress
from itertools import count, repeat
from struct import pack
from typing import Any

import pytest

from tests.pci.devices import Numbers, NumbersDriver
from virtio import FeatureNegotiationError, StatusError, TransportError, VirtioError
from virtio.devices.rng import RngDriver
from virtio.driver import Driver
from virtio.pci.config import NO_VECTOR, CfgType, Common
from virtio.pci.emulated import EmulatedFunction
from virtio.spec import Feature, Status
from virtio.testing import RawPciFunction
from virtio.transport import CARRIED
from virtio.transport import pci as transport_pci
from virtio.transport.pci import PciTransport


@pytest.fixture
def raw() -> Iterator[RawPciFunction]:
    """In front of a device with three queues."""
    with EmulatedFunction(Numbers()) as function:
        yield RawPciFunction(over=function)


def common(raw: RawPciFunction) -> Any:
    return raw.layout.common


def test_in_front_of_a_device_and_quiet_it_is_that_device(raw: RawPciFunction) -> None:
    with PciTransport(raw) as transport, NumbersDriver(transport) as driver:
        assert [driver.ask(index) for index in range(3)] == [0, 1, 2]
    assert raw.accesses


def test_driver_06_all_four_words_are_read_and_only_what_is_carried_counts(raw: RawPciFunction) -> None:
    raw.script(common(raw), Common.DEVICE_FEATURE.offset, repeat(0xFFFF_FFFF))
    with PciTransport(raw) as transport:
        assert transport.offered() == CARRIED
        place = common(raw).offset + Common.DEVICE_FEATURE_SELECT.offset
        assert [each.value for each in raw.accesses if each.write and each.offset == place] == [0, 1, 2, 3]


def test_driver_06_features_ok_is_read_back(raw: RawPciFunction) -> None:
    with PciTransport(raw) as transport, Driver(transport) as driver:
        driver.acknowledge()
        raw.script(common(raw), Common.DEVICE_STATUS.offset, repeat(3, 4))
        with pytest.raises(FeatureNegotiationError, match="does not keep FEATURES_OK"):
            driver.negotiate()


def test_driver_07_a_generation_that_never_stands_still_ends(raw: RawPciFunction) -> None:
    with PciTransport(raw) as transport, NumbersDriver(transport) as driver:
        raw.script(common(raw), Common.CONFIG_GENERATION.offset, (number % 255 for number in count()))
        with pytest.raises(TransportError, match="generation changed during each of 64"):
            driver.read_config(0, 4)


def test_driver_07_a_generation_that_changes_once_is_read_again(raw: RawPciFunction) -> None:
    with PciTransport(raw) as transport, NumbersDriver(transport) as driver:
        assert raw.layout.device is not None
        raw.script(raw.layout.device, 4, [0x0BAD_0BAD])
        raw.script(common(raw), Common.CONFIG_GENERATION.offset, [1, 2, 2])
        assert driver.read_config(4, 4) == Numbers.config[4:8]


@pytest.mark.parametrize("cfg_type", ["common", "notify", "isr"])
@pytest.mark.parametrize(
    ("offset", "data"),
    [(2, b"\x08"), (3, b"\x0b"), (4, b"\x00"), (4, b"\x06"), (8, b"\xfc\xff\xff\xff"), (12, b"\xff\xff\xff\xff"), (12, bytes(4))],
    ids=["short", "reserved type", "no such BAR", "reserved BAR", "offset", "length", "empty"],
)
def test_driver_08_a_structure_that_cannot_be_there_is_said_so(raw: RawPciFunction, cfg_type: str, offset: int, data: bytes) -> None:
    place = getattr(raw.layout, cfg_type).place
    raw.force(None, place + offset, data)
    with pytest.raises(TransportError, match=f"no usable {cfg_type.upper()} structure"):
        PciTransport(raw)
    assert raw.handler is None and not raw.targets


def test_driver_08_a_list_that_loops_is_said_so(raw: RawPciFunction) -> None:
    raw.force(None, common(raw).place + 1, bytes([common(raw).place]))
    with pytest.raises(TransportError, match="loops"):
        PciTransport(raw)


def test_driver_08_a_short_common_structure_has_no_queue_reset(raw: RawPciFunction) -> None:
    raw.force(None, common(raw).place + 12, pack("<I", 59))
    with PciTransport(raw) as transport:
        assert Feature.RING_RESET not in transport.offered()
        with NumbersDriver(transport) as driver:
            assert driver.ask(1) == 1


@pytest.mark.parametrize("offset", [1024, 0x8000, 0xFFFE])
def test_driver_08_a_notification_outside_its_structure_is_refused(raw: RawPciFunction, offset: int) -> None:
    raw.force(common(raw), Common.QUEUE_NOTIFY_OFF.offset, pack("<H", offset))
    with PciTransport(raw) as transport, pytest.raises(TransportError, match=f"queue 0 is notified at {4 * offset:#x}"):
        NumbersDriver(transport)


@pytest.mark.parametrize(("length", "legal"), [(12, True), (10, True), (9, False), (8, False)])
def test_driver_08_the_last_notification_needs_two_bytes(raw: RawPciFunction, length: int, legal: bool) -> None:
    raw.force(None, raw.layout.notify.place + 12, pack("<I", length))
    with PciTransport(raw) as transport:
        if legal:
            with NumbersDriver(transport) as driver:
                assert driver.ask(2) == 2
        else:
            with pytest.raises(TransportError, match="queue 2 is notified at 0x8"):
                NumbersDriver(transport)


def test_driver_08_queues_of_size_0_and_no_queues_are_absent(raw: RawPciFunction) -> None:
    with PciTransport(raw) as transport:
        raw.script(common(raw), Common.QUEUE_SIZE.offset, repeat(0))
        with pytest.raises(ValueError, match="no queue 0"):
            NumbersDriver(transport)
    with EmulatedFunction(Numbers()) as function:
        other = RawPciFunction(over=function)
        other.force(common(other), Common.NUM_QUEUES.offset, bytes(2))
        with PciTransport(other) as transport, pytest.raises(ValueError, match="no queue 0"):
            NumbersDriver(transport)


@pytest.mark.parametrize("size", [12, 100, 0x8000, 0xFFFF])
def test_driver_08_an_odd_size_is_only_ever_lowered(raw: RawPciFunction, size: int) -> None:
    raw.script(common(raw), Common.QUEUE_SIZE.offset, repeat(size, 2))
    with PciTransport(raw) as transport, NumbersDriver(transport, wanted=(), queues=1) as driver:
        assert driver.queues[0].size == 8 and driver.ask(0) == 0


@pytest.mark.parametrize("later", [0, 4])
def test_driver_08_a_size_that_shrinks_is_the_devices_fault(raw: RawPciFunction, later: int) -> None:
    raw.script(common(raw), Common.QUEUE_SIZE.offset, [64, later])
    with PciTransport(raw) as transport, pytest.raises(TransportError, match=f"{later} entries now, and 64 when"):
        NumbersDriver(transport)


def test_driver_08_a_size_that_the_device_does_not_keep_is_an_error(raw: RawPciFunction) -> None:
    raw.force(common(raw), Common.QUEUE_SIZE.offset, pack("<H", 64))
    with PciTransport(raw) as transport, pytest.raises(TransportError, match="keeps size 64 where 8 was written"):
        NumbersDriver(transport)


def test_driver_08_fields_are_accessed_at_their_own_width(raw: RawPciFunction) -> None:
    with PciTransport(raw) as transport, NumbersDriver(transport) as driver:
        driver.ask(0)
    widths = {field.offset: min(field.width, 4) for field in vars(Common).values() if hasattr(field, "width")}
    widths |= {place + 4: 4 for place in (32, 40, 48)}
    found = [each for each in raw.accesses if each.bar == 4 and each.offset < 64]
    assert found and all(widths[each.offset] == each.width for each in found)


@pytest.mark.parametrize("wanted", [(), {Feature.RING_PACKED, Feature.EVENT_IDX}])
@pytest.mark.parametrize("register", [Common.CONFIG_MSIX_VECTOR, Common.QUEUE_MSIX_VECTOR])
def test_driver_08_vectors_that_are_all_refused_fall_back_to_the_pin(raw: RawPciFunction, register: Any, wanted: Any) -> None:
    raw.force(common(raw), register.offset, pack("<H", NO_VECTOR))
    with PciTransport(raw) as transport, NumbersDriver(transport, wanted=wanted) as driver:
        assert transport.vectors == 0 and raw.handler is not None
        assert [driver.ask(index) for index in range(3)] == [0, 1, 2]


def test_driver_08_one_refused_vector_is_shared_instead(raw: RawPciFunction) -> None:
    with PciTransport(raw) as transport:
        raw.on_write = lambda bar, offset, width, value: (bar, offset, value) == (4, Common.QUEUE_MSIX_VECTOR.offset, 3)
        with NumbersDriver(transport) as driver:
            assert transport.vectors == 4
            assert [driver.ask(index) for index in range(3)] == [0, 1, 2]


def test_queues_beyond_number_do_not_take_descriptors_beyond_number() -> None:
    raw = RawPciFunction(over=EmulatedFunction(Numbers(), msix_vectors=400))
    raw.force(raw.layout.common, Common.NUM_QUEUES.offset, b"\xfe\xff")
    with PciTransport(raw) as transport:
        assert transport.num_queues == 0xFFFE and transport.vectors == 64


def test_driver_08_vectors_refused_and_no_pin_is_an_error(raw: RawPciFunction) -> None:
    raw.pin = False
    with PciTransport(raw) as transport:
        raw.script(common(raw), Common.QUEUE_MSIX_VECTOR.offset, repeat(NO_VECTOR))
        with pytest.raises(TransportError, match="refuses MSI-X vectors"):
            NumbersDriver(transport)


def test_driver_08_a_vector_register_that_reads_anything_else_is_an_error(raw: RawPciFunction) -> None:
    raw.force(common(raw), Common.CONFIG_MSIX_VECTOR.offset, pack("<H", 0x123))
    with pytest.raises(TransportError, match="reads 0x123 after 0x0 was written"):
        PciTransport(raw)


def test_driver_09_a_status_that_never_reads_0_ends(raw: RawPciFunction) -> None:
    with PciTransport(raw) as transport:
        driver = Driver(transport)
        raw.script(common(raw), Common.DEVICE_STATUS.offset, repeat(15, 4000))
        with pytest.raises(TransportError, match="still reads 0xf"):
            driver.reset(timeout=0.05)
        raw.script(common(raw), Common.DEVICE_STATUS.offset, [15, 15])  # late, but there
        driver.reset()
        driver.close()


def test_driver_09_a_transport_closes_though_the_status_stays(raw: RawPciFunction, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport_pci, "CLOSE_TIMEOUT", 0.02)
    transport = PciTransport(raw)
    raw.script(common(raw), Common.DEVICE_STATUS.offset, repeat(15))
    transport.close()
    assert raw.handler is None


def test_driver_09_a_queue_that_is_never_reset_ends(raw: RawPciFunction, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport_pci, "QUEUE_RESET_TIMEOUT", 0.05)
    with PciTransport(raw) as transport, NumbersDriver(transport, wanted={Feature.RING_RESET}) as driver:
        for register in (Common.QUEUE_RESET, Common.QUEUE_ENABLE):
            raw.script(common(raw), register.offset, repeat(1))
            with pytest.raises(TransportError, match="queue 0 is not reset"):
                driver.reset_queue(0)
            raw.script(common(raw), register.offset, ())
        driver.ask(1)


def test_driver_09_rings_are_zeroed_before_they_are_enabled(raw: RawPciFunction) -> None:
    with PciTransport(raw) as transport, Driver(transport) as driver:
        driver.memory.write(0, b"\xff" * driver.memory.size)
        driver.negotiate()
        seen: list[bytes] = []

        def look(bar: int | None, offset: int, width: int, value: int) -> bool:
            if (bar, offset, value) == (4, Common.QUEUE_ENABLE.offset, 1):
                place = raw.bar_read(4, 32, 4) | raw.bar_read(4, 36, 4) << 32
                seen.append(driver.memory.read(place - driver.address, 16 * 8))
            return False

        raw.on_write = look
        driver.setup_queue(0, size=8)
        assert seen == [bytes(128)]


def test_a_queue_that_the_device_does_not_enable_is_an_error(raw: RawPciFunction) -> None:
    with PciTransport(raw) as transport:
        raw.force(common(raw), Common.QUEUE_ENABLE.offset, bytes(2))
        with pytest.raises(TransportError, match="did not enable queue 0"):
            NumbersDriver(transport)
        raw.force(common(raw), Common.QUEUE_ENABLE.offset, pack("<H", 1))
        with pytest.raises(TransportError, match="reads as enabled before"):
            NumbersDriver(transport)


def session(raw: RawPciFunction) -> None:
    """Everything that a driver does, once."""
    with PciTransport(raw) as transport, NumbersDriver(transport, wanted={Feature.RING_RESET}) as driver:
        driver.read_config(0, 4)
        driver.ask(1, 0.05)
        driver.wait(0)
        driver.reset_queue(1)
        driver.setup_queue(1, size=8)
        driver.check()


def test_driver_10_a_device_that_is_gone_is_a_clear_error_at_any_moment() -> None:
    with EmulatedFunction(Numbers()) as function:
        whole = RawPciFunction(over=function)
        session(whole)
    errors = 0
    for moment in range(0, len(whole.accesses), 3):
        with EmulatedFunction(Numbers()) as function:
            raw = RawPciFunction(over=function)
            raw.remove_after(moment)
            try:
                session(raw)
            except (TransportError, StatusError):
                errors += 1
            raw.close()
            assert function.device.memory.regions == []
    assert errors > 0.8 * (len(whole.accesses) / 3), "but for the last accesses, which closing does not miss"


def test_driver_10_nothing_there_is_a_clear_error() -> None:
    raw = RawPciFunction()
    raw.removed = True
    with pytest.raises(TransportError, match="all ones"):
        PciTransport(raw)


@pytest.mark.parametrize("interrupts", ["msix", "intx"])
def test_driver_10_waiting_for_a_device_that_is_gone_ends(raw: RawPciFunction, interrupts: Any) -> None:
    with PciTransport(raw, interrupts=interrupts) as transport:
        driver = NumbersDriver(transport)
        raw.removed = True
        with pytest.raises(TransportError, match="gone"):
            driver.wait(0.01)
        with pytest.raises(TransportError, match="gone"):
            transport.offered()
        with pytest.raises(TransportError, match="gone"):
            transport.config_read(0, 4)
        with pytest.raises(TransportError, match="gone"):
            driver.close()
        driver.close()


def test_driver_10_spurious_interrupts_are_normal(raw: RawPciFunction) -> None:
    with PciTransport(raw) as transport, NumbersDriver(transport) as driver:
        for _ in range(3):
            for event in (transport.config_interrupt, *(transport.interrupt(index) for index in range(3))):
                event.signal()
            assert driver.wait(60)
            assert [driver.ask(index) for index in range(3)] == [0, 1, 2]


def test_a_device_of_bytes_alone_gets_nowhere_and_hangs_nobody() -> None:
    raw = RawPciFunction(bars={0: 0x4000}, vectors=3)
    for number, kind in enumerate((CfgType.COMMON, CfgType.NOTIFY, CfgType.ISR, CfgType.DEVICE)):
        raw.add_structure(kind, 0, 0x1000 * number, 0x1000, extra=pack("<I", 4) if kind is CfgType.NOTIFY else b"")
    raw.add_capability(0x11, pack("<HII", 2, 0x800, 0x900))
    registers = raw.bytes[0]
    registers[Common.DEVICE_FEATURE.offset] = 1
    registers[Common.NUM_QUEUES.offset] = 1
    registers[Common.QUEUE_SIZE.offset] = 8
    with PciTransport(raw) as transport:
        assert transport.vectors == 2 and transport.device_id == 4
        driver = RngDriver(transport, wanted=())
        assert registers[Common.DEVICE_STATUS.offset] == 15 and registers[Common.QUEUE_ENABLE.offset] == 1
        with pytest.raises(TimeoutError):
            driver.read(1, timeout=0.01)
        raw.targets[1].signal()
        assert transport.interrupt(0).wait(60) and driver.wait(0)
        bell = raw.doorbell(0, 0x1000, 2, 0)
        assert bell.wait(0), "the only store a doorbell makes"
        registers[Common.DEVICE_STATUS.offset] |= Status.NEEDS_RESET
        with pytest.raises(VirtioError, match="NEEDS_RESET"):
            driver.check()
        with suppress(VirtioError):
            driver.close()
