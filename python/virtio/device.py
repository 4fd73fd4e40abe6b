"""The device's side (2.1.2, 2.2.2, 3.1): one core that every transport serves, and the base class of device types.

A device type is constants and a handler for each queue:

    class Dice(Device):
        device_id = DeviceId.ENTROPY
        queues = ("requestq",)

        def on_requestq(self, queue: DeviceQueue) -> None:
            for chain in queue.pop(limit=64):
                queue.complete(chain, chain.write(os.urandom(min(chain.writable, 4096))))
            queue.publish()

The driver is not trusted. What it asks for out of order, or with impossible numbers, is refused with an exception and changes nothing; a
transport made of registers ignores such a write. A broken rule in a queue makes the device need a reset.
"""

from collections.abc import Callable, Iterable
from contextlib import suppress
from threading import RLock
from typing import Any, ClassVar, Final, NamedTuple

from virtio import arguments
from virtio._core import DeviceQueue, EventFd, GuestMemory, Memory
from virtio.device_status import DEVICE_TABLE as DEVICE_TABLE
from virtio.device_status import STATES, STATUS_STEPS
from virtio.device_status import DeviceState as DeviceState
from virtio.device_status import DeviceStep as DeviceStep
from virtio.errors import FeatureNegotiationError, SpecViolation, StatusError, VirtioError
from virtio.features import Features, Requires, broken_rules, check_accepted, features_of
from virtio.spec import MAX_QUEUE_SIZE, Feature, Status
from virtio.status import locked
from virtio.transport import check_negotiable

RING_FEATURES: Final = Features({Feature.VERSION_1, Feature.RING_PACKED, Feature.EVENT_IDX, Feature.INDIRECT_DESC, Feature.RING_RESET})
"""What every device offers beside its type's own features. IN_ORDER is the type's to offer: its handlers must keep the order."""

POLL_ROUNDS: Final = 64
"""How often one `poll` calls a queue's handler at most, so that a driver that never stops does not keep it for ever."""


_LAZY: Final = 0x2A0  # CO_GENERATOR, CO_COROUTINE, CO_ASYNC_GENERATOR
LONGEST_CHAIN: Final = 1024
"""The highest `chain_limit`, unless the queue has more entries."""


class _Served(NamedTuple):
    """An enabled queue, what wakes the device for it, and who serves it."""

    queue: DeviceQueue
    doorbell: EventFd
    handler: Callable[[DeviceQueue], None]
    error: EventFd | None = None
    """Signalled when the queue breaks (vhost-user)."""


class Device:
    """Base class of device types, and all that a transport needs of one.

    A subclass sets `device_id` and `queues`, the queues' names by index, and has a method `on_<name>(queue)` for each: called while the
    queue may have buffers, it pops some, completes and publishes them. It may leave buffers in the queue, or complete them later from
    anywhere. A `SpecViolation` that it raises or lets through makes the device need a reset; any other exception is left to whoever called
    `poll`.

    `config` is the configuration space (2.5), `features` are the bits that the type offers beside `RING_FEATURES`, `rules` the
    dependencies between them. `offered` replaces all that is offered, in one object.
    """

    device_id: ClassVar[int]
    queues: tuple[str, ...] = ()
    """The queues' names by index. An instance may have its own, set before the constructor is called."""
    queue_size: ClassVar[int] = 256
    """Most entries of a queue: a power of two, at most 32768. Which format it has, the driver chooses."""
    chain_limit: ClassVar[int | None] = None
    """Most descriptors of a chain, those of its table included; None: as many as the queue has entries. At most 1024, or that."""
    features: ClassVar[Iterable[int]] = ()
    rules: ClassVar[tuple[Requires, ...]] = ()
    discarded: frozenset[int] = frozenset()
    """Queues whose chains are discarded while the transport has them disabled (vhost-user); the others wait."""
    config: bytes = b""

    def __init__(self, *, offered: Iterable[int] | None = None) -> None:
        """ValueError: a bit that no device may offer (2.2.2), one without another that it requires, or a number out of its range.

        TypeError: a handler is missing, or a class attribute is of another type.
        """
        _check_constants(self)
        own = f"{type(self).__name__}.features"
        self.offered: Final = (
            RING_FEATURES | features_of(own, self.features) if offered is None else features_of("offered", offered) | {Feature.VERSION_1}
        )
        check_negotiable(self.offered)
        if broken := broken_rules(self.offered, self.rules):
            raise ValueError(f"features offered without what they require: {broken}")
        self.memory: Final = GuestMemory()
        """What of the driver's memory the device reaches; the transport fills it."""
        self.refused: FeatureNegotiationError | None = None
        """Why FEATURES_OK did not stick the last time, if it did not."""
        self._lock = RLock()
        self._status = Status(0)
        self._accepted = Features()
        self._served: dict[int, _Served] = {}
        self._turns: tuple[_Served, ...] | None = None
        """What `spin` serves; None: to be found again."""
        self._queues_reset: set[int] = set()
        self._config_interrupt: EventFd | None = None
        self._serving_changed: EventFd | None = None
        self._config_generation = 0
        self._queues_move = False
        self._assumed = Features()
        for index, name in enumerate(self.queues):
            if not callable(handler := self.handler(index)):
                raise TypeError(f"{type(self).__name__} has no method on_{name} for its queue {name!r}")
            if getattr(getattr(handler, "__code__", None), "co_flags", 0) & _LAZY:
                raise TypeError(f"{type(self).__name__}.on_{name} is a coroutine or a generator: a call of it does nothing")

    # What a device type may override, beside its queues' handlers.

    def config_written(self, offset: int, data: bytes) -> None:
        """The driver writes configuration bytes inside `config`. ValueError, as here: they are read-only."""
        raise ValueError(f"configuration bytes {offset}..{offset + len(data)} are read-only")

    def was_reset(self) -> None:
        """The driver has reset the device (2.4): queues and chains of before are gone."""

    def handler(self, index: int) -> Callable[[DeviceQueue], None]:
        """What `poll` calls for queue `index`, as it is named when it is enabled: the method `on_<name>`."""
        return getattr(self, f"on_{self.queues[index]}", None)  # type: ignore[return-value]  # which the constructor refuses

    def serves(self, index: int) -> bool:
        """Whether `poll` is what serves queue `index`. False: somebody does by hand, and waits on its doorbell.

        Call `serving_changed` when the answer is another one for a queue that may be enabled.
        """
        return True

    # What a device type calls.

    @locked
    def serving_changed(self) -> None:
        """What `serves` says is another: `spin` looks again, and so does the transport that waits on doorbells."""
        self._turns = None
        if self._serving_changed is not None:
            self._serving_changed.signal()

    @locked
    def change_config(self, config: bytes | bytearray | memoryview) -> None:
        """Replaces the configuration, changes its generation (2.5), and notifies a driver that has set DRIVER_OK (3.2.1).

        ValueError: it is shorter than before, and a driver may read all that there was.
        """
        data = arguments.buffer("config", config)
        if len(data) < len(self.config):
            raise ValueError(f"config of {len(data)} bytes is shorter than the {len(self.config)} that drivers know")
        self.config = data
        self._config_generation = (self._config_generation + 1) % (1 << 32)
        self._notify_config()

    @locked
    def need_reset(self) -> None:
        """Stops until the driver resets the device: sets NEEDS_RESET, and under DRIVER_OK notifies the driver (2.1.2)."""
        DEVICE_TABLE.target(self.state, DeviceStep.NEED_RESET)
        for served in self._served.values():
            if served.error is not None and served.queue.broken is not None:
                served.error.signal()
        if Status.NEEDS_RESET not in self._status:
            self._status |= Status.NEEDS_RESET
            self._turns = None
            self._notify_config()

    @locked
    def check_queues(self) -> None:
        """For those who serve queues outside their handlers: `need_reset`, if one is broken and the driver does not know."""
        live = self.state is DeviceState.DRIVER_OK
        if live and any(served.queue.broken is not None for served in self._served.values()):
            self.need_reset()

    # The far end, for transports.

    @property
    def state(self) -> DeviceState:
        """How far the driver has come."""
        return next((state for bit, state in STATES if bit in self._status), DeviceState.RESET)

    @property
    def status(self) -> Status:
        """The device status field (2.1)."""
        return self._status

    @property
    def accepted(self) -> Features:
        """What the driver has accepted; from FEATURES_OK on it does not change until reset."""
        return self._accepted

    @property
    def config_generation(self) -> int:
        """Counts changes of the configuration (2.5), modulo 2**32."""
        return self._config_generation

    @property
    def connected(self) -> bool:
        """Whether it is on a transport that hears of changes of its configuration."""
        return self._config_interrupt is not None

    @locked
    def connect(self, config_interrupt: EventFd | None, *, serving_changed: EventFd | None = None) -> None:
        """Gives the device what it signals for configuration-change notifications, and when `serves` may say something else.

        StatusError: it has one, so it is on a transport.
        """
        if config_interrupt is not None:
            arguments.instance("config_interrupt", config_interrupt, EventFd, "an EventFd")
        if serving_changed is not None:
            arguments.instance("serving_changed", serving_changed, EventFd, "an EventFd")
        if config_interrupt is not None and self._config_interrupt is not None:
            raise StatusError("the device is on a transport already")
        self._config_interrupt, self._serving_changed = config_interrupt, serving_changed

    @locked
    def accept(self, features: Features) -> None:
        """The driver writes what it accepts (3.1.1 step 4). Whether that can be is said at FEATURES_OK. StatusError: out of order."""
        DEVICE_TABLE.target(self.state, DeviceStep.ACCEPT)
        self._accepted = Features(features)

    @locked
    def write_status(self, value: int) -> None:
        """The driver writes the status field (2.1.1); 0 is a reset.

        FEATURES_OK does not stick if the accepted features are not a valid subset of the offered ones: `refused` then tells why.
        StatusError: a bit is cleared or set out of order, and nothing changes. ValueError: wider than 8 bits. Bits that are not the
        driver's are ignored.
        """
        if not 0 <= arguments.number("status", value) <= 0xFF:
            raise ValueError(f"status {value:#x} is outside 0..0xff")
        if value == 0:
            self.reset()
            return
        if cleared := [bit.name for bit, _ in STATUS_STEPS if bit in self._status and not bit & value]:
            raise StatusError(f"device: status bits {', '.join(map(str, cleared))} are cleared only by a reset (2.1.1)")
        new = [(bit, step) for bit, step in STATUS_STEPS if bit & value and bit not in self._status]
        state = self.state
        for _, step in new:  # all or nothing
            state = DEVICE_TABLE.target(state, step)
        for bit, _ in new:
            if bit is Status.FEATURES_OK and not self._features_stick():
                return
            self._status |= bit
            self._turns = None
            if bit is Status.DRIVER_OK:
                for served in self._served.values():  # whoever sleeps on the doorbells looks once at what was published before
                    served.doorbell.signal()

    def read_config(self, offset: int, length: int) -> bytes:
        """Configuration bytes, in any state (2.5.2). ValueError: outside the configuration."""
        self._check_config(offset, length)
        return bytes(self.config[offset : offset + length])

    @locked
    def write_config(self, offset: int, data: bytes) -> None:
        """The driver writes the configuration. StatusError: before FEATURES_OK (3.1.1). ValueError: outside it, or read-only."""
        DEVICE_TABLE.target(self.state, DeviceStep.WRITE_CONFIG)
        self._check_config(offset, len(data))
        self.config_written(offset, data)

    def queue_max(self, index: int) -> int:
        """Most entries that queue `index` may have; 0 if there is no such queue."""
        return self.queue_size if 0 <= arguments.number("queue index", index) < len(self.queues) else 0

    def queue(self, index: int) -> DeviceQueue | None:
        """The enabled queue at `index`, for devices that serve it outside its handler.

        Its `base` tells where to resume only while nothing is in flight: complete and publish, or rewind, every chain before it is saved.
        """
        served = self._served.get(index)
        return None if served is None else served.queue

    def doorbell(self, index: int) -> EventFd | None:
        """What the driver rings for the enabled queue at `index`, for those who serve it themselves."""
        served = self._served.get(index)
        return None if served is None else served.doorbell

    @locked
    def begin(self, features: Features, *, assumed: Iterable[int] = ()) -> None:
        """For a transport without the status field: a reset, then DRIVER_OK at once with `features`; until reset queues come and go.

        `assumed`: features of which the driver's transport takes care itself, so that what depends on them may be accepted (vhost-user).
        FeatureNegotiationError: these features cannot be; the device is reset.
        """
        self.reset()
        self._assumed, self._queues_move = Features(assumed), True
        self.write_status(Status.ACKNOWLEDGE | Status.DRIVER)
        self.accept(features)
        self.write_status(self._status | Status.FEATURES_OK)
        if (refused := self.refused) is not None:
            self.reset()
            raise refused
        self.write_status(self._status | Status.DRIVER_OK)

    @locked
    def setup_queue(
        self,
        index: int,
        size: int,
        areas: tuple[int, int, int],
        *,
        doorbell: EventFd,
        interrupt: EventFd | None,
        base: int | None = None,
        error: EventFd | None = None,
        inflight: tuple[Memory, int] | None = None,
    ) -> None:
        """Enables a queue; until reset its size and areas stay (3.1.1 step 7, 2.6.1).

        `doorbell` is what the driver rings, `interrupt` what used-buffer notifications signal, `base` where a ring resumes (as of
        `DeviceQueue`), `error` what is signalled when the queue breaks, `inflight` where chains in flight are tracked (as of
        `DeviceQueue`). StatusError: out of order, or the queue is enabled. ValueError: no
        such queue, a size that it may not have, or areas unaligned or outside memory. MalformedChain: the base does not fit the ring.
        """
        moves = index in self._queues_reset or (self._queues_move and self.state is DeviceState.DRIVER_OK)
        step = DeviceStep.REENABLE_QUEUE if moves else DeviceStep.SETUP_QUEUE
        DEVICE_TABLE.target(self.state, step)
        if not (most := self.queue_max(index)):
            there = sum(self.queue_max(each) > 0 for each in range(len(self.queues)))
            raise ValueError(f"queue {index} does not exist: the device has {there}")
        if index in self._served:
            raise StatusError(f"queue {index} is enabled: size and areas stay as they are until it is reset (2.6.1)")
        limit = self.chain_limit and min(self.chain_limit, max(LONGEST_CHAIN, size))
        features, memory = self._accepted, self.memory
        queue = DeviceQueue(
            memory, size, areas, features=features, index=index, max_size=most, chain_limit=limit, base=base, inflight=inflight
        )
        queue.connect(interrupt)
        self._served[index] = _Served(queue, doorbell, self.handler(index), error)
        self._turns = None
        self._queues_reset.discard(index)

    @locked
    def stop_queue(self, index: int) -> int:
        """Takes a queue off a device that has begun (`begin`); returns where it resumes.

        Chains in flight are completed if they stand in bursts, and handed back if they are the newest. StatusError: not enabled.
        """
        if (served := self._served.pop(index, None)) is None:
            raise StatusError(f"queue {index} is not enabled")
        self._turns = None
        queue = served.queue
        if queue.broken is None:
            with suppress(VirtioError):
                queue.settle()
            _hand_back(queue, (queue.progress[0] - queue.outstanding, 0))
        base = queue.base
        queue.close()
        return base

    @locked
    def reset_queue(self, index: int) -> None:
        """Forgets all about one queue (2.6.1.1), which may then be set up again. StatusError: out of order, or without RING_RESET."""
        DEVICE_TABLE.target(self.state, DeviceStep.RESET_QUEUE)
        if Feature.RING_RESET not in self._accepted:
            raise StatusError(f"queue {index} cannot be reset: RING_RESET (bit {Feature.RING_RESET.value}) was not negotiated (2.6.1)")
        if (served := self._served.pop(index, None)) is None:
            raise StatusError(f"queue {index} is not enabled")
        self._turns = None
        served.queue.close()
        self._queues_reset.add(index)

    @locked
    def reset(self) -> None:
        """Back to the beginning (2.4.1): status 0, no features accepted, no queue enabled."""
        DEVICE_TABLE.target(self.state, DeviceStep.RESET)
        for served in self._served.values():
            served.queue.close()
        self._served.clear()
        self._turns = None
        self._queues_reset.clear()
        self._queues_move, self._assumed = False, Features()
        self._accepted = Features()
        self._status = Status(0)
        self.was_reset()

    def rounds(self, index: int) -> int:
        """How often one `poll` calls this queue's handler, at most: less than `POLL_ROUNDS` for what takes long."""
        return POLL_ROUNDS

    @locked
    def poll(self) -> int:
        """Serves every queue until the driver has made nothing more available; returns how many handler calls that took.

        Before DRIVER_OK, and once a reset is needed, nothing is served (2.1.2). Each queue is left asking for a notification, or with its
        doorbell signalled by ourselves if there is more to do than its `rounds` allow. SpecViolation: the driver broke a rule; the device
        needs a reset from then on. Whatever else a handler raises comes through: what it completed is published, what it popped besides
        is handed back, and the queue is ready to be polled again.
        """
        calls = 0
        ready = dict(self._served)
        for index, served in self._served.items():
            if not self.serves(index) and served.queue.broken is None:
                del ready[index]
        late: list[_Served] = []
        for number in range(POLL_ROUNDS):
            for index, served in list(ready.items()):
                if self.state is not DeviceState.DRIVER_OK:
                    return calls
                if served.queue.broken is not None:  # found outside its handler
                    self.need_reset()
                    return calls
                served.doorbell.drain()
                if not served.queue.arm():
                    del ready[index]
                    continue
                if number and number >= self.rounds(index):
                    late.append(ready.pop(index))
                    continue
                calls += 1
                if not self._serve(served):
                    del ready[index]
            if not ready:
                break
        for served in (*late, *ready.values()):
            served.doorbell.signal()
        return calls

    @locked
    def spin(self) -> int:
        """Serves every queue once, and asks for no notification: for whoever calls it over and over. How many handlers took something.

        Otherwise as `poll`, which is to be called before anybody sleeps on the doorbells again.
        """
        if (turns := self._turns) is None:
            ready = self._served.items() if self.state is DeviceState.DRIVER_OK else ()
            turns = self._turns = tuple(served for index, served in ready if self.serves(index))
        took = 0
        for served in turns:
            if self._turns is not turns:  # a handler changed what there is
                break
            if served.queue.broken is not None:  # found outside its handler
                self.need_reset()
                break
            if self._call(served):
                served.queue.disarm()  # with EVENT_IDX that lasts for 65535 chains
                took += 1
        return took

    def _serve(self, served: _Served) -> bool:
        """Lets the handler look, unasked for notifications; tells whether it took anything, so that looking again makes sense.

        If it takes nothing it looks once more with the queue armed: what comes later rings the doorbell.
        """
        served.queue.disarm()
        if self._call(served):
            return True
        if served.queue.broken is None:
            served.queue.arm()
            return self._call(served)
        return False

    def _call(self, served: _Served) -> bool:
        """Calls the handler; tells whether it took anything."""
        queue = served.queue
        before = queue.progress
        try:
            served.handler(queue)
        except SpecViolation:
            if served.error is not None and queue.broken is None:
                served.error.signal()
            self.need_reset()
            raise
        except BaseException:
            _hand_back(queue, before)
            served.doorbell.signal()  # what it left is looked at again
            raise
        if queue.broken is not None:  # the handler kept the exception to itself
            self.need_reset()
            return False
        return queue.progress != before

    def _features_stick(self) -> bool:
        self.refused = None
        try:
            check_accepted(self._accepted, self.offered, self.rules, assumed=self._assumed)
            if Feature.VERSION_1 not in self._accepted:
                missing = Features({Feature.VERSION_1})
                raise FeatureNegotiationError(f"{missing} was not accepted: there is no legacy interface (6.2)", self.offered, missing)
        except FeatureNegotiationError as refused:
            self.refused = refused
        return self.refused is None

    def _notify_config(self) -> None:
        if Status.DRIVER_OK in self._status and self._config_interrupt is not None:
            self._config_interrupt.signal()

    def _check_config(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > len(self.config):
            raise ValueError(f"configuration bytes {offset}..{offset + length} are outside 0..{len(self.config)}")


def check_device(device: Device) -> None:
    """TypeError: it is none, a class of devices, or one whose constructor does not call the base class's."""
    arguments.instance("device", device, Device, "a Device, as RngDevice()")
    if "_lock" not in vars(device):
        raise TypeError(f"{type(device).__name__}.__init__ does not call super().__init__()")


def _check_constants(device: Device) -> None:
    """What a device type says of itself, before a driver finds out."""
    kind = type(device).__name__

    def check(name: str, right: bool, wanted: str) -> None:
        if not right:
            found = repr(getattr(device, name)) if hasattr(device, name) else "missing"
            raise TypeError(f"{kind}.{name} is {found}: it has to be {wanted}")

    def check_number(name: str, most: int) -> None:
        value: Any = getattr(device, name, None)
        check(name, isinstance(value, int) and not isinstance(value, bool), "an integer")
        if not 1 <= value <= most:
            raise ValueError(f"{kind}.{name} {value:d} is outside 1..{most}")

    check_number("device_id", 0xFFFF_FFFF)
    names, rules = device.queues, device.rules
    check("queues", isinstance(names, tuple | list) and all(isinstance(name, str) for name in names), "a tuple of names")
    if len(set(names)) < len(names):
        raise ValueError(f"{kind}.queues {names} has a name twice")
    check_number("queue_size", MAX_QUEUE_SIZE)
    if device.queue_size & device.queue_size - 1:
        raise ValueError(f"{kind}.queue_size {device.queue_size:d} is no power of two, as a split queue's is (2.7)")
    if device.chain_limit is not None:
        check_number("chain_limit", max(LONGEST_CHAIN, device.queue_size))
    check("rules", isinstance(rules, tuple | list) and all(isinstance(rule, Requires) for rule in rules), "a tuple of Requires")
    config = vars(device).get("config", type(device).config)
    check("config", isinstance(config, bytes | bytearray | memoryview) or hasattr(config, "__get__"), "bytes")  # or made when it is read


def _hand_back(queue: DeviceQueue, before: tuple[int, int]) -> None:
    """Publishes what a failed handler completed, and hands back what it popped and left, as far as that goes: the newest chains."""
    popped = queue.progress[0] - before[0]
    with suppress(ValueError, VirtioError):
        for _ in range(min(popped, queue.outstanding)):
            queue.rewind()
    with suppress(VirtioError):
        queue.publish()
