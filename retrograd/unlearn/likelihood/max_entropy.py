"""Maximum entropy: forget tokens are predicted by a uniform guess.

    F = (1/Z) Σ w·(logsumexp z − mean z)/log V

Bounded: 1 where all tokens are equally likely.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from retrograd.unlearn.method import Method
from retrograd.unlearn.settings import Settings
from retrograd.unlearn.terms import Terms, flat, forget_term
from retrograd.unlearn.view import Side, View

__all__ = ["METHOD", "MaxEntropySettings"]


@dataclass(frozen=True)
class MaxEntropySettings(Settings):
    """Maximum entropy."""


def _forget(settings: MaxEntropySettings, view: View, side: Side) -> Terms:
    return forget_term(settings, view, torch.sum(side.c * flat(side.logits)))


METHOD = Method(
    name="max_entropy",
    formula="(1/Z) Σ w·(logsumexp z − mean z)/log V",
    source="Yuan et al. 2410.08109; the original sequential runs",
    defaults=MaxEntropySettings(),
    forget=_forget,
)
