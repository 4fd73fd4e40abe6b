"""libvirtd of one's own: in namespaces of its own, with a configuration of its own, so that nothing of the machine's is touched or left."""

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from time import monotonic, sleep
from types import TracebackType
from typing import Self

import pytest

PATIENCE = 60.0
QEMU = """
stdio_handler = "file"
user = "root"
group = "root"
security_driver = "none"
cgroup_controllers = []
namespaces = []
remember_owner = 0
"""
DAEMON = """
unix_sock_dir = "{folder}/sockets"
auth_unix_rw = "none"
auth_unix_ro = "none"
log_outputs = "4:stderr"
"""
# The user that Debian's package of the service makes, and libvirt asks for, is known in here alone.
START = """
set -e
mount --make-rprivate /
for place in /etc/libvirt /run/libvirt /var/lib/libvirt /var/log/libvirt /var/cache/libvirt; do
    mkdir -p $place; mount -t tmpfs none $place
done
for file in passwd group; do cp /etc/$file "$1/$file"; done
grep -q ^libvirt-qemu: "$1/passwd" || echo libvirt-qemu:x:64055:64055::/nonexistent:/usr/sbin/nologin >> "$1/passwd"
grep -q ^libvirt-qemu: "$1/group" || echo libvirt-qemu:x:64055: >> "$1/group"
for file in passwd group; do mount --bind "$1/$file" /etc/$file; done
cp "$1/qemu.conf" /etc/libvirt/qemu.conf
PATH=$PATH:/usr/sbin libvirtd --config "$1/libvirtd.conf" --pid-file "$1/pid" &
wait $!  # as process 1: it also takes care of QEMUs that libvirt leaves to that one
"""


class Libvirt:
    """The daemon, and `virsh` for it. When it ends, all domains end with it: it is the first of a PID namespace."""

    def __init__(self, folder: Path) -> None:
        for program in ("libvirtd", "virsh", "qemu-system-x86_64"):
            if shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin") is None:
                pytest.fail(f"{program} is not installed: run scripts/libvirt.sh, or `make libvirt-tools`")
        self._socket = folder / "sockets/libvirt-sock"
        (folder / "sockets").mkdir()
        (folder / "qemu.conf").write_text(QEMU)
        (folder / "libvirtd.conf").write_text(DAEMON.format(folder=folder))
        self._log = (folder / "log").open("w+")
        words = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", START, "sh", str(folder)]
        self._process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=self._log, stderr=subprocess.STDOUT)
        try:
            self._await()
        except BaseException:
            self.close()
            raise

    def _await(self) -> None:
        deadline = monotonic() + PATIENCE
        while (done := self._virsh(["version"])).returncode:
            assert self._process.poll() is None and monotonic() < deadline, (done.stderr, self._said())
            sleep(0.1)

    def _said(self) -> str:
        self._log.seek(0)
        return self._log.read()

    def _virsh(self, words: Sequence[str]) -> "subprocess.CompletedProcess[str]":
        command = ["virsh", "-q", "-c", f"qemu+unix:///system?socket={self._socket}", *words]
        return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE)

    def virsh(self, *words: str) -> str:
        """What it prints; it succeeds."""
        done = self._virsh(words)
        assert done.returncode == 0, (done.stderr, self._said())
        return done.stdout

    def close(self) -> None:
        """Ends the daemon and its domains."""
        self._process.kill()
        self._process.wait()
        self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
