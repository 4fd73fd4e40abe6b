"""What stands on the wire of a network device (5.1): feature bits with their rules, the configuration's layout, the header's layout.

Values and layouts only; the two ends are in `virtio.devices.net`.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from enum import IntEnum, IntFlag
from typing import TYPE_CHECKING, Final, NamedTuple

from virtio import arguments
from virtio._core import BufferPool, net_header_size
from virtio.errors import SpecViolation
from virtio.features import Features, Requires
from virtio.spec import DeviceId, Feature

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class NetFeature(IntEnum):
    """Feature bits of the type (5.1.3)."""

    CSUM = 0
    GUEST_CSUM = 1
    CTRL_GUEST_OFFLOADS = 2
    MTU = 3
    MAC = 5
    GSO = 6
    """Legacy interface only (5.1.3.2)."""
    GUEST_TSO4 = 7
    GUEST_TSO6 = 8
    GUEST_ECN = 9
    GUEST_UFO = 10
    HOST_TSO4 = 11
    HOST_TSO6 = 12
    HOST_ECN = 13
    HOST_UFO = 14
    MRG_RXBUF = 15
    STATUS = 16
    CTRL_VQ = 17
    CTRL_RX = 18
    CTRL_VLAN = 19
    CTRL_RX_EXTRA = 20
    GUEST_ANNOUNCE = 21
    MQ = 22
    CTRL_MAC_ADDR = 23
    DEVICE_STATS = 50
    HASH_TUNNEL = 51
    VQ_NOTF_COAL = 52
    NOTF_COAL = 53
    GUEST_USO4 = 54
    GUEST_USO6 = 55
    HOST_USO = 56
    HASH_REPORT = 57
    GUEST_HDRLEN = 59
    RSS = 60
    RSC_EXT = 61
    STANDBY = 62
    SPEED_DUPLEX = 63
    RSS_CONTEXT = 64
    GUEST_UDP_TUNNEL_GSO = 65
    GUEST_UDP_TUNNEL_GSO_CSUM = 66
    HOST_UDP_TUNNEL_GSO = 67
    HOST_UDP_TUNNEL_GSO_CSUM = 68
    OUT_NET_HEADER = 69
    IPSEC = 70


_F = NetFeature


def _needs(feature: NetFeature, *needs: NetFeature | tuple[NetFeature, ...]) -> Requires:
    return Requires(feature, *needs, section="5.1.3.1")


RULES: Final = (
    *(_needs(bit, _F.GUEST_CSUM) for bit in (_F.GUEST_TSO4, _F.GUEST_TSO6, _F.GUEST_UFO, _F.GUEST_USO4, _F.GUEST_USO6)),
    _needs(_F.GUEST_ECN, (_F.GUEST_TSO4, _F.GUEST_TSO6)),
    *(_needs(bit, _F.CSUM) for bit in (_F.HOST_TSO4, _F.HOST_TSO6, _F.HOST_UFO, _F.HOST_USO)),
    _needs(_F.HOST_ECN, (_F.HOST_TSO4, _F.HOST_TSO6)),
    _needs(_F.GUEST_UDP_TUNNEL_GSO, _F.GUEST_TSO4, _F.GUEST_TSO6, _F.GUEST_USO4, _F.GUEST_USO6),
    _needs(_F.GUEST_UDP_TUNNEL_GSO_CSUM, _F.GUEST_UDP_TUNNEL_GSO),
    _needs(_F.HOST_UDP_TUNNEL_GSO, _F.HOST_TSO4, _F.HOST_TSO6, _F.HOST_USO),
    _needs(_F.HOST_UDP_TUNNEL_GSO_CSUM, _F.HOST_UDP_TUNNEL_GSO),
    *(
        _needs(bit, _F.CTRL_VQ)
        for bit in (
            *(_F.CTRL_RX, _F.CTRL_VLAN, _F.GUEST_ANNOUNCE, _F.MQ, _F.CTRL_MAC_ADDR, _F.VQ_NOTF_COAL, _F.NOTF_COAL, _F.RSS),
            *(_F.CTRL_GUEST_OFFLOADS, _F.CTRL_RX_EXTRA, _F.DEVICE_STATS, _F.HASH_REPORT),
        )
    ),
    _needs(_F.HASH_TUNNEL, _F.CTRL_VQ, (_F.RSS, _F.HASH_REPORT)),
    _needs(_F.RSS_CONTEXT, _F.CTRL_VQ, _F.RSS),
    _needs(_F.RSC_EXT, (_F.HOST_TSO4, _F.HOST_TSO6)),
)
"""Dependencies between the type's bits (5.1.3.1)."""

GUEST_OFFLOADS: Final = Features({_F.GUEST_TSO4, _F.GUEST_TSO6, _F.GUEST_ECN, _F.GUEST_USO4, _F.GUEST_USO6})
"""Segmentation towards the driver: each makes received packets as long as 65589 bytes."""
HOST_OFFLOADS: Final = Features({_F.HOST_TSO4, _F.HOST_TSO6, _F.HOST_ECN, _F.HOST_USO})
"""Segmentation towards the device."""
CHECKSUMS: Final = Features({_F.CSUM, _F.GUEST_CSUM})
IMPLEMENTED: Final = (
    GUEST_OFFLOADS | HOST_OFFLOADS | CHECKSUMS | Features({_F.MTU, _F.MAC, _F.MRG_RXBUF, _F.STATUS, _F.SPEED_DUPLEX, Feature.IN_ORDER})
)
"""What both ends here implement, beside the rings' own features."""
MULTIQUEUE: Final = Features({_F.MQ, _F.CTRL_VQ})
"""Several queue pairs, and the control queue that says how many are in use. Offered and asked for where there is more than one."""

TOLD_IN_CONFIG: Final = Features(
    {
        *(_F.MAC, _F.STATUS, _F.MTU, _F.SPEED_DUPLEX, _F.MQ, _F.RSS, _F.HASH_REPORT, _F.HASH_TUNNEL, _F.RSC_EXT),
        *(_F.GUEST_ANNOUNCE, _F.CTRL_VQ, _F.CTRL_RX, _F.CTRL_VLAN, _F.CTRL_RX_EXTRA, _F.CTRL_MAC_ADDR, _F.CTRL_GUEST_OFFLOADS),
    }
)
"""What a driver cannot use if it cannot read the configuration: such a device has no control queue either, whatever it offers (vhost-user
back-ends of QEMU's, which keeps both to itself)."""

DEVICE_ID: Final = DeviceId.NETWORK
DEFAULT_MTU: Final = 1500
"""What is meant if a device does not say (5.1.5)."""
MAX_FRAME: Final = 65589
"""Bytes of the longest frame: 65535 of payload and 54 of headers (5.1.6.3)."""
ETHERNET_FRAME: Final = 1514
"""Bytes of the longest frame without offloads and with an MTU of 1500."""
MIN_MTU: Final = 68
MAX_MTU: Final = 65535
UNKNOWN_SPEED: Final = 0xFFFF_FFFF
UNKNOWN_DUPLEX: Final = 0xFF
MAX_QUEUE_PAIRS: Final = 0x8000
"""Most pairs that a device may name (5.1.4.1)."""

MAX_SLOTS: Final = 1 << 20
MIN_SLOT_SIZE: Final = 128
MAX_SLOT_SIZE: Final = 1 << 17
SLOT_STEP: Final = 64
"""What a `BufferPool` may have."""

RECEIVEQ1: Final = 0
TRANSMITQ1: Final = 1


class NetStatus(IntFlag):
    """Bits of the configuration's `status` (5.1.4)."""

    LINK_UP = 1
    ANNOUNCE = 2


class HeaderFlag(IntFlag):
    """Bits of the header's `flags` (5.1.6)."""

    NEEDS_CSUM = 1
    DATA_VALID = 2
    RSC_INFO = 4
    UDP_TUNNEL_CSUM = 8


class GsoType(IntEnum):
    """The header's `gso_type` (5.1.6); ECN stands beside a TCP type."""

    NONE = 0
    TCPV4 = 1
    UDP = 3
    TCPV6 = 4
    UDP_L4 = 5
    ECN = 0x80


class Config(NamedTuple):
    """The configuration space (5.1.4)."""

    mac: bytes = bytes(6)
    status: int = 0
    max_virtqueue_pairs: int = 0
    mtu: int = 0
    speed: int = UNKNOWN_SPEED
    """Mbit/s."""
    duplex: int = UNKNOWN_DUPLEX
    """1: full."""

    def pack(self) -> bytes:
        """The bytes of these fields, those of receive-side scaling as zeros behind them."""
        return _CONFIG.pack(*self) + bytes(CONFIG_SIZE - _CONFIG.size)


_CONFIG = struct.Struct("<6sHHHIB")
CONFIG_SIZE: Final = 28
"""Bytes of the whole configuration."""
FIELDS: Final = {"mac": (0, 6), "status": (6, 2), "max_virtqueue_pairs": (8, 2), "mtu": (10, 2), "speed": (12, 4), "duplex": (16, 1)}
"""(offset, bytes) of each field (5.1.4)."""


def random_mac() -> bytes:
    """A random address, locally administered."""
    first, *rest = os.urandom(6)
    return bytes([first & 0xFC | 2, *rest])


def check_mac(mac: bytes) -> bytes:
    """`mac` as a device names it. SpecViolation: a group's address, which is no device's (5.1.4)."""
    if mac[0] & 1:
        raise SpecViolation(f"the device's address {mac.hex(':')} is a group's", "5.1.4")
    return mac


def check_mtu(mtu: int) -> int:
    """`mtu` as a device offers it. SpecViolation: outside 68..65535 (5.1.4.1)."""
    if not MIN_MTU <= mtu <= MAX_MTU:
        raise SpecViolation(f"the device's MTU {mtu} is outside {MIN_MTU}..{MAX_MTU}", "5.1.4.1")
    return mtu


def check_slots(pool: BufferPool | None, slots: int, slot_size: int) -> tuple[int, int]:
    """A caller's pool, or sizes for one, which come back. TypeError: of another type. ValueError: no pool can be so."""
    if pool is not None:
        arguments.instance("pool", pool, BufferPool, "a BufferPool")
    slots = arguments.integer("slots", slots, 1, MAX_SLOTS)
    slot_size = arguments.integer("slot_size", slot_size, MIN_SLOT_SIZE, MAX_SLOT_SIZE)
    if slot_size % SLOT_STEP:
        raise ValueError(f"slot_size {slot_size} is not a multiple of {SLOT_STEP}")
    return slots, slot_size


def check_queue_pairs(pairs: int) -> int:
    """`max_virtqueue_pairs` as a device names it. SpecViolation: outside 1..0x8000 (5.1.4.1)."""
    if not 1 <= pairs <= MAX_QUEUE_PAIRS:
        raise SpecViolation(f"the device's max_virtqueue_pairs {pairs} is outside 1..{MAX_QUEUE_PAIRS}", "5.1.4.1")
    return pairs


def receive_buffer_size(features: Features, mtu: int) -> int:
    """Bytes that a driver's receive buffer has at least (5.1.6.3.1), header included; 1 with MRG_RXBUF, where any will do."""
    if NetFeature.MRG_RXBUF in features:
        return 1
    frame = MAX_FRAME if features & GUEST_OFFLOADS else max(ETHERNET_FRAME, mtu + 14 + 4)
    return net_header_size(features) + frame


_HEADER_FIELDS: Final = (
    *(("flags", "u1"), ("gso_type", "u1"), ("hdr_len", "<u2"), ("gso_size", "<u2"), ("csum_start", "<u2"), ("csum_offset", "<u2")),
    *(("num_buffers", "<u2"), ("hash_value", "<u4"), ("hash_report", "<u2"), ("padding_reserved", "<u2")),
    *(("outer_th_offset", "<u2"), ("inner_nh_offset", "<u2"), ("outer_nh_offset", "<u2"), ("padding_reserved_2", "V6")),
)


def header_dtype(features: Iterable[int]) -> np.dtype[np.void]:
    """The header as a numpy structured type, of the size that these features give it (5.1.6)."""
    import numpy as np

    whole = np.dtype(list(_HEADER_FIELDS))
    size = net_header_size(Features(features))
    names = [name for name, _ in _HEADER_FIELDS if whole.fields is not None and whole.fields[name][1] < size]
    return np.dtype([(name, kind) for name, kind in _HEADER_FIELDS if name in names])


def headers_of(pool: BufferPool, features: Iterable[int]) -> NDArray[np.void]:
    """A writable view of the header before each slot's frame: shape (slots,)."""
    import numpy as np

    dtype = header_dtype(features)
    whole = pool.frames.base  # the slots with their headroom
    return np.ndarray((pool.slots,), dtype, buffer=whole, offset=pool.HEADROOM - dtype.itemsize, strides=(pool.slot_size,))
