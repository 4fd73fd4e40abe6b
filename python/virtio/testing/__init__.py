"""Raw rings: the far end of a virtqueue, written by hand.

For people who test hypervisors, firmware and drivers, and for this project's own hostile tests. Nothing here checks anything: every
descriptor, element, index, flag and event field can be read and written at any moment, by either side, legal or not. Beside that stand
helpers for legal steps, so that a test spells out only the step that is wrong.

    memory = Memory(1 << 20)
    guest = GuestMemory()
    guest.add(0x10000, memory)
    ring = RawSplitDriver(memory, 8, address=0x10000)          # areas allocated in `memory`, zeroed
    queue = DeviceQueue(guest, 8, ring.areas)
    ring.set_descriptor(0, 0x10000, 64, DescriptorFlag.NEXT, next=0)   # a loop
    ring.make_available(0)
    queue.pop()                                                # MalformedChain

The other way round, `RawSplitDevice(memory, queue.size, queue.areas, address=base)` is the device that a `DriverQueue` talks to. The packed
format has the same pair. No notification is sent: signal the `EventFd` of your choice.

`RawPciFunction` is a PCI function of the same kind: any byte, any answer, alone or in front of a legal one.
"""

from virtio.testing.packed import PackedDescriptor, PackedEvent, RawPackedDevice, RawPackedDriver
from virtio.testing.pci import Access, RawPciFunction
from virtio.testing.raw import Segment, Window
from virtio.testing.split import RawSplitDevice, RawSplitDriver, SplitDescriptor

__all__ = [
    "Access",
    "PackedDescriptor",
    "PackedEvent",
    "RawPackedDevice",
    "RawPackedDriver",
    "RawPciFunction",
    "RawSplitDevice",
    "RawSplitDriver",
    "Segment",
    "SplitDescriptor",
    "Window",
]
