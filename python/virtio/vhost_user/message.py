"""The messages of vhost-user: numbers, payloads, a table of requests, an incremental decoder and an encoder.

Fields are in the machine's byte order, and nothing is aligned. A payload is a value that was checked when it was made; `Rule` says for each
request what it carries, which descriptors, what answers it and which protocol feature it needs. `Decoder` cuts a stream into `Message`s
within fixed bounds; it does not know the table, so that an unknown request can still be answered.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from enum import IntEnum
from typing import ClassVar, Final, NamedTuple, Self

from virtio.errors import MalformedMessage

HEADER: Final = struct.Struct("=III")
"""Request, flags, size of the payload in bytes."""
MAX_BODY: Final = 4096
"""Most bytes of a payload that either end takes: the largest that is defined has 2056, and a configuration may have 4084."""
MAX_DESCRIPTORS: Final = 8
"""Most descriptors of one message."""
MAX_REGIONS: Final = 8
"""Most regions of SET_MEM_TABLE."""

VERSION: Final = 1
VERSION_MASK: Final = 3
REPLY: Final = 1 << 2
NEED_REPLY: Final = 1 << 3

VRING_INDEX_MASK: Final = 0xFF
VRING_NO_DESCRIPTOR: Final = 1 << 8
"""In the payload of SET_VRING_KICK, _CALL and _ERR: no descriptor comes with it, poll."""

PROTOCOL_FEATURES_BIT: Final = 30
"""Feature bit that says that there are protocol features."""
LOG_ALL_BIT: Final = 26
"""Feature bit that makes the back-end log what it writes."""
LOG_PAGE: Final = 4096
VRING_LOG: Final = 1
"""Flag of SET_VRING_ADDR: writes to the used ring are logged too."""


class ProtocolFeature(IntEnum):
    """Bits of GET_PROTOCOL_FEATURES and SET_PROTOCOL_FEATURES."""

    MQ = 0
    LOG_SHMFD = 1
    RARP = 2
    REPLY_ACK = 3
    MTU = 4
    BACKEND_REQ = 5
    CROSS_ENDIAN = 6
    CRYPTO_SESSION = 7
    PAGEFAULT = 8
    CONFIG = 9
    BACKEND_SEND_FD = 10
    HOST_NOTIFIER = 11
    INFLIGHT_SHMFD = 12
    RESET_DEVICE = 13
    INBAND_NOTIFICATIONS = 14
    CONFIGURE_MEM_SLOTS = 15
    STATUS = 16
    XEN_MMAP = 17
    SHARED_OBJECT = 18
    DEVICE_STATE = 19
    GET_VRING_BASE_INFLIGHT = 20
    GPA_ADDRESSES = 21
    SHMEM_MAP = 22


class FrontendRequest(IntEnum):
    """What a front-end asks of a back-end."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_LOG_BASE = 6
    SET_LOG_FD = 7
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SEND_RARP = 19
    NET_SET_MTU = 20
    SET_BACKEND_REQ_FD = 21
    IOTLB_MSG = 22
    SET_VRING_ENDIAN = 23
    GET_CONFIG = 24
    SET_CONFIG = 25
    CREATE_CRYPTO_SESSION = 26
    CLOSE_CRYPTO_SESSION = 27
    POSTCOPY_ADVISE = 28
    POSTCOPY_LISTEN = 29
    POSTCOPY_END = 30
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    GPU_SET_SOCKET = 33
    RESET_DEVICE = 34
    VRING_KICK = 35
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38
    SET_STATUS = 39
    GET_STATUS = 40
    GET_SHARED_OBJECT = 41
    SET_DEVICE_STATE_FD = 42
    CHECK_DEVICE_STATE = 43
    GET_SHMEM_CONFIG = 44


class BackendRequest(IntEnum):
    """What a back-end asks of a front-end, over the channel of SET_BACKEND_REQ_FD."""

    IOTLB_MSG = 1
    CONFIG_CHANGE_MSG = 2
    VRING_HOST_NOTIFIER_MSG = 3
    VRING_CALL = 4
    VRING_ERR = 5
    SHARED_OBJECT_ADD = 6
    SHARED_OBJECT_REMOVE = 7
    SHARED_OBJECT_LOOKUP = 8
    SHMEM_MAP = 9
    SHMEM_UNMAP = 10


class Payload:
    """A payload's value: `LAYOUT` lays its fields out, in their order. ValueError: a field does not fit its width."""

    __slots__ = ("_fields",)
    LAYOUT: ClassVar[struct.Struct]
    FIELDS: ClassVar[tuple[str, ...]] = ()
    _fields: tuple[int, ...]

    def __init_subclass__(cls, *, layout: str = "", fields: str = "") -> None:
        cls.LAYOUT = struct.Struct("=" + layout)
        cls.FIELDS = tuple(fields.split())

    def __init__(self, *fields: int) -> None:
        if len(fields) != len(self.FIELDS):
            raise TypeError(f"{type(self).__name__} has {len(self.FIELDS)} fields, not {len(fields)}")
        try:
            self.LAYOUT.pack(*fields)
        except struct.error as error:
            raise ValueError(f"{type(self).__name__}{fields}: {error}") from None
        object.__setattr__(self, "_fields", fields)

    def __getattr__(self, name: str) -> int:
        try:
            return self._fields[self.FIELDS.index(name)]
        except ValueError:
            raise AttributeError(name) from None

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{type(self).__name__} is immutable: cannot set {name}")

    def pack(self) -> bytes:
        """The bytes that go over the wire."""
        return self.LAYOUT.pack(*self._fields)

    @classmethod
    def unpack(cls, body: bytes) -> Self:
        """The value of `body`. ValueError: another length than its own."""
        if len(body) != cls.LAYOUT.size:
            raise ValueError(f"{len(body)} bytes where {cls.__name__} has {cls.LAYOUT.size}")
        return cls(*cls.LAYOUT.unpack(body))

    def _key(self) -> object:
        return self._fields

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and isinstance(other, Payload) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash((type(self), self._key()))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value:#x}' for name, value in zip(self.FIELDS, self._fields, strict=True))})"


class Empty(Payload):
    """No payload."""


class U64(Payload, layout="Q", fields="value"):
    """A single 64-bit integer."""


class VringState(Payload, layout="II", fields="index num"):
    """A vring's index and a number: its size, its base (both positions if packed), or whether it is enabled."""


class VringAddr(Payload, layout="IIQQQQ", fields="index flags descriptor used available log"):
    """User addresses of a vring's areas, and the guest address at which writes to the used ring are logged."""


class Log(Payload, layout="QQ", fields="size offset"):
    """The dirty log within the file that comes with it, in bytes."""


class Iotlb(Payload, layout="QQQBB", fields="iova size user permissions type"):
    """An entry of the IOTLB."""

    @classmethod
    def unpack(cls, body: bytes) -> Self:
        """As for any payload; peers that send the C structure with its 6 bytes of padding are understood."""
        return super().unpack(body[: cls.LAYOUT.size] if len(body) == 32 else body)


class VringArea(Payload, layout="QQQ", fields="queue size offset"):
    """A host notifier: vring index and flags, and where it lies in the file that comes with it."""


class Inflight(Payload, layout="QQHH", fields="size offset queues queue_size"):
    """The in-flight area within the file that comes with it, and for how many queues of which size it is."""

    @classmethod
    def unpack(cls, body: bytes) -> Self:
        """As for any payload; peers that send the C structure with its 4 bytes of padding are understood."""
        return super().unpack(body[: cls.LAYOUT.size] if len(body) == 24 else body)


class Shared(Payload, layout="QQ", fields="low high"):
    """A UUID, in its 16 bytes."""


class DeviceStateTransfer(Payload, layout="II", fields="direction phase"):
    """Direction (0 save, 1 load) and phase (0 stopped) of a transfer of the back-end's state."""


class Mmap(Payload, layout="B7xQQQQ", fields="shmid fd_offset shm_offset len flags"):
    """A mapping in a shared memory region."""


class Region(Payload, layout="QQQQ", fields="guest size user offset"):
    """A memory region: where the guest and where the front-end see it, and where it starts in its file."""


class SingleRegion(Payload, layout="8xQQQQ", fields="guest size user offset"):
    """The region of ADD_MEM_REG and REM_MEM_REG."""

    @property
    def region(self) -> Region:
        """It, as an entry of a table."""
        return Region(*self._fields)


class Regions(Payload, layout="I4x", fields=""):
    """The regions of SET_MEM_TABLE, at most 8."""

    __slots__ = ("regions",)
    regions: tuple[Region, ...]

    def __init__(self, regions: Iterable[Region] = ()) -> None:
        object.__setattr__(self, "regions", tuple(regions))
        if len(self.regions) > MAX_REGIONS:
            raise ValueError(f"{len(self.regions)} regions, more than {MAX_REGIONS}")
        object.__setattr__(self, "_fields", ())

    def pack(self) -> bytes:  # noqa: D102
        return self.LAYOUT.pack(len(self.regions)) + b"".join(region.pack() for region in self.regions)

    @classmethod
    def unpack(cls, body: bytes) -> Self:
        """The regions that are counted; room for more, as the C structure has it, may follow. ValueError: too many, or too few bytes."""
        start, step = cls.LAYOUT.size, Region.LAYOUT.size
        count = cls.LAYOUT.unpack_from(body)[0] if len(body) >= start else -1
        if not 0 <= count <= MAX_REGIONS or not start + count * step <= len(body) <= start + MAX_REGIONS * step:
            raise ValueError(f"{count} regions in {len(body)} bytes, at most {MAX_REGIONS} of {step} after {start}")
        return cls(Region.unpack(body[at : at + step]) for at in range(start, start + count * step, step))

    def _key(self) -> object:
        return self.regions

    def __repr__(self) -> str:
        return f"Regions({list(self.regions)})"


class Config(Payload, layout="III", fields="offset size flags"):
    """A part of the configuration space; `flags` 1 says that a live migration writes it. `data` has `size` bytes, or none at all."""

    __slots__ = ("data",)
    data: bytes

    def __init__(self, offset: int, size: int, flags: int = 0, data: bytes = b"") -> None:
        super().__init__(offset, size, flags)
        if size > MAX_BODY - self.LAYOUT.size or len(data) not in {0, size}:
            raise ValueError(f"{len(data)} bytes of configuration where {size} are told, at most {MAX_BODY - self.LAYOUT.size}")
        object.__setattr__(self, "data", bytes(data))

    def pack(self) -> bytes:  # noqa: D102
        return super().pack() + self.data

    @classmethod
    def unpack(cls, body: bytes) -> Self:  # noqa: D102
        if len(body) < cls.LAYOUT.size:
            raise ValueError(f"{len(body)} bytes where Config has at least {cls.LAYOUT.size}")
        offset, size, flags = cls.LAYOUT.unpack_from(body)
        return cls(offset, size, flags, body[cls.LAYOUT.size :])

    def _key(self) -> object:
        return self._fields, self.data


class Opaque(Payload):
    """A payload that the text does not lay out, or that neither end looks into."""

    __slots__ = ("data",)
    data: bytes

    def __init__(self, data: bytes = b"") -> None:
        super().__init__()
        if len(data) > MAX_BODY:
            raise ValueError(f"{len(data)} bytes of payload, more than {MAX_BODY}")
        object.__setattr__(self, "data", bytes(data))

    def pack(self) -> bytes:  # noqa: D102
        return self.data

    @classmethod
    def unpack(cls, body: bytes) -> Self:  # noqa: D102
        return cls(body)

    def _key(self) -> object:
        return self.data


class Rule(NamedTuple):
    """What a request carries and what answers it."""

    request: FrontendRequest | BackendRequest
    payload: type[Payload]
    reply: type[Payload] | None = None
    """Payload of the reply that it always has; None: it has one only if NEED_REPLY asks for it."""
    feature: ProtocolFeature | None = None
    """What must have been negotiated."""
    descriptors: int = 0
    """Most descriptors that come with it."""
    reply_descriptors: int = 0


_F, _B, _P = FrontendRequest, BackendRequest, ProtocolFeature
_FRONTEND: Final = (
    Rule(_F.GET_FEATURES, Empty, U64),
    Rule(_F.SET_FEATURES, U64),
    Rule(_F.SET_OWNER, Empty),
    Rule(_F.RESET_OWNER, Empty),
    Rule(_F.SET_MEM_TABLE, Regions, descriptors=MAX_REGIONS),
    Rule(_F.SET_LOG_BASE, Log, Opaque, _P.LOG_SHMFD, descriptors=1),
    Rule(_F.SET_LOG_FD, Opaque, descriptors=1),
    Rule(_F.SET_VRING_NUM, VringState),
    Rule(_F.SET_VRING_ADDR, VringAddr),
    Rule(_F.SET_VRING_BASE, VringState),
    Rule(_F.GET_VRING_BASE, VringState, VringState),
    Rule(_F.SET_VRING_KICK, U64, descriptors=1),
    Rule(_F.SET_VRING_CALL, U64, descriptors=1),
    Rule(_F.SET_VRING_ERR, U64, descriptors=1),
    Rule(_F.GET_PROTOCOL_FEATURES, Empty, U64),
    Rule(_F.SET_PROTOCOL_FEATURES, U64),
    Rule(_F.GET_QUEUE_NUM, Empty, U64, _P.MQ),
    Rule(_F.SET_VRING_ENABLE, VringState),
    Rule(_F.SEND_RARP, U64, feature=_P.RARP),
    Rule(_F.NET_SET_MTU, U64, feature=_P.MTU),
    Rule(_F.SET_BACKEND_REQ_FD, Opaque, feature=_P.BACKEND_REQ, descriptors=1),
    Rule(_F.IOTLB_MSG, Iotlb, U64),
    Rule(_F.SET_VRING_ENDIAN, VringState, feature=_P.CROSS_ENDIAN),
    Rule(_F.GET_CONFIG, Config, Config, _P.CONFIG),
    Rule(_F.SET_CONFIG, Config, feature=_P.CONFIG),
    Rule(_F.CREATE_CRYPTO_SESSION, Opaque, Opaque, _P.CRYPTO_SESSION),
    Rule(_F.CLOSE_CRYPTO_SESSION, U64, feature=_P.CRYPTO_SESSION),
    Rule(_F.POSTCOPY_ADVISE, Empty, Opaque, _P.PAGEFAULT, reply_descriptors=1),
    Rule(_F.POSTCOPY_LISTEN, Empty, feature=_P.PAGEFAULT),
    Rule(_F.POSTCOPY_END, Empty, U64, _P.PAGEFAULT),
    Rule(_F.GET_INFLIGHT_FD, Inflight, Inflight, _P.INFLIGHT_SHMFD, reply_descriptors=1),
    Rule(_F.SET_INFLIGHT_FD, Inflight, feature=_P.INFLIGHT_SHMFD, descriptors=1),
    Rule(_F.GPU_SET_SOCKET, Opaque, descriptors=1),
    Rule(_F.RESET_DEVICE, Empty, feature=_P.RESET_DEVICE),
    Rule(_F.VRING_KICK, VringState, feature=_P.INBAND_NOTIFICATIONS),
    Rule(_F.GET_MAX_MEM_SLOTS, Empty, U64, _P.CONFIGURE_MEM_SLOTS),
    Rule(_F.ADD_MEM_REG, SingleRegion, feature=_P.CONFIGURE_MEM_SLOTS, descriptors=1),
    Rule(_F.REM_MEM_REG, SingleRegion, feature=_P.CONFIGURE_MEM_SLOTS),  # some send a descriptor: superfluous, closed
    Rule(_F.SET_STATUS, U64, feature=_P.STATUS),
    Rule(_F.GET_STATUS, Empty, U64, _P.STATUS),
    Rule(_F.GET_SHARED_OBJECT, Shared, Opaque, _P.SHARED_OBJECT, reply_descriptors=1),
    Rule(_F.SET_DEVICE_STATE_FD, DeviceStateTransfer, U64, _P.DEVICE_STATE, descriptors=1, reply_descriptors=1),
    Rule(_F.CHECK_DEVICE_STATE, Empty, U64, _P.DEVICE_STATE),
    Rule(_F.GET_SHMEM_CONFIG, Empty, Opaque, _P.SHMEM_MAP),
)
_BACKEND: Final = (
    Rule(_B.IOTLB_MSG, Iotlb),
    Rule(_B.CONFIG_CHANGE_MSG, Empty, feature=_P.CONFIG),
    Rule(_B.VRING_HOST_NOTIFIER_MSG, VringArea, feature=_P.HOST_NOTIFIER, descriptors=1),
    Rule(_B.VRING_CALL, VringState, feature=_P.INBAND_NOTIFICATIONS),
    Rule(_B.VRING_ERR, VringState, feature=_P.INBAND_NOTIFICATIONS),
    Rule(_B.SHARED_OBJECT_ADD, Shared, feature=_P.SHARED_OBJECT),
    Rule(_B.SHARED_OBJECT_REMOVE, Shared, feature=_P.SHARED_OBJECT),
    Rule(_B.SHARED_OBJECT_LOOKUP, Shared, U64, _P.SHARED_OBJECT, reply_descriptors=1),
    Rule(_B.SHMEM_MAP, Mmap, feature=_P.SHMEM_MAP, descriptors=1),
    Rule(_B.SHMEM_UNMAP, Mmap, feature=_P.SHMEM_MAP),
)
FRONTEND_RULES: Final = {int(rule.request): rule for rule in _FRONTEND}
"""By number: the requests of a front-end."""
BACKEND_RULES: Final = {int(rule.request): rule for rule in _BACKEND}
"""By number: the requests of a back-end."""


class Message(NamedTuple):
    """One message as it is on the wire; `body` is not interpreted yet."""

    request: int
    body: bytes = b""
    descriptors: tuple[int, ...] = ()
    reply: bool = False
    need_reply: bool = False


def encode(request: int, payload: Payload | None = None, *, reply: bool = False, need_reply: bool = False) -> bytes:
    """Header and payload. Descriptors go with the first of these bytes."""
    body = payload.pack() if payload else b""
    return HEADER.pack(request, VERSION | reply * REPLY | need_reply * NEED_REPLY, len(body)) + body


class Decoder:
    """Cuts a stream into messages.

    Descriptors belong to the message that has the first of the bytes they came with: who never reads more than `needed` bytes at once gets
    that right, since the kernel ends a read behind bytes with descriptors. What is superfluous is in `discarded`, for the caller to close.
    """

    def __init__(self) -> None:
        self._data = bytearray()
        self._descriptors: list[int] = []
        self.discarded: list[int] = []
        self.broken: MalformedMessage | None = None
        """Why the stream cannot be read on, if it cannot."""

    @property
    def needed(self) -> int:
        """How many bytes are missing from the header, or from the message whose header is there; at least 1."""
        have = len(self._data)
        return HEADER.size - have if have < HEADER.size else HEADER.size + HEADER.unpack_from(self._data)[2] - have

    def feed(self, data: bytes, descriptors: Iterable[int] = ()) -> list[Message]:
        """Takes bytes and the descriptors that came with them; the messages that are complete now.

        After a header that nobody may send `broken` says why, and all that follows is discarded.
        """
        self._descriptors += descriptors
        found: list[Message] = []
        rest = memoryview(data)
        while rest and not self.broken:
            count = min(self.needed, len(rest))
            self._data += rest[:count]
            rest = rest[count:]
            if len(self._data) == HEADER.size:
                _, flags, size = HEADER.unpack(self._data)
                if flags & VERSION_MASK != VERSION:
                    self.broken = MalformedMessage(f"version {flags & VERSION_MASK} of a message is not {VERSION}", "vhost-user header")
                elif size > MAX_BODY:
                    self.broken = MalformedMessage(f"payload of {size} bytes is longer than {MAX_BODY}", "vhost-user header")
            if not self.broken and len(self._data) >= HEADER.size and not self._missing():
                found.append(self._take())
        self.discarded += self._descriptors[MAX_DESCRIPTORS:]
        del self._descriptors[MAX_DESCRIPTORS:]
        if self.broken:
            self.close()
        return found

    def close(self) -> None:
        """Gives up what is not complete; its descriptors are discarded."""
        self.discarded += self._descriptors
        self._descriptors.clear()
        self._data.clear()

    def _missing(self) -> int:
        return int(HEADER.size + HEADER.unpack_from(self._data)[2] - len(self._data))

    def _take(self) -> Message:
        request, flags, _ = HEADER.unpack_from(self._data)
        kept, superfluous = self._descriptors[:MAX_DESCRIPTORS], self._descriptors[MAX_DESCRIPTORS:]
        message = Message(request, bytes(self._data[HEADER.size :]), tuple(kept), bool(flags & REPLY), bool(flags & NEED_REPLY))
        self.discarded += superfluous
        self._descriptors.clear()
        self._data.clear()
        return message
