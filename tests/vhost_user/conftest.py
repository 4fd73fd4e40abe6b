"""What most tests of vhost-user begin with: a place for a socket, and a list for what a back-end reports."""

from pathlib import Path

import pytest


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "s")


@pytest.fixture
def errors() -> list[Exception]:
    return []
