"""Sockets of vhost-user: bytes and descriptors between a `Decoder` and the kernel. Nothing else of the package calls sendmsg or recvmsg.

A read never takes more bytes than the message needs, so that descriptors stay with their message; what comes in is close-on-exec.
"""

import array
import os
import socket
import stat
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from time import monotonic, sleep
from typing import Final, NamedTuple, Self

from virtio import arguments
from virtio.errors import TransportError
from virtio.locks import lock
from virtio.vhost_user.backend_session import Send
from virtio.vhost_user.message import HEADER, MAX_BODY, MAX_DESCRIPTORS

LONGEST_PATH: Final = 107
"""Bytes of a socket's path that the kernel takes."""
MOST_WAITING: Final = 1 << 20
"""Bytes of replies that a peer may leave unread."""
LOCKED: Final = 1.0
"""Seconds that another may keep a folder before nobody waits for it any more: many times what `listen` takes."""
_ROOM: Final = socket.CMSG_SPACE((MAX_DESCRIPTORS + 1) * array.array("i").itemsize)


def check_path(path: str) -> str:
    """The path. ValueError: no name, longer than `LONGEST_PATH` bytes, or with a NUL in it."""
    if "\0" in arguments.instance("socket path", path, str, "a string"):
        raise ValueError(f"socket path {path!r} has a NUL in it")
    if not 0 < len(os.fsencode(path)) <= LONGEST_PATH:
        raise ValueError(f"socket path of {len(os.fsencode(path))} bytes, not 1 to {LONGEST_PATH}: {path!r}")
    return path


def listen(path: str) -> socket.socket:
    """A listening socket at `path`; one that nobody listens on any more is replaced. Of several processes that ask at once, one gets it.

    ValueError: as `check_path`. TransportError: the path is in use, is no socket, or cannot be made.
    """
    check_path(path)
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        with _alone(path):  # one that is bound and does not listen yet looks as dead as a stale one
            try:
                made.bind(path)
            except OSError:
                if not os.path.lexists(path):
                    raise
                _remove_stale(path)
                made.bind(path)
            made.listen()
    except (OSError, TransportError) as error:
        made.close()
        if isinstance(error, TransportError):
            raise
        raise TransportError(f"cannot listen on {path}: {error.strerror}") from None
    return made


@contextmanager
def _alone(path: str) -> Iterator[None]:
    """Nobody else is here meanwhile for a path in the same folder: a lock on that, which leaves no file.

    A folder that this user may not read, whose file system has no locks, or that somebody keeps locked (against ageing, say), is as it
    would be without.
    """
    try:
        folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:  # if there is none, `bind` says so
        yield
        return
    try:
        end = monotonic() + LOCKED
        while not lock(folder) and monotonic() < end:
            sleep(0.005)
        yield
    finally:
        os.close(folder)


def _remove_stale(path: str) -> None:
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        raise TransportError(f"cannot listen on {path}: it exists and is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except OSError:  # it is somebody's: of another type, or with a full backlog
            pass
    raise TransportError(f"cannot listen on {path}: it is in use")


class Place(NamedTuple):
    """A socket's file, whatever else has its name by now."""

    path: str
    device: int
    inode: int

    @classmethod
    def of(cls, path: str) -> Self | None:
        """What is at `path`; None: nothing."""
        try:
            found = os.lstat(path)
        except OSError:
            return None
        return cls(path, found.st_dev, found.st_ino)

    def remove(self) -> None:
        """Unlinks it, if it is there still. Its socket has to be open: until then nobody else gets its inode."""
        if Place.of(self.path) == self:
            with suppress(OSError):
                os.unlink(self.path)


def connect(path: str) -> socket.socket:
    """A connection to who listens at `path`. ValueError: as `check_path`. TransportError: nobody does, or it is no such socket."""
    check_path(path)
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        made.connect(path)
    except OSError as error:
        made.close()
        if os.path.exists(path) and not stat.S_ISSOCK(os.stat(path).st_mode):
            raise TransportError(f"cannot connect to {path}: it is not a socket") from None
        raise TransportError(f"cannot connect to {path}: {error.strerror}") from error
    return made


def adopt(descriptor: int) -> socket.socket:
    """A Unix socket that somebody passed, listening or connected: the descriptor is its own from here on. TransportError: it is none."""
    try:
        found = socket.socket(fileno=descriptor)
    except OSError as error:
        raise TransportError(f"descriptor {descriptor} is not a socket: {error.strerror}") from None
    if found.family != socket.AF_UNIX or found.type != socket.SOCK_STREAM:
        kind = f"{getattr(found.family, 'name', found.family)}, {getattr(found.type, 'name', found.type)}"
        found.detach()
        raise TransportError(f"descriptor {descriptor} is not a Unix stream socket, but {kind}")
    if not listening(found):
        try:
            found.getpeername()
        except OSError:
            found.detach()
            raise TransportError(f"descriptor {descriptor} is a Unix socket that neither listens nor is connected") from None
    return found


def listening(one: socket.socket) -> bool:
    """Whether connections are accepted from it."""
    return bool(one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


class Source:
    """Where a front-end's connections come from: it connects to a path, or listens there, or was given a descriptor.

    ValueError: as `check_path`. TransportError: as `listen` and `adopt`.
    """

    def __init__(self, path_or_fd: str | os.PathLike[str] | int, *, listens: bool = False) -> None:
        self.listener: socket.socket | None = None
        self._path: str | None = None
        self._place: Place | None = None
        self._given: socket.socket | None = None
        if isinstance(path_or_fd, int):
            given = adopt(path_or_fd)
            if listening(given):
                self.listener = given
            else:
                self._given = given
            self.name = f"descriptor {path_or_fd}"
        else:
            self.name = self._path = check_path(os.fspath(path_or_fd))
            if listens:
                self.listener = listen(self._path)
                self._place = Place.of(self._path)
        if self.listener is not None:
            self.listener.setblocking(False)

    @property
    def repeats(self) -> bool:
        """Whether there may be another connection after one that ended."""
        return self._given is None and (self.listener is not None or self._path is not None)

    def next(self) -> socket.socket | None:
        """A connection, if there is one now. TransportError: nobody listens at the path, or it is no such socket."""
        if self._given is not None:
            given, self._given = self._given, None
            return given
        if self.listener is None:
            return None if self._path is None else connect(self._path)
        try:
            return self.listener.accept()[0]
        except (BlockingIOError, ConnectionError):
            return None
        except OSError as error:  # no descriptor is left
            raise TransportError(f"cannot accept at {self.name}: {error.strerror}") from None

    def close(self) -> None:
        """Listens no more, and removes the path that it made, unless it is somebody else's by now."""
        if self._given is not None:
            self._given.close()
        if self.listener is not None:
            if self._place is not None:
                self._place.remove()
                self._place = None
            self.listener.close()


class Link:
    """A connected socket: whole messages out, pieces of messages in. It owns the socket.

    Nothing waits, even if somebody who shares the socket makes it blocking.
    """

    def __init__(self, connected: socket.socket) -> None:
        connected.setblocking(False)
        self._socket = connected
        self._waiting: deque[Send] = deque()
        self._unread = 0

    def fileno(self) -> int:
        """The descriptor, for a selector."""
        return self._socket.fileno()

    @property
    def waiting(self) -> bool:
        """Whether something is left to send."""
        return bool(self._waiting)

    def receive(self, needed: int) -> tuple[bytes, list[int]] | None:
        """At most `needed` bytes and the descriptors that came with them; b"" if the peer is gone, None if there is nothing yet."""
        try:
            data, ancillary, _, _ = self._socket.recvmsg(
                min(needed, HEADER.size + MAX_BODY), _ROOM, socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT
            )
        except (BlockingIOError, InterruptedError):
            return None
        except OSError:
            return b"", []
        descriptors = array.array("i")
        for level, kind, content in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                descriptors.frombytes(content[: len(content) - len(content) % descriptors.itemsize])
        return data, descriptors.tolist()

    def send(self, sent: Send) -> None:
        """Sends, now or when `flush` can. The descriptors are duplicated, so that they may be closed. TransportError: the peer is gone."""
        if not sent.data:
            return
        if self._unread > MOST_WAITING:
            raise TransportError(f"the peer leaves more than {MOST_WAITING} bytes unread")
        self._waiting.append(Send(sent.data, tuple(os.dup(descriptor) for descriptor in sent.descriptors)))
        self._unread += len(sent.data)
        self.flush()

    def flush(self) -> None:
        """Sends what is left, as far as the socket takes it. TransportError: the peer is gone."""
        while self._waiting:
            data, descriptors = self._waiting[0]
            try:
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
                count = self._socket.sendmsg([data], rights, socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                raise TransportError(f"the peer is gone: {error.strerror}") from None
            _close(descriptors)
            self._unread -= count
            if count < len(data):
                self._waiting[0] = Send(data[count:])
            else:
                self._waiting.popleft()

    def shut(self) -> None:
        """Ends the connection; the descriptor stays, and polls as hung up."""
        with suppress(OSError):  # it has ended
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Closes the socket, and what was to be sent over it."""
        for each in self._waiting:
            _close(each.descriptors)
        self._waiting.clear()
        self._socket.close()


def _close(descriptors: tuple[int, ...]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
