"""Pruning by magnitude: the smallest entries of every matrix become 0."""

from __future__ import annotations

from retrograd.attack.untrained.contract import Altered, Given, Untraining, matrices

__all__ = ["UNTRAINING"]


def _alter(given: Given, strength: float) -> Altered:
    params = dict(given.lm.params)
    for name in matrices(params):
        leaf = params[name]
        count = int(strength * leaf.numel())
        flat = leaf.flatten().clone()
        flat[flat.abs().argsort(stable=True)[:count]] = 0
        params[name] = flat.view_as(leaf)
    return Altered(params)


UNTRAINING = Untraining(
    name="prune",
    formula="the share s of the entries of every matrix, those nearest to 0, becomes 0",
    strengths=(0.05, 0.1, 0.2, 0.4),
    alter=_alter,
    most=1.0,
)
