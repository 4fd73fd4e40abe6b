"""A device type of one's own: a calculator of checksums, with a feature, a configuration and two queues. Both ends, in one process.

Such a device and driver run over any transport. This one is spoken for by no specification: its type is a number that nobody has.
"""

import struct
import zlib
from collections.abc import Callable
from enum import IntEnum

from virtio import Device, DeviceQueue, Driver, MalformedMessage, StatusError, Transport
from virtio.transport.loopback import LoopbackTransport

DEVICE_ID = 60
CONFIG = struct.Struct("<I")  # the longest request, in bytes
LONGEST = 4096


class ChecksumFeature(IntEnum):
    """The type's own bits count from 0."""

    ADLER = 0


class ChecksumDevice(Device):
    """Answers each request on `crcq` (and on `adlerq`, if ADLER was accepted) with four bytes."""

    device_id = DEVICE_ID
    queues = ("crcq", "adlerq")
    features = (ChecksumFeature.ADLER,)
    config = CONFIG.pack(LONGEST)

    def on_crcq(self, queue: DeviceQueue) -> None:
        self.answer(queue, zlib.crc32)

    def on_adlerq(self, queue: DeviceQueue) -> None:
        if ChecksumFeature.ADLER not in self.accepted:
            raise MalformedMessage("a request on adlerq, but ADLER was not accepted", "checksum device")
        self.answer(queue, zlib.adler32)

    def answer(self, queue: DeviceQueue, checksum: Callable[[bytes], int]) -> None:
        for chain in queue.pop(limit=64):
            if chain.readable > LONGEST or chain.writable < 4:
                raise MalformedMessage(f"a request of {chain.readable} bytes with {chain.writable} for the answer", "checksum device")
            queue.complete(chain, chain.write(struct.pack("<I", checksum(chain.read()))))
        queue.publish()


class ChecksumDriver(Driver):
    """`checksum.crc(data)` and `checksum.adler(data)`."""

    device_id = DEVICE_ID

    def __init__(self, transport: Transport) -> None:
        super().__init__(transport)
        with self.initializing():
            self.negotiate(wanted={ChecksumFeature.ADLER})
            (self.longest,) = CONFIG.unpack(self.read_config(0, CONFIG.size))
            self.request = self.memory.allocate(self.longest)
            self.response = self.memory.allocate(4)
            self.crcq = self.setup_queue(0, size=4)
            self.adlerq = self.setup_queue(1, size=4)
            self.driver_ok()

    def crc(self, data: bytes) -> int:
        return self.ask(0, data)

    def adler(self, data: bytes) -> int:
        return self.ask(1, data)

    def ask(self, index: int, data: bytes) -> int:
        if not 0 < len(data) <= self.longest:
            raise ValueError(f"{len(data)} bytes are outside 1..{self.longest}")
        queue = self.queues[index]
        if queue.outstanding:  # an earlier request that ran out of time: its buffers are still the device's
            raise StatusError("the device has not answered the last request")
        self.memory.write(self.request, data)
        queue.add(data, readable=[(self.address + self.request, len(data))], writable=[(self.address + self.response, 4)])
        queue.publish()
        used = self.wait_used(queue, timeout=5.0)
        if not used:
            raise TimeoutError("no answer within 5 seconds")
        token, length = used[0]
        if length < 4:
            raise MalformedMessage(f"an answer of {length} bytes to {token!r}", "checksum device")
        return int.from_bytes(self.memory.read(self.response, 4), "little")


def main() -> None:
    with LoopbackTransport(ChecksumDevice()) as transport, ChecksumDriver(transport) as checksum:
        text = b"a device type of one's own"
        print(f"crc32   {checksum.crc(text):08x}")
        print(f"adler32 {checksum.adler(text):08x}")


if __name__ == "__main__":
    main()
