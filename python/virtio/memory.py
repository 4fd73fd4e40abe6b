"""Memory that the two ends share: a driver's `Memory`, and a device's view of what it may reach, `GuestMemory`. Both are the core's."""

from virtio._core import GuestMemory, Memory

__all__ = ["GuestMemory", "Memory"]
