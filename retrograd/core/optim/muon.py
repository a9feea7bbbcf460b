"""Muon: orthogonalised momentum on matrices. Jordan et al. (2024), as torch.optim.Muon with `match_rms_adamw`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from retrograd.core import tree
from retrograd.core.optim import spared
from retrograd.core.optim.adamw import AdamW
from retrograd.core.optim.protocol import (
    Cotangent,
    LearningRate,
    Moments,
    Params,
    Updated,
    check_fraction,
    inner,
    product,
    rate,
    zeros,
)

__all__ = ["Muon", "newton_schulz", "newton_schulz_pullback"]

_A, _B, _C = 3.4445, -4.7750, 2.0315


@dataclass(frozen=True)
class Muon:
    """Orthogonalised momentum on matrices, AdamW on every other parameter and on those named in `exclude`.

        b' = μb + (1−μ)g     u = NewtonSchulz((1−μ)g + μb')     θ' = θ·(1 − lr·wd) − 0.2·lr·√max(rows, columns)·u

    Momentum and scaling are torch.optim.Muon's with `nesterov` and `match_rms_adamw`, so one learning rate serves both
    halves. Newton–Schulz runs in the parameter's dtype (torch's casts to bfloat16) and on whole matrices; all else
    is elementwise. The decay is differentiated. Parameters named in `spared` do not decay.
    """

    lr: LearningRate
    momentum: float = 0.95
    nesterov: bool = True
    weight_decay: float = 0.0
    ns_steps: int = 5
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    eps_root: float = 1e-8
    exclude: tuple[str, ...] = ()
    spared: tuple[str, ...] = field(default=(), metadata={"later": True})

    def __post_init__(self) -> None:
        check_fraction(momentum=self.momentum)
        self._rest()

    def init(self, params: Params) -> Moments:
        matrices, rest = self._divide(params)
        return {"momentum": zeros({name: params[name] for name in matrices}), **self._rest().init(_only(params, rest))}

    def update(self, params: Params, moments: Moments, grads: Params, step: int) -> tuple[Params, Moments]:
        if self.spared:
            return spared.update(self, params, moments, grads, step)
        matrices, rest = self._divide(params)
        lr, new = rate(self.lr, step), dict[str, Tensor]()
        buffers = {name: self._buffer(moments, grads, name) for name in matrices}
        turned = tree.of_whole(
            lambda direction: (_turned(lr, direction, self.ns_steps),),
            matrices,
            lambda name: (self._direction(buffers[name], grads[name]),),
        )
        for name, (moved,) in turned:
            new[name] = params[name] * (1 - lr * self.weight_decay) - moved
        others, other_moments = self._rest().update(_only(params, rest), _adam(moments), grads, step)
        return {name: (new | others)[name] for name in params}, {"momentum": buffers, **other_moments}

    def pullback(
        self, params: Params, moments: Moments, grads: Params | None, step: int, cotangent: Cotangent
    ) -> Updated:
        if self.spared:
            return spared.pullback(self, params, moments, grads, step, cotangent)
        assert grads is not None, "asked for by needs_gradient"
        matrices, rest = self._divide(params)
        lr, moved = rate(self.lr, step), torch.zeros((), dtype=torch.float64)
        below = Cotangent(_only(cotangent.params, rest), _adam(cotangent.moments))
        others, gs, recipe, _ = self._rest().pullback(_only(params, rest), _adam(moments), grads, step, below)
        thetas, buffers, momentum = dict(others.params), dict[str, Tensor](), self.momentum
        pulled = tree.of_whole(
            lambda direction, bars: _pulled(direction, bars, self.ns_steps),
            matrices,
            lambda name: (self._direction(self._buffer(moments, grads, name), grads[name]), cotangent.params[name]),
        )
        for name, (turned, slopes) in pulled:
            bar, along = cotangent.params[name], slopes * -lr
            after = cotangent.moments["momentum"][name] + (momentum * along if self.nesterov else along)
            thetas[name], buffers[name] = bar * (1 - lr * self.weight_decay), momentum * after
            gs[name] = (1 - momentum) * (after + along if self.nesterov else after)
            moved = moved - product(bar, turned)
        pulled_back = Cotangent(_in_order(thetas, params), {"momentum": _in_order(buffers, params), **others.moments})
        # θ' is affine in lr and in lr·wd: its slope is the update of rate 1 without θ's own share
        moved, decayed = tree.total(moved), inner(_only(cotangent.params, matrices), params)
        lr_slope, decay = recipe["lr"] + moved - self.weight_decay * decayed, recipe["weight_decay"] - lr * decayed
        return Updated(pulled_back, _in_order(gs, params), {"lr": lr_slope, "weight_decay": decay})

    def needs_gradient(self, step: int) -> bool:
        return True

    def recovered(self, params: Params, moments: Moments, after: Moments) -> Params | None:
        return None  # Newton–Schulz would amplify the rounding

    def preconditioner(self, params: Params, moments: Moments, grads: Params, step: int) -> Params | None:
        return None

    def _buffer(self, moments: Moments, grads: Params, name: str) -> Tensor:
        return torch.lerp(moments["momentum"][name], grads[name], 1 - self.momentum)

    def _direction(self, buffer: Tensor, g: Tensor) -> Tensor:
        return torch.lerp(g, buffer, self.momentum) if self.nesterov else buffer

    def _rest(self) -> AdamW:
        return AdamW(self.lr, self.beta1, self.beta2, self.eps, self.eps_root, self.weight_decay)

    def _divide(self, params: Params) -> tuple[list[str], list[str]]:
        matrices = [name for name, theta in params.items() if theta.ndim == 2 and name not in self.exclude]
        return matrices, [name for name in params if name not in matrices]


def _turned(lr: float, direction: Tensor, steps: int) -> Tensor:
    """What a whole matrix is moved by."""
    return 0.2 * lr * math.sqrt(max(direction.shape)) * newton_schulz(direction, steps)


def _pulled(direction: Tensor, bars: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """What a whole matrix is moved by at rate 1, and the cotangents of its direction [K, R, C] for those of it."""
    u, slopes = newton_schulz_pullback(direction, bars, steps)
    scale = 0.2 * math.sqrt(max(direction.shape))
    return scale * u, scale * slopes


def newton_schulz(matrix: Tensor, steps: int) -> Tensor:
    """Approximate UVᵀ of matrix = USVᵀ, [R, C], by the quintic iteration of Muon."""
    x = matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / _size(x)
    for _ in range(steps):
        x = _iterated(x)
    return x.mT if matrix.shape[0] > matrix.shape[1] else x


def newton_schulz_pullback(matrix: Tensor, bars: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """`newton_schulz`, and the cotangents of its argument [K, R, C] for those of it. An iteration and its pullback are

        x' = ax + (bA + cA²)x,  A = xxᵀ        x̄ = ax̄' + (bA + cA²)x̄' + (bS + c(SA + AS))x,  S = x̄'xᵀ + xx̄'ᵀ

    What is held is x of every iteration, and two matrices and two of [K, R, C] besides.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    x, bars = (matrix.mT.contiguous(), bars.mT.contiguous()) if tall else (matrix, bars)
    size = _size(x)
    held = [x / size]
    for _ in range(steps):
        held.append(_iterated(held[-1]))
    u = held.pop()
    start = held[0]
    while held:
        x = held.pop()
        gram, both = x @ x.mT, bars @ x.mT
        both = both + both.mT
        bent = both @ gram
        bent = _B * both + _C * (bent + bent.mT)
        bars = _A * bars + (_B * gram + _C * gram @ gram) @ bars + bent @ x
    bars = (bars - start * (bars * start).sum((-2, -1), keepdim=True)) / size
    return (u.mT, bars.mT) if tall else (u, bars)


def _size(x: Tensor) -> Tensor:
    # the root of Σx² + tiny, not max(‖x‖, ε): a gradient of exactly 0 has to keep a finite slope
    return torch.sqrt(torch.sum(x * x) + 1e-14)


def _iterated(x: Tensor) -> Tensor:
    gram = x @ x.mT
    return _A * x + (_B * gram + _C * gram @ gram) @ x


def _only(tensors: Params, names: list[str]) -> Params:
    return {name: tensors[name] for name in names}


def _in_order(tensors: Params, params: Params) -> Params:
    return {name: tensors[name] for name in params if name in tensors}


def _adam(moments: Moments) -> Moments:
    return {"m": moments["m"], "v": moments["v"]}
