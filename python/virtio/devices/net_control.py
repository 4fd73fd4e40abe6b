"""The control queue of a network device (5.1.6.5), both ends: one command a chain, answered by one byte.

Of the commands there is VQ_PAIRS_SET (5.1.6.5.5): a device answers every other one, and whatever is no command, with ERR.
"""

from collections.abc import Callable
from enum import IntEnum
from struct import Struct
from threading import RLock
from time import monotonic
from typing import Final

from virtio._core import DeviceQueue, DriverPort, DriverQueue, PortGroup
from virtio.devices.net_pairs import DriverPair, connect
from virtio.driver import Driver
from virtio.errors import SpecViolation, StatusError, TransportError
from virtio.status import locked

ACK_OK: Final = 0
"""VIRTIO_NET_OK."""
ACK_ERR: Final = 1
"""VIRTIO_NET_ERR."""
VQ_PAIRS_SET: Final = 0
"""The command of class MQ (5.1.6.5.5); its data is a little-endian number of 16 bits."""
RING_SIZE: Final = 16
"""Entries of a driver's control queue, at most."""
LONGEST_DATA: Final = 4096
"""Bytes of a command's data, at most: what a driver keeps room for, and a device looks at."""
TIMEOUT: Final = 5.0
"""Seconds that a device may take for a command."""

_HEAD: Final = Struct("<BB")
_PAIRS: Final = Struct("<H")
_BATCH: Final = 16
_UNANSWERED: Final = 0xFF
_STEP: Final = 0.1


class ControlClass(IntEnum):
    """Classes of commands (5.1.6.5)."""

    RX = 0
    MAC = 1
    VLAN = 2
    ANNOUNCE = 3
    MQ = 4
    GUEST_OFFLOADS = 5
    NOTF_COAL = 6
    STATS = 8


def pairs_data(pairs: int) -> bytes:
    """The data of VQ_PAIRS_SET."""
    return _PAIRS.pack(pairs)


def pairs_wanted(data: bytes) -> int | None:
    """What VQ_PAIRS_SET asks for; None: its data has another length."""
    return int(_PAIRS.unpack(data)[0]) if len(data) == _PAIRS.size else None


def answer(queue: DeviceQueue, execute: Callable[[int, int, bytes], bool], settle: Callable[[], object]) -> None:
    """The device's end: lets `execute` (class, command, data) carry out what the driver sent, up to 16, and acknowledges it as that tells.

    Before the driver hears of any, `settle` does what all of them together ask for.

    What is too short for a command, or too long, is answered without asking; what has no room for an answer is returned, and not done.
    SpecViolation: the driver broke a rule of the ring.
    """
    for chain in queue.pop(limit=_BATCH):
        if not chain.writable:
            queue.complete(chain, 0)
            continue
        done = False
        if _HEAD.size <= chain.readable <= _HEAD.size + LONGEST_DATA:
            command = chain.read()
            done = execute(command[0], command[1], command[_HEAD.size :])
        queue.complete(chain, chain.write(bytes([ACK_OK if done else ACK_ERR])))
    settle()
    queue.publish()


class ControlQueue:
    """The driver's end. Commands go one at a time."""

    ROOM: Final = _HEAD.size + LONGEST_DATA + 1
    """Bytes of a command, and of its answer behind it."""

    def __init__(self, driver: Driver, queue: DriverQueue, place: int) -> None:
        """Over `queue`. `place` is where in the driver's memory a command has room: `ROOM` bytes."""
        self._driver, self._place, self._asking = driver, place, False
        self.queue: Final = queue

    def command(self, kind: int, command: int, data: bytes, timeout: float) -> bool:
        """Sends a command, and waits for its answer; whether it is OK.

        ValueError: data longer than `LONGEST_DATA`. TransportError: no answer within `timeout` seconds. SpecViolation: no answer that
        there is. StatusError: the queue is broken.
        """
        if len(data) > LONGEST_DATA:
            raise ValueError(f"a command's data has {len(data)} bytes: at most {LONGEST_DATA}")
        driver, limit = self._driver, monotonic() + timeout
        self._settle(limit, f"an earlier control command within {timeout} s")  # one that was not answered in time
        head, ack = driver.address + self._place, self._place + self.ROOM - 1
        driver.memory.write(self._place, _HEAD.pack(kind, command) + data)
        driver.memory.write(ack, bytes([_UNANSWERED]))
        self.queue.add(None, readable=[(head, _HEAD.size + len(data))], writable=[(driver.address + ack, 1)])
        self.queue.publish()
        self._settle(limit, f"control command {kind}, {command} within {timeout} s")
        (answer,) = driver.memory.read(ack, 1)
        if answer not in (ACK_OK, ACK_ERR):
            raise SpecViolation(f"control command {kind}, {command} is acknowledged by {answer:#x}, neither OK nor ERR", "5.1.6.5")
        return answer == ACK_OK

    def quieten(self) -> None:
        """Takes the device's notification from the driver's descriptor, unless somebody waits for it."""
        if not self._asking:
            self._driver.transport.interrupt(self.queue.index).drain()

    def _settle(self, limit: float, what: str) -> None:
        self._asking = True
        try:
            while self.queue.outstanding:
                # In short steps: another thread may have taken the notification just before it was told not to.
                if not self._driver.wait_used(self.queue, min(_STEP, max(0.0, limit - monotonic()))) and monotonic() >= limit:
                    raise TransportError(f"no answer to {what} (5.1.6.5)")
        finally:
            self._asking = False


class Commands:
    """What a network driver does with its control queue, and the pairs that it has in use by that."""

    _lock: RLock
    _control: ControlQueue | None = None
    _there = 0
    _active = 0
    _pairs: tuple[DriverPair, ...]
    _over: DriverPort | PortGroup | None

    @property
    def queue_pairs(self) -> int:
        """How many queue pairs are set up: as many as were wanted and the device has."""
        return self._there

    @property
    def active_pairs(self) -> int:
        """How many of them are in use."""
        return self._active

    @locked
    def command(self, kind: int, command: int, data: bytes = b"", *, timeout: float = TIMEOUT) -> bool:
        """Sends a command of class `kind` over the control queue, and waits for the answer; whether it is OK (5.1.6.5).

        ValueError: a number that is not one byte, or more than 4096 bytes of data. StatusError: there is no control queue, as CTRL_VQ was
        not negotiated, or it is broken. TransportError: no answer within `timeout` seconds. SpecViolation: an answer that is none.
        """
        if not (0 <= kind <= 0xFF and 0 <= command <= 0xFF):
            raise ValueError(f"class {kind} or command {command} is outside 0..255")
        if self._control is None:
            raise StatusError("there is no control queue: CTRL_VQ (bit 17) was not negotiated, or the device was reset")
        return self._control.command(kind, command, data, timeout)

    @locked
    def use_pairs(self, pairs: int) -> None:
        """Uses the first `pairs` queue pairs from now on, of those that are set up (VQ_PAIRS_SET, 5.1.6.5.5).

        Frames that came on others before are received all the same. ValueError: not from 1 to `queue_pairs`. TransportError: the device
        does not carry it out; then as many as before are in use, or fewer if these were wanted. As `command` otherwise.
        """
        if not 1 <= pairs <= self._there:
            raise ValueError(f"{pairs} queue pairs are not from 1 to {self._there}, which are set up")
        self._use(min(pairs, self._active))  # nothing is sent on the others once the command is on its way
        if not self.command(ControlClass.MQ, VQ_PAIRS_SET, pairs_data(pairs)):
            raise TransportError(f"the device answers VQ_PAIRS_SET {pairs} with ERR, though it names as many pairs (5.1.6.5.5)")
        self._use(pairs)

    @locked
    def resumed(self) -> None:
        """Tells a device that has taken another's place how many pairs are in use. No other command is sent but by callers of `command`,
        who repeat theirs."""
        if self._control is not None and self._active > 1:
            self.use_pairs(self._active)

    def _use(self, pairs: int) -> None:
        if pairs != self._active:
            self._active = pairs
            self._over = connect(self._pairs, pairs)
