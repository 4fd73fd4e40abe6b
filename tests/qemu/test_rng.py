"""The driver of the entropy device, unchanged, over PCI, against QEMU's virtio-rng-pci."""

import pytest

from tests.qemu.conftest import How, Machines, at, only
from virtio import Feature, Features, TransportError
from virtio.devices.rng import RngDriver
from virtio.driver import RING_FEATURES
from virtio.transport.pci import PciTransport

pytestmark = pytest.mark.qemu

RNG = "virtio-rng-pci,disable-legacy=on"


def random_enough(data: bytes, count: int) -> None:
    assert len(data) == count
    assert len(set(data)) > min(count, 200) // 4, "bytes of an entropy device differ"


@pytest.mark.parametrize("interrupts", ["msix", "intx"])
@pytest.mark.parametrize("kind", ["q35", "pc"])
def test_bytes_come_over_both_boards_and_kinds_of_interrupts(
    machines: Machines, ring_format: str, ring_features: Features, kind: str, interrupts: How
) -> None:
    machine = machines(f"{RNG},packed=on", machine=kind)
    with only(machine, interrupts=interrupts) as transport, RngDriver(transport, wanted=ring_features) as rng:
        assert rng.requestq.ring_format == ring_format
        assert rng.memory is machine.memory
        for count in (1, 16, 4096, 5000):
            random_enough(rng.read(count), count)


@pytest.mark.parametrize("device", [RNG, "virtio-rng-pci", f"{RNG},iommu_platform=on,packed=on", f"{RNG},event_idx=off,indirect_desc=off"])
def test_whatever_features_a_device_offers(machines: Machines, device: str) -> None:
    with only(machines(device)) as transport, RngDriver(transport, wanted=RING_FEATURES | {Feature.ACCESS_PLATFORM}) as rng:
        assert (Feature.ACCESS_PLATFORM in rng.features) == ("iommu_platform" in device)
        assert (Feature.EVENT_IDX in rng.features) == ("event_idx=off" not in device)
        random_enough(rng.read(64), 64)


@pytest.mark.parametrize("vectors", [0, 1, 2, 5])
def test_with_any_number_of_vectors(machines: Machines, ring_features: Features, vectors: int) -> None:
    """One vector is shared by configuration and queue; none leaves the pin."""
    with only(machines(f"{RNG},packed=on,vectors={vectors}")) as transport, RngDriver(transport, wanted=ring_features) as rng:
        for _ in range(10):
            random_enough(rng.read(32), 32)


def test_no_vectors_cannot_be_had_as_msix(machines: Machines) -> None:
    machine = machines(f"{RNG},vectors=0")
    with pytest.raises(TransportError, match="MSI-X"):
        only(machine, interrupts="msix")
    with only(machine, interrupts="intx") as transport, RngDriver(transport) as rng:
        random_enough(rng.read(16), 16)


@pytest.mark.parametrize("interrupts", ["msix", "intx"])
def test_behind_bridges(machines: Machines, interrupts: How) -> None:
    machine = machines(
        "pcie-root-port,id=root1,chassis=1,addr=3",
        "x3130-upstream,id=up,bus=root1",
        "xio3130-downstream,id=down,bus=up,chassis=2",
        "pcie-pci-bridge,id=bridge1,bus=down",
        "virtio-rng-pci,bus=bridge1,addr=2",
        "pcie-root-port,id=root2,chassis=3,addr=4",
        f"{RNG},bus=root2",
    )
    addresses = [function.address for function in machine.functions()]
    assert addresses == ["0000:04:02.0", "0000:05:00.0"]
    for function in machine.functions():
        with at(machine, function.address, interrupts) as transport, RngDriver(transport) as rng:
            random_enough(rng.read(100), 100)


def test_two_devices_on_one_line_are_both_heard(machines: Machines) -> None:
    """Slots 4 and 8 of q35 share a line."""
    machine = machines(f"{RNG},addr=4", f"{RNG},addr=8")
    with (
        at(machine, "0000:00:04.0", "intx") as first,
        at(machine, "0000:00:08.0", "intx") as second,
        RngDriver(first) as one,
        RngDriver(second) as other,
    ):
        for _ in range(20):
            random_enough(one.read(32), 32)
            random_enough(other.read(32), 32)


def test_a_transport_may_follow_another(machines: Machines, ring_features: Features) -> None:
    machine = machines(f"{RNG},packed=on")
    (function,) = machine.functions()
    with PciTransport(function) as transport:
        for _ in range(3):
            with RngDriver(transport, wanted=ring_features) as rng:
                random_enough(rng.read(16), 16)
