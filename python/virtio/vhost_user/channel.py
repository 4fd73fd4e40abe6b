"""A back-end's own channel to its front-end, over which it tells that the configuration changed."""

import os
import socket

from virtio.errors import TransportError
from virtio.features import Features
from virtio.vhost_user import message as wire
from virtio.vhost_user.backend_session import Send
from virtio.vhost_user.message import ProtocolFeature
from virtio.vhost_user.socket import Link


class Channel:
    """What SET_BACKEND_REQ_FD passed, or nothing yet."""

    def __init__(self) -> None:
        self._link: Link | None = None

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
        """The configuration changed. TransportError: nobody is there to be told any more."""
        if self._link is not None and ProtocolFeature.CONFIG in protocol:
            try:
                self._link.send(Send(wire.encode(wire.BackendRequest.CONFIG_CHANGE_MSG)))
            except TransportError:
                self.close()
                raise

    def close(self) -> None:
        """No more."""
        if self._link is not None:
            self._link.close()
            self._link = None
