"""The kernel of the guests, and the program that runs them (`scripts/guest.sh`)."""

import shutil

import pytest

from virtio.cli.initrd import Kernel, find_kernel
from virtio.cli.output import CommandError


@pytest.fixture(scope="session")
def kernel() -> Kernel:
    """A test that needs it fails where it is missing, and never passes by skipping."""
    try:
        found = find_kernel()
    except CommandError as error:
        pytest.fail(f"{error}: run scripts/guest.sh, or `make guest-tools`")
    if shutil.which("qemu-system-x86_64") is None:
        pytest.fail("QEMU is not installed: run scripts/guest.sh, or `make guest-tools`")
    return found
