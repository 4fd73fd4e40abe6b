"""An argument of the wrong type or out of range is named in the message, and so is the limit that the caller knows."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from tests.pair import BASE, Pair
from virtio import (
    BufferPool,
    DeviceQueue,
    DriverQueue,
    EventFd,
    Feature,
    GuestMemory,
    Memory,
    NetDevice,
    NetDriver,
    StatusError,
    layout,
    need_event,
)
from virtio._core import DevicePort, PortGroup
from virtio.transport.loopback import LoopbackTransport

SIZE = 1 << 20

Call = Callable[[Pair, Any], object]


def put_count(to: Any, value: Any) -> None:
    to.count = value


def chain_of(pair: Pair) -> Any:
    pair.driver.add("token", readable=[(BASE, 4)], writable=[(BASE + 64, 10)])
    pair.driver.publish()
    return pair.device.pop()[0]


def group(pair: Pair, senders: Any) -> PortGroup:
    """Of two ports, on any queues: nothing moves."""
    other = DeviceQueue(pair.guest, 8, pair.driver.areas, index=1)
    port = DevicePort(pair.device, other, features=1 << Feature.VERSION_1)
    return PortGroup((port, port), senders)


INTEGERS: list[tuple[str, Call]] = [
    ("memory size", lambda p, x: Memory(x)),
    ("huge page size", lambda p, x: Memory(4096, huge_page_size=x)),
    ("fd", lambda p, x: Memory.from_fd(x, 4096)),
    ("memory size", lambda p, x: Memory.from_fd(p.memory.fileno(), x)),
    ("offset", lambda p, x: Memory.from_fd(p.memory.fileno(), 4096, offset=x)),
    ("allocation size", lambda p, x: p.memory.allocate(x)),
    ("alignment", lambda p, x: p.memory.allocate(16, align=x)),
    ("offset", lambda p, x: p.memory.free(x)),
    ("offset", lambda p, x: p.memory.read(x, 1)),
    ("length", lambda p, x: p.memory.read(0, x)),
    ("offset", lambda p, x: p.memory.write(x, b"a")),
    ("width", lambda p, x: p.memory.load(0, x)),
    ("value", lambda p, x: p.memory.store(0, 8, x)),
    ("address", lambda p, x: p.guest.add(x, p.own)),
    ("offset", lambda p, x: p.guest.add(0, p.own, offset=x)),
    ("region length", lambda p, x: p.guest.add(0, p.own, length=x)),
    ("address", lambda p, x: p.guest.remove(x)),
    ("regions, number 1: address", lambda p, x: p.guest.replace([(0, p.own, 0, 64), (x, p.own, 64, 64)])),
    ("regions, number 0: offset", lambda p, x: p.guest.replace([(0, p.own, x, 64)])),
    ("regions, number 0: region length", lambda p, x: p.guest.replace([(0, p.own, 0, x)])),
    ("address", lambda p, x: p.guest.read(x, 1)),
    ("length", lambda p, x: p.guest.read(BASE, x)),
    ("dirty bitmap's pages", lambda p, x: p.guest.start_dirty_log(x)),
    ("fd", lambda p, x: EventFd.from_fd(x)),
    ("number of slots", lambda p, x: BufferPool(p.memory, x)),
    ("slot size", lambda p, x: BufferPool(p.memory, 4, slot_size=x)),
    ("burst capacity", lambda p, x: p.pool.burst(x)),
    ("burst count", lambda p, x: put_count(p.pool.burst(4), x)),
    ("burst row", lambda p, x: p.pool.burst(4).tobytes(x)),
    ("queue size", lambda p, x: DriverQueue(p.memory, x)),
    ("features", lambda p, x: DriverQueue(p.memory, 8, features=x)),
    ("address", lambda p, x: DriverQueue(p.memory, 8, address=x)),
    ("queue index", lambda p, x: DriverQueue(p.memory, 8, index=x)),
    ("indirect limit", lambda p, x: DriverQueue(p.memory, 8, indirect_limit=x)),
    ("readable segment 0: address", lambda p, x: p.driver.add(1, readable=[(x, 1)])),
    ("writable segment 1: length", lambda p, x: p.driver.add(1, readable=[(BASE, 1)], writable=[(BASE, 1), (BASE, x)])),
    ("limit", lambda p, x: p.driver.pop_used(x)),
    ("queue size", lambda p, x: DeviceQueue(p.guest, x, p.driver.areas)),
    ("areas: descriptor area", lambda p, x: DeviceQueue(p.guest, 8, (x, *p.driver.areas[1:]))),
    ("areas: driver area", lambda p, x: DeviceQueue(p.guest, 8, (p.driver.areas[0], x, p.driver.areas[2]))),
    ("areas: device area", lambda p, x: DeviceQueue(p.guest, 8, (*p.driver.areas[:2], x))),
    ("queue index", lambda p, x: DeviceQueue(p.guest, 8, p.driver.areas, index=x)),
    ("maximum queue size", lambda p, x: DeviceQueue(p.guest, 8, p.driver.areas, max_size=x)),
    ("chain limit", lambda p, x: DeviceQueue(p.guest, 8, p.driver.areas, chain_limit=x)),
    ("avail base", lambda p, x: DeviceQueue(p.guest, 8, p.driver.areas, base=x)),
    ("limit", lambda p, x: p.device.pop(x)),
    ("used length", lambda p, x: p.device.complete(chain_of(p), x)),
    ("count", lambda p, x: p.device.rewind(x)),
    ("batch capacity", lambda p, x: p.device.batch(x)),
    ("batch count", lambda p, x: put_count(p.device.batch(4), x)),
    ("length", lambda p, x: chain_of(p).read(x)),
    ("offset", lambda p, x: chain_of(p).write(b"a", offset=x)),
    ("queue size", lambda p, x: layout(x)),
    ("senders", lambda p, x: group(p, x)),
    ("pair", lambda p, x: group(p, 2).one(x)),
    ("limit", lambda p, x: group(p, 2).receive_frames(x)),
    ("event", lambda p, x: need_event(x, 0, 0)),
    ("new", lambda p, x: need_event(0, x, 0)),
    ("old", lambda p, x: need_event(0, 0, x)),
]


@pytest.mark.parametrize(("name", "call"), INTEGERS, ids=[f"{number} {name}" for number, (name, _) in enumerate(INTEGERS)])
def test_integers_are_named(name: str, call: Call) -> None:
    for value in ("8", 8.0, b"8"):
        with pytest.raises(TypeError, match=f"^{name}: '{type(value).__name__}' object cannot be interpreted as an integer"):
            call(Pair("split"), value)
    for value in (-1, 1 << 130):
        with pytest.raises(ValueError, match=f"{name}.* (-1|{1 << 130:#x}) "):
            call(Pair("split"), value)


BYTES: list[tuple[str, Call]] = [
    ("data", lambda p, x: p.memory.write(0, x)),
    ("data", lambda p, x: p.guest.write(BASE, x)),
    ("data", lambda p, x: p.pool.burst(1).write(x)),
    ("data", lambda p, x: p.pool.burst(1).header(x)),
    ("headers", lambda p, x: p.pool.burst(1).scatter(x)),
    ("data", lambda p, x: chain_of(p).write(x)),
]


@pytest.mark.parametrize(("name", "call"), BYTES, ids=[f"{number} {name}" for number, (name, _) in enumerate(BYTES)])
def test_bytes_are_named(name: str, call: Call) -> None:
    for value in ("text", 7, None):
        with pytest.raises(TypeError, match=f"{name}: a bytes-like object is required, not '{type(value).__name__}'"):
            call(Pair("split"), value)


OTHERS: list[tuple[str, Any, Call]] = [
    ("readable: 'int' object is not iterable", 7, lambda p, x: p.driver.add(1, readable=x)),
    ("writable: 'int' object is not iterable", 7, lambda p, x: p.driver.add(1, writable=x)),
    ("readable segment 1: .* of length 2, but got tuple of length 1", [(BASE, 1), (BASE,)], lambda p, x: p.driver.add(1, readable=x)),
    ("writable segment 0: 'int' object", [3], lambda p, x: p.driver.add(1, writable=x)),
    ("regions: 'int' object is not iterable", 7, lambda p, x: p.guest.replace(x)),
    ("regions, number 0: .* of length 4, but got tuple of length 1", [(BASE,)], lambda p, x: p.guest.replace(x)),
    ("regions, number 0: 'int' object .* 'Memory'", [(0, 1, 2, 3)], lambda p, x: p.guest.replace(x)),
    ("areas: .* of length 3, but got tuple of length 2", (0, 0), lambda p, x: DeviceQueue(p.guest, 8, x)),
    ("areas: 'None' is not", None, lambda p, x: DeviceQueue(p.guest, 8, x)),
]


@pytest.mark.parametrize(("message", "value", "call"), OTHERS, ids=[message for message, _, _ in OTHERS])
def test_what_is_made_of_several_parts_is_named(message: str, value: Any, call: Call) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        call(Pair("split"), value)


class Spoilt:
    """An argument whose own code raises."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __index__(self) -> int:
        raise self.error

    def __iter__(self) -> Any:
        raise self.error


def test_what_an_argument_raises_itself_comes_through() -> None:
    pair = Pair("split")
    for error in (KeyError("mine"), UnicodeDecodeError("ascii", b"", 0, 1, "mine")):
        calls = (partial(pair.memory.read, length=1), pair.driver.pop_used, lambda x: pair.driver.add(1, readable=x), pair.guest.replace)
        for call in calls:
            with pytest.raises(type(error)) as caught:
                call(Spoilt(error))  # type: ignore[arg-type]
            assert caught.value is error
    with pytest.raises(TypeError, match="offset: mine") as named:
        pair.memory.read(Spoilt(TypeError("mine")), 1)  # type: ignore[arg-type]
    assert any(entry.name == "__index__" for entry in named.traceback), "where it was raised is lost"


LIMITS: list[tuple[str, Call]] = [
    ("1024 slots of 2048 bytes: .*2097152.* 1 to 1048576", lambda p, _: BufferPool(p.memory, 1024)),
    ("448 slots of 2048 bytes: no room for 917504 bytes: the largest gap has", lambda p, _: crowded(p)),
    ("a queue of 32768 entries: .*524288", lambda p, _: DriverQueue(Memory(4096), 32768)),
    ("offset -1 is not in 0 to 1048576", lambda p, _: p.memory.read(-1, 1)),
    ("offset 1048577 is not in 0 to 1048576", lambda p, _: p.memory.write(SIZE + 1, b"")),
    ("length -1 is negative", lambda p, _: p.memory.read(0, -1)),
    ("length -1 is negative", lambda p, _: p.guest.read(BASE, -1)),
    ("length -1 is negative", lambda p, _: chain_of(p).read(-1)),
    ("offset 5 is not in 0 to 4", lambda p, _: chain_of(p).read(offset=5)),
    ("offset 11 is not in 0 to 10", lambda p, _: chain_of(p).write(b"", offset=11)),
    ("limit -1 is negative", lambda p, _: p.driver.pop_used(-1)),
    ("region length 0 is not in 1 to 16320", lambda p, _: p.guest.add(0, p.own, offset=64, length=0)),
    ("offset 16384 is not in 0 to 16383", lambda p, _: p.guest.add(0, p.own, offset=64 * 256)),
    ("burst row 0 is not below the burst's count, 0", lambda p, _: p.pool.burst(4).tobytes(0)),
    ("value -1 is not in 0 to 255$", lambda p, _: p.memory.store(0, 1, -1)),
    ("value 65536 is not in 0 to 65535$", lambda p, _: p.memory.store(0, 2, 1 << 16)),
    ("width 16 is not 1, 2, 4 or 8 bytes", lambda p, _: p.memory.store(0, 16, 1)),
    ("chain limit 0 is not in 1 to 1024", lambda p, _: DeviceQueue(p.guest, 8, p.driver.areas, chain_limit=0)),
    ("chain limit 5000 is not in 1 to 1024", lambda p, _: DeviceQueue(p.guest, 8, p.driver.areas, chain_limit=5000)),
    ("huge page size 3 is not a power of two from 4096 on", lambda p, _: Memory(4096, huge_page_size=3)),
    ("timeout -1.0 s is not 0 or more", lambda p, _: EventFd().wait(-1)),
    ("timeout NaN s is not 0 or more", lambda p, _: EventFd().wait(float("nan"))),
]


def crowded(pair: Pair) -> BufferPool:
    pair.memory.allocate(SIZE // 4)
    return BufferPool(pair.memory, 448)


@pytest.mark.parametrize(("message", "call"), LIMITS, ids=[message for message, _ in LIMITS])
def test_the_limit_is_one_that_the_caller_knows(message: str, call: Call) -> None:
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        call(Pair("split"), None)
    assert not re.search(rf"{(1 << 63) - 1}|float|Duration", str(caught.value))


def test_arguments_of_no_region_change_nothing() -> None:
    guest = GuestMemory()
    with pytest.raises(TypeError, match="address"):
        guest.add("0", Memory(4096))  # type: ignore[arg-type]
    assert guest.regions == []


def test_a_frame_that_is_none_is_named() -> None:
    with LoopbackTransport(device := NetDevice()) as transport, NetDriver(transport) as net:
        for port in (net, device):
            for frames, number in (([bytes(60), None], 1), ((bytes(60), bytes(60), "x"), 2), ("abc", 0)):
                with pytest.raises(TypeError, match=f"^frame {number}: "):
                    port.send_frames(frames)  # type: ignore[arg-type]
            for other in (b"abc", bytearray(60), None, 5):
                with pytest.raises(TypeError, match=r"^frames is a \w+: it has to be a list of frames"):
                    port.send_frames(other)  # type: ignore[arg-type]


def test_what_the_system_refuses_is_said_once_with_the_size() -> None:
    with pytest.raises(OSError, match="memory of 1125899906842624 bytes: ") as caught:
        Memory(1 << 50)
    assert "os error" not in str(caught.value)


def test_objects_show_what_they_are() -> None:
    pair = Pair("packed", 8)
    assert repr(pair.driver) == "<virtio.DriverQueue 0: packed, 8 entries>"
    assert repr(pair.device) == "<virtio.DeviceQueue 0: packed, 8 entries>"
    assert repr(pair.guest) == f"<virtio.GuestMemory of {len(pair.guest.regions)} regions>"
    memory = Memory(4096)
    assert repr(memory) == "<virtio.Memory of 4096 bytes>"
    memory.close()
    assert repr(memory) == "<virtio.Memory of 4096 bytes, closed>"
    with pytest.raises(StatusError, match="the memory is closed"), memory:
        pass
