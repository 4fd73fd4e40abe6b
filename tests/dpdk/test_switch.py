"""Frames between two drivers of ours through Open vSwitch with DPDK, and through a logical switch of OVN's."""

import re
import shlex
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.dpdk.switch import LIMIT, Ovn, Switch
from tests.dpdk.traffic import OURS, THEIRS
from virtio import DeviceId, Feature, NetDriver
from virtio.devices.net import GUEST_OFFLOADS, WANTED, NetFeature
from virtio.features import Features
from virtio.transport.vhost_user import VhostUserTransport

pytestmark = pytest.mark.dpdk

HELLO = b"\x88\xb5" + b"hello".ljust(46, b"\0")
SPLIT, PACKED = WANTED - {Feature.RING_PACKED}, WANTED | {Feature.IN_ORDER}


def meet(near: NetDriver, far: NetDriver) -> None:
    """Until a frame of each has come to the other: a port that was connected just now drops what comes too early. More may come later."""
    end = time.monotonic() + LIMIT
    for one, other, addresses in ((near, far, THEIRS + OURS), (far, near, OURS + THEIRS)):
        hello = addresses + HELLO
        while hello not in other.receive_frames(256):
            assert time.monotonic() < end, "no frame comes through"
            one.send_frames([hello])
            other.wait(0.05)


def exchange(near: NetDriver, far: NetDriver, count: int = 200) -> None:
    """Numbered frames of many lengths each way, few at a time: every one comes, whole and in order."""
    meet(near, far)
    for one, other, addresses in ((near, far, THEIRS + OURS), (far, near, OURS + THEIRS)):
        frames = [addresses + b"\x88\xb5" + number.to_bytes(4, "big") * (12 + number % 340) for number in range(count)]
        got: list[bytes] = []
        for start in range(0, count, 20):
            assert one.send_frames(frames[start : start + 20]) == 20
            end = time.monotonic() + LIMIT
            while len(got) < start + 20:
                assert time.monotonic() < end, f"{len(got)} of {start + 20} frames came"
                other.wait(0.1)
                got += [frame for frame in other.receive_frames(256) if not frame.endswith(HELLO)]
        assert got == frames


def drivers(stack: ExitStack, *paths: tuple[str, bool, Features]) -> list[NetDriver]:
    """A driver at each path, listening there or connecting to it, with these wishes."""
    transports = [
        stack.enter_context(VhostUserTransport(path, DeviceId.NETWORK, listen=listen, timeout=LIMIT, connect_timeout=LIMIT))
        for path, listen, _ in paths
    ]
    return [stack.enter_context(NetDriver(transport, wanted=wanted)) for transport, (*_, wanted) in zip(transports, paths, strict=True)]


@pytest.mark.parametrize(
    "wanted", [SPLIT, PACKED, SPLIT - {NetFeature.MRG_RXBUF} - GUEST_OFFLOADS], ids=["split", "packed in order", "not mergeable"]
)
def test_frames_pass_a_switch_that_listens_and_connects(wanted: Features) -> None:
    with Switch() as switch, ExitStack() as stack:
        listening = switch.add_port("p0", listens=True)
        connecting = switch.add_port("p1", listens=False)
        near, far = drivers(stack, (listening, False, wanted), (connecting, True, wanted))
        assert near.features & {Feature.RING_PACKED, Feature.IN_ORDER, NetFeature.MRG_RXBUF} == wanted & {
            *(Feature.RING_PACKED, Feature.IN_ORDER, NetFeature.MRG_RXBUF)
        }
        exchange(near, far)
        near.restart()
        exchange(near, far)


def test_frames_pass_a_logical_switch_of_ovn() -> None:
    with Ovn() as ovn, ExitStack() as stack:
        near, far = drivers(
            stack,
            (ovn.add_logical_port("lp0", OURS.hex(":")), False, PACKED),
            (ovn.add_logical_port("lp1", THEIRS.hex(":")), False, SPLIT),
        )
        exchange(near, far)


def test_the_recipe_of_the_documents() -> None:
    """Its commands and its program as they stand there; the switch and its folder are this test's."""
    recipe = (Path(__file__).parents[2] / "docs/serving.md").read_text().partition("\n## Open vSwitch\n")[2].partition("\n## ")[0]
    ports = re.findall(r"^    ovs-vsctl (add-port .*)$", recipe, flags=re.MULTILINE)
    [program] = re.findall(r"^```python\n(.*?)^```$", recipe, flags=re.MULTILINE | re.DOTALL)
    assert len(ports) == 2
    with Switch() as switch:

        def here(text: str) -> str:
            for folder in ("/run/openvswitch/", "/run/"):
                text = text.replace(folder, f"{switch.folder}/")
            return text

        for port in ports:
            switch.control(*shlex.split(here(port)))
        done = subprocess.run([sys.executable, "-c", here(program)], capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0 and done.stdout == "60 bytes came through the switch\n", done.stdout + done.stderr
