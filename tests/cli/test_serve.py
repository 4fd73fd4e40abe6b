"""`virtio serve`: every far end, its events, its end, and the command lines that it refuses."""

import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.run import LIMIT, command, environment, failed, nothing_left, run, started
from tests.cli.serving import SPLIT, Remote, read, serving, with_ring
from tests.netdev.wires import Wire, carrier, frame
from tests.readable import readable
from tests.vhost_user.guest import Guest, eventually
from virtio import Feature
from virtio.devices.net import CHECKSUMS, GUEST_OFFLOADS, HOST_OFFLOADS, NetFeature
from virtio.features import Features
from virtio.netdev import Namespace, open_tap
from virtio.vhost_user import message as wire
from virtio.vhost_user.message import FrontendRequest as F
from virtio.vhost_user.message import ProtocolFeature

GONE = ("the TAP is gone", "interface tap7 is gone")
OFFLOADS = CHECKSUMS | GUEST_OFFLOADS | HOST_OFFLOADS


def offered(path: Path) -> Features:
    """What the back-end offers to whoever connects."""
    with Remote.to(path) as frontend:
        reply = frontend.ask(F.GET_FEATURES)
        assert reply is not None
        return Features(bit for bit in range(64) if reply.payload.value >> bit & 1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_without_a_far_end_frames_are_counted(path: Path, tmp_path: Path, number: signal.Signals) -> None:
    with nothing_left(tmp_path), serving("net", "--socket-path", str(path)) as served:
        assert "without a far end" in served.seen[0]["what"]
        for turn in range(2):
            with Remote.to(path) as frontend, Remote.to(path) as second:
                assert [served.until("connected")["connections"] for _ in range(2)] == [1, 2]
                for each in (frontend, second):
                    guest = Guest(each, SPLIT)
                    guest.start()
                    for sent in range(50):
                        guest.send(sent)
                counted = served.until("counters", received_frames=100 * turn + 100)["devices"][0]
                assert counted["live"] and counted["received_bytes"] == (turn + 1) * 2 * sum(len(frame(sent)) for sent in range(50))
            assert [served.until("disconnected")["connections"] for _ in range(2)][-1] == 0
        [end] = [event for event in served.end(number) if event["event"] == "end"]
        assert end["devices"] == [{**counted, "live": False}] and counted["dropped_frames"] == 0
        assert not path.exists()


def test_packed_rings_and_offloads_are_offered_as_asked(path: Path) -> None:
    for words, packed, offloads in (((), False, True), (("--packed",), True, True), (("--no-offloads",), False, False)):
        with serving("net", "--socket-path", str(path), *words) as served:
            found = offered(path)
            assert (Feature.RING_PACKED in found) is packed and bool(found & OFFLOADS) is offloads
            assert Feature.RING_RESET not in found  # QEMU tells no back-end of it
            served.end()
    with serving("net", "--socket-path", str(path), "--packed") as served, Remote.to(path) as frontend:
        guest = Guest(frontend, SPLIT | {Feature.RING_PACKED})
        guest.start()
        guest.send(1)
        served.until("counters", received_frames=1)


def test_several_queue_pairs(path: Path, tmp_path: Path) -> None:
    with serving("net", "--socket-path", str(path), "--queue-pairs", "2") as served, Remote.to(path) as frontend:
        frontend.negotiate(SPLIT | {NetFeature.MQ})
        queues = [frontend.queue(index) for index in range(4)]
        for queue in queues:
            frontend.start(queue)
        place = frontend.room(12 + 60, bytes(12) + frame(0)[:60])
        for queue in queues[1::2]:
            queue.add(None, readable=[place])
            queue.publish()
        served.until("counters", received_frames=2)
        served.end()
    other = tmp_path / "t"
    words = ("net", "--socket-path", str(path), "--peer", str(other), "--queue-pairs", "2")
    with serving(*words, sockets=2) as served, Remote.to(path) as near, Remote.to(other) as far:
        one, two = Guest(near, SPLIT), Guest(far, SPLIT | {NetFeature.MQ})
        one.start()
        two.start()
        more = [far.queue(index) for index in (2, 3)]
        for queue in more:
            far.start(queue)
        place = far.room(12 + len(frame(7)), bytes(12) + frame(7))
        more[1].add(None, readable=[place])
        more[1].publish()
        one.expect([7])  # from the second pair of the one to the only pair of the other
        served.end()


def test_mac_and_mtu_are_what_was_asked_for(path: Path) -> None:
    with serving("net", "--socket-path", str(path), "--mac", "52:54:00:1:2:ab", "--mtu", "9000"), Remote.to(path) as frontend:
        frontend.negotiate(SPLIT)
        reply = frontend.ask(F.GET_CONFIG, wire.Config(0, 12, 0, bytes(12)))
        assert reply is not None
        assert isinstance(reply.payload, wire.Config)
        assert reply.payload.data[:6] == bytes.fromhex("5254000102ab") and reply.payload.data[10:12] == (9000).to_bytes(2, "little")


def test_a_capture_is_what_tcpdump_reads(path: Path, tmp_path: Path, ring_features: Features) -> None:
    capture = tmp_path / "c.pcap"
    with serving("net", "--socket-path", str(path), "--pcap", str(capture), "--packed") as served:
        assert not offered(path) & OFFLOADS
        with Remote.to(path) as frontend:
            guest = Guest(frontend, ring_features)
            guest.start()
            for number in range(100):
                guest.send(number)
            served.until("counters", received_frames=100)
        served.end()
    done = subprocess.run(["tcpdump", "-r", str(capture), "-nn", "-xx", "-tt"], capture_output=True, text=True, check=True)
    assert "EN10MB" in done.stderr
    frames: list[bytearray] = []
    times: list[str] = []
    for line in done.stdout.splitlines():
        if (dump := re.match(r"\s+0x[0-9a-f]{4}:\s+([0-9a-f ]+)", line)) is not None:
            frames[-1] += bytes.fromhex(dump[1].replace(" ", ""))
        else:
            times.append(line.split()[0])
            frames.append(bytearray())
    assert frames == [frame(number) for number in range(100)]
    assert times == sorted(times)
    assert capture.read_bytes()[:4] == (0xA1B23C4D).to_bytes(4, sys.byteorder)


def test_frames_of_several_slots_are_whole_in_a_capture(path: Path, tmp_path: Path) -> None:
    capture = tmp_path / "c.pcap"
    data = os.urandom(9000)
    with serving("net", "--socket-path", str(path), "--pcap", str(capture), "--mtu", "9000") as served, Remote.to(path) as frontend:
        guest = Guest(frontend, SPLIT)
        guest.start()
        place = frontend.room(12 + len(data), bytes(12) + data)
        guest.transmitq.add("long", readable=[place])
        guest.transmitq.publish()
        served.until("counters", received_frames=1)
        served.end()
    assert capture.read_bytes()[24 + 8 : 24 + 16] == len(data).to_bytes(4, sys.byteorder) * 2
    assert capture.read_bytes()[24 + 16 :] == data


def test_a_capture_that_cannot_be_written_ends_it(path: Path) -> None:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    words = command("serve", "net", "--socket-path", str(path), "--pcap", "/dev/full")
    done = run("serve", "net", "--socket-path", str(path), "--pcap", "/dev/full")
    assert "/dev/full" in failed(done, 1) and "No space left" in done.stderr
    with started([*words[:-1], "/proc/self/fd/1"], **pipes, text=True, env=environment()) as process:
        assert process.stdout is not None
        process.stdout.close()  # a pipe that nobody reads
        assert process.wait(LIMIT) == 1
    assert not path.exists()


def test_frames_pass_between_two_machines(path: Path, tmp_path: Path, ring_features: Features) -> None:
    other = tmp_path / "t"
    with serving("net", "--socket-path", str(path), "--peer", str(other), "--packed", sockets=2) as served:
        with Remote.to(path) as near, Remote.to(other) as far:
            one, two = Guest(near, ring_features), Guest(far, ring_features)
            one.start()
            two.start()
            for number in range(300):  # many times the rings' length
                one.send(number, meanwhile=two.receive)
                two.send(1000 + number, meanwhile=one.receive)
            one.expect([1000 + number for number in range(300)])
            two.expect(list(range(300)))
            counted = served.until("counters", received_frames=300, sent_frames=300)["devices"]
            assert [each["dropped_frames"] for each in counted] == [0, 0]
        with Remote.to(path) as near:  # alone: what it sends goes nowhere
            one = Guest(near, ring_features)
            one.start()
            for number in range(40):
                one.send(number)
            served.until("counters", received_frames=340, dropped_frames=40)
        served.end()
    assert not path.exists() and not other.exists()


def test_a_machine_that_takes_nothing_does_not_keep_the_other_from_sending(path: Path, tmp_path: Path) -> None:
    other, capture = tmp_path / "t", tmp_path / "c"
    words = ("net", "--socket-path", str(path), "--peer", str(other), "--pcap", str(capture))
    with serving(*words, sockets=2) as served, Remote.to(path) as near, Remote.to(other) as far:
        one, two = Guest(near, SPLIT), Guest(far, SPLIT)
        one.start()
        two.start()
        for number in range(50):  # the other machine has 16 buffers, and gives none back; the rest is waited for once in a while
            one.send(number)
        served.until("counters", received_frames=50)
        found = len(two.receive())
        assert found >= 16
        before = capture.stat().st_size
        assert before == 24 + sum(16 + len(frame(number)) for number in range(50))  # each once
        two.frames = []
        two.send(7)  # nor from being sent to
        one.expect([7])


def test_a_machine_that_breaks_a_rule_breaks_its_own_device_alone(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "t"
    with serving("net", "--socket-path", str(path), "--peer", str(other), sockets=2) as served:
        with Remote.to(path) as near, Remote.to(other) as far:
            one, two = Guest(near, SPLIT), Guest(far, SPLIT)
            one.start()
            two.start()
            two.break_a_rule()
            assert "not all in mapped memory" in served.until("error")["text"]
            assert far.errors[1].wait(60)
            for number in range(40):
                one.send(number)
            far.ask(F.RESET_DEVICE)
            two = Guest(far, SPLIT)
            two.start()
            two.send(5)
            one.expect([5])
        served.end()


@pytest.mark.parametrize("pairs", [1, 2])
def test_an_interface_is_the_far_end(path: Path, tmp_path: Path, ring_features: Features, pairs: int) -> None:
    with Namespace() as namespace, nothing_left(tmp_path):
        with namespace.entered():
            Path("/proc/sys/net/ipv6/conf/default/disable_ipv6").write_text("1")
        with serving(
            "net", "--socket-path", str(path), "--tap", "tap7", "--packed", "--queue-pairs", str(pairs), namespace=namespace
        ) as served:
            for turn in range(2):
                with Remote.to(path) as frontend, Wire(namespace, "tap7") as wired:
                    guest = Guest(frontend, ring_features)
                    guest.start()
                    wired.ready()
                    for number in range(100):
                        guest.send(number)
                        wired.send(number)
                        guest.receive()
                    assert wired.receive(100) == list(range(100))
                    guest.expect(list(range(100)))
                    reply = frontend.ask(F.GET_PROTOCOL_FEATURES)  # a machine that migrates here is announced
                    assert reply is not None and reply.payload.value >> ProtocolFeature.RARP & 1
                    served.until("counters", received_frames=100 * turn + 100, sent_frames=100 * turn + 100)
                eventually(lambda: not carrier(namespace, "tap7"))
            served.end()
        with namespace.entered():
            assert "tap7" not in [name for _, name in socket.if_nameindex()]


def test_a_persistent_interface_is_taken_and_stays(path: Path) -> None:
    with Namespace() as namespace:
        with namespace.entered():
            subprocess.run(["ip", "tuntap", "add", "tap7", "mode", "tap"], check=True)
            subprocess.run(["ip", "addr", "add", "192.0.2.2/24", "dev", "tap7"], check=True)
            subprocess.run(["ip", "link", "set", "tap7", "mtu", "2000"], check=True)
        for number in range(2):
            with serving("net", "--socket-path", str(path), "--tap", "tap7", namespace=namespace) as served:
                with Remote.to(path) as frontend, Wire(namespace, "tap7") as wired:
                    guest = Guest(frontend, SPLIT)
                    guest.start()
                    wired.ready()
                    guest.send(number)
                    assert wired.receive(1) == [number]
                served.end()
            with namespace.entered():
                shown = subprocess.run(["ip", "addr", "show", "tap7"], capture_output=True, text=True, check=True).stdout
            assert "192.0.2.2/24" in shown and "mtu 2000" in shown


def test_an_interface_that_is_deleted_ends_it(path: Path) -> None:
    with Namespace() as namespace, serving("net", "--socket-path", str(path), "--tap", "tap7", namespace=namespace) as served:
        with namespace.entered():
            subprocess.run(["ip", "link", "delete", "tap7"], check=True)
        out, said = served.process.communicate(timeout=LIMIT)
        assert (served.process.returncode, said) in [(1, f"virtio: {text}\n") for text in GONE]
        assert json.loads(out.splitlines()[-1])["event"] == "end"
    assert not path.exists()


def test_an_interface_that_cannot_be_had(path: Path) -> None:
    with Namespace() as namespace:
        taken = open_tap("tap7", namespace=namespace.fileno())
        with namespace.entered():
            line = failed(run("serve", "net", "--socket-path", str(path), "--tap", "tap7"), 1)
        assert line == "virtio: interface tap7 is in use: another program has it"
        os.close(taken)
        with namespace.entered():
            line = failed(run("serve", "net", "--socket-path", str(path), "--tap", "lo"), 1)
        assert line == "virtio: interface lo is there already, and is no TAP: choose another name"
    plain = ("setpriv", "--bounding-set", "-all", "--inh-caps", "-all") if os.geteuid() == 0 else ()
    line = failed(run("serve", "net", "--socket-path", str(path), "--tap", "tap7", before=plain), 1)
    assert "CAP_NET_ADMIN" in line or "/dev/net/tun" in line
    assert not path.exists()


def test_an_entropy_device_for_each(path: Path) -> None:
    with serving("rng", "--socket-path", str(path)) as served:
        with with_ring(path) as one, with_ring(path) as two:
            assert read(one, 64) != read(two, 64)
            found = served.until("counters", requestq=2)["devices"]
            assert found == [{"socket": str(path), "live": True, "requestq": 2}]
        assert served.end()[-1]["devices"][0]["requestq"] == 2


def test_qemus_conventions_for_back_end_programs() -> None:
    for kind in ("net", "rng"):
        done = run("serve", kind, "--print-capabilities", "--fd", "3", "--socket-path", "x", "--evdev-path=/dev/null")
        assert (done.returncode, json.loads(done.stdout), done.stderr) == (0, {"type": kind}, "")
    done = run("serve", "net", "--print-description")
    description = json.loads(done.stdout)
    assert set(description) == {"description", "type", "binary", "tags"} and description["type"] == "net"
    binary = Path(description["binary"])
    assert binary.parent == Path(sys.executable).parent  # where it is installed: management programs start it so
    done = subprocess.run([binary, "--print-capabilities"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {"type": "net"}


def test_counters_move_on_a_terminal(path: Path) -> None:
    ours, theirs = pty.openpty()
    words = command("serve", "net", "--socket-path", str(path))
    with started(words, stdin=theirs, stdout=theirs, stderr=theirs, env=environment(COLUMNS="300")) as process:
        os.close(theirs)
        text = ""

        def shown(what: str) -> bool:
            nonlocal text
            while readable(ours):
                try:
                    text += os.read(ours, 4096).decode()
                except OSError:
                    break
            return re.search(what, text) is not None

        eventually(lambda: shown("network device without a far end"))
        with Remote.to(path) as frontend:
            guest = Guest(frontend, SPLIT)
            guest.start()
            for number in range(20):
                guest.send(number)
            eventually(lambda: shown(r"received frames +20\b"))
        eventually(lambda: shown("disconnected, 0 connected now"))
        process.send_signal(signal.SIGINT)
        eventually(lambda: shown("no driver") and process.poll() is not None)
        assert process.wait(LIMIT) == 0
        os.close(ours)
    assert '{"event"' not in text and "connected, 1 connected now" in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("blk",), "'blk' is no device type that is known: net, rng, or FILE.py:CLASS"),
        (("net", "--mac", "52:54:00:12:34"), "is not six numbers"),
        (("net", "--mac", "52:54:00:12:34:zz"), "is not six numbers"),
        (("net", "--mac", "52:54:00:12:34:567"), "is not six numbers"),
        (("net", "--mac", "01:00:5e:00:00:01"), "01:00:5e:00:00:01 is not the address of one station: it is a group's"),
        (("net", "--mac", "00:00:00:00:00:00"), "is not the address of one station: it is nobody's"),
        (("net", "--mtu", "67"), "67 is not in the range 68<=x<=65535"),
        (("net", "--mtu", "65536"), "65536 is not in the range"),
        (("net", "--mtu", "x"), "'x'"),
        (("net", "--socket-path", "s", "--tap", "a/b"), "interface name 'a/b'"),
        (("net", "--socket-path", "s", "--tap", "x" * 16), "it may have 1 to 15"),
        (("net", "--socket-path", "s", "--tap", "x", "--peer", "y"), "--tap does not go together with --peer"),
        (("net", "--socket-path", "s", "--tap", "x", "--pcap", "y"), "--tap does not go together with --pcap: run tcpdump -i x"),
        (("net", "--socket-path", "s", "--peer", "./s"), "--socket-path and --peer are the same file, ./s"),
        (("net", "--socket-path", "s", "--pcap", "./s"), "--socket-path and --pcap are the same file, ./s"),
        (("net", "--socket-path", "s", "--pcap", "-"), "standard output is for events: name a file"),
        (("dice.py:", "--socket-path", "s"), "dice.py: is not a file and a class"),
        (("/etc/passwd:Dice", "--socket-path", "s"), "/etc/passwd is no Python file: its name has to end in .py"),
        ((":Dice", "--socket-path", "s"), ":Dice is not a file and a class"),
        ((), "a device type is needed: net, rng, or FILE.py:CLASS"),
        (("rng", "--tap", "x"), "--tap"),
    ],
)
def test_a_wrong_command_line_is_one_line(words: tuple[str, ...], said: str) -> None:
    assert said in failed(run("serve", *words), 2)


def test_an_idle_back_end_takes_no_time(path: Path) -> None:
    with serving("net", "--socket-path", str(path)) as served, Remote.to(path) as frontend:
        guest = Guest(frontend, SPLIT)
        guest.start()
        guest.send(1)
        served.until("counters", received_frames=1)

        def ticks() -> int:
            fields = Path(f"/proc/{served.process.pid}/stat").read_text().rpartition(")")[2].split()
            return int(fields[11]) + int(fields[12])

        assert any(_spent(ticks) <= 20 for _ in range(5))  # of a hundred in a second, which who polls would take


def _spent(ticks: Callable[[], int]) -> int:
    before = ticks()
    time.sleep(1.0)
    return ticks() - before
