"""Whose an interface is: its process's, its pair's, and whose its port is."""

import os
import signal
from collections.abc import Callable

import pytest

from tests.netdev.cables import Cable
from tests.netdev.test_ends import interfaces
from tests.test_processes import in_child, joined
from virtio import DeviceQueue, EventFd, Features, NetDevice, StatusError
from virtio.netdev import DeviceEnd, DriverEnd, Netdev
from virtio.spec import Status


@pytest.mark.parametrize("running", [True, False], ids=["running", "stopped"])
@pytest.mark.parametrize("paired", [True, False], ids=["pair", "alone"])
def test_a_forked_child_lets_go_and_disturbs_nothing(paired: bool, running: bool) -> None:
    with Cable() as cable:
        pair = cable.pair()
        if not running:
            pair.stop()
        ends = [pair] if paired else [cable.vn0, cable.peer0]
        told, tell = os.pipe()
        heard, hear = os.pipe()

        def work() -> None:
            signal.alarm(60)
            os.close(tell)
            for call in (pair.start, pair.stop):
                with pytest.raises(StatusError, match="forked child"):
                    call()
            assert cable.device.on_link is not None
            cable.device.on_link(False)
            for end in ends * 2:
                end.close()
                assert not end.running
            os.write(hear, b"closed")
            assert os.read(told, 1) == b""  # until the parent has seen that its interfaces go, though the child lives

        child = in_child(work)
        try:
            os.close(told)
            os.close(hear)
            assert os.read(heard, 6) == b"closed"
            assert pair.running == running
            if not running:
                pair.start()
            cable.ping()
            pair.check()
            pair.close()
            assert interfaces(cable.near) == {"lo"} == interfaces(cable.far)
        finally:
            os.close(tell)
            os.close(heard)
            joined(child)


def test_a_member_is_not_stopped_without_its_pair() -> None:
    with Cable() as cable:
        pair = cable.pair()
        for member in (cable.vn0, cable.peer0):
            with pytest.raises(StatusError, match=f"{member.name} belongs to a pair: stop that"):
                member.stop()
        assert pair.running and cable.vn0.carrier
        cable.ping()
        pair.stop()
        with pytest.raises(StatusError, match="belongs to a pair"):
            cable.vn0.stop()
        pair.start()
        cable.ping()
        pair.close()
        cable.vn0.stop()  # closed, and nobody's: nothing to do


def test_a_port_has_one_started_interface_at_a_time() -> None:
    with (
        Cable() as cable,
        Netdev(cable.driver, "vn1", namespace=cable.near) as second,
        Netdev(cable.device, "peer1", namespace=cable.far) as far,
    ):
        pair = cable.pair()
        with pytest.raises(ValueError, match="vn1 is both ends of the pair"):
            Netdev.pair(second, second)
        other = Netdev.pair(far, second)
        for _ in range(2):
            with pytest.raises(StatusError, match=r"peer1: peer0 is started on the same port"):
                other.start()
            assert not other.running and other.error is None and not second.carrier
        cable.ping()
        pair.check()
        pair.stop()
        other.start()
        with pytest.raises(StatusError, match=r"vn0: vn1 is started on the same port"):
            pair.start()
        other.stop()
        pair.start()
        cable.ping()


def test_an_interface_that_has_failed_or_could_not_start_keeps_nobody_from_its_port() -> None:
    with Cable() as cable, Netdev(cable.device, "peer1", namespace=cable.far) as second:
        cable.peer0.start()
        cable.driver.restart()
        with pytest.raises(StatusError, match="closed"):
            cable.peer0.wait(60)
        with pytest.raises(StatusError, match=r"peer0 is started"):
            second.start()
        cable.peer0.close()
        cable.driver.reset()
        with pytest.raises(StatusError, match="not live"):
            second.start()
        cable.driver.restart()
        with Netdev(cable.device, "peer2", namespace=cable.far) as third:
            third.start()
        second.start()
        assert second.running


class Own:
    """A device's end of one's own: what an interface needs, and nothing else."""

    def __init__(self, device: NetDevice) -> None:
        self._device = device
        self.on_link: Callable[[bool], None] | None = None
        self.link = False
        self.mtu = 1400

    @property
    def status(self) -> Status:
        return self._device.status

    @property
    def accepted(self) -> Features:
        return self._device.accepted

    @property
    def header_size(self) -> int:
        return self._device.header_size

    def queue(self, index: int) -> DeviceQueue | None:
        return self._device.queue(index)

    def doorbell(self, index: int) -> EventFd | None:
        return self._device.doorbell(index)

    def check_queues(self) -> None:
        self._device.check_queues()


def test_an_end_of_ones_own_carries_an_interface() -> None:
    with Cable() as cable:
        own = Own(cable.device)
        with Netdev(own, "peer1", namespace=cable.far, address="192.0.2.2/24") as interface:
            cable.peer0.close()
            assert interface.mtu == 1400
            interface.start()
            cable.vn0.start()
            assert not interface.carrier and own.on_link is not None
            own.on_link(True)
            assert interface.carrier
            cable.ping()
        assert own.on_link is None


@pytest.mark.parametrize("end", [DeviceEnd, DriverEnd])
def test_an_end_that_lacks_something_is_none(end: type) -> None:
    names = {name for base in end.__mro__[:2] for name in (*vars(base), *vars(base).get("__annotations__", ())) if not name.startswith("_")}
    assert {"link", "mtu", "on_link"} < names
    with Cable() as cable:
        port = cable.device if end is DeviceEnd else cable.driver
        for missing in names:
            lacking = type("Lacking", (), {name: getattr(port, name) for name in names - {missing}})()
            with pytest.raises(TypeError, match="Lacking is neither a driver's end"):
                Netdev(lacking, "vn1", namespace=cable.near)
        assert interfaces(cable.near) == {"lo", "vn0"}
