"""QEMU in two releases, side by side (`scripts/qemu.sh`), and machines that are gone when a test ends."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

from virtio.pci.qtest import QemuMachine
from virtio.transport.pci import PciTransport

OLD = Path(__file__).parents[2] / ".venv/qemu-7.2/usr/bin/qemu-system-x86_64"
Machines = Callable[..., QemuMachine]
How = Literal["auto", "msix", "intx"]


@pytest.fixture(params=["newest", "7.2"])
def binary(request: pytest.FixtureRequest) -> str:
    """The program: a test that needs it fails where it is missing, and never passes by skipping."""
    program = shutil.which("qemu-system-x86_64") if request.param == "newest" else shutil.which(OLD)
    if program is None:
        pytest.fail(f"QEMU ({request.param}) is not installed: run scripts/qemu.sh, or `make qemu-tools`")
    return str(program)


@pytest.fixture
def machines(binary: str) -> Iterator[Machines]:
    """Starts machines; they are closed when the test ends."""
    started: list[QemuMachine] = []

    def start(*devices: str, **options: Any) -> QemuMachine:
        started.append(QemuMachine(devices, binary=binary, **options))
        return started[-1]

    yield start
    for machine in started:
        machine.close()


def only(machine: QemuMachine, interrupts: How = "auto") -> PciTransport:
    """A transport to the machine's only function."""
    (function,) = machine.functions()
    return PciTransport(function, interrupts=interrupts)


def at(machine: QemuMachine, address: str, interrupts: How = "auto") -> PciTransport:
    """A transport to the function at `address`."""
    (function,) = (each for each in machine.functions() if each.address == address)
    return PciTransport(function, interrupts=interrupts)
