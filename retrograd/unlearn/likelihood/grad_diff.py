"""Gradient difference: ascent on forget tokens, descent on retain rows.

    F = −(1/Z) Σ w·min(CE, cap·log V)

`as_run` takes the cap away and gives the retain term kl the batch-mean normaliser it was run with.
"""

from __future__ import annotations

from dataclasses import dataclass

from retrograd.unlearn.method import Method
from retrograd.unlearn.settings import Settings
from retrograd.unlearn.terms import Terms, ascent, forget_term
from retrograd.unlearn.view import Side, View

__all__ = ["METHOD", "GradDiffSettings"]


@dataclass(frozen=True)
class GradDiffSettings(Settings):
    """Gradient difference."""

    forget: float = 0.5
    """Coefficient of the forget term."""
    cap: float = 2.0
    """A token's loss counts up to cap·log V, V the vocabulary: log V is a uniform guess."""


def _forget(settings: GradDiffSettings, view: View, side: Side) -> Terms:
    return forget_term(settings, view, ascent(side, None if settings.as_run else settings.cap))


METHOD = Method(
    name="grad_diff",
    formula="−(1/Z) Σ w·min(CE, cap·log V)",
    source="Liu et al. 2203.12817; coefficients of the unlearning taxonomy; the cap is ours",
    defaults=GradDiffSettings(),
    forget=_forget,
    signed=True,
    fault="the forget loss has no cap, and the retain term kl is a sum over tokens divided by rows",
)
