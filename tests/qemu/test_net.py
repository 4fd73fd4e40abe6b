"""QEMU's virtio-net-pci by bare queues: frames over a wire of ours, link, configuration generation, queue reset, MTU, NEEDS_RESET."""

from collections.abc import Iterator
from contextlib import contextmanager
from socket import socket
from struct import pack, unpack

import pytest

from tests.qemu.conftest import How, Machines, only
from virtio import DeviceNeedsReset, DriverQueue, Feature, Features
from virtio.driver import Driver
from virtio.pci.qtest import QemuMachine
from virtio.testing import RawPackedDriver, RawSplitDriver

pytestmark = pytest.mark.qemu

MTU, MAC, STATUS = 3, 5, 16
HEADER = 12
RECEIVE, TRANSMIT = 0, 1
ADDRESS = bytes.fromhex("525400123456")
CARD = "virtio-net-pci,netdev=n0,mac=52:54:00:12:34:56,disable-legacy=on,packed=on"


def frame(number: int, length: int = 60) -> bytes:
    """A broadcast frame whose bytes tell it from others."""
    return (b"\xff" * 6 + ADDRESS + b"\x88\xb5" + pack("<I", number) * (length // 4))[:length]


@contextmanager
def card(machine: QemuMachine, wanted: Features, interrupts: How = "auto") -> Iterator["Card"]:
    with only(machine, interrupts) as transport, Card(transport) as driver:
        driver.negotiate(wanted=wanted | {MAC, STATUS, MTU})
        driver.queues_up()
        driver.driver_ok()
        yield driver


class Card(Driver):
    """Frames by chains with a header of 12 bytes before them; nothing of `virtio.devices.net`."""

    device_id = 1

    def queues_up(self) -> None:
        for index in (RECEIVE, TRANSMIT):
            self.queue_up(index)

    def queue_up(self, index: int) -> DriverQueue:
        queue = self.setup_queue(index, size=64)
        if index == RECEIVE:
            for _ in range(16):
                self.post(queue, self.allocate(2048))
            queue.publish()
        return queue

    def post(self, queue: DriverQueue, place: int) -> None:
        queue.add(place, writable=[(self.address + place, 2048)])

    def send(self, data: bytes) -> None:
        place = self.allocate(HEADER + len(data))
        self.memory.write(place, bytes(HEADER) + data)
        self.queues[TRANSMIT].add(None, readable=[(self.address + place, HEADER + len(data))])
        self.queues[TRANSMIT].publish()
        assert self.wait_used(self.queues[TRANSMIT], 60.0)

    def receive(self) -> bytes:
        queue = self.queues[RECEIVE]
        ((place, length), *others) = self.wait_used(queue, 60.0)
        assert not others
        data = self.memory.read(place, length)
        assert data[:10] == bytes(10)
        self.post(queue, place)
        queue.publish()
        return data[HEADER:]


def both_ways(driver: Card, wire: socket, count: int = 20) -> None:
    wire.settimeout(60.0)
    for number in range(count):
        length = 60 + 67 * number
        driver.send(frame(number, length))
        assert wire.recv(4096) == frame(number, length)
        wire.send(frame(~number & 0xFFFF, length))
        assert driver.receive() == frame(~number & 0xFFFF, length)


@pytest.mark.parametrize("interrupts", ["msix", "intx"])
@pytest.mark.parametrize("kind", ["q35", "pc"])
def test_frames_go_both_ways(machines: Machines, ring_features: Features, ring_format: str, kind: str, interrupts: How) -> None:
    machine = machines(CARD, wires=["n0"], machine=kind)
    with card(machine, ring_features, interrupts) as driver:
        assert driver.queues[RECEIVE].ring_format == ring_format
        assert driver.read_config(0, 6) == ADDRESS
        both_ways(driver, machine.wire("n0"))


@pytest.mark.parametrize("vectors", [1, 2, 3, 4])
def test_with_fewer_vectors_than_queues(machines: Machines, vectors: int) -> None:
    machine = machines(f"{CARD},vectors={vectors}", wires=["n0"])
    with card(machine, Features({Feature.RING_PACKED, Feature.EVENT_IDX}), "msix") as driver:
        both_ways(driver, machine.wire("n0"))


@pytest.mark.parametrize(
    "wanted",
    [{Feature.EVENT_IDX}, {Feature.INDIRECT_DESC, Feature.EVENT_IDX}, {Feature.ACCESS_PLATFORM}, {Feature.RING_RESET}],
    ids=["event idx", "indirect", "access platform", "ring reset"],
)
def test_with_features_of_the_ring(machines: Machines, ring_features: Features, wanted: set[int]) -> None:
    platform = "on" if Feature.ACCESS_PLATFORM in wanted else "off"  # a device that offers it insists on it
    machine = machines(f"{CARD},iommu_platform={platform}", wires=["n0"])
    with card(machine, ring_features | wanted) as driver:
        assert driver.features >= wanted
        both_ways(driver, machine.wire("n0"))


@pytest.mark.parametrize("interrupts", ["msix", "intx"])
def test_link_changes_are_notified_with_a_new_generation(machines: Machines, interrupts: How) -> None:
    machine = machines(f"{CARD},id=card", wires=["n0"])
    with card(machine, Features(), interrupts) as driver:
        generations = [driver.transport.config_generation]
        for up in (False, True, False):
            machine.qmp("set_link", name="card", up=up)
            assert driver.transport.config_interrupt.wait(60.0)
            driver.transport.config_interrupt.drain()
            assert unpack("<H", driver.read_config(6, 2)) == (int(up),)
            generations.append(driver.transport.config_generation)
            assert generations[-1] != generations[-2]


@pytest.mark.parametrize("mtu", [68, 1500, 9000])
def test_the_mtu_stands_in_the_configuration(machines: Machines, mtu: int) -> None:
    machine = machines(f"{CARD},host_mtu={mtu}", wires=["n0"])
    with card(machine, Features()) as driver:
        assert MTU in driver.features
        assert unpack("<H", driver.read_config(10, 2)) == (mtu,)


def test_one_queue_is_reset_and_set_up_again(machines: Machines, ring_features: Features) -> None:
    machine = machines(CARD, wires=["n0"])
    with card(machine, ring_features | {Feature.RING_RESET}) as driver:
        both_ways(driver, machine.wire("n0"), 3)
        for index, outstanding in ((TRANSMIT, 0), (RECEIVE, 16)):
            assert len(driver.reset_queue(index)) == outstanding
            driver.queue_up(index)
            both_ways(driver, machine.wire("n0"), 3)


def test_a_device_that_needs_a_reset_works_after_it(machines: Machines, ring_features: Features) -> None:
    """QEMU gives up at a descriptor of length 0."""
    machine = machines(CARD, wires=["n0"])
    with only(machine) as transport, Card(transport) as driver:
        driver.negotiate(wanted=ring_features)
        driver.queues_up()
        driver.driver_ok()
        queue, place = driver.queues[TRANSMIT], driver.address + driver.allocate(16)
        raw: RawPackedDriver | RawSplitDriver
        if queue.ring_format == "packed":
            raw = RawPackedDriver(driver.memory, queue.size, queue.areas, address=driver.address)
            raw.add([(place, 0, False)])
        else:
            raw = RawSplitDriver(driver.memory, queue.size, queue.areas, address=driver.address)
            raw.make_available(raw.add([(place, 0, False)]))
        notify = transport.layout.notify
        transport.function.doorbell(notify.bar, notify.offset + TRANSMIT * notify.multiplier, 2, TRANSMIT).signal()
        with pytest.raises(DeviceNeedsReset):
            while driver.wait(60.0):
                continue
        assert len(driver.reset()[RECEIVE]) == 16
        driver.negotiate(wanted=ring_features | {MAC})
        driver.queues_up()
        driver.driver_ok()
        both_ways(driver, machine.wire("n0"))
