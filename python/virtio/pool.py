"""Equal buffers in one `Memory`, and rows of them that cross to the core in one call. Both are the core's."""

from virtio._core import BufferPool, Burst

__all__ = ["BufferPool", "Burst"]
