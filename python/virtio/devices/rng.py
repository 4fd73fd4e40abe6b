"""The entropy device (5.4): one queue of buffers that it fills with random bytes. The smallest type, and the pattern of the others."""

import os
from collections.abc import Callable, Iterable
from enum import IntEnum
from typing import Final

from virtio import arguments
from virtio._core import DeviceQueue, Memory
from virtio.device import Device
from virtio.driver import RING_FEATURES, Driver
from virtio.errors import SpecViolation
from virtio.spec import DeviceId
from virtio.transport import Transport

DEVICE_ID: Final = DeviceId.ENTROPY
REQUESTQ: Final = 0
BUFFER_SIZE: Final = 4096
"""Most bytes that either end moves in one request."""
READ_LIMIT: Final = 1 << 30
"""Most bytes of one `RngDriver.read`."""


class Feature(IntEnum):
    """Feature bits of the type: none are defined (5.4.3)."""


Config = None
"""Layout of the configuration: none is defined (5.4.4)."""


class RngDriver(Driver):
    """Gets random bytes from the device: `rng.read(16)`."""

    device_id = DEVICE_ID

    def __init__(self, transport: Transport, *, memory: Memory | None = None, wanted: Iterable[int] = RING_FEATURES) -> None:
        """Initializes the device. FeatureNegotiationError, TransportError: that cannot be; the driver is then closed."""
        super().__init__(transport, memory=memory)
        with self.initializing():
            self.negotiate(wanted=wanted)
            self.buffer = self.allocate(BUFFER_SIZE)
            self.requestq = self.setup_queue(REQUESTQ, size=8)
            self.driver_ok()

    def read(self, count: int, *, timeout: float = 5.0) -> bytes:
        """`count` random bytes. ValueError: fewer than 0, or more than `READ_LIMIT`. TypeError: not an integer.

        TimeoutError: no answer within `timeout` seconds; the request stays with the device, and the next read takes its bytes.
        SpecViolation: the device used a buffer and wrote nothing into it, or broke the queue.
        """
        count = arguments.integer("count", count, 0, READ_LIMIT)
        found = bytearray()
        while len(found) < count:
            if not self.requestq.outstanding:
                self.requestq.add(None, writable=[(self.address + self.buffer, min(count - len(found), BUFFER_SIZE))])
                self.requestq.publish()
            used = self.wait_used(self.requestq, timeout)
            if not used:
                raise TimeoutError(f"no random bytes within {timeout} s")
            _, length = used[0]  # what the device says it wrote, clamped to what was posted (5.4.6.1)
            if length == 0:
                raise SpecViolation("the device used a buffer without a random byte in it", "5.4.6.2")
            found += self.memory.read(self.buffer, length)
        return bytes(found[:count])


class RngDevice(Device):
    """Fills buffers from `source`, which gives as many random bytes as it is asked for, or fewer, but at least one."""

    device_id = DEVICE_ID
    queues = ("requestq",)

    def __init__(self, source: Callable[[int], bytes] = os.urandom, *, offered: Iterable[int] | None = None) -> None:
        super().__init__(offered=offered)
        self.source = source

    def on_requestq(self, queue: DeviceQueue) -> None:
        """Answers each request with one piece. SpecViolation: there is something to read in it, or nowhere to write."""
        try:
            for chain in queue.pop(limit=64):
                if chain.readable or not chain.writable:
                    raise SpecViolation(f"a request has {chain.readable} readable and {chain.writable} writable bytes", "5.4.6.1")
                data = self.source(min(chain.writable, BUFFER_SIZE))
                if not data:
                    raise ValueError("the source of random bytes gave none")
                queue.complete(chain, chain.write(data[: chain.writable]))
        finally:
            queue.publish()
