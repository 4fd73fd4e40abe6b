"""Whose an interface is: its process's, its pair's, and whose its port is."""

import os
import signal

import pytest

from tests.netdev.cables import Cable
from tests.netdev.test_ends import interfaces
from tests.test_processes import in_child, joined
from virtio import StatusError


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
