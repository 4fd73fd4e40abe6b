"""Closing wakes: whoever sleeps on something that is closed elsewhere gets a StatusError at once, in a thread or in a task."""

import asyncio
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from tests.leftovers import descriptors
from tests.transports import KINDS, over
from tests.vhost_user.frontend import Frontend
from virtio import DeviceId, EventFd, Feature, NetDevice, NetDriver, StatusError
from virtio.devices.rng import RngDevice, RngDriver
from virtio.features import Features
from virtio.netdev import Namespace, Netdev, TapError
from virtio.transport.loopback import LoopbackTransport
from virtio.transport.vhost_user import VhostUserTransport
from virtio.vhost_user import message as wire
from virtio.vhost_user.backend import Backend
from virtio.vhost_user.message import FrontendRequest

PATIENCE = 60.0

Close = Callable[[Any, Any], object]
WAYS: dict[str, Close] = {"driver": lambda transport, driver: driver.close(), "transport": lambda transport, driver: transport.close()}


def while_asleep(sleep: Callable[[], object], act: Callable[[], object]) -> Future[object]:
    """What `sleep` came to in a thread of its own, when `act` was called meanwhile."""
    with ThreadPoolExecutor(4) as pool:
        sleepers = [pool.submit(sleep) for _ in range(3)]
        time.sleep(0.05)  # they are asleep by now; if they are not, all the same has to come out
        act()
        found = {type(sleeper.exception(PATIENCE)) for sleeper in sleepers}
        assert len(found) == 1, found
    return sleepers[0]


def close_all(transport: Any, driver: Any) -> None:
    try:
        driver.close()
    except StatusError:  # its transport was closed first
        driver.close()
    transport.close()


def test_an_eventfd() -> None:
    event = EventFd()
    with pytest.raises(StatusError, match="the eventfd is closed"):
        while_asleep(event.wait, event.close).result()
    event = EventFd()
    with pytest.raises(StatusError, match="the eventfd is closed"):
        while_asleep(lambda: event.wait(PATIENCE), event.close).result()


def test_an_eventfd_tells_others_of_its_end() -> None:
    event, here, there = EventFd(), EventFd(), EventFd()
    event.tell_closed(here)
    event.tell_closed(EventFd())  # nobody has that any more
    event.signal()
    assert not here.wait(0)
    event.close()
    event.close()
    event.tell_closed(there)
    assert (here.drain(), there.drain()) == (1, 1)
    with pytest.raises(StatusError):
        there.tell_closed(event)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_driver_that_waits(kind: str, way: str) -> None:
    transport = over(kind, NetDevice())
    driver = NetDriver(transport)
    with pytest.raises(StatusError, match=f"the {way} is closed"):
        while_asleep(driver.wait, lambda: WAYS[way](transport, driver)).result()
    close_all(transport, driver)


@pytest.mark.parametrize("way", WAYS)
def test_a_driver_over_vhost_user_that_waits(way: str, tmp_path: Path) -> None:
    with Backend(tmp_path / "net.sock", NetDevice()) as backend, ThreadPoolExecutor(1) as pool:
        served = pool.submit(backend.serve)
        try:
            transport = VhostUserTransport(tmp_path / "net.sock", DeviceId.NETWORK)
            driver = NetDriver(transport)
            with pytest.raises(StatusError, match=f"the {way} is closed"):
                while_asleep(driver.wait, lambda: WAYS[way](transport, driver)).result()
            close_all(transport, driver)
        finally:
            backend.stop()
        served.result(PATIENCE)


@pytest.mark.parametrize("way", WAYS)
def test_a_request_that_waits(way: str) -> None:
    class Slow(RngDevice):
        def on_requestq(self, queue: Any) -> None: ...

    transport = LoopbackTransport(Slow())
    driver = RngDriver(transport)
    with pytest.raises(StatusError, match=f"the {way} is closed"):
        while_asleep(lambda: driver.wait_used(driver.requestq), lambda: WAYS[way](transport, driver)).result()
    close_all(transport, driver)


@pytest.mark.parametrize("pair", ["all", "one"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_task_that_iterates(kind: str, way: str, pair: str) -> None:
    transport = over(kind, NetDevice(queue_pairs=2))
    driver = NetDriver(transport, queue_pairs=2)

    async def iterate() -> None:
        async for _ in driver if pair == "all" else driver.pair(1):
            pass

    async def main() -> None:
        task = asyncio.create_task(iterate())
        await asyncio.sleep(0.05)
        assert not task.done()
        WAYS[way](transport, driver)
        with pytest.raises(StatusError, match="closed"):
            await asyncio.wait_for(task, PATIENCE)

    asyncio.run(main())
    close_all(transport, driver)


@pytest.mark.parametrize("way", WAYS)
def test_an_exception_that_is_kept_keeps_no_descriptor(way: str) -> None:
    before = descriptors()
    transport = LoopbackTransport(RngDevice())
    driver = RngDriver(transport)
    kept = [while_asleep(driver.wait, lambda: WAYS[way](transport, driver)).exception()]
    close_all(transport, driver)
    assert isinstance(kept[0], StatusError) and descriptors() <= before


@pytest.mark.parametrize("kind", KINDS)
def test_a_selector(kind: str) -> None:
    import select

    transport = over(kind, NetDevice())
    driver = NetDriver(transport)
    driver.arm()
    ready = select.poll()
    ready.register(driver.fileno(), select.POLLIN)
    assert ready.poll(0) == []
    transport.close()
    assert ready.poll(0) == [(driver.fileno(), select.POLLIN)]
    with pytest.raises(StatusError):
        driver.wait()
    close_all(transport, driver)
    with pytest.raises(StatusError, match="the driver is closed"):
        driver.fileno()


def test_a_device_whose_transport_closes() -> None:
    device = NetDevice()
    with LoopbackTransport(device):
        device.wait(0)
        transport_closes = device.wait  # True: it was reset
    assert transport_closes(PATIENCE)


def test_an_interface_that_is_waited_for() -> None:
    device = NetDevice()
    with LoopbackTransport(device) as transport, NetDriver(transport), Namespace() as namespace:
        netdev = Netdev(device, "vn0", namespace=namespace)
        netdev.start()
        assert netdev.wait(-1) is False
        with pytest.raises(TypeError, match="timeout is 'x'"):
            netdev.wait("x")  # type: ignore[arg-type]
        assert while_asleep(netdev.wait, netdev.close).result() is True
        assert netdev.wait() is True


@pytest.mark.parametrize("kind", KINDS)
def test_an_interface_whose_transport_closes(kind: str) -> None:
    transport = over(kind, NetDevice())
    driver = NetDriver(transport)
    with Namespace() as namespace, Netdev(driver, "vn0", namespace=namespace) as netdev:
        netdev.start()
        with pytest.raises(StatusError, match="the transport is closed"):
            while_asleep(netdev.wait, transport.close).result()
        assert not netdev.running
    close_all(transport, driver)


def test_an_interface_that_was_deleted() -> None:
    device = NetDevice()
    with (
        LoopbackTransport(device) as transport,
        NetDriver(transport),
        Namespace() as namespace,
        Netdev(device, "vn0", namespace=namespace) as netdev,
    ):
        with namespace.entered():
            subprocess.run(["ip", "link", "delete", "vn0"], check=True)
        for call in (lambda: netdev.mac, netdev.start):
            with pytest.raises(TapError, match=r"^interface vn0 is gone$"):
                call()


def test_a_back_end_that_serves(tmp_path: Path) -> None:
    backend = Backend(tmp_path / "net.sock", NetDevice())
    with ThreadPoolExecutor(1) as pool:
        served = pool.submit(backend.serve)
        time.sleep(0.05)
        backend.close()
        with pytest.raises(StatusError, match="the back-end is closed"):
            served.result(PATIENCE)
    backend.stop()
    for call in (backend.fileno, backend.process, backend.__enter__):
        with pytest.raises(StatusError, match="the back-end is closed"):
            call()


@pytest.mark.parametrize("where", ["another thread", "its handler"])
def test_a_back_end_whose_device_is_at_work(where: str, tmp_path: Path) -> None:
    """What is being carried out comes to its end before anything is closed under it."""
    errors, found, before = list[Exception](), list[bool](), descriptors()

    class Closing(RngDevice):
        def write_config(self, offset: int, data: bytes) -> None:
            if where == "its handler":
                backend.close()
            else:
                closer.start()
                closer.join(0.2)  # it waits, however long that is
            found.append(closer.is_alive() and self.connected)

    backend = Backend(tmp_path / "s", Closing(), report=errors.append)
    closer = Thread(target=backend.close)
    with Frontend.at(str(tmp_path / "s"), backend) as frontend, ThreadPoolExecutor(1) as pool:
        frontend.negotiate(Features({Feature.VERSION_1}))
        frontend.raw(wire.encode(FrontendRequest.SET_CONFIG, wire.Config(0, 1, 0, b"x")) + wire.encode(FrontendRequest.GET_FEATURES))
        with pytest.raises(StatusError, match="the back-end is closed"):
            pool.submit(backend.serve).result(PATIENCE)
        if where == "another thread":
            closer.join(PATIENCE)
        assert found == [where == "another thread"]
        assert not backend.connections and not errors
    backend.close()
    assert descriptors() <= before


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_closed_is_not_entered_again(kind: str) -> None:
    with over(kind, NetDevice()) as transport, NetDriver(transport) as driver:
        pass
    for closed in (transport, driver):
        with pytest.raises(StatusError, match="closed"), closed:
            pass


def test_a_buffer_that_was_given_back_twice_does_no_harm() -> None:
    with LoopbackTransport(NetDevice()) as transport, NetDriver(transport) as driver:
        driver.memory.free(driver.allocate(16))
