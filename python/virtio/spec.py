"""The numbers of VIRTIO 1.4 (CS01) that Python needs: device types, status and feature bits, the rings' flags and layouts.

Names are the specification's with their prefix dropped; section numbers stand beside them. The rings themselves run in Rust, which spells
its own numbers: `tests/test_features.py` compares the two.
"""

from enum import IntEnum, IntFlag


class DeviceId(IntEnum):
    """Device types (5). Those without a section of their own there are reserved names only."""

    NETWORK = 1
    BLOCK = 2
    CONSOLE = 3
    ENTROPY = 4
    TRADITIONAL_BALLOON = 5
    IO_MEMORY = 6
    RPMSG = 7
    SCSI_HOST = 8
    TRANSPORT_9P = 9
    MAC80211_WLAN = 10
    RPROC_SERIAL = 11
    CAIF = 12
    MEMORY_BALLOON = 13
    GPU = 16
    RTC = 17
    INPUT = 18
    SOCKET = 19
    CRYPTO = 20
    SIGNAL_DISTRIBUTION_MODULE = 21
    PSTORE = 22
    IOMMU = 23
    MEMORY = 24
    SOUND = 25
    FILE_SYSTEM = 26
    PMEM = 27
    RPMB = 28
    MAC80211_HWSIM = 29
    VIDEO_ENCODER = 30
    VIDEO_DECODER = 31
    SCMI = 32
    NITRO_SECURE_MODULE = 33
    I2C_ADAPTER = 34
    WATCHDOG = 35
    CAN = 36
    PARAMETER_SERVER = 38
    AUDIO_POLICY = 39
    BLUETOOTH = 40
    GPIO = 41
    RDMA = 42
    CAMERA = 43
    ISM = 44
    SPI_CONTROLLER = 45
    TEE = 46
    CPU_BALLOON = 47
    MEDIA = 48
    USB_CONTROLLER = 49


class Status(IntFlag):
    """Bits of the device status field (2.1)."""

    ACKNOWLEDGE = 1
    DRIVER = 2
    DRIVER_OK = 4
    FEATURES_OK = 8
    SUSPEND = 16
    NEEDS_RESET = 64
    FAILED = 128


class Feature(IntEnum):
    """Bit numbers of the device-independent features (6). Bits 0-23, 41, 42 and 50-127 are the device type's own (2.2)."""

    NOTIFY_ON_EMPTY = 24
    """Legacy interface only (6.3)."""
    ANY_LAYOUT = 27
    """Legacy interface only (6.3)."""
    INDIRECT_DESC = 28
    EVENT_IDX = 29
    VERSION_1 = 32
    ACCESS_PLATFORM = 33
    RING_PACKED = 34
    IN_ORDER = 35
    ORDER_PLATFORM = 36
    SR_IOV = 37
    NOTIFICATION_DATA = 38
    NOTIF_CONFIG_DATA = 39
    RING_RESET = 40
    ADMIN_VQ = 41
    SUSPEND = 43


FEATURE_BITS = 128
"""Width of a feature set (2.2): bits 128 and above are reserved."""

MAX_QUEUE_SIZE = 32768
"""Most descriptors that a virtqueue has, in either format (2.7, 2.8)."""

DESCRIPTOR_SIZE = 16
"""Bytes of a descriptor, split (2.7.5) and packed (2.8.13) alike."""

USED_ELEMENT_SIZE = 8
"""Bytes of an element of the split used ring (2.7.8)."""

RING_HEADER_SIZE = 4
"""Bytes of flags and idx before the elements of the split avail and used rings (2.7.6, 2.7.8)."""

EVENT_SUPPRESSION_SIZE = 4
"""Bytes of the packed driver or device area (2.8.14)."""

SPLIT_ALIGNMENT = (16, 2, 4)
"""Alignment in bytes of the descriptor, driver and device area of a split virtqueue (2.7)."""

PACKED_ALIGNMENT = (16, 4, 4)
"""Alignment in bytes of the descriptor, driver and device area of a packed virtqueue (2.8.10.1)."""


class DescriptorFlag(IntFlag):
    """Flags of a descriptor: 2.7.5 for both formats; AVAIL and USED only in packed ones (2.8.1)."""

    NEXT = 1
    WRITE = 2
    INDIRECT = 4
    AVAIL = 1 << 7
    USED = 1 << 15


class AvailFlag(IntFlag):
    """Flags of the split avail ring, written by the driver (2.7.6)."""

    NO_INTERRUPT = 1


class UsedFlag(IntFlag):
    """Flags of the split used ring, written by the device (2.7.8)."""

    NO_NOTIFY = 1


class RingEvent(IntEnum):
    """Flags of a packed event suppression structure (2.8.10); 3 is reserved."""

    ENABLE = 0
    DISABLE = 1
    DESC = 2
