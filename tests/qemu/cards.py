"""QEMU's network card, our driver on it, and frames that go both ways between the driver and a wire."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from socket import socket
from struct import pack
from time import monotonic
from typing import Any

from tests.qemu.conftest import How, only
from virtio import NetDriver
from virtio.devices.net import WANTED
from virtio.features import Features
from virtio.pci.qtest import QemuMachine
from virtio.spec import Feature

ADDRESS = bytes.fromhex("525400123456")
CARD = "virtio-net-pci,netdev=n0,mac=52:54:00:12:34:56,disable-legacy=on,packed=on"
PATIENCE = 60.0
"""Seconds that something may take that comes at once; a test that waits so long has failed."""
LENGTHS = (60, 64, 65, 128, 255, 256, 257, 1000, 1414, 1500, 1513, 1514)


def frame(number: int, length: int = 60) -> bytes:
    """A broadcast frame whose every four bytes tell it from others."""
    return (b"\xff" * 6 + ADDRESS + b"\x88\xb5" + pack("<I", number) * (length // 4))[:length]


def wanted(ring_format: str, *, without: Sequence[int] = (), more: Sequence[int] = ()) -> Features:
    """All that a network driver asks for, in that ring format, less some and with others."""
    rings = [Feature.RING_PACKED] if ring_format == "split" else []
    return WANTED - rings - without | more


@contextmanager
def driven(machine: QemuMachine, interrupts: How = "auto", **options: Any) -> Iterator[NetDriver]:
    """Our driver on the machine's only function."""
    with only(machine, interrupts) as transport, NetDriver(transport, **options) as net:
        yield net


def receive(net: NetDriver, count: int) -> list[bytes]:
    """The next `count` frames, waited for by notifications alone."""
    found: list[bytes] = []
    deadline = monotonic() + PATIENCE
    while len(found) < count:
        found += net.receive_frames(count - len(found))
        assert len(found) == count or net.wait(max(0.0, deadline - monotonic())), f"{len(found)} of {count} frames came"
    return found


def send(net: NetDriver, frames: list[bytes]) -> None:
    """Sends all of `frames`, waiting for room where there is none."""
    deadline = monotonic() + PATIENCE
    while frames:
        frames = frames[net.send_frames(frames) :]
        assert not frames or net.wait(max(0.0, deadline - monotonic()), room=True), f"{len(frames)} frames found no room"


def both_ways(net: NetDriver, wire: socket, lengths: Sequence[int] = LENGTHS, rounds: int = 8) -> None:
    """Frames of all lengths there and back: in order, whole, once."""
    wire.settimeout(PATIENCE)
    for number in range(rounds):
        there = [frame(number << 16 | length, length) for length in lengths]
        back = [frame(0x8000_0000 | number << 16 | length, length) for length in lengths]
        send(net, there)
        assert [wire.recv(1 << 17) for _ in there] == there
        for start in range(0, len(back), 8):  # no more than a socket queues
            for each in back[start : start + 8]:
                wire.send(each)
            assert receive(net, len(back[start : start + 8])) == back[start : start + 8]
    assert net.receive_frames() == []
    assert not net.statistics["sent_drops"] and not net.statistics["received_drops"]
