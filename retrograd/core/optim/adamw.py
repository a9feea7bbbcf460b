"""Adam with decoupled weight decay: Loshchilov & Hutter, arXiv:1711.05101."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from retrograd.core import memory
from retrograd.core.optim import spared
from retrograd.core.optim.elementwise import elementwise, is_traced
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

__all__ = ["AdamW"]


class _At(NamedTuple):
    """Where an update starts."""

    theta: Tensor
    m: Tensor
    v: Tensor
    g: Tensor


class _Bar(NamedTuple):
    """Cotangents of what it comes to, [K, *shape]."""

    theta: Tensor
    m: Tensor
    v: Tensor


@dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay and ε_root inside the root, t counted from 0:

        m' = β₁m + (1−β₁)g      v' = β₂v + (1−β₂)g²      m̂ = m'/(1−β₁^(t+1))      v̂ = v'/(1−β₂^(t+1))
        θ' = θ − lr·(m̂/(√(v̂ + ε_root) + ε) + wd·θ)

    ε_root > 0 makes the update smooth where a gradient is near 0; at ε_root = 0 the root's slope at 0 is defined as 0.
    Parameters named in `spared` do not decay.
    """

    lr: LearningRate
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    eps_root: float = 1e-8
    weight_decay: float = 0.0
    spared: tuple[str, ...] = field(default=(), metadata={"later": True})

    def __post_init__(self) -> None:
        check_nonnegative(lr=self.lr, weight_decay=self.weight_decay, eps=self.eps, eps_root=self.eps_root)
        check_fraction(beta1=self.beta1, beta2=self.beta2)
        if self.eps == 0 and self.eps_root == 0:
            raise ValueError("eps and eps_root are both 0: the first update of an unused parameter would be 0/0")

    def init(self, params: Params) -> Moments:
        return {"m": zeros(params), "v": zeros(params)}

    def update(self, params: Params, moments: Moments, grads: Params, step: int) -> tuple[Params, Moments]:
        if self.spared:
            return spared.update(self, params, moments, grads, step)
        lr, correction1, correction2 = self._rates(step)

        def formula(leaves: Sequence[Tensor], _: Sequence[Tensor]) -> tuple[Tensor, ...]:
            at = _At(*leaves)
            m = torch.lerp(at.m, at.g, 1 - self.beta1)
            v = torch.addcmul(at.v * self.beta2, at.g, at.g, value=1 - self.beta2)
            scale = _root(v / correction2 + self.eps_root if self.eps_root else v / correction2) + self.eps
            decayed = at.theta * (1 - lr * self.weight_decay) if self.weight_decay else at.theta
            return torch.addcdiv(decayed, m, scale, value=-lr / correction1), m, v

        state = (params, moments["m"], moments["v"])
        (new, ms, vs), _ = elementwise(formula, (*state, grads), (), state)
        return new, {"m": ms, "v": vs}

    def pullback(
        self, params: Params, moments: Moments, grads: Params | None, step: int, cotangent: Cotangent
    ) -> Updated:
        if self.spared:
            return spared.pullback(self, params, moments, grads, step, cotangent)
        assert grads is not None, "AdamW is not linear in the gradient"
        lr, correction1, correction2 = self._rates(step)

        def formula(leaves: Sequence[Tensor], bars: Sequence[Tensor]) -> tuple[Tensor, ...]:
            at, bar = _At(*leaves), _Bar(*bars)
            inverse, direction, slope = self._slopes(at, step)
            m_bar = torch.addcmul(bar.m, inverse, bar.theta, value=-lr / correction1)
            v_bar = torch.addcmul(bar.v, slope, bar.theta, value=0.5 * lr / (correction1 * correction2))
            g_bar = torch.addcmul(m_bar * (1 - self.beta1), at.g, v_bar, value=2 * (1 - self.beta2))
            moved = torch.mv(bar.theta.reshape(len(bar.theta), -1), direction.flatten()).double()
            return g_bar, m_bar * self.beta1, v_bar * self.beta2, moved

        bars = (cotangent.params, cotangent.moments["m"], cotangent.moments["v"])
        (gs, ms, vs), sums = elementwise(formula, (params, moments["m"], moments["v"], grads), bars, bars)
        kept = 1 - lr * self.weight_decay
        thetas = {name: bar * kept if self.weight_decay else bar for name, bar in cotangent.params.items()}
        decayed = inner(cotangent.params, params)
        (moved,) = sums or [decayed]  # 0 where Muon leaves it no parameters
        recipe = {"lr": -moved / correction1 - self.weight_decay * decayed, "weight_decay": -lr * decayed}
        return Updated(Cotangent(thetas, {"m": ms, "v": vs}), gs, recipe)

    def needs_gradient(self, step: int) -> bool:
        return True

    def recovered(self, params: Params, moments: Moments, after: Moments) -> Params | None:
        if not holds_gradient(after["m"], self.beta1):
            return None
        factor = 1 / (1 - self.beta1)
        return {
            name: torch.lerp(m, after["m"][name], factor, out=memory.empty_like(m)) for name, m in moments["m"].items()
        }

    def preconditioner(self, params: Params, moments: Moments, grads: Params, step: int) -> Params:
        return {n: self._rooted(v, grads[n], step).add_(self.eps).reciprocal_() for n, v in moments["v"].items()}

    def _rooted(self, v: Tensor, g: Tensor, step: int) -> Tensor:
        """√(v̂ + ε_root)."""
        correction2 = self._rates(step)[2]
        square = (v * (self.beta2 / correction2)).addcmul_(g, g, value=(1 - self.beta2) / correction2)
        return square.add_(self.eps_root).sqrt_()

    def _rates(self, step: int) -> tuple[float, float, float]:
        return rate(self.lr, step), 1 - self.beta1 ** (step + 1), 1 - self.beta2 ** (step + 1)

    def _slopes(self, at: _At, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """1/scale, m'/scale and m'/(scale²·root), elementwise; shared by all queries.

        With θ' = θ − (lr/c₁)·m'/scale, scale = root + ε and root = √(v'/c₂ + ε_root), they are ∂θ'/∂m', ∂θ'/∂lr and
        ∂θ'/∂v' up to the factors −lr/c₁, −1/c₁ and lr/(2c₁c₂).
        """
        root = self._rooted(at.v, at.g, step)
        inverse = torch.add(root, self.eps).reciprocal_()
        direction = torch.lerp(at.m, at.g, 1 - self.beta1).mul_(inverse)
        slope = torch.mul(direction, inverse).div_(root)
        if self.eps_root == 0:
            slope.masked_fill_(root == 0, 0.0)
        return inverse, direction, slope


def _root(x: Tensor) -> Tensor:
    """√x with slope 0 at 0: both `where` are needed, or autograd multiplies 0 by the infinite slope."""
    if not is_traced(x):
        return x.sqrt()
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1.0).sqrt(), 0.0)
