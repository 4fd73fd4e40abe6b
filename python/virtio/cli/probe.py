"""`virtio probe`: what a device says of itself."""

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import click
from rich.console import Console

from virtio.cli.output import console, show_json
from virtio.cli.targets import OPENERS, Target, TargetType
from virtio.cli.worker import Emit, Worker

_HELP = """Show what a device is and has: its place on the bus, resources, capabilities, features, configuration, queues.

Nothing is negotiated; the device is reset before and after.

\b
TARGET is one of
""" + "\n".join(f"  {opener.form}\n      {opener.help}" for opener in OPENERS.values())


@click.command(help=_HELP)
@click.argument("target", type=TargetType())
@click.option("--json", "as_json", is_flag=True, help="One JSON document instead (its fields: docs/command.md).")
def probe(target: Target, as_json: bool) -> None:
    """Looks at the target in a worker, and shows what that found."""

    def look(emit: Emit) -> None:
        from virtio.cli.inspect import inspect

        with target.open() as transport:
            emit("report", report=inspect(transport, str(target)))

    report: dict[str, Any] = {}
    with Worker(look) as events:
        for event in events:
            report = event["report"]
    if as_json:
        show_json(report)
    else:
        show(console(), report)


def show(out: Console, report: dict[str, Any]) -> None:
    """The report as people read it."""
    device, pci = report["device"], report["pci"]
    known_as = f" ({device['id']})" if device["id"] else ""
    place = f" at {pci['address']}" if pci else ""
    out.print(f"<{device['name']}>{place}, device type {device['type'] or 'not told'}{known_as}", style="bold", soft_wrap=True)
    if pci:
        _show_pci(out, pci)
    if (user := report["vhost_user"]) is not None:
        offered = user["protocol_features"]["offered"]
        _section(out, f"protocol features ({len(offered)})", [(str(each["bit"]), each["name"] or "") for each in offered])
        told = "not told" if user["queues"] is None else str(user["queues"])
        _section(out, "back-end", [("queues, or pairs of them", told), ("memory slots", str(user["memory_slots"]))])
    features = report["features"]["offered"]
    _section(out, f"features offered ({len(features)})", [(str(each["bit"]), each["name"] or f"bit {each['bit']}") for each in features])
    _section(out, "configuration", [(name, str(value)) for name, value in report["config"].items()])
    _section(out, "queues", [(str(each["index"]), each["name"] or "unnamed", _entries(each["size"])) for each in report["queues"]])


def _entries(size: int | None) -> str:
    return f"{size} entries" if size else "none" if size is not None else "size not told"


def _show_pci(out: Console, pci: dict[str, Any]) -> None:
    ids = f"{pci['vendor']:04x}:{pci['device']:04x}"
    subsystem = f"{pci['subsystem_vendor']:04x}:{pci['subsystem']:04x}"
    _section(out, "ids", [("function", f"{ids} revision {pci['revision']}"), ("subsystem", subsystem), ("class", f"{pci['class']:06x}")])
    resources: list[tuple[str, ...]] = [
        (f"BAR {bar['index']}", f"{bar['kind']}{' prefetchable' if bar['prefetchable'] else ''}", f"{bar['address']:#x}", size(bar["size"]))
        for bar in pci["bars"]
    ]
    _section(out, "resources", [*resources, ("interrupts", *interrupts(pci["interrupts"]))])
    _section(out, "capabilities", [_capability(each) for each in pci["capabilities"]])
    _section(out, "not usable", [(each,) for each in pci["unusable"]])


def interrupts(found: dict[str, Any]) -> tuple[str, ...]:
    """How interrupts come, and how they could."""
    pin = f"INT{' ABCD'[found['pin']]}" if 1 <= found["pin"] <= 4 else "none"
    return ("MSI-X" if found["used"] == "msix" else "INTx", f"{found['msix_vectors']} vectors", f"pin {pin}")


def size(count: int) -> str:
    """Bytes as people count them."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if count >= unit and not count % unit:
            return f"{count // unit} {name}"
    return f"{count} bytes"


def _capability(found: dict[str, Any]) -> tuple[str, ...]:
    name = found["name"] or f"{found['id']:#04x}"
    if "virtio" in found:
        virtio = found["virtio"]
        name = f"virtio {virtio['type']}"
        where = f"BAR {virtio['bar']}" if virtio["type"] != "PCI" else "window"
        more = f", {virtio['notify_off_multiplier']} bytes apart" if "notify_off_multiplier" in virtio else ""
        return (f"{found['place']:#04x}", name, where, f"{virtio['offset']:#x}", f"{virtio['length']} bytes{more}")
    if "msix" in found:
        msix = found["msix"]
        table = msix["table"]
        return (f"{found['place']:#04x}", name, f"BAR {table['bar']}", f"{table['offset']:#x}", f"{msix['vectors']} vectors")
    return (f"{found['place']:#04x}", name, found.get("broken", ""))


def _section(out: Console, title: str, rows: Sequence[tuple[str, ...]]) -> None:
    """A title, and rows below it in columns; nothing if there are no rows."""
    if not rows:
        return
    out.print(title, style="cyan")
    widths = [max(map(len, column)) for column in zip_longest(*rows, fillvalue="")]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=False))
        out.print(f"  {'  '.join(cells)}".rstrip(), soft_wrap=True)
