"""Open vSwitch with DPDK, with a database and processes of its own; and OVN above it. Somebody else's device on every port.

with Switch() as switch:
    switch.control("add-port", "br0", "p0", "--", "set", "Interface", "p0", "type=dpdkvhostuser")
"""

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

LIMIT = 60.0
"""Seconds that anything may take."""
PROGRAM = "/usr/lib/openvswitch-switch-dpdk/ovs-vswitchd-dpdk"
SCHEMAS = Path("/usr/share/openvswitch"), Path("/usr/share/ovn")
BRIDGE = "br0"


def program(name: str) -> str:
    """Where a program is."""
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/bin:/sbin")
    if found is None:
        pytest.fail(f"{name} is not installed: run scripts/dpdk.sh, or `make dpdk-tools`")
    return found


def listens(path: Path) -> bool:
    """Whether a connection to `path` is taken: a socket is there a little earlier."""
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


class Processes:
    """Programs that run until the end, each with a log in one folder."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="ovs-", ignore_cleanup_errors=True)
        self.folder = Path(self._folder.name)
        self._running: list[subprocess.Popen[bytes]] = []
        self.environment = {
            **os.environ,
            **{f"{name}_{what}": str(self.folder) for name in ("OVS", "OVN") for what in ("RUNDIR", "LOGDIR")},
        }

    def start(self, *words: str) -> None:
        """Starts a program."""
        with (self.folder / f"{Path(words[0]).name}.{len(self._running)}.output").open("wb") as output:
            self._running.append(
                subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=self.environment, cwd=self.folder)
            )

    def run(self, *words: str) -> str:
        """Runs a program to its end."""
        done = subprocess.run(words, capture_output=True, text=True, env=self.environment, cwd=self.folder, timeout=LIMIT)
        assert done.returncode == 0, (words, done.stdout, done.stderr, self.outputs())
        return done.stdout.strip()

    def database(self, name: str, schema: Path) -> str:
        """A database's address, once its server listens."""
        path = self.folder / f"{name}.sock"
        self.run(program("ovsdb-tool"), "create", f"{name}.db", str(schema))
        self.start(program("ovsdb-server"), f"--remote=punix:{path}", f"--unixctl={self.folder}/{name}.ctl", f"{name}.db")
        self.wait_for(lambda: listens(path), f"{name} listens")
        return f"unix:{path}"

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        """Until something is so, while all programs run."""
        end = time.monotonic() + LIMIT
        while not condition():
            assert time.monotonic() < end and all(each.poll() is None for each in self._running), f"not so: {what}: {self.outputs()}"
            time.sleep(0.02)

    def outputs(self) -> str:
        """What the programs said, the end of it."""
        return "\n".join(f"{each.name}: {each.read_text(errors='replace')[-1500:]}" for each in sorted(self.folder.glob("*.output")))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for each in reversed(self._running):
            each.kill()
            each.wait(LIMIT)
        self._folder.cleanup()


class Switch(Processes):
    """The switch, with one bridge."""

    def __init__(self) -> None:
        super().__init__()
        try:
            if not Path(PROGRAM).exists():
                pytest.fail("Open vSwitch with DPDK is not installed: run scripts/dpdk.sh, or `make dpdk-tools`")
            self.address = self.database("conf", SCHEMAS[0] / "vswitch.ovsschema")
            extra = f"--no-huge --legacy-mem -m 3072 --no-pci --no-telemetry --file-prefix=ovs-{os.getpid()}-{id(self):x}"
            self.control("init")
            self.control("set", "Open_vSwitch", ".", "other_config:dpdk-init=true", f'other_config:dpdk-extra="{extra}"', wait=False)
            self.start(PROGRAM, self.address, f"--unixctl={self.folder}/vswitchd.ctl", "--no-chdir")
            self.control("add-br", BRIDGE, "--", "set", "bridge", BRIDGE, "datapath_type=netdev")
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def control(self, *words: str, wait: bool = True) -> str:
        """ovs-vsctl."""
        waiting = [] if wait and words != ("init",) else ["--no-wait"]
        return self.run(program("ovs-vsctl"), f"--db={self.address}", f"--timeout={int(LIMIT)}", *waiting, *words)

    def add_port(self, name: str, *, listens: bool, settings: Sequence[str] = ()) -> str:
        """A port whose device is at the path that is returned: where the switch listens, or where it connects to."""
        path = self.folder / name
        kind = ["type=dpdkvhostuser"] if listens else ["type=dpdkvhostuserclient", f"options:vhost-server-path={path}"]
        self.control("add-port", BRIDGE, name, "--", "set", "Interface", name, *kind, *settings)
        if listens:
            self.wait_for(path.exists, f"{path} exists")
        return str(path)


class Ovn(Switch):
    """The switch as OVN's only chassis, with one logical switch."""

    def __init__(self) -> None:
        super().__init__()
        try:
            north = self.database("north", SCHEMAS[1] / "ovn-nb.ovsschema")
            south = self.database("south", SCHEMAS[1] / "ovn-sb.ovsschema")
            self._north = [program("ovn-nbctl"), f"--db={north}", f"--timeout={int(LIMIT)}"]
            self.start(program("ovn-northd"), f"--ovnnb-db={north}", f"--ovnsb-db={south}", f"--unixctl={self.folder}/northd.ctl")
            self.control(
                *("set", "Open_vSwitch", ".", f"external_ids:ovn-remote={south}", "external_ids:ovn-encap-type=geneve"),
                *("external_ids:ovn-encap-ip=127.0.0.1", "external_ids:system-id=one", f"external_ids:ovn-bridge={BRIDGE}"),
            )
            self.start(program("ovn-controller"), self.address)
            self.north("ls-add", "logical")
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def north(self, *words: str) -> str:
        """ovn-nbctl."""
        return self.run(*self._north, *words)

    def add_logical_port(self, name: str, mac: str) -> str:
        """A port of the logical switch, bound to one of the bridge's; the path where the switch listens."""
        self.north("lsp-add", "logical", name, "--", "lsp-set-addresses", name, mac)
        path = self.add_port(name, listens=True, settings=[f"external_ids:iface-id={name}"])
        self.north("wait-until", "Logical_Switch_Port", name, "up=true")
        return path
