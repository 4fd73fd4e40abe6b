"""Checksums and segmentation through QEMU's card on a TAP, both ways, against this machine's kernel (`tap_session`)."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.qemu

NAMESPACE = ["unshare", "--net"] if os.geteuid() == 0 else ["unshare", "--user", "--net", "--map-root-user"]


@pytest.mark.parametrize("what", ["offloads", "plain"])
@pytest.mark.parametrize("buffers", ["mergeable", "whole"])
def test_offloads_pass_both_ways(binary: str, ring_format: str, buffers: str, what: str) -> None:
    command = [*NAMESPACE, sys.executable, "-m", "tests.qemu.tap_session", binary, ring_format, buffers, what]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("vectors", [10, 4, 0])
def test_four_queue_pairs(binary: str, ring_format: str, vectors: int) -> None:
    command = [*NAMESPACE, sys.executable, "-m", "tests.qemu.pairs_session", binary, ring_format, str(vectors)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
