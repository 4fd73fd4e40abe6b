"""`virtio serve FILE.py:CLASS`: a class of the user's, and classes that cannot be served."""

import json
from pathlib import Path

import pytest

from tests.cli.run import failed, run
from tests.cli.serving import read, serving, with_ring

DICE = """
import os
import virtio
import beside

class Dice(virtio.Device):
    device_id = virtio.DeviceId.ENTROPY
    queues = ("requestq",)

    def on_requestq(self, queue):
        for chain in queue.pop(limit=64):
            if chain.writable == 13:
                raise RuntimeError("thirteen")
            queue.complete(chain, chain.write(bytes([4] * min(chain.writable, 4096))))
        queue.publish()

class Needs(Dice):
    def __init__(self, number):
        super().__init__()

class Breaks(Dice):
    def __init__(self):
        raise ValueError("no such dice")

class Forgets(Dice):
    def __init__(self):
        self.sides = 6

class Quits(Dice):
    def __init__(self):
        raise SystemExit(0)

something = 4
"""


@pytest.fixture
def dice(tmp_path: Path) -> str:
    (tmp_path / "dice.py").write_text(DICE)
    (tmp_path / "beside.py").write_text("")
    return str(tmp_path / "dice.py")


def test_a_class_of_ones_own(path: Path, dice: str) -> None:
    with serving(f"{dice}:Dice", "--socket-path", str(path)) as served:
        with with_ring(path) as frontend:
            assert read(frontend, 16) == bytes([4] * 16)
        with with_ring(path) as frontend, with_ring(path) as innocent:
            frontend.queues[0].add(None, writable=[frontend.room(13)])
            frontend.queues[0].publish()
            assert served.until("error")["text"] == "RuntimeError: thirteen (dice.py:13, on_requestq)"
            assert read(innocent, 16) == bytes([4] * 16)
        served.end()
    done = run("serve", f"{dice}:Dice", "--print-capabilities", "--nonsense")
    assert json.loads(done.stdout) == {"type": "rng"} and done.returncode == 0


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("{dice}:Nobody", "{dice} has no Nobody"),
        ("{dice}:something", "something in {dice} is no subclass of virtio.Device"),
        ("{dice}:Needs", "{dice}:Needs: TypeError: "),
        ("{dice}:Breaks", "{dice}:Breaks: ValueError: no such dice"),
        ("{dice}:Forgets", "{dice}:Forgets: TypeError: Forgets.__init__ does not call super().__init__()"),
        ("{dice}:Quits", "{dice}:Quits: SystemExit (0): a device does not end the program"),
        ("{folder}/missing.py:Dice", "{folder}/missing.py: no such file"),
        ("{folder}:Dice", "{folder}: a folder"),
        ("{folder}/wrong.py:Dice", "{folder}/wrong.py does not import: SyntaxError: "),
        ("{folder}/raises.py:Dice", "{folder}/raises.py does not import: ZeroDivisionError: "),
        ("{folder}/exits.py:Dice", "{folder}/exits.py does not import: it ends the program (3)"),
        ("{folder}/interrupts.py:Dice", "{folder}/interrupts.py does not import: it ends the program (KeyboardInterrupt)"),
    ],
)
def test_a_class_that_cannot_be_served_is_one_line(target: str, said: str, dice: str, tmp_path: Path, path: Path) -> None:
    ends = {"exits.py": "raise SystemExit(3)", "interrupts.py": "raise KeyboardInterrupt"}
    for name, text in {"wrong.py": "def", "raises.py": "1 / 0", **ends}.items():
        (tmp_path / name).write_text(text)
    places = {"dice": dice, "folder": str(tmp_path)}
    assert said.format(**places) in failed(run("serve", target.format(**places), "--socket-path", str(path)), 1)
    assert not path.exists()
