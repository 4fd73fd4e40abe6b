"""`virtio probe`: our own devices on emulated functions, and QEMU's."""

import json
import random
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.cli.run import LIMIT, beside, failed, nothing_left, run, until_it_listens
from virtio.devices.net import NetFeature
from virtio.devices.net_device import NetDevice
from virtio.features import Features
from virtio.spec import DeviceId, Feature

PCI = {
    *("address", "vendor", "device", "revision", "class", "subsystem_vendor", "subsystem"),
    *("bars", "interrupts", "capabilities", "unusable"),
}


def probe(target: str, **more: str) -> dict[str, Any]:
    """The JSON document, whose shape docs/command.md tells."""
    done = run("probe", target, "--json", **more)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    assert list(report) == ["target", "device", "pci", "vhost_user", "features", "config", "queues"]
    assert report["target"] == target
    assert set(report["device"]) == {"type", "name", "id"}
    assert set(report["pci"]) == PCI
    assert set(report["pci"]["interrupts"]) == {"used", "msix_vectors", "pin"}
    for bar in report["pci"]["bars"]:
        assert set(bar) == {"index", "kind", "address", "size", "prefetchable"}
    for capability in report["pci"]["capabilities"]:
        assert {"place", "id", "name"} <= set(capability) <= {"place", "id", "name", "msix", "virtio", "broken"}
    for each in report["features"]["offered"]:
        assert set(each) == {"bit", "name"}
    for queue in report["queues"]:
        assert set(queue) == {"index", "name", "size"}
    assert int(report["features"]["mask"], 16) == sum(1 << each["bit"] for each in report["features"]["offered"])
    return report


def virtio_types(report: dict[str, Any]) -> set[str]:
    return {each["virtio"]["type"] for each in report["pci"]["capabilities"] if "virtio" in each}


def test_our_network_device() -> None:
    report = probe("emulated:net")
    assert report["device"] == {"type": DeviceId.NETWORK, "name": "virtio-net", "id": "NETWORK"}
    assert (report["pci"]["vendor"], report["pci"]["device"]) == (0x1AF4, 0x1041)
    assert re.fullmatch(r"[\da-f]{4}:[\da-f]{2}:[\da-f]{2}\.[0-7]", report["pci"]["address"])
    assert virtio_types(report) == {"COMMON", "NOTIFY", "ISR", "DEVICE", "PCI"}
    assert report["pci"]["interrupts"] == {"used": "msix", "msix_vectors": 3, "pin": 1}
    offered = NetDevice().offered
    assert int(report["features"]["mask"], 16) == int(offered)
    assert {each["name"] for each in report["features"]["offered"]} == {bit.name for bit in Features(offered, names=[NetFeature])}  # type: ignore[attr-defined]
    assert re.fullmatch(r"(?:[\da-f]{2}:){5}[\da-f]{2}", report["config"]["mac"]) and report["config"]["status"] == 1
    assert [(queue["name"], queue["size"]) for queue in report["queues"]] == [("receiveq1", 256), ("transmitq1", 256)]


def test_our_entropy_device() -> None:
    report = probe("emulated:rng")
    assert report["device"]["name"] == "virtio-rng" and report["config"] == {}
    assert [queue["name"] for queue in report["queues"]] == ["requestq"]
    assert "DEVICE" not in virtio_types(report)


@pytest.mark.parametrize("target", ["emulated:net", "emulated:rng"])
def test_the_text_says_what_the_document_says(target: str) -> None:
    done, report = run("probe", target), probe(target)
    assert done.returncode == 0 and not done.stderr
    assert done.stdout.startswith(f"<{report['device']['name']}> at {report['pci']['address']}, device type {report['device']['type']}")
    for each in report["features"]["offered"]:
        assert re.search(rf"^  {each['bit']} +{each['name']}$", done.stdout, flags=re.MULTILINE)
    for queue in report["queues"]:
        assert re.search(rf"^  {queue['index']} +{queue['name']} +{queue['size']} entries$", done.stdout, flags=re.MULTILINE)
    for bar in report["pci"]["bars"]:
        assert f"{bar['address']:#x}" in done.stdout
    assert all(line == line.rstrip() for line in done.stdout.splitlines())


def test_bits_without_a_name_are_told_by_number() -> None:
    from virtio.cli.inspect import inspect
    from virtio.device import Device
    from virtio.pci.emulated import EmulatedFunction
    from virtio.transport.pci import PciTransport

    class Strange(Device):
        device_id = 60
        config = b"\x01\x02\x03"

    with PciTransport(EmulatedFunction(Strange(offered={Feature.VERSION_1, 3, 77, 127}))) as transport:
        report = inspect(transport, "strange")
    assert report["features"]["offered"] == [
        {"bit": 3, "name": None},
        {"bit": 32, "name": "VERSION_1"},
        {"bit": 77, "name": None},
        {"bit": 127, "name": None},
    ]
    assert report["device"] == {"type": 60, "name": "virtio device of type 60", "id": None}
    assert report["config"]["bytes"].startswith("010203") and report["queues"] == []


@pytest.mark.qemu
def test_qemus_network_device(tmp_path: Path) -> None:
    with nothing_left(tmp_path) as more:
        report = probe("qemu:virtio-net-pci,mac=52:54:00:aa:bb:cc,mq=on,vectors=5,host_mtu=1400", **more)
    assert report["config"]["mac"] == "52:54:00:aa:bb:cc" and report["config"]["mtu"] == 1400
    assert report["config"]["max_virtqueue_pairs"] == 1
    assert report["pci"]["interrupts"]["msix_vectors"] == 5
    assert [queue["name"] for queue in report["queues"]] == ["receiveq1", "transmitq1", "controlq"]
    assert {"MAC", "CTRL_VQ", "MQ", "MTU"} <= {each["name"] for each in report["features"]["offered"]}


@pytest.mark.qemu
@pytest.mark.parametrize(("device", "name"), [("virtio-rng-pci", "virtio-rng"), ("virtio-balloon-pci", "virtio-traditional-balloon")])
def test_qemus_other_devices(device: str, name: str, tmp_path: Path) -> None:
    with nothing_left(tmp_path) as more:
        assert probe(f"qemu:{device}", **more)["device"]["name"] == name


@pytest.mark.qemu
@pytest.mark.parametrize(
    ("device", "said"),
    [
        ("no-such-device", "'no-such-device' is not a valid device model name"),
        ("virtio-net-pci,colour=blue", "colour"),
        ("virtio-net-pci,mac=nonsense", "mac"),
        ("virtio-net-pci,netdev=none", "none"),
        ("e1000", "8086:100e is not a virtio device"),
        ("virtio-rng-pci,disable-modern=on,disable-legacy=off", "legacy"),
        ("isa-debug-exit", "no function of isa-debug-exit is found on QEMU's PCI bus"),
        ("pcie-root-port", "no function of pcie-root-port is found on QEMU's PCI bus"),
        ("virtio-net-pci,addr=5.3", "no function of virtio-net-pci is found on QEMU's PCI bus"),  # there is no function 0
    ],
)
def test_what_qemu_refuses_is_one_line_with_its_own_message(device: str, said: str, tmp_path: Path) -> None:
    with nothing_left(tmp_path) as more:
        assert said in failed(run("probe", f"qemu:{device}", **more), 1)


@pytest.mark.parametrize(
    ("device", "said"),
    [
        ("help", "help is no device, but asks QEMU for help"),
        ("virtio-net-pci,help", "qemu-system-x86_64 -device virtio-net-pci,help shows it"),
    ],
)
def test_qemus_help_is_no_device(device: str, said: str) -> None:
    assert said in failed(run("probe", f"qemu:{device}"), 2)


@pytest.mark.qemu
@pytest.mark.parametrize("seed", range(12))
def test_killed_at_any_moment_it_leaves_nothing(seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    number = chance.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
    with nothing_left(tmp_path) as more, beside("probe", "qemu:virtio-net-pci", **more) as process:
        try:
            until_it_listens(process)
            process.wait(chance.uniform(0, 0.6))
        except subprocess.TimeoutExpired:
            process.send_signal(number)
        said = process.communicate(timeout=LIMIT)[1]
    assert said in ("", "virtio: interrupted\n", "virtio: terminated\n")
