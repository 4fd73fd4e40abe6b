"""Configuration space as bytes: its registers, the capability list, and where the capabilities say that virtio's structures are (4.1.4).

Pure code: bytes in, values out. What a device says here is checked as driver-08 in docs/invariants.md tells. Numbers are offsets in bytes
unless they say otherwise.
"""

from collections.abc import Iterator, Mapping
from enum import IntEnum
from struct import unpack_from
from typing import Final, NamedTuple

from virtio.errors import TransportError
from virtio.pci.function import Bar

# The header of type 0 (PCI Local Bus Specification 3.0, 6.1).

VENDOR_ID: Final = 0x00
DEVICE_ID: Final = 0x02
COMMAND: Final = 0x04
STATUS: Final = 0x06
REVISION: Final = 0x08
CLASS_CODE: Final = 0x09
"""Three bytes: programming interface, subclass, class."""
HEADER_TYPE: Final = 0x0E
BAR_0: Final = 0x10
SUBSYSTEM_VENDOR_ID: Final = 0x2C
SUBSYSTEM_ID: Final = 0x2E
CAPABILITIES: Final = 0x34
INTERRUPT_LINE: Final = 0x3C
INTERRUPT_PIN: Final = 0x3D

HEADER_SIZE: Final = 0x40
SPACE_SIZE: Final = 256
"""Bytes of configuration space in which the capability list lies."""
EXTENDED_SIZE: Final = 4096
BARS: Final = 6

COMMAND_IO: Final = 1 << 0
COMMAND_MEMORY: Final = 1 << 1
COMMAND_MASTER: Final = 1 << 2
COMMAND_INTX_DISABLE: Final = 1 << 10
STATUS_INTERRUPT: Final = 1 << 3
STATUS_CAPABILITIES: Final = 1 << 4

CAP_VENDOR: Final = 0x09
CAP_MSIX: Final = 0x11

MSIX_CAP_SIZE: Final = 12
MSIX_ENABLE: Final = 1 << 15
MSIX_FUNCTION_MASK: Final = 1 << 14
MSIX_TABLE_SIZE: Final = 0x7FF
"""Mask of message control: the number of vectors less 1."""
MSIX_ENTRY_SIZE: Final = 16
"""Bytes of a table entry: address (8), data (4), vector control (4), whose bit 0 masks the vector."""

# Virtio's own (4.1.2, 4.1.4).

VENDOR: Final = 0x1AF4
FIRST_MODERN: Final = 0x1040
"""PCI device id of device type 0; types go up to 0x107f (4.1.2.1)."""
FIRST_TRANSITIONAL: Final = 0x1000
"""First PCI device id of transitional devices, whose subsystem id is their type."""
END_OF_IDS: Final = 0x1080
NO_VECTOR: Final = 0xFFFF
"""What a vector register reads as that no vector is mapped to (4.1.5.1.2)."""
ISR_QUEUE: Final = 1 << 0
ISR_CONFIG: Final = 1 << 1
CONFIG: Final = -1
"""Stands for configuration changes where sources of notifications are told apart; queues are sources by their index."""


class CfgType(IntEnum):
    """Which structure a capability locates (4.1.4). Other values are reserved."""

    COMMON = 1
    NOTIFY = 2
    ISR = 3
    DEVICE = 4
    PCI = 5
    SHARED_MEMORY = 8
    VENDOR = 9


CAP_SIZE: Final = {
    CfgType.COMMON: 16,
    CfgType.NOTIFY: 20,
    CfgType.ISR: 16,
    CfgType.DEVICE: 16,
    CfgType.PCI: 20,
    CfgType.SHARED_MEMORY: 24,
}
"""Bytes that a capability of each type has at least."""

_ALIGNMENT: Final = {CfgType.COMMON: 4, CfgType.NOTIFY: 2, CfgType.ISR: 1, CfgType.DEVICE: 4}


class Field(NamedTuple):
    """A register of the common configuration: where it is, and its width in bytes (8 is two of 4)."""

    offset: int
    width: int


class Common:
    """The common configuration structure (4.1.4.3)."""

    DEVICE_FEATURE_SELECT: Final = Field(0, 4)
    DEVICE_FEATURE: Final = Field(4, 4)
    DRIVER_FEATURE_SELECT: Final = Field(8, 4)
    DRIVER_FEATURE: Final = Field(12, 4)
    CONFIG_MSIX_VECTOR: Final = Field(16, 2)
    NUM_QUEUES: Final = Field(18, 2)
    DEVICE_STATUS: Final = Field(20, 1)
    CONFIG_GENERATION: Final = Field(21, 1)
    QUEUE_SELECT: Final = Field(22, 2)
    QUEUE_SIZE: Final = Field(24, 2)
    QUEUE_MSIX_VECTOR: Final = Field(26, 2)
    QUEUE_ENABLE: Final = Field(28, 2)
    QUEUE_NOTIFY_OFF: Final = Field(30, 2)
    QUEUE_DESC: Final = Field(32, 8)
    QUEUE_DRIVER: Final = Field(40, 8)
    QUEUE_DEVICE: Final = Field(48, 8)
    QUEUE_NOTIF_CONFIG_DATA: Final = Field(56, 2)
    QUEUE_RESET: Final = Field(58, 2)
    ADMIN_QUEUE_INDEX: Final = Field(60, 2)
    ADMIN_QUEUE_NUM: Final = Field(62, 2)


COMMON_SIZE: Final = 56
"""Bytes of the common configuration that every device has; RING_RESET needs those up to `queue_reset` as well."""


class Capability(NamedTuple):
    """One element of the capability list: where it stands, its id, and its bytes up to the end of configuration space."""

    place: int
    id: int
    body: bytes


class Msix(NamedTuple):
    """The MSI-X capability at `place`: how many vectors, and where table and pending bits are."""

    place: int
    size: int
    table_bar: int
    table_offset: int
    pending_bar: int
    pending_offset: int


class Structure(NamedTuple):
    """A virtio structure: `length` bytes at `offset` in BAR `bar`. `multiplier` is the notification structure's (4.1.4.4)."""

    place: int
    cfg_type: int
    bar: int
    id: int
    offset: int
    length: int
    multiplier: int = 0


class Layout(NamedTuple):
    """What a driver uses of a virtio device's capabilities: the first usable one of each type, and why others were passed over."""

    common: Structure
    notify: Structure
    isr: Structure
    device: Structure | None
    pci_cfg: int | None
    """Place of the capability that is a window into BARs (4.1.4.9)."""
    shared_memory: dict[int, Structure]
    """Shared memory regions by id (4.1.4.7)."""
    msix: Msix | None
    skipped: list[str]


def _number(space: bytes, format: str, offset: int) -> int:
    (value,) = unpack_from(format, space, offset)
    return int(value)


def device_type(space: bytes) -> int:
    """The virtio device type of a function with this configuration space (4.1.2).

    TransportError: there is no function, it is none of virtio's, or its header is not of type 0.
    """
    vendor, device = _number(space, "<H", VENDOR_ID), _number(space, "<H", DEVICE_ID)
    if vendor == 0xFFFF:
        raise TransportError("configuration space reads as all ones: there is no function, or it is gone")
    if vendor != VENDOR or not FIRST_TRANSITIONAL <= device < END_OF_IDS:
        raise TransportError(
            f"PCI function {vendor:04x}:{device:04x} is not a virtio device: those are {VENDOR:04x}:{FIRST_TRANSITIONAL:04x} to "
            f"{VENDOR:04x}:{END_OF_IDS - 1:04x} (4.1.2)"
        )
    if (header := space[HEADER_TYPE] & 0x7F) != 0:
        raise TransportError(f"PCI header type is {header}, which no virtio device has: 0 expected")
    if device >= FIRST_MODERN:
        return device - FIRST_MODERN
    return _number(space, "<H", SUBSYSTEM_ID)


def capabilities(space: bytes) -> Iterator[Capability]:
    """The capability list, in its order. TransportError: it loops, or leads into the header."""
    if not _number(space, "<H", STATUS) & STATUS_CAPABILITIES:
        return
    seen: set[int] = set()
    place = space[CAPABILITIES] & ~3  # the two low bits are reserved
    while place:
        if place < HEADER_SIZE:
            raise TransportError(f"the capability list leads to {place:#x}, into the header")
        if place in seen:
            raise TransportError(f"the capability list loops at {place:#x} after {len(seen)} capabilities")
        seen.add(place)
        yield Capability(place, space[place], space[place:SPACE_SIZE])
        place = space[place + 1] & ~3


def parse_msix(capability: Capability, bars: Mapping[int, Bar]) -> Msix:
    """Reads an MSI-X capability. ValueError: table or pending bits lie outside a BAR that decodes."""
    if len(capability.body) < MSIX_CAP_SIZE:
        raise ValueError("it runs out of configuration space")
    control, table, pending = unpack_from("<HII", capability.body, 2)
    size = (control & MSIX_TABLE_SIZE) + 1
    for what, where, length in (("table", table, size * MSIX_ENTRY_SIZE), ("pending bits", pending, (size + 63) // 64 * 8)):
        _check_place(what, where & 7, where & ~7, length, bars)
    return Msix(capability.place, size, table & 7, table & ~7, pending & 7, pending & ~7)


def parse_structure(capability: Capability, bars: Mapping[int, Bar]) -> Structure | None:
    """Reads a virtio capability; None if its type or BAR number is reserved, or it locates nothing. ValueError: it cannot be true."""
    body = capability.body
    if len(body) < 4:
        raise ValueError("it runs out of configuration space")
    length = body[2]
    if body[3] not in CAP_SIZE:
        return None
    cfg_type = CfgType(body[3])
    if length < CAP_SIZE[cfg_type]:
        raise ValueError(f"cap_len is {length}, less than {CAP_SIZE[cfg_type]} (4.1.4)")
    if length > len(body):
        raise ValueError(f"cap_len is {length}, but configuration space ends after {len(body)} bytes")
    bar, identity, offset, size = unpack_from("<BB2xII", body, 4)
    if cfg_type is CfgType.PCI:
        return Structure(capability.place, cfg_type, bar, identity, offset, size)
    if bar >= BARS:
        return None
    multiplier = 0
    if cfg_type is CfgType.NOTIFY:
        multiplier = _number(body, "<I", 16)
        if multiplier == 1 or multiplier & multiplier - 1:
            raise ValueError(f"notify_off_multiplier {multiplier} is neither 0 nor an even power of 2 (4.1.4.4.1)")
    if cfg_type is CfgType.SHARED_MEMORY:
        high_offset, high_size = unpack_from("<II", body, 16)
        offset, size = offset | high_offset << 32, size | high_size << 32
    if offset % (alignment := _ALIGNMENT.get(cfg_type, 1)):
        raise ValueError(f"offset {offset:#x} is not a multiple of {alignment}")
    least = {CfgType.COMMON: COMMON_SIZE, CfgType.NOTIFY: 2}.get(cfg_type, 1)
    if size < least:
        raise ValueError(f"length is {size}, less than {least}")
    _check_place("structure", bar, offset, size, bars)
    return Structure(capability.place, cfg_type, bar, identity, offset, size, multiplier)


def parse(space: bytes, bars: Mapping[int, Bar]) -> Layout:
    """Where everything is, by the capability list of a virtio device with these BARs.

    What cannot be used is passed over, as reserved types and BAR numbers are (4.1.4.1). TransportError: common configuration,
    notification or ISR structure is missing then (a legacy device, if there is no virtio capability at all), or the list is broken.
    """
    first: dict[CfgType, Structure] = {}
    shared: dict[int, Structure] = {}
    skipped: list[str] = []
    msix: Msix | None = None
    virtio = False
    for capability in capabilities(space):
        try:
            if capability.id == CAP_MSIX and msix is None:
                msix = parse_msix(capability, bars)
            if capability.id != CAP_VENDOR:
                continue
            virtio = True
            structure = parse_structure(capability, bars)
        except ValueError as reason:
            skipped.append(f"capability {capability.id:#x} at {capability.place:#x}: {reason}")
            continue
        if structure is None:
            skipped.append(f"capability {capability.id:#x} at {capability.place:#x}: of a reserved type or BAR, or not a location")
        elif structure.cfg_type == CfgType.SHARED_MEMORY:
            shared.setdefault(structure.id, structure)
        else:
            first.setdefault(CfgType(structure.cfg_type), structure)
    if not virtio:
        raise TransportError("the function has no virtio capability: a legacy device, which is not supported (4.1.5.1.1.1)")
    needed = (CfgType.COMMON, CfgType.NOTIFY, CfgType.ISR)
    if missing := [kind.name for kind in needed if kind not in first]:
        why = "; ".join(skipped) or "none is in the list"
        raise TransportError(f"no usable {', '.join(missing)} structure (4.1.4): {why}")
    window = first.get(CfgType.PCI)
    common, notify, isr = (first[kind] for kind in needed)
    return Layout(common, notify, isr, first.get(CfgType.DEVICE), None if window is None else window.place, shared, msix, skipped)


def _check_place(what: str, bar: int, offset: int, length: int, bars: Mapping[int, Bar]) -> None:
    """ValueError: it does not lie within a BAR that decodes."""
    if bar not in bars:
        raise ValueError(f"its {what} is in BAR {bar}, which has no address")
    if offset + length > bars[bar].size:
        raise ValueError(f"its {what} is {length} bytes at {offset:#x} in BAR {bar}, which has {bars[bar].size}")
