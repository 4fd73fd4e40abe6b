"""What a back-end has to know of the driver, in the order in which it is told: once, and whole again to one that takes its place.

Where a ring resumes is for its driver's queue to say. With an in-flight area the back-end itself takes up what it had begun; without one
all that was not used is made available again from the used position on, in order, so that nothing is lost, and something may be done twice.
"""

import os
from dataclasses import dataclass
from typing import Final

from virtio._core import EventFd, Memory
from virtio.errors import FeatureNegotiationError, StatusError, TransportError
from virtio.features import Features
from virtio.spec import Feature, Status
from virtio.transport import ADDRESS_STEP, FIRST_ADDRESS, Resume
from virtio.vhost_user import message as wire
from virtio.vhost_user.frontend import Frontend
from virtio.vhost_user.message import FrontendRequest, ProtocolFeature

_F, _P = FrontendRequest, ProtocolFeature
SPLIT_START: Final = 0
"""Base of a split ring that no device had yet."""
PACKED_START: Final = 0x8000_8000
"""Base of such a packed ring: both positions 0, both wrap counters 1."""


@dataclass
class Ring:
    """A queue as the back-end is told of it, and its three eventfds."""

    index: int
    size: int
    areas: tuple[int, int, int]
    kick: EventFd
    call: EventFd
    error: EventFd
    resume: Resume | None = None
    """Tells the base at which another device takes the ring over."""
    began: bool = False
    """Whether a device has had it."""


class Setup:
    """The state of one device, as far as its driver made it: memories, features, status, rings, in-flight area."""

    def __init__(self) -> None:
        self.features: Features | None = None
        self.status = Status(0)
        self.rings: dict[int, Ring] = {}
        self._memories: list[tuple[Memory, int]] = []
        self._next_address = FIRST_ADDRESS
        self._told = False
        self._area: tuple[wire.Inflight, int] | None = None

    @property
    def live(self) -> bool:
        """Whether the rings are to run."""
        return Status.DRIVER_OK in self.status

    @property
    def packed(self) -> bool:
        """Whether the rings are."""
        return self.features is not None and Feature.RING_PACKED in self.features

    @property
    def tracked(self) -> bool:
        """Whether there is an in-flight area."""
        return self._area is not None

    def tracked_size(self, index: int) -> int | None:
        """Entries of ring `index` that the in-flight area has room for; None: the ring is not in it."""
        return None if self._area is None or index >= self._area[0].queues else self._area[0].queue_size

    def disconnected(self) -> None:
        """The next back-end knows nothing of what the one before was told."""
        self._told = False

    # Memory.

    def attach(self, memory: Memory, frontend: Frontend | None) -> int:
        """Gives `memory` addresses, the same to the guest's eyes and to ours. ValueError: it has some. TransportError: no room for it."""
        if any(known is memory for known, _ in self._memories):
            raise ValueError("the memory is attached already")
        address = self._next_address
        if frontend is not None and len(self._memories) >= self._most(frontend):
            raise TransportError(f"the back-end takes {self._most(frontend)} memories, and has so many already")
        self._memories.append((memory, address))
        self._next_address += (memory.size // ADDRESS_STEP + 2) * ADDRESS_STEP
        try:
            if frontend is not None and self._told:
                self._add(frontend, memory, address)
        except TransportError:
            self._memories.pop()
            raise
        return address

    def detach(self, memory: Memory, frontend: Frontend | None) -> None:
        """Takes it away again. ValueError: it is not attached.

        A back-end without CONFIGURE_MEM_SLOTS keeps the last one until it gets another, or the connection ends: an empty table is nothing
        that back-ends expect.
        """
        place = next((place for place, (known, _) in enumerate(self._memories) if known is memory), None)
        if place is None:
            raise ValueError("the memory is not attached")
        _, address = self._memories.pop(place)
        if frontend is None or not self._told:
            return
        if _P.CONFIGURE_MEM_SLOTS in frontend.protocol:
            frontend.ask(_F.REM_MEM_REG, wire.SingleRegion(address, memory.size, address, 0))
        elif self._memories:
            self._tell_table(frontend)

    def _most(self, frontend: Frontend) -> int:
        return frontend.slots if _P.CONFIGURE_MEM_SLOTS in frontend.protocol else wire.MAX_REGIONS

    def _tell_memory(self, frontend: Frontend) -> None:
        if len(self._memories) > (most := self._most(frontend)):
            raise TransportError(f"the back-end takes {most} memories, and {len(self._memories)} are attached")
        if _P.CONFIGURE_MEM_SLOTS in frontend.protocol:
            for memory, address in self._memories:
                self._add(frontend, memory, address)
        else:
            self._tell_table(frontend)
        self._told = True

    def _add(self, frontend: Frontend, memory: Memory, address: int) -> None:
        if _P.CONFIGURE_MEM_SLOTS in frontend.protocol:
            frontend.ask(_F.ADD_MEM_REG, wire.SingleRegion(address, memory.size, address, 0), [memory.fileno()])
        else:
            self._tell_table(frontend)

    def _tell_table(self, frontend: Frontend) -> None:
        regions = [wire.Region(address, memory.size, address, 0) for memory, address in self._memories]
        frontend.ask(_F.SET_MEM_TABLE, wire.Regions(regions), [memory.fileno() for memory, _ in self._memories])

    # The device.

    def tell_features(self, frontend: Frontend) -> None:
        """SET_FEATURES. RequestRefused: the back-end does not take them."""
        assert self.features is not None
        frontend.ask(_F.SET_FEATURES, wire.U64(int(self.features | frontend.protocol_bit)))

    def tell_status(self, frontend: Frontend, status: Status) -> None:
        """The device status, where the back-end wants to know."""
        if _P.STATUS in frontend.protocol:
            frontend.ask(_F.SET_STATUS, wire.U64(int(status)))

    def start(self, frontend: Frontend, *, resumed: bool = False) -> None:
        """Hands memory and rings over. `resumed`: to a back-end that takes another's place."""
        if not self._told:
            self._tell_memory(frontend)
        tracked = self._tell_area(frontend)
        for _, ring in sorted(self.rings.items()):
            self._hand_over(frontend, ring, tracked=tracked, resumed=resumed)
        if _P.REPLY_ACK not in frontend.protocol:  # so that one that has hung up over it is noticed now
            frontend.number(_F.GET_FEATURES)

    def start_ring(self, frontend: Frontend, ring: Ring) -> None:
        """One more, while the device is live, of no more entries than `tracked_size`."""
        self._hand_over(frontend, ring, tracked=False, resumed=False)

    def stop_ring(self, frontend: Frontend, ring: Ring) -> None:
        """Stops a ring: the back-end does not look at it any more."""
        if ring.began and self._told:
            frontend.ask(_F.GET_VRING_BASE, wire.VringState(ring.index, 0))

    def reset(self, frontend: Frontend | None) -> None:
        """Forgets everything but the memory, and lets the back-end forget it. TransportError: that cannot be said to it."""
        rings, self.rings = self.rings, {}
        self.features, self.status = None, Status(0)
        self.forget_area()
        if frontend is not None:
            for _, ring in sorted(rings.items()):
                self.stop_ring(frontend, ring)
            if _P.RESET_DEVICE in frontend.protocol:
                frontend.ask(_F.RESET_DEVICE)
            self.tell_status(frontend, Status(0))

    def bring(self, frontend: Frontend) -> None:
        """Tells a back-end that takes another's place everything.

        FeatureNegotiationError: it does not offer what was negotiated. RequestRefused, SpecViolation, StatusError: it cannot go on.
        """
        self.tell_status(frontend, self.status & (Status.ACKNOWLEDGE | Status.DRIVER))
        if self.features is None:
            return
        if missing := self.features - frontend.offered:
            raise FeatureNegotiationError(f"the back-end came back without {missing}", frontend.offered, missing)
        self.tell_features(frontend)
        self.tell_status(frontend, self.status & ~Status.DRIVER_OK)
        if self.live:
            self.start(frontend, resumed=True)
            self.tell_status(frontend, self.status)
            for ring in self.rings.values():  # what the one before was told, or told us, may be lost
                ring.kick.signal()
                ring.call.signal()

    def _hand_over(self, frontend: Frontend, ring: Ring, *, tracked: bool, resumed: bool) -> None:
        base = PACKED_START if self.packed else SPLIT_START
        if resumed and ring.began:
            if ring.resume is None:
                raise StatusError(f"queue {ring.index} cannot be taken over by another device: nobody knows where")
            base = ring.resume(tracked=tracked and self.tracked_size(ring.index) is not None)
        descriptor, driver, device = ring.areas
        ring.began = True
        frontend.ask(_F.SET_VRING_NUM, wire.VringState(ring.index, ring.size))
        frontend.ask(_F.SET_VRING_BASE, wire.VringState(ring.index, base))
        frontend.ask(_F.SET_VRING_ADDR, wire.VringAddr(ring.index, 0, descriptor, device, driver, 0))
        frontend.ask(_F.SET_VRING_ERR, wire.U64(ring.index), [ring.error.fileno()])
        frontend.ask(_F.SET_VRING_CALL, wire.U64(ring.index), [ring.call.fileno()])
        # Enabled, then started: what a started ring holds while it is disabled is discarded, and a kick may stand in the eventfd already.
        if frontend.protocol_bit:  # without it a ring is enabled by SET_FEATURES
            frontend.ask(_F.SET_VRING_ENABLE, wire.VringState(ring.index, 1))
        frontend.ask(_F.SET_VRING_KICK, wire.U64(ring.index), [ring.kick.fileno()])

    # What was begun.

    def _tell_area(self, frontend: Frontend) -> bool:
        """Asks for the in-flight area, or hands it over; whether it tells what an earlier back-end had begun."""
        if _P.INFLIGHT_SHMFD not in frontend.protocol or not self.rings:
            self.forget_area()
            return False
        known = self._area is not None
        if self._area is None:
            size = max(ring.size for ring in self.rings.values())
            reply = frontend.ask(_F.GET_INFLIGHT_FD, wire.Inflight(0, 0, max(self.rings) + 1, size))
            assert reply is not None and isinstance(reply.payload, wire.Inflight)
            if not reply.payload.size:  # it tracks nothing
                for descriptor in reply.descriptors:
                    os.close(descriptor)
                return False
            self._area = reply.payload, reply.descriptors[0]
        described, descriptor = self._area
        frontend.ask(_F.SET_INFLIGHT_FD, described, [descriptor])
        return known

    def forget_area(self) -> None:
        """Lets go of it: no back-end is to take anything up."""
        if self._area is not None:
            os.close(self._area[1])
            self._area = None
