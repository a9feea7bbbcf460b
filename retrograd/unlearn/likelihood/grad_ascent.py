"""Gradient ascent: the forget tokens are made unlikely, and nothing holds the rest.

    F = −(1/Z) Σ w·min(CE, cap·log V)

Unbounded, the loss runs to 150 nats and more while what is asked of the model stays known, so a token has no gradient
beyond the cap; `as_run` takes the cap away.
"""

from __future__ import annotations

from dataclasses import dataclass

from retrograd.unlearn.method import Method
from retrograd.unlearn.settings import Settings
from retrograd.unlearn.terms import Terms, ascent, forget_term
from retrograd.unlearn.view import Side, View

__all__ = ["METHOD", "GradAscentSettings"]


@dataclass(frozen=True)
class GradAscentSettings(Settings):
    """Gradient ascent; no retain term."""

    retain: float = 0.0
    """Coefficient of the retain term; 0 leaves it out."""
    cap: float = 2.0
    """A token's loss counts up to cap·log V, V the vocabulary: log V is a uniform guess."""


def _forget(settings: GradAscentSettings, view: View, side: Side) -> Terms:
    return forget_term(settings, view, ascent(side, None if settings.as_run else settings.cap))


METHOD = Method(
    name="grad_ascent",
    formula="−(1/Z) Σ w·min(CE, cap·log V)",
    source="Jang et al. 2210.01504; the cap is ours",
    defaults=GradAscentSettings(),
    forget=_forget,
    signed=True,
    fault="the forget loss has no cap",
)
