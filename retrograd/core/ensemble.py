"""The same training run at many data weights at once: one stack of models instead of a loop over them.

    θ_s: s = 1 … S       ℓ_t(θ_s; w_s) for all s in one vmap       ∂(Σ_s ℓ_t(θ_s; w_s))/∂θ_s = g_{t,s}
    (θ_s, m_s) → U_t(θ_s, m_s, clip(g_{t,s}))      also under vmap, so that norms are each member's own

Members share the initial parameters, the batches, the schedule and the random draws; only `w_s` differs. No loss depends
on two members, so the gradient of their sum is every member's gradient. Member s is `check.train` at weights w_s up to
the rounding of batched against single products. Memory: S states, and S times the activations of one micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from retrograd.core import tree
from retrograd.core.optim import Moments, Params, clip
from retrograd.core.step import Batch, Objective, Recipe, Training, coefficients, micro_batches, random_draws

__all__ = ["train_many"]


def train_many(
    training: Training,
    params: Params,
    weights: Tensor,
    *,
    objective: Objective,
    observe: Callable[[int, Tensor], None] | None = None,
) -> Params:
    S = len(weights)
    recipe = training.recipe
    alone = {name: theta.detach() for name, theta in params.items()}
    stacked, moments = tree.map(lambda x: x.expand(S, *x.shape).clone(), (alone, recipe.optimizer.init(alone)))
    for t in range(len(training.stream)):
        parts = micro_batches(training.stream[t], recipe.micro_batch_size)
        seed = f"{recipe.seed}/{t}" if recipe.stochastic else None
        losses, grads = _gradient(objective, stacked, parts, weights, seed)
        stacked, moments = _update(recipe, stacked, moments, grads, t)
        if observe is not None:
            observe(t, losses)
    return stacked


def _gradient(objective, params, parts, weights, seed):
    losses, sums = None, []
    for number, batch in enumerate(parts):
        leaves = {name: theta.detach().requires_grad_() for name, theta in params.items()}
        factors = torch.stack([coefficients(batch, w) for w in weights])
        with torch.enable_grad(), random_draws(seed, number):
            found = _values(objective, leaves, batch, factors, seed is not None)
        grads = torch.autograd.grad(found.sum(), list(leaves.values()), materialize_grads=True)
        sums = [a + b for a, b in zip(sums, grads)] if sums else list(grads)
        losses = found.detach() if losses is None else losses + found.detach()
    return losses, dict(zip(params, sums))


def _values(objective, params, batch, factors, stochastic):
    """The loss of every member, [S]."""
    return torch.vmap(lambda p, c: objective(p, batch.inputs, c), randomness="same" if stochastic else "error")(params, factors)


def _update(recipe, params, moments, grads, t):
    def update(params, moments, grads):
        clipped = clip(grads, recipe.max_grad_norm) if recipe.max_grad_norm else grads
        return recipe.optimizer.update(params, moments, clipped, t)
    with torch.no_grad():
        return torch.vmap(update)(params, moments, grads)
