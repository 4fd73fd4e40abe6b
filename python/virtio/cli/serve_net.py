"""The network devices of `virtio serve net`, by what is at their far ends."""

from functools import partial
from typing import NamedTuple

import click

from virtio.cli.capture import Capture
from virtio.cli.counters import Interfaces, Ports, Several
from virtio.cli.served import Place, Served
from virtio.cli.switch import Patch, Sink
from virtio.devices.net import CHECKSUMS, GUEST_OFFLOADS, HOST_OFFLOADS, NetDevice
from virtio.features import Features
from virtio.netdev import Netdev
from virtio.netdev.tap import check_name


class Wishes(NamedTuple):
    """What the command line asked for."""

    tap: str | None
    peer: str | None
    pcap: str | None
    no_offloads: bool
    mac: bytes | None
    mtu: int | None
    queue_pairs: int


def serve_net(served: Served, where: Place, wishes: Wishes) -> None:
    """Adds the sockets, with their devices. UsageError: a name that no interface has. VirtioError, OSError, CommandError: it cannot be."""
    withheld = CHECKSUMS | GUEST_OFFLOADS | HOST_OFFLOADS if wishes.no_offloads or wishes.pcap is not None else Features()
    if wishes.tap is not None:
        _serve_tap(served, where, wishes, withheld)
        return
    capture = None
    if wishes.pcap is not None:
        capture = served.stack.enter_context(Capture(wishes.pcap))
        served.ends.append(capture)
        served.begin = capture.begin
    if wishes.peer is not None:
        _serve_peer(served, where, wishes, withheld, capture)
        return
    told = "counted and dropped" if capture is None else f"written to {wishes.pcap} and dropped"
    counted = Several(Ports, Ports.NAMES)

    def made() -> NetDevice:
        device = Sink(capture, mac=wishes.mac, mtu=wishes.mtu, queue_pairs=wishes.queue_pairs)
        counted.add(device)
        return device

    served.add(where, made, counted, f"a network device without a far end: frames are {told}", withheld)


def _serve_tap(served: Served, where: Place, wishes: Wishes, withheld: Features) -> None:
    assert wishes.tap is not None
    try:
        check_name(wishes.tap)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="'--tap'") from None
    device = NetDevice(mac=wishes.mac, mtu=wishes.mtu, queue_pairs=wishes.queue_pairs)
    interface = served.stack.enter_context(Netdev(device, wishes.tap, existing=True))
    interface.follow(partial(served.report, where.name))  # first: a connection that was passed begins at once, and is to be offered RARP
    served.add(where, device, Interfaces(device, interface), f"a network device with the interface {wishes.tap} as its far end", withheld)
    served.ends.append(interface)


def _serve_peer(served: Served, where: Place, wishes: Wishes, withheld: Features, capture: Capture | None) -> None:
    assert wishes.peer is not None
    places = (where, where._replace(socket_path=wishes.peer, fd=None))
    reports = [partial(served.report, each.name) for each in places]
    one, other = Patch.pair_of(capture, reports, macs=(wishes.mac, None), mtu=wishes.mtu, queue_pairs=wishes.queue_pairs)
    served.patches += [one, other]
    for device, each, far in zip((one, other), places, reversed(places), strict=True):
        served.add(each, device, Ports(device), f"a network device whose far end is the machine at {far.name}", withheld)
