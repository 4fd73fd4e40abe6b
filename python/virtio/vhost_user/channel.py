"""A back-end's own channel to its front-end, over which it tells that the configuration changed."""

import os
import socket

from virtio.errors import TransportError
from virtio.features import Features
from virtio.vhost_user import message as wire
from virtio.vhost_user.backend_session import Send
from virtio.vhost_user.message import ProtocolFeature
from virtio.vhost_user.serving import Loop
from virtio.vhost_user.socket import Link


class Channel:
    """What SET_BACKEND_REQ_FD passed, or nothing yet. A front-end that does not read it has one message waiting, never more."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._link: Link | None = None
        self._watched = False

    def place(self, descriptor: int) -> None:
        """This socket, duplicated, from now on. OSError: it is none."""
        copy = os.dup(descriptor)
        try:
            link = Link(socket.socket(fileno=copy))
        except OSError:  # no socket
            os.close(copy)
            raise
        self.close()
        self._link = link

    def tell_config(self, protocol: Features) -> None:
        """The configuration changed; said at once, or when there is room."""
        link = self._link
        if link is None or link.waiting or ProtocolFeature.CONFIG not in protocol:  # what waits will say so
            return
        try:
            link.send(Send(wire.encode(wire.BackendRequest.CONFIG_CHANGE_MSG)))
        except TransportError as error:
            self._lost(error)
            return
        if link.waiting:
            self._loop.watch(link.fileno(), self._flush)
            self._loop.await_room(link.fileno(), wanted=True)
            self._watched = True

    def _flush(self) -> None:
        assert self._link is not None
        try:
            self._link.flush()
        except TransportError as error:
            self._lost(error)
            return
        if not self._link.waiting:
            self._unwatch()

    def _lost(self, error: TransportError) -> None:
        """Nobody is there to be told any more."""
        self._loop.report(error)
        self.close()

    def _unwatch(self) -> None:
        if self._watched and self._link is not None:
            self._loop.unwatch(self._link.fileno())
        self._watched = False

    def close(self) -> None:
        """No more."""
        self._unwatch()
        if self._link is not None:
            self._link.close()
            self._link = None
