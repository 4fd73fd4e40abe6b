"""`virtio serve`: every far end, its events, its end, and what it refuses."""

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
from tests.cli.serving import Remote, serving
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
SPLIT = Features({Feature.VERSION_1})
OFFLOADS = CHECKSUMS | GUEST_OFFLOADS | HOST_OFFLOADS
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


def offered(path: Path) -> Features:
    """What the back-end offers to whoever connects."""
    with Remote.to(path) as frontend:
        reply = frontend.ask(F.GET_FEATURES)
        assert reply is not None
        return Features(bit for bit in range(64) if reply.payload.value >> bit & 1)


def read(frontend: Remote, count: int) -> bytes:
    """From an entropy device whose ring is there."""
    queue, place = frontend.queues[0], frontend.room(count)
    queue.add(None, writable=[place])
    queue.publish()
    queue.arm()
    found: list[tuple[object, int]] = []

    def used() -> bool:
        found.extend(queue.pop_used())
        return bool(found)

    eventually(used)
    return frontend.look(place, found[0][1])


def with_ring(path: Path) -> Remote:
    frontend = Remote.to(path)
    frontend.negotiate(SPLIT)
    frontend.start(frontend.queue(0))
    return frontend


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
        ("{folder}/plain.txt:Dice", "{folder}/plain.txt is no Python file"),
        ("{folder}/wrong.py:Dice", "{folder}/wrong.py does not import: SyntaxError: "),
        ("{folder}/raises.py:Dice", "{folder}/raises.py does not import: ZeroDivisionError: "),
        ("{folder}/exits.py:Dice", "{folder}/exits.py does not import: it ends the program (3)"),
        ("{folder}/interrupts.py:Dice", "{folder}/interrupts.py does not import: it ends the program (KeyboardInterrupt)"),
    ],
)
def test_a_class_that_cannot_be_served_is_one_line(target: str, said: str, dice: str, tmp_path: Path, path: Path) -> None:
    ends = {"exits.py": "raise SystemExit(3)", "interrupts.py": "raise KeyboardInterrupt"}
    for name, text in {"plain.txt": "", "wrong.py": "def", "raises.py": "1 / 0", **ends}.items():
        (tmp_path / name).write_text(text)
    places = {"dice": dice, "folder": str(tmp_path)}
    assert said.format(**places) in failed(run("serve", target.format(**places), "--socket-path", str(path)), 1)
    assert not path.exists()


def test_sockets_that_cannot_be_had(path: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("")

    def line(*words: str, code: int = 1) -> str:
        return failed(run("serve", "rng", *words), code)

    assert "No such file" in line("--socket-path", str(tmp_path / "missing" / "s"))
    assert "it exists and is not a socket" in line("--socket-path", str(plain))
    assert "it is not a socket" in line("--socket-path", str(plain), "--client")
    assert "has 108 bytes: the path of a socket has 1 to 107" in line("--socket-path", "x" * 108, code=2)
    assert "has 0 bytes" in line("--socket-path", "", code=2)
    assert "either --socket-path or --fd is needed" in line(code=2)
    assert "not both" in line("--socket-path", str(path), "--fd", "3", code=2)
    assert "--client is for --socket-path" in line("--fd", "3", "--client", code=2)
    assert "descriptor 99 is not a socket" in line("--fd", "99")
    assert "descriptor 0 is not a socket" in line("--fd", "0")
    assert "'-1'" in line("--fd", "-1", code=2) or "-1 is not in the range" in line("--fd", "-1", code=2)
    with serving("rng", "--socket-path", str(path)) as served:
        assert f"cannot listen on {path}: it is in use" in line("--socket-path", str(path))
        served.end()
    with serving("rng", "--socket-path", str(path)) as served:  # its socket stays behind
        served.process.kill()
        served.process.wait(LIMIT)
    assert path.is_socket()
    with serving("rng", "--socket-path", str(path)) as served, with_ring(path) as frontend:
        assert len(read(frontend, 8)) == 8
        served.end()
    tcp = socket.socket()
    with tcp:
        done = subprocess.run(
            command("serve", "rng", "--fd", str(tcp.fileno())), pass_fds=[tcp.fileno()], capture_output=True, text=True, env=environment()
        )
    assert "is not a Unix stream socket, but AF_INET" in failed(done, 1)


@pytest.mark.parametrize("listening", [True, False], ids=["listening", "connected"])
def test_a_descriptor_is_the_socket(path: Path, listening: bool) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        ours = theirs = None
        if not listening:
            ours = socket.socket(socket.AF_UNIX)
            ours.connect(str(path))
            theirs, _ = listener.accept()
        passed = (listener if theirs is None else theirs).fileno()
        with serving("rng", "--fd", str(passed), pass_fds=[passed]) as served:
            assert served.seen[0]["socket"] == f"descriptor {passed}"
            if theirs is not None:
                theirs.close()
            with Remote.to(path) if ours is None else Remote(ours) as frontend:
                frontend.negotiate(SPLIT)
                frontend.start(frontend.queue(0))
                assert len(read(frontend, 8)) == 8
            if listening:
                served.until("disconnected")
                served.end()
            else:
                assert [event["event"] for event in served.ended()][-2:] == ["disconnected", "end"]


def test_as_a_client_it_connects_again_and_again(path: Path) -> None:
    with serving("rng", "--socket-path", str(path), "--client") as served:
        for _ in range(2):
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(str(path))
                listener.listen()
                listener.settimeout(60)
                connected, _ = listener.accept()
                with Remote(connected) as frontend:
                    frontend.negotiate(SPLIT)
                    frontend.start(frontend.queue(0))
                    assert len(read(frontend, 8)) == 8
            path.unlink()
            served.until("disconnected")
        served.end()


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
        (("net", "--mac", "01:00:5e:00:00:01"), "is not the address of one device"),
        (("net", "--mac", "00:00:00:00:00:00"), "is not the address of one device"),
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
