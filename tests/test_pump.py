"""Frames between a TAP and a queue, in a thread without the GIL."""

import contextlib
import os
import signal
import socket
import threading

import pytest

from tests.pair import BASE
from tests.pump_lane import TSO, Lane, asleep, running, until
from virtio import BadUsedElement, BufferPool, Feature, MalformedChain, Memory, NetDevice, NetFeature, StatusError, TransportError
from virtio._core import Pump, PumpRunner


@pytest.mark.parametrize("together", [True, False], ids=["one runner", "two runners"])
@pytest.mark.parametrize("way", ["transmit", "receive"])
def test_frames_go_from_tap_to_tap(ring_format: str, way: str, together: bool) -> None:
    lane = Lane(ring_format, way, NetFeature.MRG_RXBUF, Feature.EVENT_IDX)
    with contextlib.ExitStack() as stack:
        for pumps in [lane.pumps] if together else [[pump] for pump in lane.pumps]:
            stack.enter_context(running(*pumps))
        for round in range(200):
            frames = [os.urandom(1 + (round * 37 + k * 211) % 1514) for k in range(5)]
            for frame in frames:
                lane.source.send(frame)
            assert [lane.sink.receive() for _ in frames] == frames
        assert all(pump.running and pump.error is None for pump in lane.pumps)
    for pump in lane.pumps:
        seen = pump.statistics
        assert seen["frames"] == 1000 and not seen["drops"] and not seen["refused"] and not pump.running


@pytest.mark.parametrize("slot_size", [2048, 65664])
@pytest.mark.parametrize("mergeable", [True, False], ids=["mergeable", "whole"])
@pytest.mark.parametrize("way", ["transmit", "receive"])
def test_frames_of_64_kib(ring_format: str, way: str, mergeable: bool, slot_size: int) -> None:
    more = {NetFeature.MRG_RXBUF} if mergeable else set()
    for indirect in (set(), {Feature.INDIRECT_DESC}):
        lane = Lane(ring_format, way, *TSO, *more, *indirect, slots=128, slot_size=slot_size)
        # TCP over IPv4, segments of 1448 bytes behind 54 of headers, the checksum to be completed.
        header = bytes([1, 1, 54, 0, 1448 & 0xFF, 1448 >> 8, 34, 0, 16, 0, 0, 0])
        with running(*lane.pumps):
            for length in (65589, 60, 3000, 65589, 1514) * 8:
                frame = os.urandom(length)
                lane.source.send(frame, header)
                data = lane.sink.far.recv(1 << 17)
                assert data[:10] == header[:10] and data[12:] == frame
        assert [pump.statistics["drops"] for pump in lane.pumps] == [{}, {}]


def test_both_directions_in_one_runner(ring_format: str) -> None:
    there, back = Lane(ring_format, "transmit"), Lane(ring_format, "receive")
    with running(*there.pumps, *back.pumps):
        for k in range(100):
            for lane in (there, back):
                lane.source.send(bytes([k]) * 60)
            assert [lane.sink.receive() for lane in (there, back)] == [bytes([k]) * 60] * 2


@pytest.mark.parametrize("way", ["transmit", "receive"])
def test_idle_pumps_sleep_and_starved_ones_too(ring_format: str, way: str) -> None:
    lane = Lane(ring_format, way, size=8)
    with running(*lane.pumps):
        for pump in lane.pumps:
            asleep(pump)
    # The far end alone, or the near one: the TAP has frames, and the queue no place for them.
    lane = Lane(ring_format, way, size=8)
    starved = lane.near_pump if way == "transmit" else lane.far_pump
    with running(starved):
        for _ in range(12):
            lane.source.send(bytes(60))
        asleep(starved)
        assert starved.statistics["frames"] == (8 if way == "transmit" else 0)


def test_frames_for_which_there_are_never_enough_buffers_do_not_stop_the_others(ring_format: str) -> None:
    lane = Lane(ring_format, "receive", NetFeature.MRG_RXBUF, *TSO, size=64, slots=20)  # ten buffers of 2048 bytes, less headroom
    header = bytes([1, 1, 54, 0, 1448 & 0xFF, 1448 >> 8, 34, 0, 16, 0, 0, 0])
    with running(*lane.pumps):
        for k in range(5):
            lane.source.send(bytes(65589), header)
            lane.source.send(bytes([k]) * 10000)
            assert lane.sink.receive() == bytes([k]) * 10000
        asleep(lane.far_pump)
        assert lane.far_pump.statistics["drops"] == {"long": 5}


@pytest.mark.parametrize("again", range(3))
@pytest.mark.parametrize("end", ["driver", "device"])
@pytest.mark.parametrize("way", ["transmit", "receive"])
def test_a_reset_under_load_does_not_wait_for_the_load_to_end(ring_format: str, way: str, end: str, again: int) -> None:
    lane = Lane(ring_format, way)
    queue, pump = (lane.driver, lane.near_pump) if end == "driver" else (lane.device, lane.far_pump)
    ended = threading.Event()

    def load() -> None:
        lane.source.far.setblocking(False)
        while not ended.is_set():
            with contextlib.suppress(BlockingIOError):
                lane.source.send(bytes(1000))

    loader = threading.Thread(target=load)
    loader.start()
    try:
        with pytest.raises(StatusError, match="queue is closed"), running(*lane.pumps) as runner:
            until(lambda: bool(lane.near_pump.statistics["frames"] > 100 or lane.far_pump.statistics["frames"] > 100))
            for _ in range(20):
                assert queue.snapshot()["ring_format"] == ring_format
                assert queue.counters and queue.broken is None
            queue.reset()
            until(lambda: pump.error is not None)
            assert runner.failed.wait(60)
            assert not pump.running and isinstance(pump.error, StatusError)
    finally:
        ended.set()
        loader.join()


def test_a_queue_that_closes_wakes_a_sleeping_pump(ring_format: str) -> None:
    one, other = Lane(ring_format, "transmit"), Lane(ring_format, "transmit")
    with pytest.raises(StatusError, match="closed"), running(*one.pumps, *other.pumps) as runner:
        asleep(one.near_pump)
        one.driver.close()
        assert runner.failed.wait(60)
        until(lambda: not one.near_pump.running)
        assert one.far_pump.running  # the others go on
        other.source.send(b"frame")
        assert other.sink.receive() == b"frame"


def test_a_broken_queue_ends_its_pump_alone(ring_format: str) -> None:
    lane, other = Lane(ring_format, "transmit"), Lane(ring_format, "transmit")
    with pytest.raises(MalformedChain) as raised, running(lane.far_pump, *other.pumps) as runner:
        asleep(lane.far_pump)
        lane.guest.remove(BASE)
        source = lane.pool.burst(1)
        lane.pool.take(source)
        source.lengths[:] = 100
        source.count = 1
        lane.driver.add_burst(source)
        assert runner.failed.wait(60)
        until(lambda: lane.far_pump.error is not None)
        assert lane.far_pump.error is lane.device.broken
        other.source.send(b"frame")
        assert other.sink.receive() == b"frame"
    assert raised.value is lane.device.broken


def test_a_device_that_lies_ends_the_drivers_pump(ring_format: str) -> None:
    lane = Lane(ring_format, "transmit")
    with pytest.raises(BadUsedElement), running(lane.near_pump) as runner:
        lane.source.send(b"frame")
        until(lambda: lane.driver.counters["added"] == 1)
        device = lane.driver.areas[2]
        if ring_format == "split":
            lane.guest.write(device + 4, (7).to_bytes(4, "little"))  # a head that is not outstanding
            lane.guest.store(device + 2, 2, 1)
        else:
            descriptor = lane.driver.areas[0]
            lane.guest.store(descriptor + 12, 2, 9)
            lane.guest.store(descriptor + 14, 2, 1 << 7 | 1 << 15)
        lane.source.send(b"frame")
        assert runner.failed.wait(60)
        until(lambda: lane.near_pump.error is not None)
        assert lane.near_pump.error is lane.driver.broken


@pytest.mark.parametrize("way", ["transmit", "receive"])
def test_a_tap_that_is_gone_ends_its_pump(ring_format: str, way: str) -> None:
    lane = Lane(ring_format, way)
    with pytest.raises(TransportError, match="TAP"), running(*lane.pumps) as runner:
        asleep(lane.near_pump)
        lane.source.near.shutdown(socket.SHUT_RDWR)
        assert runner.failed.wait(60)


def test_a_runner_stops_at_once_and_gives_its_pumps_back(ring_format: str) -> None:
    lane = Lane(ring_format, "transmit")
    early = PumpRunner(lane.pumps)
    early.stop()
    early.run()
    for _ in range(100):
        with running(*lane.pumps) as runner:
            until(lambda: lane.near_pump.running)
            with pytest.raises(StatusError, match="runs"):
                lane.near_pump.close()
            with pytest.raises(StatusError, match="runs"):
                PumpRunner([lane.near_pump]).run()
            runner.stop()
        assert not lane.near_pump.running
    lane.near_pump.close()
    with pytest.raises(StatusError, match="closed"):
        PumpRunner(lane.pumps).run()
    assert not lane.far_pump.running


def test_the_tap_is_a_duplicate_that_closes_with_the_pump() -> None:
    lane = Lane("split", "transmit")
    lane.near.near.close()
    lane.source.send(b"frame")
    with running(*lane.pumps):
        assert lane.sink.receive() == b"frame"
    lane.near_pump.close()
    with pytest.raises(ConnectionError):
        lane.source.send(b"frame")


def test_what_cannot_be_is_refused() -> None:
    lane = Lane("split", "transmit")
    tap = lane.near.near.fileno()
    known = lane.features
    with pytest.raises(ValueError, match="1 to 31"):
        PumpRunner([])
    with pytest.raises(ValueError, match="twice"):
        PumpRunner([lane.near_pump, lane.near_pump])
    with pytest.raises(ValueError, match="VERSION_1"):
        Pump.device_transmit(lane.device, tap, features=0, doorbell=lane.doorbell)
    with pytest.raises(OSError, match="F_DUPFD"):
        Pump.device_transmit(lane.device, 1 << 20, features=known, doorbell=lane.doorbell)
    for longest in (0, 65590):
        with pytest.raises(ValueError, match=f"longest frame {longest} is not in 1 to 65589"):
            Pump.device_receive(lane.device, tap, features=known, doorbell=lane.doorbell, longest=longest)
    small = BufferPool(lane.memory, 16)
    for make in (Pump.driver_transmit, Pump.driver_receive):
        with pytest.raises(ValueError, match=r"of 65589 bytes takes 34 slots.* use slots of 65664 bytes"):
            make(lane.driver, small, tap, features=known | TSO, interrupt=lane.interrupt)
    with pytest.raises(ValueError, match="memory"):
        Pump.driver_transmit(lane.driver, BufferPool(Memory(1 << 20), 16), tap, features=known, interrupt=lane.interrupt)
    lane.driver.close()
    with pytest.raises(StatusError, match="closed"):
        Pump.driver_transmit(lane.driver, lane.pool, tap, features=known, interrupt=lane.interrupt)


def test_a_device_tells_its_doorbells() -> None:
    assert NetDevice().doorbell(0) is None


class Asked(Exception):
    """Raised by a signal handler."""


@pytest.mark.parametrize("hears", ["this thread", "another"])
@pytest.mark.parametrize("load", ["idle", "busy"])
def test_a_signal_handler_ends_a_runner_in_the_main_thread(ring_format: str, load: str, hears: str) -> None:
    lane = Lane(ring_format, "transmit")
    runner = PumpRunner(lane.pumps)
    ended, gave_up = threading.Event(), threading.Event()
    runs: list[int] = []

    def handler(number: int, frame: object) -> None:
        runs.append(number)
        if len(runs) == 2:  # the first one raises nothing, and nothing ends
            raise Asked

    def ask() -> None:
        to = threading.main_thread() if hears == "this thread" else threading.current_thread()
        assert to.ident is not None
        try:
            until(lambda: lane.near_pump.running and (load == "idle" or lane.near_pump.statistics["frames"] > 100))
            for count in (1, 2):
                signal.pthread_kill(to.ident, signal.SIGUSR1)
                until(lambda count=count: len(runs) == count)  # type: ignore[misc]
        finally:
            if not ended.wait(60):
                gave_up.set()
                runner.stop()

    def send() -> None:
        lane.source.far.setblocking(False)
        while not ended.is_set():
            with contextlib.suppress(BlockingIOError):
                lane.source.send(bytes(1000))

    threads = [threading.Thread(target=work) for work in ([ask] if load == "idle" else [ask, send])]
    before = signal.signal(signal.SIGUSR1, handler)
    try:
        for thread in threads:
            thread.start()
        with pytest.raises(Asked):
            runner.run()
    finally:
        ended.set()
        for thread in threads:
            thread.join()
        signal.signal(signal.SIGUSR1, before)
    assert not gave_up.is_set() and not lane.near_pump.running
    with running(*lane.pumps):
        until(lambda: lane.near_pump.running)


def test_a_queue_has_one_pump_at_a_time(ring_format: str) -> None:
    lane = Lane(ring_format, "transmit")
    runner = PumpRunner([lane.far_pump])
    ended: list[BaseException] = []

    def run() -> None:
        try:
            runner.run()
        except BaseException as error:
            ended.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    asleep(lane.far_pump)
    second = Pump.device_transmit(lane.device, lane.far.near.fileno(), features=lane.features, doorbell=lane.doorbell)
    with pytest.raises(StatusError, match="has a pump that runs already"):
        PumpRunner([second]).run()
    assert not second.running
    lane.device.close()  # and the first one hears of it
    thread.join(60)
    assert not thread.is_alive() and isinstance(ended[0], StatusError)
