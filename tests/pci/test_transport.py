"""A driver over virtio-pci to our own devices: interrupts of every kind, queue reset, configuration, giving everything back."""

from collections.abc import Callable, Iterator
from functools import partial
from threading import Event, Thread
from typing import Literal

import pytest

from tests.leftovers import all_closed
from tests.pci.devices import CONFIG, Numbers, NumbersDriver
from virtio import DeviceNeedsReset, EventFd, Features, Memory, StatusError, TransportError
from virtio.device import RING_FEATURES, Device
from virtio.devices.rng import RngDevice, RngDriver
from virtio.driver import Driver
from virtio.pci.emulated import EmulatedFunction
from virtio.spec import Feature, Status
from virtio.transport import CARRIED, Transport
from virtio.transport.pci import PciTransport

Interrupts = Literal["auto", "msix", "intx"]


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    with all_closed():
        yield


@pytest.fixture(params=[("auto", None), ("msix", 4), ("msix", 3), ("msix", 2), ("msix", 1), ("auto", 0), ("intx", None)], ids=str)
def way(request: pytest.FixtureRequest) -> tuple[Interrupts, int | None]:
    """How the driver is interrupted, and how many vectors there are."""
    interrupts, vectors = request.param
    return interrupts, vectors


def test_an_entropy_device_answers(way: tuple[Interrupts, int | None], ring_features: Features, ring_format: str) -> None:
    interrupts, vectors = way
    transport = PciTransport(EmulatedFunction(RngDevice(lambda count: b"r" * count), msix_vectors=vectors), interrupts=interrupts)
    with transport, RngDriver(transport, wanted=ring_features) as driver:
        assert driver.read(5000) == b"r" * 5000
        assert driver.requestq.ring_format == ring_format


@pytest.mark.parametrize("features", [set(), RING_FEATURES])
def test_every_queue_is_interrupted(way: tuple[Interrupts, int | None], features: set[int]) -> None:
    interrupts, vectors = way
    device = Numbers()
    with PciTransport(EmulatedFunction(device, msix_vectors=vectors), interrupts=interrupts) as transport:
        expected = {"intx": 0, "msix": vectors, "auto": 4 if vectors is None else 0}[interrupts]
        assert transport.vectors == expected
        with NumbersDriver(transport, wanted=features) as driver:
            for _ in range(3):
                assert [driver.ask(index) for index in range(3)] == [0, 1, 2]
            for index in (2, 0, 1):  # each sleeper is woken by its own notification, whoever else was
                driver.post(index)
            device.poll()
            assert all(transport.interrupt(index).wait(60) for index in range(3))
            assert all(driver.wait_used(driver.queues[index], 5) == [(index, 1)] for index in range(3))


def test_who_shares_a_vector_changes_under_the_guard_of_its_thread() -> None:
    with PciTransport(EmulatedFunction(Numbers(), msix_vectors=1)) as transport:
        interrupts = transport._interrupts

        class Guarded(set[int]):
            def discard(self, source: object, /) -> None:
                assert interrupts._guard._is_owned()  # type: ignore[attr-defined]
                super().discard(source)

            def add(self, source: int, /) -> None:
                assert interrupts._guard._is_owned()  # type: ignore[attr-defined]
                super().add(source)

        interrupts._sharers[0] = Guarded()
        for index in (0, 1, 2, 0):
            interrupts.map(index)
        interrupts._vectors[0].signal()
        assert all(transport.interrupt(index).wait(60) for index in range(3))


@pytest.mark.parametrize("failing", range(5))
@pytest.mark.parametrize("wanted", ["auto", "msix"])
def test_descriptors_that_run_out_leave_the_function_as_it_was(failing: int, wanted: Interrupts, monkeypatch: pytest.MonkeyPatch) -> None:
    made = 0

    class Scarce:
        def __new__(cls) -> EventFd:  # type: ignore[misc]
            cls.count()
            return EventFd()

        @staticmethod
        def count() -> None:
            nonlocal made
            made += 1
            if made > failing:
                raise OSError(24, "Too many open files")

        @staticmethod
        def from_fd(descriptor: int) -> EventFd:
            Scarce.count()
            return EventFd.from_fd(descriptor)

    with EmulatedFunction(Numbers()) as function:
        with monkeypatch.context() as scarce:
            scarce.setattr("virtio.pci.interrupts.EventFd", Scarce)
            with pytest.raises((OSError, TransportError)):
                PciTransport(function, interrupts=wanted)
        with PciTransport(function, interrupts=wanted) as transport, NumbersDriver(transport) as driver:
            assert [driver.ask(index) for index in range(3)] == [0, 1, 2]


def test_a_smaller_count_of_vectors_takes_fewer_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    enable = EmulatedFunction.enable_msix

    def scarce(function: EmulatedFunction, count: int) -> list[EventFd]:
        if count > 2:
            raise OSError(24, "Too many open files")
        return enable(function, count)

    monkeypatch.setattr(EmulatedFunction, "enable_msix", scarce)
    with PciTransport(EmulatedFunction(Numbers())) as transport, NumbersDriver(transport) as driver:
        assert transport.vectors == 2 and driver.ask(2) == 2


def test_configuration_changes_are_notified(way: tuple[Interrupts, int | None]) -> None:
    interrupts, vectors = way
    device = Numbers()
    with (
        PciTransport(EmulatedFunction(device, msix_vectors=vectors), interrupts=interrupts) as transport,
        NumbersDriver(transport) as driver,
    ):
        assert driver.read_config(4, 4) == CONFIG[4:8]
        before = transport.config_generation
        device.change_config(bytes(12))
        assert transport.config_interrupt.wait(60)
        assert driver.wait(60) and transport.config_generation != before and driver.read_config(4, 4) == bytes(4)
        device.need_reset()
        with pytest.raises(DeviceNeedsReset):
            while driver.wait(60):
                pass


def test_a_reset_and_another_initialization(way: tuple[Interrupts, int | None], ring_features: Features) -> None:
    interrupts, vectors = way
    with PciTransport(EmulatedFunction(Numbers(), msix_vectors=vectors), interrupts=interrupts) as transport:
        for _ in range(3):
            with NumbersDriver(transport, wanted=ring_features, queues=2) as driver:
                assert [driver.ask(1), driver.ask(0)] == [1, 0]
            assert transport.status == 0


def test_a_queue_is_reset_and_set_up_anew(way: tuple[Interrupts, int | None], ring_features: Features) -> None:
    interrupts, vectors = way
    transport = PciTransport(EmulatedFunction(Numbers(), msix_vectors=vectors), interrupts=interrupts)
    with transport, NumbersDriver(transport, wanted=ring_features | {Feature.RING_RESET}) as driver:
        assert driver.ask(1) == 1
        driver.post(1)
        assert driver.reset_queue(1) == [1]
        assert driver.ask(0) == 0
        assert driver.setup_queue(1, size=16).size == 16
        assert [driver.ask(index) for index in range(3)] == [0, 1, 2]


def test_a_queue_reset_needs_its_feature() -> None:
    transport = PciTransport(EmulatedFunction(Numbers()))
    with transport, NumbersDriver(transport, wanted=()) as driver, pytest.raises(StatusError, match="RING_RESET"):
        driver.reset_queue(0)


def test_a_masked_vector_is_told_when_it_is_unmasked(ring_features: Features) -> None:
    device = Numbers()
    function = EmulatedFunction(device)
    with PciTransport(function, interrupts="msix") as transport, NumbersDriver(transport, wanted=ring_features) as driver:
        function.mask_vector(2, True)
        driver.post(1)
        device.poll()
        assert not transport.interrupt(1).wait(0)
        driver.post(0)
        device.poll()
        assert transport.interrupt(0).wait(0), "other vectors are as before"
        function.mask_vector(2, False)
        assert transport.interrupt(1).drain() == 1
        assert driver.wait_used(driver.queues[1], 5) == [(1, 1)]
        function.mask_vector(2, True)
        function.mask_vector(2, False)
        assert not transport.interrupt(1).wait(0), "and once only"


def test_a_masked_configuration_vector() -> None:
    device = Numbers()
    function = EmulatedFunction(device)
    with PciTransport(function, interrupts="msix") as transport, NumbersDriver(transport):
        function.mask_vector(0, True)
        device.change_config(bytes(12))
        assert not transport.config_interrupt.wait(0)
        function.mask_vector(0, False)
        assert transport.config_interrupt.wait(0)


def test_configuration_is_accessed_at_the_width_of_its_fields() -> None:
    with PciTransport(EmulatedFunction(Numbers())) as transport, NumbersDriver(transport) as driver:
        for offset, length in ((0, 4), (0, 8), (1, 4), (2, 2), (3, 2), (5, 6), (11, 1), (0, 12), (12, 0)):
            assert driver.read_config(offset, length) == CONFIG[offset : offset + length]
        driver.write_config(0, b"abcd")
        driver.write_config(1, b"xy")
        driver.write_config(8, b"no")  # read-only, as registers are: it stays
        assert driver.read_config(0, 12) == b"axyd" + CONFIG[4:]


@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (0, -1), (4096, 1), (4095, 2), (0, 4097)])
def test_configuration_outside_its_structure_is_refused(offset: int, length: int) -> None:
    with PciTransport(EmulatedFunction(Numbers())) as transport:
        with pytest.raises(ValueError, match="outside"):
            transport.config_read(offset, length)
        if length > 0:
            with pytest.raises(ValueError, match="outside"):
                transport.config_write(offset, bytes(length))


def test_a_device_without_configuration_has_none() -> None:
    with PciTransport(EmulatedFunction(RngDevice())) as transport:
        assert transport.layout.device is None and transport.config_read(0, 0) == b""
        with pytest.raises(ValueError, match=r"outside 0\.\.0"):
            transport.config_read(0, 1)


def test_queues_that_are_not_there() -> None:
    with PciTransport(EmulatedFunction(Numbers())) as transport, Driver(transport) as driver:
        driver.negotiate()
        assert [transport.queue_max(index) for index in (-1, 0, 2, 3, 65535, 65536)] == [0, 64, 64, 0, 0, 0]
        for index, size, message in ((3, 8, "no queue 3"), (-1, 8, "no queue -1"), (0, 65, "1 to 64"), (0, 0, "1 to 64")):
            with pytest.raises(ValueError, match=message):
                transport.queue_setup(index, size, (0, 0, 0))
        with pytest.raises(ValueError, match="never set up"):
            transport.interrupt(0)
        with pytest.raises(TransportError, match="did not enable queue 0"):
            transport.queue_setup(0, 8, (0, 0, 0))  # nowhere in memory
        assert driver.setup_queue(0, size=64).size == 8, "which does no harm, but the size was lowered until the next reset"
        with pytest.raises(TransportError, match="reads as enabled"):
            transport.queue_setup(0, 8, (0, 0, 0))


class Everything(RngDevice):
    """Offers whatever may be offered."""

    features = (*CARRIED, Feature.ACCESS_PLATFORM, Feature.NOTIFICATION_DATA, Feature.ORDER_PLATFORM, 127)


def test_driver_06_what_is_carried_is_what_the_transport_can() -> None:
    with PciTransport(EmulatedFunction(Everything())) as transport:
        assert transport.offered() == CARRIED
        with RngDriver(transport, wanted=CARRIED) as driver:
            assert driver.features == CARRIED and 127 in driver.features and len(driver.read(16)) == 16
    with PciTransport(EmulatedFunction(Everything(), access_platform=True)) as transport:
        assert transport.offered() == CARRIED | {Feature.ACCESS_PLATFORM}
        with RngDriver(transport, wanted={Feature.ACCESS_PLATFORM}) as driver:
            assert Feature.ACCESS_PLATFORM in driver.features and len(driver.read(16)) == 16


@pytest.mark.parametrize("transitional", [False, True])
def test_transitional_ids_are_driven_by_the_modern_interface(transitional: bool) -> None:
    function = EmulatedFunction(RngDevice(), transitional=transitional)
    assert function.config_read(0, 4) >> 16 == (0x1005 if transitional else 0x1044)
    with PciTransport(function) as transport, RngDriver(transport) as driver:
        assert transport.device_id == 4 and len(driver.read(4)) == 4


def test_closing_gives_everything_back(way: tuple[Interrupts, int | None]) -> None:
    interrupts, vectors = way
    device = Numbers()
    for _ in range(2):  # the device may go on another transport
        transport = PciTransport(EmulatedFunction(device, msix_vectors=vectors), interrupts=interrupts)
        memory = Memory(1 << 16)
        transport.attach(memory)
        with pytest.raises(ValueError, match="attached already"):
            transport.attach(memory)
        driver = NumbersDriver(transport)
        assert driver.ask(2) == 2
        transport.close()
        transport.close()
        assert device.memory.regions == [] and device.status == 0
        calls: list[Callable[[], object]] = [
            transport.offered,
            transport.reset,
            partial(transport.queue_max, 0),
            partial(transport.attach, memory),
        ]
        for call in calls:
            with pytest.raises(StatusError, match="closed"):
                call()
        with pytest.raises(StatusError, match="closed"):
            _ = transport.status
        with pytest.raises(StatusError):
            driver.close()
        driver.close()
        memory.close()


def test_a_driver_uses_the_memory_that_the_device_reaches_already() -> None:
    class Reaching(EmulatedFunction):
        def __init__(self, device: Device, memory: Memory) -> None:
            super().__init__(device)
            self.memory = memory  # type: ignore[misc]

    with Memory(1 << 20) as memory, Memory(1 << 20) as other:
        transport = PciTransport(Reaching(RngDevice(), memory))
        with RngDriver(transport) as driver:
            assert driver.memory is memory and len(driver.read(8)) == 8
        assert not memory.closed
        with RngDriver(transport, memory=other) as driver:
            assert driver.memory is other
        transport.close()


def test_what_cannot_be_had_is_an_error_and_leaves_the_function_alone() -> None:
    with EmulatedFunction(RngDevice(), msix_vectors=0, intx=False) as function:
        for interrupts, message in (("auto", "no interrupts"), ("intx", "no interrupt pin"), ("msix", "not to be used")):
            with pytest.raises(TransportError, match=message):
                PciTransport(function, interrupts=interrupts)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="'polled'"):
            PciTransport(function, interrupts="polled")  # type: ignore[arg-type]
        assert function.device.status == 0


def test_a_device_is_on_one_transport_only() -> None:
    device = RngDevice()
    with EmulatedFunction(device), pytest.raises(StatusError, match="transport already"):
        EmulatedFunction(device)
    EmulatedFunction(device).close()


def test_a_transport_is_a_transport() -> None:
    with EmulatedFunction(RngDevice()) as function:
        transport: Transport = PciTransport(function)
        assert transport.device_id == 4
        transport.close()


def test_a_device_in_another_thread_wakes_the_driver(way: tuple[Interrupts, int | None]) -> None:
    interrupts, vectors = way
    device, stop = Numbers(), Event()
    function = EmulatedFunction(device, msix_vectors=vectors)

    def work() -> None:
        while not stop.is_set():
            device.poll()

    with PciTransport(function, interrupts=interrupts) as transport:
        del transport.serve
        driver = NumbersDriver(transport)
        thread = Thread(target=work)
        thread.start()
        try:
            for turn in range(30):
                assert driver.ask(turn % 3, 20) == turn % 3
        finally:
            stop.set()
            thread.join()
            driver.close()
    assert Status(0) == device.status


def test_doorbells_are_eventfds_that_a_sleeping_device_waits_on() -> None:
    device = Numbers()
    function = EmulatedFunction(device)
    with PciTransport(function) as transport, NumbersDriver(transport) as driver:
        device.poll()
        notify = transport.layout.notify
        bells = [function.doorbell(notify.bar, notify.offset + 4 * index, 2, index) for index in range(3)]
        assert not any(bell.wait(0) for bell in bells)
        driver.post(2)
        assert [bell.wait(0) for bell in bells] == [False, False, True]
