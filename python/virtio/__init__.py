"""Both ends of a virtqueue, in both ring formats: drivers, devices, and the memory between them (VIRTIO 1.4).

Names are imported when they are first used: `import virtio` alone loads neither the Rust core nor numpy. Device types are in
`virtio.devices`, transports in `virtio.transport`, hand-written rings for tests in `virtio.testing`.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from virtio._core import Chain, ChainBatch, DeviceQueue, DriverQueue, EventFd, __version__, layout, need_event
    from virtio.device import Device
    from virtio.devices.net import NetDevice, NetDriver
    from virtio.devices.net_header import NetFeature
    from virtio.driver import Driver
    from virtio.errors import (
        BadUsedElement,
        DeviceNeedsReset,
        FeatureNegotiationError,
        MalformedChain,
        MalformedMessage,
        QueueFull,
        SpecViolation,
        StatusError,
        TransportError,
        VirtioError,
    )
    from virtio.features import Features, Requires
    from virtio.memory import GuestMemory, Memory
    from virtio.pool import BufferPool, Burst
    from virtio.port import Port
    from virtio.spec import DeviceId, Feature, Status
    from virtio.transport import Transport

__all__ = [
    "BadUsedElement",
    "BufferPool",
    "Burst",
    "Chain",
    "ChainBatch",
    "Device",
    "DeviceId",
    "DeviceNeedsReset",
    "DeviceQueue",
    "Driver",
    "DriverQueue",
    "EventFd",
    "Feature",
    "FeatureNegotiationError",
    "Features",
    "GuestMemory",
    "MalformedChain",
    "MalformedMessage",
    "Memory",
    "NetDevice",
    "NetDriver",
    "NetFeature",
    "Port",
    "QueueFull",
    "Requires",
    "SpecViolation",
    "Status",
    "StatusError",
    "Transport",
    "TransportError",
    "VirtioError",
    "__version__",
    "layout",
    "need_event",
]

if not TYPE_CHECKING:  # a type checker is to see the names above, and no others
    _HOMES = {
        "virtio._core": ("Chain", "ChainBatch", "DeviceQueue", "DriverQueue", "EventFd", "__version__", "layout", "need_event"),
        "virtio.device": ("Device",),
        "virtio.devices.net": ("NetDevice", "NetDriver"),
        "virtio.devices.net_header": ("NetFeature",),
        "virtio.driver": ("Driver",),
        "virtio.features": ("Features", "Requires"),
        "virtio.memory": ("GuestMemory", "Memory"),
        "virtio.pool": ("BufferPool", "Burst"),
        "virtio.port": ("Port",),
        "virtio.spec": ("DeviceId", "Feature", "Status"),
        "virtio.transport": ("Transport",),
    }
    _HOME = {name: module for module, names in _HOMES.items() for name in names}

    def __getattr__(name):
        if name not in __all__:
            raise AttributeError(f"module 'virtio' has no attribute {name!r}")
        value = getattr(import_module(_HOME.get(name, "virtio.errors")), name)
        globals()[name] = value
        return value

    def __dir__():
        return sorted({*globals(), *__all__})
