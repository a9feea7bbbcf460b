"""Negative preference optimisation: forget sequences are dispreferred, relative to the reference.

    r_b = Σ_t w·(log p − log p_ref)        F = −(2/β) mean_b log σ(−β·r_b)

At the reference its gradient is that of ascent on Σ_t w·CE; where a sequence is far below the reference it fades. With
`per_token` every token has its own σ: F = −(2/β)(1/Z) Σ w·log σ(−β·(log p − log p_ref)).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import logsigmoid

from retrograd.unlearn.method import Method
from retrograd.unlearn.settings import Settings
from retrograd.unlearn.terms import Terms, forget_term, log_ratio
from retrograd.unlearn.view import Side, View

__all__ = ["METHOD", "NPOSettings"]


@dataclass(frozen=True)
class NPOSettings(Settings):
    """Negative preference optimisation."""

    retain: float = 1.5
    """Coefficient of the retain term; 0 leaves it out."""
    beta: float = 0.01
    """Inverse temperature; ascent in the limit of 0. Larger values need clipping to 0.5."""
    per_token: bool = False
    """A sigmoid for each token, averaged with w, in place of one for each sequence."""


def _forget(settings: NPOSettings, view: View, side: Side) -> Terms:
    factor = -2 / settings.beta
    if settings.per_token:
        return forget_term(settings, view, factor * torch.sum(side.c * logsigmoid(-settings.beta * log_ratio(side))))
    ratios = side.per_sequence(side.w * log_ratio(side))
    return forget_term(settings, view, factor * torch.sum(side.share * logsigmoid(-settings.beta * ratios)))


METHOD = Method(
    name="npo",
    formula="−(2/β) mean_b log σ(−β Σ_t w·(log p − log p_ref))",
    source="Zhang et al. 2404.05868; β and coefficients of the unlearning taxonomy",
    defaults=NPOSettings(),
    forget=_forget,
    linear=False,
    reference=True,
    token_mean=False,
)
