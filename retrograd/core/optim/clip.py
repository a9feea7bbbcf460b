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


def clip(grads: Params, max_norm: float) -> Params:
    """g·s(‖g‖)."""
    scale = torch.clamp(max_norm / (_norm(grads) + _TINY), max=1.0)
    return {name: g * scale for name, g in grads.items()}


def clip_pullback(grads: Params, max_norm: float, bars: Params) -> Params:
    """The cotangent of g, [K, *shape], from that of clip(g): s·ḡ + g·⟨g, ḡ⟩·s'(‖g‖)/‖g‖ where the clip is active."""
    total = _norm(grads)
    scale = max_norm / (total + _TINY)
    if scale >= 1:
        return bars
    parts = torch.stack([bars[name].reshape(len(bars[name]), -1) @ g.flatten() for name, g in grads.items()])
    inner = sum(tree.across(parts), start=torch.zeros(()))
    slope = -inner * scale / (total + _TINY) / total  # [K]
    return {n: bars[n] * scale + slope.view(-1, *[1] * grads[n].ndim) * grads[n] for n in grads}


def _norm(grads: Params) -> Tensor:
    return tree.across(torch.stack([torch.linalg.vector_norm(g) for g in grads.values()])).square().sum().sqrt()
