"""What a gradient leaves for the pullback of the same step: it saves work, and no bit depends on it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from retrograd.core import tree
from retrograd.core.step import State, Training, needs_gradient, recovered

__all__ = ["Residual", "Residuals"]


class Residual(NamedTuple):
    """What a gradient found at x, left for its pullback: of use where the pullback comes to the same bits of x."""

    place: Tensor
    found: Any

    @classmethod
    def of(cls, x: Tensor, left: Any) -> Residual | None:
        """None where nothing was left."""
        return None if left is None else cls(tree.bit_sums(x), left)

    def at(self, x: Tensor) -> Any:
        return self.found if torch.equal(self.place, tree.bit_sums(x)) else None


class Residuals:
    """What the gradients of the latest steps left for their pullbacks, up to a number of bytes; the oldest go first.

    A pullback finds the same without: this saves work and changes no bit.

    >>> kept = Residuals(8); kept.put(1, torch.zeros(1)); kept.put(2, torch.zeros(2)); kept.take(1), kept.take(2)
    (None, tensor([0., 0.]))
    """

    def __init__(self, limit: int) -> None:
        self.limit, self._size = limit, 0
        self._kept: dict[int, Any] = {}

    @classmethod
    def of(cls, training: Training, state: State) -> Residuals:
        """A quarter of a state's bytes; nothing where the sweep computes every gradient anyway."""
        steps = range(len(training.stream))
        known = recovered(training.recipe, state, state.moments) is not None
        known = known or not all(needs_gradient(training, step) for step in steps)
        return cls(tree.nbytes(state) // 4 if known else 0)

    def put(self, step: int, residual: Any) -> None:
        self.take(step)
        self._kept[step] = residual
        self._size += tree.nbytes(residual)
        while self._size > self.limit:
            self.take(next(iter(self._kept)))

    def take(self, step: int) -> Any:
        """What step `step` left, given away; None if it is not here."""
        residual = self._kept.pop(step, None)
        self._size -= tree.nbytes(residual)
        return residual
