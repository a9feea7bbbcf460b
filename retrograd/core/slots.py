"""What a sweep asks of its surroundings: slots for states and for gradients, and a ledger of the bits states had."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from retrograd.core import tree
from retrograd.core.optim import Params
from retrograd.core.step import State

__all__ = [
    "BlankLedger", "Gradients", "Ledger", "MemorySlots", "ReplayDriftError", "Slots", "digest_of", "joined_digest",
]  # fmt: skip


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
    """Digests of every state of the original run, by step; a replayed state has to match.

    Args:
        pieces: Of each leaf, which are digested one after the other.

    >>> import torch; ledger = Ledger(); ledger.check(State(1, {"x": torch.ones(2)}, {}))  # first time: recorded
    """

    digests: dict[int, str] = field(default_factory=dict)
    pieces: int = 1

    def digest(self, state: State) -> str:
        """What tells the state's bits."""
        return digest_of(state, self.pieces)

    def check(self, state: State) -> None:
        """Record the state's digest, or compare it.

        Raises:
            ReplayDriftError: If it was recorded with other bits.
        """
        digest = self.digest(state)
        expected = self.digests.setdefault(state.step, digest)
        if digest != expected:
            raise ReplayDriftError(
                f"replayed state {state.step} has digest {digest[-12:]}, the original run had {expected[-12:]}: scores "
                "from it would be another run's. The arithmetic changed between training and replay (another "
                "machine, thread count or library, or a nondeterministic kernel); train again on one configuration."
            )


def digest_of(state: State, pieces: int = 1) -> str:
    """The digest of a state; of several pieces of each leaf, that of the first ones of all leaves, and so on."""
    leaves = tree.leaves((state.params, state.moments))
    if pieces == 1:
        return tree.digest(leaves)
    cut = [tree.cut(leaf, pieces) for leaf in leaves]
    return joined_digest(tree.digest(each) for each in zip(*cut))


def joined_digest(digests: Iterable[str]) -> str:
    """That of a state, from those of its pieces."""
    return hashlib.blake2b("".join(digests).encode(), digest_size=16).hexdigest()


class BlankLedger(Ledger):
    """Of a run that is never replayed: there is nothing to compare, so no state is digested."""

    def check(self, state: State) -> None:
        """Nothing is recorded."""
