"""Adam with coupled weight decay: Kingma & Ba, arXiv:1412.6980, with the decay of torch.optim.Adam."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from retrograd.core.optim import spared
from retrograd.core.optim.adamw import AdamW
from retrograd.core.optim.elementwise import elementwise
from retrograd.core.optim.protocol import Cotangent, LearningRate, Moments, Params, Updated, check_nonnegative, inner

__all__ = ["Adam"]


@dataclass(frozen=True)
class Adam:
    """Adam whose weight decay is a part of the gradient, so that it goes through the moments:

        g̃ = g + wd·θ        (θ', m', v') as AdamW's without decay, of g̃

    With `weight_decay` 0 it is AdamW with 0.
    """

    lr: LearningRate
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    eps_root: float = 1e-8
    weight_decay: float = 0.0
    spared: tuple[str, ...] = field(default=(), metadata={"later": True})

    def __post_init__(self) -> None:
        check_nonnegative(weight_decay=self.weight_decay)
        self._plain()

    def init(self, params: Params) -> Moments:
        return self._plain().init(params)

    def update(self, params: Params, moments: Moments, grads: Params, step: int) -> tuple[Params, Moments]:
        if self.spared:
            return spared.update(self, params, moments, grads, step)
        return self._plain().update(params, moments, self._coupled(params, grads), step)

    def pullback(
        self, params: Params, moments: Moments, grads: Params | None, step: int, cotangent: Cotangent
    ) -> Updated:
        if self.spared:
            return spared.pullback(self, params, moments, grads, step, cotangent)
        assert grads is not None, "Adam is not linear in the gradient"
        plain = self._plain().pullback(params, moments, self._coupled(params, grads), step, cotangent)
        recipe = {"lr": plain.recipe["lr"], "weight_decay": inner(plain.bars, params)}
        if not self.weight_decay:
            return plain._replace(recipe=recipe)
        thetas = {
            name: torch.add(bar, plain.bars[name], alpha=self.weight_decay)
            for name, bar in plain.cotangent.params.items()
        }
        return plain._replace(cotangent=plain.cotangent._replace(params=thetas), recipe=recipe)

    def needs_gradient(self, step: int) -> bool:
        return True

    def recovered(self, params: Params, moments: Moments, after: Moments) -> Params | None:
        if self.spared:
            return spared.recovered(self, params, moments, after)
        coupled = self._plain().recovered(params, moments, after)
        if coupled is None or not self.weight_decay:
            return coupled
        return {name: g.sub_(params[name], alpha=self.weight_decay) for name, g in coupled.items()}

    def preconditioner(self, params: Params, moments: Moments, grads: Params, step: int) -> Params:
        if self.spared:
            return spared.preconditioner(self, params, moments, grads, step)
        return self._plain().preconditioner(params, moments, self._coupled(params, grads), step)

    def _plain(self) -> AdamW:
        return AdamW(self.lr, self.beta1, self.beta2, self.eps, self.eps_root)

    def _coupled(self, params: Params, grads: Params) -> Params:
        """g̃."""
        if not self.weight_decay:
            return grads

        def formula(leaves: list[Tensor], _: list[Tensor]) -> tuple[Tensor, ...]:
            theta, g = leaves
            return (torch.add(g, theta, alpha=self.weight_decay),)

        ((coupled,), _) = elementwise(formula, (params, grads), (), (grads,))  # type: ignore[arg-type]
        return coupled
