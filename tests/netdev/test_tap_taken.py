"""TAP interfaces that are there already: whose they are, how many queues they were made for, and who has them."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from virtio.netdev import Namespace, NameTakenError
from virtio.netdev.tap import open_queues, open_tap
from virtio.netdev.tun_info import TunInfo, tun_info


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    with Namespace() as namespace:
        yield namespace


def make(namespace: Namespace, *words: str) -> None:
    with namespace.entered():
        subprocess.run(["ip", "tuntap", "add", "vn0", "mode", "tap", *words], check=True)


def opened(namespace: Namespace, queues: int) -> list[int]:
    return open_queues("vn0", queues, namespace=namespace.fileno(), existing=True)


@pytest.mark.parametrize(
    ("words", "whose"),
    [(("user", "12345"), "user 12345"), (("group", "99"), "group 99"), (("user", "7", "group", "8"), "user 7 and group 8")],
)
def test_one_that_is_somebody_elses(namespace: Namespace, words: tuple[str, ...], whose: str) -> None:
    make(namespace, *words)
    program = 'from virtio.netdev import open_tap; open_tap("vn0", existing=True)'
    command = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", sys.executable, "-c", program]
    with namespace.entered():
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    said = done.stderr.splitlines()[-1]
    assert said.endswith(f"TapPermissionError: interface vn0 is for {whose}, or who has CAP_NET_ADMIN: choose another name")


def test_one_that_was_made_for_several_queues_serves_one(namespace: Namespace) -> None:
    make(namespace, "multi_queue")
    for queues in (1, 2, 1):
        for tap in opened(namespace, queues):
            os.close(tap)


def test_one_that_was_made_for_one_queue_serves_no_two(namespace: Namespace) -> None:
    make(namespace)
    with pytest.raises(NameTakenError, match=r"^interface vn0 is there already, and is no TAP for several queues \(multi_queue\)"):
        opened(namespace, 2)


@pytest.mark.parametrize("multi_queue", [False, True])
def test_one_that_another_has_is_not_shared(namespace: Namespace, multi_queue: bool) -> None:
    make(namespace, *(["multi_queue"] if multi_queue else []))
    first = opened(namespace, 2 if multi_queue else 1)
    for queues in (1, 2) if multi_queue else (1,):
        with pytest.raises(NameTakenError, match=r"^interface vn0 is in use: another program has it"):
            opened(namespace, queues)
    with namespace.entered():
        found = tun_info("vn0")
    assert found == TunInfo(None, None, 2 if multi_queue else 0)  # as before
    for tap in first:
        os.close(tap)
    for tap in opened(namespace, 1):
        os.close(tap)


def test_what_is_told_of_other_interfaces(namespace: Namespace) -> None:
    with namespace.entered():
        assert tun_info("lo") is None and tun_info("nothing") is None and tun_info("x" * 40) is None
        tap = open_tap("vn0")
        assert tun_info("vn0") == TunInfo(None, None, 0)
        os.close(tap)
