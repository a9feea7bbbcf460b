"""Two phases in one run: first forget, then mend what should have stayed.

    F = removal, up to progress `switch`: −(1/Z) Σ w·min(CE, cap·log V), or (1/Z) Σ w·(logsumexp z − mean z)/log V
    R with the share `hold` of its coefficient up to there, and with all of it from there on

What comes back in the second phase was hidden, not gone: evaluate on the way, at the switch and at the end. Optimizer
and learning rate run through. With `budget` removal stops, in the first phase, at every micro-batch whose retain rows
diverge from the reference by more than that: whether it does is a function of parameters and rows, piecewise constant,
so that a step remains one and its derivative is right away from the budget.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from retrograd.unlearn.method import Method
from retrograd.unlearn.settings import Settings
from retrograd.unlearn.terms import Terms, ascent, divergence, flat, forget_term
from retrograd.unlearn.view import Side, View

__all__ = ["METHOD", "TwoPhaseSettings"]


@dataclass(frozen=True)
class TwoPhaseSettings(Settings):
    """Two phases."""

    removal: Literal["ascent", "max_entropy"] = "max_entropy"
    """What the first phase does: bounded ascent, or predictions made uniform."""
    switch: float = 0.5
    """Progress at which the second phase begins, above 0 and below 1."""
    hold: float = 0.2
    """Share of the retain coefficient in the first phase."""
    budget: float | None = None
    """Divergence from the reference on a micro-batch's retain rows, nats per token, at which its removal stops; it goes
    on at any when None."""
    cap: float = 2.0
    """ascent: a token's loss counts up to cap·log V, V the vocabulary: log V is a uniform guess."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.switch < 1:
            raise ValueError(f"switch is {self.switch}; it is a progress above 0 and below 1, or a phase is empty")
        if not 0 <= self.hold <= 1:
            raise ValueError(f"hold is {self.hold}; it is a share of the retain coefficient, from 0 to 1")
        if self.budget is not None and not self.budget > 0:
            raise ValueError(f"budget is {self.budget}; a divergence of 0 stops everything: give more, or None")


def _forget(settings: TwoPhaseSettings, view: View, side: Side) -> Terms:
    uniform = settings.removal == "max_entropy"
    value = torch.sum(side.c * flat(side.logits)) if uniform else ascent(side, settings.cap)
    if settings.budget is not None and view.retain is not None:
        value = value * (divergence(view.retain) <= settings.budget)
    return forget_term(settings, view, value)


def _schedule(settings: TwoPhaseSettings, progress: Tensor) -> tuple[Tensor, Tensor]:
    first = (progress < settings.switch).to(progress)
    return first, 1 - (1 - settings.hold) * first


def _refers(settings: TwoPhaseSettings) -> bool:
    return settings.budget is not None


METHOD = Method(
    name="two_phase",
    formula="[p_k < switch]·removal: −(1/Z) Σ w·min(CE, cap·log V) or (1/Z) Σ w·(logsumexp z − mean z)/log V",
    source="the original plan of removal and repair; switch and hold are ours",
    defaults=TwoPhaseSettings(),
    forget=_forget,
    schedule=_schedule,
    refers=_refers,
)
