"""`virtio serve` with a user's class that misbehaves: what is told of it, and who goes on."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.cli.run import LIMIT, command, environment, started
from tests.cli.serving import Remote, Serving, read, serving, with_ring
from virtio import Feature
from virtio.features import Features
from virtio.vhost_user import message as wire
from virtio.vhost_user.message import FrontendRequest as F
from virtio.vhost_user.message import ProtocolFeature

CLASSES = """
import sys
import virtio

class Dice(virtio.Device):
    device_id = virtio.DeviceId.ENTROPY
    queues = ("requestq",)

    def on_requestq(self, queue):
        for chain in queue.pop(limit=64):
            if chain.writable == 13:
                self.thirteen()
            queue.complete(chain, chain.write(bytes([4] * min(chain.writable, 4096))))
        queue.publish()

class Key(Dice):
    def thirteen(self):
        {}["x"]

class Exit(Dice):
    def thirteen(self):
        sys.exit(5)

class Own(Dice):
    def thirteen(self):
        raise Base("mine")

class Base(BaseException):
    pass

class ResetExit(Dice):
    def was_reset(self):
        sys.exit(2)

class ResetKey(Dice):
    def was_reset(self):
        {}["y"]

class Mtu(virtio.NetDevice):
    def on_mtu(self, mtu):
        sys.exit(mtu)

class Interrupt(Dice):
    def thirteen(self):
        raise KeyboardInterrupt

class Loop(Dice):
    def thirteen(self):
        print("looping", file=sys.stderr, flush=True)
        while True:
            pass
"""


@pytest.fixture
def own(tmp_path: Path) -> str:
    (tmp_path / "own.py").write_text(CLASSES)
    return str(tmp_path / "own.py")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Key", "KeyError: 'x' (own.py:18, thirteen)"),
        ("Exit", "SystemExit (5): a device does not end the program (own.py:22, thirteen)"),
        ("Own", "Base (mine): a device does not end the program (own.py:26, thirteen)"),
        ("Interrupt", "KeyboardInterrupt: a device does not end the program (own.py:45, thirteen)"),
    ],
)
def test_what_a_handler_raises_is_told_with_its_place_and_ends_one_connection(own: str, tmp_path: Path, name: str, said: str) -> None:
    path = tmp_path / "s"
    with serving(f"{own}:{name}", "--socket-path", str(path)) as served:
        with with_ring(path) as frontend, with_ring(path) as innocent:
            frontend.queues[0].add(None, writable=[frontend.room(13)])
            frontend.queues[0].publish()
            assert served.until("error")["text"] == said
            assert read(innocent, 16) == bytes([4] * 16)
        served.end()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("ResetExit", r"SystemExit (2): a device does not end the program (own.py:33, was_reset)"),
        ("ResetKey", r"KeyError: 'y' (own.py:37, was_reset)"),
    ],
)
def test_what_is_raised_when_a_connection_ends_keeps_nothing_of_it(own: str, tmp_path: Path, name: str, said: str) -> None:
    path = tmp_path / "s"
    with serving(f"{own}:{name}", "--socket-path", str(path)) as served:
        descriptors = Path(f"/proc/{served.process.pid}/fd")
        before = len(list(descriptors.iterdir()))
        for _ in range(3):
            with Remote.to(path) as frontend:
                frontend.ask(F.GET_FEATURES)
            assert served.until("error")["text"] == said
            assert served.event()["event"] == "disconnected"
            assert len(list(descriptors.iterdir())) == before
        served.end()


def test_what_a_hook_raises_ends_one_connection(own: str, tmp_path: Path) -> None:
    path = tmp_path / "s"
    with serving(f"{own}:Mtu", "--socket-path", str(path)) as served, Remote.to(path) as frontend:
        frontend.negotiate(Features({Feature.VERSION_1}), Features({ProtocolFeature.MTU, ProtocolFeature.REPLY_ACK}))
        with pytest.raises(ConnectionError):
            frontend.ask(F.NET_SET_MTU, wire.U64(1400))
        assert served.until("error")["text"] == "SystemExit (1400): a device does not end the program (own.py:41, on_mtu)"
        served.until("disconnected")
        served.end()


def test_two_signals_at_once_are_one(own: str, tmp_path: Path) -> None:
    with serving(f"{own}:Dice", "--socket-path", str(tmp_path / "s")) as served:
        served.process.send_signal(signal.SIGTERM)
        served.end()


def test_tracebacks_are_shown_where_they_are_asked_for(own: str, tmp_path: Path) -> None:
    path = tmp_path / "s"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    words = command("serve", f"{own}:Key", "--socket-path", str(path))
    with started(words, **pipes, text=True, env=environment(VIRTIO_TRACEBACK="1")) as process:
        served = Serving(process)
        served.until("serving")
        with with_ring(path) as frontend:
            frontend.queues[0].add(None, writable=[frontend.room(13)])
            frontend.queues[0].publish()
            served.until("error")
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=LIMIT)[1]
    assert process.returncode == 0
    assert "Traceback" in said and 'own.py", line 18, in thirteen' in said


def test_a_second_signal_ends_a_handler_that_does_not_return(own: str, tmp_path: Path) -> None:
    path = tmp_path / "s"
    with serving(f"{own}:Loop", "--socket-path", str(path)) as served, with_ring(path) as frontend:
        frontend.queues[0].add(None, writable=[frontend.room(13)])
        frontend.queues[0].publish()
        assert served.process.stderr is not None
        assert served.process.stderr.readline() == "looping\n"
        for _ in range(600):  # two that come at once are one
            served.process.send_signal(signal.SIGTERM)
            try:
                served.process.wait(0.1)
                break
            except subprocess.TimeoutExpired:
                continue
        assert served.process.communicate(timeout=LIMIT)[1] == "virtio: terminated\n"
        assert served.process.returncode == 1 and not os.path.exists(path)
