"""Two machines on one cable: what the one does wrong is nothing to the other."""

import tempfile
from contextlib import ExitStack

from tests.vhost_user.frontend import Frontend
from tests.without_proc import without_proc
from virtio import Feature
from virtio.cli.switch import Patch
from virtio.features import Features
from virtio.vhost_user.backend import Backend

PACKET = bytes(12) + b"\xff" * 6 + b"\x02" + bytes(53)


class Cable:
    """Both machines by hand, and what each is told of."""

    def __init__(self, stack: ExitStack, folder: str) -> None:
        self.told: tuple[list[Exception], list[Exception]] = ([], [])
        ends = Patch.pair_of(None, [told.append for told in self.told], macs=(None, None), queue_pairs=1)
        self.backends = [
            stack.enter_context(Backend(f"{folder}/{number}", end, report=told.append))
            for number, (end, told) in enumerate(zip(ends, self.told, strict=True))
        ]
        self.machines = [stack.enter_context(Frontend.at(f"{folder}/{number}", self)) for number in (0, 1)]  # type: ignore[arg-type]
        for machine in self.machines:
            machine.negotiate(Features({Feature.VERSION_1}))
            for index in (0, 1):
                machine.queue(index)

    def process(self) -> bool:
        """As a back-end, of either that has something to do."""
        return any(backend.process() for backend in self.backends)

    def start(self, number: int, deaf: int | None = None) -> None:
        """A machine's rings; one of them may be told through a socket that takes nothing."""
        machine = self.machines[number]
        for queue in machine.queues:
            machine.start(queue)
        if deaf is not None:
            machine.deafen(deaf)

    def add(self, number: int) -> None:
        """A machine's buffer to receive into."""
        machine = self.machines[number]
        machine.queues[0].add("buffer", writable=[machine.room(1600)])
        machine.queues[0].publish()
        machine.turn()

    def send(self, number: int) -> None:
        """A frame of a machine."""
        machine = self.machines[number]
        machine.queues[1].add("frame", readable=[machine.room(72, PACKET)])
        machine.queues[1].publish()
        machine.turn()

    def check(self, guilty: int) -> None:
        """The frame has passed, and this machine alone is told of what happened."""
        assert self.machines[0].queues[1].pop_used() == [("frame", 0)]
        assert self.machines[1].queues[0].pop_used() == [("buffer", 72)]
        assert [backend.connections for backend in self.backends] == [1, 1]
        assert {type(error) for error in self.told[guilty]} == {OSError} and not self.told[1 - guilty]


def receiver_is_deaf() -> None:
    with ExitStack() as stack:
        cable = Cable(stack, stack.enter_context(tempfile.TemporaryDirectory()))
        cable.start(0)
        cable.start(1, deaf=0)
        cable.add(1)
        cable.send(0)
        cable.check(guilty=1)


def sender_is_deaf() -> None:
    with ExitStack() as stack:
        cable = Cable(stack, stack.enter_context(tempfile.TemporaryDirectory()))
        cable.start(0, deaf=1)
        cable.start(1)
        cable.send(0)  # it waits for room
        cable.add(1)
        cable.check(guilty=0)


def test_a_machine_that_cannot_be_told_of_a_frame_does_not_end_its_sender() -> None:
    without_proc(receiver_is_deaf)


def test_a_machine_that_cannot_be_told_of_room_does_not_end_who_gave_it() -> None:
    without_proc(sender_is_deaf)
