"""`virtio demo --guest`: Linux's own driver in both kinds of guest, and ended at any moment."""

import json
import os
import random
import re
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from time import monotonic, sleep

import pytest

from tests.cli.run import LIMIT, beside, command, failed, marked, nothing_left, run, until_it_listens
from tests.cli.run import MARK as MARK_NAME
from tests.cli.test_demo import PLAIN_USER, ROOT, SESSION, in_order

GUESTS = [pytest.param("uml", marks=pytest.mark.uml), pytest.param("qemu", marks=pytest.mark.guest)]
PROGRAM = {"uml": "linux.uml", "qemu": "qemu-system-x86_64"}
BOTH = pytest.mark.parametrize("guest", GUESTS)


def until(process: "subprocess.Popen[str]", beginning: str) -> None:
    """Reads what the command says, up to a line that begins so."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(beginning):
            return


def strike(mark: str, guest: str, number: signal.Signals) -> None:
    """Sends a signal to all processes of the guest."""
    for each in marked(mark):
        process, _, words = each.partition(" ")
        if words.startswith(f"b'{PROGRAM[guest]}"):
            with suppress(ProcessLookupError):
                os.kill(int(process), number)


@BOTH
def test_the_session_is_told_line_by_line(guest: str, tmp_path: Path) -> None:
    with nothing_left(tmp_path) as more:
        done = run("demo", f"--guest={guest}", "--seconds", "1", **more)
    assert done.returncode == 0 and not done.stderr, done.stderr
    in_order(
        [
            r"^virtio0: <virtio-net> over vhost-user$",
            r"^virtio0: features offered: .*MAC.*VERSION_1",
            rf"^\$ {PROGRAM[guest]} ",
            r"^Linux 6\.\S+ is up$",
            r"^\[ +[\d.]+\] .*(?:virtio-uml|1af4)",
            r"^\[ +[\d.]+\] virtio_net virtio0 vn0: renamed from eth0$",
            r"^virtio0: features accepted: .*MAC.*EVENT_IDX, VERSION_1",
            r"^virtio0: receiveq1 256 entries, transmitq1 256 entries, split rings$",
            r"^vn0: Ethernet address: (?:\w\w:){5}\w\w$",
            *SESSION,
        ],
        done.stdout,
    )
    assert "\x1b" not in done.stdout


@BOTH
def test_rings_and_offloads_are_as_asked_for(guest: str, tmp_path: Path) -> None:
    with nothing_left(tmp_path) as more:
        done = run("demo", f"--guest={guest}", "--packed", "--no-offloads", "--seconds", "1", "--json", **more)
    assert done.returncode == 0 and not done.stderr, done.stderr
    document = json.loads(done.stdout)
    assert list(document) == ["device", "probe", "guest", "driver", "ping", "iperf3", "vn0", "peer0", "tap_drops"]
    assert document["device"] == "guest" and document["probe"]["pci"] is None
    accepted = {each["name"] for each in document["driver"]["accepted"]}
    assert document["driver"]["format"] == "packed" and "RING_PACKED" in accepted
    assert not accepted & {"CSUM", "GUEST_CSUM", "GUEST_TSO4", "HOST_TSO4"}
    assert document["ping"]["sent"] == document["ping"]["received"] == 6
    assert all(each["bits_per_second"] > 0 for each in document["iperf3"])
    for end, other in (("vn0", "peer0"), ("peer0", "vn0")):
        assert 0 < document[end]["received_frames"] <= document[other]["sent_frames"]


@BOTH
def test_without_rights_it_makes_itself_a_user_namespace_or_says_why_not(guest: str, tmp_path: Path) -> None:
    with nothing_left(tmp_path) as more:
        done = run("demo", f"--guest={guest}", "--seconds", "1", before=PLAIN_USER, **more)
    if done.returncode:  # this machine may close one or the other to users
        assert re.search("/dev/net/tun is closed to this user|run it as root", failed(done, 1))
    else:
        assert "6 of 6 pings answered" in done.stdout


@pytest.mark.uml
def test_a_user_other_than_root_has_a_guest_whose_file_systems_are_mounted(tmp_path: Path) -> None:
    user: Sequence[str] = ("setpriv", "--reuid=12345", "--regid=12345", "--clear-groups") if ROOT else ()
    if subprocess.run([*user, *command("--version")], capture_output=True).returncode:
        user = PLAIN_USER  # where the checkout, or this Python, is closed to other users, root without rights is the nearest there is
    with nothing_left(tmp_path) as more:  # whose folder is closed to other users
        done = run("demo", "--guest=uml", "--seconds", "1", before=user, **{**more, "HOME": "/tmp", "TMPDIR": "/tmp"})
    if done.returncode:  # as above
        assert re.search("/dev/net/tun is closed to this user|run it as root", failed(done, 1))
    else:
        assert "6 of 6 pings answered" in done.stdout


@BOTH
def test_a_guest_that_dies_in_the_middle_ends_it_with_one_line(guest: str, tmp_path: Path) -> None:
    with nothing_left(tmp_path) as more, beside("demo", f"--guest={guest}", "--seconds", "30", **more) as process:
        until(process, "[ ID]")
        strike(more[MARK_NAME], guest, signal.SIGKILL)
        said = process.communicate(timeout=LIMIT)[1]
        assert process.returncode == 1 and re.fullmatch(rf"virtio: {PROGRAM[guest]} was ended by SIGKILL.*\n", said), said


@pytest.mark.uml
def test_a_guest_that_hangs_ends_it_in_time_with_one_line(tmp_path: Path) -> None:
    guest = "uml"
    with nothing_left(tmp_path) as more, beside("demo", f"--guest={guest}", "--seconds", "1", **more) as process:
        until(process, "PING ")
        strike(more[MARK_NAME], guest, signal.SIGSTOP)
        began = monotonic()
        said = process.communicate(timeout=LIMIT)[1]
        assert process.returncode == 1 and re.fullmatch(rf"virtio: {PROGRAM[guest]} did not finish 'ping' in time.*\n", said), said
        assert monotonic() - began < LIMIT


@BOTH
@pytest.mark.parametrize("seed", range(6))
def test_ended_at_any_moment_it_leaves_nothing(guest: str, seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    words = [word for word in ("--packed", "--json") if chance.random() < 0.5]
    number = chance.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
    with nothing_left(tmp_path) as more, beside("demo", f"--guest={guest}", "--seconds", "30", *words, **more) as process:
        until_it_listens(process)
        sleep(chance.uniform(0, 6))
        process.send_signal(number)
        said = process.communicate(timeout=LIMIT)[1]
        ending = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated", signal.SIGHUP: "hung up"}
        assert said == ("" if number == signal.SIGKILL else f"virtio: {ending[number]}\n")
        assert process.returncode == (-number if number == signal.SIGKILL else 1)


@BOTH
@pytest.mark.parametrize("seed", range(2))
def test_any_of_its_processes_killed_leaves_nothing(guest: str, seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    with nothing_left(tmp_path) as more, beside("demo", f"--guest={guest}", "--seconds", "30", **more) as process:
        until_it_listens(process)
        sleep(chance.uniform(0.2, 5))
        for _ in range(100):  # one that has ended since it was seen is no victim
            own = [int(each.split()[0]) for each in marked(more[MARK_NAME])]
            with suppress(ProcessLookupError):
                os.kill(chance.choice(own), signal.SIGKILL)
                break
        said = process.communicate(timeout=LIMIT)[1]
        assert process.returncode == -signal.SIGKILL or (process.returncode == 1 and re.fullmatch(r"virtio: .+\n", said)), said


def test_options_that_do_not_go_together_are_told(tmp_path: Path) -> None:
    assert "--qemu is without a guest" in failed(run("demo", "--guest", "--qemu"), 2)
    assert "--kernel is for --guest=qemu" in failed(run("demo", "--guest=uml", "--kernel", str(tmp_path)), 2)
    assert "'vax' is not one of" in failed(run("demo", "--guest=vax"), 2)


@pytest.mark.guest
def test_a_folder_without_a_kernel_is_told(tmp_path: Path) -> None:
    line = failed(run("demo", "--guest=qemu", "--kernel", str(tmp_path)), 1)
    assert line == f"virtio: no kernel in {tmp_path}: unpack the Debian package that linux-image-cloud-amd64 depends on there (dpkg-deb -x)"
