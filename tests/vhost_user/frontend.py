"""A front-end by hand, in the same process as the back-end: what it sends is handled when it asks for the answer."""

import array
import socket
from collections.abc import Iterable
from types import TracebackType
from typing import Self

from virtio import DriverQueue, EventFd, Feature, Memory
from virtio.features import Features
from virtio.vhost_user import message as wire
from virtio.vhost_user.backend import Backend
from virtio.vhost_user.frontend_session import FrontendSession, Reply
from virtio.vhost_user.message import FrontendRequest as F
from virtio.vhost_user.message import ProtocolFeature, Region

GUEST, USER = 0x4000_0000, 0x7F00_0000_0000
SIZE = 1 << 20
PROTOCOL = Features(
    {
        *(ProtocolFeature.REPLY_ACK, ProtocolFeature.CONFIG, ProtocolFeature.BACKEND_REQ, ProtocolFeature.STATUS, ProtocolFeature.MQ),
        *(ProtocolFeature.RESET_DEVICE, ProtocolFeature.CONFIGURE_MEM_SLOTS, ProtocolFeature.LOG_SHMFD),
        ProtocolFeature.INFLIGHT_SHMFD,
    }
)


class Frontend:
    """Over `connected`, to a back-end that `backend.process` moves on."""

    def __init__(self, connected: socket.socket, backend: Backend) -> None:
        connected.setblocking(False)
        self.socket, self.backend = connected, backend
        self.session = FrontendSession()
        self.memory = Memory(SIZE)
        self.queues: list[DriverQueue] = []
        self.kicks: dict[int, EventFd] = {}
        self.calls: dict[int, EventFd] = {}
        self.errors: dict[int, EventFd] = {}

    @classmethod
    def at(cls, path: str, backend: Backend) -> Self:
        """Connects to a listening back-end."""
        connected = socket.socket(socket.AF_UNIX)
        connected.connect(path)
        return cls(connected, backend)

    def turn(self) -> None:
        """Lets the back-end do all that there is to do."""
        while self.backend.process():
            pass

    def raw(self, data: bytes, descriptors: Iterable[int] = ()) -> None:
        """Sends bytes as they are."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
        self.socket.sendmsg([data], rights if rights[0][2] else [])

    def ask(self, request: F, payload: wire.Payload | None = None, descriptors: Iterable[int] = ()) -> Reply | None:
        """Sends a request; its reply or acknowledgement, None if it has none."""
        sent = self.session.request(request, payload, descriptors)
        self.raw(*sent)
        self.turn()
        while self.session.awaited:
            data, passed, _, _ = socket.recv_fds(self.socket, self.session.needed, 8)
            if not data:
                raise ConnectionError(f"the back-end hung up on {request.name}")
            for effect in self.session.feed(data, passed):
                if isinstance(effect, Reply):
                    return effect
        return None

    def refused(self, request: F, payload: wire.Payload | None = None, descriptors: Iterable[int] = ()) -> bool:
        """Whether the request is."""
        reply = self.ask(request, payload, descriptors)
        assert reply is not None
        return reply.refused

    @property
    def gone(self) -> bool:
        """Whether the back-end has hung up."""
        self.turn()
        try:
            return self.socket.recv(1, socket.MSG_PEEK) == b""
        except BlockingIOError:
            return False
        except ConnectionError:
            return True

    def negotiate(self, features: Features, protocol: Features = PROTOCOL) -> None:
        """As far as the memory table."""
        self.features = features
        self.ask(F.SET_OWNER)
        self.ask(F.GET_FEATURES)
        self.ask(F.GET_PROTOCOL_FEATURES)
        self.ask(F.SET_PROTOCOL_FEATURES, wire.U64(int(protocol)))
        assert not self.refused(F.SET_FEATURES, wire.U64(int(features) | 1 << wire.PROTOCOL_FEATURES_BIT))
        self.map([Region(GUEST, SIZE, USER, 0)])

    def map(self, regions: list[Region]) -> None:
        """The memory table."""
        assert not self.refused(F.SET_MEM_TABLE, wire.Regions(regions), [self.memory.fileno()] * len(regions))

    def queue(self, index: int, size: int = 16) -> DriverQueue:
        """Our end of a ring."""
        queue = DriverQueue(self.memory, size, features=self.features, address=GUEST, index=index)
        for events in (self.kicks, self.calls, self.errors):
            events[index] = EventFd()
        queue.connect(self.kicks[index])
        self.queues.append(queue)
        return queue

    def start(self, queue: DriverQueue, *, base: int | None = None, enabled: bool = True) -> None:
        """Hands a ring over."""
        index = queue.index
        packed = Feature.RING_PACKED in self.features
        descriptor, driver, device = (area - GUEST + USER for area in queue.areas)
        for request, payload, events in (
            (F.SET_VRING_NUM, wire.VringState(index, queue.size), None),
            (F.SET_VRING_BASE, wire.VringState(index, (0x8000_8000 if packed else 0) if base is None else base), None),
            (F.SET_VRING_ADDR, wire.VringAddr(index, 0, descriptor, device, driver, 0), None),
            (F.SET_VRING_ERR, wire.U64(index), self.errors),
            (F.SET_VRING_KICK, wire.U64(index), self.kicks),
            (F.SET_VRING_CALL, wire.U64(index), self.calls),
            (F.SET_VRING_ENABLE, wire.VringState(index, int(enabled)), None),
        ):
            assert not self.refused(request, payload, [events[index].fileno()] if events else []), request

    def stop(self, index: int) -> int:
        """The ring's base."""
        reply = self.ask(F.GET_VRING_BASE, wire.VringState(index, 0))
        assert reply is not None
        return int(reply.payload.num)

    def deafen(self, index: int) -> None:
        """Starts a ring again whose call descriptor is a socket that takes nothing: where there is no /proc, only a signal can tell."""
        base = self.stop(index)
        with socket.socket(socket.AF_UNIX) as nobody:
            assert not self.refused(F.SET_VRING_CALL, wire.U64(index), [nobody.fileno()])
        self.ask(F.SET_VRING_BASE, wire.VringState(index, base))
        self.ask(F.SET_VRING_KICK, wire.U64(index), [self.kicks[index].fileno()])

    def track(self, queues: int, size: int = 16) -> tuple[wire.Inflight, int]:
        """A new in-flight area of the back-end, and its descriptor."""
        reply = self.ask(F.GET_INFLIGHT_FD, wire.Inflight(0, 0, queues, size))
        assert reply is not None and isinstance(reply.payload, wire.Inflight)
        return reply.payload, reply.descriptors[0]

    def room(self, length: int, data: bytes = b"") -> tuple[int, int]:
        """A buffer, as the device sees it."""
        offset = self.memory.allocate(length)
        self.memory.write(offset, data.ljust(length, b"\0"))
        return GUEST + offset, length

    def look(self, place: tuple[int, int], length: int) -> bytes:
        """What is in a buffer."""
        return self.memory.read(place[0] - GUEST, length)

    def close(self) -> None:
        """Vanishes."""
        self.socket.close()
        for events in (self.kicks, self.calls, self.errors):
            for event in events.values():
                event.close()
        for queue in self.queues:
            queue.close()
        self.memory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
