"""The driver's side (2.1.1, 2.2.1, 3.1): initialization in the specification's order, once, for every device type and transport.

    with Driver(transport) as driver:
        driver.negotiate(required={Feature.VERSION_1}, wanted={Feature.RING_PACKED})
        queue = driver.setup_queue(0, size=256)
        driver.driver_ok()

The device is not trusted: every loop that waits for it is bounded, and what it reads as is checked.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from enum import Enum
from threading import Lock, RLock
from time import monotonic, sleep
from types import MappingProxyType, TracebackType
from typing import Any, ClassVar, Final, NamedTuple, Self
from weakref import WeakMethod, WeakValueDictionary

from virtio import arguments
from virtio._core import DriverQueue, EventFd, Memory
from virtio.errors import DeviceNeedsReset, FeatureNegotiationError, StatusError, TransportError, VirtioError
from virtio.features import Features, Requires, describe, features_of
from virtio.features import select as select_features
from virtio.spec import MAX_QUEUE_SIZE, Feature, Status
from virtio.status import StatusTable, locked
from virtio.transport import Alternating, Doorbell, Resuming, Transport, check_negotiable, check_transport
from virtio.waiting import Watch, milliseconds, sleep_on

RING_FEATURES: Final = Features({Feature.RING_PACKED, Feature.EVENT_IDX, Feature.INDIRECT_DESC})
"""What a driver of this package wants beside its type's features, unless told otherwise."""

MEMORY_SIZE: Final = 1 << 24
"""Bytes of the memory that a driver makes if it is given none. Pages that nobody touches cost nothing."""

RESET_TIMEOUT: Final = 5.0
"""Seconds that a device may take for a reset."""

CONFIG_ATTEMPTS: Final = 64
"""How often configuration is read before its generation has to stand still (2.5.1)."""


class DriverState(Enum):
    """How far initialization has come (3.1.1)."""

    NEW = "new"
    RESET = "reset"
    DRIVER = "driver"
    FEATURES_OK = "features ok"
    DRIVER_OK = "driver ok"
    NEEDS_RESET = "needs reset"
    FAILED = "failed"
    CLOSED = "closed"


class DriverStep(Enum):
    """The steps of a driver; and NEEDS_RESET, which is the device's."""

    RESET = "reset"
    ACKNOWLEDGE = "acknowledge"
    NEGOTIATE = "negotiate"
    READ_CONFIG = "read_config"
    WRITE_CONFIG = "write_config"
    SETUP_QUEUE = "setup_queue"
    RESET_QUEUE = "reset_queue"
    REENABLE_QUEUE = "setup_queue after reset_queue"
    DRIVER_OK = "driver_ok"
    WAIT = "wait"
    FAIL = "fail"
    NEEDS_RESET = "check"
    CLOSE = "close"


_W, _R, _D, _F, _L, _N, _X, _C = DriverState
# fmt: off
DRIVER_TABLE: Final = StatusTable("driver", DriverState, DriverStep, {
    #    RESET ACKN. NEGOT. READ_C WRITE_C SETUP RST_Q REENA D_OK  WAIT  FAIL  NEEDS CLOSE
    _W: (_R,   _D,   _F,    None,  None,   None, None, None, None, None, _X,   _N,   _C),
    _R: (_R,   _D,   _F,    None,  None,   None, None, None, None, None, _X,   _N,   _C),
    _D: (_R,   None, _F,    _D,    None,   None, None, None, None, None, _X,   _N,   _C),
    _F: (_R,   None, None,  _F,    _F,     _F,   _F,   _F,   _L,   None, _X,   _N,   _C),
    _L: (_R,   None, None,  _L,    _L,     None, _L,   _L,   None, _L,   _X,   _N,   _C),
    _N: (_R,   None, None,  None,  None,   None, None, None, None, None, _X,   _N,   _C),
    _X: (_R,   None, None,  None,  None,   None, None, None, None, None, None, _X,   _C),
    _C: (None, None, None,  None,  None,   None, None, None, None, None, None, None, _C),
})
# fmt: on
"""NEEDS_RESET is the step of seeing that bit: `check` is in order wherever it has an answer."""


_ATTACHING: Final = Lock()
_ATTACHED: Final[WeakValueDictionary[int, "Driver"]] = WeakValueDictionary()
"""The last driver of each transport, by the transport's `id`: a driver keeps its transport, so the number stays that one's."""


class _Enabled(NamedTuple):
    """A queue that is set up, and its two notifications."""

    queue: DriverQueue
    doorbell: Doorbell
    interrupt: EventFd


class Driver:
    """The driver of whatever device `transport` leads to; device types derive theirs from it.

    Queues, and buffers for them, lie in `memory`; what stands at `memory`'s byte n is for the device at `address + n`. A memory that the
    driver made itself is closed with it. Closing resets the device.
    """

    device_id: ClassVar[int | None] = None
    """The only device type that the class drives, if there is one."""
    rules: ClassVar[tuple[Requires, ...]] = ()
    """The device type's dependencies between features."""
    told_in_config: ClassVar[Features] = Features()
    """Features that are of no use to who cannot read the configuration."""

    def __init__(self, transport: Transport, *, memory: Memory | None = None) -> None:
        """Attaches `memory` to `transport`; without it the transport's own, or `MEMORY_SIZE` new bytes.

        ValueError: another device type. TypeError: no transport, or no memory. StatusError: the transport has a driver that is not closed.
        """
        check_transport(transport)
        if memory is not None:
            arguments.instance("memory", memory, Memory, "a Memory")
        if self.device_id is not None and transport.device_id != self.device_id:
            raise ValueError(f"{type(self).__name__} drives devices of type {self.device_id:d}, not {transport.device_id:d}")
        self._lock = RLock()
        self.transport: Final = transport
        if memory is None:
            memory = getattr(transport, "memory", None)
        self._owned = memory is None
        self.memory: Final = Memory(MEMORY_SIZE) if memory is None else memory
        self._state = DriverState.NEW
        with _ATTACHING:
            other = _ATTACHED.get(id(transport))
            if other is not None and other.state is not DriverState.CLOSED:
                raise StatusError(f"the transport has a driver already, in state {other.state.value}: close that one first")
            _ATTACHED[id(transport)] = self
        try:
            self.address: Final = transport.attach(self.memory)
        except BaseException:
            self._state = DriverState.CLOSED
            raise
        self._features = Features()
        self._enabled: dict[int, _Enabled] = {}
        self._queues_reset: set[int] = set()
        self._buffers: list[int] = []
        self._serve: Callable[[], int] | None = transport.serve if isinstance(transport, Alternating) else None
        if isinstance(transport, Resuming):
            resumed = WeakMethod(self.resumed)  # a driver that nobody keeps is not kept by its transport
            transport.on_resumed = lambda: (call := resumed()) and call()
        self._watch: Watch | None = Watch([transport.config_interrupt])
        transport.config_interrupt.tell_closed(self._watch.over)

    @property
    def state(self) -> DriverState:
        """How far initialization has come."""
        return self._state

    @property
    def features(self) -> Features:
        """What was negotiated; none before that."""
        return self._features

    @property
    def queues(self) -> Mapping[int, DriverQueue]:
        """The queues that are set up, by index."""
        return MappingProxyType({index: enabled.queue for index, enabled in dict(self._enabled).items()})

    @locked
    def allocate(self, size: int, align: int = 16) -> int:
        """Takes `size` bytes of `memory`, as `Memory.allocate` does, for as long as the driver lives: closing it gives them back."""
        offset = self.memory.allocate(size, align)
        self._buffers.append(offset)
        return offset

    @locked
    def reset(self, *, timeout: float = RESET_TIMEOUT) -> dict[int, list[Any]]:
        """Resets the device (2.4), closes all queues, and hands back the tokens of all buffers that were outstanding, by queue.

        TransportError: the device does not get there within `timeout` seconds, or is gone. Queues then stay as they are, since the device
        may still use their buffers; only another reset or closing are in order.
        """
        target = DRIVER_TABLE.target(self._state, DriverStep.RESET)
        deadline = monotonic() + timeout
        self._state = DriverState.FAILED
        self.transport.reset()
        while status := self._read_status():
            if monotonic() >= deadline:
                raise TransportError(f"device status still reads {int(status):#x} {timeout} s after the reset (2.4.2)")
            sleep(0.001)
        tokens = {index: self._dismiss(index) for index in list(self._enabled)}
        self._queues_reset.clear()
        self._features = Features()
        self.transport.config_interrupt.drain()
        self._state = target
        return tokens

    @locked
    def acknowledge(self) -> None:
        """Steps 1 to 3 (3.1.1): resets the device, unless that is done, sets ACKNOWLEDGE and DRIVER. Its configuration may then be read."""
        target = DRIVER_TABLE.target(self._state, DriverStep.ACKNOWLEDGE)
        if self._state is not DriverState.RESET:
            self.reset()
        self.transport.status = Status.ACKNOWLEDGE
        self.transport.status = Status.ACKNOWLEDGE | Status.DRIVER
        self._state = target

    @locked
    def negotiate(self, *, required: Iterable[int] = (), wanted: Iterable[int] = ()) -> Features:
        """Steps 1 to 6 (3.1.1): accepts `required` and what is to be had of `wanted`; returns what was accepted.

        VERSION_1 is always required, and a feature that nobody asked for is never accepted (2.2.1). FeatureNegotiationError: a required
        feature cannot be had, or the device does not keep FEATURES_OK; FAILED is then set. ValueError: a bit that is never negotiated.
        """
        required = features_of("required", required) | {Feature.VERSION_1}
        wanted = features_of("wanted", wanted)
        check_negotiable(required | wanted)
        target = DRIVER_TABLE.target(self._state, DriverStep.NEGOTIATE)
        if self._state is not DriverState.DRIVER:
            self.acknowledge()
        try:
            offered = self.offered()
            accepted = select_features(offered, required=required, wanted=wanted, rules=self.rules)
            self.transport.accept(accepted)
            status = self._set_status(Status.FEATURES_OK)
            if Status.FEATURES_OK not in status:
                raise FeatureNegotiationError(f"the device does not keep FEATURES_OK with these accepted: {accepted}", offered, accepted)
        except FeatureNegotiationError:
            self.fail()
            raise
        self._features = accepted
        self._state = target
        return accepted

    def offered(self) -> Features:
        """What the transport offers, less what a driver could make no use of where the configuration cannot be read."""
        offered = self.transport.offered()
        return offered if getattr(self.transport, "has_config", True) else offered - self.told_in_config

    def resumed(self) -> None:
        """For device types whose device knows more than its queues: tells it to another one, which has taken the first one's place.

        Called in a thread of the transport's. An exception makes it a device that needs a reset.
        """

    def read_config(self, offset: int, length: int) -> bytes:
        """Configuration bytes of one generation (2.5.1). Fields of optional features must be asked for only if those are offered.

        TransportError: the generation changed at each of `CONFIG_ATTEMPTS` attempts. ValueError: outside the configuration.
        """
        DRIVER_TABLE.target(self._state, DriverStep.READ_CONFIG)
        for _ in range(CONFIG_ATTEMPTS):
            before = self.transport.config_generation
            data = self.transport.config_read(offset, length)
            if self.transport.config_generation == before:
                return data
        raise TransportError(f"the configuration's generation changed during each of {CONFIG_ATTEMPTS} reads (2.5.1)")

    def write_config(self, offset: int, data: bytes) -> None:
        """Writes configuration bytes, which is in order from FEATURES_OK on (3.1.1 step 4). ValueError: outside it, or read-only."""
        DRIVER_TABLE.target(self._state, DriverStep.WRITE_CONFIG)
        self.transport.config_write(offset, data)

    @locked
    def setup_queue(self, index: int, *, size: int = 256, indirect_limit: int = 0) -> DriverQueue:
        """Sets up a queue in the negotiated format and enables it (3.1.1 step 7); buffers may be added and published at once.

        `size` is lowered to what the device allows, never raised. ValueError: a size that no queue of this format has, or no such queue.
        StatusError: out of order, or set up already.
        """
        index = arguments.number("queue index", index)
        step = DriverStep.REENABLE_QUEUE if index in self._queues_reset else DriverStep.SETUP_QUEUE
        DRIVER_TABLE.target(self._state, step)
        if index in self._enabled:
            raise StatusError(f"queue {index} is set up already")
        size = arguments.integer("queue size", size, 1, MAX_QUEUE_SIZE)
        if (most := min(self.transport.queue_max(index), MAX_QUEUE_SIZE)) < 1:
            raise ValueError(f"the device has no queue {index}")
        if size > most:
            size = most if Feature.RING_PACKED in self._features else 1 << most.bit_length() - 1
        resuming = self.transport if isinstance(self.transport, Resuming) else None
        queue = DriverQueue(
            *(self.memory, size),
            features=self._features,
            address=self.address,
            index=index,
            indirect_limit=indirect_limit,
            resumable=resuming is not None,
        )
        try:
            doorbell = self.transport.queue_setup(index, size, queue.areas)
        except BaseException:
            queue.close()
            raise
        if resuming is not None:
            resuming.queue_resumes(index, queue.resume)
        enabled = self._enabled[index] = _Enabled(queue, doorbell, self.transport.interrupt(index))
        self._queues_reset.discard(index)
        self._watching().add(enabled.interrupt)
        if self._state is DriverState.DRIVER_OK:
            queue.connect(doorbell)
        return queue

    @locked
    def reset_queue(self, index: int) -> list[Any]:
        """Resets one queue (2.6.1) and hands back its outstanding tokens; it may then be set up again. StatusError: without RING_RESET."""
        DRIVER_TABLE.target(self._state, DriverStep.RESET_QUEUE)
        if Feature.RING_RESET not in self._features:
            raise StatusError(f"queue {index} cannot be reset: {describe(Feature.RING_RESET)} was not negotiated (2.6.1)")
        if index not in self._enabled:
            raise StatusError(f"queue {index} is not set up")
        self.transport.queue_reset(index)
        self._queues_reset.add(index)
        return self._dismiss(index)

    @locked
    def driver_ok(self) -> None:
        """Step 8 (3.1.1): the device is live. Doorbells ring from now on, at once for queues that have buffers."""
        target = DRIVER_TABLE.target(self._state, DriverStep.DRIVER_OK)
        self._set_status(Status.DRIVER_OK)
        self._state = target
        for enabled in self._enabled.values():
            enabled.queue.connect(enabled.doorbell)
            if enabled.queue.outstanding:
                enabled.doorbell.signal()

    @locked
    def fail(self) -> None:
        """Gives the device up (2.1.1): sets FAILED. Only reset and close are in order afterwards."""
        target = DRIVER_TABLE.target(self._state, DriverStep.FAIL)
        self._state = target
        self.transport.status = self._read_status() | Status.FAILED

    @locked
    def check(self) -> None:
        """Reads the status. DeviceNeedsReset: the device says so (2.1), or was reset behind our back. TransportError: it is gone."""
        target = DRIVER_TABLE.target(self._state, DriverStep.NEEDS_RESET)
        status = self._read_status()
        if self._state is DriverState.DRIVER_OK and Status.DRIVER_OK not in status:
            self._state = target
            raise DeviceNeedsReset(f"the device has lost DRIVER_OK (status {int(status):#x}): it was reset, and not by its driver (2.1)")
        if Status.NEEDS_RESET in status:
            self._state = target
            raise DeviceNeedsReset(f"the device set NEEDS_RESET (status {int(status):#x}): reset it before anything else (2.1)")

    def fileno(self) -> int:
        """One descriptor for a selector: readable when a queue or the configuration has a notification, until `wait` has taken it.

        Whoever sleeps on it calls `arm` first, and does not sleep if that is true. It is readable, too, once the transport is closed.
        StatusError: the driver is closed.
        """
        return self._watching().fileno()

    def arm(self, queues: Iterable[DriverQueue] | None = None) -> bool:
        """Asks for notifications of `queues` (all, if not told); true if one of them has used buffers already, or is broken.

        ValueError: a queue that is not set up here.
        """
        DRIVER_TABLE.target(self._state, DriverStep.WAIT)
        return self._arm(self._chosen(queues))

    def wait(self, timeout: float | None = None, *, queues: Iterable[DriverQueue] | None = None) -> bool:
        """Sleeps until one of `queues` (all, if not told) may have used buffers or is broken, or the configuration changed.

        Arms, looks again, then sleeps; one thread for each queue may do so. True can be a false alarm (2.3), False means that `timeout`
        seconds have passed; a time below 0 is 0. DeviceNeedsReset, TransportError: as `check`, called when the configuration changed and
        when time ran out. StatusError: out of order; or driver or transport are closed, which wakes all who sleep. ValueError: a queue
        that is not set up here.
        """
        DRIVER_TABLE.target(self._state, DriverStep.WAIT)
        time = milliseconds(timeout)
        chosen = self._chosen(queues)
        if self._arm(chosen):
            return True
        if self._serve is not None:
            self._serve()
        config = self.transport.config_interrupt
        ready = self._sleep_on([config, *(enabled.interrupt for enabled in chosen)], time)
        if config in ready or (not ready and time != 0):
            try:
                self.check()
            except DeviceNeedsReset:
                config.signal()  # for other threads that wait
                raise
        return bool(ready)

    def wait_used(self, queue: DriverQueue, timeout: float | None = None) -> list[tuple[Any, int]]:
        """What `queue.pop_used()` gives, waiting for it; empty if `timeout` seconds have passed.

        SpecViolation: the device broke a rule. StatusError: it did so before, and the queue is broken until the device is reset.
        """
        arguments.instance("queue", queue, DriverQueue, "a DriverQueue")
        deadline = None if timeout is None else monotonic() + arguments.seconds("timeout", timeout)
        while not (used := queue.pop_used()):
            if queue.broken is not None:
                raise StatusError(f"queue {queue.index} is broken until the device is reset: {queue.broken}")
            left = None if deadline is None else max(0.0, deadline - monotonic())
            if not self.wait(left, queues=[queue]) or left == 0:
                return queue.pop_used()
        return used

    @contextmanager
    def initializing(self) -> Iterator[None]:
        """For constructors of device types: what goes wrong inside sets FAILED (3.1.1), closes the driver, and goes on its way."""
        try:
            yield
        except BaseException:
            with suppress(VirtioError, OSError):
                if self._state is not DriverState.FAILED:
                    self.fail()
            self.close()
            raise

    @locked
    def close(self) -> None:
        """Resets the device, closes the queues, detaches the memory, and closes it if it was made here. Closing twice is closing once.

        TransportError, StatusError: the device cannot be reset, because it or the transport is gone. The memory is detached all the same,
        but queues and buffers in it stay until `close` is called again; unless the transport knows that nobody writes there any more.
        BufferError: somebody still looks into the driver's own memory; close again when that has ended.
        """
        if self._state is not DriverState.CLOSED:
            try:
                self._leave()
            except (TransportError, StatusError):
                if getattr(self.transport, "gone", False):
                    self._free()
                raise
        self._free()

    def _leave(self) -> None:
        try:
            if self._state is not DriverState.NEW:
                self.reset()
        finally:
            self._state = DRIVER_TABLE.target(self._state, DriverStep.CLOSE)
            watch, self._watch = self._watch, None
            if watch is not None:
                watch.over.signal()
            with suppress(ValueError):  # a transport that was closed first has let go of it
                self.transport.detach(self.memory)

    def _free(self) -> None:
        for enabled in self._enabled.values():  # no reset came through, but the memory is out of the device's reach
            enabled.queue.reset()
            enabled.queue.close()
        self._enabled.clear()
        while self._buffers and not self.memory.closed:
            with suppress(ValueError):  # somebody gave it back already
                self.memory.free(self._buffers.pop())
        if self._owned:
            self.memory.close()

    def __enter__(self) -> Self:
        self._watching()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _watching(self) -> Watch:
        if (watch := self._watch) is None:
            raise StatusError("the driver is closed")
        return watch

    def _sleep_on(self, events: list[EventFd], time: int | None) -> list[EventFd]:
        """As `sleep_on`. No exception that is raised here, or later, keeps the descriptors open that are watched."""
        watch = self._watching()
        ready: list[EventFd] | None = None
        with suppress(StatusError):
            ready = sleep_on(events, time, over=watch.over)
        del watch
        if ready is None:
            what = "driver" if self._state is DriverState.CLOSED else "transport"
            raise StatusError(f"the {what} is closed, so there is nothing to wait for")
        return ready

    def _chosen(self, queues: Iterable[DriverQueue] | None) -> list[_Enabled]:
        enabled = {each.queue: each for each in list(self._enabled.values())}
        try:
            return [enabled[queue] for queue in (enabled if queues is None else queues)]
        except KeyError as stranger:
            raise ValueError(f"{stranger.args[0]!r} is not a queue that is set up here") from None

    def _arm(self, chosen: Iterable[_Enabled]) -> bool:
        found = [each.queue.broken is not None or each.queue.arm() for each in chosen]  # every one is armed
        return any(found)

    def _dismiss(self, index: int) -> list[Any]:
        enabled = self._enabled.pop(index)
        with suppress(StatusError, OSError):  # a transport that is closed took its interrupts with it
            self._watching().remove(enabled.interrupt)
        tokens = enabled.queue.reset()
        enabled.queue.close()
        return tokens

    def _set_status(self, bit: Status) -> Status:
        """Sets a bit beside those set by now, and reads the field back. DeviceNeedsReset: it says so."""
        self.transport.status = self._read_status() | bit
        self.check()
        return self._read_status()

    def _read_status(self) -> Status:
        """TransportError: what a device reads as that was pulled out (all ones)."""
        status = self.transport.status
        if status in (0xFF, 0xFFFF_FFFF):
            raise TransportError(f"device status reads {int(status):#x}: the device is gone")
        return status
