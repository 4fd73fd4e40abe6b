"""A hostile far end of a network device: headers, lengths and buffer counts by hand, in both ring formats."""

import struct
from typing import Any

import pytest

from virtio import BufferPool, DeviceQueue, DriverQueue, Feature, Features, GuestMemory, MalformedChain, Memory, NetFeature, SpecViolation
from virtio._core import DevicePort, DriverPort, net_header_size
from virtio.devices.net import CHECKSUMS, GUEST_OFFLOADS, HOST_OFFLOADS, Config, NetDevice, NetDriver, header_dtype
from virtio.spec import DescriptorFlag
from virtio.testing import RawPackedDevice, RawPackedDriver, RawSplitDevice, RawSplitDriver
from virtio.transport.loopback import LoopbackTransport

BASE = 1 << 32
BUFFERS = 1 << 17
"""Where in the memory the raw end's buffers begin."""
ALL = GUEST_OFFLOADS | HOST_OFFLOADS | CHECKSUMS
FRAME = bytes(range(60))


def header(flags: int = 0, gso: int = 0, hdr_len: int = 0, gso_size: int = 0, start: int = 0, offset: int = 0, buffers: int = 0) -> bytes:
    return struct.pack("<BBHHHHH", flags, gso, hdr_len, gso_size, start, offset, buffers)


def bits(ring_format: str, *more: int) -> Features:
    return Features({Feature.VERSION_1, *more, *([Feature.RING_PACKED] if ring_format == "packed" else [])})


class DeviceEnd:
    """Our device's port; the driver is a raw ring each way."""

    def __init__(self, ring_format: str, *more: int, size: int = 16) -> None:
        self.memory = Memory(1 << 18)
        self.guest = GuestMemory()
        self.guest.add(BASE, self.memory)
        features = bits(ring_format, *more)
        raw = RawPackedDriver if ring_format == "packed" else RawSplitDriver
        self.rings = [raw(self.memory, size, address=BASE) for _ in range(2)]
        self.queues = [DeviceQueue(self.guest, size, ring.areas, features=features) for ring in self.rings]
        self.port = DevicePort(self.queues[0], self.queues[1], features=features)
        self.pool = BufferPool(Memory(1 << 18), 64, slot_size=256)
        self.burst = self.pool.burst(8)
        self.ids = 0
        self.next = BUFFERS

    def add(self, queue: int, segments: list[tuple[int, int, bool]]) -> None:
        ring = self.rings[queue]
        if isinstance(ring, RawPackedDriver):
            ring.add(segments, self.ids)
            self.ids += 1
        else:
            ring.make_available(ring.add(segments))

    def transmit(self, *pieces: bytes) -> None:
        segments = []
        for piece in pieces:
            self.memory.write(self.next, piece)
            segments.append((BASE + self.next, len(piece), False))
            self.next += len(piece)
        self.add(1, segments)

    def post(self, *lengths: int) -> list[int]:
        """A receive buffer with segments of these lengths; their places in memory."""
        places = []
        for length in lengths:
            places.append(self.next)
            self.next += length
        self.add(0, [(BASE + place, length, True) for place, length in zip(places, lengths, strict=True)])
        return places

    @property
    def drops(self) -> dict[str, int]:
        return dict(self.port.counters["received_drops"])


class DriverEnd:
    """Our driver's port; the device is a raw ring each way."""

    def __init__(self, ring_format: str, *more: int, size: int = 8, slots: int = 64, slot_size: int = 256, buffer_size: int = 1) -> None:
        self.memory = Memory(1 << 20)
        features = bits(ring_format, *more)
        self.queues = [DriverQueue(self.memory, size, features=features, address=BASE) for _ in range(2)]
        self.pool = BufferPool(self.memory, slots, slot_size=slot_size)
        self.port = DriverPort(self.queues[0], self.queues[1], self.pool, features=features, buffer_size=buffer_size)
        raw = RawPackedDevice if ring_format == "packed" else RawSplitDevice
        self.ring = raw(self.memory, size, self.queues[0].areas, address=BASE)
        self.burst = self.pool.burst(8)
        self.port.refill()
        self.chains: list[Any] = []

    def use(self, data: bytes, length: int) -> None:
        """Writes `data` into the next receive buffer, and uses it with `length`."""
        ring = self.ring
        if isinstance(ring, RawPackedDevice):
            self.chains += ring.available()
            chain = self.chains.pop(0)
            name, slots = chain[-1].id, len(chain)
        else:
            self.chains += ring.available()
            name, slots = self.chains.pop(0), 0
            chain = ring.chain(name)
        for descriptor in chain:
            assert descriptor.flags & DescriptorFlag.WRITE
            self.memory.write(descriptor.address - BASE, data[: descriptor.length])
            data = data[descriptor.length :]
        used = length
        if isinstance(ring, RawPackedDevice):
            ring.use(name, used, slots=slots)
        else:
            ring.use(name, used)

    @property
    def drops(self) -> dict[str, int]:
        return dict(self.port.counters["received_drops"])


def give(end: DriverEnd, data: bytes) -> None:
    end.use(data, len(data))


def test_device_13_a_header_over_any_number_of_descriptors(ring_format: str) -> None:
    end = DeviceEnd(ring_format, size=32)
    end.transmit(*(bytes([byte]) for byte in header()), FRAME)
    end.transmit(header()[:5], header()[5:] + FRAME[:7], FRAME[7:])
    end.transmit(header() + FRAME)
    assert end.port.receive(end.burst) == 3
    assert [end.burst.tobytes(row) for row in range(3)] == [FRAME] * 3
    end.transmit(header()[:1], header()[1:], FRAME)
    assert end.port.receive_frames() == [FRAME]


@pytest.mark.parametrize("length", [1, 11, 12])
def test_device_13_a_chain_without_a_byte_behind_the_header_is_returned(ring_format: str, length: int) -> None:
    for by_frames in (False, True):
        end = DeviceEnd(ring_format)
        end.transmit(bytes(length))
        end.transmit(header() + b"x")
        if by_frames:
            assert end.port.receive_frames() == [b"x"]
        else:
            assert end.port.receive(end.burst) == 1
            end.port.receive(end.burst)
        assert end.drops == {"short": 1} and len(end.rings[1].used()) == 2 and end.queues[1].outstanding == 0


LIES = {
    "checksum not negotiated": ((), header(1, start=10, offset=2), "checksum"),
    "checksum behind the end": (ALL, header(1, start=50, offset=9), "checksum"),
    "checksum far behind": (ALL, header(1, start=0xFFFF, offset=0xFFFF), "checksum"),
    "segmentation not negotiated": (CHECKSUMS, header(1, 1, 54, 1448, 34, 16), "gso"),
    "segmentation without checksum": (ALL, header(0, 1, 54, 1448), "gso"),
    "segments of no bytes": (ALL, header(1, 4, 54, 0, 34, 16), "gso"),
    "fragmentation": (ALL, header(1, 3, 54, 1448, 34, 16), "gso"),
    "unknown type": (ALL, header(1, 77, 54, 1448, 34, 16), "gso"),
    "congestion bit without a type": (ALL, header(1, 0x80, 54, 1448, 34, 16), "gso"),
    "congestion bit with datagrams": (ALL, header(1, 0x85, 54, 1448, 34, 16), "gso"),
    "both tunnel bits": (ALL, header(1, 0x61, 54, 1448, 34, 16), "gso"),
}


@pytest.mark.parametrize("lie", LIES)
def test_device_14_a_header_that_cannot_be_is_dropped_and_returned(ring_format: str, lie: str) -> None:
    features, bad, reason = LIES[lie]
    end = DeviceEnd(ring_format, *features)
    end.transmit(bad + FRAME)
    end.transmit(header() + FRAME)
    assert end.port.receive(end.burst) == 1 and end.burst.tobytes(0) == FRAME
    assert end.port.receive(end.burst) == 0
    assert end.drops == {reason: 1} and len(end.rings[1].used()) == 2


@pytest.mark.parametrize("kind", [1, 4, 5, 0x81, 0x84])
def test_device_14_what_was_negotiated_is_believed(ring_format: str, kind: int) -> None:
    end = DeviceEnd(ring_format, *ALL)
    end.transmit(header(0xFD, kind, 0xFFFF, 1448, 34, 16) + FRAME)
    assert end.port.receive(end.burst) == 1
    offset = int(end.burst.slots[0]) * 256 + end.pool.offset + 52
    assert end.pool.memory.read(offset, 12) == header(1, kind, 60, 1448, 34, 16)  # unknown flags are gone, hdr_len is only a hint


def test_device_14_towards_a_driver_without_guest_csum_nothing_is_claimed(ring_format: str) -> None:
    end = DeviceEnd(ring_format)
    (place,) = end.post(200)
    assert end.port.take(end.burst) == 8
    end.burst.count = 2
    end.burst.write(bytes(20) + b"\x12\x34" + bytes(2))
    for row, bad in enumerate((header(1, start=20, offset=2), header(1, 1, 54, 1448, 4, 2))):
        end.pool.memory.write(end.pool.offset + int(end.burst.slots[row]) * 256 + 52, bad)
    assert end.port.send(end.burst) == 1 and end.burst.count == 0
    assert end.port.counters["sent_drops"] == {"offload": 1}
    assert end.memory.read(place, 36) == header(buffers=1) + bytes(20) + b"\x12\x34" + (0xFFFF - 0x1234).to_bytes(2, "big")


@pytest.mark.parametrize(("bit", "size"), [(None, 12), (57, 20), (65, 24), (67, 24), (69, 32), (70, 32)])
def test_device_15_one_function_gives_the_size(bit: int | None, size: int) -> None:
    features = Features({32}) | ([] if bit is None else [bit])
    assert net_header_size(features) == size == header_dtype(features).itemsize
    assert net_header_size(0) == 10 and net_header_size(1 << 15) == 12


def test_device_16_every_buffer_but_the_last_is_full(ring_format: str) -> None:
    end = DeviceEnd(ring_format, NetFeature.MRG_RXBUF)
    places = [place for _ in range(4) for place in end.post(40)]
    frame = bytes(k & 0xFF for k in range(100))
    assert end.port.send_frames([frame]) == 1
    assert [length for _, length in end.rings[0].used()] == [40, 40, 32]
    found = b"".join(end.memory.read(place, 40) for place in places[:3])[:112]
    assert found == header(buffers=3) + frame
    assert end.queues[0].outstanding == 0


def test_device_16_one_publish_never_splits_a_packet_and_unused_buffers_go_back(ring_format: str) -> None:
    end = DeviceEnd(ring_format, NetFeature.MRG_RXBUF)
    for _ in range(3):
        end.post(40)
    assert end.port.send_frames([bytes(28), bytes(100)]) == 1
    assert [length for _, length in end.rings[0].used()] == [40]
    assert end.queues[0].outstanding == 0
    end.post(40)
    assert end.port.send_frames([bytes(100)]) == 1
    assert [length for _, length in end.rings[0].used()] == [40, 40, 32]


def test_device_16_a_buffer_that_is_not_mapped_breaks_the_queue_once(ring_format: str) -> None:
    end = DeviceEnd(ring_format)
    end.add(0, [(1 << 50, 100, True)])
    with pytest.raises(MalformedChain):
        end.port.send_frames([FRAME])
    assert end.port.send_frames([FRAME]) == 0 and end.queues[0].broken is not None


def test_a_packet_longer_than_the_buffer_is_dropped(ring_format: str) -> None:
    end = DeviceEnd(ring_format)
    end.post(40)
    assert end.port.send_frames([bytes(29), bytes(28)]) == 2
    assert end.port.counters["sent_drops"] == {"long": 1} and [length for _, length in end.rings[0].used()] == [40]


def test_a_transmitted_packet_that_no_burst_holds_is_dropped(ring_format: str) -> None:
    end = DeviceEnd(ring_format)
    end.transmit(header() + bytes(192 * 8 + 1))
    end.transmit(header() + bytes(192 * 8))
    assert end.port.receive(end.burst) == 1 and end.burst.count == 8
    assert end.drops == {"long": 1}


def test_driver_11_num_buffers_counts_only_with_mrg_rxbuf(ring_format: str) -> None:
    end = DriverEnd(ring_format)
    for rubbish in (0, 7, 0xFFFF):
        give(end, header(buffers=rubbish) + FRAME)
    assert end.port.receive(end.burst) == 3 and end.burst.tobytes(2) == FRAME and end.drops == {}


@pytest.mark.parametrize("count", [0, 9, 0xFFFF])
def test_driver_11_num_buffers_that_cannot_be(ring_format: str, count: int) -> None:
    end = DriverEnd(ring_format, NetFeature.MRG_RXBUF)
    give(end, header(buffers=count) + FRAME)
    give(end, header(buffers=1) + FRAME)
    assert end.port.receive(end.burst) == 1 and end.drops == {"num_buffers": 1}
    assert end.queues[0].outstanding == 8


def test_driver_11_merged_buffers_that_are_there(ring_format: str) -> None:
    for by_frames in (False, True):
        end = DriverEnd(ring_format, NetFeature.MRG_RXBUF)
        frame = bytes(k & 0xFF for k in range(500))
        whole = header(buffers=3) + frame
        for at in range(0, len(whole), 204):
            give(end, whole[at : at + 204])
        if by_frames:
            assert end.port.receive_frames() == [frame]
        else:
            assert end.port.receive(end.burst) == 1
            assert b"".join(end.burst.tobytes(row) for row in range(3)) == frame
            assert end.burst.offsets[:3].tolist() == [64, 52, 52] and end.burst.more[:3].tolist() == [1, 1, 0]
        assert end.queues[0].outstanding == 8


def test_driver_11_later_buffers_that_are_missing(ring_format: str) -> None:
    end = DriverEnd(ring_format, NetFeature.MRG_RXBUF)
    give(end, header(buffers=3) + bytes(192))
    give(end, bytes(204))
    assert end.port.receive(end.burst) == 0 and end.drops == {"missing": 1}
    assert end.queues[0].outstanding == 8 and end.pool.available == 56
    give(end, header(buffers=1) + FRAME)
    assert end.port.receive_frames() == [FRAME]


@pytest.mark.parametrize("lie", LIES)
def test_driver_12_a_received_header_that_cannot_be_is_dropped(ring_format: str, lie: str) -> None:
    features, bad, reason = LIES[lie]
    end = DriverEnd(ring_format, *features)
    give(end, bad + FRAME)
    give(end, header() + FRAME)
    assert end.port.receive_frames() == [FRAME] and end.drops == {reason: 1}
    assert end.queues[0].outstanding == 8


@pytest.mark.parametrize("length", [0, 5, 12])
def test_driver_12_a_used_length_without_a_frame_is_dropped(ring_format: str, length: int) -> None:
    end = DriverEnd(ring_format)
    end.use(bytes(length), length)
    assert end.port.receive(end.burst) == 0 and end.drops == {"short": 1} and end.queues[0].outstanding == 8


def offering(config: bytes, *more: NetFeature) -> NetDevice:
    device = NetDevice(offered={*more, Feature.RING_PACKED})
    device.config = config
    return device


@pytest.mark.parametrize("mtu", [0, 67])
def test_driver_07_an_mtu_that_cannot_be(mtu: int) -> None:
    with (
        LoopbackTransport(offering(Config(mtu=mtu).pack(), NetFeature.MTU)) as transport,
        pytest.raises(SpecViolation, match=rf"MTU {mtu} is outside 68..65535 \(5.1.4.1\)"),
    ):
        NetDriver(transport)


@pytest.mark.parametrize("mtu", [68, 1500, 65535])
def test_driver_07_an_mtu_that_can_be(mtu: int) -> None:
    with LoopbackTransport(offering(Config(mtu=mtu).pack(), NetFeature.MTU)) as transport, NetDriver(transport) as net:
        assert net.mtu == mtu


def test_driver_07_an_address_counts_only_with_its_bit() -> None:
    address = bytes.fromhex("525400123456")
    with LoopbackTransport(offering(Config(mac=address).pack())) as transport, NetDriver(transport) as net:
        assert net.mac != address and net.mac[0] & 3 == 2
    with LoopbackTransport(offering(Config(mac=address).pack(), NetFeature.MAC)) as transport, NetDriver(transport) as net:
        assert net.mac == address
