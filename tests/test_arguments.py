"""The beginner's mistakes: a wrong argument is refused by the call that makes it, with one error that names argument, value and limit."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest

from virtio import Device, DeviceId, DeviceQueue, Driver, Features, Memory, NetDevice, NetDriver, StatusError
from virtio.devices.rng import RngDevice, RngDriver
from virtio.netdev import Namespace, NamespaceError, Netdev, open_tap
from virtio.pci.emulated import EmulatedFunction
from virtio.pci.qtest import QemuMachine
from virtio.testing import RawSplitDriver
from virtio.transport.loopback import LoopbackTransport
from virtio.transport.pci import PciTransport
from virtio.transport.vhost_user import VhostUserTransport
from virtio.vhost_user.backend import Backend
from virtio.vhost_user.socket import listen

Call = Callable[[Any], object]
x: Any = None


def transport() -> LoopbackTransport:
    return LoopbackTransport(NetDevice())


class Words(Device):
    device_id = DeviceId.ENTROPY
    features: ClassVar[Any] = ("x",)


class Twice(Device):
    device_id = DeviceId.ENTROPY
    queues = ("q", "q")

    def on_q(self, queue: DeviceQueue) -> None: ...


def negotiating(**asked: Any) -> None:
    with LoopbackTransport(RngDevice()) as carrier, Driver(carrier) as driver:
        driver.negotiate(**asked)


TYPES: list[tuple[str, Call]] = [
    ("transport is a NetDevice: it has to be a transport", lambda _: NetDriver(NetDevice())),  # type: ignore[arg-type]
    ("transport is None: it has to be a transport", lambda x: NetDriver(x)),
    ("transport is None: it has to be a transport", lambda x: Driver(x)),
    ("transport is the class LoopbackTransport, not an object", lambda _: RngDriver(LoopbackTransport)),  # type: ignore[arg-type]
    ("memory is 5: it has to be a Memory", lambda _: Driver(transport(), memory=5)),  # type: ignore[arg-type]
    ("device is the class NetDevice, not an object of it", lambda _: LoopbackTransport(NetDevice)),  # type: ignore[arg-type]
    ("device is the class NetDevice, not an object of it", lambda _: EmulatedFunction(NetDevice)),  # type: ignore[arg-type]
    ("device is None: it has to be a Device", lambda x: LoopbackTransport(x)),
    ("device is None: it has to be a Device", lambda x: EmulatedFunction(x)),
    ("function is a NetDevice: it has to be a PciFunction", lambda _: PciTransport(NetDevice())),  # type: ignore[arg-type]
    ("function is None: it has to be a PciFunction", lambda x: PciTransport(x)),
    ("config_interrupt is 5: it has to be an EventFd", lambda _: NetDevice().connect(5)),  # type: ignore[arg-type]
    ("mac is '52:54:00:12:34:56': it has to be 6 bytes", lambda _: NetDevice(mac="52:54:00:12:34:56")),  # type: ignore[arg-type]
    ("mac is 6: it has to be 6 bytes", lambda _: NetDevice(mac=6)),  # type: ignore[arg-type]
    ("MTU is '1500': it has to be an integer", lambda _: NetDevice(mtu="1500")),  # type: ignore[arg-type]
    ("MTU is 1500.0: it has to be an integer", lambda _: NetDevice(mtu=1500.0)),  # type: ignore[arg-type]
    ("speed is '1G': it has to be an integer", lambda _: NetDevice(speed="1G")),  # type: ignore[arg-type]
    ("link is 'down': it has to be True or False", lambda _: NetDevice(link="down")),  # type: ignore[arg-type]
    ("link is 'x': it has to be True or False", lambda _: setattr(NetDevice(), "link", "x")),
    ("slots is 'x': it has to be an integer", lambda _: NetDevice(slots="x")),  # type: ignore[arg-type]
    ("slot_size is 'x': it has to be an integer", lambda _: NetDevice(slot_size="x")),  # type: ignore[arg-type]
    ("queue_pairs is '2': it has to be an integer", lambda _: NetDevice(queue_pairs="2")),  # type: ignore[arg-type]
    ("pool is 'x': it has to be a BufferPool", lambda _: NetDevice(pool="x")),  # type: ignore[arg-type]
    ("config is 'x': it has to be bytes", lambda _: NetDevice().change_config("x")),  # type: ignore[arg-type]
    ("pool is 'x': it has to be a BufferPool", lambda _: NetDriver(transport(), pool="x")),  # type: ignore[arg-type]
    ("slots is 'x': it has to be an integer", lambda _: NetDriver(transport(), slots="x")),  # type: ignore[arg-type]
    ("slot_size is 'x': it has to be an integer", lambda _: NetDriver(transport(), slot_size="x")),  # type: ignore[arg-type]
    ("queue_size is 'x': it has to be an integer", lambda _: NetDriver(transport(), queue_size="x")),  # type: ignore[arg-type]
    ("queue_pairs is None: it has to be an integer", lambda x: NetDriver(transport(), queue_pairs=x)),
    ("features is 'CSUM': it has to be bits", lambda _: Features("CSUM")),  # type: ignore[arg-type]
    ("features is 5: it has to be bits", lambda _: Features(5)),  # type: ignore[arg-type]
    ("feature bit is 'CSUM': it has to be an integer", lambda _: Features({"CSUM"})),  # type: ignore[arg-type]
    ("feature mask is 'x': it has to be an integer", lambda _: Features.from_mask("x")),  # type: ignore[arg-type]
    ("Words.features: feature bit is 'x': it has to be an integer", lambda _: Words()),
    ("offered: features is 5: it has to be bits", lambda _: RngDevice(offered=5)),  # type: ignore[arg-type]
    ("required: features is 'x': it has to be bits", lambda _: negotiating(required="x")),
    ("wanted: feature bit is 'x': it has to be an integer", lambda _: negotiating(wanted=["x"])),
    ("wanted: features is None: it has to be bits", lambda x: NetDriver(transport(), wanted=x)),
    ("required: features is 5: it has to be bits", lambda _: NetDriver(transport(), required=5)),  # type: ignore[arg-type]
    ("queue index is None: it has to be an integer", lambda x: NetDriver(transport()).setup_queue(x)),
    ("queue size is 'x': it has to be an integer", lambda _: NetDriver(transport()).setup_queue(0, size="x")),  # type: ignore[arg-type]
    ("queue index is None: it has to be an integer", lambda x: transport().queue_max(x)),
    ("queue index is None: it has to be an integer", lambda x: PciTransport(EmulatedFunction(NetDevice())).queue_max(x)),
    ("status is 'x': it has to be an integer", lambda _: setattr(transport(), "status", "x")),
    ("status is 'x': it has to be an integer", lambda _: setattr(PciTransport(EmulatedFunction(NetDevice())), "status", "x")),
    ("status is None: it has to be an integer", lambda x: NetDevice().write_status(x)),
    ("queue is None: it has to be a DriverQueue", lambda x: NetDriver(transport()).wait_used(x)),
    ("timeout is 'x': it has to be seconds", lambda _: NetDriver(transport()).wait("x")),  # type: ignore[arg-type]
    ("timeout is 'x': it has to be seconds", lambda _: NetDevice().wait("x")),  # type: ignore[arg-type]
    ("interface name is None: it has to be a string", lambda x: Netdev(NetDevice(), x)),
    ("interface name is None: it has to be a string", lambda x: open_tap(x)),
    ("mac is '52:54:00:12:34:56': it has to be 6 bytes", lambda _: Netdev(NetDevice(), mac="52:54:00:12:34:56")),  # type: ignore[arg-type]
    ("MTU is '1500': it has to be an integer", lambda _: Netdev(NetDevice(), mtu="1500")),  # type: ignore[arg-type]
    ("MTU is 1500.5: it has to be an integer", lambda _: Netdev(NetDevice(), mtu=1500.5)),  # type: ignore[arg-type]
    ("address is b'192.0.2.1/24': it has to be strings", lambda _: Netdev(NetDevice(), address=b"192.0.2.1/24")),  # type: ignore[arg-type]
    (r"address\[0\] is 5: it has to be a string", lambda _: Netdev(NetDevice(), address=[5])),  # type: ignore[list-item]
    ("namespace is 'x': it has to be a Namespace", lambda _: Netdev(NetDevice(), namespace="x")),  # type: ignore[arg-type]
    ("one is None: it has to be a Netdev", lambda x: Netdev.pair(x, x)),
    ("path_or_fd is None: it has to be a path", lambda x: Backend(x, NetDevice())),
    ("socket path is b'a.sock': it has to be a string", lambda _: listen(b"a.sock")),  # type: ignore[arg-type]
    ("binary is None: it has to be a string", lambda x: QemuMachine([], binary=x)),
    ("descriptor is None: it has to be an integer", lambda x: RawSplitDriver(Memory(1 << 16), 8).descriptor(x)),
    ("flags is 'x': it has to be an integer", lambda _: RawSplitDriver(Memory(1 << 16), 8).set_descriptor(0, 0, 0, "x")),  # type: ignore[arg-type]
    ("device is None: it has to be something to call", lambda x: Backend("a.sock", x)),
    ("device is 'net': it has to be something to call", lambda _: Backend("a.sock", "net")),  # type: ignore[arg-type]
    ("report is 5: it has to be something to call", lambda _: Backend("a.sock", NetDevice(), report=5)),  # type: ignore[arg-type]
    ("protocol_features is 5: it has to be Features", lambda _: Backend("a.sock", NetDevice(), protocol_features=5)),  # type: ignore[arg-type]
    ("device_id is 'net': it has to be an integer", lambda _: VhostUserTransport("a.sock", "net")),  # type: ignore[arg-type]
    ("queue_size is 2.5: it has to be an integer", lambda _: VhostUserTransport("a.sock", 4, queue_size=2.5)),  # type: ignore[arg-type]
    ("queues is True: it has to be an integer", lambda _: VhostUserTransport("a.sock", 4, queues=True)),
    ("masked: features is 7: it has to be bits", lambda _: VhostUserTransport("a.sock", 4, masked=7)),  # type: ignore[arg-type]
    ("timeout is 'x': it has to be seconds", lambda _: VhostUserTransport("a.sock", 4, timeout="x")),  # type: ignore[arg-type]
    ("connect_timeout is 'x': it has to be seconds", lambda _: VhostUserTransport("a", 4, connect_timeout="x")),  # type: ignore[arg-type]
    ("protocol_features is 5: it", lambda _: VhostUserTransport("a.sock", 4, protocol_features=5)),  # type: ignore[arg-type]
    ("devices is 'virtio-rng-pci': it has to be strings", lambda _: QemuMachine("virtio-rng-pci")),
    ("memory_size is '256M': it has to be an integer", lambda _: QemuMachine([], memory_size="256M")),  # type: ignore[arg-type]
    ("memory is None: it has to be a Memory or a GuestMemory", lambda x: RawSplitDriver(x, 8)),
]
VALUES: list[tuple[str, Call]] = [
    ("mac 00:00:00:00:00:00 is not the address of one station: it is nobody's", lambda _: NetDevice(mac=bytes(6))),
    ("mac 00:00:00:00:00:00 is not the address of one station: it is nobody's", lambda _: Netdev(NetDevice(), mac=bytes(6))),
    ("mac 01:02:03:04:05:06 is not .* a group's", lambda _: NetDevice(mac=bytes(range(1, 7)))),
    ("mac 02:03 is not .* 2 bytes, not 6", lambda _: Netdev(NetDevice(), mac=bytes((2, 3)))),
    ("MTU 67 is outside 68..65535", lambda _: NetDevice(mtu=67)),
    ("slots 0 is outside 1..1048576", lambda _: NetDevice(slots=0)),
    ("slots -1 is outside 1..1048576", lambda _: NetDriver(transport(), slots=-1)),
    ("slot_size 100 is outside 128..131072", lambda _: NetDevice(slot_size=100)),
    ("slot_size 200 is not a multiple of 64", lambda _: NetDevice(slot_size=200)),
    ("queue_size 0 is outside 1..32768", lambda _: NetDriver(transport(), queue_size=0)),
    ("config of 1 bytes is shorter than the ", lambda _: NetDevice().change_config(b"x")),
    ("wanted: feature bit 128 is outside 0..127", lambda _: NetDriver(transport(), wanted=[128])),
    ("timeout nan is no time", lambda _: NetDriver(transport()).wait(float("nan"))),
    ("address '198.51.100.7' has no prefix length", lambda _: Netdev(NetDevice(), address="198.51.100.7")),
    ("address .* has more than one of IPv4", lambda _: Netdev(NetDevice(), address=["198.51.100.1/24", "198.51.100.2/24"])),
    ("namespace -1 is outside", lambda _: Netdev(NetDevice(), namespace=-1)),
    (r"Twice.queues \('q', 'q'\) has a name twice", lambda _: Twice()),
    ("path_or_fd -1 is outside 0..", lambda _: Backend(-1, NetDevice())),
    ("queue_size 0 is outside 1..32768", lambda _: VhostUserTransport("a.sock", 4, queue_size=0)),
    ("queues 257 is outside 1..256", lambda _: VhostUserTransport("a.sock", 4, queues=257)),
    ("a time limit of 0 s is not above 0", lambda _: VhostUserTransport("a.sock", 4, timeout=0)),
    ("connect_timeout nan is no time", lambda _: VhostUserTransport("a.sock", 4, connect_timeout=float("nan"))),
    ("has a NUL in it", lambda _: Backend("a\0b", NetDevice())),
]


@pytest.mark.parametrize(
    ("kind", "message", "call"),
    [(TypeError, *case) for case in TYPES] + [(ValueError, *case) for case in VALUES],
    ids=[message for message, _ in TYPES + VALUES],
)
def test_one_error_at_the_call(kind: type[Exception], message: str, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(kind) as caught:
        call(None)
    assert re.search(message, str(caught.value)), str(caught.value)
    assert type(caught.value) is kind and "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_a_transport_is_free_after_a_refusal() -> None:
    with transport() as carrier:
        wrong: Any
        for wrong in ({"slots": 0}, {"wanted": ["x"]}, {"queue_size": "x"}):
            with pytest.raises((TypeError, ValueError)):
                NetDriver(carrier, **wrong)
        with NetDriver(carrier) as driver:
            assert driver.send_frames([bytes(60)]) == 1


def test_numbers_of_other_libraries_are_numbers() -> None:
    import numpy as np

    assert NetDevice(mtu=np.int64(1500)).mtu == 1500  # type: ignore[arg-type]
    with transport() as carrier, NetDriver(carrier, queue_size=np.uint16(64)) as driver:  # type: ignore[arg-type]
        assert driver.wait(np.float32(0)) is False  # type: ignore[arg-type]
        assert driver.wait(0) is False


def test_a_configuration_that_stays_as_long_is_taken() -> None:
    device = NetDevice()
    config = bytearray(device.config)
    device.change_config(config)
    config[0] ^= 2
    assert isinstance(device.config, bytes) and device.config[0] != config[0]


def test_a_namespace_that_is_closed() -> None:
    namespace = Namespace()
    namespace.close()
    with pytest.raises(StatusError, match="the namespace is closed"):
        Netdev(NetDevice(), namespace=namespace)
    with pytest.raises(NamespaceError, match="namespace 1000000: Bad file descriptor"):
        Netdev(NetDevice(), namespace=1000000)


def test_memory_that_was_refused_is_not_held() -> None:
    memory = Memory(1 << 20)
    with transport() as carrier, pytest.raises(TypeError):
        NetDriver(carrier, memory=memory, slots="x")  # type: ignore[arg-type]
    memory.close()
