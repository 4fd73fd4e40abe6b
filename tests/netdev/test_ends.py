"""How interfaces begin and end: errors that say what is wrong, links, resets, and nothing left behind."""

import gc
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.leftovers import descriptors
from tests.netdev.cables import FAR, NEAR, OFFLOADS, Cable
from virtio import DeviceNeedsReset, NetDevice, NetDriver, NetFeature, SpecViolation, StatusError, TransportError
from virtio.netdev import Namespace, Netdev, TapError
from virtio.transport.loopback import LoopbackTransport

ROOT = Path(__file__).parents[2]


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    with Namespace() as namespace:
        yield namespace


def interfaces(namespace: Namespace) -> set[str]:
    with namespace.entered():
        return {name for _, name in socket.if_nameindex()}


def eventually(what: Callable[[], bool]) -> None:
    """What happens in another thread, or in the kernel's own time."""
    deadline = time.monotonic() + 60
    while not what():
        assert time.monotonic() < deadline, "sixty seconds have passed"
        time.sleep(0.002)


@contextmanager
def traffic(cable: Cable) -> Iterator[None]:
    """UDP from both ends, as fast as it goes, to nobody."""
    ending = threading.Event()

    def send(namespace: Namespace, to: str) -> None:
        with namespace.entered():
            end = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with end:
            while not ending.is_set():
                try:
                    end.sendto(bytes(1000), (to, 9))
                except OSError:  # refused, or no carrier
                    ending.wait(0.001)

    threads = [threading.Thread(target=send, args=pair) for pair in ((cable.near, FAR), (cable.far, NEAR))]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ending.set()
        for thread in threads:
            thread.join()


def moved(cable: Cable) -> int:
    seen = cable.vn0.statistics
    return int(seen["transmit"]["frames"]) if "transmit" in seen else 0


def test_a_closed_interface_leaves_nothing() -> None:
    with Cable(*OFFLOADS) as cable:  # what is made once for a process
        cable.pair()
    del cable
    threads, before = threading.active_count(), descriptors()
    with Cable(*OFFLOADS) as cable:
        pair = cable.pair()
        cable.ping(1)
        assert interfaces(cable.near) == {"lo", "vn0"} and interfaces(cable.far) == {"lo", "peer0"}
        pair.close()
        assert interfaces(cable.near) == {"lo"} == interfaces(cable.far)
        for each in (pair, cable.vn0, cable.peer0):
            each.close()
            assert not each.running
            with pytest.raises(StatusError):
                each.start()
    del cable, pair, each
    assert threading.active_count() == threads and descriptors() <= before


def test_the_carrier_follows_the_link(ring_format: str) -> None:
    with Cable(ring_format=ring_format) as cable:
        cable.device.link = False
        pair = cable.pair()

        def carriers() -> list[str]:
            found = []
            for namespace, name in ((cable.near, "vn0"), (cable.far, "peer0")):
                with namespace.entered():
                    shown = subprocess.run(["ip", "-o", "link", "show", name], stdout=subprocess.PIPE, check=True, text=True).stdout
                found.append("down" if "NO-CARRIER" in shown else "up")
            return found

        for up in (False, True, False, True):
            cable.device.link = up
            eventually(lambda up=up: carriers() == (["up", "up"] if up else ["down", "down"]))  # type: ignore[misc]
        eventually(lambda: cable.vn0.carrier and cable.peer0.carrier)
        cable.ping()
        pair.stop()
        assert carriers() == ["down", "down"]


def test_restart_after_a_reset_under_load(ring_format: str) -> None:
    with Cable(*OFFLOADS, NetFeature.MRG_RXBUF, ring_format=ring_format) as cable:
        pair = cable.pair()
        for _ in range(3):
            with traffic(cable):
                before = moved(cable)
                eventually(lambda before=before: moved(cable) > before + 100)  # type: ignore[misc]
                cable.driver.restart()
                with pytest.raises(StatusError):
                    pair.wait(60)
                assert not pair.running and isinstance(pair.error, StatusError)
                pair.start()
                eventually(lambda: moved(cable) > 100)
        assert pair.error is None
        cable.transfer()


def test_a_device_that_needs_a_reset(ring_format: str) -> None:
    with Cable(ring_format=ring_format) as cable:
        cable.vn0.start()
        cable.device.need_reset()
        with pytest.raises(DeviceNeedsReset):
            cable.vn0.wait(60)
        assert not cable.vn0.running and not cable.vn0.carrier
        with pytest.raises(StatusError, match="restart it first"):
            cable.vn0.start()
        cable.driver.restart()
        pair = cable.pair()
        cable.ping()
        pair.check()


def test_a_driver_that_breaks_a_rule_makes_the_device_need_a_reset() -> None:
    with Cable() as cable:
        pair = cable.pair()
        cable.ping()
        index = cable.driver.transmitq.areas[1] - cable.driver.address + 2
        cable.driver.memory.store(index, 2, (cable.driver.memory.load(index, 2) + 1000) % (1 << 16))
        doorbell = cable.device.doorbell(1)
        assert doorbell is not None
        doorbell.signal()
        with pytest.raises((SpecViolation, DeviceNeedsReset)):
            pair.wait(60)
        pair.stop()
        with pytest.raises(DeviceNeedsReset):
            cable.driver.check()
        cable.driver.restart()
        pair.start()
        cable.ping()


def test_an_interface_that_somebody_deletes() -> None:
    with Cable() as cable:
        pair = cable.pair()
        with cable.near.entered():
            subprocess.run(["ip", "link", "delete", "vn0"], check=True)
        with pytest.raises(TransportError, match="the TAP is gone"):
            pair.wait(60)
        with pytest.raises(TapError, match=r"^interface vn0 is gone"):
            pair.start()


def test_idle_interfaces_sleep() -> None:
    with Cable(*OFFLOADS) as cable:
        pair = cable.pair()
        with traffic(cable):
            eventually(lambda: moved(cable) > 100)
        before: list[object] = [None]

        def quiet() -> bool:
            time.sleep(0.3)  # an observation's length: whoever polls takes a step within it
            now, before[0] = before[0], pair.statistics
            return now == before[0]

        eventually(quiet)
        for end in pair.statistics.values():
            for pump in end.values():
                assert 0 < pump["sleeps"] <= pump["steps"]


def test_what_no_interface_can_be_made_of(namespace: Namespace) -> None:
    device = NetDevice(mtu=1500)
    wanted = {*OFFLOADS, NetFeature.MAC, NetFeature.MTU}
    with LoopbackTransport(device) as transport, NetDriver(transport, wanted=wanted) as driver:
        with pytest.raises(TypeError, match="neither a driver's end"):
            Netdev(object(), namespace=namespace)  # type: ignore[arg-type]
        for mtu in (67, 65522):
            with pytest.raises(ValueError, match=r"68\.\.65521"):
                Netdev(driver, namespace=namespace, mtu=mtu)
        with pytest.raises(ValueError, match="more than the 1500"):
            Netdev(driver, namespace=namespace, mtu=1501)
        with pytest.raises(ValueError, match="address"):
            Netdev(driver, namespace=namespace, mac=b"\x01" + bytes(5))
        with pytest.raises(ValueError, match="nowhere"):
            Netdev(driver, namespace=namespace, address="nowhere")
        assert interfaces(namespace) == {"lo"}
        with Netdev(driver, namespace=namespace) as vn0:
            assert vn0.mac == driver.mac and vn0.mtu == 1500
            vn0.start()
        with Netdev(device, namespace=namespace, mac=b"\x02" + bytes(5), mtu=900) as peer0:
            assert peer0.mac == b"\x02" + bytes(5) and peer0.mtu == 900


def test_a_device_without_a_driver_cannot_be_plugged_in(namespace: Namespace) -> None:
    with Netdev(NetDevice(), namespace=namespace) as peer0, pytest.raises(StatusError, match="not live"):
        peer0.start()


CLOSED = "mount -t tmpfs none /dev/net && mknod /dev/net/tun c 10 200 && chown 1 /dev/net/tun && chmod {mode} /dev/net/tun && exec "
PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
from virtio.netdev import TapError
from tests.leftovers import descriptors
from tests.netdev.cables import Cable
try:
    with Cable() as cable:
        cable.pair()
        cable.ping()
        cable.transfer()
        print("fine")
except TapError as error:
    print(f"{type(error).__name__}: {error}")
"""


@pytest.mark.parametrize(
    ("mode", "said"),
    [
        ("666", "fine"),
        ("600", "TapPermissionError: /dev/net/tun is closed to this user (Permission denied): its mode has to be 0666, or run it as root"),
    ],
)
def test_in_a_user_namespace(mode: str, said: str) -> None:
    inner = ["unshare", "--user", "--net", "--map-root-user", sys.executable, "-c", PROGRAM, str(ROOT)]
    command = ["unshare", "--mount", "sh", "-c", CLOSED.format(mode=mode) + '"$@"', "sh", *inner]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert (done.stdout.strip(), done.stderr) == (said, "")


def test_an_interface_is_not_stopped_from_its_own_thread_and_nobody_waits_for_ever() -> None:
    with Cable() as cable:
        pair = cable.pair()
        before, seen = cable.driver.on_link, threading.Event()

        def stops(up: bool) -> None:
            if before is not None:
                before(up)
            seen.set()
            pair.stop()

        cable.driver.on_link = stops
        cable.device.link = False
        assert seen.wait(60)
        stopping = threading.Thread(target=pair.stop, daemon=True)
        stopping.start()
        stopping.join(60)
        assert not stopping.is_alive()
        assert isinstance(pair.error, StatusError) and "own thread" in str(pair.error)
        cable.driver.on_link = before
        pair.start()
        assert pair.running


def test_threads_that_cannot_be_had_leave_it_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    with Cable() as cable:
        pair = Netdev.pair(cable.vn0, cable.peer0)
        start = threading.Thread.start
        started: list[threading.Thread] = []

        def fails(thread: threading.Thread) -> None:
            if started:
                raise RuntimeError("can't start new thread")
            started.append(thread)
            start(thread)

        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", fails)
            with pytest.raises(RuntimeError, match="new thread"):
                pair.start()
        assert not pair.running and not started[0].is_alive()
        pair.start()
        assert pair.running
        pair.close()
        assert pair.wait(0)


def test_an_interface_that_is_dropped_ends_though_its_port_lives() -> None:
    with LoopbackTransport(NetDevice()) as transport, NetDriver(transport) as net, Namespace() as namespace:
        for _ in range(3):  # the name is free again each time
            dropped = Netdev(net, "vn0", namespace=namespace)
            assert "vn0" in socket_names(namespace)
            del dropped
            gc.collect()
            assert "vn0" not in socket_names(namespace)


def socket_names(namespace: Namespace) -> list[str]:
    with namespace.entered():
        return [name for _, name in socket.if_nameindex()]
