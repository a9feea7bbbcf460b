"""Embeddings whose training gradient is not that of their function.

x_j = E[i_j] has the pullback Ē[r] = Σ_{j: i_j = r} x̄_j. Training takes another one, with a share s_j of each x̄_j:

    padding_idx          s_j = 0 where i_j is the padding token, 1 elsewhere
    scale_grad_by_freq   s_j = 1/(how often i_j occurs in the batch)

So with κ a copy of θ that is not differentiated, and x_j = κ[i_j] + s_j·(E[i_j] − κ[i_j]),

    g(θ) = ∇_θ f(θ, κ) at κ = θ        J = ∂_θ g + ∂_κ g        Jᵀ ḡ = (∂_θ + ∂_κ) ⟨∇_θ f, ḡ⟩

The update is made of g, its derivative of J: the first differentiation stops at κ, the second one passes. Where nothing
but the lookup reads E, row and share drop out of every score; where the head reads it too (tied embeddings), they do
not. A second backward over torch's own embedding stops at κ both times. J v is the other way round: it passes, then
stops. The gradient of a query is its function's own, with every share 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

__all__ = ["Passing", "suspended", "transposed", "twice", "whole"]

_TRANSPOSED = ContextVar("transposed", default=False)
_DEPTH = ContextVar("depth", default=0)  # of what is suspended


class Passing:
    """Whether a differentiation passes through κ, at the time it gets there."""

    def __init__(self, first: bool) -> None:
        self.now = first

    def turn(self) -> None:
        """Between the first differentiation and the second."""
        self.now = not self.now


@contextmanager
def twice() -> Iterator[Passing]:
    """In which a function is called that is differentiated twice: `turn` what is given before the second time."""
    passing = Passing(_TRANSPOSED.get())
    with _Lookups(passing):
        yield passing


@contextmanager
def transposed() -> Iterator[None]:
    """In which an engine's pullback along v gives J v in place of Jᵀ v."""
    before = _TRANSPOSED.set(True)
    try:
        yield
    finally:
        _TRANSPOSED.reset(before)


@contextmanager
def whole() -> Iterator[None]:
    """In which embeddings have the derivative of their function: for queries."""
    with _Lookups(None):
        yield


@contextmanager
def suspended() -> Iterator[None]:
    """In which what stands around it counts for nothing: for a training within a query."""
    before = _DEPTH.set(_DEPTH.get() + 1)
    try:
        yield
    finally:
        _DEPTH.reset(before)


class _Lookups(TorchFunctionMode):
    """Lookups by x = κ + s·(E − κ), or with every share 1; without effect where it is suspended."""

    def __init__(self, passing: Passing | None) -> None:
        super().__init__()
        self.passing, self.depth = passing, _DEPTH.get()

    def __torch_function__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), options: dict[str, Any] | None = None
    ) -> Any:
        if self.depth < _DEPTH.get():
            return function(*arguments, **(options or {}))
        if function is F.embedding:
            return self._embedding(*arguments, **(options or {}))
        if function is torch.embedding:
            return self._plain(*arguments, **(options or {}))
        return function(*arguments, **(options or {}))

    def _plain(
        self, weight: Tensor, indices: Tensor, padding_idx: int = -1, scale_grad_by_freq: bool = False,
        sparse: bool = False,
    ) -> Tensor:  # fmt: skip
        """`torch.embedding`, where −1 is no padding token."""
        padding = None if padding_idx == -1 else padding_idx
        return self._embedding(indices, weight, padding, scale_grad_by_freq=scale_grad_by_freq, sparse=sparse)

    def _embedding(
        self, input: Tensor, weight: Tensor, padding_idx: int | None = None, max_norm: float | None = None,
        norm_type: float = 2.0, scale_grad_by_freq: bool = False, sparse: bool = False,
    ) -> Tensor:  # fmt: skip
        """`F.embedding`, argument by argument."""
        if not weight.requires_grad or max_norm is not None:  # the latter is refused by what looks at the step
            return F.embedding(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
        looked = F.embedding(input, weight)
        if self.passing is None or (padding_idx is None and not scale_grad_by_freq):
            return looked
        kept: Tensor = _Kept.apply(looked, self.passing)
        if scale_grad_by_freq:
            counts = torch.bincount(input.flatten(), minlength=len(weight))
            looked = kept + (looked - kept) / counts[input].unsqueeze(-1)
        if padding_idx is None:
            return looked
        return torch.where((input == padding_idx % len(weight)).unsqueeze(-1), kept, looked)


class _Kept(torch.autograd.Function):
    """The identity; what is differentiated passes or stops here as it is told."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, passing: Passing) -> Tensor:
        ctx.passing = passing
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, bar: Tensor) -> tuple[Tensor | None, None]:
        return bar if ctx.passing.now else None, None
