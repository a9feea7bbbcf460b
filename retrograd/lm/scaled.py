"""A module with large values, for a while: what small values hide shows, and the same bits are there afterwards."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from retrograd.lm.spans import inner

__all__ = ["large_values", "reading", "whole_precision"]

LOGITS = 50.0  # beyond every cap that models have on their logits
LARGEST = 1e6  # of a weight; what is scaled must stay finite
_BODY = (8, 4, 2, 1)  # what matrices are multiplied by, the largest first that leaves losses finite and sure
_ROUNDING = 1e-3  # of the losses; more hides too much


@contextmanager
def large_values(module: nn.Module, judge: Callable[[], tuple[float, float]]) -> Iterator[None]:
    """The module with its matrices scaled by powers of two, its head until its output reaches LOGITS.

    Parameters that are zero throughout get random numbers, and so do those of a diverged model, not finite or beyond
    LARGEST. All of it is undone exactly.

    Args:
        judge: The largest output of the head, and what rounding does to the losses relative to them.
    """
    head = inner(module).get_output_embeddings()
    own = {p.untyped_storage().data_ptr() for p in head.parameters()} if head is not None else set()
    leaves = list({p.untyped_storage().data_ptr(): p for p in module.parameters() if p.is_floating_point()}.values())
    # a NaN is in no range
    replaced = [(p, p.clone()) for p in leaves if p.numel() and not 0 < float(p.detach().abs().max()) <= LARGEST]
    matrices = [p for p in leaves if p.ndim > 1]
    last = [p for p in matrices if p.untyped_storage().data_ptr() in own]
    body = [p for p in matrices if p.untyped_storage().data_ptr() not in own]
    factors = [1.0, 1.0]

    def scale(which: int, factor: float) -> None:
        for p in (body, last)[which]:
            p.mul_(factor)
        factors[which] *= factor

    try:
        _fill([p for p, _ in replaced])
        for factor in _BODY:
            scale(0, factor / factors[0])
            size, rounding = _grown(judge, lambda more: scale(1, more), bool(last))
            if math.isfinite(size) and rounding <= _ROUNDING:
                break
        yield
    finally:
        with torch.no_grad():
            for which in (0, 1):
                scale(which, 1 / factors[which])
            for p, kept in replaced:
                p.copy_(kept)


def _grown(judge: Callable[[], tuple[float, float]], more: Callable[[float], None], can: bool) -> tuple[float, float]:
    """What is judged once the head has been scaled up as far as needed."""
    size, rounding = judge()
    for _ in range(4):  # once, but for a head that is the embedding too
        if not can or not 0 < size < LOGITS:
            break
        more(2.0 ** math.ceil(math.log2(LOGITS / size)))
        size, rounding = judge()
    return size, rounding


def _fill(leaves: list[Tensor]) -> None:
    draw = torch.Generator().manual_seed(0)
    for p in leaves:
        spread = 0.1 if p.ndim < 2 else p.shape[-1] ** -0.5
        p.copy_(spread * torch.randn(p.shape, generator=draw))


@contextmanager
def whole_precision(module: nn.Module) -> Iterator[None]:
    """A module of half precision in float32, with the same bits afterwards: its own rounding would hide everything."""
    tensors = [x for x in (*module.parameters(), *module.buffers()) if x.dtype in (torch.bfloat16, torch.float16)]
    before = [x.data for x in tensors]
    try:
        for x in tensors:
            x.data = x.data.float()
        yield
    finally:
        for x, data in zip(tensors, before, strict=True):
            x.data = data


@contextmanager
def reading(head: Any) -> Iterator[list[float]]:
    """The largest number of each output of a module."""
    seen: list[float] = []
    if head is None:
        yield seen
        return
    handle = head.register_forward_hook(lambda _, __, y: seen.append(float(y.abs().max())))
    try:
        yield seen
    finally:
        handle.remove()
