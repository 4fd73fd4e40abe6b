"""User-Mode Linux with a TAP at the far end: its link up and down, its MTU, and a back-end that vanishes."""

from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.guest.far import FAR, NEAR, Far, device_for
from tests.guest.test_killed import back_end
from virtio import Feature
from virtio.cli.guest import Guest, uml_guest
from virtio.features import Features
from virtio.netdev import Namespace
from virtio.spec import DeviceId

pytestmark = pytest.mark.uml


def up(guest: Guest) -> None:
    guest.read(f"ip link set eth0 up && ip addr replace {NEAR}/24 dev eth0")


def ping(guest: Guest, *words: str) -> bool:
    return guest.run(f"ping -n -c 3 -i 0.2 -W 5 -w 20 {' '.join(words)} {FAR}")[0] == 0


def test_the_link_and_the_mtu_are_set_while_frames_pass(tmp_path: Path, ring_features: Features) -> None:
    path = str(tmp_path / "net")
    with Far(path, device_for(ring_features, mtu=9000)) as far, uml_guest(tmp_path, {path: DeviceId.NETWORK}) as guest:
        guest.wait_ready()
        up(guest)
        assert guest.read("cat /sys/class/net/eth0/mtu") == "9000"
        assert ping(guest, "-M do -s 8972")
        guest.read(f"ping -n -i 0.05 {FAR} >/tmp/pings & sleep 0")
        for mtu in (1400, 68, 576, 9000):
            guest.read(f"ip link set eth0 mtu {mtu}")
            assert ping(guest, f"-M do -s {min(mtu, 1500) - 28}")
            assert not ping(guest, f"-M do -s {mtu - 27}")
        for _ in range(3):
            guest.read("ip link set eth0 down")
            assert not ping(guest, "-c 1")
            up(guest)
            assert ping(guest)
        with far.iperf3():
            for way in ("", "-R"):
                guest.read(f"iperf3 -c {FAR} -t 1 {way}")
        assert not far.errors


def test_linux_without_its_back_end_has_no_card_and_goes_on(tmp_path: Path) -> None:
    """Its driver takes the device away, and never connects again: who starts the back-end anew starts Linux anew."""
    path = str(tmp_path / "net")
    rings = Features({Feature.VERSION_1})
    with Namespace() as namespace, ExitStack() as running:
        running.enter_context(back_end(path, namespace, rings))
        with uml_guest(tmp_path, {path: DeviceId.NETWORK}) as guest:
            guest.wait_ready()
            up(guest)
            guest.read(f"ping -n -i 0.05 {FAR} >/tmp/pings & sleep 0.3")
            running.close()  # by SIGKILL
            guest.read("until ! [ -e /sys/class/net/eth0 ]; do sleep 0.1; done")
            running.enter_context(back_end(path, namespace, rings))
            assert guest.read("ls /sys/class/net") == "lo"
        with uml_guest(tmp_path, {path: DeviceId.NETWORK}) as guest:
            guest.wait_ready()
            up(guest)
            assert ping(guest)


def test_linux_starts_with_the_library_for_amx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpuinfo").write_text("flags\t\t: amx_tile\n")
    monkeypatch.setattr("virtio.cli.guest.CPUINFO", tmp_path / "cpuinfo")
    with uml_guest(tmp_path, {}) as guest:
        guest.wait_ready()
        assert guest.read("echo $((6 * 7))") == "42"
