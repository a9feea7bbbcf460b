"""Muon: orthogonalised momentum on matrices. Jordan et al. (2024), as torch.optim.Muon with `match_rms_adamw`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from retrograd.core.optim import spared
from retrograd.core.optim.adamw import AdamW
from retrograd.core.optim.foreign import autograd_pullback
from retrograd.core.optim.protocol import (
    Cotangent,
    LearningRate,
    Moments,
    Params,
    Updated,
    check_fraction,
    inner,
    rate,
    zeros,
)

__all__ = ["Muon", "newton_schulz"]


@dataclass(frozen=True)
class Muon:
    """Orthogonalised momentum on matrices, AdamW on every other parameter and on those named in `exclude`.

        b' = μb + (1−μ)g     u = NewtonSchulz((1−μ)g + μb')     θ' = θ·(1 − lr·wd) − 0.2·lr·√max(rows, columns)·u

    Momentum and scaling are torch.optim.Muon's with `nesterov` and `match_rms_adamw`, so one learning rate serves both
    halves. Newton–Schulz runs in the parameter's dtype (torch's casts to bfloat16), and the decay is differentiated.
    Parameters named in `spared` do not decay.
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
        lr, new, buffers = rate(self.lr, step), {}, {}
        for name in matrices:
            new[name], buffers[name] = self._matrix(lr, params[name], moments["momentum"][name], grads[name])
        others, other_moments = self._rest().update(_only(params, rest), _adam(moments), grads, step)
        return {name: (new | others)[name] for name in params}, {"momentum": buffers, **other_moments}

    def pullback(
        self, params: Params, moments: Moments, grads: Params | None, step: int, cotangent: Cotangent
    ) -> Updated:
        if self.spared:
            return spared.pullback(self, params, moments, grads, step, cotangent)
        assert grads is not None, "asked for by needs_gradient"
        matrices, rest = self._divide(params)
        lr, buffers = rate(self.lr, step), {}
        below = Cotangent(_only(cotangent.params, rest), _adam(cotangent.moments))
        others, gs, recipe, _ = self._rest().pullback(_only(params, rest), _adam(moments), grads, step, below)
        thetas = dict(others.params)
        for name in matrices:
            given = (params[name], moments["momentum"][name], grads[name])
            bars = (cotangent.params[name], cotangent.moments["momentum"][name])
            thetas[name], buffers[name], gs[name] = autograd_pullback(
                lambda theta, b, g: self._matrix(lr, theta, b, g), given, bars
            )
        pulled = Cotangent({name: thetas[name] for name in params}, {"momentum": buffers, **others.moments})
        # θ' is affine in lr and in lr·wd: its slope is the update of rate 1 without θ's own share
        directions = {
            name: self._matrix(1.0, params[name], moments["momentum"][name], grads[name])[0] - params[name]
            for name in matrices
        }
        moved, decayed = (inner(_only(cotangent.params, matrices), along) for along in (directions, params))
        recipe = {"lr": recipe["lr"] + moved, "weight_decay": recipe["weight_decay"] - lr * decayed}
        return Updated(pulled, {name: gs[name] for name in params}, recipe)

    def needs_gradient(self, step: int) -> bool:
        return True

    def recovered(self, params: Params, moments: Moments, after: Moments) -> Params | None:
        return None  # Newton–Schulz would amplify the rounding

    def preconditioner(self, params: Params, moments: Moments, grads: Params, step: int) -> Params | None:
        return None

    def _matrix(self, lr: float, theta: Tensor, buffer: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        buffer = torch.lerp(buffer, g, 1 - self.momentum)
        direction = torch.lerp(g, buffer, self.momentum) if self.nesterov else buffer
        scale = 0.2 * lr * math.sqrt(max(theta.shape))
        return theta * (1 - lr * self.weight_decay) - scale * newton_schulz(direction, self.ns_steps), buffer

    def _rest(self) -> AdamW:
        return AdamW(self.lr, self.beta1, self.beta2, self.eps, self.eps_root, self.weight_decay)

    def _divide(self, params: Params) -> tuple[list[str], list[str]]:
        matrices = [name for name, theta in params.items() if theta.ndim == 2 and name not in self.exclude]
        return matrices, [name for name in params if name not in matrices]


def newton_schulz(matrix: Tensor, steps: int) -> Tensor:
    """Approximate UVᵀ of matrix = USVᵀ, [R, C], by the quintic iteration of Muon."""
    x = matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix
    # the root of Σx² + tiny, not max(‖x‖, ε): a gradient of exactly 0 has to keep a finite slope
    x = x / torch.sqrt(torch.sum(x * x) + 1e-14)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if matrix.shape[0] > matrix.shape[1] else x


def _only(tensors: Params, names: list[str]) -> Params:
    return {name: tensors[name] for name in names}


def _adam(moments: Moments) -> Moments:
    return {"m": moments["m"], "v": moments["v"]}
