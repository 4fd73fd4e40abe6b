"""A session in a network namespace of its own: QEMU's card on a TAP, our driver on the card, the kernel at the TAP's other end.

    unshare --net python -m tests.qemu.tap_session BINARY split|packed mergeable|whole offloads|plain

Checksums and segmentation pass both ways: by a packet socket that sees headers as the kernel has them, and by a UDP socket.
"""

import os
import subprocess
import sys
from fcntl import ioctl
from socket import AF_INET, AF_PACKET, PACKET_OUTGOING, SOCK_DGRAM, SOCK_RAW, htons, inet_aton, socket
from struct import pack, pack_into, unpack, unpack_from

import numpy as np

from tests.qemu.cards import ADDRESS, CARD, PATIENCE, driven, wanted
from virtio import NetDriver, NetFeature
from virtio.devices.net import CHECKSUMS, GUEST_OFFLOADS, HOST_OFFLOADS, GsoType, HeaderFlag
from virtio.pci.qtest import QemuMachine

TUNSETIFF, IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 0x4004_54CA, 0x0002, 0x1000, 0x4000
SOL_PACKET, PACKET_VNET_HDR, ETH_P_IP = 263, 15, 0x0800
NEAR, FAR = "192.0.2.1", "192.0.2.2"
"""Our driver, and the kernel."""
FAR_MAC = bytes.fromhex("020000000002")
PAYLOAD = bytes(np.random.default_rng(1).integers(0, 256, 65_000, np.uint8))
SEGMENT = 1400
IP, L4 = 14, 34
TCP, UDP = 6, 17


Received = tuple[bytes, dict[str, int]]


def checksum(data: bytes, start: int = 0) -> int:
    """The Internet checksum, not inverted."""
    padded = data + bytes(len(data) % 2)
    total = start + int(np.frombuffer(padded, ">u2").sum(dtype=np.uint64))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def pseudo(frame: bytes) -> int:
    """The sum of the pseudo header."""
    return checksum(frame[IP + 12 : IP + 20] + pack(">HH", frame[IP + 9], len(frame) - L4))


def packet(protocol: int, payload: bytes, *, towards: str, whole: bool, sequence: int = 0) -> bytes:
    """A frame whose checksum is whole, or the pseudo header's alone as for NEEDS_CSUM."""
    source, target = (FAR, NEAR) if towards == NEAR else (NEAR, FAR)
    macs = ADDRESS + FAR_MAC if towards == NEAR else FAR_MAC + ADDRESS
    tcp, udp = pack(">HHIIBBHHH", 9, 9, sequence, 0, 5 << 4, 0x10, 0xFFFF, 0, 0), pack(">HHHH", 9, 9, 8 + len(payload), 0)
    head = tcp if protocol == TCP else udp
    ip = bytearray(
        pack(">BBHHHBBH4s4s", 0x45, 0, 20 + len(head) + len(payload), 1, 0, 64, protocol, 0, inet_aton(source), inet_aton(target))
    )
    pack_into(">H", ip, 10, checksum(bytes(ip)) ^ 0xFFFF)
    frame = bytearray(macs + pack(">H", ETH_P_IP) + bytes(ip) + head + payload)
    place = L4 + (16 if protocol == TCP else 6)
    pack_into(">H", frame, place, pseudo(bytes(frame)))
    if whole:
        pack_into(">H", frame, place, (checksum(bytes(frame[L4:])) ^ 0xFFFF) or 0xFFFF)
    return bytes(frame)


def right(frame: bytes) -> bool:
    """Whether both checksums are."""
    return checksum(frame[IP:L4]) == 0xFFFF and checksum(frame[L4:], pseudo(frame)) == 0xFFFF


def send(net: NetDriver, frame: bytes, **fields: int) -> None:
    """One frame over as many slots as it needs, with these fields in its header."""
    room = net.pool.slot_size - net.pool.HEADROOM
    burst = net.pool.burst(-(-len(frame) // room))
    assert net.take(burst) == burst.capacity
    for row in range(burst.count):
        piece = np.frombuffer(frame[row * room : (row + 1) * room], np.uint8)
        net.pool.frames[burst.slots[row], : len(piece)] = piece
        burst.lengths[row] = len(piece)
        burst.more[row] = row + 1 < burst.count
    for name, value in fields.items():
        net.headers[burst.slots[0]][name] = value
    assert net.send(burst) == 1
    assert not net.statistics["sent_drops"], net.statistics


def receive(net: NetDriver) -> list[Received]:
    """The next packets, each with its header."""
    burst = net.pool.burst(64)
    while not net.receive(burst):
        assert net.wait(PATIENCE), "nothing came"
    found, start = [], 0
    for end in np.flatnonzero(burst.more[: burst.count] == 0):
        frame = b"".join(burst.tobytes(row) for row in range(start, int(end) + 1))
        header = net.headers[burst.slots[start]]
        found.append((frame, {name: int(header[name]) for name in ("flags", "gso_type", "gso_size")}))
        start = int(end) + 1
    return found


def next_frame(net: NetDriver, pending: list[Received], protocol: int) -> Received:
    """The next frame of ours with that protocol; other traffic is left out."""
    while True:
        while not pending:
            pending += receive(net)
        frame, header = pending.pop(0)
        if (
            frame[12:14] == pack(">H", ETH_P_IP) and frame[IP + 9] == protocol and frame[L4 : L4 + 2] == pack(">H", 9) and len(frame) != 54
        ):  # a reset
            return frame, header


def from_wire(wire: socket) -> tuple[bytes, tuple[int, ...]]:
    """The next TCP frame from the card, as the kernel sees it: with its header."""
    while True:
        data, address = wire.recvfrom(1 << 17)
        if address[2] != PACKET_OUTGOING and data[22:24] == pack(">H", ETH_P_IP) and data[10 + IP + 9] == TCP:
            return data[10:], unpack("<BBHHHH", data[:10])


def to_driver(net: NetDriver, wire: socket, offloads: bool) -> None:
    pending: list[Received] = []
    big = packet(TCP, PAYLOAD, towards=NEAR, whole=False)
    wire.send(pack("<BBHHHH", HeaderFlag.NEEDS_CSUM, GsoType.TCPV4, 54, SEGMENT, L4, 16) + big)
    if offloads:
        frame, header = next_frame(net, pending, TCP)
        assert (header["gso_type"], header["gso_size"]) == (GsoType.TCPV4, SEGMENT), header
        assert header["flags"] & HeaderFlag.NEEDS_CSUM and frame == big
        return
    found = b""
    while len(found) < len(PAYLOAD):
        frame, header = next_frame(net, pending, TCP)
        assert right(frame) and header["gso_type"] == GsoType.NONE and not header["flags"] & HeaderFlag.NEEDS_CSUM
        assert unpack_from(">I", frame, L4 + 4)[0] == len(found) and len(frame) <= L4 + 20 + SEGMENT
        found += frame[L4 + 20 :]
    assert found == PAYLOAD


def to_kernel(net: NetDriver, wire: socket, offloads: bool) -> None:
    small = packet(TCP, PAYLOAD[:1000], towards=FAR, whole=False)
    send(net, small, flags=HeaderFlag.NEEDS_CSUM, csum_start=L4, csum_offset=16)
    frame, header = from_wire(wire)
    assert len(frame) == len(small), (len(frame), len(small), header, frame[:60].hex())
    assert right(frame) or (frame == small and header[0] & HeaderFlag.NEEDS_CSUM), (header, frame[:60].hex(), small[:60].hex())
    if offloads:
        big = packet(TCP, PAYLOAD, towards=FAR, whole=False)
        fields = {"gso_type": GsoType.TCPV4, "gso_size": SEGMENT, "hdr_len": 54, "csum_start": L4, "csum_offset": 16}
        send(net, big, flags=HeaderFlag.NEEDS_CSUM, **fields)
        frame, header = from_wire(wire)
        assert frame == big and header[:2] == (HeaderFlag.NEEDS_CSUM, GsoType.TCPV4) and header[3] == SEGMENT, header


def datagrams(net: NetDriver, peer: socket) -> None:
    """The kernel believes what it is to complete and what is right, not what is wrong; and the other way round."""
    send(net, packet(UDP, b"to be completed", towards=FAR, whole=False), flags=HeaderFlag.NEEDS_CSUM, csum_start=L4, csum_offset=6)
    assert peer.recv(100) == b"to be completed"
    send(net, packet(UDP, b"wrong", towards=FAR, whole=False))
    send(net, packet(UDP, b"right", towards=FAR, whole=True))
    assert peer.recv(100) == b"right"
    peer.sendto(b"an answer", (NEAR, 9))
    frame, header = next_frame(net, [], UDP)
    assert frame[L4 + 8 :] == b"an answer"
    partial = bool(header["flags"] & HeaderFlag.NEEDS_CSUM)
    assert partial or right(frame)
    assert not partial or NetFeature.GUEST_CSUM in net.features


def main(binary: str, ring_format: str, buffers: str, what: str) -> None:
    tap = os.open("/dev/net/tun", os.O_RDWR)
    ioctl(tap, TUNSETIFF, pack("16sH22x", b"tap0", IFF_TAP | IFF_NO_PI | IFF_VNET_HDR))
    for line in (
        f"link set tap0 address {FAR_MAC.hex(':')} mtu 1500 up",
        f"address add {FAR}/24 dev tap0",
        f"neighbour add {NEAR} lladdr {ADDRESS.hex(':')} dev tap0",
    ):
        subprocess.run(["ip", *line.split()], check=True)
    without: list[int] = [] if buffers == "mergeable" else [NetFeature.MRG_RXBUF]
    offloads = what == "offloads"
    if not offloads:
        without += [*GUEST_OFFLOADS, *HOST_OFFLOADS, *CHECKSUMS]
    with (
        QemuMachine([CARD], netdevs=[f"tap,id=n0,fd={tap}"], pass_fds=[tap], binary=binary) as machine,
        socket(AF_PACKET, SOCK_RAW, htons(3)) as wire,
        socket(AF_INET, SOCK_DGRAM) as peer,
        driven(machine, wanted=wanted(ring_format, without=without), slots=2048) as net,
    ):
        assert offloads == (net.features >= {NetFeature.GUEST_TSO4, NetFeature.HOST_TSO4, NetFeature.CSUM, NetFeature.GUEST_CSUM})
        assert (NetFeature.MRG_RXBUF in net.features) == (buffers == "mergeable")
        wire.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
        wire.bind(("tap0", 3))
        peer.bind((FAR, 9))
        for each in (wire, peer):
            each.settimeout(PATIENCE)
        for _ in range(5):
            to_driver(net, wire, offloads)
            to_kernel(net, wire, offloads)
            datagrams(net, peer)
        assert not net.statistics["received_drops"], net.statistics


if __name__ == "__main__":
    main(*sys.argv[1:])
