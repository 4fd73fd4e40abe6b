"""A back-end that is killed at any moment under load and started again: everything sent comes back, whole; some of it twice."""

import random
import threading
import time
from pathlib import Path

import pytest

from tests.vhost_user.serving import PATIENCE, Serving, until
from virtio import DeviceId, Feature, NetDriver
from virtio.devices.net import NetFeature
from virtio.devices.rng import RngDriver
from virtio.features import Features
from virtio.transport.vhost_user import VhostUserTransport
from virtio.vhost_user.frontend import PROTOCOL
from virtio.vhost_user.message import ProtocolFeature

WINDOW = 100
"""Frames on their way at once: fewer than there are receive buffers, also if all of them come twice."""


class Killer(threading.Thread):
    """Kills `backend` so many times, each a little while after it took over."""

    def __init__(self, backend: Serving, transport: VhostUserTransport, kills: int) -> None:
        super().__init__()
        self._backend, self._transport, self._kills = backend, transport, kills
        self._random = random.Random(kills)

    def run(self) -> None:
        for number in range(self._kills):
            until(lambda number=number: self._transport.reconnections >= number)
            time.sleep(self._random.uniform(0, 0.1))
            self._backend.kill()
            self._backend.start()


def frame(number: int) -> bytes:
    return bytes(12) + b"\x88\xb5" + number.to_bytes(8, "big") + random.Random(number).randbytes(40 + number % 1400)


TRACKED = pytest.mark.parametrize("protocol", [PROTOCOL, PROTOCOL - {ProtocolFeature.INFLIGHT_SHMFD}], ids=["tracked", "not tracked"])


@TRACKED
@pytest.mark.parametrize("extra", [{NetFeature.MRG_RXBUF, Feature.EVENT_IDX}, {Feature.IN_ORDER}], ids=["mergeable", "in order"])
def test_no_frame_is_lost(tmp_path: Path, ring_features: Features, extra: set[int], protocol: Features) -> None:
    under_load(str(tmp_path / "s"), ring_features | extra, protocol, kills=4)


@pytest.mark.slow
@TRACKED
def test_no_frame_is_lost_a_hundred_times(tmp_path: Path, ring_features: Features, protocol: Features) -> None:
    under_load(str(tmp_path / "s"), ring_features | {NetFeature.MRG_RXBUF, Feature.EVENT_IDX}, protocol, kills=100)


def under_load(path: str, wanted: Features, protocol: Features, *, kills: int) -> None:
    with (
        Serving(path) as backend,
        VhostUserTransport(path, DeviceId.NETWORK, timeout=PATIENCE, protocol_features=protocol) as transport,
        NetDriver(transport, wanted=wanted) as net,
    ):
        assert net.features >= wanted
        assert transport.tracked == (ProtocolFeature.INFLIGHT_SHMFD in transport.frontend.protocol)
        killer = Killer(backend, transport, kills)
        killer.start()
        sent, last = 0, time.monotonic()
        pending: set[int] = set()
        while killer.is_alive() or pending:
            while killer.is_alive() and len(pending) < WINDOW and net.send_frames([frame(sent)]):
                pending.add(sent)
                sent += 1
            for got in net.receive_frames():
                number = int.from_bytes(got[14:22], "big")
                assert number < sent and got == frame(number)
                pending.discard(number)
                last = time.monotonic()
            assert time.monotonic() < last + PATIENCE, f"{len(pending)} of {sent} frames did not come back"
            if len(pending) == WINDOW or not killer.is_alive():
                net.wait(0.1)
        killer.join()
        assert sent > WINDOW and transport.reconnections >= kills - 1
        assert net.receiveq.broken is None and net.transmitq.broken is None


@TRACKED
def test_every_request_is_answered(tmp_path: Path, ring_features: Features, protocol: Features) -> None:
    path = str(tmp_path / "s")
    with (
        Serving(path, "rng") as backend,
        VhostUserTransport(path, DeviceId.ENTROPY, timeout=PATIENCE, protocol_features=protocol) as transport,
        RngDriver(transport, wanted=ring_features) as rng,
    ):
        killer = Killer(backend, transport, 4)
        killer.start()
        answers = 0
        while killer.is_alive():
            data = rng.read(64, timeout=PATIENCE)
            assert data == bytes((data[0] + k) % 251 for k in range(64))
            answers += 1
        killer.join()
        assert answers and rng.requestq.broken is None and rng.requestq.outstanding == 0
