"""What most tests of `virtio serve` begin with: a place for a socket."""

from pathlib import Path

import pytest


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "s"
