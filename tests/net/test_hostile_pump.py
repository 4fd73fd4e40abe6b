"""What a peer may do to a pump: the rules are those of `docs/invariants.md`."""

import os
import socket
from typing import Any

import pytest

from tests.pair import BASE
from tests.pump_lane import HEADER, Lane, asleep, running, until
from tests.without_proc import without_proc
from virtio import EventFd, Feature, GuestMemory, Memory, NetFeature, SpecViolation
from virtio._core import DeviceQueue, Pump

FRAME = bytes(range(100))


def header(flags: int = 0, gso: int = 0, size: int = 0, start: int = 0, offset: int = 0, buffers: int = 0) -> bytes:
    return bytes([flags, gso, 0, 0]) + b"".join(value.to_bytes(2, "little") for value in (size, start, offset, buffers))


LIES: dict[str, tuple[bytes, str]] = {
    "a checksum that was not negotiated": (header(1, start=10, offset=2), "checksum"),
    "segmentation that was not negotiated": (header(0, 1, 1448), "gso"),
    "a type that there is not": (header(0, 9, 1448), "gso"),
}


def place(lane: Lane, data: bytes) -> tuple[int, int]:
    offset = lane.memory.allocate(len(data))
    lane.memory.write(offset, data)
    return BASE + offset, len(data)


def take(lane: Lane, used: list[Any]) -> list[Any]:
    """Adds the chains that were used since."""
    used += lane.driver.pop_used()
    return used


def test_device_13_a_header_over_several_descriptors(ring_format: str) -> None:
    lane = Lane(ring_format, "transmit")
    whole = HEADER + FRAME
    with running(lane.far_pump):
        lane.driver.add("short", readable=[place(lane, HEADER)])
        lane.driver.add("shorter", readable=[place(lane, b"x")])
        lane.driver.add("whole", readable=[place(lane, whole[a:b]) for a, b in ((0, 5), (5, 11), (11, 13), (13, 112))])
        lane.driver.publish()
        assert lane.sink.receive() == FRAME
        used: list[Any] = []
        until(lambda: len(take(lane, used)) == 3)
        assert used == [("short", 0), ("shorter", 0), ("whole", 0)]
        until(lambda: lane.far_pump.statistics["drops"] == {"short": 2})


@pytest.mark.parametrize("lie", LIES)
def test_device_14_a_header_that_lies_is_dropped(ring_format: str, lie: str) -> None:
    bad, reason = LIES[lie]
    lane = Lane(ring_format, "transmit")
    with running(lane.far_pump):
        for data in (bad + FRAME, HEADER + FRAME):
            lane.driver.add(data, readable=[place(lane, data)])
        lane.driver.publish()
        assert lane.sink.receive() == FRAME
        until(lambda: lane.far_pump.statistics["drops"] == {reason: 1})
        until(lambda: lane.device.counters["used"] == 2)


def test_device_16_merged_buffers_are_full_and_counted(ring_format: str) -> None:
    lane = Lane(ring_format, "receive", NetFeature.MRG_RXBUF)
    rooms = [place(lane, bytes(length)) for length in (40, 12, 50, 64)]
    for room in rooms:
        lane.driver.add(room, writable=[room])
    lane.driver.publish()
    with running(lane.far_pump):
        lane.source.send(FRAME[:60])
        used: list[Any] = []
        until(lambda: len(take(lane, used)) == 3)
        assert used == [(rooms[0], 40), (rooms[1], 12), (rooms[2], 20)]
        assert b"".join(lane.guest.read(at, length) for (at, _), length in used) == header(buffers=3) + FRAME[:60]
        # For what follows there is too little, for ever.
        lane.source.send(FRAME)
        until(lambda: lane.far_pump.statistics["drops"] == {"long": 1})
        lane.source.send(FRAME[:52])
        until(lambda: len(take(lane, used)) == 4)
        assert used[3] == (rooms[3], 64) and lane.guest.read(rooms[3][0], 64) == header(buffers=1) + FRAME[:52]


def give(lane: Lane, data: bytes) -> None:
    """As a device: uses one receive buffer."""
    until(lambda: lane.device.arm())
    (chain,) = lane.device.pop(1)
    lane.device.complete(chain, chain.write(data))


@pytest.mark.parametrize(("count", "reason"), [(0, "num_buffers"), (65, "num_buffers"), (0xFFFF, "num_buffers"), (3, "missing")])
def test_driver_11_num_buffers_that_cannot_be(ring_format: str, count: int, reason: str) -> None:
    lane = Lane(ring_format, "receive", NetFeature.MRG_RXBUF)
    with running(lane.near_pump):
        give(lane, header(buffers=count) + FRAME)
        lane.device.publish()
        until(lambda: lane.near_pump.statistics["drops"] == {reason: 1})
        give(lane, header(buffers=2) + FRAME)
        give(lane, FRAME)
        lane.device.publish()
        assert lane.sink.receive() == FRAME + FRAME
        asleep(lane.near_pump)
        assert lane.driver.outstanding == 64


@pytest.mark.parametrize("lie", LIES)
def test_driver_12_a_header_that_lies_is_dropped(ring_format: str, lie: str) -> None:
    bad, reason = LIES[lie]
    lane = Lane(ring_format, "receive")
    with running(lane.near_pump):
        for data in (bad + FRAME, HEADER, b"x", b"", HEADER + FRAME):
            give(lane, data)
        lane.device.publish()
        assert lane.sink.receive() == FRAME
        asleep(lane.near_pump)
        assert lane.near_pump.statistics["drops"] == {reason: 1, "short": 3} and lane.driver.outstanding == 64


@pytest.mark.parametrize("way", ["transmit", "receive"])
def test_device_24_memory_that_goes_away_ends_the_pump(ring_format: str, way: str) -> None:
    lane = Lane(ring_format, way, Feature.EVENT_IDX)
    fd = os.memfd_create("guest")
    os.ftruncate(fd, 1 << 16)
    guest = GuestMemory()
    guest.add(BASE, lane.memory)
    guest.add(BASE >> 1, Memory.from_fd(fd, 1 << 16))
    device = DeviceQueue(guest, 64, lane.driver.areas, features=lane.features)
    tap = lane.far.near.fileno()
    if way == "transmit":
        pump = Pump.device_transmit(device, tap, features=lane.features, doorbell=lane.doorbell)
    else:
        pump = Pump.device_receive(device, tap, features=lane.features, doorbell=lane.doorbell, longest=1514)
    os.ftruncate(fd, 0)
    os.close(fd)
    # The driver has no such memory, and names it all the same.
    driver = lane.driver
    buffer = (BASE, 4096)
    with pytest.raises(SpecViolation), running(pump) as runner:
        driver.add("frame", readable=[buffer] if way == "transmit" else (), writable=[buffer] if way == "receive" else ())
        descriptor = driver.areas[0]
        lane.guest.store(descriptor, 8, BASE >> 1)
        driver.publish()
        lane.doorbell.signal()
        if way == "receive":
            lane.source.send(FRAME)
        assert runner.failed.wait(60)
        assert device.broken is not None and pump.error is device.broken


def tells_nobody() -> None:
    lane = Lane("split", "transmit")
    with socket.socket(socket.AF_UNIX) as nobody:
        lane.device.connect(EventFd.from_fd(nobody.fileno()))
    lane.driver.add(None, readable=[place(lane, HEADER + FRAME)])
    lane.driver.publish()
    with (
        pytest.raises(OSError, match="a notification failed: write: Transport endpoint is not connected") as raised,
        running(lane.far_pump),
    ):
        until(lambda: lane.far_pump.error is not None)
    assert raised.value is lane.far_pump.error and lane.sink.receive() == FRAME


def test_device_23_where_nobody_can_tell_what_was_passed_it_is_not_the_tap_that_failed() -> None:
    without_proc(tells_nobody)
