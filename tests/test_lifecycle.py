"""One end's life over the loopback transport: initialization, configuration, resets that fail, and closing (2.4, 2.5, 3.1, 3.3)."""

from collections.abc import Iterator
from typing import Any

import pytest

from virtio import Device, DeviceId, DeviceQueue, Driver, EventFd, Features, Memory, Status, StatusError, TransportError
from virtio.device import DeviceState
from virtio.driver import CONFIG_ATTEMPTS, DriverState
from virtio.transport.loopback import LoopbackTransport


class Plain(Device):
    """A queue that nobody serves, and configuration that may be written."""

    device_id = DeviceId.CONSOLE
    queues = ("queue",)
    config = bytes(range(8))

    def on_queue(self, queue: DeviceQueue) -> None:
        pass

    def config_written(self, offset: int, data: bytes) -> None:
        config = bytearray(self.config)
        config[offset : offset + len(data)] = data
        self.config = bytes(config)


def test_the_initialization_sequence_is_the_specifications() -> None:
    steps: list[str] = []

    class Listening(LoopbackTransport):
        @property
        def status(self) -> Status:
            return super().status

        @status.setter
        def status(self, value: Status) -> None:
            steps.append(f"status {int(value):#x}")
            self.device.write_status(value)

        def reset(self) -> None:
            steps.append("reset")
            super().reset()

        def offered(self) -> Features:
            steps.append("offered")
            return super().offered()

        def accept(self, features: Features) -> None:
            steps.append("accept")
            super().accept(features)

        def queue_setup(self, index: int, size: int, areas: tuple[int, int, int]) -> EventFd:
            steps.append(f"queue {index}")
            return super().queue_setup(index, size, areas)

    driver = Driver(Listening(Plain()))
    driver.negotiate()
    driver.setup_queue(0)
    driver.driver_ok()
    assert steps == ["reset", "status 0x1", "status 0x3", "offered", "accept", "status 0xb", "queue 0", "status 0xf"]


def test_a_reset_that_does_not_end_keeps_the_buffers_and_says_so(ring_features: Features) -> None:
    class Stuck(LoopbackTransport):
        stuck = True

        def reset(self) -> None:
            if not self.stuck:
                super().reset()

    transport = Stuck(Plain())
    transport.stuck = False
    driver = Driver(transport)
    driver.negotiate(wanted=ring_features)
    queue = driver.setup_queue(0, size=8)
    driver.driver_ok()
    queue.add("mine", writable=[(driver.address + driver.memory.allocate(16), 16)])
    transport.stuck = True
    with pytest.raises(TransportError, match=r"still reads 0xf 0\.01 s after the reset"):
        driver.reset(timeout=0.01)
    assert queue.outstanding == 1 and driver.state is DriverState.FAILED
    with pytest.raises(StatusError):
        driver.negotiate()
    transport.stuck = False
    assert driver.reset() == {0: ["mine"]}


def test_a_timeout_that_is_no_number_resets_nothing() -> None:
    with Driver(LoopbackTransport(Plain())) as driver:
        driver.negotiate()
        with pytest.raises(TypeError):
            driver.reset(timeout="5")  # type: ignore[arg-type]
        assert driver.state is DriverState.FEATURES_OK and Status.FEATURES_OK in driver.transport.status


def test_a_device_that_was_pulled_out_is_an_error_at_once() -> None:
    class Gone(LoopbackTransport):
        gone = False

        @property
        def status(self) -> Status:
            return Status(0xFF) if self.gone else super().status

        @status.setter
        def status(self, value: Status) -> None:
            self.device.write_status(value)

    transport = Gone(Plain())
    driver = Driver(transport)
    driver.negotiate()
    driver.setup_queue(0)
    driver.driver_ok()
    transport.gone = True
    for step in (driver.check, driver.reset):
        with pytest.raises(TransportError, match="0xff: the device is gone"):
            step()
    with pytest.raises(TransportError, match="gone"):
        driver.close()
    assert driver.state is DriverState.CLOSED
    driver.close()


def test_configuration_is_read_from_driver_on_and_written_from_features_ok_on() -> None:
    device = Plain()
    driver = Driver(LoopbackTransport(device))
    driver.acknowledge()
    assert driver.read_config(2, 3) == b"\2\3\4"
    with pytest.raises(StatusError, match="write_config is out of order in state driver"):
        driver.write_config(0, b"x")
    with pytest.raises(StatusError, match="writing the configuration is out of order"):
        driver.transport.config_write(0, b"x")
    driver.negotiate()
    driver.write_config(1, b"xy")
    assert driver.read_config(0, 4) == b"\0xy\3"
    for offset, length in ((-1, 1), (0, 9), (8, 1), (4, -1)):
        with pytest.raises(ValueError, match=r"outside 0\.\.8"):
            driver.read_config(offset, length)


def test_configuration_is_read_only_unless_the_device_type_says_otherwise() -> None:
    class ReadOnly(Plain):
        config_written = Device.config_written

    driver = Driver(LoopbackTransport(ReadOnly()))
    driver.negotiate()
    with pytest.raises(ValueError, match=r"configuration bytes 2\.\.4 are read-only"):
        driver.write_config(2, b"xy")
    assert driver.read_config(0, 8) == bytes(range(8))


def test_a_configuration_that_changes_while_it_is_read_is_read_again() -> None:
    class Restless(LoopbackTransport):
        changes = 0
        reads = 0

        def config_read(self, offset: int, length: int) -> bytes:
            self.reads += 1
            half = super().config_read(offset, length // 2)
            if self.changes:
                self.changes -= 1
                self.device.change_config(bytes([self.changes % 256] * 8))
            return half + super().config_read(offset + length // 2, length - length // 2)

    transport = Restless(Plain())
    driver = Driver(transport)
    driver.negotiate()
    transport.changes = 3
    assert driver.read_config(0, 8) == bytes(8)
    assert transport.reads == 4
    transport.changes, transport.reads = 2 * CONFIG_ATTEMPTS, 0
    with pytest.raises(TransportError, match=f"each of {CONFIG_ATTEMPTS} reads"):
        driver.read_config(0, 8)
    assert transport.reads == CONFIG_ATTEMPTS


def test_closing_resets_detaches_and_closes_only_its_own_memory(ring_features: Features) -> None:
    device = Plain()
    transport = LoopbackTransport(device)
    with Memory(1 << 20) as memory:
        for given in (memory, None):
            with Driver(transport, memory=given) as driver:
                driver.negotiate(wanted=ring_features)
                driver.setup_queue(0)
                driver.driver_ok()
                assert len(device.memory.regions) == 1
            driver.close()
            assert device.state is DeviceState.RESET and device.memory.regions == []
            assert driver.memory.closed is (given is None)
            with pytest.raises(StatusError, match="in state closed"):
                driver.negotiate()
    transport.close()


def test_a_closed_transport_says_so_and_frees_its_device() -> None:
    device = Plain()
    with LoopbackTransport(device) as transport:
        with pytest.raises(StatusError, match="on a transport already"):
            LoopbackTransport(device)
        transport.attach(Memory(4096))
    transport.close()
    assert device.memory.regions == []
    with pytest.raises(StatusError, match="the transport is closed"):
        transport.offered()
    LoopbackTransport(device).close()


@pytest.mark.parametrize("given", [False, True])
def test_a_transport_that_is_closed_first_leaves_the_driver_nothing_to_hold(ring_features: Features, given: bool) -> None:
    transport = LoopbackTransport(Plain())
    with Memory(1 << 20) as memory:
        driver = Driver(transport, memory=memory if given else None)
        driver.negotiate(wanted=ring_features)
        queue = driver.setup_queue(0)
        driver.driver_ok()
        queue.add("lost", writable=[(driver.address + driver.allocate(16), 16)])
        transport.close()
        with pytest.raises(StatusError, match="the transport is closed"):
            driver.close()
        assert driver.state is DriverState.CLOSED
        driver.close()
        assert driver.memory.closed is not given
        memory.free(memory.allocate(1 << 20))


def test_memory_is_attached_once_and_detached_once() -> None:
    device = Plain()
    transport = LoopbackTransport(device)
    first, second = Memory(4096), Memory(4096)
    assert transport.attach(first) != transport.attach(second)
    with pytest.raises(ValueError, match="attached already"):
        transport.attach(first)
    transport.detach(first)
    with pytest.raises(ValueError, match="not attached"):
        transport.detach(first)
    assert len(device.memory.regions) == 1


def test_what_goes_wrong_in_a_constructor_leaves_nothing_behind() -> None:
    class Hasty(Driver):
        def __init__(self, transport: LoopbackTransport) -> None:
            super().__init__(transport)
            with self.initializing():
                self.negotiate()
                self.setup_queue(9)

    device = Plain()
    transport = LoopbackTransport(device)
    with pytest.raises(ValueError, match="no queue 9"):
        Hasty(transport)
    assert device.status == 0 and device.memory.regions == []
    Driver(transport).negotiate()


def test_a_device_type_needs_a_handler_for_each_queue() -> None:
    class Half(Device):
        device_id = DeviceId.CONSOLE
        queues = ("receiveq", "transmitq")

        def on_receiveq(self, queue: DeviceQueue) -> None:
            pass

    with pytest.raises(TypeError, match="Half has no method on_transmitq"):
        Half()

    class Late(Half):
        async def on_transmitq(self, queue: DeviceQueue) -> None:
            pass

    class Lazy(Half):
        def on_transmitq(self, queue: DeviceQueue) -> Iterator[None]:
            yield

    for kind in (Late, Lazy):
        with pytest.raises(TypeError, match=rf"{kind.__name__}\.on_transmitq is a coroutine or a generator: a call of it does nothing"):
            kind()


def test_a_transport_has_one_driver_at_a_time(ring_features: Features) -> None:
    device = Plain()
    with LoopbackTransport(device) as transport, LoopbackTransport(Plain()) as elsewhere:
        first = Driver(transport)
        with pytest.raises(StatusError, match="has a driver already, in state new"):
            Driver(transport)
        first.negotiate(wanted=ring_features)
        queue = first.setup_queue(0)
        first.driver_ok()
        with Memory(1 << 20) as memory:
            for given in (memory, None):
                with pytest.raises(StatusError, match="has a driver already, in state driver ok"):
                    Driver(transport, memory=given)
        assert device.state is DeviceState.DRIVER_OK and len(device.memory.regions) == 1
        assert queue.outstanding == 0 and queue.publish() is False
        with Driver(elsewhere) as other:
            assert other.negotiate(wanted=ring_features) == first.features
        first.close()
        with Driver(transport) as second:
            second.negotiate(wanted=ring_features)
            assert second.setup_queue(0).size == queue.size
        lost = Driver(transport)
        assert lost.negotiate()
        del lost  # what nobody has any more cannot be closed
        Driver(transport).close()


def test_a_driver_that_cannot_attach_its_memory_leaves_the_transport_free() -> None:
    with LoopbackTransport(Plain()) as transport, Memory(1 << 20) as memory:
        transport.attach(memory)
        with pytest.raises(ValueError, match="attached already") as caught:
            Driver(transport, memory=memory)
        assert caught.traceback, "the driver is still referred to"
        transport.detach(memory)
        Driver(transport, memory=memory).close()


WRONG: list[tuple[str, Any, type[Exception], str]] = [
    ("device_id", None, TypeError, "None: it has to be an integer"),
    ("device_id", "console", TypeError, "'console': it has to be an integer"),
    ("device_id", 0, ValueError, "0 is outside 1..4294967295"),
    ("device_id", 1 << 32, ValueError, "4294967296 is outside 1..4294967295"),
    ("queues", "queue", TypeError, "'queue': it has to be a tuple of names"),
    ("queues", (0,), TypeError, r"\(0,\): it has to be a tuple of names"),
    ("queue_size", 0, ValueError, "0 is outside 1..32768"),
    ("queue_size", 32769, ValueError, "32769 is outside 1..32768"),
    ("queue_size", 12, ValueError, r"12 is no power of two, as a split queue's is \(2\.7\)"),
    ("queue_size", 256.0, TypeError, "256.0: it has to be an integer"),
    ("queue_size", True, TypeError, "True: it has to be an integer"),
    ("chain_limit", 0, ValueError, "0 is outside 1..1024"),
    ("chain_limit", 1025, ValueError, "1025 is outside 1..1024"),
    ("chain_limit", "all", TypeError, "'all': it has to be an integer"),
    ("rules", "BASE", TypeError, "'BASE': it has to be a tuple of Requires"),
    ("rules", ((1, 2),), TypeError, "it has to be a tuple of Requires"),
    ("config", None, TypeError, "None: it has to be bytes"),
    ("config", "text", TypeError, "'text': it has to be bytes"),
]


@pytest.mark.parametrize(("name", "value", "kind", "message"), WRONG, ids=[f"{name} {value!r}" for name, value, *_ in WRONG])
def test_what_a_device_type_says_of_itself_is_checked_at_once(name: str, value: Any, kind: type[Exception], message: str) -> None:
    wrong = type("Wrong", (Plain,), {name: value})
    with pytest.raises(kind, match=rf"Wrong\.{name} .*{message}"):
        wrong()


def test_a_device_type_without_a_number_is_refused() -> None:
    with pytest.raises(TypeError, match=r"Device\.device_id is missing: it has to be an integer"):
        Device()


def test_configuration_may_be_made_when_it_is_read() -> None:
    class Counting(Plain):
        reads = 0

        @property
        def config(self) -> bytes:  # type: ignore[override]
            self.reads += 1
            return self.reads.to_bytes(4, "little")

    device = Counting()
    assert device.reads == 0
    assert device.read_config(0, 1) != device.read_config(0, 1)


def test_a_chain_limit_of_a_long_queue_does_not_hinder_a_short_one(ring_features: Features) -> None:
    class Long(Plain):
        queue_size = 4096
        chain_limit = 4096

    for size in (4096, 16):
        with LoopbackTransport(Long()) as transport, Driver(transport) as driver:
            driver.negotiate(wanted=ring_features)
            assert driver.setup_queue(0, size=size).size == size
