"""The registers of an emulated function: common configuration and device configuration, over a `Device` (4.1.4.3, 4.1.4.6)."""

from contextlib import suppress
from typing import Final

from virtio._core import EventFd
from virtio.device import Device
from virtio.errors import StatusError
from virtio.features import Features
from virtio.pci.config import CONFIG, NO_VECTOR, CfgType, Common, Field, Structure
from virtio.pci.signals import Signals
from virtio.spec import Feature, Status
from virtio.transport import CARRIED

MODERN_BAR: Final = 4
"""The BAR with all of virtio's structures; a 64-bit one."""

_PAGE: Final = 0x1000
_LOW: Final = 0xFFFF_FFFF


def regions(device: Device, notify_multiplier: int) -> dict[str, Structure]:
    """Where each structure lies in the modern BAR, a page at least for each."""
    device_size = -(-max(len(device.config), 1) // _PAGE) * _PAGE
    notify_size = max(_PAGE, -(-len(device.queues) * notify_multiplier // _PAGE) * _PAGE)
    found = {
        "common": Structure(0, CfgType.COMMON, MODERN_BAR, 0, 0, _PAGE),
        "isr": Structure(0, CfgType.ISR, MODERN_BAR, 0, _PAGE, _PAGE),
        "device": Structure(0, CfgType.DEVICE, MODERN_BAR, 0, 2 * _PAGE, device_size),
        "notify": Structure(0, CfgType.NOTIFY, MODERN_BAR, 0, 2 * _PAGE + device_size, notify_size, notify_multiplier),
    }
    if not device.config:
        del found["device"]
    return found


class _Queue:
    """The registers of one queue. `doorbell` lives as long as the function."""

    def __init__(self, size: int) -> None:
        self.doorbell: Final = EventFd()
        self.reset(size)

    def reset(self, size: int) -> None:
        self.size = size
        self.areas = [0, 0, 0]


class CommonRegisters:
    """The common configuration, every register at its width; what the device refuses changes nothing."""

    def __init__(self, device: Device, signals: Signals, *, access_platform: bool) -> None:
        self._device = device
        self._signals = signals
        self.presented: Final = device.offered & (CARRIED | ({Feature.ACCESS_PLATFORM} if access_platform else set()))
        """What the device offers, less what this transport does not carry."""
        self._queues = [_Queue(device.queue_max(index)) for index in range(len(device.queues))]
        self._generation = 0
        self._generation_seen = device.config_generation
        self._zero()

    def doorbell(self, index: int) -> EventFd:
        """What the notification of a queue signals."""
        return self._queues[index].doorbell

    def reset(self) -> None:
        """Resets the device (2.4.1), and all registers with it."""
        self._device.reset()
        self._zero()
        for index, queue in enumerate(self._queues):
            queue.reset(self._device.queue_max(index))
        self._signals.reset()

    def close(self) -> None:
        """Closes the doorbells."""
        for queue in self._queues:
            queue.doorbell.close()

    def read(self, offset: int, width: int) -> int:
        """Reads the register at `offset`; 0 if there is none of this width."""
        found = _register(offset, width)
        if found is None:
            return 0
        field, high = found
        value = self._value(field)
        return value >> 32 if high else value & _LOW

    def write(self, offset: int, width: int, value: int) -> None:
        """Writes the register at `offset`; nothing, if there is none of this width or it is read-only."""
        found = _register(offset, width)
        if found is not None:
            self._change(*found, value)

    def read_device(self, offset: int, width: int) -> int:
        """Reads device configuration (4.1.4.6), at any width; what lies behind its end reads 0."""
        config = self._device.config
        return int.from_bytes(bytes(config[offset : offset + width]), "little")

    def write_device(self, offset: int, width: int, value: int) -> None:
        """Writes device configuration, if the device takes it."""
        with suppress(StatusError, ValueError):
            self._device.write_config(offset, value.to_bytes(width, "little"))

    def _zero(self) -> None:
        self._device_select = self._driver_select = self._queue_select = 0

    def _value(self, field: Field) -> int:
        match field:
            case Common.DEVICE_FEATURE_SELECT:
                return self._device_select
            case Common.DEVICE_FEATURE:
                return self._word(self.presented, self._device_select)
            case Common.DRIVER_FEATURE_SELECT:
                return self._driver_select
            case Common.DRIVER_FEATURE:
                return self._word(self._device.accepted, self._driver_select)
            case Common.CONFIG_MSIX_VECTOR:
                return self._signals.vector(CONFIG)
            case Common.NUM_QUEUES:
                return len(self._queues)
            case Common.DEVICE_STATUS:
                return int(self._device.status)
            case Common.CONFIG_GENERATION:
                # One step for however many changes since it was last read: 8 bits cannot come round unseen (4.1.4.3.1).
                if (now := self._device.config_generation) != self._generation_seen:
                    self._generation_seen = now
                    self._generation = (self._generation + 1) & 0xFF
                return self._generation
            case Common.QUEUE_SELECT:
                return self._queue_select
        if (queue := self._selected()) is None:
            return 0
        match field:
            case Common.QUEUE_SIZE:
                return queue.size
            case Common.QUEUE_MSIX_VECTOR:
                return self._signals.vector(self._queue_select)
            case Common.QUEUE_ENABLE:
                return int(self._enabled())
            case Common.QUEUE_NOTIFY_OFF:
                return self._queue_select
            case Common.QUEUE_DESC | Common.QUEUE_DRIVER | Common.QUEUE_DEVICE:
                return queue.areas[_AREAS.index(field)]
        return 0  # queue_reset: it is over when the write returns

    def _change(self, field: Field, high: bool, value: int) -> None:
        match field:
            case Common.DEVICE_FEATURE_SELECT:
                self._device_select = value
            case Common.DRIVER_FEATURE_SELECT:
                self._driver_select = value
            case Common.DRIVER_FEATURE if self._driver_select < 4:
                words = list(self._device.accepted.words)
                words[self._driver_select] = value
                with suppress(StatusError):
                    self._device.accept(Features.from_words(words))
            case Common.CONFIG_MSIX_VECTOR:
                self._signals.map(CONFIG, value)
            case Common.DEVICE_STATUS:
                self._write_status(value)
            case Common.QUEUE_SELECT:
                self._queue_select = value
            case _:
                self._change_queue(field, high, value)

    def _change_queue(self, field: Field, high: bool, value: int) -> None:
        index = self._queue_select
        if (queue := self._selected()) is None:
            return
        if field == Common.QUEUE_MSIX_VECTOR:
            self._signals.map(index, value)
        elif field == Common.QUEUE_RESET and value == 1:
            with suppress(StatusError):
                self._device.reset_queue(index)
                queue.reset(self._device.queue_max(index))
                self._signals.map(index, NO_VECTOR)
        elif self._enabled():
            return  # size and areas stay as they are (device-03)
        elif field == Common.QUEUE_SIZE:
            packed = Feature.RING_PACKED in self._device.accepted
            if 1 <= value <= self._device.queue_max(index) and (packed or not value & value - 1):
                queue.size = value
        elif field in _AREAS:
            place, before = _AREAS.index(field), queue.areas[_AREAS.index(field)]
            queue.areas[place] = before & _LOW | value << 32 if high else before & ~_LOW | value
        elif field == Common.QUEUE_ENABLE and value == 1:
            descriptor, driver, device = queue.areas
            interrupt = self._signals.route(index)
            with suppress(StatusError, ValueError):
                self._device.setup_queue(index, queue.size, (descriptor, driver, device), doorbell=queue.doorbell, interrupt=interrupt)

    def _write_status(self, value: int) -> None:
        if value == 0:
            self.reset()
            return
        if value & Status.FEATURES_OK and self._device.accepted - self.presented:
            value &= ~Status.FEATURES_OK  # what was not offered here does not stick (device-04)
        with suppress(StatusError, ValueError):
            self._device.write_status(value)

    def _selected(self) -> _Queue | None:
        return self._queues[self._queue_select] if self._queue_select < len(self._queues) else None

    def _enabled(self) -> bool:
        return self._device.queue(self._queue_select) is not None

    @staticmethod
    def _word(features: Features, select: int) -> int:
        return features.words[select] if select < 4 else 0


_AREAS: Final = (Common.QUEUE_DESC, Common.QUEUE_DRIVER, Common.QUEUE_DEVICE)
_FIELDS: Final = {field.offset: field for field in vars(Common).values() if isinstance(field, Field)}


def _register(offset: int, width: int) -> tuple[Field, bool] | None:
    """The register that an access of `width` bytes at `offset` is, and whether it is the high half of a 64-bit one."""
    field = _FIELDS.get(offset)
    if field is not None and min(field.width, 4) == width:
        return field, False
    field = _FIELDS.get(offset - 4)
    if field is not None and field.width == 8 and width == 4:
        return field, True
    return None
