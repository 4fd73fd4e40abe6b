"""The entropy device, both ends (5.4)."""

import ast
import io
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.transports import KINDS, AnyTransport, over
from virtio import DeviceId, DeviceQueue, Features, Memory, SpecViolation, StatusError
from virtio.device import Device, DeviceState
from virtio.devices import rng
from virtio.devices.rng import BUFFER_SIZE, READ_LIMIT, RngDevice, RngDriver
from virtio.driver import DriverState
from virtio.testing import RawPackedDevice, RawPackedDriver, RawSplitDevice, RawSplitDriver


def counting() -> Callable[[int], bytes]:
    """A source that counts bytes up, so that a lost or doubled one is seen."""
    numbers = iter(range(1 << 62))
    return lambda count: bytes(next(numbers) % 251 for _ in range(count))


def expected(count: int) -> bytes:
    return bytes(number % 251 for number in range(count))


class Answers(Device):
    """An entropy device whose answers a test gives."""

    device_id = DeviceId.ENTROPY
    queues = ("requestq",)

    def __init__(self, answer: Callable[[DeviceQueue], None]) -> None:
        super().__init__()
        self.answer = answer

    def on_requestq(self, queue: DeviceQueue) -> None:
        self.answer(queue)


@pytest.fixture(params=KINDS)
def transport_to(request: pytest.FixtureRequest) -> Iterator[Callable[[Device], AnyTransport]]:
    transports: list[AnyTransport] = []

    def make(device: Device) -> AnyTransport:
        transports.append(over(request.param, device))
        return transports[-1]

    yield make
    for transport in transports:
        transport.close()


TransportTo = Callable[[Device], AnyTransport]


@pytest.mark.parametrize("count", [0, 1, 16, BUFFER_SIZE, BUFFER_SIZE + 1, 3 * BUFFER_SIZE])
def test_as_many_bytes_as_asked_for_come_in_order(transport_to: TransportTo, ring_features: Features, ring_format: str, count: int) -> None:
    with RngDriver(transport_to(RngDevice(counting())), wanted=ring_features) as driver:
        assert driver.read(count) == expected(count)
        assert driver.requestq.ring_format == ring_format


def test_many_reads_go_round_the_ring(transport_to: TransportTo, ring_features: Features) -> None:
    with RngDriver(transport_to(RngDevice(counting())), wanted=ring_features) as driver:
        assert b"".join(driver.read(7) for _ in range(100)) == expected(700)


def test_all_features_that_rings_have_work(transport_to: TransportTo) -> None:
    with RngDriver(transport_to(RngDevice())) as driver:
        first, second = driver.read(32), driver.read(32)
        assert first != second and len(first) == len(second) == 32


def test_a_source_may_give_less_than_it_is_asked_for(transport_to: TransportTo, ring_features: Features) -> None:
    counted = counting()
    with RngDriver(transport_to(RngDevice(lambda count: counted(min(count, 3)))), wanted=ring_features) as driver:
        assert driver.read(10) == expected(10)


def test_a_source_that_gives_nothing_is_an_error_that_comes_through(transport_to: TransportTo) -> None:
    with RngDriver(transport_to(RngDevice(lambda count: b""))) as driver, pytest.raises(ValueError, match="gave none"):
        driver.read(1)


def test_a_source_that_fails_once_loses_no_request(transport_to: TransportTo, ring_features: Features) -> None:
    numbers, failures = counting(), [OSError("no entropy for now")]

    def source(count: int) -> bytes:
        if failures:
            raise failures.pop()
        return numbers(count)

    with RngDriver(transport_to(RngDevice(source)), wanted=ring_features) as driver:
        with pytest.raises(OSError, match="no entropy for now"):
            driver.read(8)
        assert driver.requestq.outstanding == 1
        assert driver.read(8) == expected(8)


def test_what_was_answered_before_the_source_fails_is_published(transport_to: TransportTo, ring_features: Features) -> None:
    pieces = iter((b"a", None, b"b", b"c"))

    def source(count: int) -> bytes:
        if (piece := next(pieces)) is None:
            raise OSError("no entropy for now")
        return piece

    device = RngDevice(source)
    with RngDriver(transport_to(device), wanted=ring_features) as driver:
        for token in range(3):
            driver.requestq.add(token, writable=[(driver.address + driver.buffer + token, 1)])
        driver.requestq.publish()
        with pytest.raises(OSError, match="no entropy for now"):
            device.poll()
        far_end = device.queue(0)
        assert driver.requestq.pop_used() == [(0, 1)] and far_end is not None and far_end.outstanding == 0
        device.poll()
        assert driver.requestq.pop_used() == [(1, 1), (2, 1)]
        assert driver.memory.read(driver.buffer, 3) == b"abc"


def test_the_handler_alone_publishes_what_it_answered(transport_to: TransportTo, ring_features: Features) -> None:
    pieces = iter((b"a", b""))
    device = RngDevice(lambda count: next(pieces))
    with RngDriver(transport_to(device), wanted=ring_features) as driver:
        for token in range(2):
            driver.requestq.add(token, writable=[(driver.address + driver.buffer + token, 1)])
        driver.requestq.publish()
        far_end = device.queue(0)
        assert far_end is not None
        with pytest.raises(ValueError, match="gave none"):
            device.on_requestq(far_end)
        assert driver.requestq.pop_used() == [(0, 1)]


def test_a_count_out_of_range_is_refused(transport_to: TransportTo) -> None:
    with RngDriver(transport_to(RngDevice())) as driver:
        for count in (-1, READ_LIMIT + 1, 1 << 70):
            with pytest.raises(ValueError, match=rf"count {count} is outside 0\.\.{READ_LIMIT}"):
                driver.read(count)
        assert driver.requestq.outstanding == 0


def test_a_count_that_is_no_integer_is_refused(transport_to: TransportTo) -> None:
    with RngDriver(transport_to(RngDevice())) as driver:
        for count in (1.5, float("inf"), None, "4"):
            with pytest.raises(TypeError, match=r"count is .*: it has to be an integer"):
                driver.read(count)  # type: ignore[arg-type]
        assert driver.requestq.outstanding == 0


def test_a_device_that_writes_nothing_is_not_asked_for_ever(transport_to: TransportTo, ring_features: Features) -> None:
    def nothing(queue: DeviceQueue) -> None:
        for chain in queue.pop():
            queue.complete(chain, 0)
        queue.publish()

    with RngDriver(transport_to(Answers(nothing)), wanted=ring_features) as driver:
        for _ in range(2):
            with pytest.raises(SpecViolation, match=r"without a random byte in it \(5\.4\.6\.2\)"):
                driver.read(1)


def test_only_the_used_length_counts(transport_to: TransportTo, ring_features: Features) -> None:
    def half(queue: DeviceQueue) -> None:
        for chain in queue.pop():
            chain.write(b"\xaa" * chain.writable)
            queue.complete(chain, chain.writable // 2 or 1)
        queue.publish()

    with RngDriver(transport_to(Answers(half)), wanted=ring_features) as driver:
        requests = driver.requestq.counters["added"]
        assert driver.read(8) == b"\xaa" * 8
        assert driver.requestq.counters["added"] - requests == 4, "halves of 8, 4, 2 and 1"


def test_driver_03_a_used_length_beyond_the_buffer_is_clamped(transport_to: TransportTo, ring_features: Features) -> None:
    transport: AnyTransport
    boasted: list[bool] = []

    def boast(queue: DeviceQueue) -> None:
        """The far end by hand: one used element that claims 4 GiB less 1, once."""
        if boasted:
            return
        boasted.append(True)
        if queue.ring_format == "packed":
            packed = RawPackedDevice(transport.device.memory, queue.size, queue.areas)
            ((descriptor,),) = packed.available()
            packed.use(descriptor.id, 0xFFFF_FFFF)
        else:
            split = RawSplitDevice(transport.device.memory, queue.size, queue.areas)
            (head,) = split.available()
            split.use(head, 0xFFFF_FFFF)
        transport.interrupt(0).signal()

    transport = transport_to(Answers(boast))
    with RngDriver(transport, wanted=ring_features) as driver:
        assert driver.read(5) == bytes(5)
        assert driver.requestq.counters["clamped"] == 1


def test_an_answer_that_comes_late_is_the_next_reads(transport_to: TransportTo, ring_features: Features) -> None:
    device = Answers(lambda queue: None)
    with RngDriver(transport_to(device), wanted=ring_features) as driver:
        for _ in range(3):
            with pytest.raises(TimeoutError, match=r"within 0\.01 s"):
                driver.read(4, timeout=0.01)
        assert driver.requestq.outstanding == 1, "the device keeps its buffer, and nobody posts it twice"

        def late(queue: DeviceQueue) -> None:
            for chain in queue.pop():
                queue.complete(chain, chain.write(b"late"[: chain.writable]))
            queue.publish()

        device.answer = late
        assert driver.read(6) == b"latela"
        assert driver.read(2) == b"la"


def test_a_request_with_something_to_read_breaks_the_device(transport_to: TransportTo, ring_features: Features) -> None:
    device = RngDevice()
    with RngDriver(transport_to(device), wanted=ring_features) as driver:
        place = driver.address + driver.buffer
        driver.requestq.add("bad", readable=[(place, 1)], writable=[(place + 1, 1)])
        driver.requestq.publish()
        with pytest.raises(SpecViolation, match=r"1 readable and 1 writable bytes \(5\.4\.6\.1\)"):
            device.poll()
        assert device.state is DeviceState.NEEDS_RESET
        assert driver.reset() == {0: ["bad"]}


def test_a_device_of_another_type_is_refused(transport_to: TransportTo) -> None:
    class Other(RngDevice):
        device_id = DeviceId.BLOCK

    transport = transport_to(Other())
    with pytest.raises(ValueError, match="RngDriver drives devices of type 4, not 2"):
        RngDriver(transport)
    assert transport.device.status == 0 and transport.device.memory.regions == []


def test_memory_may_be_somebody_elses(transport_to: TransportTo) -> None:
    with Memory(1 << 16) as memory:
        with RngDriver(transport_to(RngDevice(counting())), memory=memory) as driver:
            assert driver.read(8) == expected(8)
        assert driver.state is DriverState.CLOSED and not memory.closed
        with pytest.raises(StatusError):
            driver.read(1)


def test_memory_of_somebody_else_is_given_back_whole(transport_to: TransportTo) -> None:
    transport = transport_to(RngDevice())
    with Memory(1 << 16) as memory:
        for _ in range(20):
            with RngDriver(transport, memory=memory) as driver:
                driver.read(4)
        memory.free(memory.allocate(1 << 16))


def test_hostile_requests_make_the_device_need_a_reset(transport_to: TransportTo, ring_features: Features) -> None:
    device = RngDevice()
    with RngDriver(transport_to(device), wanted=ring_features) as driver:
        queue = driver.requestq
        raw: RawSplitDriver | RawPackedDriver
        if queue.ring_format == "packed":
            raw = RawPackedDriver(driver.memory, queue.size, queue.areas, address=driver.address)
            raw.add([(1 << 60, 16, True)])
        else:
            raw = RawSplitDriver(driver.memory, queue.size, queue.areas, address=driver.address)
            raw.make_available(raw.add([(1 << 60, 16, True)]))
        with pytest.raises(SpecViolation, match="0x1000000000000000"):
            device.poll()
        assert device.state is DeviceState.NEEDS_RESET


def test_both_ends_together_have_at_most_sixty_lines() -> None:
    source = Path(rng.__file__).read_text()
    documented: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            documented |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    blank = {tokenize.NL, tokenize.NEWLINE, tokenize.COMMENT, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    code = {token.start[0] for token in tokenize.generate_tokens(io.StringIO(source).readline) if token.type not in blank}
    assert len(code - documented) <= 60
