"""Exactness checks: independent ways to the same scores, for tests and for users.

unrolled            one autograd graph through all of training: the naive twin, O(T) memory
forward_mode        ⟨∂φ/∂w, v⟩ by forward-mode differentiation through the run, with no reverse sweep
central_difference  (φ(w + hv) − φ(w − hv))/2h by retraining
taylor_errors       |φ(w + εv) − φ(w) − ε⟨τ, v⟩| by retraining: falls as ε² if τ is right, as ε if it is not

All want float64. The first two share autograd with the sweep, so a graph that is cut looks the same to them; the last
two retrain and do not.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from retrograd.core import tree
from retrograd.core.optim import Moments, Params, clip
from retrograd.core.step import Batch, Objective, State, Training, coefficients, initial_state, micro_batches, step
from retrograd.core.sweep import Query

__all__ = ["central_difference", "forward_mode", "relative_error", "taylor_errors", "train", "unrolled"]


def train(training: Training, params: Params, weights: Tensor | None = None) -> State:
    """The final state of training from `params`, at other data weights if given."""
    if weights is not None:
        training = training._replace(weights=weights)
    state = initial_state(training.recipe, params)
    while state.step < len(training.stream):
        state = step(training, state).state
    return state


def unrolled(training: Training, params: Params, objective: Objective, query: Query) -> tuple[Tensor, Tensor]:
    """(φ [K], τ [K, *weights.shape]) from one autograd graph over the whole run."""
    weights = training.weights.detach().requires_grad_()
    current = {name: theta.detach().requires_grad_() for name, theta in params.items()}
    moments = training.recipe.optimizer.init(current)
    for t in range(len(training.stream)):
        loss = sum(
            (objective(current, part.inputs, coefficients(part, weights)) for part in _parts(training, t)),
            start=torch.zeros(()),
        )
        grads = torch.autograd.grad(loss, list(current.values()), create_graph=True, materialize_grads=True)
        current, moments = _update(training, current, moments, dict(zip(current, grads)), t)
    values, gradient = query({name: theta.detach() for name, theta in current.items()})
    scores = [
        torch.autograd.grad(list(current.values()), weights, [gradient[n][k] for n in current], retain_graph=True)[0]
        for k in range(len(values))
    ]
    return values, torch.stack(scores)


def forward_mode(
    training: Training, params: Params, objective: Objective, query: Query, direction: Tensor
) -> tuple[Tensor, Tensor]:
    """(φ [K], ⟨∂φ/∂w, direction⟩ [K]) by a tangent carried forward through every step."""
    state = initial_state(training.recipe, params)
    values: tuple[Params, Moments] = (state.params, state.moments)
    tangents = tree.map(torch.zeros_like, values)
    for t in range(len(training.stream)):
        parts = _parts(training, t)

        def advance(
            values: tuple[Params, Moments], weights: Tensor, t: int = t, parts: Sequence[Batch] = parts
        ) -> tuple[Params, Moments]:
            def loss(params: Params) -> Tensor:
                return torch.stack([objective(params, p.inputs, coefficients(p, weights)) for p in parts]).sum()

            return _update(training, *values, torch.func.grad(loss)(values[0]), t)

        values, tangents = torch.func.jvp(advance, (values, training.weights), (tangents, direction))[:2]
    phi, gradient = query(values[0])
    slopes = [sum(torch.sum(g[k] * tangents[0][n]) for n, g in gradient.items()) for k in range(len(phi))]
    return phi, torch.stack([torch.as_tensor(slope) for slope in slopes])


def central_difference(training: Training, params: Params, query: Query, direction: Tensor, h: float = 1e-5) -> Tensor:
    """⟨∂φ/∂w, direction⟩ [K] from two retrainings at w ± h·direction; error O(h²) plus rounding/h."""
    ahead = query(train(training, params, training.weights + h * direction).params)[0]
    behind = query(train(training, params, training.weights - h * direction).params)[0]
    return (ahead - behind) / (2 * h)


def taylor_errors(
    training: Training, params: Params, query: Query, direction: Tensor, slope: Tensor, sizes: Sequence[float]
) -> Tensor:
    """|φ(w + εv) − φ(w) − ε·slope| for each ε of `sizes`, [len(sizes), K]; slope is ⟨τ, v⟩ [K]."""
    here = query(train(training, params).params)[0]
    there = [query(train(training, params, training.weights + e * direction).params)[0] for e in sizes]
    return torch.stack([(phi - here - e * slope).abs() for phi, e in zip(there, sizes)])


def relative_error(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖/‖expected‖."""
    return float((found - expected).norm() / expected.norm())


def _parts(training: Training, t: int) -> list[Batch]:
    return micro_batches(training.stream[t], training.recipe.micro_batch_size)


def _update(training: Training, params: Params, moments: Moments, grads: Params, t: int) -> tuple[Params, Moments]:
    recipe = training.recipe
    grads = clip(grads, recipe.max_grad_norm) if recipe.max_grad_norm else grads
    return recipe.optimizer.update(params, moments, grads, t)
