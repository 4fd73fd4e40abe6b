"""A virtqueue in plain Python: what both formats do, without a ring. Nothing is shared, so nothing can go wrong; numbers never wrap."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile


@dataclass(eq=False)
class ModelChain:
    """One buffer on its way from the driver to the device and back."""

    token: int
    slots: int
    """Ring slots that it takes: one for an indirect table."""
    readable: bytes
    writable: int
    segments: list[tuple[int, bool]]
    """(bytes, whether the device may write them)."""
    length: int = 0
    """What the device said that it wrote."""
    written: bytes | None = None
    """What it did write, if it did."""


@dataclass
class Notifications:
    """One direction of notifications: from whoever produces to whoever consumes.

    Positions count chains (and slots, for rings that count those) since the beginning.
    """

    event_idx: bool
    size: int
    first_is_told: bool
    """Whether the first decision notifies whatever was asked for."""
    behind_all: bool
    """Whether arming asks for the next one even if some are left: a device's does, a driver's asks from where it took the last."""
    wish: str = "initial"
    event: int = 0
    event_slots: int = 0
    decided: int = 0
    produced: int = 0
    produced_slots: int = 0
    consumed: int = 0
    consumed_slots: int = 0
    told: int = 0
    silent: int = 0

    def arm(self) -> bool:
        """The consumer asks for a notification at what comes next; true if something is there already."""
        self.wish = "armed"
        if self.behind_all:
            self.event, self.event_slots = self.produced, self.produced_slots
        else:
            self.event, self.event_slots = self.consumed, self.consumed_slots
        return self.consumed < self.produced

    def disarm(self) -> None:
        """The consumer asks for none."""
        self.wish = "disarmed"

    def consume(self, chains: Sequence[ModelChain]) -> None:
        """The consumer has taken these."""
        self.consumed += len(chains)
        self.consumed_slots += sum(chain.slots for chain in chains)

    def unconsume(self, chains: Sequence[ModelChain]) -> None:
        """The consumer hands the newest back."""
        self.consumed -= len(chains)
        self.consumed_slots -= sum(chain.slots for chain in chains)

    def publish(self, chains: Sequence[ModelChain]) -> bool | None:
        """The producer shows these; whether it must notify, must not, or may (None)."""
        if not chains:
            return False
        first, self.decided = self.produced, self.produced + len(chains)
        self.produced = self.decided
        self.produced_slots += sum(chain.slots for chain in chains)
        if first == 0 and (self.first_is_told or self.wish == "initial"):
            return True
        if self.wish == "disarmed":
            return False
        if not self.event_idx:
            return True
        if self.wish == "initial":
            return None  # what zeroed memory asks for after the first one is not the same in both formats
        if self.event >= first:
            return self.event < self.produced
        # The event is behind: a packed ring may take it for one of the next lap.
        return None if self.produced_slots - self.event_slots > self.size else False

    def count(self, chains: int, notified: bool) -> None:
        """Keeps count of decisions: there is none where nothing was published."""
        if chains:
            self.told += notified
            self.silent += not notified


@dataclass
class ModelQueue:
    """Both ends of a queue of `size` slots."""

    size: int
    in_order: bool = False
    event_idx: bool = False
    added: list[ModelChain] = field(default_factory=list)
    """By the driver, seen by nobody."""
    available: list[ModelChain] = field(default_factory=list)
    popped: list[ModelChain] = field(default_factory=list)
    """All that the device took, in order, from the oldest that is still in flight."""
    done: list[ModelChain] = field(default_factory=list)
    """Of those in flight, completed."""
    finished: list[ModelChain] = field(default_factory=list)
    """Seen by nobody; in order, only those whose turn has come."""
    used: list[ModelChain] = field(default_factory=list)
    adds: int = 0
    pops: int = 0
    uses: int = 0
    returns: int = 0

    def __post_init__(self) -> None:
        self.to_device = Notifications(self.event_idx, self.size, first_is_told=False, behind_all=True)
        self.to_driver = Notifications(self.event_idx, self.size, first_is_told=True, behind_all=False)
        self.newest: list[ModelChain | None] = []

    @property
    def outstanding(self) -> list[ModelChain]:
        """Chains that the driver does not have."""
        return self.added + self.available + self.popped + self.finished + self.used

    @property
    def free(self) -> int:
        """Slots that the driver has."""
        return self.size - sum(chain.slots for chain in self.outstanding)

    # The driver.

    def add(self, chain: ModelChain) -> None:
        """There is room: `free` says so."""
        self.added.append(chain)
        self.adds += 1

    def publish_available(self) -> bool | None:
        """Shows what was added; whether the device must be notified."""
        chains, self.added = self.added, []
        self.available += chains
        return self.to_device.publish(chains)

    def pop_used(self, limit: int) -> list[ModelChain]:
        """The oldest that were used."""
        chains, self.used = self.used[:limit], self.used[limit:]
        self.to_driver.consume(chains)
        self.returns += len(chains)
        return chains

    # The device.

    def pop(self, limit: int) -> list[ModelChain]:
        """The oldest that are available."""
        chains, self.available = self.available[:limit], self.available[limit:]
        self.popped += chains
        self.newest += chains
        self.to_device.consume(chains)
        self.pops += len(chains)
        return chains

    def complete(self, chain: ModelChain, length: int) -> None:
        """The chain is done; in order it waits for its turn."""
        chain.length = length
        self.done.append(chain)
        self.newest = [None if each is chain else each for each in self.newest]
        turn = list(takewhile(lambda each: each in self.done, self.popped)) if self.in_order else [chain]
        for each in turn:
            self.popped.remove(each)
            self.done.remove(each)
        self.finished += turn

    def rewindable(self) -> int:
        """How many of the newest popped can be handed back: none before one that was completed."""
        return len(list(takewhile(lambda chain: chain is not None, reversed(self.newest))))

    def rewind(self, count: int) -> list[ModelChain]:
        """The newest `count` are available again, first of all."""
        chains = self.popped[len(self.popped) - count :]
        assert all(chain not in self.done for chain in chains)
        self.popped = self.popped[: len(self.popped) - count]
        self.newest = self.newest[: len(self.newest) - count]
        self.available = chains + self.available
        self.to_device.unconsume(chains)
        self.pops -= count
        return chains

    def publish_used(self) -> bool | None:
        """Shows what is finished; whether the driver must be notified."""
        chains, self.finished = self.finished, []
        self.used += chains
        self.uses += len(chains)
        return self.to_driver.publish(chains)
