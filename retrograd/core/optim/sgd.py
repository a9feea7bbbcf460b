"""Stochastic gradient descent, after torch.optim.SGD."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from retrograd.core.optim import spared
from retrograd.core.optim.elementwise import elementwise
from retrograd.core.optim.protocol import (
    Cotangent,
    LearningRate,
    Moments,
    Params,
    Updated,
    check_fraction,
    check_nonnegative,
    holds_gradient,
    inner,
    rate,
    zeros,
)

__all__ = ["SGD"]


class _At(NamedTuple):
    """Where an update starts; without momentum there is no buffer."""

    theta: Tensor
    g: Tensor
    buffer: Tensor | None = None


class _Bar(NamedTuple):
    """Cotangents of what it comes to, [K, *shape]."""

    theta: Tensor
    buffer: Tensor | None = None


@dataclass(frozen=True)
class SGD:
    """Stochastic gradient descent: b' = μb + g + wd·θ; θ' = θ − lr·b' (Nesterov: θ − lr·(g + wd·θ + μb')).

    Parameters named in `spared` do not decay.

    >>> SGD(0.1).update({"x": torch.ones(2)}, {}, {"x": torch.ones(2)}, 0)[0]["x"]
    tensor([0.9000, 0.9000])
    """

    lr: LearningRate
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    spared: tuple[str, ...] = field(default=(), metadata={"later": True})

    def __post_init__(self) -> None:
        check_nonnegative(lr=self.lr, weight_decay=self.weight_decay)
        check_fraction(momentum=self.momentum)
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs momentum; momentum is 0")

    def init(self, params: Params) -> Moments:
        return {"momentum": zeros(params)} if self.momentum else {}

    def update(self, params: Params, moments: Moments, grads: Params, step: int) -> tuple[Params, Moments]:
        if self.spared:
            return spared.update(self, params, moments, grads, step)
        lr, mu = rate(self.lr, step), self.momentum

        def formula(leaves: Sequence[Tensor], _: Sequence[Tensor]) -> tuple[Tensor, ...]:
            at = _At(*leaves)
            g = torch.add(at.g, at.theta, alpha=self.weight_decay) if self.weight_decay else at.g
            if at.buffer is None:
                return (torch.sub(at.theta, g, alpha=lr),)
            buffer = torch.add(g, at.buffer, alpha=mu)
            move = torch.add(g, buffer, alpha=mu) if self.nesterov else buffer
            return torch.sub(at.theta, move, alpha=lr), buffer

        momentum = [moments["momentum"]] if mu else []
        (new, *buffers), _ = elementwise(formula, (params, grads, *momentum), (), (params, *momentum))
        return new, {"momentum": buffers[0]} if mu else {}

    def pullback(
        self, params: Params, moments: Moments, grads: Params | None, step: int, cotangent: Cotangent
    ) -> Updated:
        if self.spared:
            return spared.pullback(self, params, moments, grads, step, cotangent)
        lr, mu, decay = rate(self.lr, step), self.momentum, self.weight_decay

        def formula(_: Sequence[Tensor], bars: Sequence[Tensor]) -> tuple[Tensor, ...]:
            bar = _Bar(*bars)
            if bar.buffer is None:
                return (torch.mul(bar.theta, -lr),)
            g_bar = torch.sub(bar.buffer, bar.theta, alpha=mu * lr if self.nesterov else lr)
            buffer_bar = torch.mul(g_bar, mu)
            return torch.sub(g_bar, bar.theta, alpha=lr) if self.nesterov else g_bar, buffer_bar

        bars = cotangent.params
        given = (bars, cotangent.moments["momentum"]) if mu else (bars,)
        (gs, *buffers), _ = elementwise(formula, (), given, given)
        thetas = {name: torch.add(bars[name], g_bar, alpha=decay) for name, g_bar in gs.items()} if decay else bars
        pulled = Cotangent(thetas, {"momentum": buffers[0]} if mu else {})
        slope = decay * inner(bars, params)  # of θ' along −lr: of g + wd·θ, and of the moments
        if grads is not None:
            slope = slope + inner(bars, grads)
        if mu:
            slope = slope * (1 + mu if self.nesterov else 1)
            slope = slope + inner(bars, moments["momentum"]) * (mu * mu if self.nesterov else mu)
        updated = Updated(pulled, gs, {"lr": -slope, "weight_decay": inner(gs, params)})
        if grads is None:  # ḡ = −lr·λ, so that −⟨λ, g⟩ = ⟨ḡ, g⟩/lr
            assert not self.needs_gradient(step), "a gradient is left out only where it is not needed"
            return updated._replace(slope=1 / lr)
        return updated

    def needs_gradient(self, step: int) -> bool:
        return self.momentum > 0 or rate(self.lr, step) == 0

    def recovered(self, params: Params, moments: Moments, after: Moments) -> Params | None:
        if self.spared:
            return spared.recovered(self, params, moments, after)
        if not holds_gradient(moments.get("momentum", {}), self.momentum):
            return None
        grads = {}
        for name, buffer in after["momentum"].items():
            g = torch.sub(buffer, moments["momentum"][name], alpha=self.momentum)
            grads[name] = g.sub_(params[name], alpha=self.weight_decay) if self.weight_decay else g
        return grads

    def preconditioner(self, params: Params, moments: Moments, grads: Params, step: int) -> Params | None:
        return None
