"""The sockets by which QEMU is driven: the qtest protocol (registers), QMP (the monitor), and ivshmem's (eventfds that a message rings)."""

import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from select import POLLIN, POLLOUT, poll
from socket import AF_UNIX, MSG_NOSIGNAL, SHUT_RDWR, SOCK_STREAM, send_fds, socket, socketpair
from struct import pack
from threading import Lock
from time import monotonic
from typing import Any, Final

from virtio._core import EventFd
from virtio.errors import TransportError

ANSWER_TIMEOUT: Final = 20.0
"""Seconds that QEMU may take to answer."""
BATCH: Final = 128
"""Commands that are sent before answers are read: few enough that neither socket buffer fills."""
LONGEST_LINE: Final = 1 << 20
SHOWN: Final = 200
"""Characters of a strange line that go into an exception."""


class _Lines:
    """Lines over one end of a stream socket, with bounded waits. `why` explains a connection that ended."""

    def __init__(self, name: str, end: socket, why: Callable[[], str]) -> None:
        self._name, self._end, self._why = name, end, why
        self._rest = bytearray()
        end.setblocking(False)
        self._readable, self._writable = poll(), poll()
        self._readable.register(end, POLLIN)
        self._writable.register(end, POLLOUT)

    def send(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[self._end.send(rest, MSG_NOSIGNAL) :]
            except BlockingIOError:
                if not self._writable.poll(ANSWER_TIMEOUT * 1000):
                    raise TransportError(f"QEMU took no {self._name} command within {ANSWER_TIMEOUT} s") from None
            except OSError:
                raise TransportError(self._why()) from None

    def receive(self, *, wait: bool = True) -> list[str]:
        """Whole lines that are there, or the next that come; without `wait` perhaps none. TransportError: no answer."""
        deadline = monotonic() + ANSWER_TIMEOUT
        while True:
            try:
                if wait and not self._readable.poll(ANSWER_TIMEOUT * 1000):
                    raise TransportError(f"QEMU did not answer over {self._name} within {ANSWER_TIMEOUT} s")
                data = self._end.recv(1 << 16)
            except BlockingIOError:
                if wait:
                    continue
                return []
            except OSError:
                raise TransportError(self._why()) from None
            if not data:
                raise TransportError(self._why())
            self._rest += data
            *lines, rest = self._rest.split(b"\n")
            self._rest = rest
            if lines or not wait:
                return [line.decode(errors="replace").strip() for line in lines]
            if len(rest) > LONGEST_LINE or monotonic() >= deadline:
                raise TransportError(f"QEMU sent {len(rest)} bytes over {self._name} and no end of a line")

    def end(self) -> None:
        """Ends the connection; the descriptor stays, and polls as hung up."""
        with suppress(OSError):  # it has ended
            self._end.shutdown(SHUT_RDWR)

    def close(self) -> None:
        self._end.close()


class Qtest:
    """The qtest protocol: commands, an answer each, and lines of interrupt controllers that come unasked.

    Any thread may call. Once something failed, every call raises `TransportError`.
    """

    def __init__(self, end: socket, why: Callable[[], str]) -> None:
        self._lines = _Lines("qtest", end, why)
        self._descriptor = end.fileno()
        self._lock = Lock()
        self._failed: str | None = None
        self.raised: set[int] = set()
        """Intercepted interrupt lines that are high."""
        self.changed = EventFd()
        """Signalled when one went up."""

    def fileno(self) -> int:
        """The socket: readable when lines came unasked."""
        return self._descriptor

    def run(self, commands: Sequence[str]) -> list[str]:
        """Sends commands together; returns what stands behind each `OK`. TransportError: QEMU refuses one, ended, or does not answer."""
        with self._lock:
            if self._failed is not None:
                raise TransportError(self._failed)
            answers: list[str] = []
            try:
                for start in range(0, len(commands), BATCH):
                    part = commands[start : start + BATCH]
                    self._lines.send("".join(f"{command}\n" for command in part).encode())
                    while len(answers) < start + len(part):
                        answers += self._sort(self._lines.receive())
            except TransportError as error:
                self._fail(str(error))
                raise
            except BaseException as error:  # Ctrl-C, say: answers are still under way, and nobody can tell to what
                self._fail(f"a call into QEMU was interrupted ({error!r})")
                raise
        for command, answer in zip(commands, answers, strict=False):
            if not answer.startswith("OK"):
                raise TransportError(f"QEMU refuses the qtest command {command!r}: {answer}")
        return [answer[3:] for answer in answers]

    def numbers(self, commands: Sequence[str]) -> list[int]:
        """As `run`; the answers are numbers, or nothing, which counts as 0."""
        try:
            return [int(answer, 0) if answer else 0 for answer in self.run(commands)]
        except ValueError as error:
            raise TransportError(f"QEMU answers a qtest command with what is no number: {error}") from None

    def look(self) -> None:
        """Takes what came unasked, without waiting. TransportError: QEMU ended."""
        with self._lock:
            if self._failed is not None:
                raise TransportError(self._failed)
            try:
                self._sort(self._lines.receive(wait=False))
            except TransportError as error:
                self._fail(str(error))
                raise

    def fail(self, reason: str) -> None:
        """Every call raises `TransportError` from now on, with this reason unless there was another."""
        with self._lock:
            self._fail(self._failed or reason)

    def _fail(self, reason: str) -> None:
        self._failed = reason
        self._lines.end()  # which wakes the helper, and it whoever waits

    def close(self) -> None:
        """Ends the connection."""
        with self._lock:
            self._failed = self._failed or "QEMU was closed"
            self._lines.close()
            self.changed.close()

    def _sort(self, lines: Iterable[str]) -> list[str]:
        """Answers; what tells of an interrupt line is noted."""
        answers = []
        for line in lines:
            match line.split():
                case ["IRQ", "raise", number]:
                    self.raised.add(_number(number, line))
                    self.changed.signal()
                case ["IRQ", "lower", number]:
                    self.raised.discard(_number(number, line))
                case _:
                    answers.append(line)
        return answers


def _number(word: str, line: str) -> int:
    try:
        return int(word, 0)
    except ValueError:
        raise TransportError(f"QEMU sent over qtest what is no line of that protocol: {line[:SHOWN]!r}") from None


class Qmp:
    """The QEMU Machine Protocol: as much as it takes to give a command and to get its answer. Any thread may call."""

    def __init__(self, end: socket, why: Callable[[], str]) -> None:
        self._lines = _Lines("QMP", end, why)
        self._lock = Lock()
        self._ready = False
        self._sent = 0
        self.events: list[dict[str, Any]] = []
        """Events that came before the newest answer."""

    def run(self, command: str, arguments: dict[str, Any]) -> Any:
        """What the command returns. ValueError: QEMU refuses it, with QEMU's message."""
        with self._lock:
            if not self._ready:
                self._answer("QMP", None)  # the greeting
                self._exchange("qmp_capabilities", {})
                self._ready = True
            answer = self._exchange(command, arguments)
        if "error" in answer:
            error = answer["error"]
            raise ValueError(f"QEMU refuses {command}: {error.get('desc') if isinstance(error, dict) else error}")
        if "return" not in answer:
            raise TransportError(f"QEMU answers {command} with neither a result nor an error: {str(answer)[:SHOWN]}")
        return answer["return"]

    def close(self) -> None:
        """Ends the connection."""
        self._lines.close()

    def _exchange(self, command: str, arguments: dict[str, Any]) -> dict[str, Any]:
        self._sent += 1  # so that the answer to a call that was interrupted is not taken for this one's
        self._lines.send(json.dumps({"execute": command, "arguments": arguments, "id": self._sent}).encode() + b"\n")
        return self._answer("id", self._sent)

    def _answer(self, key: str, value: int | None) -> dict[str, Any]:
        while True:
            found: dict[str, Any] | None = None
            for line in self._lines.receive():
                message = _message(line)
                if "event" in message:
                    self.events.append(message)
                elif key in message and value in (None, message[key]):
                    found = message
            if found is not None:
                return found


def _message(line: str) -> dict[str, Any]:
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        message = None
    if not isinstance(message, dict):
        raise TransportError(f"QEMU sent over QMP what is no message of that protocol: {line[:SHOWN]!r}")
    return message


class Bells:
    """QEMU's device ivshmem-doorbell, which turns a store to its register into the signal of an eventfd that we passed.

    An MSI-X message is such a store: with the register's address and `data(peer, vector)` in a table entry, a vector signals an eventfd
    and nobody has to look after it. This is the server's side of its protocol (QEMU, docs/specs/ivshmem-spec).
    """

    REGISTER: Final = 12
    """Offset of the doorbell register in BAR 0."""
    VECTORS: Final = 256
    """Most eventfds of one peer."""
    PEERS: Final = 0x8000

    def __init__(self, memory_fd: int) -> None:
        """`memory_fd`: a file of shared memory, which the device insists on; nobody uses it."""
        ours, self.theirs = socketpair(AF_UNIX, SOCK_STREAM)
        self._end = ours
        self._next = 1
        self._lock = Lock()
        ours.settimeout(ANSWER_TIMEOUT)
        for number, descriptors in ((0, []), (0, []), (-1, [memory_fd])):  # version, the device's own number, the memory
            send_fds(ours, [pack("<q", number)], descriptors)

    @staticmethod
    def data(peer: int, vector: int) -> int:
        """What to store in the register."""
        return peer << 16 | vector

    def connect(self, events: Sequence[EventFd]) -> int:
        """Passes eventfds, one a vector; returns the peer's number. QEMU takes them in a while. TransportError: that cannot be."""
        with self._lock:
            if len(events) > self.VECTORS or self._next >= self.PEERS:
                raise TransportError(f"{len(events)} vectors cannot be had: at most {self.VECTORS} each, {self.PEERS} times")
            peer = self._next
            self._next += 1
            try:
                for event in events:
                    send_fds(self._end, [pack("<q", peer)], [event.fileno()])
            except OSError as error:
                raise TransportError(f"QEMU takes no eventfds: {error}") from None
            return peer

    def disconnect(self, peer: int) -> None:
        """Takes a peer's eventfds away again."""
        with self._lock:
            try:
                self._end.sendall(pack("<q", peer))
            except OSError:  # QEMU is gone, and they with it
                return

    def close(self) -> None:
        """Ends the connection."""
        self._end.close()
        self.theirs.close()
