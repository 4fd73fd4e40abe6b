"""What `virtio probe` can look at: a table of kinds, each with a way to open one. A new kind is one more entry."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import click
from click.shell_completion import CompletionItem

from virtio.cli.output import CommandError

if TYPE_CHECKING:
    from virtio.device import Device
    from virtio.transport import Transport

EMULATED: Final = ("net", "rng")
"""Device types of this package that stand on an emulated function."""
EXAMPLES: Final = {"qemu": ("virtio-net-pci",), "vhost-user": ("",)}
"""What completion offers where anything may stand."""


UNKNOWN: Final = 0
"""A device type that nobody told; no device has this one (5)."""
_OPTION: Final = re.compile(r"(?P<path>.*), *(?P<name>[a-z][a-z-]*)=(?P<value>[^,/]*)", re.DOTALL)


class Opener(NamedTuple):
    """A kind of target: how it is written, what it is, the words known behind the colon (if only those are), how one is opened."""

    form: str
    help: str
    words: tuple[str, ...]
    open: Callable[[str], "AbstractContextManager[Transport]"]
    check: Callable[[str], object] = lambda rest: None
    """CommandError: what stands behind the colon is wrong, as the text alone tells."""


class Target(NamedTuple):
    """A target that was written as it should be."""

    kind: str
    rest: str

    def __str__(self) -> str:
        return f"{self.kind}:{self.rest}"

    def open(self) -> "AbstractContextManager[Transport]":
        """The transport to it, for as long as the context lasts. VirtioError, CommandError: it cannot be had."""
        return OPENERS[self.kind].open(self.rest)


def emulated_device(name: str) -> "Device":
    """A device of ours."""
    if name == "rng":
        from virtio.devices.rng import RngDevice

        return RngDevice()
    from virtio.devices.net import NetDevice

    return NetDevice()


@contextmanager
def _open_emulated(name: str) -> "Iterator[Transport]":
    from virtio.pci.emulated import EmulatedFunction
    from virtio.transport.pci import PciTransport

    with PciTransport(EmulatedFunction(emulated_device(name))) as transport:
        yield transport


def _check_qemu(device: str) -> None:
    if {"help", "?"}.intersection(device.split(",")):
        raise CommandError(f"{device} is no device, but asks QEMU for help: qemu-system-x86_64 -device {device} shows it")


@contextmanager
def _open_qemu(device: str) -> "Iterator[Transport]":
    from virtio.pci import config
    from virtio.pci.qtest import QemuMachine
    from virtio.transport.pci import PciTransport

    name = device.split(",")[0]
    with QemuMachine([device]) as machine:
        functions = machine.functions()
        if not functions:
            raise CommandError(f"no function of {name} is found on QEMU's PCI bus")
        virtio = [function for function in functions if function.config_read(config.VENDOR_ID, 2) == config.VENDOR]
        with PciTransport((virtio or functions)[0]) as transport:  # which says what is wrong with it
            yield transport


def device_type(name: str) -> int:
    """A device type's number, from its short name, the specification's, or the number itself. CommandError: there is none."""
    from virtio.cli.kinds import TYPES
    from virtio.spec import DeviceId

    short = {"blk": int(DeviceId.BLOCK)} | {name: number for number, name in reversed(TYPES.items())}
    named = {each.name.lower().replace("_", "-"): int(each) for each in DeviceId} | short
    if name in named:
        return named[name]
    if name.isascii() and name.isdigit() and int(name) < 1 << 16:
        return int(name)
    raise CommandError(f"{name!r} is no device type: {', '.join(sorted(named))}, or a number below 65536")


def _path_and_type(rest: str) -> tuple[str, int]:
    """The socket, and the type if that is told; what is there under the whole name is that."""
    from virtio.vhost_user.socket import check_path

    path, number = rest, UNKNOWN
    while (option := _OPTION.fullmatch(path)) is not None and not os.path.exists(path):
        if option["name"] != "type":
            raise CommandError(f"{option['name']!r} is no option of a vhost-user back-end's: type=TYPE is the only one")
        if path != rest:
            raise CommandError("type= is told twice")
        path, number = option["path"], device_type(option["value"])
    try:
        return check_path(path), number
    except ValueError as error:
        raise CommandError(str(error)) from None


@contextmanager
def _open_vhost_user(rest: str) -> "Iterator[Transport]":
    from virtio.transport.vhost_user import VhostUserTransport

    with VhostUserTransport(*_path_and_type(rest), reconnect=False) as transport:
        yield transport


OPENERS: Final[dict[str, Opener]] = {
    "emulated": Opener(
        "emulated:net, emulated:rng", "a device of this package on its own PCI function, in this process", EMULATED, _open_emulated
    ),
    "qemu": Opener(
        "qemu:DEVICE[,OPTION=VALUE...]",
        "a device of QEMU's, written as behind its -device: qemu:virtio-net-pci,mac=...",
        (),
        _open_qemu,
        _check_qemu,
    ),
    "vhost-user": Opener(
        "vhost-user:SOCKET[,type=TYPE]",
        "a vhost-user back-end that listens there; it does not tell its type: net, rng, blk, ... or a number",
        (),
        _open_vhost_user,
        _path_and_type,
    ),
}


def known() -> str:
    """All kinds, as they are written."""
    return ", ".join(opener.form for opener in OPENERS.values())


class TargetType(click.ParamType[Target]):
    """A target on the command line."""

    name = "target"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Target:
        """Reads `KIND:REST`; a wrong one is told what is known."""
        if isinstance(value, Target):
            return value
        kind, colon, rest = str(value).partition(":")
        opener = OPENERS.get(kind)
        if opener is None or not colon or not rest.strip() or "\0" in rest or (opener.words and rest not in opener.words):
            self.fail(f"{value!r} is no target that is known: {known()}", param, ctx)
        try:
            opener.check(rest)
        except CommandError as error:
            self.fail(str(error), param, ctx)
        return Target(kind, rest)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Kinds, and the words behind their colons; the shell knows files."""
        if incomplete.startswith("vhost-user:") and incomplete != "vhost-user:":
            return [CompletionItem(incomplete, type="file")]
        words = [f"{kind}:{word}" for kind, opener in OPENERS.items() for word in opener.words or EXAMPLES.get(kind, ())]
        return [CompletionItem(word) for word in words if word.startswith(incomplete)]
