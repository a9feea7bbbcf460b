"""SatImp: ascent weighted by saturation and importance.

    F = (1/Z) Σ w·∫₀^p u^(β₁−1) (1 − u)^β₂ du = (1/Z) Σ w·Σ_j (−1)^j C(β₂, j) p^(β₁+j)/(β₁ + j)

with the gradient of −(1/Z) Σ w·detach(p^β₁ (1 − p)^β₂)·CE, p = softmax(z)[gold]. The sum is finite for a whole β₂.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb

import torch

from retrograd.unlearn.method import Method
from retrograd.unlearn.settings import Settings
from retrograd.unlearn.terms import Terms, forget_term
from retrograd.unlearn.view import Side, View

__all__ = ["METHOD", "SatImpSettings"]


@dataclass(frozen=True)
class SatImpSettings(Settings):
    """SatImp."""

    retain: float = 0.1
    """Coefficient of the retain term; 0 leaves it out."""
    beta1: float = 5.0
    """Power of the right token's probability: how saturated it is."""
    beta2: int = 1
    """Power of one minus it: how important. Whole, for then the potential is a polynomial."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta2 != int(self.beta2) or self.beta2 < 0 or not self.beta1 > 0:
            raise ValueError(
                f"beta1 is {self.beta1} and beta2 {self.beta2}; the potential needs beta1 above 0 and beta2 a whole "
                "number from 0"
            )


def _forget(settings: SatImpSettings, view: View, side: Side) -> Terms:
    potential = torch.zeros_like(side.ce)
    for j in range(int(settings.beta2) + 1):
        power = settings.beta1 + j
        potential = potential + (-1) ** j * comb(int(settings.beta2), j) / power * torch.exp(-power * side.ce)
    return forget_term(settings, view, torch.sum(side.c * potential))


METHOD = Method(
    name="satimp",
    formula="(1/Z) Σ w·∫₀^p u^(β₁−1)(1 − u)^β₂ du",
    source="Yang et al. 2505.11953; open-unlearning",
    defaults=SatImpSettings(),
    forget=_forget,
)
