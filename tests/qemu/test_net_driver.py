"""Our network driver on QEMU's virtio-net-pci: every feature of the rings, sizes, interrupts, link, resets, and options of the card."""

import os
import select
import signal
import threading
from socket import AF_UNIX, SOCK_DGRAM, socketpair
from time import monotonic

import numpy as np
import pytest

from tests.qemu.cards import ADDRESS, CARD, PATIENCE, both_ways, driven, frame, receive, send, wanted
from tests.qemu.conftest import How, Machines, at
from virtio import Burst, DeviceNeedsReset, FeatureNegotiationError, NetDriver, NetFeature, SpecViolation, StatusError, TransportError
from virtio.spec import Feature
from virtio.testing import RawPackedDriver, RawSplitDriver
from virtio.transport.pci import PciTransport

pytestmark = pytest.mark.qemu


@pytest.mark.parametrize("indirect", [True, False], ids=["indirect", "direct"])
@pytest.mark.parametrize("event_idx", [True, False], ids=["event idx", "flags"])
@pytest.mark.parametrize("mergeable", [True, False], ids=["mergeable", "whole"])
def test_every_ring_feature(machines: Machines, ring_format: str, indirect: bool, event_idx: bool, mergeable: bool) -> None:
    """Slots of 320 bytes: a frame of 1414 takes six, merged or as one chain."""
    choice = ((Feature.INDIRECT_DESC, indirect), (Feature.EVENT_IDX, event_idx), (NetFeature.MRG_RXBUF, mergeable))
    machine = machines(CARD, wires=["n0"])
    without = [bit for bit, on in choice if not on]
    with driven(machine, wanted=wanted(ring_format, without=without), slot_size=320) as net:
        assert net.receiveq.ring_format == ring_format
        assert all((bit in net.features) == on for bit, on in choice)
        assert net.mac == ADDRESS and net.mtu == 1500 and net.link
        both_ways(net, machine.wire("n0"))
        machine.wire("n0").send(frame(1, 1414))
        burst = net.pool.burst(8)
        while not net.receive(burst):
            assert net.wait(PATIENCE)
        assert b"".join(burst.tobytes(row) for row in range(burst.count)) == frame(1, 1414)
        assert burst.count == 6 and net.send(burst) == 1
        assert machine.wire("n0").recv(4096) == frame(1, 1414)


@pytest.mark.parametrize("off", ["event_idx", "indirect_desc", "mrg_rxbuf", "packed", "queue_reset", "any_layout"])
def test_a_card_without_a_feature(machines: Machines, binary: str, off: str) -> None:
    if off == "queue_reset" and "7.2" in binary:
        off = "modern-pio-notify"  # as good as any other
    machine = machines(f"{CARD},{off}=off", wires=["n0"])
    with driven(machine) as net:
        both_ways(net, machine.wire("n0"))


@pytest.mark.parametrize("mergeable", [True, False], ids=["mergeable", "whole"])
def test_in_order(machines: Machines, binary: str, ring_format: str, mergeable: bool) -> None:
    """QEMU has it from 10.0 on. That release reads beyond an array where a merged packet crosses the end of a ring that has as many entries
    as it may have, and then stands still: hence shorter ones."""
    old = "7.2" in binary
    machine = machines(CARD if old else f"{CARD},in_order=on", wires=["n0"])
    features = wanted(ring_format, without=() if mergeable else [NetFeature.MRG_RXBUF], more=[Feature.IN_ORDER])
    with driven(machine, wanted=features, slot_size=320, queue_size=128) as net:
        assert (Feature.IN_ORDER in net.features) != old
        both_ways(net, machine.wire("n0"), rounds=30)


@pytest.mark.parametrize("size", [64, 128, 256, 512, 1024])
def test_rings_of_every_size(machines: Machines, ring_format: str, size: int) -> None:
    """A transmit ring has at most 256 entries where the far end is not vhost-user's."""
    machine = machines(f"{CARD},rx_queue_size={max(size, 256)},tx_queue_size=256", wires=["n0"])
    with driven(machine, wanted=wanted(ring_format), queue_size=size, slots=8 * size) as net:
        assert (net.receiveq.size, net.transmitq.size) == (size, min(size, 256))
        both_ways(net, machine.wire("n0"), rounds=max(4, size // 8))


@pytest.mark.parametrize("interrupts", ["msix", "intx"])
@pytest.mark.parametrize("kind", ["q35", "pc"])
def test_both_boards_and_kinds_of_interrupts(machines: Machines, ring_format: str, kind: str, interrupts: How) -> None:
    machine = machines(CARD, wires=["n0"], machine=kind)
    with driven(machine, interrupts, wanted=wanted(ring_format)) as net:
        both_ways(net, machine.wire("n0"))


@pytest.mark.parametrize("vectors", [0, 1, 2, 3, 4])
def test_fewer_vectors_than_queues(machines: Machines, ring_format: str, vectors: int) -> None:
    """None leaves the pin; fewer than three are shared."""
    machine = machines(f"{CARD},vectors={vectors},id=card", wires=["n0"])
    with driven(machine, wanted=wanted(ring_format)) as net:
        assert isinstance(net.transport, PciTransport) and net.transport.vectors == min(vectors, 4)
        both_ways(net, machine.wire("n0"))
        machine.qmp("set_link", name="card", up=False)
        assert net.wait(PATIENCE) and not wait_for_link(net, False)
        machine.qmp("set_link", name="card", up=True)
        assert wait_for_link(net, True)
        both_ways(net, machine.wire("n0"))


def wait_for_link(net: NetDriver, up: bool) -> bool:
    """Waits until the link is that; the link."""
    while net.link != up and net.wait(PATIENCE):
        continue
    return net.link


def test_masked_vectors_wait_until_they_are_unmasked(machines: Machines, ring_format: str) -> None:
    machine = machines(CARD, wires=["n0"])
    with driven(machine, "msix", wanted=wanted(ring_format)) as net:
        assert isinstance(net.transport, PciTransport)
        both_ways(net, machine.wire("n0"))
        net.transport.interrupt(0).drain()
        net.transport.function.mask_vector(1, True)
        for number in range(5):
            assert not net.arm()
            machine.wire("n0").send(frame(number))
            while not net.receiveq.arm():  # there, as the ring says
                net.check()
            assert not net.transport.interrupt(0).drain()
            assert net.receive_frames() == [frame(number)]
        assert not net.arm()
        machine.wire("n0").send(frame(5))
        net.transport.function.mask_vector(1, False)
        assert receive(net, 1) == [frame(5)]
        both_ways(net, machine.wire("n0"))


@pytest.mark.parametrize("interrupts", ["msix", "intx"])
def test_behind_a_root_port(machines: Machines, ring_format: str, interrupts: How) -> None:
    machine = machines("pcie-root-port,id=root,chassis=1,addr=3", f"{CARD},bus=root", wires=["n0"])
    with (
        at(machine, "0000:01:00.0", interrupts) as transport,
        NetDriver(transport, wanted=wanted(ring_format)) as net,
    ):
        both_ways(net, machine.wire("n0"))


@pytest.mark.parametrize("interrupts", ["msix", "intx"])
def test_link_changes_are_events(machines: Machines, interrupts: How) -> None:
    machine = machines(f"{CARD},id=card", wires=["n0"])
    with driven(machine, interrupts) as net:
        assert net.link
        for up in (False, True, False, True):
            before = net.transport.config_generation
            machine.qmp("set_link", name="card", up=up)
            assert wait_for_link(net, up) == up
            assert net.link_events() == [up]
            assert net.transport.config_generation != before
        both_ways(net, machine.wire("n0"))


def test_a_link_that_is_down_from_the_beginning(machines: Machines) -> None:
    machine = machines(f"{CARD},id=card", wires=["n0"])
    machine.qmp("set_link", name="card", up=False)
    with driven(machine) as net:
        assert not net.link and net.link_events() == []
        machine.qmp("set_link", name="card", up=True)
        assert wait_for_link(net, True)
        both_ways(net, machine.wire("n0"))


@pytest.mark.parametrize("mtu", [68, 1280, 1500, 9000, 65535])
@pytest.mark.parametrize("mergeable", [True, False], ids=["mergeable", "whole"])
def test_the_mtu_and_frames_that_long(machines: Machines, mtu: int, mergeable: bool) -> None:
    machine = machines(f"{CARD},host_mtu={mtu}", wires=["n0"])
    without = () if mergeable else (NetFeature.MRG_RXBUF,)
    with driven(machine, wanted=wanted("split", without=without), slots=4096) as net:
        assert net.mtu == mtu and NetFeature.MTU in net.features
        both_ways(net, machine.wire("n0"), [max(60, min(mtu + 14, 65000)), 60], rounds=4)


@pytest.mark.parametrize("mergeable", [True, False], ids=["mergeable", "whole"])
def test_recovery_after_a_descriptor_of_no_length(machines: Machines, ring_format: str, mergeable: bool) -> None:
    """QEMU gives up then; frames that were under way are gone, slots are not."""
    machine = machines(CARD, wires=["n0"])
    without = () if mergeable else (NetFeature.MRG_RXBUF,)
    with driven(machine, wanted=wanted(ring_format, without=without)) as net:
        available = net.pool.available
        for _ in range(3):
            both_ways(net, machine.wire("n0"), rounds=2)
            descriptor_of_no_length(net)
            with pytest.raises(DeviceNeedsReset):
                while net.wait(PATIENCE):
                    net.receive_frames()
            with pytest.raises(StatusError):
                net.wait(0)
            net.restart()
            assert net.pool.available == available
        both_ways(net, machine.wire("n0"), rounds=2)
        assert net.statistics["sent_frames"] == net.statistics["received_frames"] == 4 * 2 * 12


def descriptor_of_no_length(net: NetDriver) -> None:
    """Puts one at the beginning of the transmit queue, set up anew so that we know where that is, and rings."""
    net.reset_queue(1)
    queue = net.setup_queue(1, size=64)
    place = net.address + net.pool.offset
    raw: RawPackedDriver | RawSplitDriver
    if queue.ring_format == "packed":
        raw = RawPackedDriver(net.memory, queue.size, queue.areas, address=net.address)
        raw.add([(place, 0, False)])
    else:
        raw = RawSplitDriver(net.memory, queue.size, queue.areas, address=net.address)
        raw.make_available(raw.add([(place, 0, False)]))
    assert isinstance(net.transport, PciTransport)
    notify = net.transport.layout.notify
    net.transport.function.bar_write(notify.bar, notify.offset + notify.multiplier, 2, 1)


def test_a_platform_that_translates_is_accepted_unasked(machines: Machines, ring_format: str) -> None:
    """A card that has ACCESS_PLATFORM insists on it; the driver wants it wherever the transport carries it."""
    machine = machines(f"{CARD},iommu_platform=on", wires=["n0"])
    with driven(machine, wanted=wanted(ring_format)) as net:
        assert Feature.ACCESS_PLATFORM in net.features
        both_ways(net, machine.wire("n0"))
    with (
        pytest.raises(FeatureNegotiationError, match="FEATURES_OK"),
        driven(machines(f"{CARD},iommu_platform=on", wires=["n0"]), wanted=()),
    ):
        pass


def test_one_queue_is_reset_under_a_port(machines: Machines, ring_format: str) -> None:
    machine = machines(CARD, wires=["n0"])
    with driven(machine, wanted=wanted(ring_format)) as net:
        available = net.pool.available
        for index in (1, 0, 1, 0):
            both_ways(net, machine.wire("n0"), rounds=2)
            net.reset_queue(index)
            with pytest.raises(StatusError):
                net.receive_frames() if index == 0 else net.send_frames([frame(0)])
            net.setup_queue(index)
            assert net.pool.available + net.transmitq.outstanding == available
        both_ways(net, machine.wire("n0"), rounds=2)
        assert net.statistics["sent_frames"] == net.statistics["received_frames"] == 5 * 2 * 12


OPTIONS = [
    *("ctrl_vq=off", "ctrl_rx=off,ctrl_vlan=off", "guest_announce=off", "mac=02:00:00:00:00:01", "speed=25000,duplex=full", "status=off"),
    *("csum=off", "guest_csum=off", "host_tso4=off,host_tso6=off,host_ecn=off,host_ufo=off", "guest_tso4=off,guest_tso6=off", "gso=off"),
    *("mq=on", "rss=on", "hash=on", "failover=on", "any_layout=off", "tx=timer,x-txtimer=1000", "tx=bh,x-txburst=1", "host_mtu=1400"),
    *("notify_on_empty=off", "ats=on,iommu_platform=on", "page-per-vq=on", "modern-pio-notify=on", "use-started=off", "aer=off"),
    *("disable-legacy=off", "ioeventfd=off", "migrate-extra=off", "x-pcie-pm-init=off", "event_idx=off,indirect_desc=off,packed=off"),
    *("bootindex=1", "multifunction=on", "x-disable-pcie=on", "x-ignore-backend-features=on", "rombar=0"),
    *("guest_rsc_ext=on", "queue_reset=off", "disable-modern=off,disable-legacy=auto"),
]


@pytest.mark.parametrize("option", OPTIONS)
def test_options_of_the_card(machines: Machines, option: str) -> None:
    """Whatever else one may ask QEMU for: our driver does not mind."""
    machine = machines(f"{CARD},{option}", wires=["n0"])
    with driven(machine) as net:
        both_ways(net, machine.wire("n0"), rounds=2)
        assert (net.speed == 25000) == ("speed" in option)
        assert ("status=off" in option) == (NetFeature.STATUS not in net.features)
        assert (net.mac == ADDRESS) == ("mac=" not in option)


def test_an_address_of_a_group_is_refused_by_the_driver(machines: Machines) -> None:
    """QEMU does not mind."""
    with pytest.raises(SpecViolation, match="is a group's"), driven(machines(f"{CARD},mac=01:00:5e:00:00:01", wires=["n0"])):
        pass


def test_a_card_without_a_wire_is_a_sink(machines: Machines) -> None:
    with driven(machines("virtio-net-pci,disable-legacy=on")) as net:
        for _ in range(20):
            send(net, [frame(number) for number in range(100)])
        while net.transmitq.outstanding:
            net.take(net.pool.burst(1))
        assert net.statistics["sent_frames"] == 2000


@pytest.mark.parametrize("interrupts", ["msix", "intx"])
def test_qemu_killed_in_the_middle_of_traffic(machines: Machines, interrupts: How) -> None:
    machine = machines(CARD, wires=["n0"])
    seen: list[BaseException] = []
    running = threading.Event()
    with driven(machine, interrupts) as net:

        def work() -> None:
            try:
                while net.wait(60.0, room=True):
                    net.receive_frames()
                    net.send_frames([frame(number) for number in range(8)])
                    running.set()
            except TransportError as error:
                seen.append(error)

        net.send_frames([frame(1)])
        drain = threading.Thread(target=lambda: [machine.wire("n0").recv(4096) for _ in range(50)])
        thread = threading.Thread(target=work)
        drain.start()
        thread.start()
        assert running.wait(PATIENCE)
        drain.join(PATIENCE)
        assert not drain.is_alive(), "frames stay away"
        os.kill(machine.pid, signal.SIGKILL)
        thread.join(PATIENCE)
        assert not thread.is_alive()
        assert [type(error) for error in seen] == [TransportError] and "signal 9" in str(seen[0])
        for call in (net.check, net.restart, lambda: net.wait(1)):
            with pytest.raises((TransportError, StatusError)):
                call()
        with pytest.raises((TransportError, StatusError)):
            net.close()
        net.close()


FRAMES = 100_000
BURST = 64


def fill(net: NetDriver, burst: Burst, start: int) -> None:
    """Frames of 60 bytes with a number, 40 bytes that follow from it, and nothing else."""
    rows = burst.count
    numbers = np.arange(start, start + rows, dtype=np.uint64)
    data = np.zeros((rows, 60), np.uint8)
    data[:, :6] = 0xFF
    data[:, 12:14] = (0x88, 0xB5)
    data[:, 14:54] = words(numbers).view(np.uint8).reshape(rows, 40)
    net.pool.frames[burst.slots[:rows], :60] = data
    burst.lengths[:rows] = 60


def words(numbers: np.ndarray[tuple[int], np.dtype[np.uint64]]) -> np.ndarray[tuple[int, int], np.dtype[np.uint64]]:
    factors = np.array([1, 0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93], np.uint64)
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(numbers[:, None] * factors)


def look(net: NetDriver, burst: Burst, packets: int, start: int) -> int:
    """The number after those of the frames received, which come in order, each whole."""
    assert packets == burst.count and (burst.lengths[:packets] == 60).all()
    data = np.ascontiguousarray(net.pool.frames[burst.slots[:packets], 14:54]).view(np.uint64)
    assert (data == words(np.arange(start, start + packets, dtype=np.uint64))).all()
    return start + packets


def test_a_hundred_thousand_frames_each_way(machines: Machines, ring_format: str) -> None:
    """Two cards on one wire inside QEMU, and a driver on each, with one pool: frames cross both ways at once, in order, none lost."""
    ends = socketpair(AF_UNIX, SOCK_DGRAM)
    netdevs = [f"dgram,id=n{number},local.type=fd,local.str={end.fileno()}" for number, end in enumerate(ends)]
    cards = [f"virtio-net-pci,netdev=n{number},addr={4 + number},disable-legacy=on,packed=on" for number in range(2)]
    machine = machines(*cards, netdevs=netdevs, pass_fds=[end.fileno() for end in ends])
    for end in ends:
        end.close()
    with (
        at(machine, "0000:00:04.0") as one,
        at(machine, "0000:00:05.0") as other,
        NetDriver(one, wanted=wanted(ring_format), slots=4096) as left,
        NetDriver(other, wanted=wanted(ring_format), pool=left.pool) as right,
    ):
        bursts = {net: (net.pool.burst(BURST), net.pool.burst(BURST)) for net in (left, right)}
        sent, seen = dict.fromkeys(bursts, 0), dict.fromkeys(bursts, 0)
        watch = select.poll()
        for net in bursts:
            watch.register(net.fileno(), select.POLLIN)
        deadline = monotonic() + 6 * PATIENCE
        while min(seen.values()) < FRAMES:
            moved = 0
            for net, (out, back) in bursts.items():
                if out.count == 0 and sent[net] < FRAMES:
                    net.take(out)
                    out.count = min(out.count, FRAMES - sent[net])
                    fill(net, out, sent[net])
                    sent[net] += out.count
                if out.count:
                    moved += net.send(out)
                if packets := net.receive(back):
                    seen[net] = look(net, back, packets, seen[net])
                    moved += packets
            if moved:
                continue
            armed = [net.arm(room=True) for net in bursts]
            if not any(armed):
                assert watch.poll(1000 * (deadline - monotonic())), f"frames stay away: {sorted(seen.values())}"
                for net in bursts:
                    net.wait(0)
        for net in bursts:
            counts = net.statistics
            assert counts["sent_frames"] == counts["received_frames"] == FRAMES and counts["sent_bytes"] == 60 * FRAMES
            assert not counts["sent_drops"] and not counts["received_drops"]
        assert left.pool.drops == 0
