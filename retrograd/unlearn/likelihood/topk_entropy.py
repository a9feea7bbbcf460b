"""Maximum entropy over the K likeliest tokens; the others stay as they are.

F = (1/Z) Σ w·(logsumexp z_K − mean z_K)/log K        z_K the K largest logits
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from retrograd.unlearn.method import Method
from retrograd.unlearn.settings import Settings
from retrograd.unlearn.terms import Terms, flat, forget_term, top
from retrograd.unlearn.view import Side, View

__all__ = ["METHOD", "TopKEntropySettings"]


@dataclass(frozen=True)
class TopKEntropySettings(Settings):
    """Maximum entropy over the likeliest tokens."""

    top_k: int | None = None
    """K; 100, or half of a smaller vocabulary, when None."""


def _forget(settings: TopKEntropySettings, view: View, side: Side) -> Terms:
    return forget_term(settings, view, torch.sum(side.c * flat(top(side.logits, settings.top_k))))


METHOD = Method(
    name="topk_entropy",
    formula="(1/Z) Σ w·(logsumexp z_K − mean z_K)/log K",
    source="the original sequential runs, K 100",
    defaults=TopKEntropySettings(),
    forget=_forget,
)
