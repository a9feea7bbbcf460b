"""Weighted ascent that scatters: forget tokens lose their likelihood, and forget rows their common direction.

    ascent = −(1/Z) Σ w·min(CE, cap·log V)
    orth   = mean_l mean_{i≠j} relu cos(pool_l[i], pool_l[j])                pool_l[b] = Σ_t w·h_l/n_b
    F      = forget(p_k)·ascent + orth·orth

w is meant to be what attribution makes of both queries, norm(p)·(1 − norm(g)): strength for what is to go, spared where
it holds what is to stay. Pairs i ≠ j are those of one micro-batch, so it needs two forget rows at least. The pools'
cosine has an ε of a hundredth of the row's mean ‖h0‖, as in `orth_circuit_breakers`.
"""

from __future__ import annotations

from dataclasses import dataclass

from retrograd.unlearn.activation.orth_circuit_breakers import alike
from retrograd.unlearn.method import Method
from retrograd.unlearn.settings import Settings
from retrograd.unlearn.terms import Term, Terms, ascent, ramped
from retrograd.unlearn.view import Side, View

__all__ = ["METHOD", "WeightedAscentOrthSettings"]


@dataclass(frozen=True)
class WeightedAscentOrthSettings(Settings):
    """Weighted ascent with an orthogonality term."""

    forget: float = 0.5
    """Coefficient of the ascent; 0 leaves it out."""
    orth: float = 1.0
    """Coefficient of orth; 0 leaves it out."""
    cap: float = 2.0
    """A token's loss counts up to cap·log V, V the vocabulary: log V is a uniform guess."""


def _forget(settings: WeightedAscentOrthSettings, view: View, side: Side) -> Terms:
    terms = Terms()
    if settings.forget > 0:
        coefficient = ramped(settings.forget, settings.forget_ramp, view.progress)
        terms["ascent"] = Term(coefficient, ascent(side, settings.cap))
    if settings.orth > 0:
        terms["orth"] = Term(settings.orth, alike(side))
    return terms


METHOD = Method(
    name="weighted_ascent_orth",
    formula="−(1/Z) Σ w·min(CE, cap·log V), + orth·mean_l mean_{i≠j} relu cos(pool_i, pool_j)",
    source="the original plan of attribution-weighted ascent; grad_diff's coefficient, orth is ours",
    defaults=WeightedAscentOrthSettings(),
    forget=_forget,
    family="activation",
    linear=False,
    reference=True,
    states=True,
    token_mean=False,
    additive=False,
    least_rows=2,
)
