"""CE-U: cross-entropy against the model's own distribution without the right token.

    F = −(1/Z) Σ w·log(1 − p)        p = softmax(z)[gold]

with the gradient of the cross-entropy against detach(softmax(z with z_gold = −∞)). At least 0, and 0 once p is 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from retrograd.unlearn.method import Method
from retrograd.unlearn.settings import Settings
from retrograd.unlearn.terms import Terms, forget_term
from retrograd.unlearn.view import Side, View

__all__ = ["METHOD", "CEUSettings"]


@dataclass(frozen=True)
class CEUSettings(Settings):
    """CE-U."""

    ignore_first: bool = False
    """Leave out a row's first target where it has several, as open-unlearning does with answers."""


def _forget(settings: CEUSettings, view: View, side: Side) -> Terms:
    gold = side.now.targets[:, None]
    others = side.logits.scatter(1, gold, -torch.inf).logsumexp(-1)
    losses = side.logits.logsumexp(-1) - others
    if settings.ignore_first:
        first = torch.cat([side.sequence.new_full((1,), -1), side.sequence[:-1]]) != side.sequence
        losses = losses * ~(first & (side.counts[side.sequence] > 1))
    return forget_term(settings, view, torch.sum(side.c * losses))


METHOD = Method(
    name="ce_u",
    formula="−(1/Z) Σ w·log(1 − p)",
    source="Yang 2503.01224; open-unlearning",
    defaults=CEUSettings(),
    forget=_forget,
)
