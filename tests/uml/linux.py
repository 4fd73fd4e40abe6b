"""Linux as an ordinary process, whose devices are ours: `with Linux(script, {socket: device id}) as linux`."""

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

from virtio.cli.guest import xstate

MODULES = "/usr/lib/uml/modules"
START = f"""#!/bin/sh
export PATH=/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin
mount -t proc none /proc; mount -t sysfs none /sys; mount -t tmpfs none /tmp
for name in failover net_failover virtio_net; do insmod "$(find {MODULES} -name $name.ko)"; done
exec 2>&1
"""
END = """
echo the script ended
echo o > /proc/sysrq-trigger; sleep 60
"""


class Linux:
    """This machine's files are the guest's root, `script` is what it runs; `output` is its console, whole once `wait` has returned."""

    def __init__(self, script: str, devices: Mapping[str, int]) -> None:
        if (program := shutil.which("linux.uml")) is None:
            pytest.fail("User-Mode Linux is not installed: run scripts/uml.sh, or `make uml-tools`")
        self._folder = tempfile.TemporaryDirectory(prefix="uml-", ignore_cleanup_errors=True)
        folder = Path(self._folder.name)
        start = folder / "init"
        start.write_text(START + script + END)
        start.chmod(0o755)
        self._output = (folder / "output").open("w+b")
        arguments = [program, "mem=256M", "rootfstype=hostfs", "rootflags=/", "ro", f"init={start}", "con=null", "con0=null,fd:1", "quiet"]
        self.process = subprocess.Popen(
            [*arguments, f"uml_dir={folder}", *(f"virtio_uml.device={path}:{device}" for path, device in devices.items())],
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": "/dev/shm", **xstate(folder)},
            start_new_session=True,
        )

    @property
    def ended(self) -> bool:
        """Whether Linux has powered off."""
        return self.process.poll() is not None

    @property
    def output(self) -> str:
        """What it printed so far."""
        self._output.seek(0)
        return self._output.read().decode(errors="replace").replace("\r", "")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with suppress(ProcessLookupError):  # its own session: nobody else is in this group
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._output.close()
        self._folder.cleanup()
