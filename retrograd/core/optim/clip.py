"""Clipping to a global gradient norm, which couples all parameters, and its pullback.

    clip(g) = g·s(‖g‖),  s = min(1, c/(‖g‖ + 1e-6))            ‖g‖ over all parameters together

Source: torch.nn.utils.clip_grad_norm_.
"""

from __future__ import annotations

import torch
from torch import Tensor

from retrograd.core import tree
from retrograd.core.optim.protocol import Params

__all__ = ["clip", "clip_pullback"]

_TINY = 1e-6


def clip(grads: Params, max_norm: float, pieces: int = 1) -> Params:
    """g·s(‖g‖).

    Args:
        pieces: Of each leaf, in whose order the norm is added up.
    """
    scale = torch.clamp(max_norm / (_norm(grads, pieces) + _TINY), max=1.0)
    return {name: g * scale for name, g in grads.items()}


def clip_pullback(grads: Params, max_norm: float, bars: Params, pieces: int = 1) -> Params:
    """The cotangent of g, [K, *shape], from that of clip(g): s·ḡ + g·⟨g, ḡ⟩·s'(‖g‖)/‖g‖ where the clip is active."""
    total = _norm(grads, pieces)
    scale = max_norm / (total + _TINY)
    if scale >= 1:
        return bars
    cut = [pair for n, g in grads.items() for pair in zip(tree.cut(bars[n], pieces, 1), tree.cut(g, pieces))]
    parts = torch.stack([bar.reshape(len(bar), g.numel()) @ g.flatten() for bar, g in cut])
    inner = sum(tree.across(parts), start=torch.zeros(()))
    slope = -inner * scale / (total + _TINY) / total  # [K]
    return {n: bars[n] * scale + slope.view(-1, *[1] * grads[n].ndim) * grads[n] for n in grads}


def _norm(grads: Params, pieces: int) -> Tensor:
    parts = [torch.linalg.vector_norm(piece) for g in grads.values() for piece in tree.cut(g, pieces)]
    return tree.across(torch.stack(parts)).square().sum().sqrt()
