"""In-flight tracking over a connection: what stands in the area, what a successor does with it, and areas that lie or go away."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.leftovers import all_closed
from tests.vhost_user.frontend import GUEST, Frontend
from virtio import Chain, DeviceQueue, DriverQueue, Feature, GuestMemory, Memory
from virtio.device import Device
from virtio.features import Features
from virtio.vhost_user import message as wire
from virtio.vhost_user.backend import Backend
from virtio.vhost_user.inflight import Packed, PackedEntry, Split, SplitEntry, region_size
from virtio.vhost_user.message import FrontendRequest as F

SIZE = 16


class Keeper(Device):
    """Keeps what it gets until it is asked for it."""

    device_id = 42
    queues = ("first", "second")

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Chain] = []

    def on_first(self, queue: DeviceQueue) -> None:
        """New ones."""
        self.kept += queue.pop()

    on_second = on_first

    def answer(self, *places: int) -> None:
        """Completes those at these places."""
        queue = self.queue(0)
        assert queue is not None
        for place in places:
            queue.complete(self.kept[place], self.kept[place].write(self.kept[place].read(8)))
        queue.publish()
        self.kept = [chain for place, chain in enumerate(self.kept) if place not in places]

    @property
    def numbers(self) -> list[int]:
        """What it keeps."""
        return [int.from_bytes(chain.read(8), "little") for chain in self.kept]


@pytest.fixture
def devices() -> list[Keeper]:
    return []


@pytest.fixture
def backend(tmp_path: Path, devices: list[Keeper], errors: list[Exception]) -> Iterator[Backend]:
    """Nothing is left open in the end."""

    def make() -> Keeper:
        devices.append(Keeper())
        return devices[-1]

    with all_closed():
        with Backend(str(tmp_path / "s"), make, report=errors.append) as made:
            yield made
        devices.clear()


@pytest.fixture
def frontend(backend: Backend, tmp_path: Path) -> Iterator[Frontend]:
    with Frontend.at(str(tmp_path / "s"), backend) as made:
        yield made


Area = tuple[wire.Inflight, int]


@pytest.fixture
def area(frontend: Frontend, ring_features: Features) -> Iterator[Area]:
    """A new area for both queues."""
    frontend.negotiate(ring_features)
    made = frontend.track(2, SIZE)
    yield made
    os.close(made[1])


def ask(frontend: Frontend, queue: DriverQueue, *numbers: int) -> None:
    for number in numbers:
        asked = frontend.room(8, number.to_bytes(8, "little"))
        queue.add(number, readable=[asked], writable=[frontend.room(8)])
    queue.publish()
    frontend.turn()


def answered(queue: DriverQueue) -> list[object]:
    return [token for token, _ in queue.pop_used()]


def gone(frontend: Frontend) -> None:
    """The connection breaks."""
    frontend.socket.close()
    frontend.turn()


def again(frontend: Frontend, area: Area, backend: Backend, tmp_path: Path, base: int = 0) -> Frontend:
    """The connection breaks; the next one has the same memory and rings."""
    gone(frontend)
    successor = Frontend.at(str(tmp_path / "s"), backend)
    for name in ("memory", "queues", "kicks", "calls", "errors"):
        setattr(successor, name, getattr(frontend, name))
    successor.negotiate(frontend.features)
    assert not successor.refused(F.SET_INFLIGHT_FD, area[0], [area[1]])
    successor.start(successor.queues[0], base=base)
    successor.turn()
    return successor


def test_a_successor_takes_over_what_was_in_flight(
    frontend: Frontend, area: Area, backend: Backend, devices: list[Keeper], tmp_path: Path, errors: list[Exception]
) -> None:
    queue = frontend.queue(0, SIZE)
    frontend.start(queue)
    ask(frontend, queue, 0, 1, 2, 3, 4)
    devices[-1].answer(3, 1)
    assert answered(queue) == [3, 1]
    ask(frontend, queue, 5)
    successor = again(frontend, area, backend, tmp_path, base=12345)  # the area knows better
    ask(successor, queue, 6)
    assert devices[-1].numbers == [0, 2, 4, 5, 6]
    devices[-1].answer(4, 0)
    successor = again(successor, area, backend, tmp_path)
    assert devices[-1].numbers == [2, 4, 5]
    devices[-1].answer(0, 1, 2)
    assert answered(queue) == [6, 0, 2, 4, 5]
    for number in range(50):
        ask(successor, queue, number)
        devices[-1].answer(0)
        assert answered(queue) == [number]
    successor.socket.close()
    assert not errors


def test_what_cannot_be_handed_back_comes_again_when_the_ring_goes_on(
    frontend: Frontend, area: Area, devices: list[Keeper], errors: list[Exception]
) -> None:
    queue = frontend.queue(0, SIZE)
    frontend.start(queue)
    ask(frontend, queue, 0, 1, 2)
    devices[-1].answer(1)
    devices[-1].kept.clear()
    base = frontend.stop(0)
    frontend.start(queue, base=base)
    frontend.turn()
    assert devices[-1].numbers == [0, 2]
    devices[-1].answer(1, 0)
    assert answered(queue) == [1, 2, 0]
    assert not errors


def test_after_a_reset_nothing_is_in_flight(frontend: Frontend, area: Area, devices: list[Keeper], errors: list[Exception]) -> None:
    queue = frontend.queue(0, SIZE)
    frontend.start(queue)
    ask(frontend, queue, 0, 1, 2)
    devices[-1].answer(1)
    devices[-1].kept.clear()
    assert not frontend.refused(F.RESET_DEVICE)
    queue = frontend.queue(0, SIZE)
    frontend.start(queue)
    ask(frontend, queue, 7)
    assert devices[-1].numbers == [7]
    devices[-1].answer(0)
    assert answered(queue) == [7]
    assert not errors


def test_a_ring_that_begins_anew_has_nothing_in_flight(
    frontend: Frontend, area: Area, devices: list[Keeper], errors: list[Exception]
) -> None:
    for _ in range(3):
        queue = frontend.queue(0, SIZE)
        frontend.start(queue)
        ask(frontend, queue, 0, 1, 2)
        devices[-1].answer(1)
        devices[-1].kept.clear()
        assert answered(queue) == [1]
        frontend.stop(0)
    assert not errors


def test_rings_that_the_area_does_not_reach_are_not_tracked(
    frontend: Frontend, ring_features: Features, devices: list[Keeper], errors: list[Exception]
) -> None:
    frontend.negotiate(ring_features)
    described, descriptor = frontend.track(1, SIZE)
    os.close(descriptor)
    assert described.size == region_size(SIZE, Feature.RING_PACKED in ring_features)
    frontend.start(frontend.queue(1, SIZE))
    ask(frontend, frontend.queues[0], 5)
    assert devices[-1].numbers == [5]
    assert not errors


def test_an_area_comes_before_rings_run(frontend: Frontend, area: Area, errors: list[Exception]) -> None:
    frontend.start(frontend.queue(0, SIZE))
    assert frontend.refused(F.SET_INFLIGHT_FD, area[0], [area[1]])
    assert "rings that run" in str(errors.pop())
    for wanted in (wire.Inflight(0, 0, 2, SIZE), wire.Inflight(0, 0, 3, SIZE), wire.Inflight(0, 0, 2, 0)):
        reply = frontend.ask(F.GET_INFLIGHT_FD, wanted)
        assert reply is not None and not reply.payload.size and not reply.descriptors  # nothing will be tracked
        assert errors.pop()


def look(area: Area) -> Callable[[int, int], int]:
    """Reads the area."""

    def load(offset: int, width: int) -> int:
        return int.from_bytes(os.pread(area[1], width, offset), "little")

    return load


def change(area: Area, offset: int, width: int, value: int) -> None:
    os.pwrite(area[1], value.to_bytes(width, "little"), offset)


def test_a_split_region_is_as_the_text_lays_it_out(frontend: Frontend, area: Area, devices: list[Keeper], ring_format: str) -> None:
    if ring_format == "packed":
        return
    queue = frontend.queue(0, SIZE)
    frontend.start(queue)
    ask(frontend, queue, 0, 1, 2)  # two descriptors each: heads 0, 2, 4
    load = look(area)

    def entry(head: int, field: SplitEntry, width: int) -> int:
        return load(Split.ENTRIES + SplitEntry.SIZE * head + field, width)

    assert [load(field, 2) for field in (Split.VERSION, Split.DESC_NUM, Split.USED_IDX)] == [1, SIZE, 0]
    assert load(Split.FEATURES, 8) == 0
    assert [entry(head, SplitEntry.INFLIGHT, 1) for head in range(6)] == [1, 0, 1, 0, 1, 0]
    assert [entry(head, SplitEntry.COUNTER, 8) for head in (0, 2, 4)] == [0, 1, 2]
    devices[-1].answer(2, 1)
    assert [load(field, 2) for field in (Split.LAST_BATCH_HEAD, Split.USED_IDX)] == [2, 2]
    assert entry(2, SplitEntry.NEXT, 2) == 4
    assert [entry(head, SplitEntry.INFLIGHT, 1) for head in (0, 2, 4)] == [1, 0, 0]


def test_a_packed_region_is_as_the_text_lays_it_out(frontend: Frontend, area: Area, devices: list[Keeper], ring_format: str) -> None:
    if ring_format == "split":
        return
    queue = frontend.queue(0, SIZE)
    frontend.start(queue)
    ask(frontend, queue, 0, 1, 2)  # two descriptors each: entries 0 and 1, 2 and 3, 4 and 5
    load = look(area)

    def entry(place: int, field: PackedEntry, width: int) -> int:
        return load(Packed.ENTRIES + PackedEntry.SIZE * place + field, width)

    def header() -> list[int]:
        return [load(field, 2) for field in (Packed.FREE_HEAD, Packed.OLD_FREE_HEAD, Packed.USED_IDX, Packed.OLD_USED_IDX)]

    assert [load(Packed.VERSION, 2), load(Packed.DESC_NUM, 2), load(Packed.FEATURES, 8)] == [1, SIZE, 0]
    assert header() == [6, 6, 0, 0]
    assert [load(field, 1) for field in (Packed.USED_WRAP_COUNTER, Packed.OLD_USED_WRAP_COUNTER)] == [1, 1]
    assert [entry(place, PackedEntry.INFLIGHT, 1) for place in range(6)] == [1, 0, 1, 0, 1, 0]
    assert [entry(place, PackedEntry.COUNTER, 8) for place in (0, 2, 4)] == [0, 1, 2]
    assert [(entry(place, PackedEntry.LAST, 2), entry(place, PackedEntry.NUM, 2)) for place in (0, 2, 4)] == [(1, 2), (3, 2), (5, 2)]
    assert [entry(place, PackedEntry.NEXT, 2) for place in (0, 2, 4, SIZE - 1)] == [1, 3, 5, SIZE]
    fields = ((PackedEntry.ADDR, 8, 0), (PackedEntry.LEN, 4, 8), (PackedEntry.ID, 2, 12))
    for place in range(6):
        for field, width, offset in fields:
            assert entry(place, field, width) == frontend.memory.load(queue.areas[0] - GUEST + 16 * place + offset, width)
    assert [entry(place, PackedEntry.FLAGS, 2) & 3 for place in (0, 1)] == [1, 2]  # NEXT, WRITE
    devices[-1].answer(2, 1)
    assert header() == [2, 2, 4, 4]
    assert [entry(place, PackedEntry.NEXT, 2) for place in (3, 5)] == [4, 6]
    assert [entry(place, PackedEntry.INFLIGHT, 1) for place in (0, 2, 4)] == [1, 0, 0]


LIES: dict[str, list[tuple[str, int, int, int]]] = {
    "split": [
        ("version", Split.VERSION, 2, 7),
        ("features", Split.FEATURES, 8, 1),
        ("number of entries", Split.DESC_NUM, 2, SIZE - 1),
        ("ahead of", Split.USED_IDX, 2, 500),
        ("last batch", Split.USED_IDX, 2, 0xFFFE),  # three more than the list has
        ("counter", Split.ENTRIES + SplitEntry.COUNTER, 8, (1 << 64) - 1),
    ],
    "packed": [
        ("version", Packed.VERSION, 2, 7),
        ("features", Packed.FEATURES, 8, 1),
        ("number of entries", Packed.DESC_NUM, 2, 0xFFFF),
        ("free list", Packed.OLD_FREE_HEAD, 2, 99),
        ("used index", Packed.USED_IDX, 2, SIZE),
        ("free list", Packed.ENTRIES + PackedEntry.SIZE * 7 + PackedEntry.NEXT, 2, 7),  # round and round
        ("chain", Packed.ENTRIES + PackedEntry.NEXT, 2, 7),  # one that is free
        ("without descriptors", Packed.ENTRIES + PackedEntry.NUM, 2, 0),
        ("chain", Packed.ENTRIES + PackedEntry.NUM, 2, 0xFFFF),
        ("chain's last", Packed.ENTRIES + PackedEntry.LAST, 2, 9),
        ("nowhere", Packed.ENTRIES + PackedEntry.INFLIGHT, 1, 0),
        ("counter", Packed.ENTRIES + PackedEntry.COUNTER, 8, (1 << 64) - 1),
    ],
}


def test_lies_break_the_ring_once(
    frontend: Frontend, area: Area, backend: Backend, tmp_path: Path, errors: list[Exception], ring_format: str
) -> None:
    queue = frontend.queue(0, SIZE)
    frontend.start(queue)
    ask(frontend, queue, 0, 1)
    kept = os.pread(area[1], area[0].size, 0)
    gone(frontend)
    for what, offset, width, value in LIES[ring_format]:
        os.pwrite(area[1], kept, 0)  # as if it had been killed
        change(area, offset, width, value)
        frontend = again(frontend, area, backend, tmp_path)
        assert len(errors) == 1 and what in str(errors.pop()), what
        assert frontend.errors[0].drain()
        gone(frontend)
        assert not errors
    os.pwrite(area[1], kept, 0)
    frontend = again(frontend, area, backend, tmp_path)
    assert not errors
    frontend.socket.close()


def test_chains_that_lie_break_the_ring_once(
    frontend: Frontend, area: Area, backend: Backend, tmp_path: Path, errors: list[Exception], ring_format: str
) -> None:
    """Descriptors of the area are believed as little as the ring's."""
    if ring_format == "split":
        return
    queue = frontend.queue(0, SIZE)
    frontend.start(queue)
    ask(frontend, queue, 0)
    kept = os.pread(area[1], area[0].size, 0)
    gone(frontend)
    for what, place, flags in (("end", 0, 0), ("more than 2", 1, 1), ("INDIRECT", 0, 4)):
        os.pwrite(area[1], kept, 0)
        change(area, Packed.ENTRIES + PackedEntry.SIZE * place + PackedEntry.FLAGS, 2, flags)
        frontend = again(frontend, area, backend, tmp_path)
        assert len(errors) == 1 and what in str(errors.pop()), what
        gone(frontend)


def test_device_24_an_area_that_is_truncated_breaks_its_rings(
    frontend: Frontend, area: Area, backend: Backend, tmp_path: Path, devices: list[Keeper], errors: list[Exception]
) -> None:
    descriptor = os.memfd_create("area")
    os.write(descriptor, bytes(area[0].size))
    queue = frontend.queue(0, SIZE)
    frontend.start(queue)
    frontend = again(
        frontend, (area[0], descriptor), backend, tmp_path, base=0x8000_8000 if Feature.RING_PACKED in frontend.features else 0
    )
    ask(frontend, queue, 0)
    assert devices[-1].numbers == [0]
    os.ftruncate(descriptor, 0)
    ask(frontend, queue, 1)
    [error] = errors
    assert "in-flight area was taken away" in str(error)
    assert frontend.errors[0].drain()
    os.close(descriptor)
    frontend.socket.close()


def test_areas_that_do_not_fit(frontend: Frontend, area: Area, errors: list[Exception]) -> None:
    described, descriptor = area
    assert frontend.refused(F.SET_INFLIGHT_FD, wire.Inflight(described.size, 4096, 2, SIZE), [descriptor])
    assert frontend.refused(F.SET_INFLIGHT_FD, wire.Inflight(described.size, 0, 3, SIZE), [descriptor])
    assert frontend.refused(F.SET_INFLIGHT_FD, wire.Inflight(described.size - 4, 4, 2, SIZE), [descriptor])
    assert "aligned" in str(errors[-1])
    errors.clear()
    for wrong, what in (
        (wire.Inflight(described.size // 4, 0, 2, SIZE), "has no"),
        (wire.Inflight(described.size, 0, 2, SIZE // 2), "16 entries"),
    ):
        assert not frontend.refused(F.SET_INFLIGHT_FD, wrong, [descriptor]), what
        frontend.start(frontend.queue(0, SIZE))
        assert what in str(errors.pop())
        frontend.stop(0)
        assert not errors


def test_a_queue_refuses_a_region_that_is_none() -> None:
    memory, guest, area = Memory(1 << 16), GuestMemory(), Memory(4096)
    guest.add(0, memory)
    areas = (0, 4096, 8192)
    for inflight, what in (((area, 4097), "offset"), ((area, 4000), "96 bytes are left"), ((area, -1), "offset"), ((area, 4), "aligned")):
        with pytest.raises(ValueError, match=what):
            DeviceQueue(guest, 16, areas, inflight=inflight)
    for wrong in (area, (area,), (3, 3)):
        with pytest.raises((TypeError, ValueError), match="inflight"):
            DeviceQueue(guest, 16, areas, inflight=wrong)  # type: ignore[arg-type]
    queue = DeviceQueue(guest, 16, areas, inflight=(area, 64))
    with pytest.raises(BufferError):
        area.close()
    queue.close()
    area.close()
