"""Message orders by QEMU as a front-end of our network device: what a guest and a monitor do with a card, over and over."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.qemu.conftest import Machines, only
from tests.qemu.test_vhost_user import Echo, card, exchange, serving
from virtio import Driver, Feature, NetDevice, NetDriver, Status
from virtio.devices.net import WANTED
from virtio.features import Features
from virtio.pci.qtest import QemuMachine
from virtio.transport import Transport

pytestmark = pytest.mark.qemu

BOTH = Features({Feature.VERSION_1, Feature.RING_PACKED, Feature.EVENT_IDX, Feature.INDIRECT_DESC, Feature.RING_RESET})
ROUNDS = 4


@pytest.fixture
def machine(machines: Machines, binary: str, tmp_path: Path) -> Iterator[QemuMachine]:
    """QEMU on a back-end that offers both formats; whose errors are the test's."""
    path = tmp_path / "net"
    with serving(str(path), Echo(offered=NetDevice.features | BOTH)):
        options = ["-chardev", f"socket,id=vu,path={path}"]
        with machines(f"{card(binary)},id=card", netdevs=["vhost-user,id=n0,chardev=vu"], options=options) as started:
            yield started


def wanted(ring_format: str) -> Features:
    return WANTED | {Feature.RING_PACKED} if ring_format == "packed" else WANTED - {Feature.RING_PACKED}


def without_queues(driver: Driver) -> None:
    driver.driver_ok()


def one_queue(driver: Driver) -> None:
    driver.setup_queue(1, size=64)
    driver.driver_ok()


def filled_and_not_begun(driver: Driver) -> None:
    queue = driver.setup_queue(0, size=64)
    queue.add(None, writable=[(driver.address + driver.allocate(2048), 2048)])
    queue.publish()


def twice(driver: Driver) -> None:
    driver.setup_queue(0, size=64)
    driver.setup_queue(1, size=64)
    driver.driver_ok()
    driver.reset()
    driver.reset()


def gives_up(driver: Driver) -> None:
    driver.setup_queue(0, size=64)
    driver.driver_ok()
    driver.fail()


ORDERS: dict[str, Callable[[Driver], None]] = {
    "negotiated and reset": lambda driver: None,
    "DRIVER_OK without queues": without_queues,
    "DRIVER_OK with one queue": one_queue,
    "buffers, and reset before DRIVER_OK": filled_and_not_begun,
    "reset twice": twice,
    "FAILED under DRIVER_OK": gives_up,
}


def play(transport: Transport, features: Features, order: Callable[[Driver], None]) -> None:
    """One life of the card that comes to nothing."""
    driver = Driver(transport)
    try:
        driver.negotiate(wanted=features)
        order(driver)
    finally:
        driver.close()
    assert transport.status == Status(0)


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_lives_that_come_to_nothing_between_others(machine: QemuMachine, ring_format: str, order: Callable[[Driver], None]) -> None:
    with only(machine) as transport:
        for number in range(ROUNDS):
            play(transport, wanted(ring_format), order)
            with NetDriver(transport, wanted=wanted(ring_format), queue_size=64 << number % 3) as driver:
                assert driver.receiveq.ring_format == ring_format
                exchange(driver, 40)
                driver.restart()
                play_on(driver, 40)


def play_on(driver: NetDriver, count: int) -> None:
    """Frames, a reset that nothing follows but another beginning, frames."""
    exchange(driver, count)
    driver.reset()
    driver.restart()
    exchange(driver, count)


def test_the_format_changes_with_each_reset(machine: QemuMachine) -> None:
    with only(machine) as transport:
        for number in range(2 * ROUNDS):
            ring_format = ("split", "packed")[number % 2]
            with NetDriver(transport, wanted=wanted(ring_format)) as driver:
                assert driver.receiveq.ring_format == ring_format
                exchange(driver, 40)


def test_rings_stop_and_go_on_with_the_machine(machine: QemuMachine, ring_format: str) -> None:
    """The monitor's `stop` and `cont`: GET_VRING_BASE, and the rings enabled again from there, with what waits in them."""
    with only(machine) as transport, NetDriver(transport, wanted=wanted(ring_format), queue_size=64) as driver:
        for number in range(3 * ROUNDS):
            exchange(driver, 7 + number)
            machine.qmp("stop")
            frames = [bytes([number, each]) * 40 for each in range(20)]
            assert driver.send_frames(frames) == 20
            machine.qmp("cont")
            received: list[bytes] = []
            while len(received) < 20:
                assert driver.wait(60.0)
                received += driver.receive_frames(64)
            assert received == frames


def test_rings_stop_and_go_on_with_the_link(machine: QemuMachine, ring_format: str) -> None:
    """QEMU takes the rings back when the link goes down, throws away what is sent meanwhile, and hands them over further on."""
    with only(machine) as transport, NetDriver(transport, wanted=wanted(ring_format), queue_size=64) as driver:
        for number in range(3 * ROUNDS):
            exchange(driver, 7 + number)
            for up in (False, True):
                machine.qmp("set_link", name="card", up=up)
                while driver.link != up:
                    assert driver.wait(60.0)
                if not up and ring_format == "split":  # of packed rings QEMU dies then, by an assertion of its own
                    assert driver.send_frames([bytes(60)] * 5) == 5
                    while driver.transmitq.outstanding:
                        assert driver.wait(60.0, room=True)
                        driver.send_frames([])
        exchange(driver, 100)


def test_qemu_tells_the_mtu(machines: Machines, binary: str, tmp_path: Path) -> None:
    """It keeps the configuration: what its guest was told comes by NET_SET_MTU."""
    path, told = tmp_path / "net", list[int]()
    device = Echo(offered=NetDevice.features | BOTH)
    device.on_mtu = told.append
    with serving(str(path), device):
        options = ["-chardev", f"socket,id=vu,path={path}"]
        model = f"{card(binary)},host_mtu=4000"
        with (
            machines(model, netdevs=["vhost-user,id=n0,chardev=vu"], options=options) as started,
            only(started) as transport,
            NetDriver(transport) as driver,
        ):
            exchange(driver, 10)
            assert driver.mtu == 4000 and set(told) == {4000}
