"""Whose an interface is: its process's, its pair's, and whose its port is."""

import os
import signal

import pytest

from tests.netdev.cables import Cable
from tests.netdev.test_ends import interfaces
from tests.test_processes import in_child, joined
from virtio import StatusError
from virtio.netdev import Netdev


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
            cable.peer0.wait(30)
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
