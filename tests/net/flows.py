"""Frames of flows: UDP over IPv4 between two machines, told apart by their ports."""

from struct import pack

NEAR, FAR = bytes([10, 0, 0, 1]), bytes([10, 0, 0, 2])


def udp(flow: int, *, back: bool = False, length: int = 60, number: int = 0) -> bytes:
    """A frame of this flow, there or `back`; `number` tells frames of one flow apart."""
    there = [(NEAR, 1024 + flow), (FAR, 53)]
    (source, from_port), (target, to_port) = reversed(there) if back else there
    ethernet = b"\x02\0\0\0\0\x02\x02\0\0\0\0\x01" + b"\x08\0"
    ip = pack(">BBHHHBBH4s4s", 0x45, 0, length - 14, 0, 0, 64, 17, 0, source, target)
    return (ethernet + ip + pack(">HHHHI", from_port, to_port, length - 34, 0, number)).ljust(length, b"x")
