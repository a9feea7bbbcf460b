"""Orthogonal circuit breakers: forget states turn away from the reference's, and from each other.

    cb   = mean_l (1/Z) Σ w·relu cos(h_l, h0_l)
    orth = T·mean_l mean_{i≠j} relu cos(pool_l[i], pool_l[j])      pool_l[b] = Σ_t w·h_l/n_b,  T = mean_b Σ_t w
    F    = forget(p_k)·cb + orth(p_k)·orth                         R is l2: distance to the reference on retain rows

h_l is the output of block l where a target is predicted, h0_l the reference's: the model without its adapters, or a
frozen copy. Pairs i ≠ j are those of one micro-batch, so it needs two forget rows at least. A cosine has no slope where
h = h0, so training starts beside the reference (`perturb`). Either term is left out where its coefficient is 0.
Normalisers do not depend on w. A pool's length drops out of its cosine, but for an ε of a hundredth of the row's mean
‖h0‖: without one a row whose weights are all 0 would have an infinite slope in them.

`as_run` takes T = 1 and the old schedule of the orth coefficient, lets forget = 0 switch orth off too, and permits
micro-batches of one forget row, in which orth is 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from retrograd.unlearn.method import Method
from retrograd.unlearn.settings import RetainTerm, Settings
from retrograd.unlearn.terms import Term, Terms, cosine, ramped, unit
from retrograd.unlearn.view import Side, View

__all__ = ["METHOD", "OrthCircuitBreakersSettings", "alike"]


_SMALL = 0.01  # of the mean norm of a row's states: ε of its pool's norm


@dataclass(frozen=True)
class OrthCircuitBreakersSettings(Settings):
    """Orthogonal circuit breakers."""

    forget: float = 23.0
    """Coefficient of cb; 0 leaves it out."""
    orth: float = 10.0
    """Coefficient of orth; 0 leaves it out."""
    retain: float = 2.0
    """Coefficient of the retain term; 0 leaves it out."""
    forget_ramp: tuple[float, float] = (1.0, 0.75)
    """What the coefficient of cb is multiplied by at the first step and at progress 1."""
    orth_ramp: tuple[float, float] = (0.0, 1.0)
    """What the coefficient of orth is multiplied by at the first step and at progress 1."""
    retain_ramp: tuple[float, float] = (0.0, 1.0)
    """What the retain coefficient is multiplied by at the first step and at progress 1."""
    retain_term: RetainTerm = "l2"
    """As for the other methods; l2 is what this one is defined with."""


def _forget(settings: OrthCircuitBreakersSettings, view: View, side: Side) -> Terms:
    terms, then = Terms(), side.reference.states
    if settings.forget > 0:
        each = [cosine(h, then[block]).relu() for block, h in side.now.states.items()]
        coefficient = ramped(settings.forget, settings.forget_ramp, view.progress)
        terms["cb"] = Term(coefficient, torch.sum(side.c * torch.stack(each).mean(0)))
    gated = settings.as_run and not settings.forget > 0
    if settings.orth > 0 and not gated and (side.sequences > 1 or not settings.as_run):
        ramp = (1.0, 0.75) if settings.as_run else settings.orth_ramp
        tokens = 1.0 if settings.as_run else side.per_sequence(side.w).mean()
        terms["orth"] = Term(ramped(settings.orth, ramp, view.progress) * tokens, alike(side))
    return terms


def alike(side: Side) -> Tensor:
    """Mean relu cosine of the pooled states of two forget rows: 1 for one shared direction, 0 for orthogonal ones.

    Of a micro-batch, times its share of the batch's forget rows.
    """
    b = side.sequences
    if b < 2:
        raise ValueError(
            "orth compares the forget rows of one micro-batch and this one has 1, so that it would be 0: take a "
            "micro-batch of at least 2 forget rows, or orth = 0"
        )
    first, second = torch.triu_indices(b, b, 1, device=side.c.device)
    each = []
    for block, h in side.now.states.items():
        pools = side.per_sequence(side.w[:, None] * h) / side.counts[:, None]
        sizes = side.per_sequence(side.reference.states[block].norm(dim=-1, keepdim=True)) / side.counts[:, None]
        units = unit(pools, _SMALL * sizes)
        each.append(torch.sum(units[first] * units[second], -1).relu().mean())
    return side.share.sum() * torch.stack(each).mean()


METHOD = Method(
    name="orth_circuit_breakers",
    formula="mean_l (1/Z) Σ w·relu cos(h_l, h0_l), + orth·T·mean_l mean_{i≠j} relu cos(pool_i, pool_j)",
    source="circuit breakers, Zou et al. 2406.04313; orth and defaults of the original runs",
    defaults=OrthCircuitBreakersSettings(),
    forget=_forget,
    family="activation",
    linear=False,
    reference=True,
    states=True,
    logits=False,
    token_mean=False,
    additive=False,
    least_rows=2,
    perturb=1e-3,
    adapters=True,  # rank 64 of width 4096
    fault="orth has T = 1 and its old schedule, is off where forget is 0, and is 0 in micro-batches of one forget row",
)
