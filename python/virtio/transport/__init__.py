"""What every transport is (4): the way from a driver to one device. It names no device type, and a device type names no transport."""

from collections.abc import Callable
from typing import Final, Protocol, runtime_checkable

from virtio import arguments
from virtio._core import EventFd, GuestMemory, Memory
from virtio.features import Features, describe
from virtio.spec import Feature, Status

Doorbell = EventFd
"""What a driver's queue rings when it has made buffers available, and the device wants to know (2.3)."""

CARRIED: Final = Features(
    {
        *range(24),  # the device type's own (2.2)
        *range(50, 128),
        42,
        Feature.INDIRECT_DESC,
        Feature.EVENT_IDX,
        Feature.VERSION_1,
        Feature.RING_PACKED,
        Feature.IN_ORDER,
        Feature.RING_RESET,
    }
)
"""Features that the two ends of this package implement over any transport."""

SPECIAL: Final = Features(
    {
        Feature.ACCESS_PLATFORM,
        Feature.ORDER_PLATFORM,
        Feature.SR_IOV,
        Feature.NOTIFICATION_DATA,
        Feature.NOTIF_CONFIG_DATA,
        Feature.ADMIN_VQ,
    }
)
"""Features of transports that have what they need: an IOMMU, a bus to order, registers to ring, a PCI function."""

NEVER: Final = Features(range(24, 50)) - CARRIED - SPECIAL
"""Bits that nobody here offers or accepts: reserved ones (2.2), the legacy interface's (6.3), and SUSPEND."""


def check_negotiable(features: Features) -> None:
    """ValueError: `features` has bits of `NEVER`."""
    if never := features & NEVER:
        bits = ", ".join(describe(bit) for bit in never)
        raise ValueError(f"{bits}: never negotiated here, being reserved (2.2), of the legacy interface (6.3), or not implemented")


class Transport(Protocol):
    """The way to one device. Whoever implements it translates: sequences, checks of order and waiting are the driver's.

    Every call may raise `TransportError` (the device is gone or does not answer), and `StatusError` once it is closed.

    A transport may have an attribute `memory`, a `Memory` or None: what its device reaches already, and a driver uses if it is given none;
    and `has_config`, false if the device's configuration cannot be read.
    """

    @property
    def device_id(self) -> int:
        """The device's type (5)."""

    @property
    def status(self) -> Status:
        """The device status field (2.1), read anew each time. Setting it writes it; 0 is not written here but by `reset`."""

    @status.setter
    def status(self, value: Status) -> None: ...

    @property
    def config_generation(self) -> int:
        """Changes whenever two reads of the configuration may see different versions of it (2.5)."""

    @property
    def config_interrupt(self) -> EventFd:
        """Signalled by configuration-change notifications (2.3)."""

    def offered(self) -> Features:
        """What the device offers, less what this transport does not carry."""

    def accept(self, features: Features) -> None:
        """Writes what the driver accepts (3.1.1 step 4)."""

    def reset(self) -> None:
        """Asks for a device reset (2.4). It is complete when `status` reads 0, which is the driver's to wait for."""

    def config_read(self, offset: int, length: int) -> bytes:
        """Reads the device's configuration (2.5), little-endian. ValueError: outside it."""

    def config_write(self, offset: int, data: bytes) -> None:
        """Writes the device's configuration (2.5). ValueError: outside it, or read-only."""

    def queue_max(self, index: int) -> int:
        """Most entries that queue `index` may have; 0 if there is no such queue."""

    def queue_setup(self, index: int, size: int, areas: tuple[int, int, int]) -> Doorbell:
        """Tells the device size and areas of a queue, and enables it. The doorbell must not be rung before DRIVER_OK (3.1.1)."""

    def queue_reset(self, index: int) -> None:
        """Resets one queue (2.6.1), which RING_RESET allows, and returns once the device has done so."""

    def interrupt(self, index: int) -> EventFd:
        """Signalled by used-buffer notifications of queue `index` (2.3)."""

    def attach(self, memory: Memory) -> int:
        """Lets the device reach `memory`; returns the address at which it sees the first byte."""

    def detach(self, memory: Memory) -> None:
        """Takes `memory` away from the device again. ValueError: it is not attached."""

    def close(self) -> None:
        """Resets the device, lets go of it, and closes the eventfds, `config_interrupt` first: whoever waits for one is woken.

        A driver that lives on is not told when it sends: what it makes available reaches nobody. Close it first. Closing twice is closing
        once.
        """


def check_transport(transport: Transport) -> None:
    """TypeError: it is none."""
    arguments.having("transport", transport, ("attach", "offered", "queue_setup"), "a transport, as LoopbackTransport(device)")


@runtime_checkable
class Alternating(Protocol):
    """A transport whose device lives in the driver's own thread, and runs when a driver would sleep."""

    def serve(self) -> int:
        """Runs the device as far as it goes without waiting; returns how many handlers it called. Their exceptions come through."""


class Resume(Protocol):
    """A queue's answer to where another device takes it over: `DriverQueue.resume`."""

    def __call__(self, *, tracked: bool) -> int:
        """The base, as vhost-user has it; `tracked`: somebody else knows what the device before had begun."""


@runtime_checkable
class Resuming(Protocol):
    """A transport whose device may end, and another take its place, while the driver's queues stay as they are."""

    on_resumed: Callable[[], object] | None
    """Called, in a thread of its own, when another device has taken the place. An exception makes it one that needs a reset."""

    def queue_resumes(self, index: int, resume: Resume) -> None:
        """Keeps what to ask for queue `index`, which was set up just now."""


FIRST_ADDRESS: Final = 1 << 32
"""Where a device in this process sees the first memory: far from 0, so that an offset taken for an address is noticed."""

ADDRESS_STEP: Final = 1 << 30
"""Memories begin at multiples of this, with a gap between them."""


class Attachments:
    """A driver's memories in what a device in this process reaches, `guest`: `attach` and `detach` of its transport."""

    def __init__(self, guest: GuestMemory) -> None:
        self._guest = guest
        self._memories: list[tuple[Memory, int]] = []
        self._next_address = FIRST_ADDRESS

    def attach(self, memory: Memory) -> int:
        """Maps `memory` into the device's; returns its address there. ValueError: it is attached already."""
        if any(known is memory for known, _ in self._memories):
            raise ValueError("the memory is attached already")
        address = self._next_address
        self._guest.add(address, memory)
        self._memories.append((memory, address))
        self._next_address += (memory.size // ADDRESS_STEP + 2) * ADDRESS_STEP
        return address

    def detach(self, memory: Memory) -> None:
        """Takes `memory` out of the device's again. ValueError: it is not attached."""
        for place, (known, address) in enumerate(self._memories):
            if known is memory:
                self._guest.remove(address)
                del self._memories[place]
                return
        raise ValueError("the memory is not attached")

    def clear(self) -> None:
        """Takes all of them out."""
        for _, address in self._memories:
            self._guest.remove(address)
        self._memories.clear()
