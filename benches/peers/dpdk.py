"""60-byte frames between DPDK and ours, beside DPDK at both ends: `python benches/peers/dpdk.py [--pairs 15] [--seconds 1]`.

Over vhost-user, one queue pair, one pinned core an end, polling. Each of four rows is measured by turns with ours in the place of one end
of DPDK's: frames from DPDK's driver (virtio-user) to our back-end and back, from our driver to DPDK's device (vhost) and back. An end of
ours is Python: each frame is copied into a slot and counted, one in a thousand checksummed; what it sends stands in slots. An end of
DPDK's is testpmd, `rxonly` or `txonly`. The rate is the receiver's. Ratios are ours through DPDK's, pair by pair.

Wants root, dpdk-testpmd, and huge pages mounted on /dev/hugepages (`echo 1024 >/proc/sys/vm/nr_hugepages`); the package built for speed.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from compare import told

from virtio import BufferPool, Feature, Features, Memory, NetDevice, NetDriver
from virtio.bench.setup import pin
from virtio.devices.net import DEVICE_ID, WANTED
from virtio.port import Port

FRAME: Final = 60
SAMPLE: Final = 1000
BURST: Final = 64
SLOTS: Final = 1024
LIMIT: Final = 60.0
"""Seconds that a peer may take to come up."""
RINGS: Final = {
    "split": (",in_order=0", Features()),
    "packed": (",packed_vq=1,in_order=0", Features({Feature.RING_PACKED})),
    "packed in order": (",packed_vq=1,in_order=1", Features({Feature.RING_PACKED, Feature.IN_ORDER})),
}
DEVICE_CORE, DRIVER_CORE = 0, 1


class Testpmd:
    """An end of DPDK's, on `core`: `device` says which; it sends, or receives, until closed."""

    def __init__(self, path: str, *, device: bool, sends: bool, ring: str, core: int) -> None:
        name = "vhost" if device else "user"
        port = f"net_vhost0,iface={path},queues=1" if device else f"net_virtio_user0,path={path},queues=1,queue_size=256{RINGS[ring][0]}"
        command = [
            "stdbuf",
            "-oL",
            "dpdk-testpmd",
            "--lcores",
            f"0@{core},1@{core}",
            f"--file-prefix=bench-{name}-{os.getpid()}",
            "--no-pci",
            "-m",
            "256",
        ]
        command += ["--no-telemetry", "--single-file-segments", "--vdev", port, "--", "-i", "--nb-cores=1", "--total-num-mbufs=4096"]
        command += [f"--forward-mode={'txonly' if sends else 'rxonly'}", f"--txpkts={FRAME}"]
        self._output = tempfile.TemporaryFile("w+b")  # noqa: SIM115
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=self._output, stderr=subprocess.STDOUT)
        self._seen = 0
        self._wait("testpmd> ")
        self.say("start")

    def say(self, command: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{command}\n".encode())
        self._process.stdin.flush()

    def frames(self) -> int:
        """Frames received so far."""
        self.say("show port stats 0")
        return int(self._wait(r"RX-packets: (\d+)[^#]*#+\n")[1])

    def _wait(self, pattern: str) -> re.Match[str]:
        limit = time.monotonic() + LIMIT
        while time.monotonic() < limit and self._process.poll() is None:
            text = self._text()
            if found := re.compile(pattern).search(text, self._seen):
                self._seen = found.end()
                return found
            time.sleep(0.002)
        raise SystemExit(f"testpmd said no {pattern!r}:\n{self._text()[-2000:]}")

    def _text(self) -> str:
        """All that it printed; where it writes next stays as it is."""
        descriptor = self._output.fileno()
        return os.pread(descriptor, os.fstat(descriptor).st_size, 0).decode(errors="replace")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._process.kill()
        self._process.wait()
        self._output.close()


def receive(port: Port, idle: Callable[[], object], seconds: float) -> float:
    """Frames a second that come in, once the first has."""
    burst = port.pool.burst(BURST)
    limit = time.monotonic() + LIMIT
    while not port.receive(burst):
        idle()
        if time.monotonic() > limit:
            raise SystemExit("no frame came")
    warm = time.perf_counter() + 0.3
    count = sampled = different = 0
    first: int | None = None
    start = end = time.perf_counter()
    while end < start + seconds:
        for _ in range(500):
            got = port.receive(burst)
            if got and count // SAMPLE != (count + got) // SAMPLE:
                sampled += 1
                if int(burst.lengths[0]) != FRAME:
                    raise SystemExit(f"a frame of {burst.lengths[0]} bytes came")
                checksum = zlib.crc32(burst.tobytes(0))
                first = checksum if first is None else first
                different += checksum != first
            count += got
        idle()
        end = time.perf_counter()
        if first is not None and end < warm:
            start, count = end, 0
    if not sampled or different:
        raise SystemExit(f"{different} of {sampled} samples differ from the first one")
    return count / (end - start)


def send(port: Port, idle: Callable[[], object], until: Callable[[], bool]) -> None:
    burst = port.pool.burst(BURST)
    template = bytes(12) + b"\x08\x00" + bytes(FRAME - 14)
    while not until():
        for _ in range(500):
            if not len(burst):  # else what did not fit is sent first
                port.take(burst)
                burst.write(template)
            port.send(burst)
        idle()


def back_end(path: str, ring: str, *, sends: bool, seconds: float) -> None:
    """Our device, Python, until standard input ends or `seconds` were measured."""
    from virtio.vhost_user.backend import Backend

    pin(DEVICE_CORE)
    pool = BufferPool(Memory(SLOTS * 2048 + 4096), SLOTS)
    device = NetDevice(
        pool=pool, offered=NetDevice.features | {Feature.EVENT_IDX, Feature.INDIRECT_DESC, Feature.IN_ORDER, *RINGS[ring][1]}
    )
    with Backend(path, device, poll=True) as backend:
        print("listening", flush=True)

        def idle() -> None:
            backend.process(0.0)
            for index in (0, 1):
                if (queue := device.queue(index)) is not None:
                    queue.disarm()

        if sends:
            send(device, idle, ended)
        else:
            print(receive(device, idle, seconds), flush=True)


def driver(path: str, ring: str, *, sends: bool, seconds: float) -> None:
    """Our driver, Python, until standard input ends or `seconds` were measured."""
    from virtio.transport.vhost_user import VhostUserTransport

    pin(DRIVER_CORE)
    wanted = (WANTED - {Feature.RING_PACKED}) | RINGS[ring][1]
    with VhostUserTransport(path, device_id=DEVICE_ID) as transport, NetDriver(transport, slots=SLOTS, wanted=wanted) as net:
        if sends:
            send(net, lambda: None, ended)
        else:
            print(receive(net, lambda: None, seconds), flush=True)


def ended() -> bool:
    """Whether standard input has ended."""
    os.set_blocking(0, False)
    try:
        return os.read(0, 1) == b""
    except BlockingIOError:
        return False


class Ours:
    """An end of ours in a process of its own."""

    def __init__(self, path: str, *, device: bool, sends: bool, ring: str, seconds: float) -> None:
        options = ["--end", "device" if device else "driver", "--path", path, "--ring", ring, "--seconds", str(seconds)]
        command = [sys.executable, __file__, *options, *(["--send"] if sends else [])]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if device:
            self._line()

    def _line(self) -> str:
        assert self._process.stdout is not None
        if not (line := self._process.stdout.readline()):
            raise SystemExit("our end has ended")
        return line

    def rate(self) -> float:
        """Frames a second, which it measures itself."""
        return float(self._line())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(LIMIT)


def measure(*, ours: str | None, to_device: bool, ring: str, seconds: float) -> float:
    """Million frames a second, with `ours` ("device", "driver" or none) in the place of one end of DPDK's."""
    with ExitStack() as stack:
        path = str(Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-"))) / "s")

        def end(device: bool) -> Testpmd | Ours:
            sends = device is not to_device
            if ours == ("device" if device else "driver"):
                return stack.enter_context(Ours(path, device=device, sends=sends, ring=ring, seconds=seconds))
            core = DEVICE_CORE if device else DRIVER_CORE
            return stack.enter_context(Testpmd(path, device=device, sends=sends, ring=ring, core=core))

        device = end(True)  # it listens
        ends = device, end(False)
        receiver = ends[0] if to_device else ends[1]
        if isinstance(receiver, Ours):
            return receiver.rate() / 1e6
        limit = time.monotonic() + LIMIT
        while not receiver.frames():
            if time.monotonic() > limit:
                raise SystemExit("no frame came")
        time.sleep(0.3)
        before, start = receiver.frames(), time.perf_counter()
        time.sleep(seconds)
        after, stop = receiver.frames(), time.perf_counter()
        return (after - before) / (stop - start) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description="60-byte frames between DPDK and ours, beside DPDK at both ends.")
    parser.add_argument("--pairs", type=int, default=15, help="runs of each (default 15)")
    parser.add_argument("--seconds", type=float, default=1.0, help="seconds of a run (default 1)")
    parser.add_argument("--ring", choices=RINGS, action="append", help="only these rings")
    parser.add_argument("--end", choices=("device", "driver"), help="one end of ours, by itself")
    parser.add_argument("--path", help="with --end: the socket")
    parser.add_argument("--send", action="store_true", help="with --end: sends until standard input ends")
    options = parser.parse_args()
    if options.end:
        run = back_end if options.end == "device" else driver
        run(options.path, options.ring[0], sends=options.send, seconds=options.seconds)
        return
    for ring in options.ring or RINGS:
        print(f"## {ring} ring, million frames of {FRAME} bytes a second\n")
        for ours in ("device", "driver"):
            for to_device in (True, False):
                rates: dict[str | None, list[float]] = {ours: [], None: []}
                for turn in range(options.pairs):
                    for who in (ours, None) if turn % 2 else (None, ours):
                        rates[who].append(measure(ours=who, to_device=to_device, ring=ring, seconds=options.seconds))
                print(f"- our {ours}, frames {'to' if to_device else 'from'} the device:")
                for who, found in rates.items():
                    print(f"  - {'ours' if who else 'DPDK'}: {told(found, 2)}: {' '.join(f'{rate:.2f}' for rate in found)}")
                print(f"  - ratio: {told([a / b for a, b in zip(rates[ours], rates[None], strict=True)], 2)}", flush=True)
        print()


if __name__ == "__main__":
    main()
