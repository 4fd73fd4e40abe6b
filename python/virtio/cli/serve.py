"""`virtio serve`: devices for virtual machines that somebody else runs, over vhost-user. After QEMU's conventions for back-end programs."""

import json
import os
import stat
import sys
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click
from click.shell_completion import CompletionItem

from virtio.cli.kinds import TYPES
from virtio.cli.output import CommandError, aside
from virtio.cli.own import EndsProgramError, made_by
from virtio.cli.parameters import MacAddress, Number, SocketPath
from virtio.cli.serve_views import View, shown
from virtio.cli.served import Place, Served

if TYPE_CHECKING:
    from virtio import Device

MOST_DESCRIPTORS: Final = 1 << 20
MOST_PAIRS: Final = 127
"""With a control queue, as many queues as vhost-user's ring numbers of 8 bits count."""
DESCRIPTION: Final = Path(__file__).with_name("serve_description.json")
"""What management programs read, but for the program's own path."""
CAPABILITIES: Final = "--print-capabilities"


class ServeCommand(click.Command):
    """One type of device. What it can do is told whatever else stands on the command line."""

    def __init__(self, *words: Any, kind: Callable[[], str], **options: Any) -> None:
        super().__init__(*words, **options)
        self.kind = kind

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Looks for `CAPABILITIES` first."""
        if CAPABILITIES in args and not ctx.resilient_parsing:
            click.echo(json.dumps({"type": self.kind()}, indent=2))
            ctx.exit()
        return super().parse_args(ctx, args)


COMMON: Final[Sequence[Callable[[Any], Any]]] = (
    click.option("--socket-path", type=SocketPath(), metavar="PATH", help="Listen at this socket, or connect to it (--client)."),
    click.option("--fd", type=Number(0, MOST_DESCRIPTORS), metavar="N", help="Use this descriptor: a listening or connected socket."),
    click.option("--client", is_flag=True, help="Connect, and again whenever the connection is gone."),
    click.option("--packed", is_flag=True, help="Offer packed rings, too."),
    click.option(CAPABILITIES, is_flag=True, help="Print what this back-end can do, as JSON, and exit."),
)


def options(*more: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The options that all types have, and those of one."""

    def decorate(function: Any) -> Any:
        for option in reversed((*COMMON[:3], *more, *COMMON[3:])):
            function = option(function)
        return function

    return decorate


def place(socket_path: str | None, fd: int | None, client: bool, packed: bool) -> Place:
    """UsageError: neither a path nor a descriptor, both, or a client of a descriptor."""
    if (socket_path is None) == (fd is None):
        raise click.UsageError("either --socket-path or --fd is needed" + ("" if fd is None else ", not both"))
    if client and fd is not None:
        raise click.UsageError("--client is for --socket-path: a descriptor is used as it is")
    return Place(socket_path, fd, client, packed)


class Types(click.Group):
    """Device types by name, and a user's own by file and class."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Without a type it is told what is known."""
        if not args and not ctx.resilient_parsing:
            raise click.UsageError("a device type is needed: net, rng, or FILE.py:CLASS", ctx)
        return super().parse_args(ctx, args)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Types by name, or else files, which the shell knows."""
        return super().shell_complete(ctx, incomplete) or [CompletionItem(incomplete, type="file")]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """`FILE.py:CLASS` is a command as well."""
        if ":" in cmd_name and cmd_name not in self.commands:
            return _own(cmd_name)
        return super().get_command(ctx, cmd_name)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        """An unknown type is told what is known."""
        if args and self.get_command(ctx, args[0]) is None and not ctx.resilient_parsing:
            raise click.UsageError(f"{args[0]!r} is no device type that is known: net, rng, or FILE.py:CLASS", ctx)
        return super().resolve_command(ctx, args)


@click.group(cls=Types, subcommand_metavar="net|rng|FILE.py:CLASS [OPTIONS]")
def serve() -> None:
    """Serve a device to virtual machines, over vhost-user.

    The type is net, rng, or a Device of your own: the file that has it, a colon, and the name of its class. Counters are shown on a
    terminal; in a pipe or file every event is a line of JSON. SIGTERM and Ctrl-C end it.
    """


@serve.command("net", cls=ServeCommand, kind=lambda: "net")
@options(
    click.option("--tap", metavar="NAME", help="The far end is interface NAME, a TAP: one that is there and free, or a new one."),
    click.option("--peer", type=SocketPath(), metavar="SOCKET", help="The far end is another machine, whose front-end is at SOCKET."),
    click.option("--pcap", type=click.Path(dir_okay=False), metavar="FILE", help="Write frames into a capture that tcpdump reads."),
    click.option("--queue-pairs", type=Number(1, MOST_PAIRS), default=1, metavar="N", help="Offer so many queue pairs; 1 by default."),
    click.option("--no-offloads", is_flag=True, help="Offer neither checksum nor segmentation offloads."),
    click.option("--mac", type=MacAddress(), help="The machine's Ethernet address; without it, a random one."),
    click.option("--mtu", type=Number(68, 65535), metavar="N", help="Offer this MTU."),
    click.option("--print-description", is_flag=True, help="Print what tells management programs of this back-end, and exit."),
)
def serve_net(
    socket_path: str | None,
    fd: int | None,
    client: bool,
    packed: bool,
    print_capabilities: bool,
    print_description: bool,
    **wishes: Any,
) -> None:
    """A network device. Frames go to an interface (--tap), to another machine (--peer), or nowhere: then they are counted.

    Both machines of --peer have to accept segmentation offloads where the other does; if one cannot, use --no-offloads. With --pcap none
    are offered, so that frames are what they claim to be.
    """
    if print_description:
        click.echo(json.dumps(description(), indent=2))
        return
    where = place(socket_path, fd, client, packed)
    if wishes["tap"] is not None and (wishes["peer"] is not None or wishes["pcap"] is not None):
        other = "--peer" if wishes["peer"] is not None else "--pcap"
        hint = "" if other == "--peer" else f": run tcpdump -i {wishes['tap']} beside it"
        raise click.UsageError(f"--tap does not go together with {other}{hint}")
    if (capture := wishes["pcap"]) in ("", "-"):
        why = "no file has an empty name" if not capture else "standard output is for events"
        raise click.BadParameter(f"{why}: name a file, or a FIFO", param_hint="'--pcap'")
    places = {"--socket-path": socket_path, "--peer": wishes["peer"], "--pcap": capture}
    named = [(option, os.path.realpath(path)) for option, path in places.items() if path is not None]
    for (one, path), (other, same) in combinations(named, 2):
        if path == same:
            raise click.UsageError(f"{one} and {other} are the same file, {places[other]}")
    from virtio.cli.serve_net import Wishes, serve_net

    with shown() as view, Served(view) as served:
        serve_net(served, where, Wishes(**wishes))
        served.run()


def description() -> dict[str, Any]:
    """What stands in /etc/qemu/vhost-user/50-virtio-net.json, for this installation."""
    found: dict[str, Any] = json.loads(DESCRIPTION.read_text())
    beside = Path(sys.executable).with_name(Path(found["binary"]).name)
    return {**found, "binary": str(beside)} if beside.exists() else found


@serve.command("rng", cls=ServeCommand, kind=lambda: "rng")
@options()
def serve_rng(socket_path: str | None, fd: int | None, client: bool, packed: bool, print_capabilities: bool) -> None:
    """An entropy device for each front-end that connects."""
    from virtio.devices.rng import RngDevice

    where = place(socket_path, fd, client, packed)
    with shown() as view:
        _serve_any(view, RngDevice, RngDevice.queues, where, "an entropy device")


def _serve_any(view: View, make: "Callable[[], Device]", queues: Sequence[str], where: Place, what: str) -> None:
    from virtio.cli.counters import Queues, Several

    counted = Several(Queues, queues)

    def made() -> "Device":
        device = make()
        counted.add(device)
        return device

    with Served(view) as served:
        served.add(where, made, counted, what)
        served.run()


def _own(target: str) -> click.Command:
    """The command that serves a class of the user's."""
    file, _, name = target.rpartition(":")

    def kind() -> str:
        with aside():
            number = getattr(own_class(file, name), "device_id", None)
        if not isinstance(number, int):
            raise CommandError(f"{name}.device_id is {'missing' if number is None else repr(number)}: it has to be an integer")
        return TYPES.get(number, str(number))

    @click.command(target, cls=ServeCommand, kind=kind)
    @options()
    def command(socket_path: str | None, fd: int | None, client: bool, packed: bool, print_capabilities: bool) -> None:
        """A device of your own for each front-end that connects: its class is called without arguments."""
        where = place(socket_path, fd, client, packed)
        with shown() as view:
            made = own_class(file, name)
            queues = _checked(made, target).queues  # what it raises is told before anybody connects
            _serve_any(view, lambda: made_by(made), queues, where, target)

    return command


def own_class(file: str, name: str) -> "type[Device]":
    """UsageError: no file of Python or no class is named. CommandError: it does not import, has no such class, or that is no Device."""
    from importlib.util import module_from_spec, spec_from_file_location

    from virtio import Device

    if not file or not name:
        raise click.UsageError(f"{file}:{name} is not a file and a class, FILE.py:CLASS")
    try:
        mode = os.stat(file).st_mode
    except OSError as error:
        missing = isinstance(error, FileNotFoundError | NotADirectoryError)
        raise CommandError(f"{file}: {'no such file' if missing else error.strerror}") from None
    if not stat.S_ISREG(mode):
        raise CommandError(f"{file}: {'a folder' if stat.S_ISDIR(mode) else 'no file of text'}")
    spec = spec_from_file_location(f"_served_{Path(file).stem}", file)
    if spec is None or spec.loader is None:
        raise click.UsageError(f"{file} is no Python file: its name has to end in .py")
    module = module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(Path(file).resolve().parent))  # as for a program: it finds what lies beside it
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise CommandError(f"{file} does not import: {type(error).__name__}: {error}") from error
    except (SystemExit, KeyboardInterrupt) as error:
        raise CommandError(f"{file} does not import: it ends the program ({str(error) or type(error).__name__})") from error
    found = getattr(module, name, None)
    if found is None:
        raise CommandError(f"{file} has no {name}")
    if not isinstance(found, type) or not issubclass(found, Device):
        raise CommandError(f"{name} in {file} is no subclass of virtio.Device")
    return found


def _checked(make: "type[Device]", target: str) -> "Device":
    try:
        return made_by(make)
    except EndsProgramError as error:
        raise CommandError(f"{target}: {error}") from error
    except Exception as error:
        raise CommandError(f"{target}: {type(error).__name__}: {error}") from error
