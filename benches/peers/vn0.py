"""iperf3 over `vn0`, one TCP stream, beside plain Python pumps between two TAPs: `python benches/peers/vn0.py [--pairs 15] [--seconds 3]`.

Alternating runs of ours and of `tap_pump.py --pump threads` and `--pump procs` of the folder that VIRTIO_REFERENCE names, each in a process
and namespaces of its own, with offloads and without. Ratios are ours through theirs, run by run, told as medians
with the interval that holds them in 19 of 20 cases. Prints every number that was measured, as markdown. Wants root, iperf3, ip and nsenter,
and the package built for speed.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from compare import told

from virtio import Feature, Features, NetDevice, NetDriver
from virtio.devices.net import CHECKSUMS, GUEST_OFFLOADS, HOST_OFFLOADS, WANTED
from virtio.netdev import SLOT_SIZE, Namespace, Netdev
from virtio.transport.loopback import LoopbackTransport

OFFLOADS = {"with offloads": "csum,tso4,tso6,ecn", "without": ""}
PUMPS = ("threads", "procs")
NEAR, FAR = "192.0.2.1", "192.0.2.2"


def once(*, offloads: bool, packed: bool, slots: int, seconds: int, slot_size: int = SLOT_SIZE) -> float:
    """Mbit/s that arrive at the device's far end, from `vn0`."""
    wanted = WANTED if offloads else WANTED - (GUEST_OFFLOADS | HOST_OFFLOADS | CHECKSUMS)
    if not packed:
        wanted = wanted - Features({Feature.RING_PACKED})
    device = NetDevice()
    with (
        Namespace() as near,
        Namespace() as far,
        LoopbackTransport(device) as transport,
        NetDriver(transport, wanted=wanted, slots=slots, slot_size=slot_size) as driver,
        Netdev(driver, "vn0", namespace=near, address=f"{NEAR}/24") as vn0,
        Netdev(device, "peer0", namespace=far, address=f"{FAR}/24") as peer0,
        Netdev.pair(vn0, peer0) as pair,
    ):
        pair.start()
        with far.entered():
            server = subprocess.Popen(["iperf3", "-s", "-1", "-J"], stdout=subprocess.DEVNULL)
        time.sleep(0.4)
        with near.entered():
            client = subprocess.run(["iperf3", "-J", "-c", FAR, "-t", str(seconds)], stdout=subprocess.PIPE, check=True)
        server.wait(5)
        pair.check()
        if os.environ.get("VN0_STATISTICS"):
            print(json.dumps(pair.statistics), file=sys.stderr)
        return float(json.loads(client.stdout)["end"]["sum_received"]["bits_per_second"]) / 1e6


def ours(offload: str, options: Iterable[str]) -> float:
    command = [sys.executable, __file__, "--once", "--offload", offload, *options]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def theirs(folder: str, pump: str, offload: str, seconds: int) -> float:
    command = ["unshare", "--net", sys.executable, str(Path(folder) / "tap_pump.py"), "--pump", pump, "--offload", offload]
    done = subprocess.run([*command, "--seconds", str(seconds)], check=True, stdout=subprocess.PIPE, text=True).stdout
    if (found := re.search(r"(\d+) Mbit/s received", done)) is None:
        raise SystemExit(f"tap_pump.py says no rate: {done}")
    return float(found[1])


def main() -> None:
    parser = argparse.ArgumentParser(description="iperf3 over vn0, beside plain pumps between two TAPs.")
    parser.add_argument("--pairs", type=int, default=15, help="runs of each (default 15)")
    parser.add_argument("--seconds", type=int, default=3, help="seconds of a run (default 3)")
    parser.add_argument("--packed", action="store_true", help="a packed ring, instead of a split one")
    parser.add_argument("--slots", type=int, default=128, help="slots of the driver's pool (default 128)")
    parser.add_argument("--once", action="store_true", help="one run of ours, and only its number")
    parser.add_argument("--offload", help="for --once: anything for offloads, nothing for none")
    options = parser.parse_args()
    if options.pairs < 1 or options.seconds < 1:
        parser.error("--pairs and --seconds have to be 1 or more")
    if options.once:
        print(once(offloads=bool(options.offload), packed=options.packed, slots=options.slots, seconds=options.seconds))
        return
    own = ["--seconds", str(options.seconds), "--slots", str(options.slots), *(["--packed"] if options.packed else [])]
    folder = os.environ.get("VIRTIO_REFERENCE")
    pumps = PUMPS if folder else ()
    if not folder:
        print("VIRTIO_REFERENCE is not set: the fixed pumps do not run.\n")
    for name, offload in OFFLOADS.items():
        rates: dict[str, list[float]] = {who: [] for who in ("ours", *pumps)}
        for turn in range(options.pairs):
            order = [*rates]
            for who in order[turn % len(order) :] + order[: turn % len(order)]:
                rates[who].append(ours(offload, own) if who == "ours" else theirs(str(folder), who, offload, options.seconds))
        print(f"## One TCP stream, {name} ({'packed' if options.packed else 'split'} ring), Mbit/s\n")
        for who, found in rates.items():
            print(f"- {who}: {told(found, 0)}: {' '.join(f'{rate:.0f}' for rate in found)}")
        for pump in pumps:
            print(f"- ours / {pump}: {told([a / b for a, b in zip(rates['ours'], rates[pump], strict=True)], 2)}")
        if pumps:
            faster = max(pumps, key=lambda pump: statistics.median(rates[pump]))
            print(f"- the faster one is {faster}")
        print(flush=True)


if __name__ == "__main__":
    main()
