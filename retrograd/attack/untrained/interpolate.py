"""Interpolation with the model before unlearning: a probe of the path between the two, for it needs that model."""

from __future__ import annotations

from retrograd.attack.untrained.contract import Altered, Given, Untraining, delta

__all__ = ["UNTRAINING"]


def _alter(given: Given, strength: float) -> Altered:
    params = given.lm.params
    moved = {name: (leaf.double() - strength * delta(given, name)).to(leaf.dtype) for name, leaf in params.items()}
    return Altered(moved)


UNTRAINING = Untraining(
    name="interpolate",
    formula="θ − s·(θ − θ_base), s the share of the way back",
    strengths=(0.1, 0.25, 0.5, 0.75, 0.9),
    alter=_alter,
    needs_base=True,
    most=1.0,
)
