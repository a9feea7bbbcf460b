"""Optimizers that are not ours: any (init, update) pair, its pullback by autograd."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from retrograd.core import tree
from retrograd.core.optim.protocol import Cotangent, Moments, Params, Updated

__all__ = ["Pair", "autograd_pullback"]


@dataclass(frozen=True)
class Pair:
    """Any (init, update) pair in the convention of optax and torchopt, differentiated by autograd.

    `update(grads, state, params=params) -> (updates, state)`, and θ' = θ + updates. It must be pure: torchopt's
    in-place default is switched off here. Roots have slope 0 at 0, as AdamW's at ε_root = 0: by autograd's infinite one
    an entry whose gradient has always been 0, such as a token's that never came, would get 0·∞.
    """

    pair: Any

    def init(self, params: Params) -> Moments:
        return self.pair.init(params)

    def update(self, params: Params, moments: Moments, grads: Params, step: int) -> tuple[Params, Moments]:
        inplace = {"inplace": False} if "inplace" in _parameters(self.pair.update) else {}
        with _FlatRoots():
            updates, moments = self.pair.update(grads, moments, params=params, **inplace)
        return {name: theta + updates[name] for name, theta in params.items()}, moments

    def pullback(
        self, params: Params, moments: Moments, grads: Params | None, step: int, cotangent: Cotangent
    ) -> Updated:
        assert grads is not None, "asked for by needs_gradient"

        def update(params: Params, moments: Moments, grads: Params) -> tuple[Params, Moments]:
            return self.update(params, moments, grads, step)

        thetas, moment_bars, gs = autograd_pullback(update, (params, moments, grads), tuple(cotangent))
        return Updated(Cotangent(thetas, moment_bars), gs, {})

    def needs_gradient(self, step: int) -> bool:
        return True

    def recovered(self, params: Params, moments: Moments, after: Moments) -> Params | None:
        return None

    def preconditioner(self, params: Params, moments: Moments, grads: Params, step: int) -> Params | None:
        return None


class _FlatRoots(TorchFunctionMode):
    """√ with slope 0 at 0; no value is another."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function not in (torch.sqrt, Tensor.sqrt, Tensor.sqrt_) or kwargs:
            return function(*args, **(kwargs or {}))
        (x,) = args
        empty = x == 0
        root = torch.where(empty, x.detach(), torch.where(empty, 1.0, x).sqrt())
        return x.copy_(root) if function is Tensor.sqrt_ else root


def autograd_pullback(function: Callable[..., Any], inputs: tuple[Any, ...], bars: tuple[Any, ...]) -> tuple[Any, ...]:
    """Cotangents of `inputs`, [K, *shape], from those of the outputs of `function`; one graph for all K.

    Integer tensors (a step count) have no slope: their cotangent is zero.
    """
    live = tree.map(lambda x: x.detach().requires_grad_() if x.is_floating_point() else x, inputs)
    with torch.enable_grad():
        outputs = tree.leaves(function(*live))
    wanted = [x for x in tree.leaves(live) if x.requires_grad]
    pairs = [(out, bar) for out, bar in zip(outputs, tree.leaves(bars), strict=True) if out.requires_grad]
    queries = tree.leaves(bars)[0].shape[0]
    pulled = [
        torch.autograd.grad(
            [out for out, _ in pairs],
            wanted,
            [bar[k] for _, bar in pairs],
            retain_graph=k + 1 < queries,
            materialize_grads=True,
        )
        for k in range(queries)
    ]
    stacked = iter([torch.stack(group) for group in zip(*pulled)])

    def place(x: Tensor) -> Tensor:
        return next(stacked) if x.requires_grad else torch.zeros((queries, *x.shape), device=x.device)

    return tree.map(place, live)


def _parameters(function: Callable[..., Any]) -> set[str]:
    return set(inspect.signature(function).parameters)
