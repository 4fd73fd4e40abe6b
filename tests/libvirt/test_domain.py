"""libvirt starts a domain whose network card is `virtio serve`'s: the recipe of docs/serving.md."""

import re
import shutil
import subprocess
from pathlib import Path
from time import monotonic, sleep

import pytest

from tests.cli.serving import serving
from tests.guest.far import FAR, NEAR
from tests.libvirt.daemon import PATIENCE, Libvirt
from virtio.cli.initrd import Kernel, find_kernel, make_initrd
from virtio.cli.output import CommandError
from virtio.netdev import Namespace

pytestmark = pytest.mark.libvirt
ROOT = Path(__file__).parents[2]
MAC = "52:54:00:12:34:56"
DOMAIN = """
<domain type='qemu'>
  <name>served</name>
  <memory unit='MiB'>256</memory>
  {memory}
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
    <kernel>{kernel}</kernel><initrd>{initrd}</initrd><cmdline>console=ttyS0 quiet panic=-1</cmdline>
  </os>
  <features><acpi/></features>
  <on_poweroff>destroy</on_poweroff><on_reboot>destroy</on_reboot><on_crash>destroy</on_crash>
  <devices>
    <emulator>{emulator}</emulator>
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
    <serial type='file'><source path='{console}'/></serial>
    {interface}
  </devices>
</domain>
"""
SCRIPT = f"""
exec >/dev/ttyS0 2>&1
echo the address is $(cat /sys/class/net/eth0/address)
ip link set eth0 up; ip addr add {NEAR}/24 dev eth0
ping -n -c 3 -i 0.2 -W 10 {FAR}
echo the first script ended
while ! ping -n -c 1 -W 1 {FAR} | grep -q "from {FAR}: .*ttl"; do sleep 0.2; done  # until who serves us has been away
while ping -n -c 1 -W 1 {FAR} >/dev/null; do sleep 0.2; done
echo it is away
while ! ping -n -c 1 -W 1 {FAR} >/dev/null; do sleep 0.2; done
echo it is back
poweroff -f
"""


@pytest.fixture(scope="module")
def kernel() -> Kernel:
    try:
        return find_kernel()
    except CommandError as error:
        pytest.fail(f"{error}: run scripts/libvirt.sh, or `make libvirt-tools`")


def recipe(name: str) -> str:
    """An element of the domain, as docs/serving.md has it."""
    text = (ROOT / "docs/serving.md").read_text()
    found = re.search(rf"^ +<{name}\b.*?</{name}>$", text, flags=re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[0]


def test_a_domain_pings_through_the_card_that_we_serve_and_goes_on_with_the_next_server(kernel: Kernel, tmp_path: Path) -> None:
    path, console, initrd = tmp_path / "vm.sock", tmp_path / "console", tmp_path / "initrd"
    initrd.write_bytes(make_initrd(kernel, SCRIPT))
    interface = recipe("interface").replace("/run/vm.sock", str(path))
    assert str(path) in interface and MAC in interface
    emulator = shutil.which("qemu-system-x86_64")
    places = {"kernel": kernel.image, "initrd": initrd, "console": console, "emulator": emulator}
    (tmp_path / "domain.xml").write_text(DOMAIN.format(memory=recipe("memoryBacking"), interface=interface, **places))

    def said(what: str) -> None:
        deadline = monotonic() + 2 * PATIENCE
        while what not in (text := console.read_text() if console.exists() else ""):
            assert monotonic() < deadline, text
            sleep(0.1)

    words = ("net", "--socket-path", str(path), "--tap", "tap0")
    with Namespace() as namespace, Libvirt(tmp_path) as libvirt:
        with serving(*words, namespace=namespace) as served:
            address(namespace)
            libvirt.virsh("create", str(tmp_path / "domain.xml"))
            said("the first script ended")
            text = console.read_text()
            assert f"the address is {MAC}" in text and "3 received" in text, text
            assert served.until("counters", received_frames=3)["devices"][0]["live"]
            served.process.kill()
            served.process.wait()
        said("it is away")
        with serving(*words, namespace=namespace) as served:
            address(namespace)
            assert served.until("connected")["connections"] == 1
            said("it is back")
            served.until("disconnected")
            served.end()
        deadline = monotonic() + PATIENCE
        while libvirt.virsh("list", "--all", "--name").strip():
            assert monotonic() < deadline, "the domain does not end"
            sleep(0.1)


def address(namespace: Namespace) -> None:
    with namespace.entered():
        subprocess.run(["ip", "addr", "add", f"{FAR}/24", "dev", "tap0"], check=True)
