"""`virtio demo`: the session of 2010, when a FreeBSD driver found its device, came up as `vn0`, answered ping and carried iperf."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import click
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from virtio.cli.guest import QEMU, require, uml_programs
from virtio.cli.initrd import find_kernel
from virtio.cli.output import console, show_json
from virtio.cli.parameters import Number
from virtio.cli.probe import interrupts, size
from virtio.cli.worker import Emit, Worker
from virtio.netdev.namespace import CLONE_NEWNET, CLONE_NEWNS

MOST_SECONDS: Final = 3600


@click.command()
@click.option("--qemu", is_flag=True, help="Drive QEMU's virtio-net-pci instead of this package's own device.")
@click.option(
    "--guest",
    type=click.Choice(["uml", "qemu"]),
    is_flag=False,
    flag_value="uml",
    help="Let Linux's own driver use this package's device, over vhost-user: in User-Mode Linux, or in a guest of QEMU's.",
)
@click.option(
    "--kernel",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    metavar="FOLDER",
    help="Where the kernel for --guest=qemu is: with boot/ and lib/modules/, as in an unpacked package.",
)
@click.option("--packed", is_flag=True, help="Use packed rings; without it, split ones.")
@click.option("--no-offloads", is_flag=True, help="Accept neither checksum nor segmentation offloads.")
@click.option("--seconds", type=Number(1, MOST_SECONDS), default=5, show_default=True, metavar="N", help="How long iperf3 sends, each way.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document at the end instead (its fields: docs/command.md).")
def demo(qemu: bool, guest: str | None, kernel: Path | None, packed: bool, no_offloads: bool, seconds: int, as_json: bool) -> None:
    """Bring a virtio network interface up, ping through it, and measure it.

    The driver's interface vn0 (192.168.90.1) and the device's far end peer0 (192.168.90.2) are in two network namespaces of their own, or
    vn0 in a guest. Needs ping, iperf3 and /dev/net/tun; runs as root, or unprivileged in a user namespace. Nothing is left behind.
    """
    if qemu and guest:
        raise click.UsageError("--qemu is without a guest: use it or --guest")
    if kernel and guest != "qemu":
        raise click.UsageError("--kernel is for --guest=qemu")
    require(["ping", "iperf3", *([QEMU] if qemu or guest == "qemu" else [])])
    if guest == "uml":
        uml_programs()
    elif guest == "qemu":
        require(["busybox"])
        find_kernel(kernel)

    def work(emit: Emit) -> None:
        if guest is not None:
            from virtio.cli.guest_session import GuestWishes, guest_session

            guest_session(GuestWishes(guest, kernel, packed, not no_offloads, seconds), emit)
        else:
            from virtio.cli.session import Wishes, session

            session(Wishes(qemu, packed, not no_offloads, seconds), emit)

    view: Json | Text = Json("guest" if guest else "qemu" if qemu else "emulated") if as_json else Text(console())
    with Worker(work, needs=CLONE_NEWNET | (CLONE_NEWNS if guest else 0)) as events, view.showing():
        for event in events:
            view.take(event)
    view.finish()


class Json:
    """Collects what was told, and shows it at the end."""

    def __init__(self, device: str) -> None:
        self._document: dict[str, Any] = {"device": device}

    @contextmanager
    def showing(self) -> Iterator[None]:
        """Nothing moves."""
        yield

    def take(self, event: dict[str, Any]) -> None:
        """Keeps what belongs into the document."""
        values = {key: value for key, value in event.items() if key != "kind"}
        match event["kind"]:
            case "device":
                self._document["probe"] = values["report"]
            case "guest" | "driver" as kind:
                self._document[kind] = values
            case "result":
                self._document |= values

    def finish(self) -> None:
        """Shows the document."""
        show_json(self._document)


class Text:
    """Shows it as it comes; on a terminal with a line that moves while a program runs."""

    def __init__(self, out: Console) -> None:
        self._out = out
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=out,
            transient=True,
            disable=not out.is_terminal,
        )
        self._result: dict[str, Any] = {}
        self._device = ""

    @contextmanager
    def showing(self) -> Iterator[None]:
        """The moving line is there while the context lasts."""
        with self._progress:
            self._progress.add_task("the device", total=None)
            yield

    def take(self, event: dict[str, Any]) -> None:
        """Shows an event."""
        match event["kind"]:
            case "device":
                self._show_device(event["report"])
            case "guest":
                self._say(f"Linux {event['release']} is up")
                for line in event["lines"]:
                    self._say(line)
                self._say("")
            case "driver":
                self._show_driver(event)
            case "up":
                self._say(f"{event['name']}: {event['address']}/24, up")
                self._say(f"{event['peer']}: {event['peer_address']}/24, up, in a namespace of its own")
            case "step":
                self._begin(f"{event['title']}, about {event['seconds']:g} s")
                self._say("")
                self._say(f"$ {event['command']}", style="bold")
            case "output":
                self._say(event["text"])
            case "result":
                self._result = event

    def finish(self) -> None:
        """The closing table."""
        result = self._result
        self._say("")
        rates = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
        for name in ("", "Mbit/s"):
            rates.add_column(name, justify="right" if name else "left")
        for each in result["iperf3"]:
            rates.add_row(each["direction"], f"{each['bits_per_second'] / 1e6:,.0f}")
        self._out.print(rates)
        self._say("")
        table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
        for name in ("", "vn0 (driver)", "peer0 (device)"):
            table.add_column(name, justify="right" if name else "left")
        for title, key in _ROWS:
            table.add_row(title, *(_count(result[side].get(key)) for side in ("vn0", "peer0")))
        self._out.print(table)
        ping = result["ping"]
        self._say("")
        self._say(f"{ping['received']} of {ping['sent']} pings answered" + (f", {ping['avg_ms']} ms on average" if ping["avg_ms"] else ""))

    def _say(self, text: str, style: str | None = None) -> None:
        self._out.print(one_line_kept(text), style=style, soft_wrap=True)

    def _begin(self, title: str) -> None:
        for task in self._progress.task_ids:
            self._progress.remove_task(task)
        self._progress.add_task(title, total=None)

    def _show_device(self, report: dict[str, Any]) -> None:
        pci = report["pci"]
        self._device = "virtio0" if pci is None else "virtio_pci0"
        if pci is None:
            self._say(f"{self._device}: <{report['device']['name']}> over vhost-user", style="bold")
        else:
            ids = f"{pci['vendor']:04x}:{pci['device']:04x} revision {pci['revision']}"
            self._say(f"{self._device}: <{report['device']['name']} {ids}> at {pci['address']}", style="bold")
            for bar in pci["bars"]:
                self._say(f"{self._device}: BAR {bar['index']}: {size(bar['size'])} of {bar['kind']} at {bar['address']:#x}")
            self._say(f"{self._device}: interrupts: {', '.join(interrupts(pci['interrupts']))}")
        self._say(f"{self._device}: features offered: {_names(report['features']['offered'])}")

    def _show_driver(self, event: dict[str, Any]) -> None:
        self._say(f"{self._device}: features accepted: {_names(event['accepted'])}")
        receive, transmit = event["queues"]
        self._say(f"{self._device}: receiveq1 {receive} entries, transmitq1 {transmit} entries, {event['format']} rings")
        self._say(f"vn0: Ethernet address: {event['mac']}", style="bold")
        self._say(f"vn0: MTU {event['mtu']}, link {'up' if event['link'] else 'down'}")


_ROWS: Final = (
    ("frames sent", "sent_frames"),
    ("frames received", "received_frames"),
    ("bytes sent", "sent_bytes"),
    ("bytes received", "received_bytes"),
    ("sent frames dropped", "sent_drops"),
    ("received frames dropped", "received_drops"),
    ("notifications sent", "notified"),
    ("notifications spared", "suppressed"),
)


def _count(value: Any) -> str:
    if value is None:
        return "-"
    return f"{sum(value.values()) if isinstance(value, dict) else value:,}"


def _names(bits: list[dict[str, Any]]) -> str:
    return ", ".join(each["name"] or f"bit {each['bit']}" for each in bits)


def one_line_kept(text: str) -> str:
    """`text` with its spacing, less what a terminal would obey."""
    return "".join(each if each.isprintable() else " " for each in text) if not text.isprintable() else text
