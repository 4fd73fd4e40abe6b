"""A back-end by hand, over a socket pair, in a thread: it answers as the text has it, but where a test has other answers."""

import array
import socket
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import TracebackType
from typing import Self

from virtio import Feature
from virtio.features import Features
from virtio.vhost_user import message as wire
from virtio.vhost_user.message import FrontendRequest as F
from virtio.vhost_user.message import Message, ProtocolFeature

OFFERED = Features({Feature.VERSION_1, wire.PROTOCOL_FEATURES_BIT, 5, 16})
PROTOCOL = Features(
    {
        *(ProtocolFeature.MQ, ProtocolFeature.REPLY_ACK, ProtocolFeature.BACKEND_REQ, ProtocolFeature.CONFIG, ProtocolFeature.STATUS),
        *(ProtocolFeature.CONFIGURE_MEM_SLOTS, ProtocolFeature.RESET_DEVICE, ProtocolFeature.INFLIGHT_SHMFD),
    }
)
Answer = bytes | tuple[bytes, int] | None
"""Bytes, with so many descriptors; None: hang up."""


def reply(request: int, payload: wire.Payload | None = None) -> bytes:
    return wire.encode(request, payload, reply=True)


class ByHand:
    """The far end of `near`. `answers` take a request and give what is sent for it; `budget` bytes are sent at most, then it hangs up."""

    def __init__(
        self,
        answers: Mapping[int, Callable[[Message], Answer]] | None = None,
        *,
        budget: int | None = None,
        protocol: Features = PROTOCOL,
        offered: Features = OFFERED,
    ) -> None:
        self.near, self._far = socket.socketpair()
        self._answers, self._budget, self._protocol, self._offered = dict(answers or {}), budget, protocol, offered
        self.status = 0
        self.seen: list[int] = []
        self.channel: socket.socket | None = None
        self.sent = 0
        self.events: dict[int, int] = {}
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        decoder = wire.Decoder()
        with self._far:
            while True:
                try:
                    data, descriptors, _, _ = socket.recv_fds(self._far, decoder.needed, 8)
                except OSError:
                    return
                if not data:
                    return
                for message in decoder.feed(data, descriptors):
                    self.seen.append(message.request)
                    if not self._send(self._answer(message)):
                        return

    def _send(self, answer: Answer) -> bool:
        if answer is None:
            return False
        data, count = answer if isinstance(answer, tuple) else (answer, 0)
        if self._budget is not None:
            data = data[: self._budget - self.sent]
        self.sent += len(data)
        ends = [socket.socket() for _ in range(count)]
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [end.fileno() for end in ends]))] if count else []
        try:
            if data:
                self._far.sendmsg([data], rights)
        except OSError:
            return False
        finally:
            for end in ends:
                end.close()
        return self._budget is None or self.sent < self._budget

    def _answer(self, message: Message) -> Answer:
        for descriptor in message.descriptors:
            if message.request == F.SET_BACKEND_REQ_FD:
                self.channel = socket.socket(fileno=descriptor)
            elif message.request == F.SET_VRING_ERR:
                if (old := self.events.pop(message.body[0], None)) is not None:
                    socket.close(old)
                self.events[message.body[0]] = descriptor
            else:
                socket.close(descriptor)
        if (other := self._answers.get(message.request)) is not None:
            return other(message)
        match message.request:
            case F.GET_FEATURES:
                return reply(message.request, wire.U64(int(self._offered)))
            case F.GET_PROTOCOL_FEATURES:
                return reply(message.request, wire.U64(int(self._protocol)))
            case F.GET_QUEUE_NUM:
                return reply(message.request, wire.U64(1))
            case F.GET_MAX_MEM_SLOTS:
                return reply(message.request, wire.U64(32))
            case F.SET_STATUS:
                self.status = message.body[0]
            case F.GET_STATUS:
                return reply(message.request, wire.U64(self.status))
            case F.GET_CONFIG:
                return reply(message.request, wire.Opaque(message.body[:12] + b"\2\0\0\0\0\1\1\0"[: len(message.body) - 12]))
            case F.GET_VRING_BASE:
                return reply(message.request, wire.Opaque(message.body))
            case F.GET_INFLIGHT_FD:
                return reply(message.request, wire.Inflight(4096, 0, 2, 256)), 1
        return reply(message.request, wire.U64(0)) if message.need_reply else b""

    def say(self, data: bytes) -> None:
        """Sends something that nobody asked for."""
        self._far.sendall(data)

    def end(self) -> None:
        """Hangs up, if it has not."""
        with suppress(OSError):
            self._far.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.end()
        self._thread.join(60)
        self.near.close()
        if self.channel is not None:
            self.channel.close()
        for descriptor in self.events.values():
            socket.close(descriptor)
