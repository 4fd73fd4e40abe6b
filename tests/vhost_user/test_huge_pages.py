"""Memory on huge pages over vhost-user: a machine's whose rings our device serves, and our driver's own."""

import mmap
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vhost_user.frontend import GUEST, USER, Frontend
from tests.vhost_user.serving import PATIENCE, Serving
from virtio import DeviceId, Memory, NetDevice, NetDriver
from virtio.devices.rng import RngDevice, RngDriver
from virtio.features import Features
from virtio.transport.vhost_user import VhostUserTransport
from virtio.vhost_user import message as wire
from virtio.vhost_user.backend import Backend
from virtio.vhost_user.message import FrontendRequest as F
from virtio.vhost_user.message import Region

PAGE = 2 << 20
PAGES = 4
SYSTEM = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")
RESERVED, FREE = SYSTEM / "nr_hugepages", SYSTEM / "free_hugepages"


@pytest.fixture(scope="module", autouse=True)
def _huge_pages() -> Iterator[None]:
    """Reserves what is missing, and puts the number back."""
    before, missing = int(RESERVED.read_text()), PAGES - int(FREE.read_text())
    if missing > 0:
        try:
            RESERVED.write_text(str(before + missing))
        except PermissionError:
            pytest.fail(f"{PAGES} huge pages are wanted, and only root may reserve them: echo {before + missing} > {RESERVED}")
    try:
        assert int(FREE.read_text()) >= PAGES, "the machine has no memory left in pieces of 2 MiB"
        yield
    finally:
        if missing > 0:
            RESERVED.write_text(str(before))


class Machine(Frontend):
    """Its memory is a file of two huge pages, of which the second is passed."""

    def give_memory(self) -> None:
        """Before the memory table."""
        self.file = os.memfd_create("guest", os.MFD_HUGETLB | os.MFD_HUGE_2MB)
        os.ftruncate(self.file, 2 * PAGE)
        self.memory.close()
        self.memory = Memory.from_fd(self.file, PAGE, offset=PAGE)

    def map(self, regions: list[Region]) -> None:
        """As huge as it is."""
        assert not self.refused(F.SET_MEM_TABLE, wire.Regions([Region(GUEST, PAGE, USER, PAGE)]), [self.file])

    def close(self) -> None:
        super().close()
        os.close(self.file)


@pytest.mark.parametrize("poll", [False, True], ids=["asleep", "polling"])
def test_a_machines_memory_lies_on_huge_pages(path: str, ring_features: Features, poll: bool) -> None:
    with Backend(path, RngDevice(lambda count: b"\x5a" * count), poll=poll) as backend, Machine.at(path, backend) as machine:
        machine.give_memory()
        machine.negotiate(ring_features)
        queue = machine.queue(0)
        machine.start(queue)
        for _ in range(50):
            place = machine.room(4096)
            queue.add(None, writable=[place])
            queue.publish()
            machine.kicks[0].signal()
            machine.turn()
            assert queue.pop_used() == [(None, 4096)]
            assert machine.look(place, 4096) == b"\x5a" * 4096
        assert len(re.findall(r"KernelPageSize: +2048 kB", Path("/proc/self/smaps").read_text())) == 2  # each end's mapping of that page
        # A file of such pages that is truncated, and a region that ends within a page.
        assert machine.refused(F.SET_MEM_TABLE, wire.Regions([Region(GUEST, PAGE, USER, PAGE + mmap.PAGESIZE)]), [machine.file])
        queue.add(None, writable=[machine.room(16)])
        queue.publish()
        os.ftruncate(machine.file, 0)
        machine.kicks[0].signal()
        machine.turn()
        assert machine.errors[0].drain() and backend.connections == 1


def test_our_drivers_memory_lies_on_huge_pages(path: str, ring_features: Features) -> None:
    with (
        Memory(PAGE, huge_page_size=PAGE) as memory,
        Serving(path, "rng"),
        VhostUserTransport(path, DeviceId.ENTROPY, timeout=PATIENCE) as transport,
        RngDriver(transport, memory=memory, wanted=ring_features) as rng,
    ):
        assert b"".join(rng.read(100) for _ in range(30)) == bytes(number % 251 for number in range(3000))


def test_our_network_drivers_memory_lies_on_huge_pages(path: str, ring_features: Features) -> None:
    offered = [int(bit) for bit in NetDevice.features | ring_features]
    with (
        Memory(PAGE, huge_page_size=PAGE) as memory,
        Serving(path, "net", offered=offered) as serving,
        VhostUserTransport(path, DeviceId.NETWORK, timeout=PATIENCE) as transport,
        NetDriver(transport, memory=memory, slots=256, wanted=ring_features, queue_size=64) as net,
    ):
        for life in range(2):  # the second with a back-end that has taken over
            for number in range(100):
                frame = bytes([life, number]) * 300
                assert net.send_frames([frame]) == 1
                got: list[bytes] = []
                while frame not in got:
                    assert net.wait(PATIENCE)
                    got += net.receive_frames()
                assert got[-1] == frame and len(got) <= 1 + life  # the last one before the kill may be repeated
            if not life:
                serving.kill()
                serving.start()
