"""SimNPO: negative preference optimisation by the mean token loss, without a reference.

    c_b = Σ_t w·CE/n_b        F = −(2/β) mean_b log σ(β·c_b − margin)

n_b counts the sequence's valid targets and does not depend on w. Divided by Σ w instead, a sequence's loss would not
change when all its weights do, and the scores of every document would add up to exactly 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import logsigmoid

from retrograd.unlearn.method import Method
from retrograd.unlearn.settings import Settings
from retrograd.unlearn.terms import Terms, forget_term
from retrograd.unlearn.view import Side, View

__all__ = ["METHOD", "SimNPOSettings"]


@dataclass(frozen=True)
class SimNPOSettings(Settings):
    """SimNPO."""

    beta: float = 0.1
    """Inverse temperature, per nat of mean token loss."""
    margin: float = 0.0
    """Of the mean token loss, times β, below which a sequence is pushed most."""


def _forget(settings: SimNPOSettings, view: View, side: Side) -> Terms:
    means = side.per_sequence(side.w * side.ce) / side.counts
    inner = logsigmoid(settings.beta * means - settings.margin)
    return forget_term(settings, view, -2 / settings.beta * torch.sum(side.share * inner))


METHOD = Method(
    name="simnpo",
    formula="−(2/β) mean_b log σ(β·Σ_t w·CE/n_b − margin)",
    source="Fan et al. 2410.07163; β is the original run's with the lowest forget accuracy",
    defaults=SimNPOSettings(),
    forget=_forget,
    linear=False,
)
