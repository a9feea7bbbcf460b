"""Quantisation, round to nearest: small changes of unlearning may fall below half a step, and be gone.

Source: Zhang et al., Does your LLM truly unlearn? (2410.16454).
"""

from __future__ import annotations

from torch import Tensor

from retrograd.attack.untrained.contract import Altered, Given, Untraining, matrices

__all__ = ["UNTRAINING", "rounded"]


def rounded(matrix: Tensor, bits: int) -> Tensor:
    """A matrix on the grid of a signed whole number of so many bits, one scale a row: max|w|/(2^(bits−1) − 1).

    >>> import torch
    >>> rounded(torch.tensor([[1.0, 0.2, -0.6]]), 2).tolist()
    [[1.0, 0.0, -1.0]]
    """
    levels = 2 ** (bits - 1) - 1
    scale = matrix.abs().amax(dim=1, keepdim=True) / levels
    safe = scale.where(scale > 0, 1.0)
    return (matrix / safe).round().clamp(-levels, levels) * safe


def _alter(given: Given, strength: float) -> Altered:
    params, bits = dict(given.lm.params), 16 - int(strength)
    for name in matrices(params):
        params[name] = rounded(params[name], bits)
    return Altered(params)


UNTRAINING = Untraining(
    name="quantise",
    formula="every matrix to whole numbers of 16 − s bits, round to nearest, one scale a row: 8 is int8, 12 is int4",
    strengths=(8, 12, 13),
    alter=_alter,
    most=14,
    whole=True,
)
