"""What `virtio serve` says and to whom: events in their order, standard output that is theirs alone, and lines that tell what is wrong."""

import fcntl
import json
import os
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.cli.run import LIMIT, command, environment, failed, run, started
from tests.cli.serving import Serving, read, serving, with_ring
from virtio.vhost_user.message import U64, FrontendRequest, encode

TALKS = """
import os
import subprocess
import virtio

print("imported")

class Talks(virtio.Device):
    device_id = virtio.DeviceId.ENTROPY
    queues = ("requestq",)

    def __init__(self):
        super().__init__()
        print("made")

    def on_requestq(self, queue):
        for chain in queue.pop(limit=64):
            print("asked")
            subprocess.run(["echo", "of a program"], check=True)
            queue.complete(chain, chain.write(bytes([4] * min(chain.writable, 4096))))
        queue.publish()
"""
NET = ("received_frames", "received_bytes", "sent_frames", "sent_bytes", "dropped_frames")


@pytest.fixture
def talks(tmp_path: Path) -> str:
    (tmp_path / "talks.py").write_text(TALKS)
    return f"{tmp_path / 'talks.py'}:Talks"


def test_what_a_class_prints_goes_to_standard_error(path: Path, talks: str) -> None:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with started(command("serve", talks, "--socket-path", str(path)), **pipes, text=True, env=environment()) as process:
        served = Serving(process)
        served.until("serving")
        with with_ring(path) as frontend:
            assert read(frontend, 16) == bytes([4] * 16)
        served.until("disconnected")
        process.terminate()
        served.until("end")
        out, said = process.communicate(timeout=LIMIT)
    assert (out, process.returncode) == ("", 0), said
    assert said.splitlines() == ["imported", "made", "made", "asked", "of a program"]
    done = run("serve", talks, "--print-capabilities")
    assert (json.loads(done.stdout), done.stderr) == ({"type": "rng"}, "imported\n")


def test_capabilities_of_a_class_without_a_type_are_told(tmp_path: Path) -> None:
    (tmp_path / "odd.py").write_text(
        "import virtio\nclass No(virtio.Device):\n    pass\nclass Text(virtio.Device):\n    device_id = 'rng'\n"
    )
    for name, found in (("No", "missing"), ("Text", "'rng'")):
        line = failed(run("serve", f"{tmp_path / 'odd.py'}:{name}", "--print-capabilities"), 1)
        assert line == f"virtio: {name}.device_id is {found}: it has to be an integer"


def test_what_is_no_file_of_pythons(tmp_path: Path) -> None:
    assert failed(run("serve", "/dev/null:Dice", "--socket-path", "s"), 1) == "virtio: /dev/null: no file of text"
    assert failed(run("serve", "/dev/null/d.py:Dice", "--socket-path", "s"), 1) == "virtio: /dev/null/d.py: no such file"
    long = tmp_path / ("x" * 300)
    assert failed(run("serve", f"{long}:Dice", "--socket-path", "s"), 1) == f"virtio: {long}: File name too long"


def test_a_capture_of_before_stays_until_it_is_served(path: Path, tmp_path: Path) -> None:
    capture = tmp_path / "c"
    capture.write_text("of before" * 10)
    with serving("rng", "--socket-path", str(path)) as served:
        assert "in use" in failed(run("serve", "net", "--socket-path", str(path), "--pcap", str(capture)), 1)
        served.end()
    assert capture.read_text() == "of before" * 10
    with serving("net", "--socket-path", str(path), "--pcap", str(capture)) as served:
        assert capture.stat().st_size == 24
        served.end()


def test_two_do_not_write_one_capture(tmp_path: Path) -> None:
    capture = tmp_path / "c"
    with serving("net", "--socket-path", str(tmp_path / "s"), "--pcap", str(capture)) as served:
        words = ("serve", "net", "--socket-path", str(tmp_path / "t"), "--pcap", str(capture))
        assert failed(run(*words), 1) == f"virtio: cannot write {capture}: it is in use"
        assert capture.stat().st_size == 24 and not (tmp_path / "t").exists()
        served.end()


def test_without_descriptors_it_says_what_there_are_none_of(path: Path) -> None:
    done = run("serve", "rng", "--socket-path", str(path), before=("sh", "-c", 'ulimit -n 6; exec "$@"', "sh"))
    assert failed(done, 1).endswith(": Too many open files") and "Errno" not in done.stderr


def test_nothing_is_served_before_everything_can_be(path: Path, tmp_path: Path) -> None:
    done = run("serve", "net", "--socket-path", str(path), "--peer", str(tmp_path / "missing" / "t"))
    assert "missing/t: No such file or directory" in failed(done, 1)
    assert done.stdout == "" and not path.exists()


@pytest.mark.parametrize("words", [("net",), ("net", "--peer", "{folder}/t")])
def test_who_connects_says_so_and_counts_from_the_start(path: Path, tmp_path: Path, words: tuple[str, ...]) -> None:
    found = [word.format(folder=tmp_path) for word in words]
    with serving(*found, "--socket-path", str(path), "--client", sockets=1 + ("--peer" in words)) as served:
        assert served.seen[0]["socket"] == str(path)
        for device in served.end()[-1]["devices"]:
            assert device == {"socket": device["socket"], "live": False, **dict.fromkeys(NET, 0)}


def test_who_cannot_be_connected_to_is_told_once(path: Path) -> None:
    with serving("rng", "--socket-path", str(path), "--client") as served:
        path.write_text("")  # meanwhile
        assert served.until("error") == {"event": "error", "socket": str(path), "text": f"cannot connect to {path}: it is not a socket"}
        path.unlink()
        assert [event["event"] for event in served.end()] == ["end"]


def test_rubbish_is_told_between_its_connection_and_its_end(path: Path) -> None:
    with serving("rng", "--socket-path", str(path)) as served:
        for _ in range(3):
            with socket.socket(socket.AF_UNIX) as rubbish:
                rubbish.connect(str(path))
                rubbish.sendall(b"x" * 40)
            seen = [served.event() for _ in range(3)]
            assert [(event["event"], event.get("connections")) for event in seen] == [
                ("connected", 1),
                ("error", None),
                ("disconnected", 0),
            ]
            assert seen[1] == {"event": "error", "socket": str(path), "text": "version 0 of a message is not 1 (vhost-user header)"}
        served.end()


def test_a_connection_that_is_over_already_has_its_events(path: Path) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.close()
        with serving("rng", "--fd", str(theirs.fileno()), pass_fds=[theirs.fileno()]) as served:
            events = served.ended()
    assert [(event["event"], event.get("connections")) for event in events] == [("connected", 1), ("disconnected", 0), ("end", None)]


def test_a_descriptor_that_neither_listens_nor_is_connected() -> None:
    with socket.socket(socket.AF_UNIX) as idle:
        words = command("serve", "rng", "--fd", str(idle.fileno()))
        done = subprocess.run(words, pass_fds=[idle.fileno()], capture_output=True, text=True, timeout=LIMIT, env=environment())
    assert failed(done, 1) == f"virtio: descriptor {words[-1]} is a Unix socket that neither listens nor is connected"
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("net", "--pcap", ""), 2, "Invalid value for '--pcap': no file has an empty name: name a file, or a FIFO"),
        (("net", "--pcap", "/dev/full"), 1, "cannot write /dev/full: No space left on device"),
        (("net", "--pcap", "/nowhere/c"), 1, "cannot write /nowhere/c: No such file or directory"),
        (("net", "--mtu", "abc"), 2, "Invalid value for '--mtu': 'abc' is not a valid number."),
        (("net", "--queue-pairs", "1.5"), 2, "Invalid value for '--queue-pairs': '1.5' is not a valid number."),
    ],
)
def test_what_is_wrong_is_said_once(path: Path, words: tuple[str, ...], code: int, said: str) -> None:
    more = " (virtio serve net --help tells more)" if code == 2 else ""
    assert failed(run("serve", *words, "--socket-path", str(path)), code) == f"virtio: {said}{more}"
    assert not path.exists()


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("words", [("serve", "rng", "--socket-path", "{path}"), ("probe", "emulated:rng"), ("serve", "--help")])
@pytest.mark.parametrize(("where", "why"), [(">/dev/full", "No space left on device"), (">&-", "it is closed")])
def test_output_that_goes_nowhere_is_told(path: Path, words: tuple[str, ...], where: str, why: str, unbuffered: str) -> None:
    line = [word.format(path=path) for word in command(*words)]
    environ = environment(PYTHONUNBUFFERED=unbuffered)
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {where}', "sh", *line],
        stderr=subprocess.PIPE,
        text=True,
        timeout=LIMIT,
        env=environ,
        stdin=subprocess.DEVNULL,
    )
    assert (done.returncode, done.stderr) == (1, f"virtio: cannot write to standard output: {why}\n")
    assert not path.exists()


def quarrel(path: Path, times: int) -> None:
    """As many messages that are refused, and one that is answered; and then one by another front-end."""
    for refused in (times, 0):
        with socket.socket(socket.AF_UNIX) as frontend:
            frontend.settimeout(LIMIT)
            frontend.connect(str(path))
            for _ in range(refused):
                frontend.sendall(encode(FrontendRequest.SEND_RARP, U64(0)))  # not negotiated
            frontend.sendall(encode(FrontendRequest.GET_FEATURES))
            assert frontend.recv(100)


@pytest.mark.parametrize("blocking", [True, False])
def test_who_does_not_read_events_stops_nobody(path: Path, blocking: bool) -> None:
    ours, theirs = os.pipe()
    os.set_blocking(theirs, blocking)
    words = command("serve", "rng", "--socket-path", str(path))
    with started(words, stdout=theirs, stderr=subprocess.PIPE, text=True, env=environment()) as process, open(ours, "rb") as events:
        os.close(theirs)
        assert json.loads(events.readline())["event"] == "serving"
        quarrel(path, 3000)  # more than the pipe holds, and more than wait
        process.terminate()
        told = [json.loads(line) for line in events.read().splitlines()]
        assert process.wait(LIMIT) == 0, process.stderr and process.stderr.read()
    lost = sum(each["events"] for each in told if each["event"] == "lost")
    assert lost > 0 and told[-1]["event"] == "end"
    assert lost + sum(each["event"] == "error" for each in told) >= 3000


def test_who_never_reads_events_is_named_at_the_end(path: Path) -> None:
    ours, theirs = os.pipe()
    os.write(theirs, bytes(fcntl.fcntl(theirs, fcntl.F_GETPIPE_SZ)))
    words = command("serve", "rng", "--socket-path", str(path))
    try:
        with started(words, stdout=theirs, stderr=subprocess.PIPE, text=True, env=environment()) as process:
            end = time.monotonic() + LIMIT
            while process.poll() is None and time.monotonic() < end:
                with suppress(FileNotFoundError, ConnectionRefusedError):
                    quarrel(path, 3)
                    break
                time.sleep(0.01)
            process.terminate()
            assert process.wait(LIMIT) == 1
            assert process.stderr is not None and "nobody reads it" in process.stderr.read()
    finally:
        os.close(ours)
        os.close(theirs)
    assert not path.exists()
