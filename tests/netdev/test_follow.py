"""An interface goes with its device through resets, moves, and front-ends that vanish: over vhost-user, with a front-end by hand."""

import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.leftovers import all_closed
from tests.netdev.wires import Wire, carrier, frame, number_of
from tests.vhost_user.frontend import GUEST, PROTOCOL, SIZE, USER, Frontend
from tests.vhost_user.guest import Guest, eventually
from virtio import Feature, NetDevice, NetDriver, NetFeature, SpecViolation, StatusError, TransportError
from virtio.devices.net import WANTED
from virtio.features import Features
from virtio.netdev import Namespace, Netdev
from virtio.transport.loopback import LoopbackTransport
from virtio.vhost_user import message as wire_format
from virtio.vhost_user.backend import Backend
from virtio.vhost_user.message import FrontendRequest as F
from virtio.vhost_user.message import ProtocolFeature, Region

NEEDS_RESET = 0x40


@pytest.fixture
def errors() -> list[Exception]:
    return []


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    with Namespace() as made:
        with made.entered():
            Path("/proc/sys/net/ipv6/conf/default/disable_ipv6").write_text("1")
        yield made


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "s")


@pytest.fixture
def device(request: pytest.FixtureRequest) -> NetDevice:
    return NetDevice(**getattr(request, "param", {}))


@pytest.fixture
def tap(device: NetDevice, namespace: Namespace, errors: list[Exception]) -> Iterator[Netdev]:
    """Follows its device, and leaves nothing."""
    with all_closed(), Netdev(device, "tap0", namespace=namespace) as made:
        made.follow(errors.append)
        yield made


@pytest.fixture
def backend(path: str, device: NetDevice, tap: Netdev, errors: list[Exception]) -> Iterator[Backend]:
    with Backend(path, device, report=errors.append) as made:
        yield made


@pytest.fixture
def frontend(backend: Backend, path: str) -> Iterator[Frontend]:
    with Frontend.at(path, backend) as made:
        yield made


@pytest.fixture
def wire(namespace: Namespace, tap: Netdev) -> Iterator[Wire]:
    with Wire(namespace, "tap0") as made:
        yield made


def test_frames_pass_and_none_is_lost_while_queues_are_taken_off_and_put_on(
    frontend: Frontend, tap: Netdev, wire: Wire, ring_features: Features, errors: list[Exception]
) -> None:
    guest = Guest(frontend, ring_features)
    guest.start()
    wire.ready()
    sent: list[int] = []
    for turn in range(40):
        for number in range(turn * 8, turn * 8 + 8):
            guest.send(number)
            wire.send(number)
            sent.append(number)
        match turn % 4:
            case 0:  # while frames are on their way both ways
                for queue in (guest.receiveq, guest.transmitq):
                    frontend.start(queue, base=frontend.stop(queue.index))
            case 1:
                frontend.map([Region(GUEST, SIZE, USER, 0)])
            case 2:
                frontend.start(guest.transmitq, base=frontend.stop(1))
            case _:
                pass
        guest.receive()
    assert wire.receive(len(sent)) == sent
    guest.expect(sent)
    assert tap.running and tap.carrier
    assert not errors


def test_a_front_end_vanishes_and_another_comes(
    backend: Backend, path: str, tap: Netdev, wire: Wire, namespace: Namespace, ring_features: Features, errors: list[Exception]
) -> None:
    assert not tap.carrier
    for _ in range(3):
        with Frontend.at(path, backend) as frontend:
            guest = Guest(frontend, ring_features)
            guest.start()
            wire.ready()
            for number in range(20):
                guest.send(number)
                wire.send(number)
            assert wire.receive(20) == list(range(20))
            guest.expect(list(range(20)))
        backend.process(1.0)
        assert not backend.connections and not tap.running
        eventually(lambda: not carrier(namespace, "tap0"))
        assert not tap.wait(0)
    assert not errors


PAIRS = 6


def pumps() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "virtio-pump"}


@pytest.mark.parametrize("device", [pytest.param({"queue_pairs": PAIRS}, id="")], indirect=True)
def test_pumps_of_other_pairs_go_on_while_pairs_come_and_go(
    frontend: Frontend, tap: Netdev, ring_features: Features, errors: list[Exception]
) -> None:
    frontend.negotiate(ring_features | {NetFeature.MQ})
    queues = [frontend.queue(index) for index in range(2 * PAIRS)]
    before = set[threading.Thread]()
    for pair in range(PAIRS):
        for queue in queues[2 * pair : 2 * pair + 2]:
            frontend.start(queue)
        assert before < pumps() and len(pumps()) == 2 * pair + 2
        before = pumps()
    for pair in (2, 0, 5):
        stay = pumps()
        bases = [frontend.stop(index) for index in (2 * pair, 2 * pair + 1)]
        assert pumps() < stay and len(pumps()) == 2 * PAIRS - 2
        stay = pumps()
        for queue, base in zip(queues[2 * pair : 2 * pair + 2], bases, strict=True):
            frontend.start(queue, base=base)
        assert stay < pumps() and len(pumps()) == 2 * PAIRS
    for number, index in enumerate(range(1, 2 * PAIRS, 2)):  # each still sends
        place = frontend.room(80, bytes(12) + frame(number))
        queues[index].add(index, readable=[place])
        queues[index].publish()
        eventually(lambda index=index: queues[index].pop_used() == [(index, 0)])  # type: ignore[misc]
    for index in range(2 * PAIRS):
        frontend.stop(index)
    assert not tap.running and not pumps()
    assert not errors


def test_only_pairs_out_of_use_are_left_and_the_interface_waits(namespace: Namespace, ring_features: Features) -> None:
    device, errors = NetDevice(queue_pairs=2), list[Exception]()
    with LoopbackTransport(device) as transport, Netdev(device, "tap0", namespace=namespace) as tap:
        tap.follow(errors.append)
        with NetDriver(
            transport, queue_pairs=2, wanted=WANTED - ([] if Feature.RING_PACKED in ring_features else [Feature.RING_PACKED])
        ) as net:
            net.use_pairs(1)
            stay = pumps()
            net.reset_queue(0)
            assert not tap.running and not pumps()
            net.setup_queue(0)
            assert tap.running and len(pumps()) == len(stay)
            with Wire(namespace, "tap0") as wire:
                assert net.send_frames([frame(5)]) == 1
                assert wire.receive(1) == [5]
    assert not errors


def test_a_short_pause_does_not_show_at_the_carrier(frontend: Frontend, tap: Netdev, namespace: Namespace, ring_features: Features) -> None:
    guest = Guest(frontend, ring_features)
    guest.start()
    eventually(lambda: carrier(namespace, "tap0"))
    base = frontend.stop(0)
    assert not tap.running and tap.carrier and carrier(namespace, "tap0")
    frontend.start(guest.receiveq, base=base)
    assert tap.running and tap.carrier and carrier(namespace, "tap0")


def test_a_hostile_driver_breaks_the_queue_once_and_the_interface_waits_for_a_reset(
    frontend: Frontend, tap: Netdev, wire: Wire, ring_features: Features, errors: list[Exception]
) -> None:
    guest = Guest(frontend, ring_features)
    guest.start()
    guest.break_a_rule()
    assert frontend.errors[1].wait(60)
    status = frontend.ask(F.GET_STATUS)
    assert status is not None and status.payload.value & NEEDS_RESET
    eventually(lambda: not tap.running)
    assert [isinstance(error, SpecViolation) for error in errors] == [True]
    assert frontend.errors[1].drain() and not frontend.errors[0].drain()
    errors.clear()
    wire.send(1)  # goes nowhere, or to the next driver
    frontend.ask(F.RESET_DEVICE)
    again = Guest(frontend, ring_features)
    again.start()
    again.send(7)
    assert wire.receive(1) == [7]
    assert tap.running and not frontend.errors[1].drain()
    assert not errors


def test_a_mistake_is_told_though_its_queue_is_taken_off_while_another_is_told(
    path: str, namespace: Namespace, ring_features: Features
) -> None:
    device, told, go_on = NetDevice(), list[Exception](), threading.Event()

    def report(error: Exception) -> None:
        told.append(error)
        assert go_on.wait(60)

    with Netdev(device, "tap0", namespace=namespace) as tap, Backend(path, device) as backend, Frontend.at(path, backend) as frontend:
        tap.follow(report)
        for again in (False, True):
            if again:
                frontend.ask(F.RESET_DEVICE)
            guest = Guest(frontend, ring_features)
            guest.start()
            guest.break_a_rule()
            transmitq = device.queue(1)
            assert transmitq is not None
            eventually(lambda queue=transmitq: queue.broken is not None)  # type: ignore[misc]
            eventually(lambda: len(told) == 1)
        frontend.stop(0)  # and the pumps are gone, before anybody has seen why one of them ended
        assert not tap.running
        go_on.set()
        assert frontend.errors[1].wait(60)
        status = frontend.ask(F.GET_STATUS)
        assert status is not None and status.payload.value & NEEDS_RESET
        eventually(lambda: len(told) == 2)
        assert all(isinstance(error, SpecViolation) for error in told) and told[0] is not told[1]


@pytest.mark.parametrize("kind", ["stream", "datagrams", "the read end of a pipe"])
def test_device_23_a_descriptor_that_takes_no_signal_tells_nobody_and_frames_go_on(
    frontend: Frontend, tap: Netdev, wire: Wire, ring_features: Features, errors: list[Exception], kind: str
) -> None:
    guest = Guest(frontend, ring_features)
    guest.start()
    read_end, write_end = os.pipe()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM if kind == "stream" else socket.SOCK_DGRAM) as nobody:
        call = read_end if kind.startswith("the") else nobody.fileno()
        for index in (0, 1):
            assert not frontend.refused(F.SET_VRING_CALL, wire_format.U64(index), [call])
    for number in range(5):
        guest.send(number)
        wire.ready().send(number)
    assert wire.receive(5) == list(range(5))
    guest.expect(list(range(5)))
    assert tap.running and not errors
    for end in (read_end, write_end):
        os.close(end)


def test_device_23_kicks_that_are_as_many_as_can_be_end_nothing(
    frontend: Frontend, tap: Netdev, wire: Wire, ring_features: Features, errors: list[Exception]
) -> None:
    """The kernel calls that an error of the descriptor."""
    guest = Guest(frontend, ring_features)
    guest.start()
    for number in range(5):
        base = frontend.stop(0)
        frontend.kicks[0].drain()
        os.eventfd_write(frontend.kicks[0].fileno(), (1 << 64) - 2)
        frontend.kicks[0].signal()  # as the kernel does, which counts one further
        frontend.start(guest.receiveq, base=base)
        wire.ready().send(number)
        guest.expect([number])
    assert tap.running and not errors


def test_a_reset_begins_anew(frontend: Frontend, tap: Netdev, wire: Wire, ring_features: Features, errors: list[Exception]) -> None:
    for life in range(5):
        guest = Guest(frontend, ring_features)
        guest.start()
        guest.send(life)
        assert wire.receive(1) == [life]
        frontend.ask(F.RESET_DEVICE)
        assert not tap.running
    assert not errors


@pytest.mark.parametrize("driven", [True, False])
def test_an_interface_that_is_deleted_ends_with_or_without_a_driver(
    frontend: Frontend, tap: Netdev, namespace: Namespace, ring_features: Features, driven: bool
) -> None:
    if driven:
        Guest(frontend, ring_features).start()
    assert tap.running is driven
    with namespace.entered():
        subprocess.run(["ip", "link", "delete", "tap0"], check=True)
    with pytest.raises(TransportError, match="the TAP is gone"):
        tap.wait(60)
    assert not tap.running


def test_it_is_stopped_and_follows_again(frontend: Frontend, tap: Netdev, wire: Wire, ring_features: Features) -> None:
    guest = Guest(frontend, ring_features)
    guest.start()
    for number in range(5):
        with pytest.raises(StatusError, match="runs already"):
            tap.follow()
        with pytest.raises(StatusError, match="runs already"):
            tap.start()
        tap.stop()
        assert tap.wait(0) and not tap.running
        guest.send(number)
        tap.follow()  # the port is live already
        assert tap.running
        assert wire.receive(1) == [number]


def test_only_a_devices_end_can_be_followed(namespace: Namespace) -> None:
    with LoopbackTransport(NetDevice()) as transport, NetDriver(transport) as driver, Netdev(driver, "tap0", namespace=namespace) as vn0:
        with pytest.raises(TypeError, match="NetDriver is no device's end"):
            vn0.follow()
        vn0.start()


def test_in_this_process_it_follows_a_driver_that_restarts(namespace: Namespace, ring_features: Features) -> None:
    device = NetDevice()
    with LoopbackTransport(device) as transport, Netdev(device, "tap0", namespace=namespace) as tap:
        tap.follow()
        assert not tap.running
        with Wire(namespace, "tap0") as wire, NetDriver(transport, wanted=ring_features) as driver:
            for number in range(5):
                assert driver.send_frames([frame(number)]) == 1
                assert wire.receive(1) == [number]
                wire.ready().send(number)
                found: list[bytes] = []
                while not found:
                    assert driver.wait(60)
                    found = driver.receive_frames()
                assert [number_of(each) for each in found] == [number]
                driver.restart()
            device.need_reset()
            assert not tap.running
            driver.restart()
            assert tap.running


def test_devices_that_change_while_others_stop_and_follow_block_nobody(path: str, namespace: Namespace, ring_features: Features) -> None:
    errors: list[Exception] = []
    over = threading.Event()

    def toggle(tap: Netdev) -> None:
        while not over.is_set():
            tap.stop()
            tap.follow(errors.append)

    device = NetDevice()
    with ExitStack() as stack:
        tap = stack.enter_context(Netdev(device, "tap0", namespace=namespace))
        tap.follow(errors.append)
        backend = stack.enter_context(Backend(path, device, report=errors.append))
        frontend = stack.enter_context(Frontend.at(path, backend))
        guest = Guest(frontend, ring_features)
        guest.start()
        threads = [
            threading.Thread(target=toggle, args=(tap,)),
            threading.Thread(target=lambda: [device.check_queues() for _ in range(2000)]),
        ]
        for thread in threads:
            thread.start()
        for turn in range(60):
            if turn % 10 == 9:  # a rule is broken, noticed by the pumps if they run
                guest.break_a_rule()
                time.sleep(0.01)
                frontend.ask(F.RESET_DEVICE)
                guest = Guest(frontend, ring_features)
                guest.start()
                continue
            for queue in (guest.receiveq, guest.transmitq):
                frontend.start(queue, base=frontend.stop(queue.index))
        over.set()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
    assert [error for error in errors if not isinstance(error, SpecViolation)] == []


def test_a_machine_that_moved_here_is_announced(
    path: str, device: NetDevice, tap: Netdev, namespace: Namespace, errors: list[Exception], ring_features: Features
) -> None:
    """SEND_RARP after a migration of a guest that cannot say so itself: the request of RFC 903 comes out of the interface."""
    mac = bytes.fromhex("5254000a0b0c")
    with Backend(path, device, report=errors.append) as backend, Frontend.at(path, backend) as frontend:
        frontend.negotiate(ring_features, PROTOCOL | {ProtocolFeature.RARP})
        for index in range(2):
            frontend.start(frontend.queue(index))
        eventually(lambda: carrier(namespace, "tap0"))
        with namespace.entered():
            wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x8035))
            wire.bind(("tap0", 0x8035))
        wire.settimeout(60.0)
        frontend.ask(F.SEND_RARP, wire_format.U64(int.from_bytes(mac, "little")))
        assert wire.recv(2048) == (b"\xff" * 6 + mac + bytes.fromhex("8035 0001 0800 06 04 0003") + 2 * (mac + bytes(4))).ljust(60, b"\0")
        wire.close()
    assert not errors
    tap.stop()
    assert device.on_rarp is None
