"""Interfaces with a queue for each queue pair: flows stay on theirs through the kernel, and only pairs in use have traffic."""

import errno
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.leftovers import all_closed
from tests.net.flows import udp
from tests.netdev.wires import carrier
from virtio import Feature, NetDevice, NetDriver, StatusError
from virtio.devices.net import WANTED
from virtio.features import Features
from virtio.netdev import Namespace, Netdev
from virtio.netdev.tap import open_queues
from virtio.port import Port
from virtio.transport.loopback import LoopbackTransport

ETH_P_IP = 0x0800
FLOWS = range(24)
LIMIT = 60.0


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    with all_closed(), Namespace() as made:
        with made.entered():
            Path("/proc/sys/net/ipv6/conf/default/disable_ipv6").write_text("1")
        yield made


class Wire:
    """The kernel's side of the interface."""

    def __init__(self, namespace: Namespace, name: str) -> None:
        with namespace.entered():
            self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_IP))
            self._socket.bind((name, ETH_P_IP))
        self._socket.settimeout(LIMIT)
        deadline = time.monotonic() + LIMIT
        while not carrier(namespace, name):
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def send(self, frame: bytes) -> None:
        self._socket.send(frame)

    def receive(self, count: int) -> list[bytes]:
        found: list[bytes] = []
        while len(found) < count:
            frame, address = self._socket.recvfrom(2048)
            if address[2] != socket.PACKET_OUTGOING:
                found.append(frame)
        return found

    def close(self) -> None:
        self._socket.close()


def asks(ring_format: str) -> Features:
    return WANTED - ([Feature.RING_PACKED] if ring_format == "split" else [])


def gather(pairs: Sequence[Port], count: int, alternate: Callable[[], object]) -> list[list[bytes]]:
    """So many frames, by the pair that they came on."""
    found: list[list[bytes]] = [[] for _ in pairs]
    deadline = time.monotonic() + LIMIT
    while sum(map(len, found)) < count:
        for number, pair in enumerate(pairs):
            found[number] += pair.receive_frames()
        alternate()
        assert time.monotonic() < deadline, found
    return found


def exchange(pairs: Sequence[Port], wire: Wire, alternate: Callable[[], object] = lambda: time.sleep(0.001)) -> None:
    """Each flow goes out on a pair of its own choice; the kernel answers on that."""
    for number in range(4):
        there = [udp(flow, number=number) for flow in FLOWS]
        for flow, frame in zip(FLOWS, there, strict=True):
            assert pairs[flow % len(pairs)].send_frames([frame]) == 1
        assert sorted(wire.receive(len(there))) == sorted(there)
        for flow in FLOWS:
            wire.send(udp(flow, back=True, number=number))
        found = gather(pairs, len(FLOWS), alternate)
        for place, frames in enumerate(found):
            assert sorted(frames) == sorted(udp(flow, back=True, number=number) for flow in FLOWS if flow % len(pairs) == place)


def test_a_devices_interface_follows_the_pairs_in_use(namespace: Namespace, ring_format: str) -> None:
    device, errors = NetDevice(queue_pairs=3), list[Exception]()
    with Netdev(device, "tap0", namespace=namespace) as tap, LoopbackTransport(device) as transport:
        tap.follow(errors.append)
        with NetDriver(transport, queue_pairs=3, wanted=asks(ring_format)) as net:
            wire = Wire(namespace, "tap0")
            pairs = [net.pair(number) for number in range(3)]
            exchange(pairs, wire)
            for count in (1, 2, 3):
                net.use_pairs(count)
                before = [pair.statistics["received_frames"] for pair in pairs]
                exchange(pairs[:count], wire)
                after = [pair.statistics["received_frames"] for pair in pairs]
                assert [new > old for old, new in zip(before, after, strict=True)] == [number < count for number in range(3)]
            net.restart()
            exchange(pairs, wire)
            net.reset_queue(3)
            net.setup_queue(3)
            exchange(pairs, wire)
            wire.close()
        assert tap.statistics["transmit"]["frames"] >= 6 * 4 * len(FLOWS)
    assert not errors


def test_what_a_pair_sent_before_it_went_out_of_use_is_sent(namespace: Namespace, ring_format: str) -> None:
    device, errors = NetDevice(queue_pairs=3), list[Exception]()
    with (
        LoopbackTransport(device) as transport,
        NetDriver(transport, queue_pairs=3, wanted=asks(ring_format)) as net,
        Netdev(device, "tap0", namespace=namespace) as tap,
    ):
        sent = [udp(flow) for flow in FLOWS]
        for flow, frame in zip(FLOWS, sent, strict=True):
            assert net.pair(1 + flow % 2).send_frames([frame]) == 1
        net.use_pairs(1)
        with namespace.entered():  # it hears the first frame, however late the carrier comes
            hearing = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_IP))
            hearing.bind(("tap0", ETH_P_IP))
        hearing.settimeout(LIMIT)
        tap.follow(errors.append)
        found: list[bytes] = []
        while len(found) < len(sent):
            try:
                found.append(hearing.recv(2048))
            except OSError as error:  # the interface was down when it began to hear
                assert error.errno == errno.ENETDOWN
        hearing.close()
        assert sorted(found) == sorted(sent)
        deadline = time.monotonic() + LIMIT
        while [queue.progress[1] for index in (3, 5) if (queue := device.queue(index)) is not None] != [len(sent) // 2] * 2:
            assert time.monotonic() < deadline
            time.sleep(0.001)
    assert not errors


@pytest.mark.parametrize("mine", ["driver", "device"])
def test_an_interface_that_is_started_takes_the_pairs_in_use(namespace: Namespace, ring_format: str, mine: str) -> None:
    device = NetDevice(queue_pairs=2)
    with LoopbackTransport(device) as transport, NetDriver(transport, queue_pairs=2, slots=256, wanted=asks(ring_format)) as net:
        near, far = (net, device) if mine == "driver" else (device, net)
        with Netdev(near, "vn0", namespace=namespace) as interface:
            for count in (2, 1, 2):
                net.use_pairs(count)
                interface.start()
                idle = mine == "device" and count < 2  # a device's pairs out of use still send what is there
                assert len([each for each in threading.enumerate() if each.name == "virtio-pump"]) == 2 * count + idle
                wire = Wire(namespace, "vn0")
                exchange([far.pair(number) for number in range(count)], wire)
                wire.close()
                interface.stop()
            with pytest.raises(StatusError):
                net.close()
                interface.start()


def test_both_ends_as_interfaces(namespace: Namespace, ring_format: str) -> None:
    device = NetDevice(queue_pairs=2)
    with (
        LoopbackTransport(device) as transport,
        NetDriver(transport, queue_pairs=2, slots=256, wanted=asks(ring_format)) as net,
        Netdev(net, "vn0", namespace=namespace) as one,
        Netdev(device, "peer0", namespace=namespace) as other,
        Netdev.pair(one, other) as pair,
    ):
        pair.start()
        wires = Wire(namespace, "vn0"), Wire(namespace, "peer0")
        for back in (False, True):
            here, there = wires if not back else reversed(wires)
            frames = [udp(flow, back=back) for flow in FLOWS]
            for frame in frames:
                here.send(frame)
            assert sorted(there.receive(len(frames))) == sorted(frames)
        for wire in wires:
            wire.close()


def test_queues_of_a_tap(namespace: Namespace) -> None:
    queues = open_queues("tap0", 4, namespace=namespace.fileno())
    assert len(queues) == len(set(queues)) == 4
    with pytest.raises(OSError, match="interface tap0 is there already"):
        open_queues("tap0", 2, namespace=namespace.fileno())
    with pytest.raises(OSError, match="cannot be made"):
        open_queues("tap1", 257, namespace=namespace.fileno())
    for queue in queues:
        os.close(queue)
