"""A latent prompt: vectors in place of a prompt's embeddings, by Adam on half A's questions.

The strongest of what an attacker may put before a model that stays as it is: no tokens have to be found for it. Source:
Schwinn et al., Soft prompt threats (2402.09063); prompt tuning, Lester et al. (2104.08691).
"""

from __future__ import annotations

import torch

from retrograd.attack.prompted.contract import Given, Search, State
from retrograd.lm.virtual import embedded

__all__ = ["SEARCH"]

_BETAS, _EPS = (0.9, 0.999), 1e-8


def _start(given: Given) -> State:
    """The embeddings of drawn tokens."""
    allowed = given.allowed.nonzero()[:, 0]
    drawn = torch.randint(len(allowed), (given.one.tokens,), generator=given.generator("start"))
    vectors = embedded(given.lm, allowed[drawn])
    size = embedded(given.lm, allowed).double().square().mean().sqrt()
    zeros = {name: torch.zeros_like(vectors) for name in ("mean", "square")}
    return State(0, float("nan"), 0, 0, {"vectors": vectors, "size": size.to(vectors), **zeros})


def _advance(given: Given, state: State) -> State:
    """One step of Adam, at a rate in units of the embeddings' size."""
    vectors, mean, square, size = (state.tensors[name] for name in ("vectors", "mean", "square", "size"))
    loss, gradient, read = given.descent(given.drawn(state.step), vectors)
    step, (b1, b2) = state.step + 1, _BETAS
    mean = b1 * mean + (1 - b1) * gradient
    square = b2 * square + (1 - b2) * gradient.square()
    move = (mean / (1 - b1**step)) / ((square / (1 - b2**step)).sqrt() + _EPS)
    tensors = {"vectors": vectors - given.one.lr * size * move, "mean": mean, "square": square, "size": size}
    return State(step, loss, state.read + read, state.back + read, tensors)


SEARCH = Search(
    name="latent",
    formula="p ← p − lr·rms(E)·Adam(∂loss/∂p), p vectors in place of embeddings, of questions drawn from half A",
    start=_start,
    advance=_advance,
    ids=lambda given, state: given.virtual(),
    vectors=lambda state: state.tensors["vectors"],
)
