"""Status machines as tables (2.1, 3.1): a row for every state, and in it an answer to every step. `driver` and `device` hold one each."""

from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from functools import wraps
from threading import RLock
from typing import Concatenate, Generic, ParamSpec, Protocol, TypeVar

from virtio.errors import StatusError

State = TypeVar("State", bound=Enum)
Step = TypeVar("Step", bound=Enum)
Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


class StatusTable(Generic[State, Step]):
    """Where each step leads from each state, or that it is out of order there.

    `rows` has, for every state, a cell for every step in the order of `steps`: the next state, or None for a step that is refused.
    """

    def __init__(self, side: str, states: type[State], steps: type[Step], rows: Mapping[State, Sequence[State | None]]) -> None:
        if set(rows) != set(states):
            raise ValueError(f"the {side}'s table has rows for {set(rows)}, not for {set(states)}")
        self.side = side
        self.cells = {(state, step): cell for state, row in rows.items() for step, cell in zip(steps, row, strict=True)}

    def allowed(self, state: State) -> list[Step]:
        """The steps that are in order in `state`."""
        return [step for (row, step), cell in self.cells.items() if row is state and cell is not None]

    def target(self, state: State, step: Step) -> State:
        """Where `step` leads from `state`. StatusError: it is out of order there; the message tells what is not."""
        if (cell := self.cells[state, step]) is not None:
            return cell
        allowed = ", ".join(each.value for each in self.allowed(state)) or "nothing"
        raise StatusError(f"{self.side}: {step.value} is out of order in state {state.value}; allowed there: {allowed} (3.1.1)")


class Locked(Protocol):
    """What `locked` needs of a class."""

    _lock: RLock


Owner = TypeVar("Owner", bound=Locked)


def locked(method: Callable[Concatenate[Owner, Parameters], Result]) -> Callable[Concatenate[Owner, Parameters], Result]:
    """Lets one thread at a time into the methods of an object that are marked so; they may call each other."""

    @wraps(method)
    def entered(self: Owner, /, *args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        with self._lock:
            return method(self, *args, **kwargs)

    return entered
