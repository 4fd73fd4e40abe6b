"""A hostile driver at the control queue and at several pairs of our device: every descriptor, index and status bit by hand."""

import struct
from collections.abc import Collection, Sequence

import pytest

from tests.net.flows import udp
from virtio import EventFd, Feature, Features, MalformedChain, Memory, NetDevice, NetFeature, SpecViolation, StatusError
from virtio.device import DeviceState
from virtio.devices.net_control import LONGEST_DATA, ControlClass
from virtio.spec import DescriptorFlag, Status
from virtio.testing import RawPackedDriver, RawSplitDriver

BASE = 1 << 32
SIZE = 32
BUFFERS = 1 << 18
MEMORY = 1 << 22
OK, ERR, UNTOUCHED = 0, 1, 0xEE
CONTROL = 4
BOTH = (NetFeature.MQ, NetFeature.CTRL_VQ)
MQ = ControlClass.MQ


class Driver:
    """A driver by hand: its rings are raw, its steps those of the test."""

    def __init__(self, ring_format: str, *accepted: int, pairs: int = 2, control: int = CONTROL, queues: Sequence[int] = range(5)) -> None:
        self.device = NetDevice(queue_pairs=pairs)
        self.memory = Memory(MEMORY)
        self.device.memory.add(BASE, self.memory)
        self.features = Features({Feature.VERSION_1, *accepted, *([Feature.RING_PACKED] if ring_format == "packed" else [])})
        self.device.write_status(Status.ACKNOWLEDGE | Status.DRIVER)
        self.device.accept(self.features)
        self.device.write_status(self.device.status | Status.FEATURES_OK)
        assert self.device.refused is None
        raw = RawPackedDriver if ring_format == "packed" else RawSplitDriver
        self.rings = {index: raw(self.memory, SIZE, address=BASE) for index in queues}
        self.kicks = {index: EventFd() for index in queues}
        self.control = control
        for index, ring in self.rings.items():
            self.device.setup_queue(index, SIZE, ring.areas, doorbell=self.kicks[index], interrupt=None)
        self.device.write_status(self.device.status | Status.DRIVER_OK)
        self.next, self.ids = BUFFERS, 0

    def place(self, data: bytes) -> tuple[int, int]:
        offset, self.next = self.next, self.next + len(data)
        self.memory.write(offset, data)
        return BASE + offset, len(data)

    def add(self, index: int, segments: list[tuple[int, int, bool]]) -> None:
        ring = self.rings[index]
        if isinstance(ring, RawPackedDriver):
            ring.add(segments, self.ids)
            self.ids += 1
        else:
            ring.make_available(ring.add(segments))

    def fill(self, index: int, count: int = 8, length: int = 2048) -> None:
        for _ in range(count):
            self.add(index, [(*self.place(bytes(length)), True)])

    def used(self, index: int) -> list[tuple[int, int]]:
        return self.rings[index].used()

    def command(self, *pieces: bytes, room: Sequence[int] = (1,)) -> tuple[list[int], bytes]:
        """Used lengths of one command in these readable descriptors, and what is in the writable ones afterwards."""
        readable = [(*self.place(piece), False) for piece in pieces]
        writable = [(*self.place(bytes([UNTOUCHED]) * length), True) for length in room]
        self.add(self.control, readable + writable)
        self.device.poll()
        answer = b"".join(self.memory.read(address - BASE, length) for address, length, _ in writable)
        return [length for _, length in self.used(self.control)], answer

    def set_pairs(self, pairs: int) -> int:
        lengths, answer = self.command(bytes([MQ, 0]) + struct.pack("<H", pairs))
        assert lengths == [1]
        return answer[0]

    @property
    def queues(self) -> Sequence[str]:
        return [name for index, name in enumerate(self.device.queues) if self.device.queue(index) is not None]


COMMAND = bytes([MQ, 0, 2, 0])


def test_pairs_are_set_within_what_there_is(ring_format: str) -> None:
    driver = Driver(ring_format, *BOTH)
    assert driver.device.active_pairs == 1
    for pairs, answer, active in ((0, ERR, 1), (3, ERR, 1), (2, OK, 2), (0x8000, ERR, 2), (0xFFFF, ERR, 2), (0x0100, ERR, 2), (1, OK, 1)):
        assert driver.set_pairs(pairs) == answer and driver.device.active_pairs == active
    assert driver.set_pairs(2) == OK
    driver.device.write_status(0)
    assert driver.device.active_pairs == 1


@pytest.mark.parametrize(
    "pieces",
    [[COMMAND[:1], COMMAND[1:]], [COMMAND[:2], COMMAND[2:]], [COMMAND[:3], COMMAND[3:]], [bytes([byte]) for byte in COMMAND], [COMMAND]],
    ids=["class alone", "head alone", "data split", "a byte each", "whole"],
)
@pytest.mark.parametrize("room", [[1], [1, 1, 7], [64]])
def test_a_command_over_any_descriptors(ring_format: str, pieces: list[bytes], room: list[int]) -> None:
    driver = Driver(ring_format, *BOTH)
    lengths, answer = driver.command(*pieces, room=room)
    assert lengths == [1] and answer == bytes([OK]) + bytes([UNTOUCHED]) * (sum(room) - 1)
    assert driver.device.active_pairs == 2


@pytest.mark.parametrize(
    "pieces",
    [
        *([], [COMMAND[:1]], [COMMAND[:2]], [COMMAND[:3]], [COMMAND, b"\0"], [COMMAND, bytes(LONGEST_DATA)], [bytes(1 << 20)]),
        *([bytes([kind, command]) + data] for kind in (0, 1, 2, 3, 5, 6, 8, 255) for command in (0, 1) for data in (b"", b"\2\0")),
        *([bytes([MQ, command, 2, 0])] for command in (1, 2, 255)),
    ],
)
def test_every_other_command_is_an_error(ring_format: str, pieces: list[bytes]) -> None:
    driver = Driver(ring_format, *BOTH)
    assert driver.command(*pieces) == ([1], bytes([ERR]))
    assert driver.device.active_pairs == 1 and driver.device.state is DeviceState.DRIVER_OK
    assert driver.set_pairs(2) == OK, "the queue goes on"


def test_a_command_without_room_for_its_answer_is_returned_and_not_done(ring_format: str) -> None:
    driver = Driver(ring_format, *BOTH)
    assert driver.command(COMMAND, room=()) == ([0], b"")
    assert driver.device.active_pairs == 1 and driver.set_pairs(2) == OK


@pytest.mark.parametrize("accepted", [(), BOTH[1:]], ids=["neither", "control alone"])
def test_without_mq_there_is_one_pair_and_the_control_queue_behind_it(ring_format: str, accepted: tuple[int, ...]) -> None:
    driver = Driver(ring_format, *accepted, control=2, queues=range(3 if accepted else 2))
    assert [driver.device.queue_max(index) for index in range(5)] == [256] * len(driver.rings) + [0] * (5 - len(driver.rings))
    with pytest.raises(StatusError):
        driver.device.setup_queue(4, SIZE, driver.rings[0].areas, doorbell=EventFd(), interrupt=None)
    if accepted:
        assert driver.set_pairs(1) == driver.set_pairs(2) == ERR
    driver.fill(0)
    assert driver.device.send_frames([udp(1)]) == 1 and len(driver.used(0)) == 1
    assert driver.device.pair(1).send_frames([udp(1)]) == 0 and driver.device.pair(1).receive_frames() == []


def test_a_queue_that_is_not_there_by_the_negotiation_is_refused(ring_format: str) -> None:
    for accepted, missing in (((), 2), (BOTH[1:], 3)):
        device = NetDevice(queue_pairs=2)
        memory = Memory(MEMORY)
        device.memory.add(BASE, memory)
        ring = RawSplitDriver(memory, SIZE, address=BASE)
        device.write_status(Status.ACKNOWLEDGE | Status.DRIVER)
        device.accept(Features({Feature.VERSION_1, *accepted}))
        device.write_status(device.status | Status.FEATURES_OK)
        with pytest.raises(ValueError, match=f"queue {missing} does not exist"):
            device.setup_queue(missing, SIZE, ring.areas, doorbell=EventFd(), interrupt=None)


def test_mq_without_the_control_queue_does_not_stick() -> None:
    device = NetDevice(queue_pairs=2)
    device.write_status(Status.ACKNOWLEDGE | Status.DRIVER)
    device.accept(Features({Feature.VERSION_1, NetFeature.MQ}))
    device.write_status(device.status | Status.FEATURES_OK)
    assert Status.FEATURES_OK not in device.status and device.refused is not None and "CTRL_VQ" in str(device.refused)


def test_frames_go_to_pairs_in_use_only(ring_format: str) -> None:
    """All receive buffers are there from the start; before the command and after fewer pairs were set, one ring stays as it is."""
    driver = Driver(ring_format, *BOTH)
    for index in (0, 2):
        driver.fill(index, 24)
    frames = [udp(flow) for flow in range(8)]
    assert driver.device.send_frames(frames) == 8
    assert len(driver.used(0)) == 8 and driver.used(2) == []
    assert driver.set_pairs(2) == OK
    assert driver.device.send_frames(frames) == 8
    first, second = len(driver.used(0)), len(driver.used(2))
    assert first + second == 8 and first and second
    assert driver.set_pairs(1) == OK
    assert driver.device.send_frames(frames) == 8 and driver.device.pair(1).send_frames(frames) == 0
    assert len(driver.used(0)) == 8 and driver.used(2) == []


def test_a_driver_that_sends_on_a_pair_not_in_use_is_heard(ring_format: str) -> None:
    """Its frames may have been on their way when the number of pairs shrank."""
    driver = Driver(ring_format, *BOTH)
    driver.add(3, [(*driver.place(bytes(12) + udp(5)), False)])
    assert driver.device.receive_frames() == [udp(5)] and len(driver.used(3)) == 1


def test_half_a_pair_is_none(ring_format: str) -> None:
    driver = Driver(ring_format, *BOTH, queues=(0, 1, 2, 4))
    assert driver.set_pairs(2) == OK
    for index in (0, 2):
        driver.fill(index, 16)
    assert driver.device.send_frames([udp(flow) for flow in range(16)]) == 16
    assert len(driver.used(0)) == 16 and driver.used(2) == []
    driver = Driver(ring_format, *BOTH, queues=(0, 2, 3, 4))
    driver.fill(2, 16)
    assert driver.device.send_frames([udp(1)]) == 0, "one pair is in use, and that is not whole"
    assert driver.set_pairs(2) == OK
    assert driver.device.send_frames([udp(1)]) == 1 and len(driver.used(2)) == 1


def test_more_commands_than_one_turn_takes(ring_format: str) -> None:
    driver = Driver(ring_format, *BOTH)
    for lap in range(20):
        places = []
        for number in range(SIZE // 2):
            places.append(driver.place(bytes([UNTOUCHED])))
            data = struct.pack("<H", 1 + (number + lap) % 3)
            driver.add(CONTROL, [(*driver.place(bytes([MQ, 0]) + data), False), (*places[-1], True)])
        driver.device.poll()
        assert len(driver.used(CONTROL)) == SIZE // 2
        answers = [driver.memory.read(address - BASE, 1)[0] for address, _ in places]
        assert answers == [ERR if (number + lap) % 3 == 2 else OK for number in range(SIZE // 2)]


BROKEN = {
    "not in memory": lambda driver: [(BASE + MEMORY + 64, 4, False), (*driver.place(b"x"), True)],
    "answer not in memory": lambda driver: [(*driver.place(COMMAND), False), (BASE - 8, 1, True)],
    "written before read": lambda driver: [(*driver.place(b"x"), True), (*driver.place(COMMAND), False)],
    "across the end": lambda driver: [(BASE + MEMORY - 2, 4, False), (*driver.place(b"x"), True)],
    "beyond 64 bits": lambda driver: [((1 << 64) - 2, 4, False), (*driver.place(b"x"), True)],
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_control_queue_needs_a_reset_and_says_so_once(ring_format: str, case: str) -> None:
    driver = Driver(ring_format, *BOTH)
    driver.add(CONTROL, BROKEN[case](driver))
    with pytest.raises(SpecViolation) as caught:
        driver.device.poll()
    assert caught.value.section
    assert driver.device.poll() == 0 and Status.NEEDS_RESET in driver.device.status
    queue = driver.device.queue(CONTROL)
    assert queue is not None and queue.broken is caught.value
    assert driver.device.send_frames([udp(1)]) == 0 == len(driver.device.receive_frames())


def test_device_07_a_command_that_never_ends(ring_format: str) -> None:
    driver = Driver(ring_format, *BOTH)
    ring = driver.rings[CONTROL]
    if isinstance(ring, RawPackedDriver):
        ring.add([(*driver.place(b"xx"), False)] * SIZE)
        ring.set_flags(SIZE - 1, ring.descriptor(SIZE - 1).flags | DescriptorFlag.NEXT)
    else:
        ring.set_descriptor(0, *driver.place(b"xx"), flags=DescriptorFlag.NEXT, next=0)
        ring.make_available(0)
    with pytest.raises(MalformedChain):
        driver.device.poll()
    assert Status.NEEDS_RESET in driver.device.status


@pytest.mark.parametrize("bad", [1, 3])
def test_a_broken_pair_ends_them_all_once(ring_format: str, bad: int) -> None:
    driver = Driver(ring_format, *BOTH)
    assert driver.set_pairs(2) == OK
    for index in (1, 3):
        driver.add(index, [(*driver.place(bytes(12) + udp(index)), False)])
    driver.add(bad, [(BASE + MEMORY, 100, False)])
    found: list[bytes] = []
    with pytest.raises(SpecViolation):
        for _ in range(8):
            found += driver.device.receive_frames()
    assert Status.NEEDS_RESET in driver.device.status
    assert driver.device.receive_frames() == [] and driver.device.pair(0).receive_frames() == []
    assert found.count(udp(4 - bad)) <= 1 and found.count(udp(bad)) <= 1


def test_commands_to_and_fro_move_what_serves_the_pairs_once_a_poll(ring_format: str) -> None:
    driver = Driver(ring_format, *BOTH)
    told: list[Collection[int]] = []

    def refill() -> None:
        driver.used(CONTROL)
        for pairs in (2, 1, 2, 1, 2) if driver.device.active_pairs == 1 else (1, 2, 1, 2, 1):
            driver.add(CONTROL, [(*driver.place(bytes([MQ, 0, pairs, 0])), False), (*driver.place(bytes([UNTOUCHED])), True)])

    def tell(pairs: Collection[int]) -> None:
        told.append(pairs)
        refill()

    driver.device.watch_port(tell)  # which is told at once
    for number in range(1, 4):
        assert len(told) == number
        assert driver.device.poll() == 1
        assert driver.device.active_pairs == 1 + number % 2
        assert driver.kicks[CONTROL].wait(0), "it comes back to the rest"
    driver.device.unwatch_port(tell)
