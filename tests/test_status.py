"""Both status machines, held against their tables: every step in every state, and long random histories (2.1, 3.1)."""

from collections.abc import Callable, Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtio import Device, DeviceId, DeviceNeedsReset, DeviceQueue, Driver, EventFd, Feature, Memory, Status, StatusError, layout
from virtio.device import DEVICE_TABLE, DeviceState, DeviceStep
from virtio.driver import DRIVER_TABLE, DriverState, DriverStep
from virtio.status import StatusTable
from virtio.transport.loopback import LoopbackTransport

QUEUES = 40
BASE = 0x10000


BITS = {
    DeviceStep.ACKNOWLEDGE: Status.ACKNOWLEDGE,
    DeviceStep.DRIVER: Status.DRIVER,
    DeviceStep.FEATURES_OK: Status.FEATURES_OK,
    DeviceStep.DRIVER_OK: Status.DRIVER_OK,
    DeviceStep.FAIL: Status.FAILED,
}


class Quiet(Device):
    """Many queues that nobody serves, and configuration that may be written."""

    device_id = DeviceId.ENTROPY
    queues = tuple(f"queue{index}" for index in range(QUEUES))
    config = bytes(4)

    def config_written(self, offset: int, data: bytes) -> None:
        pass

    def __getattr__(self, name: str) -> object:
        if name.startswith("on_queue"):
            return self.leave
        raise AttributeError(name)

    def leave(self, queue: DeviceQueue) -> None:
        pass


class DriverMachine:
    """A driver over a quiet device, with one call for each step that only its order can make wrong.

    Once queues can be set up, queue 0 always is, queue 1 was reset, and those from `fresh` on were never touched.
    """

    def __init__(self) -> None:
        self.device = Quiet()
        self.memory = Memory(1 << 20)
        self.transport = LoopbackTransport(self.device)
        self.driver = Driver(self.transport, memory=self.memory)
        self.fresh = 2

    @property
    def state(self) -> DriverState:
        return self.driver.state

    @property
    def status(self) -> Status:
        return self.device.status

    def negotiate(self) -> None:
        self.driver.negotiate(wanted={Feature.RING_RESET})
        self.fresh = 2
        self.driver.setup_queue(0, size=4)
        self.driver.setup_queue(1, size=4)
        self.driver.reset_queue(1)

    def setup(self) -> None:
        self.driver.setup_queue(self.fresh, size=4)
        self.fresh += 1

    def reset_queue(self) -> None:
        self.driver.reset_queue(0)
        self.driver.setup_queue(0, size=4)

    def reenable(self) -> None:
        self.driver.setup_queue(1, size=4)
        self.driver.reset_queue(1)

    def notice(self) -> None:
        self.device.need_reset()
        with pytest.raises(DeviceNeedsReset, match="NEEDS_RESET"):
            self.driver.check()

    def do(self, step: DriverStep) -> None:
        driver = self.driver
        calls: dict[DriverStep, Callable[[], object]] = {
            DriverStep.RESET: driver.reset,
            DriverStep.ACKNOWLEDGE: driver.acknowledge,
            DriverStep.NEGOTIATE: self.negotiate,
            DriverStep.READ_CONFIG: lambda: driver.read_config(0, 4),
            DriverStep.WRITE_CONFIG: lambda: driver.write_config(0, b"four"),
            DriverStep.SETUP_QUEUE: self.setup,
            DriverStep.RESET_QUEUE: self.reset_queue,
            DriverStep.REENABLE_QUEUE: self.reenable,
            DriverStep.DRIVER_OK: driver.driver_ok,
            DriverStep.WAIT: lambda: driver.wait(0),
            DriverStep.FAIL: driver.fail,
            DriverStep.NEEDS_RESET: self.notice,
            DriverStep.CLOSE: driver.close,
        }
        calls[step]()

    def close(self) -> None:
        self.driver.close()
        self.transport.close()
        self.memory.close()


class DeviceMachine:
    """A quiet device, spoken to as a transport would; queues as in `DriverMachine`."""

    def __init__(self) -> None:
        self.device = Quiet()
        self.memory = Memory(1 << 16)
        self.device.memory.add(BASE, self.memory)
        descriptor, driver, device = (BASE + self.memory.allocate(size, align) for size, align in layout(4))
        self.areas = descriptor, driver, device
        self.event = EventFd()
        self.fresh = 2

    @property
    def state(self) -> DeviceState:
        return self.device.state

    @property
    def status(self) -> Status:
        return self.device.status

    def setup(self, index: int) -> None:
        self.device.setup_queue(index, 4, self.areas, doorbell=self.event, interrupt=None)

    def set_bit(self, step: DeviceStep) -> None:
        before = self.device.status
        if step is DeviceStep.FEATURES_OK and self.state is DeviceState.DRIVER:
            self.device.accept(self.device.offered)
        self.device.write_status(before | BITS[step])
        if step is DeviceStep.FEATURES_OK and not before & Status.FEATURES_OK:
            self.fresh = 2
            self.setup(0)
            self.setup(1)
            self.device.reset_queue(1)

    def do(self, step: DeviceStep) -> None:
        device = self.device
        if step in BITS:
            self.set_bit(step)
        elif step is DeviceStep.RESET:
            device.write_status(0)
        elif step is DeviceStep.ACCEPT:
            device.accept(device.offered)
        elif step is DeviceStep.SETUP_QUEUE:
            self.setup(self.fresh)
            self.fresh += 1
        elif step is DeviceStep.RESET_QUEUE:
            device.reset_queue(0)
            self.setup(0)
        elif step is DeviceStep.REENABLE_QUEUE:
            self.setup(1)
            device.reset_queue(1)
        elif step is DeviceStep.WRITE_CONFIG:
            device.write_config(0, b"four")
        else:
            device.need_reset()

    def close(self) -> None:
        self.device.reset()
        self.device.memory.remove(BASE)
        self.memory.close()


def drive_driver(machine: DriverMachine, step: DriverStep) -> None:
    """One step, held against the table."""
    state, status = machine.state, machine.status
    expected = DRIVER_TABLE.cells[state, step]
    if expected is not None:
        machine.do(step)
        assert machine.state is expected
        return
    with pytest.raises(StatusError, match=f"out of order in state {state.value}.*3\\.1\\.1") as refusal:
        machine.do(step)
    assert all(allowed.value in str(refusal.value) for allowed in DRIVER_TABLE.allowed(state))
    if step is not DriverStep.NEEDS_RESET:  # where the device itself acted first
        assert (machine.state, machine.status) == (state, status)


def drive_device(machine: DeviceMachine, step: DeviceStep) -> None:
    """One step, held against the table; writing a bit that is set is no step."""
    state, status = machine.state, machine.status
    expected = DEVICE_TABLE.cells[state, step]
    if step in BITS and BITS[step] in status:
        machine.device.write_status(status)
        assert (machine.state, machine.status) == (state, status)
    elif expected is not None:
        machine.do(step)
        assert machine.state is expected
    else:
        with pytest.raises(StatusError, match=f"out of order in state {state.value}.*3\\.1\\.1"):
            machine.do(step)
        assert (machine.state, machine.status) == (state, status)


DRIVER_PATHS: dict[DriverState, tuple[DriverStep, ...]] = {
    DriverState.NEW: (),
    DriverState.RESET: (DriverStep.RESET,),
    DriverState.DRIVER: (DriverStep.ACKNOWLEDGE,),
    DriverState.FEATURES_OK: (DriverStep.NEGOTIATE,),
    DriverState.DRIVER_OK: (DriverStep.NEGOTIATE, DriverStep.DRIVER_OK),
    DriverState.NEEDS_RESET: (DriverStep.NEGOTIATE, DriverStep.DRIVER_OK, DriverStep.NEEDS_RESET),
    DriverState.FAILED: (DriverStep.ACKNOWLEDGE, DriverStep.FAIL),
    DriverState.CLOSED: (DriverStep.CLOSE,),
}
_STEPS = (DeviceStep.ACKNOWLEDGE, DeviceStep.DRIVER, DeviceStep.FEATURES_OK, DeviceStep.DRIVER_OK)
DEVICE_PATHS: dict[DeviceState, tuple[DeviceStep, ...]] = {
    DeviceState.RESET: (),
    DeviceState.ACKNOWLEDGE: _STEPS[:1],
    DeviceState.DRIVER: _STEPS[:2],
    DeviceState.FEATURES_OK: _STEPS[:3],
    DeviceState.DRIVER_OK: _STEPS,
    DeviceState.NEEDS_RESET: (*_STEPS, DeviceStep.NEED_RESET),
    DeviceState.FAILED: (*_STEPS[:2], DeviceStep.FAIL),
}


def history_of_driver(steps: Iterable[DriverStep]) -> None:
    machine = DriverMachine()
    try:
        for step in steps:
            drive_driver(machine, step)
    finally:
        machine.close()


def history_of_device(steps: Iterable[DeviceStep]) -> None:
    machine = DeviceMachine()
    try:
        for step in steps:
            drive_device(machine, step)
    finally:
        machine.close()


@pytest.mark.parametrize("step", DriverStep)
@pytest.mark.parametrize("state", DriverState)
def test_every_step_of_the_driver_in_every_state(state: DriverState, step: DriverStep) -> None:
    history_of_driver((*DRIVER_PATHS[state], step))


@pytest.mark.parametrize("step", DeviceStep)
@pytest.mark.parametrize("state", DeviceState)
def test_every_step_of_the_device_in_every_state(state: DeviceState, step: DeviceStep) -> None:
    history_of_device((*DEVICE_PATHS[state], step))


@given(st.lists(st.sampled_from([step for step in DriverStep if step is not DriverStep.CLOSE]), max_size=30))
def test_histories_of_the_driver(steps: list[DriverStep]) -> None:
    history_of_driver(steps)


@given(st.lists(st.sampled_from(DeviceStep), max_size=30))
def test_histories_of_the_device(steps: list[DeviceStep]) -> None:
    history_of_device(steps)


def test_the_tables_know_every_pair_and_reach_every_state() -> None:
    assert set(DRIVER_TABLE.cells) == {(state, step) for state in DriverState for step in DriverStep}
    assert set(DEVICE_TABLE.cells) == {(state, step) for state in DeviceState for step in DeviceStep}
    assert set(DRIVER_TABLE.cells.values()) - {None} == set(DriverState) - {DriverState.NEW}
    assert set(DEVICE_TABLE.cells.values()) - {None} == set(DeviceState)


def test_a_table_with_a_hole_is_refused() -> None:
    row: list[DriverState | None] = [None] * len(DriverStep)
    rows = dict.fromkeys(DriverState, row)
    StatusTable("driver", DriverState, DriverStep, rows)
    with pytest.raises(ValueError, match="NEW"):
        StatusTable("driver", DriverState, DriverStep, dict.fromkeys(list(DriverState)[1:], row))
    with pytest.raises(ValueError, match="shorter"):
        StatusTable("driver", DriverState, DriverStep, rows | {DriverState.NEW: row[1:]})


@pytest.mark.parametrize("status", [-1, 0x100])
def test_the_status_field_has_eight_bits(status: int) -> None:
    with pytest.raises(ValueError, match="0xff"):
        Quiet().write_status(status)


def test_status_bits_are_cleared_by_a_reset_only() -> None:
    machine = DeviceMachine()
    for step in _STEPS[:2]:
        machine.do(step)
    with pytest.raises(StatusError, match=r"ACKNOWLEDGE.*only by a reset"):
        machine.device.write_status(Status.DRIVER)
    assert machine.status == Status.ACKNOWLEDGE | Status.DRIVER


def test_several_status_bits_in_one_write_are_all_taken_or_none() -> None:
    device = Quiet()
    with pytest.raises(StatusError, match="DRIVER_OK"):
        device.write_status(Status.ACKNOWLEDGE | Status.DRIVER | Status.DRIVER_OK)
    assert device.status == 0
    device.write_status(Status.ACKNOWLEDGE | Status.DRIVER)
    assert device.state is DeviceState.DRIVER


def test_bits_that_are_not_the_drivers_are_ignored() -> None:
    device = Quiet()
    device.write_status(Status.ACKNOWLEDGE | Status.NEEDS_RESET | Status.SUSPEND | 32)
    assert device.status == Status.ACKNOWLEDGE
    device.need_reset()
    device.write_status(Status.ACKNOWLEDGE)  # does not clear what is the device's own
    assert device.status == Status.ACKNOWLEDGE | Status.NEEDS_RESET
