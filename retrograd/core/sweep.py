"""Executes a replay plan, forward and backward; the only caller of pullbacks.

The sweep asks the plan what to do, the slots where states are and the ledger whether a replayed state has the bits it
had. It yields what happened, so that whoever runs it records, draws and saves; nothing here prints or touches a disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor

from retrograd.core import memory, tree
from retrograd.core import plan as plans
from retrograd.core.optim import Cotangent, Moments, Params
from retrograd.core.residuals import Residuals
from retrograd.core.slots import Gradients, Ledger, MemorySlots, Slots
from retrograd.core.step import (
    NonFiniteError,
    Pulled,
    State,
    Stepped,
    Training,
    again,
    initial_state,
    micro_batches_of,
    needs_gradient,
    pullback,
    recovered,
    refuse_nonfinite,
    step,
)

__all__ = [
    "Advanced",
    "NonFiniteError",
    "Query",
    "Remade",
    "Reversed",
    "Turned",
    "accumulate",
    "first_time",
    "metagradient",
    "seed_cotangent",
    "sweep",
]

Query = Callable[[Params], tuple[Tensor, Params]]
"""params → (values φ [K] in nats, gradients [K, *shape])."""


class Advanced(NamedTuple):
    """Step t was taken, for the first time or in replay."""

    step: int
    outcome: Stepped
    replayed: bool


class Remade(NamedTuple):
    """Step t was taken again from its kept gradient: the update alone. The state is the one after it."""

    step: int
    state: State


class Turned(NamedTuple):
    """Training is over: the last step's outcome, with the final state."""

    step: int
    outcome: Stepped


class Reversed(NamedTuple):
    """Step t was pulled back. scores [K, *index.shape] are to be added at `index`."""

    step: int
    cotangent: Cotangent
    index: Tensor  # type: ignore[assignment]  # tuple.index is never called on an event
    scores: Tensor
    norm: Tensor  # of λ_t's part for the parameters, [K]; moments have scales of their own
    nonfinite: float  # fraction of λ_t's and the scores' entries; more than 0 stops the sweep
    recipe: dict[str, Tensor]  # ∂φ/∂lr_t and this step's share of ∂φ/∂weight_decay, [K] each
    sharpness: float | None = None  # estimate of the preconditioned Hessian's largest eigenvalue, if asked for


Event = Advanced | Remade | Turned | Reversed


def first_time(event: Event) -> TypeGuard[Advanced | Turned]:
    """Whether a step of the training was taken that had not been taken before."""
    return isinstance(event, Turned) or (isinstance(event, Advanced) and not event.replayed)


def sweep(
    actions: Iterable[plans.Action],
    training: Training,
    slots: Slots,
    ledger: Ledger,
    residuals: Residuals,
    *,
    state: State | None = None,
    cotangent: Cotangent | None = None,
    after: State | None = None,
    gradients: Gradients | None = None,
    curvature: bool = False,
) -> Iterator[Event]:
    """Execute actions of a plan, yielding an event for each step taken or reversed.

    A whole plan is swept in two parts: up to and including its Turn, with `state`; and from there on, with the working
    state the first part ends with (state T−1), the query's cotangent and the same `residuals` and `gradients`.
    `after` is the final state, if it is at hand; of each state the moments are held until the step before it is
    reversed, for they give that step's gradient back. Where they are missing the step is taken again, so that the bits
    do not depend on it. `gradients` are given that of every step taken, and asked for those of steps to be taken again.
    With `curvature`, one more Hessian-vector product a step drives a power iteration for the largest eigenvalue,
    carried from step to step.

    Raises:
        ReplayDriftError: If a replayed state has other bits than the original.
        NonFiniteError: If a loss, a gradient, the final state or a cotangent is not finite; it names the step.
    """
    take = _Steps(training, ledger, residuals, gradients)
    back = _Back(take, cotangent, after, curvature)
    del after, cotangent
    for action in actions:
        match action:
            case plans.Advance(start, stop):
                for _ in range(start, stop):
                    assert state is not None, "an Advance needs a working state"
                    taken = take.step(state)
                    state = taken.state if isinstance(taken, Remade) else taken.outcome.state
                    yield taken
                    del taken  # or it would hold its state beyond a Restore
            case plans.Turn():
                assert state is not None, "a Turn needs a working state"
                turned = Turned(state.step, take.whole(state).outcome)
                refuse_nonfinite(turned.outcome.state)
                yield turned
                del turned  # or it would hold the final state as long as the sweep
            case plans.Snapshot():
                assert state is not None, "a Snapshot needs a working state"
                slots.put(state)
            case plans.Restore(t):
                state = slots.get(t)
            case plans.Drop(t):
                slots.drop(t)
            case plans.Reverse(t):
                assert state is not None, "a Reverse needs a working state"
                assert state.step == t, "the plan was checked"
                yield back.step(state)


def metagradient(
    training: Training,
    params: Params,
    query: Query,
    plan: plans.Plan | None = None,
    observe: Callable[[Event], None] = lambda event: None,
) -> tuple[Tensor, Tensor]:
    """Query values after training, and their gradients with respect to the data weights.

    Pulls λ_T = (∇φ(θ_T), 0) back by λ_t = (∂s_{t+1}/∂s_t)ᵀ λ_{t+1}, adding (∂s_{t+1}/∂w)ᵀ λ_{t+1} at each step.
    MAGIC, arXiv:2504.16430, section 3.

    Args:
        training: Recipe, engine, stream and weights; the gradient is taken at those weights.
        params: Initial parameters.
        query: params → (φ [K] in nats, ∇φ [K, *shape]).
        plan: Replay plan for `len(training.stream)` steps; all states are held when None.
        observe: Called with every event: losses, cotangent norms, recipe gradients by step.
    Returns:
        φ [K] in nats and τ [K, *weights.shape] in nats per unit of weight. τ < 0: a proponent, training on it lowers
        the query loss.
    Raises:
        ValueError: If the plan is illegal for this stream.
    """
    steps = len(training.stream)
    actions = plans.save_all(steps) if plan is None else plan
    plans.check(actions, steps)
    turn = next(i for i, action in enumerate(actions) if isinstance(action, plans.Turn)) + 1
    slots, ledger = MemorySlots(), Ledger()
    state, final = initial_state(training.recipe, params), None
    residuals = Residuals.of(training, state)
    for event in sweep(actions[:turn], training, slots, ledger, residuals, state=state):
        observe(event)
        if isinstance(event, Advanced):
            state = event.outcome.state
        elif isinstance(event, Turned):
            final = event.outcome.state
    assert final is not None, "a checked plan turns"
    values, gradient = query(final.params)
    cotangent = seed_cotangent(gradient, final)
    scores = torch.zeros((len(values), *training.weights.shape), dtype=training.weights.dtype)
    for event in sweep(
        actions[turn:], training, slots, ledger, residuals, state=state, cotangent=cotangent, after=final
    ):
        observe(event)
        if isinstance(event, Reversed):
            accumulate(scores, event)
    return values, scores


def seed_cotangent(gradient: Params, final: State) -> Cotangent:
    """λ_T = (∇φ, 0) for K queries; gradient tensors are [K, *shape]. The zeros take no room."""
    queries = next(iter(gradient.values())).shape[0]

    def zeros(leaf: Tensor) -> Tensor:
        dtype = leaf.dtype if leaf.is_floating_point() else torch.get_default_dtype()
        return torch.zeros((), dtype=dtype, device=leaf.device).expand(queries, *leaf.shape)

    return Cotangent(dict(gradient), tree.map(zeros, final.moments))


def accumulate(scores: Tensor, event: Reversed) -> None:
    """Add a step's share to scores [K, *weights.shape], in place; only the batch's entries are touched."""
    share = event.scores.flatten(1).to(scores)
    scores.view(len(scores), -1).index_add_(1, event.index.flatten().to(scores.device), share)


@dataclass(frozen=True)
class _Steps:
    """The ways to take a step, and to come by its gradient, with what is at hand."""

    training: Training
    ledger: Ledger
    residuals: Residuals
    gradients: Gradients | None

    def step(self, state: State) -> Advanced | Remade:
        """By the update alone if that will do."""
        remade = self.again(state)
        return self.whole(state) if remade is None else remade

    def whole(self, state: State) -> Advanced:
        """The step, with its gradient."""
        replayed = state.step + 1 in self.ledger.digests
        outcome = step(self.training, state)
        self.residuals.put(state.step, outcome.residual)
        if self.gradients is not None:
            assert outcome.grads is not None, "a step has a gradient"
            self.gradients.put(state.step, outcome.grads)
        self.ledger.check(outcome.state)
        return Advanced(state.step, outcome._replace(grads=None, residual=None), replayed)

    def again(self, state: State) -> Remade | None:
        """The step by its update alone; None if its gradient is not kept, or what came of it not known."""
        if self.gradients is None or state.step + 1 not in self.ledger.digests:
            return None
        kept = self.gradients.get(state.step)
        if kept is None:
            return None
        after = again(self.training.recipe, state, kept)
        self.ledger.check(after)
        return Remade(state.step, after)

    def moments(self, state: State) -> Moments:
        """The moments after the step; those before it where none would hold the gradient anyway."""
        if recovered(self.training.recipe, state, state.moments) is None:
            return state.moments
        remade = self.again(state)
        return (self.whole(state).outcome.state if remade is None else remade.state).moments

    def gradient(self, state: State, after: Moments) -> Params | None:
        """The step's gradient if it is known: the same bits whether or not it is kept."""
        grads = recovered(self.training.recipe, state, after)
        if grads is not None or self.gradients is None or not needs_gradient(self.training, state.step):
            return grads
        batches, _ = micro_batches_of(self.training, state.step)
        return self.gradients.get(state.step) if self.training.engine.repeats(batches) else None


class _Back:
    """The way back: the cotangent it carries, and the moments after the step that is next.

    Args:
        take: Ways to take a step.
        cotangent: λ_T; None where the sweep does not come to a step to reverse.
        after: The state T, if it is at hand.
        curvature: Whether a probe of the Hessian is carried along.
    """

    def __init__(self, take: _Steps, cotangent: Cotangent | None, after: State | None, curvature: bool) -> None:
        self.take = take
        self._probe = _random_probe(cotangent.params) if curvature and cotangent is not None else None
        self._after = (after.step, after.moments) if after is not None else None
        self._carried = memory.Owned(cotangent) if cotangent is not None else memory.Owned[Cotangent]()

    def step(self, state: State) -> Reversed:
        """Pull the cotangent back through the step of this state."""
        take, t = self.take, state.step
        if self._after is None or self._after[0] != t + 1:
            self._after = (t + 1, take.moments(state))
        # handed over, so that what the update half has used up is free before the engine begins
        grads = memory.Owned(take.gradient(state, self._after[1]))
        self._after = (t, state.moments)
        training, residuals = take.training, take.residuals
        # one by one: a starred call would hold what is handed over
        pulled = pullback(training, state, self._carried.take(), self._probe, grads.take(), residuals.take(t))
        self._carried.put(pulled.cotangent)
        self._probe = _unit(pulled.probe)
        if take.gradients is not None:
            take.gradients.drop(t)
        return _reversed(t, pulled)


def _reversed(step: int, pulled: Pulled) -> Reversed:
    norm, nonfinite = _health(pulled.cotangent, pulled.scores, step)
    numbers = (pulled.index, pulled.scores, norm, nonfinite, pulled.recipe, pulled.sharpness)
    return Reversed(step, pulled.cotangent, *numbers)


def _random_probe(params: Params) -> Params:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return {name: torch.randn_like(bar[0]) for name, bar in params.items()}


def _unit(probe: Params | None) -> Params | None:
    if probe is None:
        return None
    size = float(tree.norm(probe))
    return {name: x / size for name, x in probe.items()} if size > 0 else _random_probe(_stacked(probe))


def _stacked(params: Params) -> Params:
    return {name: x[None] for name, x in params.items()}


def _health(cotangent: Cotangent, scores: Tensor, step: int) -> tuple[Tensor, float]:
    """‖λ_θ‖ [K] and the fraction of λ's entries that are not finite, counted only where a norm gives cause."""
    norm = tree.norm(cotangent.params, batch_dims=1)
    moments = tree.norm(cotangent.moments, batch_dims=1) if tree.leaves(cotangent.moments) else norm
    suspect = not all(torch.isfinite(x).all() for x in (norm, moments, scores))
    bad = tree.nonfinite((cotangent, scores)) if suspect else 0.0
    if bad:
        raise NonFiniteError(
            f"the cotangent left the finite numbers at step {step}: {bad:.2%} of its entries are NaN or infinite, its "
            f"norm is {float(norm.max()):.3g}. The training is too rough to differentiate: lower the learning rate, "
            "raise eps_root, or take fewer steps."
        )
    return norm, bad
