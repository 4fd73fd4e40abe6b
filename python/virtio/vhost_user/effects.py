"""What a session asks its owner to do, in order. A descriptor in an effect belongs to whoever receives the effect."""

from dataclasses import dataclass

from virtio.errors import SpecViolation
from virtio.features import Features
from virtio.vhost_user.message import Config, DeviceStateTransfer, Inflight, Log, Region


@dataclass(frozen=True, slots=True)
class Effect:
    """Any of them."""


@dataclass(frozen=True, slots=True)
class CloseDescriptors(Effect):
    """Nobody wants these."""

    descriptors: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Refused(Effect):
    """The peer's message was refused; nothing changed."""

    error: SpecViolation


@dataclass(frozen=True, slots=True)
class Disconnect(Effect):
    """The connection cannot go on: close it."""

    error: SpecViolation


@dataclass(frozen=True, slots=True)
class SetOwner(Effect):
    """A front-end began its session."""


@dataclass(frozen=True, slots=True)
class SetFeatures(Effect):
    """The features that were accepted, without the bits of vhost-user itself; `log` says whether all writes are logged."""

    features: Features
    log: bool


@dataclass(frozen=True, slots=True)
class SetProtocolFeatures(Effect):
    """The protocol features that were accepted."""

    features: Features


@dataclass(frozen=True, slots=True)
class MapMemory(Effect):
    """This table replaces all memory: a descriptor for each region."""

    regions: tuple[Region, ...]
    descriptors: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class AddRegion(Effect):
    """Memory that is added."""

    region: Region
    descriptor: int


@dataclass(frozen=True, slots=True)
class RemoveRegion(Effect):
    """Memory that goes away."""

    region: Region


@dataclass(frozen=True, slots=True)
class SetVringNum(Effect):
    """A ring's size, in entries."""

    index: int
    size: int


@dataclass(frozen=True, slots=True)
class SetVringAddr(Effect):
    """Guest addresses of a ring's descriptor, driver and device area; `log` is where writes to the used ring are logged, if they are."""

    index: int
    areas: tuple[int, int, int]
    log: int | None


@dataclass(frozen=True, slots=True)
class SetVringBase(Effect):
    """Where a ring resumes: the avail index, or both positions if packed."""

    index: int
    base: int


@dataclass(frozen=True, slots=True)
class SetVringKick(Effect):
    """What wakes the back-end for a ring; None: poll."""

    index: int
    descriptor: int | None


@dataclass(frozen=True, slots=True)
class SetVringCall(Effect):
    """What the back-end signals when it used buffers; None: nothing."""

    index: int
    descriptor: int | None


@dataclass(frozen=True, slots=True)
class SetVringErr(Effect):
    """What the back-end signals when a ring breaks; None: nothing."""

    index: int
    descriptor: int | None


@dataclass(frozen=True, slots=True)
class SetVringEnable(Effect):
    """A ring is enabled or disabled."""

    index: int
    enabled: bool


@dataclass(frozen=True, slots=True)
class StopVring(Effect):
    """Stop a ring; the answer is its base. With `suspend` what is in flight may stay recorded in the in-flight area."""

    index: int
    suspend: bool = False


@dataclass(frozen=True, slots=True)
class BreakVring(Effect):
    """A ring lies outside the memory that is left: it breaks, the others go on."""

    index: int
    error: SpecViolation


@dataclass(frozen=True, slots=True)
class GetConfig(Effect):
    """Read the configuration; the answer is its bytes."""

    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class SetConfig(Effect):
    """Write the configuration; `migration` says that read-only fields may be written."""

    config: Config
    migration: bool


@dataclass(frozen=True, slots=True)
class SetLogBase(Effect):
    """The dirty log, and the file that it lies in."""

    log: Log
    descriptor: int


@dataclass(frozen=True, slots=True)
class SetLogFd(Effect):
    """What may be signalled when the log changed; None: nothing."""

    descriptor: int | None


@dataclass(frozen=True, slots=True)
class GetInflight(Effect):
    """Make an in-flight area for this many queues of this size; the answer is an `Inflight` and a descriptor."""

    wanted: Inflight


@dataclass(frozen=True, slots=True)
class SetInflight(Effect):
    """The in-flight area of an earlier back-end."""

    area: Inflight
    descriptor: int


@dataclass(frozen=True, slots=True)
class SetBackendChannel(Effect):
    """The socket for requests of the back-end."""

    descriptor: int


@dataclass(frozen=True, slots=True)
class ResetDevice(Effect):
    """Reset the device; all rings are stopped and disabled."""


@dataclass(frozen=True, slots=True)
class SetStatus(Effect):
    """The device status field was written (2.1)."""

    status: int


@dataclass(frozen=True, slots=True)
class GetStatus(Effect):
    """Read the device status field; the answer is its value."""


@dataclass(frozen=True, slots=True)
class SendRarp(Effect):
    """Tell the network where this address lives now."""

    mac: bytes


@dataclass(frozen=True, slots=True)
class SetMtu(Effect):
    """The MTU that the guest was told."""

    mtu: int


@dataclass(frozen=True, slots=True)
class TransferDeviceState(Effect):
    """Send or take the back-end's state over this descriptor."""

    transfer: DeviceStateTransfer
    descriptor: int


@dataclass(frozen=True, slots=True)
class CheckDeviceState(Effect):
    """Did the transfer succeed? The answer is 0, or not 0."""
