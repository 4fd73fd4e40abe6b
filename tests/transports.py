"""The transports that need nothing but this process, for tests that hold over any of them."""

from virtio.device import Device
from virtio.pci.emulated import EmulatedFunction
from virtio.transport.loopback import LoopbackTransport
from virtio.transport.pci import PciTransport

KINDS = ["loopback", "pci"]


class EmulatedPci(PciTransport):
    """PCI to a device in this process."""

    def __init__(self, device: Device) -> None:
        self.device = device
        super().__init__(EmulatedFunction(device))


AnyTransport = LoopbackTransport | EmulatedPci


def over(kind: str, device: Device) -> AnyTransport:
    """A transport of this kind to `device`."""
    return LoopbackTransport(device) if kind == "loopback" else EmulatedPci(device)
