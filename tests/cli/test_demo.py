"""`virtio demo`: both devices, both formats, with and without rights, and ended at any moment."""

import json
import os
import random
import re
import signal
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from time import sleep
from typing import Any

import pytest

from tests.cli.run import LIMIT, beside, failed, marked, nothing_left, run, until_it_listens
from tests.cli.run import MARK as MARK_NAME

pytestmark = pytest.mark.qemu

ROOT = os.geteuid() == 0
# What a user without rights is: for root, root without capabilities (and the right to map itself into a user namespace).
PLAIN_USER: Sequence[str] = ("setpriv", "--bounding-set", "-all,+setfcap", "--inh-caps", "-all") if ROOT else ()
DEVICES = pytest.mark.parametrize("device", [(), ("--qemu",)], ids=["emulated", "qemu"])


SESSION = (
    r"^vn0: 192\.168\.90\.1/24, up$",
    r"^peer0: 192\.168\.90\.2/24, up, in a namespace of its own$",
    r"^\$ ping .*192\.168\.90\.2$",
    r"^6 packets transmitted, 6 received, 0% packet loss",
    r"^\$ iperf3 -c 192\.168\.90\.2 -t 1 ",
    r"receiver$",
    r"^\$ iperf3 .* -R$",
    r"receiver$",
    r"^vn0 to peer0 +[\d,]+$",
    r"^peer0 to vn0 +[\d,]+$",
    r"^frames sent +[\d,]+ +[\d,]+$",
    r"^notifications sent",
    r"^6 of 6 pings answered",
)
"""What it says once the driver has its device."""


def in_order(patterns: Sequence[str], text: str) -> None:
    """Each is found behind the one before it."""
    place = 0
    for pattern in patterns:
        found = re.compile(pattern, flags=re.MULTILINE).search(text, place)
        assert found, f"{pattern} not found behind:\n{text[:place]}"
        place = found.end()


def demo(*words: str, before: Sequence[str] = (), **more: str) -> dict[str, Any]:
    """The JSON document, whose shape docs/command.md tells."""
    done = run("demo", "--seconds", "1", "--json", *words, before=before, **more)
    assert done.returncode == 0 and not done.stderr, done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    assert list(document) == ["device", "probe", "driver", "ping", "iperf3", "vn0", "peer0", "tap_drops"]
    assert document["ping"]["sent"] == document["ping"]["received"] == 6
    assert [each["direction"] for each in document["iperf3"]] == ["vn0 to peer0", "peer0 to vn0"]
    assert all(each["bits_per_second"] > 0 for each in document["iperf3"])
    assert document["vn0"]["sent_frames"] > 0 and document["vn0"]["received_frames"] > 0
    return document


def accepted(document: dict[str, Any]) -> set[str]:
    return {each["name"] for each in document["driver"]["accepted"]}


@DEVICES
def test_the_session_is_told_line_by_line(device: tuple[str, ...], tmp_path: Path) -> None:
    with nothing_left(tmp_path) as more:
        done = run("demo", "--seconds", "1", *device, **more)
    assert done.returncode == 0 and not done.stderr, done.stderr
    in_order(
        [
            r"^virtio_pci0: <virtio-net 1af4:1041 revision \d+> at 0000:\w\w:\w\w\.0$",
            r"^virtio_pci0: BAR 4: 16 KiB of memory64 at 0x\w+$",
            r"^virtio_pci0: interrupts: MSI-X",
            r"^virtio_pci0: features offered: .*MAC.*VERSION_1",
            r"^virtio_pci0: features accepted: .*MAC.*VERSION_1",
            r"^vn0: Ethernet address: (?:\w\w:){5}\w\w$",
            *SESSION,
        ],
        done.stdout,
    )
    assert "\x1b" not in done.stdout


@DEVICES
def test_rings_and_offloads_are_as_asked_for(device: tuple[str, ...], tmp_path: Path) -> None:
    with nothing_left(tmp_path) as more:
        document = demo("--packed", "--no-offloads", *device, **more)
    assert document["device"] == ("qemu" if device else "emulated")
    assert document["driver"]["format"] == "packed" and "RING_PACKED" in accepted(document)
    assert not accepted(document) & {"CSUM", "GUEST_CSUM", "GUEST_TSO4", "HOST_TSO4"}


def test_without_rights_it_makes_itself_a_user_namespace_or_says_why_not(tmp_path: Path) -> None:
    with nothing_left(tmp_path) as more:
        done = run("demo", "--seconds", "1", before=PLAIN_USER, **more)
    if done.returncode:  # this machine may close one or the other to users
        assert re.search("/dev/net/tun is closed to this user|run it as root", failed(done, 1))
    else:
        assert "6 of 6 pings answered" in done.stdout


def test_where_the_tun_device_is_closed_it_says_so(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.touch(mode=0o600)
    if ROOT:
        os.chown(closed, 12345, 12345)
    else:
        closed = Path("/etc/shadow")
    own = ("unshare", "--mount", *([] if ROOT else ["--user", "--map-root-user"]), "sh", "-c")
    script = f'mount --bind "{closed}" /dev/net/tun && exec "$@"'
    with nothing_left(tmp_path) as more:
        line = failed(run("demo", before=(*own, script, "sh", *PLAIN_USER), **more), 1)
    assert line.startswith("virtio: /dev/net/tun is closed to this user")


def test_an_interrupt_is_one_line(tmp_path: Path) -> None:
    with nothing_left(tmp_path) as more, beside("demo", "--seconds", "60", **more) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("$ iperf3"):
                break
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=LIMIT)[1] == "virtio: interrupted\n"
        assert process.returncode == 1
        assert not marked(more[MARK_NAME])  # ended before the command did


@pytest.mark.parametrize("victim", ["ping", "iperf3", "qemu-system-x86_64"])
def test_a_program_that_dies_in_the_middle_ends_it_with_one_line(victim: str, tmp_path: Path) -> None:
    qemu = victim.startswith("qemu")
    with nothing_left(tmp_path) as more, beside("demo", "--seconds", "30", *(["--qemu"] if qemu else []), **more) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("PING " if victim == "ping" else "[ ID]"):
                break
        for each in marked(more[MARK_NAME]):
            number, _, words = each.partition(" ")
            if words.startswith(f"b'{victim}") or (qemu and f"{victim}\\x00" in words):
                with suppress(ProcessLookupError):
                    os.kill(int(number), signal.SIGKILL)
        said = process.communicate(timeout=LIMIT)[1]
        assert process.returncode == 1 and said.startswith("virtio: ") and said.count("\n") == 1, said


@pytest.mark.parametrize("seed", range(16))
def test_ended_at_any_moment_it_leaves_nothing(seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    words = [word for word in ("--qemu", "--packed", "--json") if chance.random() < 0.5]
    number = chance.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
    with nothing_left(tmp_path) as more, beside("demo", "--seconds", "30", *words, **more) as process:
        until_it_listens(process)
        sleep(chance.uniform(0, 3))
        process.send_signal(number)
        said = process.communicate(timeout=LIMIT)[1]
        ending = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated", signal.SIGHUP: "hung up"}
        assert said == ("" if number == signal.SIGKILL else f"virtio: {ending[number]}\n")
        assert process.returncode == (-number if number == signal.SIGKILL else 1)


@pytest.mark.parametrize("seed", range(4))
def test_any_of_its_processes_killed_leaves_nothing(seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    with nothing_left(tmp_path) as more, beside("demo", "--seconds", "30", "--qemu", **more) as process:
        until_it_listens(process)
        sleep(chance.uniform(0.2, 3))
        for _ in range(100):  # one that has ended since it was seen is no victim
            own = [int(each.split()[0]) for each in marked(more[MARK_NAME]) if "virtio" in each]
            with suppress(ProcessLookupError):
                os.kill(chance.choice(own), signal.SIGKILL)
                break
        said = process.communicate(timeout=LIMIT)[1]
        assert process.returncode == -signal.SIGKILL or (process.returncode == 1 and re.fullmatch(r"virtio: .+\n", said)), said
