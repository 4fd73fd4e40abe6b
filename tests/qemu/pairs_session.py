"""A session in a network namespace of its own: QEMU's card with four queue pairs on a TAP with four queues, our driver on the card.

    unshare --net python -m tests.qemu.pairs_session BINARY split|packed VECTORS

The kernel sends a flow to the queue from which it last came: what we send on a pair comes back there.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from fcntl import ioctl
from socket import AF_PACKET, PACKET_OUTGOING, SOCK_RAW, htons, socket
from struct import pack
from time import monotonic

from tests.net.flows import udp
from tests.qemu.cards import CARD, PATIENCE, driven, wanted
from virtio import NetDriver
from virtio.pci.qtest import QemuMachine

TUNSETIFF, IFF_TAP, IFF_MULTI_QUEUE, IFF_NO_PI, IFF_VNET_HDR = 0x4004_54CA, 0x0002, 0x0100, 0x1000, 0x4000
PAIRS = 4
FLOWS = range(32)


def open_queue() -> int:
    tap = os.open("/dev/net/tun", os.O_RDWR)
    ioctl(tap, TUNSETIFF, pack("16sH22x", b"tap0", IFF_TAP | IFF_MULTI_QUEUE | IFF_NO_PI | IFF_VNET_HDR))
    return tap


def ours(frame: bytes) -> bool:
    return frame[12:14] == b"\x08\0" and frame[23] == 17 and frame[26:29] == b"\x0a\0\0"


def from_card(wire: socket, count: int) -> list[bytes]:
    found: list[bytes] = []
    while len(found) < count:
        frame, address = wire.recvfrom(2048)
        if address[2] != PACKET_OUTGOING and ours(frame):
            found.append(frame)
    return found


def from_pairs(net: NetDriver, count: int) -> dict[int, list[bytes]]:
    """So many frames, by the pair that they came on."""
    found: dict[int, list[bytes]] = {number: [] for number in range(PAIRS)}
    deadline = monotonic() + PATIENCE
    while True:
        for number in range(net.queue_pairs):
            found[number] += filter(ours, net.pair(number).receive_frames())
        if (seen := sum(map(len, found.values()))) >= count:
            break
        assert net.wait(max(0.0, deadline - monotonic())), f"{seen} of {count} frames came"
    return found


def exchange(net: NetDriver, wire: socket, pairs: Sequence[int]) -> None:
    """Each flow goes out on a pair of its own choice, and comes back on it."""
    for number in range(3):
        there = [udp(flow, number=number) for flow in FLOWS]
        for flow, frame in zip(FLOWS, there, strict=True):
            assert net.pair(pairs[flow % len(pairs)]).send_frames([frame]) == 1
        assert sorted(from_card(wire, len(there))) == sorted(there)
        for flow in FLOWS:
            wire.send(udp(flow, back=True, number=number))
        found = from_pairs(net, len(FLOWS))
        for place, pair in enumerate(pairs):
            assert sorted(found[pair]) == sorted(udp(flow, back=True, number=number) for flow in FLOWS if flow % len(pairs) == place)


def main(binary: str, ring_format: str, vectors: str) -> None:
    queues = [open_queue() for _ in range(PAIRS)]
    subprocess.run(["ip", "link", "set", "tap0", "up"], check=True)
    netdev = f"tap,id=n0,fds={':'.join(map(str, queues))}"
    with (
        QemuMachine([f"{CARD},mq=on,vectors={vectors}"], netdevs=[netdev], pass_fds=queues, binary=binary) as machine,
        socket(AF_PACKET, SOCK_RAW, htons(3)) as wire,
        driven(machine, wanted=wanted(ring_format), queue_pairs=PAIRS) as net,
    ):
        wire.bind(("tap0", 3))
        wire.settimeout(PATIENCE)
        assert net.queue_pairs == net.active_pairs == PAIRS and net.pair(3).transmitq.ring_format == ring_format
        exchange(net, wire, range(PAIRS))
        for pairs in (2, 1, 4):
            net.use_pairs(pairs)
            exchange(net, wire, range(pairs))
        frames = [udp(flow) for flow in FLOWS]
        assert net.send_frames(frames) == len(frames) and sorted(from_card(wire, len(frames))) == sorted(frames)
        assert all(net.pair(number).statistics["sent_frames"] for number in range(PAIRS))
        assert not net.command(0x7F, 0) and not net.command(4, 0, b"\5\0"), "what QEMU does not know, and more pairs than it has"
        net.restart()
        exchange(net, wire, range(PAIRS))
        with suppress(ValueError):
            net.use_pairs(PAIRS + 1)
            raise AssertionError
        assert not net.statistics["received_drops"] and not net.statistics["sent_drops"]


if __name__ == "__main__":
    main(*sys.argv[1:])
