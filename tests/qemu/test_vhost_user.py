"""QEMU as a vhost-user front-end of our network device, with our driver in the place of a guest: frames go through both."""

import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import sleep
from typing import Any

import pytest

from tests.leftovers import descriptors
from tests.net.flows import udp
from tests.netdev.wires import Wire, frame, number_of
from tests.qemu.conftest import Machines, only
from virtio import Burst, Feature, NetDevice, NetDriver, NetFeature
from virtio.features import Features
from virtio.netdev import Namespace, Netdev
from virtio.pci.qtest import QemuMachine
from virtio.vhost_user.backend import Backend

pytestmark = pytest.mark.qemu
SPLIT = Features({Feature.VERSION_1})
SHORT = 0.0001
"""Seconds after which a thread that waits for the interpreter gets it."""


class Echo(NetDevice):
    """Sends back what it gets."""

    def on_frames(self, burst: Burst) -> None:
        self.send(burst)


@contextmanager
def serving(path: str, device: NetDevice, **options: Any) -> Iterator[Backend]:
    """A back-end in a thread; no thread and no descriptor is left."""
    errors: list[Exception] = []
    interval = sys.getswitchinterval()
    with Backend(path, device, report=errors.append, **options) as backend:
        thread = threading.Thread(target=backend.serve)
        # One that polls never gives the interpreter away by itself, and here the driver waits for it at each access of a register.
        sys.setswitchinterval(SHORT)
        thread.start()
        try:
            yield backend
        finally:
            backend.stop()
            thread.join()
            sys.setswitchinterval(interval)
    assert not errors


def card(binary: str) -> str:
    """QEMU 7.2 ends by SIGSEGV if such a card has MSI-X under TCG."""
    vectors = "" if binary == shutil.which("qemu-system-x86_64") else ",vectors=0"
    return f"virtio-net-pci,netdev=n0,packed=on,mrg_rxbuf=on{vectors}"


@pytest.fixture
def guest(machines: Machines, binary: str, tmp_path: Path) -> Callable[[], QemuMachine]:
    """Starts QEMU on the back-end at `tmp_path / "net"`."""
    options = ["-chardev", f"socket,id=vu,path={tmp_path / 'net'}"]
    return lambda: machines(card(binary), netdevs=["vhost-user,id=n0,chardev=vu"], options=options)


def exchange(driver: NetDriver, count: int) -> None:
    """Sends frames of all lengths, and has each come back as it went."""
    frames = [bytes([number % 251]) * (60 + number * 37 % 1400) for number in range(count)]
    sent, received = 0, list[bytes]()
    while len(received) < count:
        sent += driver.send_frames(frames[sent : sent + 32])
        assert driver.wait(60.0)
        received += driver.receive_frames(64)
    assert received == frames


def drive(machine: QemuMachine, count: int, restarts: int = 0) -> str:
    """Our driver on the machine's card; the format of its rings."""
    with only(machine) as transport, NetDriver(transport) as driver:
        exchange(driver, count)
        for _ in range(restarts):  # the guest resets its card, and sets it up again
            driver.restart()
            exchange(driver, count)
        return str(driver.receiveq.ring_format)


def device_with(ring_features: Features) -> Echo:
    return Echo(offered=NetDevice.features | {Feature.EVENT_IDX, Feature.INDIRECT_DESC, *ring_features})


def test_frames_go_through_qemu_into_our_device_and_back(
    guest: Callable[[], QemuMachine], tmp_path: Path, ring_features: Features, ring_format: str
) -> None:
    device = device_with(ring_features)
    assert device.pool.slots  # made when it is needed first
    before = descriptors()
    with serving(str(tmp_path / "net"), device) as backend:
        ready = descriptors()
        with guest() as machine:
            assert drive(machine, 200, restarts=3) == ring_format
        while backend.connections:
            sleep(0.01)
        assert descriptors() <= ready
    assert descriptors() <= before


def test_frames_go_through_while_polling(guest: Callable[[], QemuMachine], tmp_path: Path) -> None:
    with serving(str(tmp_path / "net"), device_with(SPLIT), poll=True), guest() as machine:
        drive(machine, 100)


@pytest.mark.parametrize("poll", [False, True], ids=["asleep", "polling"])
def test_two_queue_pairs(machines: Machines, binary: str, tmp_path: Path, ring_features: Features, poll: bool) -> None:
    """QEMU keeps the control queue: what a driver asks for there comes as rings that are enabled and disabled."""
    offered = NetDevice.features | {NetFeature.MQ, NetFeature.CTRL_VQ, Feature.EVENT_IDX, Feature.INDIRECT_DESC, *ring_features}
    device = Echo(queue_pairs=2, offered=offered - {NetFeature.MTU, NetFeature.SPEED_DUPLEX})
    options = ["-chardev", f"socket,id=vu,path={tmp_path / 'net'}"]
    netdevs = ["vhost-user,id=n0,chardev=vu,queues=2"]
    vectors = ",vectors=6" if binary == shutil.which("qemu-system-x86_64") else ",vectors=0"
    with serving(str(tmp_path / "net"), device, poll=poll):
        model = f"virtio-net-pci,netdev=n0,packed=on,mq=on{vectors}"
        with (
            machines(model, netdevs=netdevs, options=options) as machine,
            only(machine) as transport,
            NetDriver(transport, queue_pairs=2) as driver,
        ):
            for _ in range(2):
                assert driver.queue_pairs == driver.active_pairs == 2
                assert NetFeature.MQ in device.accepted and NetFeature.CTRL_VQ not in device.accepted
                for pairs in (2, 1, 2):
                    driver.use_pairs(pairs)
                    before = [device.pair(number).statistics.get("sent_frames", 0) for number in range(2)]
                    echoes(driver, [udp(flow) for flow in range(200)])
                    after = [device.pair(number).statistics["sent_frames"] for number in range(2)]
                    assert after[0] > before[0] and (after[1] > before[1]) == (pairs == 2)
                driver.restart()


def echoes(driver: NetDriver, frames: list[bytes]) -> None:
    """Each comes back once, those of one flow in their order; on its own pair."""
    sent, received = 0, list[bytes]()
    while len(received) < len(frames):
        sent += driver.send_frames(frames[sent : sent + 32])
        assert driver.wait(60.0)
        received += driver.receive_frames()
    assert sorted(received) == sorted(frames)
    for number in range(2):
        seen = driver.pair(number).statistics
        assert seen["sent_frames"] == seen["received_frames"]


def test_one_machine_after_the_other(guest: Callable[[], QemuMachine], tmp_path: Path) -> None:
    with serving(str(tmp_path / "net"), device_with(SPLIT)):
        for _ in range(2):
            with guest() as machine:
                drive(machine, 50)


def test_the_back_end_waits_until_qemu_listens(machines: Machines, binary: str, tmp_path: Path) -> None:
    path = str(tmp_path / "net")
    with serving(path, device_with(SPLIT), connect=True):
        options = ["-chardev", f"socket,id=vu,path={path},server=on"]
        with machines(card(binary), netdevs=["vhost-user,id=n0,chardev=vu"], options=options) as machine:
            drive(machine, 50)


def test_an_interface_goes_with_qemus_card(guest: Callable[[], QemuMachine], tmp_path: Path, ring_features: Features) -> None:
    device = NetDevice(offered=NetDevice.features | {Feature.EVENT_IDX, Feature.INDIRECT_DESC, *ring_features})
    errors: list[Exception] = []
    with Namespace() as namespace, Netdev(device, "tap0", namespace=namespace) as tap:
        tap.follow(errors.append)
        with serving(str(tmp_path / "net"), device), Wire(namespace, "tap0") as wire:
            for _ in range(2):  # one machine after the other, each with several resets
                with guest() as machine, only(machine) as transport, NetDriver(transport) as driver:
                    for life in range(3):
                        wire.ready()
                        for number in range(50):
                            assert driver.send_frames([frame(number)]) == 1
                            wire.send(number)
                        assert wire.receive(50) == list(range(50))
                        found: list[int] = []
                        while len(found) < 50:
                            assert driver.wait(60.0)
                            found += [number_of(data) for data in driver.receive_frames() if data[12:14] == frame(0)[12:14]]
                        assert found == list(range(50))
                        if life < 2:
                            driver.restart()
        assert not tap.running and tap.error is None
    assert not errors
