"""Ablation of what unlearning added: the top singular directions of each matrix's change are taken out again.

An update of low rank is undone by its own few directions. It needs the model before unlearning to find them.
"""

from __future__ import annotations

import torch

from retrograd.attack.untrained.contract import Altered, Given, Untraining, delta, matrices

__all__ = ["UNTRAINING"]


def _alter(given: Given, strength: float) -> Altered:
    params, rank = dict(given.lm.params), int(strength)
    for name in matrices(params):
        u, s, vh = torch.linalg.svd(delta(given, name), full_matrices=False)
        top = (u[:, :rank] * s[:rank]) @ vh[:rank]
        params[name] = (params[name].double() - top).to(params[name].dtype)
    return Altered(params)


UNTRAINING = Untraining(
    name="ablate_delta",
    formula="W − Σ_{i ≤ s} σ_i·u_i·v_iᵀ, of the singular values and directions of W − W_base, for every matrix",
    strengths=(1, 2, 4, 8, 16),
    alter=_alter,
    needs_base=True,
    whole=True,
)
