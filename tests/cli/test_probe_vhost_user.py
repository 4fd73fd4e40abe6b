"""`virtio probe vhost-user:SOCKET`: our own back-end, and places where none is."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cli.run import failed, run
from tests.vhost_user.serving import Serving
from virtio.devices.net import NetFeature
from virtio.spec import DeviceId
from virtio.vhost_user.connection import PROTOCOL
from virtio.vhost_user.message import ProtocolFeature


@pytest.fixture
def path(tmp_path: Path) -> Iterator[str]:
    with Serving(str(tmp_path / "s"), mtu=1400, mac="020304050607") as backend:
        yield backend.path


def probe(target: str) -> dict[str, Any]:
    done = run("probe", target, "--json")
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def test_a_network_device(path: str) -> None:
    for _ in range(2):  # it is left as it was
        report = probe(f"vhost-user:{path},type=net")
        assert report["target"] == f"vhost-user:{path},type=net"
        assert report["device"] == {"type": DeviceId.NETWORK, "name": "virtio-net", "id": "NETWORK"}
        assert report["pci"] is None
        assert report["config"] == {"mac": "02:03:04:05:06:07", "status": 1, "mtu": 1400}
        assert report["queues"] == [
            {"index": 0, "name": "receiveq1", "size": None},
            {"index": 1, "name": "transmitq1", "size": None},
        ]
        user = report["vhost_user"]
        assert (user["queues"], user["memory_slots"]) == (1, 32)
        always = PROTOCOL - {ProtocolFeature.RARP}  # which only a device offers whose far end announces
        assert int(user["protocol_features"]["mask"], 16) & int(PROTOCOL) == int(always)
        assert {"bit": 3, "name": "REPLY_ACK"} in user["protocol_features"]["offered"]
        offered = {each["name"] for each in report["features"]["offered"]}
        assert {NetFeature.MTU.name, "VERSION_1", "PROTOCOL_FEATURES"} <= offered


def test_types_by_name_and_number_or_none(path: str) -> None:
    assert probe(f"vhost-user:{path},type=1")["device"]["id"] == "NETWORK"
    assert probe(f"vhost-user:{path},type=entropy")["queues"] == [{"index": 0, "name": "requestq", "size": None}]
    report = probe(f"vhost-user:{path}")
    assert report["device"] == {"type": 0, "name": "virtio device", "id": None}
    assert report["config"] == {}
    text = run("probe", f"vhost-user:{path}").stdout
    assert "device type not told" in text and "CONFIGURE_MEM_SLOTS" in text and "bit 5" in text
    assert report["queues"] == [{"index": 0, "name": None, "size": None}]
    assert "  0  unnamed  size not told" in text
    for option, number in (
        ("type=fs", DeviceId.FILE_SYSTEM),
        ("type=balloon", DeviceId.TRADITIONAL_BALLOON),
        ("type=vsock", DeviceId.SOCKET),
    ):
        assert probe(f"vhost-user:{path},{option}")["device"]["type"] == number


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("s,type=nonsense", "'nonsense' is no device type"),
        ("s,type=", "'' is no device type"),
        ("s,typ=net", "'typ' is no option of a vhost-user back-end's: type=TYPE is the only one"),
        ("s,type=net,type=rng", "type= is told twice"),
        (",type=net", "0 bytes, not 1 to 107"),
        ("/" + "x" * 107, "108 bytes, not 1 to 107"),
    ],
)
def test_targets_that_cannot_be(target: str, said: str) -> None:
    assert said in failed(run("probe", f"vhost-user:{target}"), 2)


def test_a_socket_whose_name_has_a_comma(tmp_path: Path) -> None:
    for name in ("a,b", "a,type=net", "a,b=c,d"):
        with Serving(str(tmp_path / name)) as backend:
            assert probe(f"vhost-user:{backend.path}")["device"]["type"] == 0
            assert probe(f"vhost-user:{backend.path},type=net")["device"]["type"] == DeviceId.NETWORK


def test_places_where_no_back_end_is(tmp_path: Path) -> None:
    plain, dead = tmp_path / "plain", str(tmp_path / "dead")
    plain.write_text("")
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(dead)
    for where, why in (
        (str(tmp_path / "none"), "No such file or directory"),
        (str(plain), "it is not a socket"),
        (dead, "Connection refused"),
    ):
        assert why in failed(run("probe", f"vhost-user:{where}"), 1)


@pytest.mark.slow
def test_one_that_says_nothing(tmp_path: Path) -> None:
    path = str(tmp_path / "silent")
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(path)
        silent.listen()
        assert "the back-end does not answer GET_FEATURES within 5 s" in failed(run("probe", f"vhost-user:{path}"), 1)
