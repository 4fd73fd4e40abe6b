"""The network driver over PCI in this process: queues reset under both ports, the platform's addresses, and functions that lie."""

from collections.abc import Callable, Iterator
from itertools import count, repeat
from struct import pack
from typing import Any

import pytest

from virtio import DeviceNeedsReset, FeatureNegotiationError, NetDevice, NetDriver, NetFeature, SpecViolation, StatusError, TransportError
from virtio.devices.net import WANTED
from virtio.devices.net_header import FIELDS
from virtio.driver import DriverState
from virtio.pci.config import Common
from virtio.pci.emulated import EmulatedFunction
from virtio.spec import Feature, Status
from virtio.testing import RawPciFunction
from virtio.transport.pci import PciTransport

FRAMES = [bytes([k]) * length for k, length in enumerate((60, 1, 1514, 700, 64))]


def both_ways(net: NetDriver, device: NetDevice, rounds: int = 3) -> None:
    for _ in range(rounds):
        assert net.send_frames(FRAMES) == 5 and device.receive_frames() == FRAMES
        assert device.send_frames(FRAMES) == 5 and net.receive_frames() == FRAMES


def asks(ring_format: str) -> Any:
    return WANTED - ([Feature.RING_PACKED] if ring_format == "split" else [])


def test_one_queue_is_reset_under_the_ports(ring_format: str) -> None:
    device = NetDevice()
    with PciTransport(EmulatedFunction(device)) as transport, NetDriver(transport, wanted=asks(ring_format)) as net:
        slots = net.pool.available
        for index in (1, 0, 1, 0):
            both_ways(net, device)
            assert net.send_frames(FRAMES) == 5 and device.send_frames(FRAMES) == 5  # under way
            net.reset_queue(index)
            with pytest.raises(StatusError):
                net.receive_frames() if index == 0 else net.send_frames(FRAMES)
            if index == 0:
                assert net.send_frames(FRAMES) == 5, "the other one goes on"
            else:
                assert net.receive_frames() == FRAMES
            assert device.send_frames(FRAMES) == 0 and device.receive_frames() == [], "a device's port needs both"
            queue = net.setup_queue(index)
            assert queue is (net.receiveq, net.transmitq)[index] and queue.size == 256
            left = device.receive_frames()
            assert left == ([] if index == 1 else FRAMES * 2)
            assert net.pool.available + net.transmitq.outstanding == slots
        both_ways(net, device)
        assert net.statistics["sent_frames"] == 5 * 15 + 4 * 5 + 2 * 5
        net.close()
        net.close()


def test_both_queues_are_reset(ring_format: str) -> None:
    device = NetDevice()
    with PciTransport(EmulatedFunction(device)) as transport, NetDriver(transport, wanted=asks(ring_format)) as net:
        for first in (0, 1):
            both_ways(net, device)
            before = net.statistics
            net.reset_queue(0)
            net.reset_queue(1)
            assert net.statistics == before
            net.setup_queue(first)
            net.setup_queue(1 - first, size=16)
            assert (net.receiveq, net.transmitq)[1 - first].size == 16
            both_ways(net, device)
        assert net.statistics["sent_frames"] == 60
        assert net.statistics["notified"] + net.statistics["suppressed"] <= 60 + 60 + 6


def test_restart_after_a_queue_was_reset(ring_format: str) -> None:
    device = NetDevice()
    with PciTransport(EmulatedFunction(device)) as transport, NetDriver(transport, wanted=asks(ring_format)) as net:
        net.reset_queue(0)
        net.restart()
        both_ways(net, device)


def test_a_platform_that_translates_is_accepted_unasked(ring_format: str) -> None:
    offered = asks(ring_format) | {Feature.ACCESS_PLATFORM}
    for carried in (True, False):
        device = NetDevice(offered=offered - {NetFeature.MTU, NetFeature.SPEED_DUPLEX})
        with PciTransport(EmulatedFunction(device, access_platform=carried)) as transport, NetDriver(transport) as net:
            assert (Feature.ACCESS_PLATFORM in net.features) == carried
            both_ways(net, device)


@pytest.fixture
def device() -> NetDevice:
    return NetDevice(mtu=1500, speed=1000)


@pytest.fixture
def raw(device: NetDevice) -> Iterator[RawPciFunction]:
    with EmulatedFunction(device) as function:
        yield RawPciFunction(over=function)


def lie(raw: RawPciFunction, name: str, value: int) -> None:
    """The configuration's field reads so, for ever."""
    offset, size = FIELDS[name]
    assert raw.layout.device is not None
    raw.force(raw.layout.device, offset, value.to_bytes(size, "little"))


@pytest.mark.parametrize("mtu", [0, 1, 67])
def test_an_mtu_that_cannot_be_over_pci(raw: RawPciFunction, mtu: int) -> None:
    lie(raw, "mtu", mtu)
    with PciTransport(raw) as transport, pytest.raises(SpecViolation, match=rf"MTU {mtu} is outside 68..65535 \(5.1.4.1\)"):
        NetDriver(transport)
    assert raw.handler is None


@pytest.mark.parametrize("mtu", [68, 65535])
@pytest.mark.parametrize("mergeable", [True, False])
def test_an_mtu_at_the_limit(raw: RawPciFunction, device: NetDevice, mtu: int, mergeable: bool) -> None:
    lie(raw, "mtu", mtu)
    wanted = WANTED - ([] if mergeable else [NetFeature.MRG_RXBUF])
    with PciTransport(raw) as transport, NetDriver(transport, wanted=wanted) as net:
        assert net.mtu == mtu
        both_ways(net, device)


@pytest.mark.parametrize("mtu", [1500, 65535])
def test_an_mtu_too_long_for_the_devices_own_queue_is_not_accepted(raw: RawPciFunction, device: NetDevice, mtu: int) -> None:
    lie(raw, "mtu", mtu)
    raw.force(raw.layout.common, Common.QUEUE_SIZE.offset, b"\x10\x00")
    with PciTransport(raw) as transport, NetDriver(transport, wanted=WANTED - {NetFeature.MRG_RXBUF}) as net:
        assert (net.receiveq.size, net.mtu, NetFeature.MTU in net.features) == (16, 1500, mtu == 1500)
        both_ways(net, device)


@pytest.mark.parametrize("mtu", [9000, 65535])
def test_an_mtu_for_which_there_are_no_buffers(raw: RawPciFunction, mtu: int) -> None:
    """Without merged buffers, a pool that cannot hold one frame is the caller's to change."""
    lie(raw, "mtu", mtu)
    with PciTransport(raw) as transport, pytest.raises(ValueError, match="slots"):
        NetDriver(transport, wanted={NetFeature.MTU}, slots=4, queue_size=4)


@pytest.mark.parametrize("mac", ["01005e000001", "ffffffffffff", "000000000000"])
def test_an_address_of_a_group_is_refused_or_known(raw: RawPciFunction, device: NetDevice, mac: str) -> None:
    """5.1.4 names an address of one device; a group's, or none, is no reason to go on with it."""
    lie(raw, "mac", int.from_bytes(bytes.fromhex(mac), "little"))
    with PciTransport(raw) as transport:
        if mac == "000000000000":
            with NetDriver(transport) as net:
                both_ways(net, device)
        else:
            with pytest.raises(SpecViolation, match=f"address {bytes.fromhex(mac).hex(':')} is a group's"):
                NetDriver(transport)


@pytest.mark.parametrize("status", [0x8000, 0xFFFE, 0xFFFF, 2, 3])
def test_status_bits_that_nobody_knows_are_ignored(raw: RawPciFunction, device: NetDevice, status: int) -> None:
    lie(raw, "status", status)
    with PciTransport(raw) as transport, NetDriver(transport) as net:
        assert net.link == bool(status & 1)
        both_ways(net, device)


@pytest.mark.parametrize(("field", "value"), [("max_virtqueue_pairs", 0), ("max_virtqueue_pairs", 0xFFFF), ("duplex", 7)])
def test_fields_of_what_was_not_negotiated_do_not_matter(raw: RawPciFunction, device: NetDevice, field: str, value: int) -> None:
    lie(raw, field, value)
    with PciTransport(raw) as transport, NetDriver(transport) as net:
        both_ways(net, device)


@pytest.mark.parametrize(("speed", "known"), [(0, 0), (0x7FFF_FFFF, 0x7FFF_FFFF), (0x8000_0000, None), (0xFFFF_FFFF, None)])
def test_the_speed_has_31_bits(raw: RawPciFunction, speed: int, known: int | None) -> None:
    lie(raw, "speed", speed)
    with PciTransport(raw) as transport, NetDriver(transport) as net:
        assert net.speed == known


def test_a_generation_that_never_stands_still(raw: RawPciFunction) -> None:
    with PciTransport(raw) as transport:
        raw.script(raw.layout.common, Common.CONFIG_GENERATION.offset, (number % 255 for number in count()))
        with pytest.raises(TransportError, match="generation changed during each of 64"):
            NetDriver(transport)


def test_a_generation_that_runs_while_the_link_is_read(raw: RawPciFunction, device: NetDevice) -> None:
    with PciTransport(raw) as transport, NetDriver(transport) as net:
        raw.script(raw.layout.common, Common.CONFIG_GENERATION.offset, (number % 255 for number in range(1000)))
        device.link = False
        with pytest.raises(TransportError, match="generation"):
            net.wait(1)
        assert net.link
        raw.script(raw.layout.common, Common.CONFIG_GENERATION.offset, ())
        net.check()
        assert not net.link and net.link_events() == [False]


@pytest.mark.parametrize("length", [0, 5, 7, 10, 11])
def test_a_configuration_that_is_too_short_for_what_is_offered(raw: RawPciFunction, length: int) -> None:
    """Whatever is offered has its field (5.1.4): one typed error, before anything is live."""
    assert raw.layout.device is not None
    raw.force(None, raw.layout.device.place + 12, pack("<I", length))
    place = raw.layout.common.offset + Common.DEVICE_STATUS.offset
    with PciTransport(raw) as transport, pytest.raises(SpecViolation, match=r"no room for .* \(5.1.4\)"):
        NetDriver(transport)
    assert not [each for each in raw.accesses if each.write and each.offset == place and each.value & Status.DRIVER_OK]


def test_a_queue_that_is_not_there(raw: RawPciFunction) -> None:
    raw.script(raw.layout.common, Common.QUEUE_SIZE.offset, repeat(0))
    with PciTransport(raw) as transport, pytest.raises(ValueError, match="no queue 0"):
        NetDriver(transport)


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize("mergeable", [True, False])
def test_rings_that_are_short(ring_format: str, size: int, mergeable: bool) -> None:
    """Too short for long packets: those are not asked for then. Too short for any frame there is: the caller is told."""

    class Short(NetDevice):
        queue_size = size

    device = Short()
    wanted = asks(ring_format) - ([] if mergeable else [NetFeature.MRG_RXBUF])
    for slot_size in (2048, 256):
        fits = mergeable or slot_size == 2048 or size >= 8
        with PciTransport(EmulatedFunction(device)) as transport:
            if not fits:
                with pytest.raises(ValueError, match="slots"):
                    NetDriver(transport, wanted=wanted, slot_size=slot_size)
                continue
            with NetDriver(transport, wanted=wanted, slot_size=slot_size) as net:
                for _ in range(2 * size):
                    assert net.send_frames([b"one"]) == 1 and device.receive_frames() == [b"one"]
                    assert device.send_frames([b"two"]) == 1 and net.receive_frames() == [b"two"]


@pytest.mark.parametrize("after", [*range(0, 400, 7)])
def test_a_function_that_is_pulled_out_at_any_moment(after: int) -> None:
    device = NetDevice(mtu=1500)
    with EmulatedFunction(device) as function:
        raw = RawPciFunction(over=function)
        raw.remove_after(after)

        def session() -> None:
            with PciTransport(raw) as transport, NetDriver(transport) as net:
                for up in (False, True) * 40:
                    device.link = up
                    net.wait(0)
                    net.check()
                    net.send_frames(FRAMES)
                    net.receive_frames()

        with pytest.raises(TransportError):
            session()


@pytest.mark.parametrize("call", ["wait", "check", "restart"])
def test_needs_reset_in_the_middle(raw: RawPciFunction, device: NetDevice, call: str) -> None:
    calls: dict[str, Callable[[NetDriver], object]] = {
        "wait": lambda net: net.wait(1),
        "check": NetDriver.check,
        "restart": NetDriver.restart,
    }
    with PciTransport(raw) as transport, NetDriver(transport) as net:
        both_ways(net, device)
        device.need_reset()
        if call != "restart":
            with pytest.raises(DeviceNeedsReset):
                calls[call](net)
            assert net.state is DriverState.NEEDS_RESET
        net.restart()
        both_ways(net, device)


def test_a_device_that_never_ends_its_reset_may_be_restarted_later(raw: RawPciFunction, device: NetDevice) -> None:
    with PciTransport(raw) as transport, NetDriver(transport) as net:
        place = raw.layout.common, Common.DEVICE_STATUS.offset
        raw.script(*place, repeat(15))
        with pytest.raises(TransportError, match="status still reads 0xf"):
            net.restart(timeout=0.02)
        with pytest.raises(StatusError):
            net.wait(0)
        raw.script(*place, ())
        net.restart()
        both_ways(net, device)


def test_features_that_are_refused_at_a_restart_may_be_tried_again(raw: RawPciFunction, device: NetDevice) -> None:
    with PciTransport(raw) as transport, NetDriver(transport) as net:
        status = raw.layout.common, Common.DEVICE_STATUS.offset
        raw.script(*status, [0, 0, 3, 3, 3, 3])
        with pytest.raises(FeatureNegotiationError):
            net.restart()
        raw.script(*status, ())
        with pytest.raises(StatusError):
            net.send_frames(FRAMES)
        net.restart()
        both_ways(net, device)
