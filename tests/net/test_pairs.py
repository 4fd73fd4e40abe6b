"""Several queue pairs at both ends: who sees which frame, the turn of each, flows that keep their pair, and what is refused."""

import asyncio
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from tests.net.flows import udp
from tests.readable import readable
from tests.transports import KINDS, over
from virtio import (
    Burst,
    DeviceQueue,
    Feature,
    Features,
    NetDevice,
    NetDriver,
    NetFeature,
    Port,
    SpecViolation,
    StatusError,
    TransportError,
)
from virtio._core import PortGroup
from virtio.devices.net import WANTED
from virtio.devices.net_control import ControlClass
from virtio.devices.net_header import FIELDS
from virtio.pci.emulated import EmulatedFunction
from virtio.testing import RawPciFunction
from virtio.transport.loopback import LoopbackTransport
from virtio.transport.pci import PciTransport

FLOWS = range(64)


def asks(ring_format: str) -> Features:
    return WANTED - ([Feature.RING_PACKED] if ring_format == "split" else [])


def all_frames(port: Port) -> list[bytes]:
    """Those of all pairs: each call gives those of one."""
    found: list[bytes] = []
    while some := port.receive_frames():
        found += some
    return found


def by_pair(end: NetDriver | NetDevice, way: str = "received") -> list[int]:
    pairs = end.queue_pairs
    return [end.pair(number).statistics.get(f"{way}_frames", 0) for number in range(pairs)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("ours", "theirs"), [(1, 1), (1, 4), (4, 1), (2, 4), (4, 2), (3, 3)])
def test_as_many_pairs_are_used_as_both_ends_have(ring_format: str, kind: str, ours: int, theirs: int) -> None:
    device = NetDevice(queue_pairs=theirs)
    assert (NetFeature.MQ in device.offered) == (NetFeature.CTRL_VQ in device.offered) == (theirs > 1)
    with over(kind, device) as transport, NetDriver(transport, queue_pairs=ours, wanted=asks(ring_format)) as net:
        pairs = min(ours, theirs)
        assert net.queue_pairs == net.active_pairs == device.active_pairs == pairs
        assert (NetFeature.MQ in net.features) == (NetFeature.CTRL_VQ in net.features) == (ours > 1 and theirs > 1)
        assert net.pair(pairs - 1).receiveq.ring_format == ring_format
        for number in range(4):  # more than once round none of the rings
            there, back = ([udp(flow, back=way, number=number) for flow in FLOWS] for way in (False, True))
            assert net.send_frames(there) == 64 and sorted(all_frames(device)) == sorted(there)
            assert device.send_frames(back) == 64 and sorted(all_frames(net)) == sorted(back)
        assert by_pair(net) == by_pair(net, "sent") == by_pair(device)[:pairs] == by_pair(device, "sent")[:pairs], "one pair, both ways"
        assert sum(by_pair(net)[:pairs]) == 256 and all(by_pair(net)[:pairs])
        assert net.statistics["received_frames"] == device.statistics["received_frames"] == 256


@pytest.mark.parametrize("kind", KINDS)
def test_a_flow_comes_back_on_the_pair_that_the_driver_chose(ring_format: str, kind: str) -> None:
    device = NetDevice(queue_pairs=4)
    with over(kind, device) as transport, NetDriver(transport, queue_pairs=4, wanted=asks(ring_format)) as net:
        for by_burst in (False, True):
            burst = device.pool.burst(64)
            for flow in FLOWS:
                assert net.pair(flow % 4).send_frames([udp(flow)]) == 1
            for _ in range(4):
                assert device.receive(burst) == 16 if by_burst else len(device.receive_frames()) == 16
            assert device.send_frames([udp(flow, back=True) for flow in FLOWS]) == 64
            for number in range(4):
                assert net.pair(number).receive_frames() == [udp(flow, back=True) for flow in FLOWS if flow % 4 == number]


def test_a_burst_is_dealt_to_the_pairs_and_what_does_not_fit_stays(ring_format: str) -> None:
    device = NetDevice(queue_pairs=2)
    with LoopbackTransport(device) as transport, NetDriver(transport, queue_pairs=2, queue_size=16, wanted=asks(ring_format)) as net:
        frames = [udp(flow) for flow in FLOWS]
        burst = net.pool.burst(64)
        assert net.take(burst) == 64
        for row, each in enumerate(frames):
            net.pool.frames[burst.slots[row], :60] = list(each)
        burst.lengths[:] = 60
        assert net.send(burst) == 32 and burst.count == 32 and by_pair(net, "sent") == [16, 16]
        left = {burst.tobytes(row) for row in range(32)}
        seen = all_frames(device)
        assert left == set(frames) - set(seen) and len(seen) == 32
        while burst.count:
            assert net.send(burst)
            seen += all_frames(device)
        assert sorted(seen) == sorted(frames)
        assert net.pool.drops == 0
        burst.count = 0
        net.take(burst)
        del burst
        pairs = [net.pair(number) for number in range(2)]
        assert net.pool.available == net.pool.slots - sum(pair.receiveq.outstanding + pair.transmitq.outstanding for pair in pairs)


def test_a_packet_of_several_rows_stays_whole(ring_format: str) -> None:
    device = NetDevice(queue_pairs=3, slot_size=256)
    with LoopbackTransport(device) as transport, NetDriver(transport, queue_pairs=3, slot_size=256, wanted=asks(ring_format)) as net:
        frames = [udp(flow, length=700 + flow) for flow in range(20)]
        assert net.send_frames(frames) == 20
        burst, seen = device.pool.burst(64), 0
        while packets := device.receive(burst):
            assert burst.count == 4 * packets
            seen += device.send(burst)
        assert seen == 20 and sorted(all_frames(net)) == sorted(frames)


def test_every_pair_has_its_turn(ring_format: str) -> None:
    device = NetDevice(queue_pairs=4)
    with LoopbackTransport(device) as transport, NetDriver(transport, queue_pairs=4, wanted=asks(ring_format)) as net:
        burst = device.pool.burst(8)
        for number in range(4):
            assert net.pair(number).send_frames([udp(number, number=each) for each in range(24)]) == 24
        ports = []
        while device.receive(burst) == 8:
            assert net.pair(0).send_frames([udp(0)]) == 1, "the busiest keeps nobody waiting"
            ports.append(burst.tobytes(0)[35])
        assert ports[:12] == [0, 1, 2, 3] * 3 and not any(ports[12:])
        for number in range(4):
            assert device.pair(number).send_frames([udp(number, back=True)] * 3) == 3
        assert [len({frame[37] for frame in net.receive_frames(3)}) for _ in range(4)] == [1] * 4 and net.receive_frames() == []


def test_fewer_pairs_and_more_again(ring_format: str) -> None:
    device = NetDevice(queue_pairs=4)
    with LoopbackTransport(device) as transport, NetDriver(transport, queue_pairs=4, wanted=asks(ring_format)) as net:
        back = [udp(flow, back=True) for flow in FLOWS]
        for pairs in (2, 1, 3, 4, 1):
            assert net.pair(3).send_frames([udp(0)]) == (net.active_pairs == 4)
            assert device.send_frames(back) == 64  # under way when the number changes
            net.use_pairs(pairs)
            assert net.active_pairs == device.active_pairs == pairs
            assert sorted(all_frames(net)) == sorted(back)
            all_frames(device)
            before = by_pair(net), by_pair(device)
            assert device.send_frames(back) == 64 and net.send_frames([udp(flow) for flow in FLOWS]) == 64
            assert len(all_frames(net)) == len(all_frames(device)) == 64
            for old, new in zip(before, (by_pair(net), by_pair(device)), strict=True):
                grown = [after - was for was, after in zip(old, new, strict=True)]
                assert all(grown[:pairs]) and not any(grown[pairs:])
            if pairs < 4:
                assert device.pair(pairs).send_frames(back) == net.pair(pairs).send_frames(back) == 0
        net.restart()
        assert net.active_pairs == device.active_pairs == 4
        with pytest.raises(ValueError, match="5 queue pairs are not from 1 to 4, which are set up"):
            net.use_pairs(5)


@pytest.mark.parametrize("kind", KINDS)
def test_resets_of_a_queue_and_of_all(ring_format: str, kind: str) -> None:
    device = NetDevice(queue_pairs=3)
    with over(kind, device) as transport, NetDriver(transport, queue_pairs=3, wanted=asks(ring_format)) as net:
        slots = net.pool.available
        back = [udp(flow, back=True) for flow in FLOWS]
        for index in (2, 5, 0, 3):
            pair = index // 2
            net.reset_queue(index)
            assert device.pair(pair).send_frames(back) == 0 and device.pair(pair).receive_frames() == []
            assert device.send_frames(back) == 64, "by the others"
            queue = net.setup_queue(index)
            assert queue is (net.pair(pair).transmitq if index % 2 else net.pair(pair).receiveq)
            assert sorted(all_frames(net)) == sorted(back)
            assert device.send_frames(back) == 64 and sorted(all_frames(net)) == sorted(back)
        total = net.statistics
        assert total["received_frames"] == 64 * 8 == sum(by_pair(net))
        net.reset_queue(6)
        control = net.setup_queue(6)
        assert control.index == 6
        net.use_pairs(2)
        net.restart()
        net.use_pairs(3)
        assert net.pool.available == slots
        assert net.statistics["received_frames"] == total["received_frames"]
        net.close()
        with pytest.raises(StatusError):
            net.pair(1).receive_frames()
        assert device.pair(1).receive_frames() == [] and device.active_pairs == 1
        assert net.pair(1).statistics["received_frames"] > 0


class Served(NetDevice):
    """Answers in its handler."""

    def on_frames(self, burst: Burst) -> None:
        self.send(burst)


def test_a_served_device_answers_each_pair_on_itself(ring_format: str) -> None:
    device = Served(queue_pairs=4)
    with LoopbackTransport(device) as transport, NetDriver(transport, queue_pairs=4, wanted=asks(ring_format)) as net:
        for number in range(4):
            frames = [udp(flow) for flow in range(number * 16, number * 16 + 16)]
            assert net.pair(number).send_frames(frames) == 16
            assert net.pair(number).wait(60)
            assert net.pair(number).receive_frames() == frames
        assert by_pair(device) == by_pair(device, "sent") == [16] * 4


def serve_pair(device: NetDevice, number: int, stop: threading.Event, errors: list[BaseException]) -> None:
    try:
        pair = device.pair(number)
        burst = pair.pool.burst(16)
        while not stop.is_set():
            if pair.receive(burst):
                assert pair.send(burst) == 0 or burst.count == 0
            else:
                pair.wait(0.05)
    except BaseException as error:
        errors.append(error)


def test_a_thread_for_each_pair(ring_format: str) -> None:
    device, stop, errors = NetDevice(queue_pairs=4), threading.Event(), list[BaseException]()
    with LoopbackTransport(device) as transport, NetDriver(transport, queue_pairs=4, wanted=asks(ring_format)) as net:
        threads = [threading.Thread(target=serve_pair, args=(device, number, stop, errors)) for number in range(4)]
        for thread in threads:
            thread.start()
        try:
            for step in range(50):
                for number in range(4):
                    assert net.pair(number).send_frames([udp(number, number=step)] * 8) == 8
                for number in range(4):
                    found: list[bytes] = []
                    while len(found) < 8:
                        found += net.pair(number).receive_frames(8 - len(found))
                        assert len(found) == 8 or net.pair(number).wait(60.0)
                    assert found == [udp(number, number=step)] * 8
        finally:
            stop.set()
            for thread in threads:
                thread.join()
    assert not errors


def test_descriptors_of_pairs_and_of_all_become_readable(ring_format: str) -> None:
    device = NetDevice(queue_pairs=2)
    with LoopbackTransport(device) as transport:
        before = device.pair(1).fileno()
        with NetDriver(transport, queue_pairs=2, wanted=asks(ring_format)) as net:
            for end, far in ((device, net), (net, device)):
                assert end.pair(1).fileno() == (before if end is device else end.pair(1).fileno())
                for port in (end, end.pair(0), end.pair(1)):
                    port.fileno()
                    port.wait(0)
                    while port.wait(0):
                        port.receive_frames()
                assert not any([end.arm(), end.pair(0).arm(), end.pair(1).arm()])
                assert not readable(end.pair(1).fileno()) and not readable(end.fileno())
                assert far.pair(1).send_frames([udp(1)]) == 1
                assert readable(end.pair(1).fileno()) and readable(end.fileno()) and not readable(end.pair(0).fileno())
                assert end.wait(60) and end.receive_frames() == [udp(1)]
                assert not end.pair(1).wait(0) or end.pair(1).receive_frames() == []


async def first_of(pair: Any, send: Callable[[], int]) -> bytes:
    asyncio.get_running_loop().call_later(0.01, send)
    async for burst in pair:
        return bytes(burst.tobytes(0))
    raise AssertionError


def test_asynchronous_iteration_over_all_pairs_and_over_one() -> None:
    device = NetDevice(queue_pairs=2)
    with LoopbackTransport(device) as transport, NetDriver(transport, queue_pairs=2) as net:
        for near, far in ((net, device), (device, net)):
            for port in (near, near.pair(1)):
                assert isinstance(port, Port)
                assert asyncio.run(first_of(port, partial(far.pair(1).send_frames, [udp(7)]))) == udp(7)


def lie(raw: RawPciFunction, value: int) -> None:
    offset, size = FIELDS["max_virtqueue_pairs"]
    assert raw.layout.device is not None
    raw.force(raw.layout.device, offset, value.to_bytes(size, "little"))


@pytest.mark.parametrize("pairs", [0, 0x8001, 0xFFFF, 3, 0x8000])
def test_driver_07_pairs_that_cannot_be(pairs: int) -> None:
    with EmulatedFunction(NetDevice(queue_pairs=2)) as function:
        raw = RawPciFunction(over=function)
        lie(raw, pairs)
        with PciTransport(raw) as transport, pytest.raises(SpecViolation, match=rf"max_virtqueue_pairs (is )?{pairs}\b") as caught:
            NetDriver(transport, queue_pairs=2)
        assert caught.value.section.startswith("5.1.4")


def test_driver_07_fewer_pairs_than_there_are_queues() -> None:
    """A device may have more queues than it names; where the control queue is follows from the name."""
    with EmulatedFunction(NetDevice(queue_pairs=2)) as function:
        raw = RawPciFunction(over=function)
        lie(raw, 1)
        with PciTransport(raw) as transport, pytest.raises(TransportError, match="no answer to control command"):
            driver = NetDriver(transport, queue_pairs=2)
            driver.command(ControlClass.RX, 0, b"\1", timeout=0.2)


class Lying(NetDevice):
    """Acknowledges with whatever it is told to; None: not at all."""

    ack: bytes | None = b""

    def on_controlq(self, queue: DeviceQueue) -> None:
        if self.ack is None:
            return
        for chain in queue.pop():
            queue.complete(chain, chain.write(self.ack))
        queue.publish()


@pytest.mark.parametrize(
    ("ack", "kind", "text"),
    [
        (b"\1", TransportError, "VQ_PAIRS_SET 2 with ERR"),
        (b"\2", SpecViolation, "acknowledged by 0x2, neither OK nor ERR"),
        (b"", SpecViolation, "acknowledged by 0xff, neither OK nor ERR"),
    ],
)
def test_a_device_that_does_not_do_what_it_names(ring_format: str, ack: bytes, kind: type[Exception], text: str) -> None:
    device = Lying(queue_pairs=2)
    device.ack = ack
    with LoopbackTransport(device) as transport:
        with pytest.raises(kind, match=text):
            NetDriver(transport, queue_pairs=2, wanted=asks(ring_format))
        assert device.status == 0, "the driver has let go of it"
        with NetDriver(transport, wanted=asks(ring_format)) as net:
            assert net.send_frames([udp(1)]) == 1 and device.receive_frames() == [udp(1)]


def test_a_device_that_does_not_answer(ring_format: str) -> None:
    device = Lying(queue_pairs=2)
    device.ack = b"\0"
    with LoopbackTransport(device) as transport, NetDriver(transport, queue_pairs=2, wanted=asks(ring_format)) as net:
        device.ack = None
        with pytest.raises(TransportError, match=r"no answer to control command 4, 0 within 0\.05 s"):
            net.command(ControlClass.MQ, 0, b"\1\0", timeout=0.05)
        with pytest.raises(TransportError, match=r"no answer to an earlier control command within 0\.05 s"):
            net.command(ControlClass.MQ, 0, b"\1\0", timeout=0.05)
        assert net.send_frames([udp(1)]) == 1 and device.receive_frames() == [udp(1)]
        device.ack = b"\0"
        assert net.command(ControlClass.MQ, 0, b"\1\0")


def test_what_a_caller_may_not_ask() -> None:
    for pairs in (0, -1, 32768):
        with pytest.raises(ValueError, match=rf"queue_pairs {pairs} is outside 1..32767"):
            NetDevice(queue_pairs=pairs)
    with pytest.raises(ValueError, match="2 queue pairs without MQ"):
        NetDevice(queue_pairs=2, offered=NetDevice.features)
    with pytest.raises(ValueError, match="requires"):
        NetDevice(queue_pairs=2, offered={NetFeature.MQ})
    device = NetDevice(queue_pairs=2)
    with LoopbackTransport(device) as transport:
        for pairs in (0, 32769):
            with pytest.raises(ValueError, match=rf"queue_pairs {pairs} is outside 1..32768"):
                NetDriver(transport, queue_pairs=pairs)
        with NetDriver(transport, queue_pairs=2) as net:
            for end in (net, device):
                for number in (-1, 2):
                    with pytest.raises(ValueError, match=rf"queue pair {number} is outside 0..1"):
                        end.pair(number)
            for numbers in ((256, 0), (0, -1)):
                with pytest.raises(ValueError, match=r"outside 0\.\.255"):
                    net.command(*numbers)
            with pytest.raises(ValueError, match="4097 bytes: at most 4096"):
                net.command(1, 0, bytes(4097))
            burst = net.pool.burst(4)
            net.take(burst)
            burst.lengths[:] = 60
            burst.slots[2] = burst.slots[1]
            with pytest.raises(ValueError, match="row 2"):
                net.send(burst)
            assert net.statistics["sent_frames"] == 0
            foreign = device.pool.burst(4)
            device.pool.take(foreign)
            foreign.lengths[:] = 60
            for flow in range(4):
                device.pool.frames[foreign.slots[flow], :60] = list(udp(flow * 5))
            with pytest.raises(ValueError, match="not of the port's pool"):
                net.send(foreign)
            assert foreign.count == 4 and {foreign.tobytes(row) for row in range(4)} == {udp(flow * 5) for flow in range(4)}
    with LoopbackTransport(NetDevice()) as transport, NetDriver(transport) as net, pytest.raises(StatusError, match="no control queue"):
        net.command(0, 0)
    for ports in ((), (1,)):
        with pytest.raises((ValueError, TypeError)):
            PortGroup(ports)  # type: ignore[arg-type]


def test_one_pair_may_have_a_control_queue_by_choice(ring_format: str) -> None:
    offered = NetDevice.features | {NetFeature.CTRL_VQ, Feature.RING_PACKED}
    device = NetDevice(offered=offered - {NetFeature.MTU, NetFeature.SPEED_DUPLEX})
    assert device.queues == ("receiveq1", "transmitq1", "controlq")
    with LoopbackTransport(device) as transport, NetDriver(transport, wanted=asks(ring_format) | {NetFeature.CTRL_VQ}) as net:
        assert not net.command(ControlClass.MQ, 0, b"\1\0") and not net.command(ControlClass.RX, 0, b"\1")
        assert net.send_frames([udp(1)]) == 1 and device.receive_frames() == [udp(1)]
