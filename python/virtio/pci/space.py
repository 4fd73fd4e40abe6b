"""The configuration space of an emulated function: 4 KiB of bytes, of which some bits can be written."""

from collections.abc import Mapping
from struct import pack_into, unpack_from
from typing import Final

from virtio.pci.config import (
    BAR_0,
    CAP_MSIX,
    CAP_SIZE,
    CAP_VENDOR,
    CAPABILITIES,
    COMMAND,
    COMMAND_INTX_DISABLE,
    COMMAND_MASTER,
    COMMAND_MEMORY,
    DEVICE_ID,
    EXTENDED_SIZE,
    FIRST_MODERN,
    HEADER_SIZE,
    INTERRUPT_LINE,
    INTERRUPT_PIN,
    MSIX_CAP_SIZE,
    MSIX_ENABLE,
    MSIX_ENTRY_SIZE,
    MSIX_FUNCTION_MASK,
    REVISION,
    STATUS,
    STATUS_CAPABILITIES,
    STATUS_INTERRUPT,
    SUBSYSTEM_ID,
    SUBSYSTEM_VENDOR_ID,
    VENDOR,
    VENDOR_ID,
    CfgType,
    Structure,
)
from virtio.pci.function import Bar
from virtio.spec import DeviceId

MSIX_BAR: Final = 1
"""The BAR with the MSI-X table and its pending bits; a 32-bit one."""

_MSIX_ADDRESS: Final = 0xFEBC_0000
_MODERN_ADDRESS: Final = 0x80_0000_0000
_MEMORY_64_PREFETCHABLE: Final = 0b1100
_SUBSYSTEM: Final = 0x1100

TRANSITIONAL_IDS: Final[dict[int, int]] = {
    DeviceId.NETWORK: 0x1000,
    DeviceId.BLOCK: 0x1001,
    DeviceId.TRADITIONAL_BALLOON: 0x1002,
    DeviceId.CONSOLE: 0x1003,
    DeviceId.SCSI_HOST: 0x1004,
    DeviceId.ENTROPY: 0x1005,
    DeviceId.TRANSPORT_9P: 0x1009,
}
"""PCI device ids of transitional devices (4.1.2)."""

CLASSES: Final[dict[int, int]] = {
    DeviceId.NETWORK: 0x020000,
    DeviceId.BLOCK: 0x018000,
    DeviceId.CONSOLE: 0x078000,
    DeviceId.SCSI_HOST: 0x010000,
}
"""PCI class codes by device type; others are 0x00ff00, of no class."""


class ConfigSpace:
    """Header, BARs and capabilities of a virtio function whose structures lie in `regions` of one 64-bit BAR."""

    def __init__(self, device_type: int, regions: Mapping[str, Structure], vectors: int, *, pin: bool, transitional: bool) -> None:
        """ValueError: the type has no transitional id."""
        if transitional and device_type not in TRANSITIONAL_IDS:
            raise ValueError(f"device type {device_type} has no transitional PCI id (4.1.2)")
        self._bytes = bytearray(EXTENDED_SIZE)
        self._writable = bytearray(EXTENDED_SIZE)
        self.sizes: Final[dict[int, int]] = {}
        """Sizes of the BARs."""
        self._put(VENDOR_ID, "<H", VENDOR)
        self._put(DEVICE_ID, "<H", TRANSITIONAL_IDS[device_type] if transitional else FIRST_MODERN + device_type)
        self._put(COMMAND, "<H", COMMAND_MEMORY, writable=COMMAND_MEMORY | COMMAND_MASTER | COMMAND_INTX_DISABLE)
        self._put(STATUS, "<H", STATUS_CAPABILITIES)
        self._put(REVISION, "<I", CLASSES.get(device_type, 0x00FF00) << 8 | (0 if transitional else 1))
        self._put(SUBSYSTEM_VENDOR_ID, "<H", VENDOR)
        self._put(SUBSYSTEM_ID, "<H", device_type if transitional else _SUBSYSTEM)
        self._put(INTERRUPT_LINE, "B", 0, writable=0xFF)
        self._put(INTERRUPT_PIN, "B", int(pin))
        self.pending_offset: Final = max(0x800, _power(vectors * MSIX_ENTRY_SIZE))
        """Where the pending bits begin in the MSI-X BAR."""
        if vectors:
            self._put_bar(MSIX_BAR, _MSIX_ADDRESS, 2 * self.pending_offset, 0)
        end = max(region.offset + region.length for region in regions.values())
        (modern,) = {region.bar for region in regions.values()}
        self._put_bar(modern, _MODERN_ADDRESS, _power(end), _MEMORY_64_PREFETCHABLE)
        self._msix: int | None = None
        self._next = HEADER_SIZE
        self._link = CAPABILITIES
        for region in regions.values():
            place = self._put_structure(region)
            if region.cfg_type == CfgType.NOTIFY:
                self._put(place + 16, "<I", region.multiplier)
        self._window = self._put_structure(Structure(0, CfgType.PCI, 0, 0, 0, 0))
        for offset, format, mask in ((4, "B", 0xFF), (8, "<I", 0xFFFF_FFFF), (12, "<I", 0xFFFF_FFFF), (16, "<I", 0xFFFF_FFFF)):
            self._put(self._window + offset, format, 0, writable=mask)
        if vectors:
            self._msix = self._put_capability(CAP_MSIX, MSIX_CAP_SIZE)
            self._put(self._msix + 2, "<H", vectors - 1, writable=MSIX_ENABLE | MSIX_FUNCTION_MASK)
            self._put(self._msix + 4, "<I", MSIX_BAR)
            self._put(self._msix + 8, "<I", self.pending_offset | MSIX_BAR)

    @property
    def command(self) -> int:
        """The command register."""
        return self._get("<H", COMMAND)

    @property
    def msix_control(self) -> int:
        """Message control of the MSI-X capability, 0 without."""
        return 0 if self._msix is None else self._get("<H", self._msix + 2)

    @property
    def intx_enabled(self) -> bool:
        """Whether the pin may be used: neither disabled nor replaced by MSI-X."""
        return not self.command & COMMAND_INTX_DISABLE and not self.msix_control & MSIX_ENABLE

    def bars(self) -> dict[int, Bar]:
        """The BARs, while they are enabled, as their registers are now."""
        found: dict[int, Bar] = {}
        for index, size in self.sizes.items() if self.command & COMMAND_MEMORY else ():
            register = self._get("<I", BAR_0 + 4 * index)
            wide = bool(register & 0b100)
            high = self._get("<I", BAR_0 + 4 * index + 4) if wide else 0
            found[index] = Bar(index, high << 32 | register & ~0xF, size, "memory64" if wide else "memory32", bool(register & 8))
        return found

    def read(self, offset: int, width: int, *, interrupt: bool) -> int:
        """Reads a register; `interrupt` is Interrupt Status. ValueError: unaligned, or outside configuration space."""
        self._check(offset, width)
        value = int.from_bytes(self._bytes[offset : offset + width], "little")
        if interrupt and offset <= STATUS < offset + width:
            value |= STATUS_INTERRUPT << 8 * (STATUS - offset)
        return value

    def write(self, offset: int, width: int, value: int) -> None:
        """Writes what is writable of a register. ValueError: as `read`, or a value wider than the access."""
        self._check(offset, width)
        if not 0 <= value < 1 << 8 * width:
            raise ValueError(f"value {value:#x} does not fit in {width} bytes")
        for place, byte in enumerate(value.to_bytes(width, "little"), offset):
            mask = self._writable[place]
            self._bytes[place] = self._bytes[place] & ~mask | byte & mask

    def window(self, offset: int, width: int) -> tuple[int, int, int] | None:
        """BAR, offset and length that the PCI_CFG window shows, if this access touches its data and they say something (4.1.4.9)."""
        data = self._window + 16
        if offset + width <= data or offset >= data + 4:
            return None
        length = self._get("<I", self._window + 12)
        return (self._bytes[self._window + 4], self._get("<I", self._window + 8), length) if length in (1, 2, 4) else None

    def load_window(self, length: int) -> int:
        """The first `length` bytes of the window's data."""
        return int.from_bytes(self._bytes[self._window + 16 :][:length], "little")

    def store_window(self, value: int, length: int) -> None:
        """Puts an access's result into the window's data."""
        self._bytes[self._window + 16 : self._window + 16 + length] = value.to_bytes(length, "little")

    def set_master(self) -> None:
        """Lets the function reach memory."""
        self._put(COMMAND, "<H", self.command | COMMAND_MASTER)

    def allow_intx(self, allowed: bool) -> None:
        """Sets or clears Interrupt Disable."""
        self._put(COMMAND, "<H", self.command & ~COMMAND_INTX_DISABLE | (0 if allowed else COMMAND_INTX_DISABLE))

    def set_msix_control(self, bits: int) -> None:
        """Sets enable and function mask."""
        if self._msix is not None:
            self._put(self._msix + 2, "<H", self.msix_control & ~(MSIX_ENABLE | MSIX_FUNCTION_MASK) | bits)

    def _get(self, format: str, offset: int) -> int:
        (value,) = unpack_from(format, self._bytes, offset)
        return int(value)

    def _put(self, offset: int, format: str, value: int, *, writable: int | None = None) -> None:
        pack_into(format, self._bytes, offset, value)
        if writable is not None:
            pack_into(format, self._writable, offset, writable)

    def _put_bar(self, index: int, address: int, size: int, flags: int) -> None:
        """A memory BAR: bits below its size read 0, which is what sizing by all ones finds out."""
        size = max(size, 0x1000)
        self.sizes[index] = size
        address = -(-address // size) * size
        mask = (1 << 64) - size
        self._put(BAR_0 + 4 * index, "<I", address & 0xFFFF_FFFF | flags, writable=mask & 0xFFFF_FFFF)
        if flags & 0b100:
            self._put(BAR_0 + 4 * index + 4, "<I", address >> 32, writable=mask >> 32)

    def _put_capability(self, identity: int, length: int) -> int:
        place = self._next
        self._bytes[self._link] = place
        self._bytes[place] = identity
        self._link = place + 1
        self._next = -(-(place + length) // 4) * 4
        return place

    def _put_structure(self, structure: Structure) -> int:
        length = CAP_SIZE[CfgType(structure.cfg_type)]
        place = self._put_capability(CAP_VENDOR, length)
        pack_into(
            "<BBBB2xII", self._bytes, place + 2, length, structure.cfg_type, structure.bar, structure.id, structure.offset, structure.length
        )
        return place

    @staticmethod
    def _check(offset: int, width: int) -> None:
        if width not in (1, 2, 4) or offset % width or not 0 <= offset <= EXTENDED_SIZE - width:
            raise ValueError(f"an access of {width} bytes at {offset:#x} is not in configuration space (0..{EXTENDED_SIZE}), or unaligned")


def _power(value: int) -> int:
    """The lowest power of 2 that is not below `value`."""
    return 1 << max(value - 1, 0).bit_length()
