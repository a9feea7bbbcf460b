"""One training step s_t → s_{t+1} and its pullback, in two halves.

    g_t = ∇_θ ℓ_t(θ_t; w)            ℓ_t = Σ_j w[index_j] · scale_j · loss_j(θ)
    s_{t+1} = U_t(s_t, clip(g_t))

`scale` is mask/Z with one Z for the whole batch, so neither micro-batches nor padding change the objective. The engine
does the gradient half (everything that runs the model), the optimizer the update half (elementwise).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from retrograd.core import memory, tree
from retrograd.core.optim import Cotangent, Moments, Optimizer, Params, clip, clip_pullback

__all__ = [
    "Batch",
    "Engine",
    "NonFiniteError",
    "Objective",
    "Pull",
    "Pulled",
    "Recipe",
    "State",
    "Stepped",
    "Stream",
    "Training",
    "again",
    "coefficients",
    "initial_state",
    "left_finite",
    "is_linear",
    "micro_batches",
    "micro_batches_of",
    "needs_gradient",
    "pullback",
    "refuse_nonfinite",
    "recovered",
    "step",
    "updated",
]

Objective = Callable[[Params, Any, Tensor], Tensor]
"""(params, inputs, coefficients) → a scalar; coefficients c = w·scale have the shape of a batch's `index`.

Σ_j c_j · loss_j, unless it says `linear = False`: then any smooth function of c, such as one with the weights inside a
log-ratio inside a sigmoid, and nothing may be inferred from linearity.
"""

Pull = Callable[[Params], tuple[Params, Tensor]]
"""Cotangents ḡ of a gradient, [K, *shape] → (H ḡ [K, *shape], ∂⟨g, ḡ⟩/∂c_j·scale_j [K, *index.shape])."""


class NonFiniteError(ArithmeticError):
    """A loss, a gradient, a state or a cotangent is NaN or infinite."""


class Batch(NamedTuple):
    """What one step sees. Tensors of `inputs` share the leading dimension B with the others.

    index: which entry of the flattened data weights multiplies each loss, [B] or [B, L], int64.
    scale: mask/Z, the constant factor of each loss, same shape; 0 where there is no target.
    """

    inputs: Any
    index: Tensor  # type: ignore[assignment]  # tuple.index is never called on a batch
    scale: Tensor


@dataclass(frozen=True)
class Recipe:
    """All that training and replay must agree on, besides the stream and the loss.

    Args:
        optimizer: The (init, update, pullback) record.
        max_grad_norm: Clip the global gradient norm to this; None for no clipping.
        micro_batch_size: Rows a forward pass takes at once; None for the whole batch.
        seed: Random numbers of active dropout, a function of (seed, step, micro-batch).
        stochastic: Whether the loss draws random numbers.
        pieces: Of each leaf: norms are added up, and states digested, piece by piece, so that the bits are those of a
            training whose leaves lie in pieces over as many processes.
    """

    optimizer: Optimizer
    max_grad_norm: float | None = None
    micro_batch_size: int | None = None
    seed: int = 0
    stochastic: bool = False
    pieces: int = field(default=1, metadata={"later": True})

    def __post_init__(self) -> None:
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(f"max_grad_norm is {self.max_grad_norm}; it has to be above 0, or None for no clipping")
        if self.micro_batch_size is not None and self.micro_batch_size < 1:
            raise ValueError(f"micro_batch_size is {self.micro_batch_size}; it has to be at least 1, or None")


class State(NamedTuple):
    """Everything that evolves: state t is the one before step t."""

    step: int
    params: Params
    moments: Moments


class Stepped(NamedTuple):
    """A step's outcome: the next state, the weighted batch loss in nats, and ‖g‖ before clipping.

    swallowed: share of parameters with a gradient that the update did not move, because it rounded to nothing; None at
    steps where it was not counted.
    grads: the gradient before clipping; residual: what it leaves for its pullback, if anything. The sweep
    takes both out.
    """

    state: State
    loss: float
    grad_norm: float
    swallowed: float | None = None
    grads: Params | None = None
    residual: Any = None


class Pulled(NamedTuple):
    """A step's pullback. λ_t; the batch's index [B] or [B, L] and the scores [K, *index.shape] to add there.

    recipe: ∂φ/∂lr_t and this step's share of ∂φ/∂weight_decay, [K] each; empty for a foreign optimizer.
    probe: H·probe, if a probe was given; sharpness: ⟨u, Hu⟩/⟨u, Pu⟩ for it, P the optimizer's preconditioner.
    """

    cotangent: Cotangent
    index: Tensor  # type: ignore[assignment]  # tuple.index is never called on a pullback
    scores: Tensor
    recipe: dict[str, Tensor]
    probe: Params | None = None
    sharpness: float | None = None


@runtime_checkable
class Stream(Protocol):
    """Batches as a function of the step."""

    def __len__(self) -> int: ...

    def __getitem__(self, step: int) -> Batch: ...


@runtime_checkable
class Engine(Protocol):
    """The gradient half. `seed` is None where the loss draws no random numbers."""

    @property
    def linear(self) -> bool:
        """Whether the objective is linear in its coefficients."""

    def gradient(self, params: Params, batches: Sequence[Batch], weights: Tensor, seed: str | None) -> Any:
        """(loss [], gradient, residual) of the sum over micro-batches.

        The residual is a tree of tensors that the pullback at the same place would find again, to the same bits; None
        if there is nothing.
        """

    def linearize(
        self, params: Params, batches: Sequence[Batch], weights: Tensor, seed: str | None
    ) -> tuple[Params, Pull]:
        """The gradient, and its pullback, to be called once: for a ḡ that is a function of the gradient."""

    def pullback(
        self,
        params: Params,
        batches: Sequence[Batch],
        weights: Tensor,
        seed: str | None,
        bars: Params,
        residual: Any = None,
    ) -> tuple[Params, Tensor]:
        """What `linearize` pulls, without the gradient: for a ḡ that is known.

        `residual` is what `gradient` left, if it is at hand.
        """

    def repeats(self, batches: Sequence[Batch]) -> bool:
        """Whether the gradient of `linearize` has the bits of `gradient`'s: a kept one can take its place."""


class Training(NamedTuple):
    """A training run as a function of its data weights: all that replay needs but the states.

    weights: data weights, [N] or [rows, L]; a batch's `index` points into them, flattened.
    """

    recipe: Recipe
    engine: Engine
    stream: Stream
    weights: Tensor


def initial_state(recipe: Recipe, params: Params) -> State:
    """State 0: the given parameters, detached, and the optimizer's fresh moments."""
    params = {name: theta.detach() for name, theta in params.items()}
    return State(0, params, recipe.optimizer.init(params))


def step(training: Training, state: State) -> Stepped:
    """s_t → s_{t+1}. A pure function of the state: the same state gives the same bits.

    Raises:
        NonFiniteError: If the loss or the gradient is not finite; it names the step.
    """
    recipe, (batches, seed) = training.recipe, micro_batches_of(training, state.step)
    loss, grads, residual = training.engine.gradient(state.params, batches, training.weights, seed)
    grads = _in_order(grads)
    value, norm = float(loss), float(tree.norm(grads))
    if fault := left_finite(state.step, value, norm):
        raise NonFiniteError(fault)
    after = again(recipe, state, grads)
    with torch.no_grad():
        swallowed = _swallowed(state.params, after.params, grads) if _counted(state.step) else None
    return Stepped(after, value, norm, swallowed, grads, residual)


def left_finite(step: int, loss: float, grad_norm: float) -> str | None:
    """Why a training that has this loss and gradient norm at a step cannot go on; None where both are finite."""
    if math.isfinite(loss) and math.isfinite(grad_norm):
        return None
    return (
        f"training left the finite numbers at step {step}: loss {loss}, gradient norm {grad_norm}. Lower the learning "
        "rate, clip the gradient norm, or look at that step's rows."
    )


def refuse_nonfinite(final: State) -> None:
    """A final state has to be finite: no step comes after it to see that its update overflowed.

    Raises:
        NonFiniteError: If it is not.
    """
    if share := tree.nonfinite((final.params, final.moments)):
        raise NonFiniteError(
            f"the update of step {final.step - 1}, the last, left the finite numbers: {share:.2%} of the final state "
            "is NaN or infinite. Lower the learning rate, or look at that step's rows."
        )


@torch.no_grad()
def again(recipe: Recipe, state: State, grads: Params) -> State:
    """s_{t+1} of s_t and the step's gradient: the update half alone, to the same bits."""
    return State(state.step + 1, *updated(recipe, state.params, state.moments, grads, state.step))


def updated(recipe: Recipe, params: Params, moments: Moments, grads: Params, step: int) -> tuple[Params, Moments]:
    """U_t∘clip: the update half, differentiable and under any transform of torch.func."""
    clipped = clip(grads, recipe.max_grad_norm, recipe.pieces) if recipe.max_grad_norm else grads
    return recipe.optimizer.update(params, moments, clipped, step)


def recovered(recipe: Recipe, state: State, after: Moments) -> Params | None:
    """The gradient of a step, to rounding, from the moments before and after it; None where they do not hold it.

    Spares the pullback a gradient. Of a clipped gradient the moments hold the clipped one only.
    """
    return None if recipe.max_grad_norm else recipe.optimizer.recovered(state.params, state.moments, after)


def is_linear(objective: Objective) -> bool:
    """Whether an objective is linear in its coefficients; it says so with `linear = False` if not."""
    return bool(getattr(objective, "linear", True))


def needs_gradient(training: Training, step: int) -> bool:
    """Whether a step's pullback is a function of its gradient.

    Where the optimizer can do without, ∂φ/∂lr comes out of the scores, for ⟨g, ḡ⟩ = Σ_j w_j·scores_j: only where the
    objective is linear in the weights.
    """
    recipe = training.recipe
    return recipe.max_grad_norm is not None or recipe.optimizer.needs_gradient(step) or not training.engine.linear


def pullback(
    training: Training,
    state: State,
    cotangent: Cotangent,
    probe: Params | None = None,
    grads: Params | None = None,
    residual: Any = None,
) -> Pulled:
    """λ_{t+1} → λ_t, and this step's share of the scores.

    Args:
        state: State t.
        cotangent: λ_{t+1}, tensors [K, *shape].
        probe: A direction u; the Hessian-vector product Hu comes out of the same graph as one more query.
        grads: The step's gradient, if it is known; computed if not, where it is needed.
        residual: What the gradient left, if it is at hand; no result depends on it.
    """
    recipe, (batches, seed) = training.recipe, micro_batches_of(training, state.step)
    queries, place = len(next(iter(cotangent.params.values()))), (state.params, batches, training.weights, seed)
    if grads is None and needs_gradient(training, state.step):
        grads, pull = training.engine.linearize(*place)
    else:
        pull = partial(training.engine.pullback, *place, residual=residual)
    half = _pull_update(recipe, state, grads, cotangent, probe)
    del cotangent, grads  # their memory is the engine's now, if the caller has let go of them too
    curvature, scores = pull(half.bars.take())
    params = {
        name: torch.add(bar, curvature[name][:queries], out=memory.empty_like(bar))
        for name, bar in half.cotangent.params.items()
    }
    index, numbers = torch.cat([batch.index for batch in batches]), half.numbers
    if half.slope:  # only where the loss is linear in the weights: ⟨g, ḡ⟩ = Σ_j w_j·scores_j
        assert training.engine.linear, "a gradient is left out only where scores give its product with ḡ"
        weights = training.weights.flatten()[index.to(training.weights.device)].double()
        along = (scores[:queries].double() * weights.to(scores.device)).flatten(1).sum(1)
        numbers = {**numbers, "lr": numbers["lr"] + half.slope * along}
    pulled = Pulled(Cotangent(params, half.cotangent.moments), index, scores[:queries], numbers)
    if probe is None:
        return pulled
    product, metric = {name: bar[queries] for name, bar in curvature.items()}, half.metric
    scaled = product if metric is None else {name: metric[name] * x for name, x in product.items()}
    weighed = probe if metric is None else {name: x / metric[name] for name, x in probe.items()}
    return pulled._replace(probe=scaled, sharpness=float(tree.dot(probe, product) / tree.dot(probe, weighed)))


class _Half(NamedTuple):
    """A step's update half, pulled back: what λ_t has so far, and what the engine gets, a probe last."""

    cotangent: Cotangent
    bars: memory.Owned[Params]
    numbers: dict[str, Tensor]
    slope: float
    metric: Params | None


@torch.no_grad()
def _pull_update(
    recipe: Recipe, state: State, grads: Params | None, cotangent: Cotangent, probe: Params | None
) -> _Half:
    """The pullback of `updated`."""
    limit, grads = recipe.max_grad_norm, grads and _in_order(grads)
    clipped = clip(grads, limit, recipe.pieces) if limit and grads else grads
    optimizer = recipe.optimizer
    pulled, bars, numbers, slope = optimizer.pullback(state.params, state.moments, clipped, state.step, cotangent)
    metric = optimizer.preconditioner(state.params, state.moments, clipped, state.step) if probe and clipped else None
    bars = clip_pullback(grads, limit, bars, recipe.pieces) if limit and grads else bars
    if probe is not None:
        bars = {name: torch.cat([bar, probe[name][None]]) for name, bar in bars.items()}
    return _Half(pulled, memory.Owned(bars), numbers, slope, metric)


def coefficients(batch: Batch, weights: Tensor) -> Tensor:
    """w[index]·scale, what multiplies each loss; same shape as the batch's index."""
    return weights.flatten()[batch.index.to(weights.device)].to(batch.scale) * batch.scale


def micro_batches(batch: Batch, size: int | None) -> list[Batch]:
    """The batch cut along its rows; the normaliser inside `scale` stays the whole batch's."""
    rows = len(batch.index)
    if size is None or size >= rows:
        return [batch]
    return [tree.map(lambda x, start=start: x[start : start + size], batch) for start in range(0, rows, size)]


def micro_batches_of(training: Training, step: int) -> tuple[list[Batch], str | None]:
    """What the engine gets at a step: its micro-batches and the seed of its draws, None where there are none."""
    recipe = training.recipe
    seed = f"{recipe.seed}/{step}" if recipe.stochastic else None
    return micro_batches(training.stream[step], recipe.micro_batch_size), seed


def _in_order(grads: Params) -> Params:
    """As a kept gradient lies: a norm adds up in the order of memory."""
    return {name: g.contiguous() for name, g in grads.items()}


def _counted(step: int) -> bool:
    return step % 16 == 0 or step & (step - 1) == 0


def _swallowed(before: Params, after: Params, grads: Params) -> float:
    moved = [(g != 0, before[name] == after[name]) for name, g in grads.items()]
    live = sum(int(pushed.count_nonzero()) for pushed, _ in moved)  # a sum would make numbers of them first
    lost = sum(int((pushed & still).count_nonzero()) for pushed, still in moved)
    live, lost = tree.total(torch.tensor([live, lost])).tolist()
    return lost / max(1, live)
