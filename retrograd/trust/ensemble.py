"""The same training run at many data weights at once: one stack of models instead of a loop over them.

    g_{t,s} = ∂/∂θ_s Σ_r ℓ_t(θ_r; w_r)          s, r = 1 … S; one vmap over the loss, one backward pass
    (θ_s, m_s) ← U_t(θ_s, m_s, clip(g_{t,s}))    also under vmap, so that norms are each member's own

Members share the initial parameters, the batches, the schedule and the random draws; only the data weights w_s differ.
No loss depends on two members, so the gradient of the sum is every member's own. Member s is `check.train` at w_s but
for the rounding of stacked against single products. Products and vector loops may also round one place of a stack
differently from another, so members of equal weights are trained once: their difference is exactly 0. Memory: S times
the training state, and S times the activations of one micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from retrograd.core import tree
from retrograd.core.draws import random_draws
from retrograd.core.optim import Params
from retrograd.core.step import Batch, Objective, Training, coefficients, micro_batches_of, updated

__all__ = ["check_objective", "train_many"]


def train_many(
    training: Training,
    params: Params,
    weights: Tensor,
    *,
    objective: Objective,
    observe: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Params:
    """Final parameters of the run at each of S data weights, [S, *shape].

    Members of equal weights have equal bits; put the baseline that others are compared with into the same call, since
    another stack rounds differently.

    Args:
        training: The run. Its weights and its engine are not used.
        params: Initial parameters of every member.
        weights: Data weights of each member, [S, *training.weights.shape].
        objective: The loss, as the engine has it. It has to run under `torch.vmap`; those of `causal_objective` do.
        observe: Called after each step with (step, weighted batch losses [S] in nats, gradient norms [S]). A member
            that left the finite numbers shows there, and stops no other.
    Raises:
        ValueError: If the weights' shape does not fit, or the objective does not run under vmap or has another value
            there, as where random draws depend on the parameters.

    >>> from retrograd.core.optim import SGD
    >>> from retrograd.core.step import Recipe
    >>> batch = Batch({"x": torch.tensor([1.0, 3.0])}, torch.tensor([0, 1]), torch.full((2,), 0.5))
    >>> run = Training(Recipe(SGD(0.5)), None, [batch], torch.ones(2))
    >>> loss = lambda p, inputs, c: torch.sum(c * (p["theta"] - inputs["x"]) ** 2)
    >>> leave_out = torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    >>> train_many(run, {"theta": torch.zeros(())}, leave_out, objective=loss)["theta"]
    tensor([2.0000, 1.5000])
    """
    if weights.ndim != training.weights.ndim + 1 or weights.shape[1:] != training.weights.shape or not len(weights):
        raise ValueError(
            f"weights of shape {tuple(weights.shape)} do not fit this run: give [S, *{tuple(training.weights.shape)}], "
            "one set of data weights for each of at least one member"
        )
    recipe, steps = training.recipe, len(training.stream)
    single = {name: theta.detach() for name, theta in params.items()}
    if steps:
        check_objective(training, single, objective)
    chosen, inverse = _distinct(weights)
    size = len(chosen)
    start = (single, recipe.optimizer.init(single))
    stacked, moments = tree.map(lambda x: x.expand(size, *x.shape).clone(), start)
    for t in range(steps):
        parts, seed = micro_batches_of(training, t)
        losses, grads = _gradient(objective, stacked, parts, chosen, seed)
        with torch.no_grad():
            stacked, moments = torch.vmap(partial(updated, recipe, step=t))(stacked, moments, grads)
        if observe is not None:
            observe(t, losses[inverse], tree.norm(grads, batch_dims=1)[inverse])
    return stacked if size == len(weights) else {name: theta[inverse] for name, theta in stacked.items()}


def check_objective(training: Training, params: Params, objective: Objective) -> None:
    """Two equal members on the first micro-batch have to have the value of one alone.

    Losses are compared, not only draws counted: vmap may draw as many numbers and use them otherwise.

    Raises:
        ValueError: If the objective does not run under `torch.vmap`, or has another value there.
    """
    (batch, *_), seed = micro_batches_of(training, 0)
    factors = coefficients(batch, training.weights)
    with torch.no_grad(), random_draws(seed, 0):
        alone = objective(params, batch.inputs, factors)
    pair = tree.map(lambda x: torch.stack([x, x]), params)
    try:
        with torch.no_grad(), random_draws(seed, 0):
            stacked = _losses(objective, pair, batch, torch.stack([factors, factors]), seed)
    except RuntimeError as error:
        raise ValueError(
            f"the objective does not run under torch.vmap: {str(error).strip().splitlines()[0]} Retrain one set of "
            "weights at a time with check.train; where dropout is on, the recipe has to say stochastic=True."
        ) from error
    close = torch.finfo(alone.dtype).eps ** 0.5
    if not torch.allclose(stacked, alone.expand(2), rtol=close, atol=close, equal_nan=True):
        raise ValueError(
            f"two equal members of a stack have losses {stacked.tolist()}, one alone has {float(alone)}: the "
            "objective's random draws or its arithmetic are others under torch.vmap. Retrain one set of weights at a "
            "time with check.train, or draw from the inputs' shape only."
        )


def _gradient(
    objective: Objective, params: Params, parts: Sequence[Batch], weights: Tensor, seed: str | None
) -> tuple[Tensor, Params]:
    """(losses [S], gradients [S, *shape]) over the micro-batches, added in order."""
    total: Tensor | None = None
    sums: list[Tensor] = []
    for number, batch in enumerate(parts):
        leaves = {name: theta.detach().requires_grad_() for name, theta in params.items()}
        factors = torch.stack([coefficients(batch, member) for member in weights])
        with torch.enable_grad(), random_draws(seed, number):
            losses = _losses(objective, leaves, batch, factors, seed)
        leaf_grads = torch.autograd.grad(losses.sum(), list(leaves.values()), materialize_grads=True)
        total = losses.detach() if total is None else total + losses.detach()
        sums = [a + b for a, b in zip(sums, leaf_grads)] if sums else list(leaf_grads)
    assert total is not None, "a step needs at least one batch"
    return total, dict(zip(params, sums))


def _losses(objective: Objective, params: Params, batch: Batch, factors: Tensor, seed: str | None) -> Tensor:
    """The loss of each member, [S]; all see the same random draws."""

    def loss(member: Params, c: Tensor) -> Tensor:
        return objective(member, batch.inputs, c)

    return torch.vmap(loss, randomness="error" if seed is None else "same")(params, factors)


def _distinct(weights: Tensor) -> tuple[Tensor, Tensor]:
    """The different rows of the weights in their order, and which of them each member has, [S]."""
    first = [next(r for r in range(s + 1) if torch.equal(weights[r], weights[s])) for s in range(len(weights))]
    kept = sorted(set(first))
    return weights[kept], torch.tensor([kept.index(s) for s in first], device=weights.device)
