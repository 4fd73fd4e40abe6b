"""QEMU with a Linux guest whose network card is a back-end's: `with Machine(kernel, path) as machine`."""

import re
from collections.abc import Sequence
from socket import socketpair
from types import TracebackType
from typing import Any, Self

from tests.guest.far import FAR, NEAR
from virtio.cli.guest import qemu_guest
from virtio.cli.initrd import Kernel
from virtio.pci.qtest_link import Qmp


class Machine:
    """Starts at once; `boot` waits for it.

    `card` are properties of the network card, `chardev` of the socket to the back-end, with a comma before them.
    """

    def __init__(
        self,
        kernel: Kernel,
        path: str,
        *,
        card: str = "",
        chardev: str = "",
        pairs: int = 1,
        options: Sequence[str] = (),
        memory: str = "256M",
        processors: int = 1,
    ) -> None:
        monitor, theirs = socketpair()
        with theirs:
            words = ["-chardev", f"socket,id=qmp,fd={theirs.fileno()}", "-mon", "chardev=qmp,mode=control"]
            words += ["-chardev", f"socket,id=vu,path={path}{chardev}", "-netdev", f"vhost-user,id=n0,chardev=vu,queues={pairs}"]
            words += ["-device", f"virtio-net-pci,netdev=n0,romfile={card}", *options]
            self.guest = qemu_guest(kernel, words, memory=memory, processors=processors, pass_fds=[theirs.fileno()])
        self._qmp = Qmp(monitor, lambda: f"QEMU is gone: {self.guest.process.poll()}")
        self.run, self.read = self.guest.run, self.guest.read

    def boot(self) -> None:
        """Waits for the guest's shell, and brings its card up."""
        self.guest.wait_ready()
        self.up()

    def up(self, address: str = NEAR) -> None:
        """Brings the guest's card up, with its address."""
        self.read(f"ip link set eth0 up && ip addr add {address}/24 dev eth0")

    def ping(self, count: int = 3, *words: str, before: str = "", address: str = FAR) -> None:
        """Has the guest ping the far end: all is answered. `before`: what runs ping."""
        command = f"{before} /bin/ping -n -c {count} -i 0.1 -W 10 -w 30 {' '.join(words)} {address}".strip()
        status, lines = self.run(command)
        assert status == 0 and any(f"{count} received" in line for line in lines), lines

    def iperf3(self, seconds: int, *words: str) -> float:
        """Sends one TCP stream to the far end, or with -R receives one; Mbit/s that arrived."""
        status, lines = self.run(
            f"iperf3 -c {FAR} -t {seconds} -f m --connect-timeout 60000 --forceflush {' '.join(words)}", limit=seconds + 60
        )
        arrived = [float(found[1]) for line in lines if (found := re.search(r"([\d.]+) Mbits/sec.*receiver", line))]
        assert status == 0 and arrived, lines
        return arrived[-1]

    def qmp(self, command: str, **arguments: Any) -> Any:
        """Gives QEMU's monitor a command; names with _ for -."""
        words = {name.replace("_", "-"): value for name, value in arguments.items()}
        return self._qmp.run(command if command.startswith("device_") else command.replace("_", "-"), words)

    def close(self) -> None:
        """Ends QEMU."""
        self.guest.close()
        self._qmp.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
