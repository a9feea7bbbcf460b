"""What an unlearning term sees: one side of a batch at the places that predict its valid targets.

Padding, prompts and the other side are gone, so a term cannot count them by mistake.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from retrograd.data.pairs import ALTERNATIVE, FORGET, RETAIN
from retrograd.lm.outputs import Outputs

__all__ = ["Side", "View"]


@dataclass(frozen=True, eq=False)
class Side:
    """m valid targets of b sequences of one side of a micro-batch.

    c: w·scale, what a token loss is multiplied by so that the sum over all micro-batches is a weighted token mean, [m].
    scale: 1/Z, Z the valid targets of this side in the whole batch, [m].
    share: 1/(sequences of this side in the whole batch), [b].
    sequence: which of the b each target belongs to, [m].
    pair: the number of the pair each sequence belongs to, [b].
    now, then: the model's and the reference's outputs, at the m targets; `then` is None without a reference.
    """

    now: Outputs
    then: Outputs | None
    c: Tensor
    scale: Tensor
    share: Tensor
    sequence: Tensor
    pair: Tensor

    @property
    def sequences(self) -> int:
        """b."""
        return len(self.share)

    @cached_property
    def w(self) -> Tensor:
        """The data weights themselves, [m]: exactly 1 where they are 1."""
        return self.c / self.scale

    @property
    def logits(self) -> Tensor:
        """[m, V]."""
        assert self.now.logits is not None, "a method that looks at logits says so"
        return self.now.logits

    @property
    def reference(self) -> Outputs:
        assert self.then is not None, "a method that looks at a reference says so"
        return self.then

    @cached_property
    def ce(self) -> Tensor:
        """Cross-entropy of each target, [m] nats."""
        return F.cross_entropy(self.logits, self.now.targets, reduction="none")

    @cached_property
    def reference_ce(self) -> Tensor:
        """The reference's cross-entropy of each target, [m] nats."""
        logits = self.reference.logits
        assert logits is not None, "a method that looks at logits says so"
        return F.cross_entropy(logits, self.now.targets, reduction="none")

    def per_sequence(self, x: Tensor) -> Tensor:
        """Sums of x [m, …] over the targets of each sequence, [b, …]."""
        return x.new_zeros((self.sequences, *x.shape[1:])).index_add(0, self.sequence, x)

    @cached_property
    def counts(self) -> Tensor:
        """Valid targets of each sequence, [b]; they do not depend on the weights."""
        return self.per_sequence(torch.ones_like(self.scale))


@dataclass(frozen=True, eq=False)
class View:
    """A micro-batch: the model's and the reference's outputs, coefficients [B, L], the stream's `inputs`, and what the
    method fitted before the first step."""

    now: Outputs
    then: Outputs | None
    inputs: dict[str, Any]
    coefficients: Tensor
    fitted: Any = None

    @property
    def progress(self) -> Tensor:
        """p_k, []."""
        return self.inputs["progress"][0]

    @cached_property
    def forget(self) -> Side | None:
        """None where the micro-batch has no such row; so for the others."""
        return self._side(FORGET)

    @cached_property
    def retain(self) -> Side | None:
        return self._side(RETAIN)

    @cached_property
    def alternative(self) -> Side | None:
        return self._side(ALTERNATIVE)

    def _side(self, side: int) -> Side | None:
        belongs = self.inputs["side"] == side
        index = belongs[self.now.rows].nonzero().squeeze(1)
        if not len(index):
            return None
        rows, columns = self.now.rows[index], self.now.columns[index]
        return Side(
            now=_at(self.now, index),
            then=None if self.then is None else _at(self.then, index),
            c=self.coefficients[rows, columns],
            scale=self.inputs["scale"][rows, columns],
            share=self.inputs["share"][belongs],
            sequence=(belongs.cumsum(0) - 1)[rows],
            pair=self.inputs["pair"][belongs],
        )


def _at(outputs: Outputs, index: Tensor) -> Outputs:
    chosen: Callable[[Tensor], Tensor] = lambda x: x.index_select(0, index)  # noqa: E731
    return Outputs(
        None if outputs.logits is None else chosen(outputs.logits),
        {block: chosen(x) for block, x in outputs.states.items()},
        chosen(outputs.rows),
        chosen(outputs.columns),
        chosen(outputs.targets),
    )
