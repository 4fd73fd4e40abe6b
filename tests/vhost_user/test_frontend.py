"""Our drivers on a back-end of ours that is another process: traffic, configuration, loss and return."""

import os
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.leftovers import all_closed
from tests.vhost_user.serving import PATIENCE, Serving, until
from virtio import DeviceId, Driver, Feature, FeatureNegotiationError, Memory, NetDevice, NetDriver, StatusError, TransportError
from virtio.devices.net import NetFeature
from virtio.devices.rng import RngDevice, RngDriver
from virtio.errors import DeviceNeedsReset
from virtio.features import Features
from virtio.spec import Status
from virtio.transport.vhost_user import QUEUE_SIZE, VhostUserTransport
from virtio.vhost_user.backend import Backend
from virtio.vhost_user.frontend import PROTOCOL
from virtio.vhost_user.message import ProtocolFeature
from virtio.vhost_user.reconnecting import LONGEST_RETRY
from virtio.vhost_user.table import MemoryTable

NOTHING = Features()
WITHOUT = {
    "all": PROTOCOL,
    "no REPLY_ACK": PROTOCOL - {ProtocolFeature.REPLY_ACK},
    "no memory slots": PROTOCOL - {ProtocolFeature.CONFIGURE_MEM_SLOTS},
    "no STATUS": PROTOCOL - {ProtocolFeature.STATUS, ProtocolFeature.RESET_DEVICE},
    "none": NOTHING,
}


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    with all_closed():
        yield


def expected(first: int, count: int) -> bytes:
    return bytes(number % 251 for number in range(first, first + count))


def exchange(net: NetDriver, frames: list[bytes]) -> None:
    """The device sends back what it gets, in order."""
    sent = 0
    got: list[bytes] = []
    while len(got) < len(frames):
        sent += net.send_frames(frames[sent : len(got) + 100])  # no more on the way than there are receive buffers
        net.wait(PATIENCE)
        got += net.receive_frames()
    assert got == frames


def frames(count: int, first: int = 0) -> list[bytes]:
    return [number.to_bytes(4, "big") + bytes([number % 251]) * (56 + number % 700) for number in range(first, first + count)]


@pytest.mark.parametrize("protocol", WITHOUT.values(), ids=WITHOUT)
def test_a_generator_answers_in_both_formats(path: str, ring_features: Features, ring_format: str, protocol: Features) -> None:
    with (
        Serving(path, "rng"),
        VhostUserTransport(path, DeviceId.ENTROPY, timeout=PATIENCE, protocol_features=protocol) as transport,
        RngDriver(transport, wanted=ring_features) as rng,
    ):
        assert rng.requestq.ring_format == ring_format
        assert b"".join(rng.read(100) for _ in range(30)) == expected(0, 3000)
        assert transport.frontend.protocol == protocol & transport.frontend.offered_protocol


@pytest.mark.parametrize("extra", [NOTHING, {Feature.EVENT_IDX, Feature.INDIRECT_DESC, NetFeature.MRG_RXBUF}, {Feature.IN_ORDER}])
def test_frames_go_there_and_back(path: str, ring_features: Features, extra: set[int]) -> None:
    offered = sorted(ring_features | extra | {NetFeature.MAC})
    with Serving(path, offered=offered), VhostUserTransport(path, DeviceId.NETWORK, timeout=PATIENCE) as transport:
        with NetDriver(transport, wanted=ring_features | extra | {NetFeature.MAC}) as net:
            assert net.features == set(offered)
            exchange(net, frames(2000))
            net.restart()
            exchange(net, frames(500))
        with NetDriver(transport) as again:  # the same connection, another driver with other memory
            exchange(again, frames(100))


def test_several_memories_and_a_shared_pool(path: str, tmp_path: Path) -> None:
    other = str(tmp_path / "o")
    with (
        Serving(path),
        Serving(other),
        VhostUserTransport(path, DeviceId.NETWORK, timeout=PATIENCE) as a,
        VhostUserTransport(other, DeviceId.NETWORK, timeout=PATIENCE) as b,
        NetDriver(a) as net,
        NetDriver(b, pool=net.pool) as far,
    ):
        memories = [Memory(1 << 16) for _ in range(7)]
        addresses = [a.attach(memory) for memory in memories]
        assert len(set(addresses)) == 7
        with pytest.raises(ValueError, match="attached already"):
            a.attach(memories[0])
        exchange(net, frames(200))
        exchange(far, frames(200))
        for memory in memories[::2]:
            a.detach(memory)
        with pytest.raises(ValueError, match="not attached"):
            a.detach(memories[0])
        exchange(net, frames(200))


def test_more_memories_than_a_table_has(path: str) -> None:
    with (
        Serving(path, protocol=sorted(NOTHING)),
        VhostUserTransport(path, DeviceId.NETWORK, timeout=PATIENCE) as transport,
        NetDriver(transport) as net,
    ):
        for _ in range(7):
            transport.attach(Memory(4096))
        with pytest.raises(TransportError, match="takes 8 memories"):
            transport.attach(Memory(4096))
        exchange(net, frames(100))


def test_configuration_is_read_and_its_changes_are_noticed(path: str) -> None:
    with Serving(path, mtu=1400, mac="020304050607") as backend, VhostUserTransport(path, DeviceId.NETWORK, timeout=PATIENCE) as transport:
        assert transport.has_config
        with NetDriver(transport) as net:
            assert (net.mac.hex(), net.mtu, net.link) == ("020304050607", 1400, True)
            generation = transport.config_generation
            backend.tell("link down")
            while net.link:
                assert net.wait(PATIENCE)
            assert transport.config_generation > generation
            with pytest.raises(ValueError, match="outside"):
                transport.config_read(4000, 100)
            with pytest.raises(ValueError, match="refuses SET_CONFIG"):
                net.write_config(0, b"\0")
            exchange(net, frames(10))


def test_what_cannot_be_read_is_not_accepted(path: str) -> None:
    protocol = PROTOCOL - {ProtocolFeature.CONFIG}
    with Serving(path), VhostUserTransport(path, DeviceId.NETWORK, timeout=PATIENCE, protocol_features=protocol) as transport:
        assert not transport.has_config
        assert transport.offered() >= {NetFeature.MAC, NetFeature.STATUS}
        with NetDriver(transport) as net:
            assert not net.features & {NetFeature.MAC, NetFeature.STATUS, NetFeature.MTU}
            assert net.link and net.mtu == 1500
            with pytest.raises(ValueError, match="does not offer CONFIG"):
                transport.config_read(0, 6)
            exchange(net, frames(10))


def test_bits_that_are_masked(path: str) -> None:
    with (
        Serving(path),
        VhostUserTransport(path, DeviceId.NETWORK, timeout=PATIENCE, masked={Feature.RING_PACKED, NetFeature.MAC}) as transport,
    ):
        assert not transport.offered() & {Feature.RING_PACKED, NetFeature.MAC, Feature.ACCESS_PLATFORM, 30, *range(64, 128)}
        assert Feature.RING_PACKED in transport.frontend.offered
        with NetDriver(transport) as net:
            assert net.receiveq.ring_format == "split"


def test_a_queue_is_reset_alone(path: str, ring_features: Features) -> None:
    with (
        Serving(path),
        VhostUserTransport(path, DeviceId.NETWORK, timeout=PATIENCE) as transport,
        NetDriver(transport, wanted=ring_features | {Feature.RING_RESET}) as net,
    ):
        for _ in range(3):
            exchange(net, frames(50))
            net.reset_queue(1)
            net.setup_queue(1)
            exchange(net, frames(50))


def test_a_queue_that_is_reset_alone_grows_no_further_than_is_tracked(path: str, ring_features: Features) -> None:
    wanted = ring_features | {Feature.RING_RESET, NetFeature.MAC}
    with (
        Serving(path) as backend,
        VhostUserTransport(path, DeviceId.NETWORK, timeout=PATIENCE) as transport,
        NetDriver(transport, queue_size=64, wanted=wanted) as net,
    ):
        exchange(net, frames(30))
        net.reset_queue(1)
        assert (transport.queue_max(0), transport.queue_max(1)) == (64, 64)
        with pytest.raises(ValueError, match="1 to 64 entries, not 128: the back-end tracks so many until a reset"):
            transport.queue_setup(1, 128, (0, 0, 0))
        net.setup_queue(1, size=128)  # lowered, as ever, to what the device has
        assert net.transmitq.size == 64
        exchange(net, frames(30))
        before = transport.reconnections
        backend.kill()
        backend.start()
        until(lambda: transport.reconnections > before)
        sent, got = frames(10, first=100), list[bytes]()
        assert net.send_frames(sent) == len(sent)
        while got[-len(sent) :] != sent:  # behind what it sent a second time, having died before it said so
            net.wait(PATIENCE)
            got += net.receive_frames()
            assert len(got) <= 90
        assert not transport.status & Status.NEEDS_RESET
        transport.reset()
        assert transport.queue_max(1) == QUEUE_SIZE


def test_a_memory_is_attached_though_the_back_end_ends_over_it(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change = MemoryTable.change

    def end(*_: object) -> None:
        monkeypatch.setattr(MemoryTable, "change", change)
        raise LookupError("this connection ends")

    with Backend(path, lambda: RngDevice(bytes), report=lambda _: None) as backend, ThreadPoolExecutor(1) as pool:
        served = pool.submit(backend.serve)
        try:
            with VhostUserTransport(path, DeviceId.ENTROPY, timeout=PATIENCE) as transport, RngDriver(transport) as driver:
                assert driver.read(16, timeout=PATIENCE) == bytes(16)
                monkeypatch.setattr(MemoryTable, "change", end)
                with Memory(1 << 16) as memory:
                    transport.attach(memory)
                    assert driver.read(16, timeout=PATIENCE) == bytes(16)
                    assert transport.reconnections == 1
                    transport.detach(memory)
        finally:
            backend.stop()
        served.result(PATIENCE)


def test_queues_that_there_are(path: str) -> None:
    with Serving(path), VhostUserTransport(path, DeviceId.NETWORK, timeout=PATIENCE, queue_size=512) as transport:
        assert transport.num_queues == 2
        assert [transport.queue_max(index) for index in (-1, 0, 1, 2)] == [0, 512, 512, 0]
        with pytest.raises(ValueError, match="no queue 2"):
            transport.queue_setup(2, 16, (0, 0, 0))
        with pytest.raises(StatusError, match=r"^queue 1 is not set up$"):
            transport.queue_resumes(1, lambda *, tracked: 0)
    for wrong in (0, 257):
        with pytest.raises(ValueError, match=f"queues {wrong} is outside"):
            VhostUserTransport(path, DeviceId.NETWORK, queues=wrong)
    with pytest.raises(ValueError, match="queue_size 0"):
        VhostUserTransport(path, DeviceId.NETWORK, queue_size=0)


def test_a_size_that_the_back_end_does_not_take_is_its_refusal(path: str) -> None:
    with Serving(path), VhostUserTransport(path, DeviceId.NETWORK, timeout=PATIENCE, queue_size=32768) as transport:
        with pytest.raises(TransportError, match="refuses SET_VRING_NUM"):
            NetDriver(transport, queue_size=16384)
        with NetDriver(transport) as net:
            exchange(net, frames(10))


# Loss and return.


@pytest.mark.parametrize("listen", [False, True])
def test_a_back_end_comes_back_and_the_driver_goes_on(path: str, ring_features: Features, listen: bool) -> None:
    if listen:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen()
            with (
                Serving(path, connect=True) as backend,
                VhostUserTransport(os.dup(listener.fileno()), DeviceId.NETWORK, timeout=PATIENCE) as transport,
            ):
                _lose_and_go_on(backend, transport, ring_features)
    else:
        with Serving(path) as backend, VhostUserTransport(path, DeviceId.NETWORK, timeout=PATIENCE) as transport:
            _lose_and_go_on(backend, transport, ring_features)


def _lose_and_go_on(backend: Serving, transport: VhostUserTransport, ring_features: Features) -> None:
    with NetDriver(transport, wanted=ring_features | {Feature.EVENT_IDX, NetFeature.MAC}) as net:
        for round_ in range(5):
            exchange(net, frames(100))
            backend.kill()
            assert net.send_frames(frames(20, 5000)) == 20  # nobody is there
            backend.start()
            got: list[bytes] = []
            while frames(1, 5019)[0] not in got:
                assert net.wait(PATIENCE)
                got += net.receive_frames()
            assert got[-20:] == frames(20, 5000)
            assert set(got[:-20]) <= set(frames(100))  # what was in flight may come twice
            assert transport.reconnections == round_ + 1 and transport.connected
        net.check()


def test_a_back_end_without_what_was_negotiated_needs_a_reset(path: str) -> None:
    with Serving(path) as backend, VhostUserTransport(path, DeviceId.NETWORK, timeout=PATIENCE) as transport, NetDriver(transport) as net:
        exchange(net, frames(10))
        assert Feature.RING_PACKED in net.features
        backend.kill()
        with Serving(path, offered=[Feature.VERSION_1]):
            with pytest.raises(DeviceNeedsReset):
                while net.wait(PATIENCE):
                    pass
            net.restart()
            assert net.features == {Feature.VERSION_1}
            exchange(net, frames(10))


def test_a_reset_is_enough_for_a_back_end_that_came_while_one_was_needed(path: str, ring_features: Features) -> None:
    with (
        Serving(path) as backend,
        VhostUserTransport(path, DeviceId.NETWORK, timeout=PATIENCE) as transport,
        NetDriver(transport, wanted=ring_features | {NetFeature.MAC}) as net,
    ):
        exchange(net, frames(10))
        transport._events_of(0)[2].signal()  # as a back-end does whose ring broke
        with pytest.raises(DeviceNeedsReset):
            while net.wait(PATIENCE):
                net.check()
        before = transport.reconnections
        backend.kill()
        backend.start()
        until(lambda: transport.reconnections > before)
        net.restart()
        exchange(net, frames(10))


def test_a_back_end_that_hangs_up_once_it_has_the_rings_is_not_called_at_once(path: str) -> None:
    def hang_up() -> None:
        while not over.is_set():
            backend.process(0.01)
            for connection in backend._connections:
                if driven.is_set() and connection._status & Status.DRIVER_OK:
                    connection.close()

    driven, over = threading.Event(), threading.Event()
    with Backend(path, NetDevice) as backend:
        thread = threading.Thread(target=hang_up)
        thread.start()
        try:
            with VhostUserTransport(path, DeviceId.NETWORK, timeout=PATIENCE) as transport, NetDriver(transport):
                driven.set()  # a driver that is being made may be told of the loss
                until(lambda: transport._retry == LONGEST_RETRY)
        finally:
            over.set()
            thread.join()
    assert backend.accepted >= 3


def test_without_reconnection_the_device_is_gone(path: str) -> None:
    with Serving(path) as backend, VhostUserTransport(path, DeviceId.NETWORK, timeout=PATIENCE, reconnect=False) as transport:
        net = NetDriver(transport)
        exchange(net, frames(10))
        backend.kill()
        with pytest.raises(TransportError, match="gone: the back-end hung up"):
            while net.wait(PATIENCE):
                pass
        assert transport.gone and not transport.connected
        with pytest.raises(TransportError, match="gone"):
            transport.config_read(0, 6)
        with pytest.raises(TransportError, match="gone"):
            net.close()
        net.close()


def test_calls_wait_for_a_back_end_that_went_away_but_not_for_ever(path: str) -> None:
    with Serving(path) as backend, VhostUserTransport(path, DeviceId.NETWORK, timeout=0.5) as transport, NetDriver(transport) as net:
        backend.kill()
        until(lambda: not transport.connected)
        assert net.link and transport.status
        with pytest.raises(TransportError, match=r"no back-end came back to .*s within 0\.5 s"):
            transport.config_read(0, 6)
        net.reset()
        with pytest.raises(TransportError, match="no back-end came back"):
            net.restart()
        backend.start()
        until(lambda: transport.connected)
        net.restart()
        exchange(net, frames(10))


def test_a_generator_answers_across_kills(path: str, ring_features: Features) -> None:
    with (
        Serving(path, "rng") as backend,
        VhostUserTransport(path, DeviceId.ENTROPY, timeout=PATIENCE) as transport,
        RngDriver(transport, wanted=ring_features) as rng,
    ):
        for _ in range(5):
            assert rng.read(16) == expected(0, 16)
            backend.kill()
            starter = threading.Timer(0.05, backend.start)
            starter.start()
            assert rng.read(16) == expected(0, 16)  # asked while nobody was there
            starter.join()
            backend.kill()
            backend.start()


# Bad input.


def test_places_where_no_back_end_is(path: str, tmp_path: Path) -> None:
    plain, left = tmp_path / "plain", str(tmp_path / "left")
    plain.write_text("kept")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(left)
    for where, why in ((path, "No such file"), (str(plain), "not a socket"), (left, "refused")):
        with pytest.raises(TransportError, match=why):
            VhostUserTransport(where, DeviceId.NETWORK)
    with pytest.raises(ValueError, match="108 bytes"):
        VhostUserTransport("/" + "x" * 107, DeviceId.NETWORK)
    with pytest.raises(TransportError, match="not a socket"):
        VhostUserTransport(str(plain), DeviceId.NETWORK, listen=True)
    with pytest.raises(TransportError, match=r"no back-end connected to .*s within 0\.1 s"):
        VhostUserTransport(path, DeviceId.NETWORK, listen=True, connect_timeout=0.1)
    assert not os.path.exists(path)
    with open(plain) as file, pytest.raises(TransportError, match="not a socket"):
        VhostUserTransport(file.fileno(), DeviceId.NETWORK)


def test_a_first_back_end_is_waited_for_on_request(path: str) -> None:
    serving: list[Serving] = []
    late = threading.Timer(0.3, lambda: serving.append(Serving(path)))
    late.start()
    with VhostUserTransport(path, DeviceId.NETWORK, connect_timeout=PATIENCE) as transport, NetDriver(transport) as net:
        exchange(net, frames(10))
    late.join()
    serving[0].kill()


def test_a_closed_transport_says_so(path: str) -> None:
    with Serving(path):
        transport = VhostUserTransport(path, DeviceId.NETWORK, timeout=PATIENCE)
        driver = Driver(transport)
        transport.close()
        transport.close()
        with pytest.raises(StatusError, match="closed"):
            driver.acknowledge()
        with pytest.raises(StatusError, match="closed"):
            driver.close()
        driver.close()


def test_features_that_the_back_end_refuses_do_not_stick(path: str) -> None:
    with Serving(path), VhostUserTransport(path, DeviceId.NETWORK, timeout=PATIENCE) as transport, Driver(transport) as driver:
        driver.acknowledge()
        transport.accept(Features({Feature.VERSION_1, NetFeature.GUEST_TSO4}))  # without GUEST_CSUM
        transport.status = transport.status | 8
        assert not transport.status & 8
        driver.reset()
        with pytest.raises(FeatureNegotiationError):
            driver.negotiate(required={Feature.IN_ORDER, Feature.NOTIFICATION_DATA})


def test_queue_pairs_are_in_use_again_when_the_back_end_is_back(path: str, ring_features: Features) -> None:
    with (
        Serving(path, queue_pairs=2) as backend,
        VhostUserTransport(path, DeviceId.NETWORK, timeout=PATIENCE) as transport,
        NetDriver(transport, queue_pairs=2, wanted=ring_features | {NetFeature.MAC}) as net,
    ):
        assert transport.num_queues == 5
        assert net.active_pairs == 2
        for number in range(3):
            assert net.pair(1).send_frames(frames(5, 100 * number)) == 5
            got: list[bytes] = []
            while frames(1, 100 * number + 4)[0] not in got:
                assert net.wait(PATIENCE)
                got += net.receive_frames()
            backend.kill()
            backend.start()
