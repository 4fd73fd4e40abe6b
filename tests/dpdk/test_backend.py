"""DPDK's driver, virtio-user, on our network device over vhost-user: every ring, frames counted, their contents looked at."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from struct import pack, unpack

import pytest

from tests.dpdk.testpmd import LIMIT, Testpmd
from virtio import Burst, Feature, Features, NetDevice, NetFeature
from virtio.devices.net import MULTIQUEUE
from virtio.vhost_user.backend import Backend

pytestmark = pytest.mark.dpdk

OFFERED = NetDevice.features | {Feature.EVENT_IDX, Feature.INDIRECT_DESC, Feature.RING_PACKED, Feature.IN_ORDER}
RINGS = {
    "split": ("in_order=0", Features({NetFeature.MRG_RXBUF})),
    "split, whole buffers": ("in_order=0,mrg_rxbuf=0", Features()),
    "split, in order": ("in_order=1", Features({Feature.IN_ORDER, NetFeature.MRG_RXBUF})),
    "packed": ("packed_vq=1,in_order=0", Features({Feature.RING_PACKED, NetFeature.MRG_RXBUF})),
    "packed, whole buffers": ("packed_vq=1,in_order=0,mrg_rxbuf=0", Features({Feature.RING_PACKED})),
    "packed, in order": ("packed_vq=1,in_order=1", Features({Feature.RING_PACKED, Feature.IN_ORDER, NetFeature.MRG_RXBUF})),
    "packed, in order, whole buffers": ("packed_vq=1,in_order=1,mrg_rxbuf=0", Features({Feature.RING_PACKED, Feature.IN_ORDER})),
}
LOOKED_AT = Features({Feature.RING_PACKED, Feature.IN_ORDER, NetFeature.MRG_RXBUF, NetFeature.MQ})
SAMPLE = 1000


class Far:
    """Our device, driven by hand in the test's own thread, and testpmd on it."""

    def __init__(self, path: str, pairs: int = 1, device: NetDevice | None = None, connect: bool = False) -> None:
        self.path = path
        self.errors: list[Exception] = []
        offered = (OFFERED | (MULTIQUEUE if pairs > 1 else ())) - {NetFeature.MTU, NetFeature.SPEED_DUPLEX}
        self.device = NetDevice(queue_pairs=pairs, offered=offered) if device is None else device
        self.backend = Backend(path, self.device, connect, report=self.errors.append)
        self.burst = self.device.pool.burst(64)
        self.frames = 0
        self.wrong: list[bytes] = []

    def testpmd(self, ring: str, mode: str, *, options: str = "") -> Testpmd:
        pairs = self.device.queue_pairs
        device = f"net_virtio_user0,path={self.path},queues={pairs},queue_size=256,{RINGS[ring][0]}"
        return Testpmd(device, mode=mode, pump=self.pump, queues=pairs, options=options)

    def pump(self) -> None:
        """What the back-end has to do."""
        self.backend.process(0.002)

    def check(self, ring: str) -> None:
        """The rings are those of this name."""
        multiqueue = {NetFeature.MQ} if self.device.queue_pairs > 1 else ()
        assert self.device.accepted & LOOKED_AT == RINGS[ring][1] | multiqueue

    def receive(self, count: int, *, more: bool = False) -> None:
        """So many frames, or as many at least (`more`); one in a thousand is looked at."""
        limit, turns = time.monotonic() + LIMIT, 0
        while self.frames < count or (more and self.frames == count):
            turns += 1
            if got := self.device.receive(self.burst):
                if self.frames // SAMPLE != (self.frames + got) // SAMPLE:
                    self.look(self.burst.tobytes(0))
                self.frames += got
                limit = time.monotonic() + LIMIT
            else:
                self.pump()
                assert time.monotonic() < limit, f"{self.frames} of {count} frames came"
            if turns % 64 == 0:
                self.backend.process(0.0)
        assert more or self.frames == count

    def drain(self, count: int) -> None:
        """What testpmd says that it sent, all of it and not more."""
        self.receive(count)
        for _ in range(10):
            self.pump()
            assert not self.device.receive(self.burst)
        assert self.frames == count and not self.wrong

    def look(self, frame: bytes) -> None:
        if not whole(frame):
            self.wrong.append(frame)

    def send(self, frames: list[bytes]) -> None:
        limit = time.monotonic() + LIMIT
        while frames:
            sent = self.device.send_frames(frames)
            frames = frames[sent:]
            if not sent:
                self.pump()
                assert time.monotonic() < limit, f"{len(frames)} frames found no buffer"


def whole(frame: bytes) -> bool:
    """A frame as `txonly` makes them: UDP from 198.18.x.y to 198.18.0.2, with a checksum over its header that is right."""
    ethernet, ip = frame[:14], frame[14:34]
    total = sum(unpack(">10H", ip))
    return (
        len(frame) == 64
        and ethernet[12:] == b"\x08\0"
        and ip[:1] == b"\x45"
        and ip[9] == 17
        and ip[12:14] == b"\xc6\x12"
        and ((total >> 16) + (total & 0xFFFF) == 0xFFFF)
    )


def numbered(number: int, length: int = 60) -> bytes:
    return (b"\x02\0\0\0\0\x01\x02\0\0\0\0\x02\x88\xb5" + pack(">I", number) * 400)[:length]


def swapped(frame: bytes) -> bytes:
    return frame[6:12] + frame[:6] + frame[12:]


@contextmanager
def far(path: Path, pairs: int = 1, device: NetDevice | None = None, *, connect: bool = False) -> Iterator[Far]:
    end = Far(str(path / "net"), pairs, device, connect)
    with end.backend:
        yield end
    assert not end.errors


def test_a_million_frames_are_counted(tmp_path: Path) -> None:
    with far(tmp_path) as end, end.testpmd("packed, in order", "txonly").ready() as testpmd:
        end.check("packed, in order")
        testpmd.start()
        end.receive(1_000_000, more=True)
        end.drain(testpmd.stop()[1])
        assert end.frames > 1_000_000 and end.device.statistics["received_frames"] == end.frames
        assert not end.device.statistics["received_drops"]


@pytest.mark.parametrize("pairs", [1, 2])
@pytest.mark.parametrize("ring", RINGS)
def test_what_dpdk_sends_is_received(tmp_path: Path, ring: str, pairs: int) -> None:
    with far(tmp_path, pairs) as end, end.testpmd(ring, "txonly", options="--txonly-multi-flow").ready() as testpmd:
        end.check(ring)
        for _ in range(2):
            testpmd.start()
            begun = end.frames
            end.receive(begun + 20_000, more=True)
            end.drain(begun + testpmd.stop()[1])
        assert all(end.device.pair(number).statistics["received_frames"] > 1000 for number in range(pairs))


@pytest.mark.parametrize("pairs", [1, 2])
@pytest.mark.parametrize("ring", RINGS)
def test_what_is_sent_dpdk_receives(tmp_path: Path, ring: str, pairs: int) -> None:
    with far(tmp_path, pairs) as end, end.testpmd(ring, "rxonly").ready() as testpmd:
        end.check(ring)
        testpmd.start()
        lengths = (60, 64, 128, 1514) if end.device.accepted >= {NetFeature.MRG_RXBUF} else (60, 1514)
        frames = [swapped(bytes([flow]) * 12 + numbered(0, length)[12:]) for flow in range(64) for length in lengths]
        for _ in range(40):
            end.send(frames)
        limit = time.monotonic() + LIMIT
        while testpmd.received() < 40 * len(frames):
            assert time.monotonic() < limit
        assert testpmd.stop()[0] == 40 * len(frames) == end.device.statistics["sent_frames"]
        assert not end.device.statistics["sent_drops"]
        assert all(end.device.pair(number).statistics["sent_frames"] > 1000 for number in range(pairs))


@pytest.mark.parametrize("mode", ["io", "macswap"])
@pytest.mark.parametrize("ring", RINGS)
def test_what_dpdk_forwards_comes_back_whole(tmp_path: Path, ring: str, mode: str) -> None:
    with far(tmp_path) as end, end.testpmd(ring, mode).ready() as testpmd:
        end.check(ring)
        testpmd.start()
        for start in range(0, 20_000, 100):
            frames = [numbered(number, 60 + number * 37 % 1455) for number in range(start, start + 100)]
            end.send(frames)
            found: list[bytes] = []
            limit = time.monotonic() + LIMIT
            while len(found) < 100:
                found += end.device.receive_frames(100 - len(found))
                end.pump()
                assert time.monotonic() < limit, f"{len(found)} of 100 frames came back"
            assert found == (frames if mode == "io" else [swapped(frame) for frame in frames])
        assert testpmd.stop() == (20_000, 20_000)


class Echo(NetDevice):
    """Sends back what it gets, in its handler."""

    def on_frames(self, burst: Burst) -> None:
        self.send(burst)


@pytest.mark.parametrize("pairs", [1, 2])
@pytest.mark.parametrize("poll", [False, True], ids=["asleep", "polling"])
@pytest.mark.parametrize("ring", ["split", "packed, in order"])
def test_frames_go_round_between_dpdk_and_a_handler(tmp_path: Path, ring: str, poll: bool, pairs: int) -> None:
    """`io` sends back what comes back from the device: the same frames, over and over."""
    offered = (OFFERED | (MULTIQUEUE if pairs > 1 else ())) - {NetFeature.MTU, NetFeature.SPEED_DUPLEX}
    device = Echo(offered=offered, queue_pairs=pairs)
    errors: list[Exception] = []
    path = str(tmp_path / "net")
    with Backend(path, device, report=errors.append, poll=poll) as backend:
        vdev = f"net_virtio_user0,path={path},queues={pairs},queue_size=256,{RINGS[ring][0]}"
        with Testpmd(vdev, mode="io", pump=lambda: backend.process(0.01), queues=pairs).ready() as testpmd:
            testpmd.start(first=2)
            limit = time.monotonic() + LIMIT
            while device.statistics.get("sent_frames", 0) < 50_000:
                backend.process(0.01)
                assert time.monotonic() < limit, device.statistics
            received, _ = testpmd.stop()
            assert received > 40_000
            backend.process(0.01)
            seen = device.statistics
            assert not seen["received_drops"] and not seen["sent_drops"]
    assert not errors


@pytest.mark.parametrize("ring", ["split", "packed, in order"])
def test_testpmd_may_be_killed_and_another_comes(tmp_path: Path, ring: str) -> None:
    with far(tmp_path, 2) as end:
        for _ in range(3):
            with end.testpmd(ring, "txonly", options="--txonly-multi-flow").ready() as testpmd:
                end.check(ring)
                testpmd.start()
                end.receive(end.frames + 10_000, more=True)
                testpmd.kill()  # in the middle
                limit = time.monotonic() + LIMIT
                while end.backend.connections:
                    end.pump()
                    assert time.monotonic() < limit
                assert end.device.receive(end.burst) == 0 and end.device.status == 0
        assert not end.wrong


@pytest.mark.parametrize("ring", ["split", "packed, in order"])
def test_testpmd_listens_and_the_back_end_connects_again(tmp_path: Path, ring: str) -> None:
    path = str(tmp_path / "net")
    with far(tmp_path, connect=True) as end:
        vdev = f"net_virtio_user0,path={path},server=1,queue_size=256,{RINGS[ring][0]}"
        for _ in range(2):
            with Testpmd(vdev, mode="txonly", pump=end.pump).ready() as testpmd:
                end.check(ring)
                testpmd.start()
                begun = end.frames
                end.receive(begun + 10_000, more=True)
                end.drain(begun + testpmd.stop()[1])
            limit = time.monotonic() + LIMIT
            while end.backend.connections:
                end.pump()
                assert time.monotonic() < limit
            Path(path).unlink(missing_ok=True)
