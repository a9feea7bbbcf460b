"""Noise on the weights, in units of each parameter's own spread."""

from __future__ import annotations

import torch

from retrograd.attack.untrained.contract import Altered, Given, Untraining, generator, matrices

__all__ = ["UNTRAINING"]


def _alter(given: Given, strength: float) -> Altered:
    params = dict(given.lm.params)
    for name in matrices(params):
        leaf = params[name]
        drawn = torch.randn(leaf.shape, generator=generator(given, name), dtype=torch.float32).to(leaf.device)
        spread = leaf.float().std()
        params[name] = (leaf.float() + strength * spread * drawn).to(leaf.dtype)
    return Altered(params)


UNTRAINING = Untraining(
    name="noise",
    formula="W + s·std(W)·ε, ε standard normal, the same for every strength",
    strengths=(0.01, 0.02, 0.05, 0.1, 0.2),
    alter=_alter,
)
