"""Circuit breakers by rerouting: forget states turn away from the reference's.

    F = mean_l (1/Z) Σ w·relu cos(h_l, h0_l)               R is l2: distance to the reference on retain rows

h_l is the output of block l where a target is predicted, h0_l the reference's: the model without its adapters, or a
frozen copy. A cosine has no slope where h = h0, so training starts beside the reference (`perturb`). Once a token's
state is orthogonal to the reference's it is left alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from retrograd.unlearn.method import Method
from retrograd.unlearn.settings import RetainTerm, Settings
from retrograd.unlearn.terms import Terms, cosine, forget_term
from retrograd.unlearn.view import Side, View

__all__ = ["METHOD", "CircuitBreakersSettings"]


@dataclass(frozen=True)
class CircuitBreakersSettings(Settings):
    """Circuit breakers."""

    forget: float = 5.0
    """Coefficient of the forget term."""
    retain: float = 5.0
    """Coefficient of the retain term; 0 leaves it out."""
    forget_ramp: tuple[float, float] = (1.0, 0.75)
    """What the forget coefficient is multiplied by at the first step and at progress 1."""
    retain_ramp: tuple[float, float] = (0.0, 1.0)
    """What the retain coefficient is multiplied by at the first step and at progress 1."""
    retain_term: RetainTerm = "l2"
    """As for the other methods; l2 is what this one is defined with."""


def _forget(settings: CircuitBreakersSettings, view: View, side: Side) -> Terms:
    then = side.reference.states
    each = [cosine(h, then[block]).relu() for block, h in side.now.states.items()]
    return forget_term(settings, view, torch.sum(side.c * torch.stack(each).mean(0)))


METHOD = Method(
    name="circuit_breakers",
    formula="mean_l (1/Z) Σ w·relu cos(h_l, h0_l)",
    source="Zou et al. 2406.04313; coefficients of the original runs",
    defaults=CircuitBreakersSettings(),
    forget=_forget,
    family="activation",
    reference=True,
    states=True,
    logits=False,
    perturb=1e-3,
    adapters=True,
    rank=1 / 256,  # 16 of width 4096
)
