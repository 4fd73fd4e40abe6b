"""Every program in examples/ runs by itself, and does what it says."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


def output(path: Path, folder: Path) -> str:
    done = subprocess.run([sys.executable, "-W", "error", path], cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout


def example(name: str) -> Path:
    return next(path for path in EXAMPLES if path.name == name)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_runs(path: Path, tmp_path: Path) -> None:
    assert output(path, tmp_path)


def test_rng_reads_through_both_formats(tmp_path: Path) -> None:
    lines = output(example("rng.py"), tmp_path).splitlines()
    found = [re.fullmatch(r"(\w+) +([0-9a-f]{32})  \((\w+) ring of 8, .*\)", line) for line in lines]
    assert [(match[1], match[3]) for match in found if match] == [("split", "split"), ("packed", "packed")]
    assert len({match[2] for match in found if match}) == 2


def test_ports_move_frames(tmp_path: Path) -> None:
    assert "3 arrived, 3 sent back, 3 received" in output(example("frames.py"), tmp_path)
    assert output(example("forward.py"), tmp_path).startswith("6400 frames forwarded, 384000 bytes, drops: none")
    assert output(example("count.py"), tmp_path) == "80 frames, 5160 bytes\n"
    assert re.search("echo type 0, checksum 2b45, ping", output(example("answer.py"), tmp_path))


def test_new_device_answers_on_both_queues(tmp_path: Path) -> None:
    assert output(example("new_device.py"), tmp_path).split() == ["crc32", "41c32c27", "adler32", "7bff0939"]
