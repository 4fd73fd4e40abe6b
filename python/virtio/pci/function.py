"""What a PCI function is to us: configuration space, BARs, interrupts as eventfds, and memory that its device reaches.

Nothing here knows virtio. `virtio.transport.pci.PciTransport` drives any function that has what stands here, wherever its device is.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from virtio import arguments
from virtio._core import EventFd, Memory

BarKind = Literal["memory32", "memory64", "io"]
"""A BAR's address space: memory below 4 GiB, memory anywhere (two registers), or I/O ports."""


@dataclass(frozen=True, slots=True)
class Bar:
    """A base address register that has an address and decodes it. `address` and `size` are in bytes; `index` is 0 to 5."""

    index: int
    address: int
    size: int
    kind: BarKind
    prefetchable: bool


class PciFunction(Protocol):
    """One function of a PCI device, found, assigned and ours alone.

    Numbers are plain and unsigned, little-endian on the bus; `width` is 1, 2 or 4 bytes and each access is one of exactly that width. A
    device that was removed reads as all ones. Any call may raise `TransportError` (the way to the device is gone), and `StatusError` once
    the function is closed; ValueError is a caller's: an offset that is not a multiple of `width`, or outside configuration space or the
    BAR, a value wider than `width`, a BAR that is not there.

    A function may have an attribute `gone`: true once its device has ended for good, and writes to no memory any more.
    """

    @property
    def address(self) -> str:
        """Where it is: `0000:00:04.0`."""

    @property
    def bars(self) -> Mapping[int, Bar]:
        """The BARs that have an address and decode it, by index. A 64-bit one counts once, under the lower index."""

    @property
    def memory(self) -> Memory | None:
        """Memory that the device reaches already, and drivers are to use; None if any memory may be attached."""

    @property
    def access_platform(self) -> bool:
        """Whether `attach` gives platform addresses, translated by what translates for the device, so that ACCESS_PLATFORM is kept."""

    def config_read(self, offset: int, width: int) -> int:
        """Reads configuration space: `offset` 0 to 255, or to 4095 with extended configuration space."""

    def config_write(self, offset: int, width: int, value: int) -> None:
        """Writes configuration space. Writes to read-only registers do nothing."""

    def bar_read(self, bar: int, offset: int, width: int) -> int:
        """Reads a register in BAR `bar`, `offset` bytes from its beginning."""

    def bar_write(self, bar: int, offset: int, width: int, value: int) -> None:
        """Writes a register in BAR `bar`; a read that follows sees what the write did."""

    def doorbell(self, bar: int, offset: int, width: int, value: int) -> EventFd:
        """An eventfd whose signal is that store to that register, soon. Asked twice for one store, it is one eventfd.

        It is the function's own, and stays until `close`.
        """

    def enable_msix(self, count: int) -> list[EventFd]:
        """Enables MSI-X, with table entries 0 to `count` - 1 programmed and unmasked; the n-th eventfd is signalled by vector n.

        They are the function's own, and stay until `disable_interrupts`. TransportError: it has no such capability, or fewer vectors, or
        they cannot be had; all interrupts are disabled then. StatusError: interrupts are enabled.
        """

    def mask_vector(self, index: int, masked: bool) -> None:
        """Masks or unmasks one enabled MSI-X vector; what was pending is signalled at unmasking. ValueError: not an enabled vector."""

    def enable_intx(self, handler: Callable[[], None]) -> None:
        """Enables the interrupt pin. `handler` is called while the line is high, in a thread of the function's, and has to lower it.

        An exception of the handler's ends the calls. TransportError: there is no pin. StatusError: interrupts are enabled.
        """

    def disable_interrupts(self) -> None:
        """Disables MSI-X or the pin, and returns once no handler runs any more; not called from a handler. Again does nothing."""

    def attach(self, memory: Memory) -> int:
        """Lets the device reach `memory` (bus mastering is on from then on); returns the address at which it sees the first byte.

        ValueError: it is attached already. TransportError: it cannot be reached.
        """

    def detach(self, memory: Memory) -> None:
        """Takes `memory` away from the device again. ValueError: it is not attached."""

    def close(self) -> None:
        """Disables interrupts, takes all memory away, and lets go of the function. Closing twice is closing once."""


def check_function(function: PciFunction) -> None:
    """TypeError: it is none."""
    methods = ("config_read", "bar_read", "enable_msix", "attach")
    arguments.having("function", function, methods, "a PciFunction, as EmulatedFunction(device)")
