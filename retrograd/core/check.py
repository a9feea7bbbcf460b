"""Exactness checks: independent ways to the same scores, for tests and for users.

unrolled            one autograd graph through all of training: the naive twin, O(T) memory
forward_mode        ⟨∂φ/∂w, v⟩ by forward-mode differentiation through the run, with no reverse sweep
forward_tangent     θ̇_T along v by Hessian-vector products, for models without forward-mode derivatives
central_difference  (φ(w + hv) − φ(w − hv))/2h by retraining
taylor_errors       |φ(w + εv) − φ(w) − ε⟨τ, v⟩| by retraining: falls as ε² if τ is right, as ε if it is not

All want float64. The first three share autograd with the sweep, so a graph that is cut looks the same to them; the
others retrain and do not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from retrograd.core import lookups, tree
from retrograd.core.optim import Moments, Params
from retrograd.core.step import (
    Batch,
    Objective,
    State,
    Training,
    coefficients,
    initial_state,
    micro_batches_of,
    refuse_nonfinite,
    step,
    updated,
)
from retrograd.core.sweep import Query

__all__ = [
    "central_difference",
    "forward_mode",
    "forward_tangent",
    "relative_error",
    "taylor_errors",
    "train",
    "unrolled",
]


def train(
    training: Training,
    params: Params,
    weights: Tensor | None = None,
    observe: Callable[[State], None] = lambda state: None,
) -> State:
    """The final state of training from `params`, at other data weights if given; each new state is shown.

    The naive loop: the twin of `Trajectory` in tests, and what `verify` trains by, so that a certificate does not rest
    on what it certifies. All else that trains is a `Trajectory`.

    Raises:
        NonFiniteError: If training diverges; it names the step.
    """
    if weights is not None:
        training = training._replace(weights=weights)
    state = initial_state(training.recipe, params)
    while state.step < len(training.stream):
        state = step(training, state).state
        observe(state)
    refuse_nonfinite(state)
    return state


def unrolled(training: Training, params: Params, objective: Objective, query: Query) -> tuple[Tensor, Tensor]:
    """(φ [K], τ [K, *weights.shape]) from one autograd graph over the whole run."""
    weights = training.weights.detach().requires_grad_()
    current = {name: theta.detach().requires_grad_() for name, theta in params.items()}
    moments, turns = training.recipe.optimizer.init(current), list[lookups.Passing]()
    for t in range(len(training.stream)):
        with lookups.twice() as passing:
            losses = [objective(current, part.inputs, coefficients(part, weights)) for part in _parts(training, t)]
        turns.append(passing)
        loss = sum(losses, start=torch.zeros(()))
        grads = torch.autograd.grad(loss, list(current.values()), create_graph=True, materialize_grads=True)
        current, moments = updated(training.recipe, current, moments, dict(zip(current, grads)), t)
    values, gradient = query({name: theta.detach() for name, theta in current.items()})
    for passing in turns:
        passing.turn()
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
    # forward AD refuses entries that share memory, as the initial moments' do
    values: tuple[Params, Moments] = tree.map(Tensor.contiguous, (state.params, state.moments))
    tangents = tree.map(torch.zeros_like, values)
    for t in range(len(training.stream)):
        parts = _parts(training, t)

        def advance(
            values: tuple[Params, Moments], weights: Tensor, t: int = t, parts: Sequence[Batch] = parts
        ) -> tuple[Params, Moments]:
            def loss(params: Params) -> Tensor:
                return torch.stack([objective(params, p.inputs, coefficients(p, weights)) for p in parts]).sum()

            return updated(training.recipe, *values, torch.func.grad(loss)(values[0]), t)

        values, tangents = torch.func.jvp(advance, (values, training.weights), (tangents, direction))[:2]
    phi, gradient = query(values[0])
    slopes = [sum(torch.sum(g[k] * tangents[0][n]) for n, g in gradient.items()) for k in range(len(phi))]
    return phi, torch.stack([torch.as_tensor(slope) for slope in slopes])


def forward_tangent(
    training: Training,
    params: Params,
    directions: Tensor,
    observe: Callable[[State], None] = lambda state: None,
) -> tuple[State, Params]:
    """The final state, and its parameters' tangents θ̇_T along directions of the data weights.

        ġ_t = H_t θ̇_t + ∂g_t/∂w · v        ṡ_{t+1} = jvp of U_t∘clip along (ṡ_t, ġ_t)

    Where the gradient is linear in the data weights, its second part is the gradient at v in their place; elsewhere it
    is ∂g_t/∂w · v at w, by the engine's `tangent`. H_t is symmetric but for embeddings (core/lookups), so the engine's
    pullback, transposed there, gives the first. Forward AD sees the optimizer only. No cotangent is involved.

    Args:
        directions: v, [D, *weights.shape].
        observe: Called with every new state, which has the bits that training gives it.
    Returns:
        The final state, and θ̇_T by parameter, [D, *shape]; ⟨∂φ/∂w, v⟩ = ⟨∇φ, θ̇_T⟩.
    """
    state = initial_state(training.recipe, params)
    tangents = tree.map(lambda x: x.new_zeros((len(directions), *x.shape)), (state.params, state.moments))
    while state.step < len(training.stream):
        _push(training, state, tangents, directions)
        state = step(training, state).state
        observe(state)
    refuse_nonfinite(state)
    return state, tangents[0]


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


def relative_error(measured: Tensor, expected: Tensor) -> float:
    """‖measured − expected‖/‖expected‖."""
    return float((measured - expected).norm() / expected.norm())


def _parts(training: Training, t: int) -> list[Batch]:
    return micro_batches_of(training, t)[0]


def _push(training: Training, state: State, tangents: tuple[Params, Moments], directions: Tensor) -> None:
    """Carry the tangents, each as large as a state, over one step in their own storage, one direction after another."""
    batches, seed = micro_batches_of(training, state.step)
    grads = training.engine.gradient(state.params, batches, training.weights, seed)[1]
    curvature = tangents[0]
    if any(bool(leaf.any()) for leaf in curvature.values()):  # of zeros, as at the start, it is zeros
        with lookups.transposed():
            curvature, _ = training.engine.pullback(state.params, batches, training.weights, seed, tangents[0])
    for d, direction in enumerate(directions):
        slopes = _weight_tangent(training, state.params, batches, direction, seed)
        slopes = {name: slopes[name] + curvature[name][d] for name in grads}
        moved = _update_tangent(training, state, grads, (*tree.map(lambda x, d=d: x[d], tangents), slopes))
        # an update may hand a tangent on to another place
        tree.map(lambda x, y, d=d: x[d].copy_(y), tangents, tree.map(torch.clone, moved))


def _weight_tangent(
    training: Training, params: Params, batches: Sequence[Batch], direction: Tensor, seed: str | None
) -> Params:
    """∂g/∂w · direction."""
    if training.engine.linear:
        return training.engine.gradient(params, batches, direction, seed)[1]
    tangent = getattr(training.engine, "tangent", None)
    assert tangent is not None, "the engine of objectives that are not linear in their coefficients has one"
    dots: Params = tangent(params, batches, training.weights, direction, seed)
    return dots


def _update_tangent(
    training: Training, state: State, grads: Params, tangents: tuple[Params, Moments, Params]
) -> tuple[Params, Moments]:
    """The tangent of one update, by forward AD over the tensors that have a slope (a step count has none)."""
    given = tree.map(Tensor.contiguous, (state.params, state.moments, grads))  # as in `forward_mode`
    slots = list(zip(tree.leaves(given), tree.leaves(tangents), strict=True))
    after: list[tuple[Params, Moments]] = []

    def update(*floating: Tensor) -> list[Tensor]:
        leaves = iter(floating)
        placed = tree.map(lambda x: next(leaves) if x.is_floating_point() else x, given)
        after.append(updated(training.recipe, *placed, state.step))
        return [leaf for leaf in tree.leaves(after[0]) if leaf.is_floating_point()]

    primals, seeds = zip(*((x, dx) for x, dx in slots if x.is_floating_point()))
    moved = iter(torch.func.jvp(update, primals, seeds)[1])
    return tree.map(lambda x: next(moved) if x.is_floating_point() else x.new_zeros(x.shape), after[0])
