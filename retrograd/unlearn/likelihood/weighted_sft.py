"""Fine-tuning on weighted tokens: descent where w > 0, ascent where w < 0, nothing where w = 0.

    F = (1/Z) Σ w·CE

With the weights of `retrograd select` these are the value- and sign-weighted and the masked fine-tunings. Retain rows,
if there are any, are descended too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from retrograd.unlearn.method import Method
from retrograd.unlearn.settings import Settings
from retrograd.unlearn.terms import Terms, forget_term
from retrograd.unlearn.view import Side, View

__all__ = ["METHOD", "WeightedSFTSettings"]


@dataclass(frozen=True)
class WeightedSFTSettings(Settings):
    """Weighted fine-tuning."""


def _forget(settings: WeightedSFTSettings, view: View, side: Side) -> Terms:
    return forget_term(settings, view, torch.sum(side.c * side.ce))


METHOD = Method(
    name="weighted_sft",
    formula="(1/Z) Σ w·CE",
    source="the original experiments 1–7",
    defaults=WeightedSFTSettings(),
    forget=_forget,
    signed=True,
    descends=True,
)
