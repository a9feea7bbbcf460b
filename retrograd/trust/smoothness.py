"""Metasmoothness: does training at nearby data weights move the parameters the same way twice?

Definition 2 of Engstrom et al., arXiv:2503.13751, with θ_k the final parameters at data weights 1 + k·h·v:

    S = Σ_j d_j/‖d‖₁ · sign(θ_1 − θ_0)_j · sign(θ_2 − θ_1)_j          d = |θ_2 − θ_0|

1 where every parameter keeps its direction; 0 for a random one. Near 1 is necessary for scores to predict, not
sufficient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from retrograd.core.optim import Params

__all__ = ["metasmoothness", "perturbed"]


def metasmoothness(first: Params, second: Params, third: Params) -> float:
    """S of the final parameters at data weights 1, 1 + hv and 1 + 2hv, in [−1, 1].

    Raises:
        ValueError: If the parameters did not move at all, or are not finite.
    """
    agreed, total = 0.0, 0.0
    for name in first:
        a, b, c = (params[name].double() for params in (first, second, third))
        size = (c - a).abs()
        agreed += float((size * (b - a).sign() * (c - b).sign()).sum())
        total += float(size.sum())
    if not total > 0 or total == float("inf"):
        raise ValueError(
            f"the final parameters at perturbed data weights differ by {total}: training either ignores its data or "
            "overflows. Check the learning rate"
        )
    return agreed / total


def perturbed(weights: Tensor, size: float, seed: int) -> Tensor:
    """weights + size·v with v ~ N(0, I), a function of the seed on every device."""
    noise = torch.randn(weights.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return weights + (size * noise).to(weights)
