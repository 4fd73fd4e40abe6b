"""Our driver on DPDK's vhost device, over vhost-user: every ring format, with mergeable buffers and without, lost and found again."""

import time
from pathlib import Path

import pytest

from tests.dpdk.testpmd import LIMIT
from tests.dpdk.traffic import Traffic
from tests.dpdk.vhost import Vhost
from virtio import DeviceId, Feature, NetDriver
from virtio.devices.net import GUEST_OFFLOADS, WANTED, NetFeature
from virtio.features import Features
from virtio.transport.vhost_user import VhostUserTransport

pytestmark = pytest.mark.dpdk

RINGS = {
    "split": Features(),
    "split in order": Features({Feature.IN_ORDER}),
    "packed": Features({Feature.RING_PACKED}),
    "packed in order": Features({Feature.RING_PACKED, Feature.IN_ORDER}),
}
ALL = Features({Feature.RING_PACKED, Feature.IN_ORDER, NetFeature.MRG_RXBUF})


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "s")


def wanted(ring: Features, *, mergeable: bool) -> Features:
    """Without mergeable buffers no guest offloads either: a frame then has one slot in any case."""
    return WANTED - ALL | ring | {NetFeature.MRG_RXBUF} if mergeable else WANTED - ALL - GUEST_OFFLOADS | ring


@pytest.mark.parametrize("mergeable", [True, False], ids=["mergeable", "not mergeable"])
@pytest.mark.parametrize("ring", RINGS.values(), ids=RINGS)
def test_frames_go_there_and_back(path: str, ring: Features, mergeable: bool) -> None:
    features = wanted(ring, mergeable=mergeable)
    with Vhost(path), VhostUserTransport(path, DeviceId.NETWORK, timeout=LIMIT) as transport:
        with NetDriver(transport, wanted=features) as net:
            assert net.features & ALL == features & ALL
            assert not net.features & {NetFeature.MAC, NetFeature.STATUS, NetFeature.CTRL_VQ}
            Traffic(net).swap(20_000)
            Traffic(net, 1514).swap(5_000)
            net.restart()
            Traffic(net, 300).swap(5_000)
        with NetDriver(transport, wanted=features) as again:
            Traffic(again).swap(5_000)


@pytest.mark.parametrize("ring", RINGS.values(), ids=RINGS)
def test_frames_are_counted_at_the_far_end(path: str, ring: Features) -> None:
    count = 100_000 // 32 * 32
    with (
        Vhost(path, mode="rxonly") as pmd,
        VhostUserTransport(path, DeviceId.NETWORK, timeout=LIMIT) as transport,
        NetDriver(transport, wanted=wanted(ring, mergeable=True)) as net,
    ):
        traffic = Traffic(net)
        while traffic.sent < count:
            traffic.send()
        end = time.monotonic() + LIMIT
        while (found := pmd.received()) < count and time.monotonic() < end:
            time.sleep(0.05)
        assert found == count
        assert net.statistics["sent_frames"] == count


def test_a_million_frames(path: str) -> None:
    features = wanted(RINGS["packed in order"], mergeable=True)
    with (
        Vhost(path),
        VhostUserTransport(path, DeviceId.NETWORK, timeout=LIMIT) as transport,
        NetDriver(transport, wanted=features) as net,
    ):
        Traffic(net).swap(1_000_000)


@pytest.mark.parametrize("ring", RINGS.values(), ids=RINGS)
@pytest.mark.parametrize("client", [False, True], ids=["it listens", "it connects"])
def test_it_is_killed_and_started_again(path: str, client: bool, ring: Features) -> None:
    """What testpmd holds when it is killed is lost with it; every buffer comes back, and what is sent after that arrives."""
    with (
        Vhost(path, client=client) as pmd,
        VhostUserTransport(path, DeviceId.NETWORK, listen=client, timeout=LIMIT, connect_timeout=LIMIT) as transport,
        NetDriver(transport, wanted=wanted(ring, mergeable=True)) as net,
    ):
        for number in range(3):
            Traffic(net).swap(5_000)
            under_load = Traffic(net)
            for _ in range(4):
                under_load.send()
            pmd.kill()
            for _ in range(3):
                under_load.send()  # nobody is there
            burst, newest = net.pool.burst(64), -1
            while net.receive(burst):  # so that there is room for all that comes: testpmd drops what finds none
                pass
            pmd.start()
            end = time.monotonic() + LIMIT
            while newest != under_load.sent - 1:
                assert time.monotonic() < end
                for row in range(net.receive(burst)):
                    newest = int.from_bytes(burst.tobytes(row)[16:24], "big")
            assert transport.reconnections > number
