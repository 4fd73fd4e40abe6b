"""The memory table as a value, and the way from the front-end's addresses to the guest's. Bounds are those of device-23."""

from collections.abc import Iterable
from typing import Final

from virtio.errors import MalformedMessage
from virtio.spec import DESCRIPTOR_SIZE, EVENT_SUPPRESSION_SIZE, RING_HEADER_SIZE, USED_ELEMENT_SIZE
from virtio.vhost_user.message import Region

_ADDRESSES: Final = 1 << 64
_OFFSETS: Final = 1 << 63


def check_region(region: Region, file_size: int, others: Iterable[Region]) -> None:
    """MalformedMessage: no bytes, an address or offset that runs over, more than its file has, or an overlap with one of `others`."""
    for name, start in (("guest", region.guest), ("user", region.user)):
        if not region.size or start + region.size > _ADDRESSES:
            raise MalformedMessage(
                f"region of {region.size} bytes at {name} address {start:#x} runs over 2^64 or is empty", "memory regions"
            )
        for other in others:
            theirs = other.guest if name == "guest" else other.user
            if start < theirs + other.size and theirs < start + region.size:
                raise MalformedMessage(f"regions at {name} addresses {start:#x} and {theirs:#x} overlap", "memory regions")
    if region.offset + region.size > min(file_size, _OFFSETS):
        raise MalformedMessage(f"region ends at {region.offset + region.size} of a file of {file_size} bytes", "memory regions")


def translate(regions: Iterable[Region], user: int, length: int) -> int:
    """The guest address of `length` bytes that the front-end sees at `user`; they may go on in a region that follows on both sides.

    MalformedMessage: some of them are in no region.
    """
    ordered = sorted(regions, key=lambda region: region.user)
    guest = None
    at, end = user, user + length
    for region in ordered:
        if region.user <= at < region.user + region.size:
            here = region.guest + at - region.user
            if guest is None:
                guest = here
            elif here != guest + at - user:
                break
            at = region.user + region.size
            if at >= end:
                return guest
    raise MalformedMessage(f"{length} bytes at user address {user:#x} are not in the memory table", "SET_VRING_ADDR")


def area_lengths(size: int, packed: bool) -> tuple[int, int, int]:
    """Bytes of the descriptor, driver and device area of a ring of `size` entries, the event indexes included (2.7, 2.8)."""
    if packed:
        return DESCRIPTOR_SIZE * size, EVENT_SUPPRESSION_SIZE, EVENT_SUPPRESSION_SIZE
    return DESCRIPTOR_SIZE * size, RING_HEADER_SIZE + 2 * size + 2, RING_HEADER_SIZE + USED_ELEMENT_SIZE * size + 2
