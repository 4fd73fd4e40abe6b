"""What can go wrong, by whose fault.

The peer's: `SpecViolation` and its kinds, `DeviceNeedsReset`, `TransportError`. The caller's: `StatusError`, `QueueFull`, and Python's own
`ValueError` and `TypeError`. Nobody's in particular: `FeatureNegotiationError`. The Rust core raises these same classes.
"""

from collections.abc import Set as AbstractSet


class VirtioError(Exception):
    """Root of everything that this package raises, apart from `ValueError`, `TypeError`, `BufferError` and `OSError`."""


class SpecViolation(VirtioError):
    """The peer broke a rule of the specification; the queue or session that met it is broken until it is reset.

    This class itself stands for what has no kind of its own, such as memory that its owner truncated.
    `message` carries the numbers, `section` the section of VIRTIO 1.4 (or the name of the vhost-user message) that was broken.
    """

    def __init__(self, message: str, section: str) -> None:
        super().__init__(message, section)
        self.message = message
        self.section = section

    def __str__(self) -> str:
        return f"{self.message} ({self.section})"


class MalformedChain(SpecViolation):
    """A driver made available a descriptor chain that no device may use (2.7.5, 2.8.6)."""


class BadUsedElement(SpecViolation):
    """A device used a buffer that it does not have, or more of them than there are (2.7.8.2, 2.8.22)."""


class MalformedMessage(SpecViolation):
    """A request or message that the peer may not send in this form."""


class DeviceNeedsReset(VirtioError):
    """The device set NEEDS_RESET (2.1.2): nothing completes until the driver has reset it."""


class TransportError(VirtioError):
    """The transport failed: the device is gone, does not answer in time, or answers what its transport forbids."""


class FeatureNegotiationError(VirtioError):
    """The two ends could not agree on features (2.2). The message names each bit and the reason.

    `offered` is what the device offered; `missing` are the bits in dispute. Both are sets of bit numbers (`Features`).
    """

    def __init__(self, message: str, offered: AbstractSet[int], missing: AbstractSet[int]) -> None:
        super().__init__(message, offered, missing)
        self.message = message
        self.offered = offered
        self.missing = missing

    def __str__(self) -> str:
        return self.message


class StatusError(VirtioError):
    """A step out of order (3.1), or use of something that is closed or belongs to another process."""


class QueueFull(VirtioError):
    """No room in the queue, raised only where no count can say so."""
