"""Linux's own virtio_net, in QEMU, on our device, whose frames go to a TAP. A guest is booted once for the tests that can share it."""

from collections.abc import Iterator
from time import monotonic, sleep

import pytest

from tests.guest.far import Far, device_for
from tests.guest.machines import Machine
from virtio import Feature
from virtio.cli.initrd import Kernel
from virtio.features import Features

pytestmark = pytest.mark.guest
MIB = 1 << 20


@pytest.fixture(scope="module", params=["split", "packed"])
def rings(request: pytest.FixtureRequest) -> Features:
    return Features({Feature.VERSION_1, Feature.RING_PACKED} if request.param == "packed" else {Feature.VERSION_1})


@pytest.fixture(scope="module")
def served(rings: Features, kernel: Kernel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Far, Machine]]:
    """A guest that is up, and stays up from test to test; memory may be added to it."""
    path = str(tmp_path_factory.mktemp("guest") / "net")
    card = ",packed=on" if Feature.RING_PACKED in rings else ""
    with Far(path, device_for(rings)) as far, Machine(kernel, path, card=card, memory="128M,slots=2,maxmem=1G") as machine:
        machine.boot()
        yield far, machine
        assert not far.errors


@pytest.fixture
def far(served: tuple[Far, Machine]) -> Far:
    return served[0]


@pytest.fixture
def machine(served: tuple[Far, Machine]) -> Machine:
    return served[1]


def test_ping_in_the_format_that_was_asked_for(far: Far, machine: Machine, rings: Features) -> None:
    machine.ping(5, "-s 1200")
    queues = [far.device.queue(index) for index in (0, 1)]
    wanted = "packed" if Feature.RING_PACKED in rings else "split"
    assert [queue.ring_format for queue in queues if queue is not None] == [wanted] * 2


def test_iperf3_both_ways(far: Far, machine: Machine) -> None:
    with far.iperf3():
        assert machine.iperf3(2) > 0
        assert machine.iperf3(2, "-R") > 0
    counted = far.peer.statistics
    assert counted["receive"]["bytes"] > MIB and counted["transmit"]["bytes"] > MIB
    assert max(queue.counters["suppressed"] for index in (0, 1) if (queue := far.device.queue(index)) is not None) > 0


def test_the_drivers_module_is_loaded_again(far: Far, machine: Machine) -> None:
    for _ in range(3):
        machine.read("rmmod virtio_net && insmod /modules/virtio_net.ko")
        machine.up()
        machine.ping()


def test_memory_is_added_under_load(far: Far, machine: Machine) -> None:
    before = int(machine.read("awk '/MemTotal/ {print $2}' /proc/meminfo"))
    had = sum(length for _, length in far.device.memory.regions)
    machine.read("echo online > /sys/devices/system/memory/auto_online_blocks")
    with far.iperf3():
        machine.read("iperf3 -c 192.0.2.2 -t 6 >/tmp/stream & sleep 1")
        machine.qmp("object_add", qom_type="memory-backend-memfd", id="more", size=128 * MIB, share=True)
        machine.qmp("device_add", driver="pc-dimm", id="dimm0", memdev="more")
        deadline = monotonic() + 60
        while int(machine.read("awk '/MemTotal/ {print $2}' /proc/meminfo")) < before + 100 * 1024:
            assert monotonic() < deadline, machine.read("dmesg | tail -20")
            sleep(0.1)
        assert machine.run("wait %1", limit=60)[0] == 0, machine.read("cat /tmp/stream")
        assert sum(length for _, length in far.device.memory.regions) == had + 128 * MIB
        # Buffers come from the new memory, once the old is full: 128 MiB do not hold this.
        machine.read("mkdir /tmp/more && mount -t tmpfs -o size=200m none /tmp/more && dd if=/dev/zero of=/tmp/more/fill bs=1M count=140")
        assert machine.iperf3(1, "-R") > 0
        machine.ping()
        machine.read("umount /tmp/more")


def test_the_guest_reboots(far: Far, machine: Machine) -> None:
    for _ in range(2):
        machine.run("reboot -f", limit=90, rebooting=True)
        machine.up()
        machine.ping()
