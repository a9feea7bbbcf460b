"""Weighted gradient ascent: ascent that fades where the right token is unlikely already.

F = (1/Z) Σ w·p^β/β        with the gradient of −(1/Z) Σ w·detach(p^β)·CE, p = softmax(z)[gold]
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from retrograd.unlearn.method import Method
from retrograd.unlearn.settings import Settings
from retrograd.unlearn.terms import Terms, forget_term
from retrograd.unlearn.view import Side, View

__all__ = ["METHOD", "WGASettings"]


@dataclass(frozen=True)
class WGASettings(Settings):
    """Weighted gradient ascent."""

    beta: float = 1.0
    """Power of the right token's probability."""


def _forget(settings: WGASettings, view: View, side: Side) -> Terms:
    return forget_term(settings, view, torch.sum(side.c * torch.exp(-settings.beta * side.ce)) / settings.beta)


METHOD = Method(
    name="wga",
    formula="(1/Z) Σ w·p^β/β",
    source="Wang et al. 2502.19301; open-unlearning",
    defaults=WGASettings(),
    forget=_forget,
)
