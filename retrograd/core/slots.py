"""What a sweep asks of its surroundings: slots for states and for gradients, and a ledger of the bits states had."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from retrograd.core import tree
from retrograd.core.optim import Params
from retrograd.core.step import State

__all__ = ["BlankLedger", "Gradients", "Ledger", "MemorySlots", "ReplayDriftError", "Slots"]


class ReplayDriftError(RuntimeError):
    """A replayed state differs from the original one."""


@runtime_checkable
class Slots(Protocol):
    """Where held states are."""

    def put(self, state: State) -> None: ...

    def get(self, step: int) -> State: ...

    def drop(self, step: int) -> None: ...


@runtime_checkable
class Gradients(Protocol):
    """Where the gradients of steps are kept, before clipping: a step whose gradient is there is taken again by its
    update alone. Any of them may be missing; that costs the step's gradient and changes no bit.
    """

    def put(self, step: int, grads: Params) -> None: ...

    def get(self, step: int) -> Params | None: ...

    def drop(self, step: int) -> None: ...


class MemorySlots:
    """Slots that keep states as they are, by reference: safe, for nothing in a step writes in place."""

    def __init__(self) -> None:
        self.states: dict[int, State] = {}

    def put(self, state: State) -> None:
        self.states[state.step] = state

    def get(self, step: int) -> State:
        return self.states[step]

    def drop(self, step: int) -> None:
        del self.states[step]


@dataclass
class Ledger:
    """Digests of every state of the original run; a replayed state has to match.

    >>> import torch; ledger = Ledger(); ledger.check(State(1, {"x": torch.ones(2)}, {}))  # first time: recorded
    """

    digests: dict[int, str] = field(default_factory=dict)

    def digest(self, state: State) -> str:
        """What tells the state's bits."""
        return tree.digest((state.params, state.moments))

    def check(self, state: State) -> None:
        """Record the state's digest, or compare it.

        Raises:
            ReplayDriftError: If it was recorded with other bits.
        """
        found = self.digest(state)
        expected = self.digests.setdefault(state.step, found)
        if found != expected:
            raise ReplayDriftError(
                f"replayed state {state.step} has digest {found[-12:]}, the original run had {expected[-12:]}: scores "
                "from it would be another run's. The arithmetic changed between training and replay (another "
                "machine, thread count or library, or a nondeterministic kernel); train again on one configuration."
            )


class BlankLedger(Ledger):
    """Of a run that is never replayed: there is nothing to compare, so no state is digested."""

    def check(self, state: State) -> None:
        """Nothing is recorded."""
