"""What a step needs of an optimizer: an (init, update) pair with its pullback.

    update    (θ, m, g, t) → (θ', m')
    pullback  ((θ, m, g, t), λ = (λ_θ', λ_m')) → (θ̄, m̄), ḡ = (∂(θ', m')/∂(θ, m, g))ᵀ λ

Each optimizer is a frozen record of its hyperparameters, so a recipe that holds it can be compared and hashed; all that
evolves is in the moments. `update` is made of plain differentiable operations and never writes in place; `pullback` is
in closed form for our own, and takes cotangents with a leading query axis [K, *shape]. The same cotangents give the
derivatives of the query with respect to the recipe's own numbers:

    ∂φ/∂lr_t = ⟨λ_θ', ∂θ'/∂lr_t⟩          ∂φ/∂wd = Σ_t ⟨λ_θ', ∂θ'/∂wd⟩
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from retrograd.core import tree

__all__ = [
    "Cotangent",
    "LearningRate",
    "Moments",
    "Optimizer",
    "Params",
    "Updated",
    "check_fraction",
    "check_nonnegative",
    "holds_gradient",
    "inner",
    "product",
    "rate",
    "zeros",
]

_LONGEST = 0.99  # decay of an average out of which a gradient comes with 100 times the dtype's rounding

Params = dict[str, Tensor]
Moments = Any
LearningRate = float | Callable[[int], float]


class Cotangent(NamedTuple):
    """λ: what the sweep carries. Every tensor has a leading query axis [K, *shape]."""

    params: Params
    moments: Moments


class Updated(NamedTuple):
    """An update's pullback: the cotangents of (params, moments) and of the gradient, [K, *shape] each.

    recipe: this step's ∂φ/∂lr and share of ∂φ/∂weight_decay, [K] float64 each; empty where the optimizer does not know
        its own learning rate.
    slope: where no gradient was given, what ∂φ/∂lr lacks is slope·⟨ḡ, g⟩.
    """

    cotangent: Cotangent
    bars: Params
    recipe: dict[str, Tensor]
    slope: float = 0.0


@runtime_checkable
class Optimizer(Protocol):
    """An optimizer as a step, its replay and its pullback see it."""

    def init(self, params: Params) -> Moments:
        """The moments before step 0."""

    def update(self, params: Params, moments: Moments, grads: Params, step: int) -> tuple[Params, Moments]:
        """One update, as plain differentiable operations."""

    def pullback(
        self, params: Params, moments: Moments, grads: Params | None, step: int, cotangent: Cotangent
    ) -> Updated:
        """The cotangents of what an update depends on; the gradient may be None where it is not needed."""

    def needs_gradient(self, step: int) -> bool:
        """Whether the pullback of a step does."""

    def recovered(self, params: Params, moments: Moments, after: Moments) -> Params | None:
        """The gradient that took `moments` to `after`, to rounding; None where they do not hold it."""

    def preconditioner(self, params: Params, moments: Moments, grads: Params, step: int) -> Params | None:
        """P⁻¹ of the update θ' = θ − lr·P⁻¹m̂, elementwise; None for the identity."""


def rate(lr: LearningRate, step: int) -> float:
    """The learning rate of a step."""
    return lr(step) if callable(lr) else lr


def zeros(params: Params) -> Params:
    """Zeros of the parameters' shapes, which take no memory: the initial state is held as long as the run."""
    return {name: theta.new_zeros(()).expand(theta.shape) for name, theta in params.items()}


def inner(cotangent: Params, direction: Params) -> Tensor:
    """⟨λ_k, direction⟩ for each query, [K] float64."""
    parts = (product(bar, direction[name]) for name, bar in cotangent.items())
    return tree.total(sum(parts, start=torch.zeros((), dtype=torch.float64)))


def product(bar: Tensor, direction: Tensor) -> Tensor:
    """⟨λ_k, direction⟩ of what is here of a leaf, [K] float64."""
    return torch.mv(bar.reshape(len(bar), -1), direction.flatten()).double()


def holds_gradient(moments: Params, decay: float) -> bool:
    """Whether a gradient can be had back from an average of rate `decay`: rounding grows by 1/(1 − decay)."""
    exact = all(x.dtype in (torch.float32, torch.float64) for x in moments.values())
    return bool(moments) and exact and decay <= _LONGEST


def check_nonnegative(**numbers: Any) -> None:
    """Refuse a number that is negative or not finite, by its name; a schedule has seen to its own.

    Raises:
        ValueError: If there is one.
    """
    for name, number in numbers.items():
        if not callable(number) and not (math.isfinite(number) and number >= 0):
            raise ValueError(f"{name} is {number}; it has to be a finite number, 0 or more")


def check_fraction(**numbers: float) -> None:
    """Refuse a number outside [0, 1), by its name.

    Raises:
        ValueError: If there is one.
    """
    for name, number in numbers.items():
        if not 0 <= number < 1:
            raise ValueError(f"{name} is {number}; it has to be at least 0 and below 1")
