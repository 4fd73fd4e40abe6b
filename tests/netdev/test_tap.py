"""TAP interfaces by themselves: names, namespaces, permissions, addresses, and which offloads follow from what was negotiated."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from virtio import Features, NetFeature, StatusError
from virtio.devices.net import CHECKSUMS, GUEST_OFFLOADS, HOST_OFFLOADS
from virtio.netdev import Namespace, NamespaceError, NameTakenError, TapError, open_tap
from virtio.netdev.tap import Interface, offloads

CSUM, TSO4, TSO6, ECN, USO = 1, 2, 4, 8, 0x60
_F = NetFeature


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    with Namespace() as namespace:
        yield namespace


@pytest.mark.parametrize(
    ("features", "to_device", "to_driver"),
    [
        ((), 0, 0),
        (CHECKSUMS, CSUM, CSUM),
        (HOST_OFFLOADS | CHECKSUMS, CSUM | TSO4 | TSO6 | ECN | USO, CSUM),
        (GUEST_OFFLOADS | CHECKSUMS, CSUM, CSUM | TSO4 | TSO6 | ECN | USO),
        ((_F.GUEST_CSUM, _F.GUEST_TSO4, _F.GUEST_USO4), 0, CSUM | TSO4),  # USO for one IP alone is none
        ((_F.CSUM, _F.HOST_TSO6, _F.HOST_USO), CSUM | TSO6 | USO, 0),
        ((_F.HOST_TSO4, _F.GUEST_TSO4), 0, 0),  # nothing without checksums
        ((_F.CSUM, _F.HOST_ECN), CSUM, 0),
    ],
)
def test_a_tap_may_leave_undone_what_the_other_end_accepted(features: set[int], to_device: int, to_driver: int) -> None:
    assert offloads(Features(features), driver=True) == to_device
    assert offloads(Features(features), driver=False) == to_driver


def test_names_that_cannot_be(namespace: Namespace) -> None:
    for name in ("", "a" * 16, "ä" * 8, "a/b", "a b", "..", "a%d"):
        with pytest.raises(ValueError, match="interface name"):
            open_tap(name, namespace=namespace.fileno())
    os.close(open_tap("a" * 15, namespace=namespace.fileno()))


def test_a_name_that_is_taken(namespace: Namespace) -> None:
    tap = open_tap("vn0", namespace=namespace.fileno())
    with pytest.raises(NameTakenError, match=r"^interface vn0 is there already"):
        open_tap("vn0", namespace=namespace.fileno())
    os.close(tap)
    with namespace.entered():
        subprocess.run(["ip", "tuntap", "add", "vn0", "mode", "tap"], check=True)
    with pytest.raises(FileExistsError):  # also one that nobody uses
        open_tap("vn0", namespace=namespace.fileno())
    assert issubclass(NameTakenError, TapError)


def test_no_such_namespace(namespace: Namespace) -> None:
    with open(os.devnull) as nothing, pytest.raises(NamespaceError, match="no network namespace behind"):
        open_tap("vn0", namespace=nothing.fileno())
    namespace.close()
    with pytest.raises(StatusError, match="closed"):
        namespace.fileno()


@pytest.mark.parametrize("what", ["Namespace()", 'open_tap("vn0")'])
def test_who_may_not_is_told_what_would_help(what: str) -> None:
    program = f"from virtio.netdev import Namespace, open_tap; {what}"
    command = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "unshare -Urn" in done.stderr.splitlines()[-1], done.stderr


def test_addresses_of_both_families(namespace: Namespace) -> None:
    tap = open_tap("vn0", namespace=namespace.fileno())
    Interface("vn0", namespace.fileno()).add_addresses(["192.0.2.1/25", "2001:db8::1/64"])
    with namespace.entered():
        shown = subprocess.run(["ip", "-o", "address", "show", "vn0"], stdout=subprocess.PIPE, check=True, text=True).stdout
    assert "inet 192.0.2.1/25 " in shown and "inet6 2001:db8::1/64 " in shown
    os.close(tap)


def test_a_namespace_holds_what_is_made_inside_and_the_thread_is_outside_again(namespace: Namespace) -> None:
    outside = os.stat("/proc/thread-self/ns/net").st_ino
    with namespace.entered():
        assert os.stat("/proc/thread-self/ns/net").st_ino != outside
        assert socket.if_nameindex() == [(1, "lo")]
        with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
            pass
    assert os.stat("/proc/thread-self/ns/net").st_ino == outside
    assert namespace.counters("lo")["sent_frames"] > 0 and namespace.counters("nothing")["sent_frames"] == 0
