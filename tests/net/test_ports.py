"""Both ends of a network device over loopback: frames, bursts, formats, sizes, link, reset, counters."""

import asyncio
import os
from collections.abc import Iterable

import pytest

from virtio import Burst, DeviceNeedsReset, Feature, NetDevice, NetDriver, NetFeature, Port, StatusError
from virtio.devices.net import CHECKSUMS, GUEST_OFFLOADS, HOST_OFFLOADS
from virtio.transport.loopback import LoopbackTransport

OFFLOADS = GUEST_OFFLOADS | HOST_OFFLOADS | CHECKSUMS
FRAMES = [bytes([k]) * length for k, length in enumerate((60, 1, 1514, 700, 64))]


def wants(ring_format: str, *more: int) -> set[int]:
    return {NetFeature.MAC, NetFeature.STATUS, *more, *([Feature.RING_PACKED] if ring_format == "packed" else [])}


CASES: dict[str, Iterable[int]] = {
    "plain": (),
    "mergeable": (NetFeature.MRG_RXBUF,),
    "offloads": OFFLOADS,
    "mergeable offloads": OFFLOADS | {NetFeature.MRG_RXBUF},
    "all ring features": OFFLOADS | {NetFeature.MRG_RXBUF, Feature.INDIRECT_DESC, Feature.EVENT_IDX, Feature.IN_ORDER, Feature.RING_RESET},
    "indirect": OFFLOADS | {Feature.INDIRECT_DESC},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("slot_size", [256, 2048, 131072])
def test_frames_and_bursts_go_both_ways(ring_format: str, case: str, slot_size: int) -> None:
    device = NetDevice(mtu=1500, speed=10_000, slots=256, slot_size=slot_size)
    wanted = wants(ring_format, *CASES[case])
    with LoopbackTransport(device) as transport, NetDriver(transport, wanted=wanted, slots=2048, slot_size=slot_size) as net:
        assert isinstance(net, Port) and isinstance(device, Port)
        assert net.receiveq.ring_format == ring_format and net.header_size == device.header_size == 12
        near, far = net.pool.burst(64), device.pool.burst(64)
        for _ in range(100):  # more than once round the ring
            assert net.send_frames(FRAMES) == 5 and device.receive_frames() == FRAMES
            assert device.send_frames(FRAMES) == 5 and net.receive_frames() == FRAMES
            assert device.send_frames(FRAMES) == 5
            assert net.receive(near) == 5 and net.send(near) == 5
            assert device.receive(far) == 5 and device.send(far) == 5
            assert net.receive_frames() == FRAMES
        assert device.receive(far) == 0
        for end in (net, device):
            seen = end.statistics
            assert seen["sent_frames"] == seen["received_frames"] + (500 if end is device else -500)
            assert not seen["sent_drops"] and not seen["received_drops"]


@pytest.mark.parametrize("case", ["offloads", "mergeable offloads", "indirect", "all ring features"])
def test_packets_of_64_kib(ring_format: str, case: str) -> None:
    device = NetDevice()
    frame = os.urandom(65589)
    with LoopbackTransport(device) as transport, NetDriver(transport, wanted=wants(ring_format, *CASES[case])) as net:
        near, far = net.pool.burst(64), device.pool.burst(64)
        for _ in range(20):
            assert net.send_frames([frame]) == 1
            assert device.receive(far) == 1 and far.count > 1
            assert device.send(far) == 1
            assert net.receive(near) == 1
            assert b"".join(near.tobytes(row) for row in range(near.count)) == frame
            assert net.send(near) == 1 and device.receive_frames() == [frame]


def test_what_does_not_fit_is_a_count(ring_format: str) -> None:
    device = NetDevice()
    with LoopbackTransport(device) as transport, NetDriver(transport, wanted=wants(ring_format), queue_size=16) as net:
        frames = [bytes([k]) * 60 for k in range(40)]
        assert net.send_frames(frames) == 16 and net.send_frames(frames) == 0
        assert device.receive_frames() == frames[:16]
        burst = net.pool.burst(20)
        net.take(burst)
        burst.lengths[:] = 60
        assert net.send(burst) == 16 and burst.count == 4
        drops = net.pool.drops
        net.take(burst)
        assert net.pool.drops == drops + 4
        assert device.send_frames(frames) == 16
        assert net.receive_frames(5) == frames[:5] and net.receive_frames() == frames[5:16]


def test_a_callers_mistakes_change_nothing(ring_format: str) -> None:
    with LoopbackTransport(NetDevice()) as transport, NetDriver(transport, wanted=wants(ring_format)) as net:
        for bad in ([b"x", b""], [bytes(65590)]):
            with pytest.raises(ValueError, match="which is not in 1 to 65589"):
                net.send_frames(bad)
        with pytest.raises(TypeError):
            net.send_frames([1])  # type: ignore[list-item]
        burst = net.pool.burst(2)
        net.take(burst)
        burst.offsets[1] = 5
        with pytest.raises(ValueError, match="burst row 1: offset 5 leaves no room for a header of 12 bytes"):
            net.send(burst)
        assert burst.count == 2 and net.transmitq.outstanding == 0 and net.statistics["sent_frames"] == 0


def test_forwarding_between_two_ports_that_share_a_pool(ring_format: str) -> None:
    left, right = NetDevice(), NetDevice()
    with (
        LoopbackTransport(left) as one,
        LoopbackTransport(right) as other,
        NetDriver(one, wanted=wants(ring_format)) as a,
        NetDriver(other, wanted=wants(ring_format), pool=a.pool) as b,
    ):
        burst = a.pool.burst(64)
        for round in range(200):
            frames = [round.to_bytes(2, "big") + bytes(60)] * 7
            assert left.send_frames(frames) == 7
            assert a.receive(burst) == 7 and b.send(burst) == 7
            assert right.receive_frames() == frames
        assert a.receive(burst) == 0


def test_link_changes_are_events(ring_format: str) -> None:
    device = NetDevice()
    with LoopbackTransport(device) as transport, NetDriver(transport, wanted=wants(ring_format)) as net:
        seen: list[bool] = []
        net.on_link = seen.append
        assert net.link and not net.wait(0)
        device.link = False
        assert net.wait(60) and not net.link
        device.link = True
        device.send_frames([bytes(60)])
        assert net.wait(60) and net.link
        assert net.link_events() == seen == [False, True] and net.link_events() == []


def test_restart_after_a_reset_under_load(ring_format: str) -> None:
    device = NetDevice()
    with LoopbackTransport(device) as transport, NetDriver(transport, wanted=wants(ring_format), slots=512) as net:
        burst = net.pool.burst(32)
        for _ in range(3):
            assert net.send_frames(FRAMES) == 5 and device.send_frames(FRAMES) == 5
            net.take(burst)
            burst.lengths[:] = 60
            assert net.send(burst) == 32
            device.need_reset()
            assert device.send_frames(FRAMES) == 0 and device.receive_frames() == []
            with pytest.raises(DeviceNeedsReset):
                while True:
                    net.wait(1)
                    net.receive_frames()
            net.restart()
            assert net.send_frames(FRAMES) == 5 and device.receive_frames() == FRAMES
        assert net.statistics["sent_frames"] == 3 * (5 + 32 + 5)
        net.reset()
        net.pool.give(burst)
        assert net.pool.available == 512
        with pytest.raises(StatusError):
            net.send_frames(FRAMES)


def test_a_served_device_calls_on_frames(ring_format: str) -> None:
    class Echo(NetDevice):
        def on_frames(self, burst: Burst) -> None:
            self.send(burst)

    with LoopbackTransport(Echo()) as transport, NetDriver(transport, wanted=wants(ring_format)) as net:
        found: list[bytes] = []
        for _ in range(50):
            net.send_frames(FRAMES)
            assert net.wait(60)
            found += net.receive_frames()
        assert found == FRAMES * 50


def test_asynchronous_iteration(ring_format: str) -> None:
    device = NetDevice()

    async def count(net: NetDriver) -> int:
        found = 0
        async for burst in net:
            found += burst.count
            if found == 50:
                break
        return found

    async def feed() -> None:
        for _ in range(10):
            device.send_frames(FRAMES)
            await asyncio.sleep(0.001)

    async def main(net: NetDriver) -> None:
        total, _ = await asyncio.wait_for(asyncio.gather(count(net), feed()), 30)
        assert total == 50

    with LoopbackTransport(device) as transport, NetDriver(transport, wanted=wants(ring_format)) as net:
        asyncio.run(main(net))


def test_a_device_waits_for_its_driver() -> None:
    device = NetDevice()
    assert not device.wait(0) or not device.wait(0)
    with LoopbackTransport(device) as transport, NetDriver(transport) as net:
        assert device.wait(60)
        device.wait(0)
        net.send_frames([b"x"])
        assert device.wait(60) and device.receive_frames() == [b"x"]
