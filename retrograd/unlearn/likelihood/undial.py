"""UNDIAL: distil from the reference with the right token's logit lowered.

    F = (1/Z) Σ w·CE(softmax(z_ref − β·onehot(gold)), softmax(z))

Bounded below: the teacher is fixed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from retrograd.unlearn.method import Method
from retrograd.unlearn.settings import Settings
from retrograd.unlearn.terms import Terms, forget_term
from retrograd.unlearn.view import Side, View

__all__ = ["METHOD", "UNDIALSettings"]


@dataclass(frozen=True)
class UNDIALSettings(Settings):
    """UNDIAL."""

    beta: float = 10.0
    """What the right token's logit is lowered by, in nats."""


def _forget(settings: UNDIALSettings, view: View, side: Side) -> Terms:
    then = side.reference.logits
    assert then is not None, "undial looks at logits"
    gold = side.now.targets[:, None]
    teacher = then.scatter(1, gold, then.gather(1, gold) - settings.beta).softmax(-1)
    losses = -torch.sum(teacher * side.logits.log_softmax(-1), -1)
    return forget_term(settings, view, torch.sum(side.c * losses))


METHOD = Method(
    name="undial",
    formula="(1/Z) Σ w·CE(softmax(z_ref − β·onehot(gold)), softmax(z))",
    source="Dong et al. 2402.10052; β of its papers (1 is the default in open-unlearning's code)",
    defaults=UNDIALSettings(),
    forget=_forget,
    reference=True,
)
