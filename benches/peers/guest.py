"""iperf3 between a Linux guest and a TAP, one TCP stream each way: `python benches/peers/guest.py [uml] [qemu] [--pairs 15] [--seconds 4]`.

`uml`: User-Mode Linux on our vhost-user back-end (`virtio demo --guest --json`), and on the plain Python back-end `uml_tap.py` of the
folder that VIRTIO_REFERENCE names, in turn, each in a process and namespace of its own. `qemu`: a guest of QEMU's with two cards, of our
back-end and of QEMU's own virtio-net with `-netdev tap,vhost=off`, in turn. Both with offloads and without. Ratios are ours through theirs,
run by run, told as medians with the interval that holds them in 19 of 20 cases. Prints every number that was measured, as markdown. Wants
root, and the package built for speed.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from threading import Thread

from compare import told

from virtio import Feature, Features, NetDevice, NetFeature
from virtio.cli.guest import Guest, qemu_guest
from virtio.cli.initrd import find_kernel
from virtio.devices.net import CHECKSUMS, GUEST_OFFLOADS, HOST_OFFLOADS
from virtio.netdev import Namespace, Netdev, open_tap
from virtio.netdev.tap import Interface
from virtio.vhost_user.backend import Backend

WAYS = ("from the guest", "to the guest")
FIXED_SECONDS = 4
"""How long uml_tap.py measures."""
OURS, THEIRS = ("192.0.2.1", "192.0.2.2"), ("198.51.100.1", "198.51.100.2")
"""Addresses of the guest and of this side, for each card."""
OFF = ("csum", "guest_csum", "gso", *(f"{side}_{kind}" for side in ("guest", "host") for kind in ("tso4", "tso6", "ecn", "ufo")))
"""What QEMU's card has to be told to do without."""
Rates = tuple[float, float]
"""Mbit/s that arrived, in the order of `WAYS`."""


def uml_ours(offloads: bool, seconds: int, packed: bool) -> Rates:
    words = [
        "demo",
        "--guest",
        "--json",
        "--seconds",
        str(seconds),
        *([] if offloads else ["--no-offloads"]),
        *(["--packed"] if packed else []),
    ]
    document = json.loads(subprocess.run([sys.executable, "-m", "virtio", *words], check=True, stdout=subprocess.PIPE, text=True).stdout)
    out, back = (each["bits_per_second"] / 1e6 for each in document["iperf3"])
    return out, back


def uml_theirs(folder: str, offloads: bool) -> Rates:
    words = ["unshare", "--net", sys.executable, str(Path(folder) / "uml_tap.py"), *(["--offloads"] if offloads else [])]
    said = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout
    found = [float(rate) * (1000 if unit == "G" else 1) for rate, unit in re.findall(r"([\d.]+) ([GM])bits/sec.*receiver", said)]
    if len(found) != 2:
        raise SystemExit(f"uml_tap.py says no rates: {said}")
    return found[0], found[1]


@contextmanager
def two_cards(offloads: bool, packed: bool) -> Iterator[Guest]:
    """A guest whose eth0 is our back-end's and whose eth1 is QEMU's, both up; an iperf3 server is at the other end of both."""
    unsaid = Features({NetFeature.MTU, NetFeature.SPEED_DUPLEX}) | (() if offloads else GUEST_OFFLOADS | HOST_OFFLOADS | CHECKSUMS)
    rings = {Feature.EVENT_IDX, Feature.INDIRECT_DESC, *({Feature.RING_PACKED} if packed else ())}
    device = NetDevice(offered=(Features(NetDevice.features) | rings) - unsaid)
    card = ",packed=on" if packed else ""
    with ExitStack() as stack:
        path = f"{stack.enter_context(tempfile.TemporaryDirectory())}/net"
        far = stack.enter_context(Namespace())
        stack.enter_context(Netdev(device, "ours", namespace=far, address=f"{OURS[1]}/24")).follow()
        tap = open_tap("theirs", namespace=far.fileno())
        stack.callback(os.close, tap)
        interface = Interface("theirs", far.fileno())
        interface.add_addresses([f"{THEIRS[1]}/24"])
        interface.up()
        backend = stack.enter_context(Backend(path, device))
        thread = Thread(target=backend.serve)
        stack.callback(thread.join)
        stack.callback(backend.stop)
        thread.start()
        with far.entered():
            server = subprocess.Popen(["iperf3", "-s"], stdout=subprocess.DEVNULL)
        stack.callback(server.wait)
        stack.callback(server.kill)
        words = ["-chardev", f"socket,id=back,path={path}", "-netdev", "vhost-user,id=ours,chardev=back"]
        words += ["-device", f"virtio-net-pci,netdev=ours,addr=2,romfile={card}", "-netdev", f"tap,id=theirs,fd={tap},vhost=off"]
        without = "" if offloads else "".join(f",{name}=off" for name in OFF)
        words += ["-device", f"virtio-net-pci,netdev=theirs,addr=3,romfile={card}{without}"]
        guest = stack.enter_context(qemu_guest(find_kernel(), words, pass_fds=[tap]))
        guest.wait_ready()
        for name, (address, _) in (("eth0", OURS), ("eth1", THEIRS)):
            guest.read(f"ip link set {name} up && ip addr add {address}/24 dev {name}")
        yield guest


def in_guest(guest: Guest, address: str, seconds: int) -> Rates:
    rates = []
    for way in ("", "-R"):
        said = guest.read(f"iperf3 -c {address} -f m -t {seconds} {way}")
        if (found := re.search(r"([\d.]+) Mbits/sec.*receiver", said)) is None:
            raise SystemExit(f"iperf3 says no rate: {said}")
        rates.append(float(found[1]))
    return rates[0], rates[1]


def compared(name: str, theirs_name: str, ours: Callable[[], Rates], theirs: Callable[[], Rates] | None, pairs: int) -> None:
    """Runs both in turn, and tells."""
    rates: dict[str, list[Rates]] = {"ours": [], **({theirs_name: []} if theirs else {})}
    for turn in range(pairs):
        for who in [*rates] if turn % 2 == 0 else [*rates][::-1]:
            rates[who].append(ours() if who == "ours" or theirs is None else theirs())
    for number, way in enumerate(WAYS):
        print(f"## {name}, {way}, Mbit/s\n")
        one = {who: [rate[number] for rate in found] for who, found in rates.items()}
        for who, found in one.items():
            print(f"- {who}: {told(found, 0)}: {' '.join(f'{rate:.0f}' for rate in found)}")
        if theirs is not None:
            print(f"- ours / {theirs_name}: {told([a / b for a, b in zip(one['ours'], one[theirs_name], strict=True)], 2)}")
        print(flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="iperf3 between a Linux guest and a TAP, through our back-end and through others.")
    parser.add_argument("guests", nargs="*", choices=["uml", "qemu", []], help="which guests (default: both)")
    parser.add_argument("--pairs", type=int, default=15, help="runs of each (default 15)")
    parser.add_argument("--seconds", type=int, default=FIXED_SECONDS, help="seconds of a run each way (default 4; uml_tap.py's own are 4)")
    parser.add_argument("--packed", action="store_true", help="packed rings, instead of split ones")
    options = parser.parse_args()
    if options.pairs < 1 or options.seconds < 1:
        parser.error("--pairs and --seconds have to be 1 or more")
    guests, rings = options.guests or ["uml", "qemu"], "packed" if options.packed else "split"
    folder = os.environ.get("VIRTIO_REFERENCE")
    if "uml" in guests and not folder:
        print("VIRTIO_REFERENCE is not set: the fixed back-end does not run.\n")
    for offloads, title in ((False, "without offloads"), (True, "with offloads")):
        if "uml" in guests:
            ours = partial(uml_ours, offloads, options.seconds, options.packed)
            theirs = partial(uml_theirs, folder, offloads) if folder else None
            compared(f"User-Mode Linux, {title} ({rings} rings)", "plain Python", ours, theirs, options.pairs)
        if "qemu" in guests:
            with two_cards(offloads, options.packed) as guest:
                ours, own = (partial(in_guest, guest, address, options.seconds) for _, address in (OURS, THEIRS))
                compared(f"QEMU's guest, {title} ({rings} rings)", "QEMU's own", ours, own, options.pairs)


if __name__ == "__main__":
    main()
