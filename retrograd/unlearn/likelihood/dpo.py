"""Direct preference optimisation: the alternative answer wins over the forget row.

    Δ = Σ_t w·(log p − log p_ref)        F = −(2/β) mean_pairs log σ(β·(Δ_alternative − Δ_forget))

Both rows of a pair have to be in one micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import logsigmoid

from retrograd.unlearn.method import Method
from retrograd.unlearn.settings import Settings
from retrograd.unlearn.terms import Terms, forget_term, log_ratio
from retrograd.unlearn.view import Side, View

__all__ = ["METHOD", "DPOSettings"]


@dataclass(frozen=True)
class DPOSettings(Settings):
    """Direct preference optimisation."""

    beta: float = 0.1
    """Inverse temperature."""


def _forget(settings: DPOSettings, view: View, side: Side) -> Terms:
    other = view.alternative
    if other is None or other.sequences != side.sequences or not torch.equal(other.pair, side.pair):
        raise ValueError(
            f"dpo compares each forget row with an alternative one of the same pair; this micro-batch has "
            f"{side.sequences} forget rows and {0 if other is None else other.sequences} alternative ones. Give "
            "alternatives, and a micro-batch size that is a multiple of the stream's unit"
        )
    wins, loses = (s.per_sequence(s.w * log_ratio(s)) for s in (other, side))
    inner = logsigmoid(settings.beta * (wins - loses))
    return forget_term(settings, view, -2 / settings.beta * torch.sum(side.share * inner))


METHOD = Method(
    name="dpo",
    formula="−(2/β) mean_pairs log σ(β·(Δ_alternative − Δ_forget)), Δ = Σ_t w·(log p − log p_ref)",
    source="Rafailov et al. 2305.18290; open-unlearning",
    defaults=DPOSettings(),
    forget=_forget,
    linear=False,
    reference=True,
    token_mean=False,
    alternatives=True,
)
