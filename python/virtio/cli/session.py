"""What `virtio demo` does, in its worker: the device, its driver, `vn0` and `peer0`, ping and iperf3. It tells all by events."""

import os
import re
import select
import signal
import subprocess
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from time import monotonic, sleep
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

from virtio.cli.inspect import inspect
from virtio.cli.output import CommandError
from virtio.cli.worker import Emit
from virtio.devices.net import CHECKSUMS, GUEST_OFFLOADS, HOST_OFFLOADS, WANTED, NetDevice, NetDriver, NetFeature
from virtio.features import Features
from virtio.netdev import SLOT_SIZE, Namespace, Netdev, open_tap
from virtio.netdev.tap import Interface
from virtio.pci.emulated import EmulatedFunction
from virtio.spec import Feature
from virtio.transport.pci import PciTransport

if TYPE_CHECKING:
    from virtio import DeviceQueue, DriverQueue
    from virtio.netdev import NetdevPair
    from virtio.pci.function import PciFunction

DRIVER: Final = ("vn0", "192.168.90.1")
PEER: Final = ("peer0", "192.168.90.2")
PINGS: Final = 6
PING_SECONDS: Final = 20
OFFLOADS: Final = GUEST_OFFLOADS | HOST_OFFLOADS | CHECKSUMS
"""What --no-offloads leaves out."""
POOL: Final = {True: (128, SLOT_SIZE), False: (1024, 2048)}
"""Slots and their size: with offloads a slot holds 64 KiB in one piece, and few of these stay in the cache."""
GRACE: Final = 20.0
"""Seconds that a program may take longer than it was told to."""
LOOK: Final = 0.1
"""Seconds after which it is looked whether there is sense in going on."""
LONGEST_LINE: Final = 1 << 16
"""Bytes after which a line is cut."""
_RATE = re.compile(r"([\d.]+) ([KMGT]?)bits/sec.*\b(sender|receiver)\s*$")
_PING = re.compile(r"(\d+) packets transmitted, (\d+) received")
_RTT = re.compile(r"= ([\d.]+)/([\d.]+)/([\d.]+)")
_SCALE: Final = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


class Wishes(NamedTuple):
    """What the command line asked for."""

    qemu: bool
    packed: bool
    offloads: bool
    seconds: int


def session(wishes: Wishes, emit: Emit) -> None:
    """The whole of it, from probing to the last figures. CommandError, VirtioError, OSError: why it ended early."""
    with ExitStack() as stack:
        near, far = stack.enter_context(Namespace()), stack.enter_context(Namespace())
        os.close(open_tap(DRIVER[0], namespace=near.fileno()))  # what keeps us from it is told first
        device: NetDevice | None = None
        function: PciFunction
        if wishes.qemu:
            function = _start_qemu(stack, far, wishes)
        else:
            device = NetDevice()
            function = EmulatedFunction(device)
        transport = stack.enter_context(PciTransport(function))
        report = inspect(transport, "qemu:virtio-net-pci" if wishes.qemu else "emulated:net")
        emit("device", report=report)
        wanted = WANTED if wishes.offloads else WANTED - OFFLOADS
        if not wishes.packed:
            wanted = wanted - {Feature.RING_PACKED}
        required = {Feature.RING_PACKED} if wishes.packed else set()
        slots, slot_size = POOL[wishes.offloads]
        net = stack.enter_context(NetDriver(transport, wanted=wanted, required=required, slots=slots, slot_size=slot_size))
        accepted = Features(net.features, names=[NetFeature])
        emit(
            "driver",
            accepted=[{"bit": int(bit), "name": getattr(bit, "name", None)} for bit in accepted],
            mac=net.mac.hex(":"),
            mtu=net.mtu,
            link=net.link,
            queues=[net.receiveq.size, net.transmitq.size],
            format="packed" if Feature.RING_PACKED in accepted else "split",
        )
        vn0 = stack.enter_context(Netdev(net, DRIVER[0], namespace=near, address=f"{DRIVER[1]}/24"))
        running: Netdev | NetdevPair = vn0
        if device is not None:
            peer0 = stack.enter_context(Netdev(device, PEER[0], namespace=far, mtu=net.mtu, address=f"{PEER[1]}/24"))
            running = stack.enter_context(Netdev.pair(vn0, peer0))
        running.start()
        emit("up", name=DRIVER[0], address=DRIVER[1], peer=PEER[0], peer_address=PEER[1])
        run = Programs(emit, running.check)
        ping = run.ping(near)
        rates = run.iperf3(near, far, wishes.seconds)
        running.check()
        ours = vn0.statistics
        kernel = far.counters(PEER[0])
        emit(
            "result",
            ping=ping,
            iperf3=rates,
            vn0=_figures(ours["transmit"], ours["receive"], [net.transmitq, net.receiveq]),
            peer0=_swapped(kernel) if device is None else _device_figures(device, peer0.statistics),
            tap_drops=[ours["receive"]["refused"]] + ([] if device is None else [peer0.statistics["transmit"]["refused"]]),
        )


def _figures(sent: dict[str, Any], received: dict[str, Any], queues: "Sequence[DriverQueue | DeviceQueue]") -> dict[str, Any]:
    """What one end did, by the names of `Port.statistics`."""
    counters = [queue.counters for queue in queues]
    return {
        **{f"sent_{key}": sent[key] for key in ("frames", "bytes", "drops")},
        **{f"received_{key}": received[key] for key in ("frames", "bytes", "drops")},
        **{key: sum(each[key] for each in counters) for key in ("notified", "suppressed")},
    }


def _device_figures(device: NetDevice, counted: dict[str, Any]) -> dict[str, Any]:
    """A device sends to receiveq1, and receives from transmitq1."""
    queues = [queue for index in (0, 1) if (queue := device.queue(index)) is not None]
    return _figures(counted["receive"], counted["transmit"], queues)


def _start_qemu(stack: ExitStack, far: Namespace, wishes: Wishes) -> "PciFunction":
    """QEMU's device, and `peer0` as its far end, up and with its address."""
    from virtio.pci.qtest import QemuMachine

    tap = open_tap(PEER[0], namespace=far.fileno())
    stack.callback(os.close, tap)
    interface = Interface(PEER[0], far.fileno())
    interface.add_addresses([f"{PEER[1]}/24"])
    interface.up()
    options = "packed=on," if wishes.packed else ""
    machine = QemuMachine(
        [f"virtio-net-pci,netdev=peer,{options}rx_queue_size=1024,tx_queue_size=256,disable-legacy=on"],
        netdevs=[f"tap,id=peer,fd={tap},vhost=off"],
        pass_fds=[tap],
    )
    stack.enter_context(machine)
    (function,) = machine.functions()
    return function


def _swapped(kernel: dict[str, int]) -> dict[str, int]:
    """What the kernel's interface received is what the far end sent to it, and was received from the driver by that end."""
    return {
        "sent_frames": kernel["sent_frames"],
        "sent_bytes": kernel["sent_bytes"],
        "received_frames": kernel["received_frames"],
        "received_bytes": kernel["received_bytes"],
    }


class Programs:
    """Runs real programs and tells what they print, line by line."""

    def __init__(self, emit: Emit, check: Callable[[], None]) -> None:
        """`check` is called again and again, and raises when there is no sense in going on."""
        self._emit, self._check = emit, check

    def ping(self, near: Namespace) -> dict[str, Any]:
        """Pings the peer; what came back, and after how many milliseconds."""
        words = ["ping", "-n", "-c", str(PINGS), "-i", "0.2", "-w", str(PING_SECONDS), PEER[1]]
        with near.entered():
            lines = self.run(words, "ping", seconds=1.2, limit=PING_SECONDS, may_fail=True)
        text = "\n".join(lines)
        if (found := _PING.search(text)) is None:
            raise CommandError(f"ping failed: {lines[-1] if lines else 'it said nothing'}")
        if not int(found[2]):
            raise CommandError(f"none of {found[1]} pings was answered")
        times = _RTT.search(text)
        names = ("min_ms", "avg_ms", "max_ms")
        return {
            "sent": int(found[1]),
            "received": int(found[2]),
            **{name: float(times[place]) if times else None for place, name in enumerate(names, 1)},
        }

    def iperf3(self, near: Namespace, far: Namespace, seconds: int) -> list[dict[str, Any]]:
        """One TCP stream each way; bits per second that arrived."""
        found = []
        with ExitStack() as stack:
            with far.entered():
                server = stack.enter_context(Program(["iperf3", "-s", "--forceflush"]))
            for direction, words in ((f"{DRIVER[0]} to {PEER[0]}", []), (f"{PEER[0]} to {DRIVER[0]}", ["-R"])):
                self._await(server, "Server listening")
                command = ["iperf3", "-c", PEER[1], "-t", str(seconds), "--connect-timeout", "5000", "--forceflush", *words]
                with near.entered():
                    lines = self.run(command, f"iperf3, {direction}", seconds=seconds, limit=seconds)
                rates = {match[3]: float(match[1]) * _SCALE[match[2]] for line in lines if (match := _RATE.search(line))}
                if "receiver" not in rates:
                    raise CommandError(f"iperf3 told no rate from {direction}: {lines[-1] if lines else 'it said nothing'}")
                found.append({"direction": direction, "bits_per_second": rates["receiver"]})
        return found

    def run(self, words: Sequence[str], title: str, *, seconds: float, limit: float, may_fail: bool = False) -> list[str]:
        """Runs a program that takes about `seconds`; its lines. CommandError: it failed, or took longer than `limit` and `GRACE`."""
        self._emit("step", title=title, seconds=seconds, command=" ".join(words))
        deadline = monotonic() + limit + GRACE
        with Program(words) as program:
            lines = self._lines(program, deadline, show=True)
            status = program.status(deadline)
        if status < 0 or (status and not may_fail):
            said = next((line for line in reversed(lines) if line), "it said nothing")
            how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"failed: {said}"
            raise CommandError(f"{words[0]} {how}")
        return lines

    def _await(self, program: "Program", word: str) -> None:
        lines = self._lines(program, monotonic() + GRACE, show=False, until=word)
        if not lines or word not in lines[-1]:
            raise CommandError(f"iperf3's server did not start: {' '.join(lines)}")

    def _lines(self, program: "Program", deadline: float, *, show: bool, until: str | None = None) -> list[str]:
        """Lines up to the end of output, or to one with `until`. CommandError: that takes until after the deadline."""
        lines: list[str] = []
        while (line := program.line(deadline, self._check)) is not None:
            lines.append(line)
            if show:
                self._emit("output", text=line)
            if until is not None and until in line:
                break
        return lines


class Program:
    """A program at work, as a context at whose end it has ended."""

    def __init__(self, words: Sequence[str]) -> None:
        """OSError: there is none."""
        self._name = words[0]
        self._began = monotonic()
        self._rest = b""
        self._process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, "LC_ALL": "C"}, bufsize=0
        )

    def line(self, deadline: float, check: Callable[[], None]) -> str | None:
        """Its next line, however that ends; None: it prints no more. CommandError: none comes before the deadline."""
        assert self._process.stdout is not None
        watch = select.poll()
        watch.register(self._process.stdout, select.POLLIN)
        while b"\n" not in self._rest and len(self._rest) < LONGEST_LINE:
            check()
            self._look_at(deadline)
            if not watch.poll(LOOK * 1000):
                continue
            data = os.read(self._process.stdout.fileno(), 1 << 16)
            if not data:
                break
            self._rest += data
        else:
            end = self._rest.find(b"\n", 0, LONGEST_LINE) + 1 or LONGEST_LINE
            line, self._rest = self._rest[:end], self._rest[end:]
            return line.decode(errors="replace").rstrip()
        line, self._rest = self._rest, b""
        return line.decode(errors="replace").rstrip() if line else None

    def status(self, deadline: float) -> int:
        """How it ended. CommandError: it did not before the deadline."""
        while (status := self._process.poll()) is None:
            self._look_at(deadline)
            sleep(LOOK / 10)
        return status

    def _look_at(self, deadline: float) -> None:
        if (now := monotonic()) >= deadline:
            raise CommandError(f"no end of {self._name} after {now - self._began:.0f} s")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
