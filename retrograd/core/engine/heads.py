"""Ends of a chain: from the last state to the loss, its gradient and the tangents of that."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.autograd import grad

from retrograd.core.engine.passes import X, live, pullbacks, without
from retrograd.core.optim import Params

__all__ = ["Found", "Head", "PlainHead", "by_leaf", "local"]


class Found(NamedTuple):
    """What a head finds at x: the loss, the cotangent of x, the gradient by leaf, and what `second` can use again."""

    x: Tensor
    loss: Tensor
    bar: Tensor
    grads: Params
    kept: Any


@runtime_checkable
class Head(Protocol):
    """The end of the chain: (params, x, inputs, coefficients) → Σ_j c_j · loss_j. It is given its own leaves only."""

    @property
    def names(self) -> Mapping[str, str]:
        """The leaf behind each parameter, as for a `Link`."""

    def first(self, params: Params, x: Tensor, inputs: Any, factors: Tensor) -> Found:
        """Loss and gradient."""

    def second(
        self, params: Params, x: Tensor, inputs: Any, factors: Tensor, kept: Any, bars: Params, dots: Tensor
    ) -> tuple[Tensor, Tensor, Params, Tensor]:
        """Along (bars, dots), [K, …]: the cotangent of x, its tangents, those of the gradient by leaf and of loss_j.

        `kept` is what `first` kept at the same params and x, or None: nothing may depend on which.
        """


@dataclass(frozen=True, eq=False)
class PlainHead:
    """A head given as a function of (parameters, x, inputs, coefficients), twice differentiable by reverse mode."""

    names: Mapping[str, str]
    call: Callable[[Params, Tensor, Any, Tensor], Tensor]

    def first(self, params: Params, x: Tensor, inputs: Any, factors: Tensor) -> Found:
        point = live({**local(self.names, params), X: x})
        with torch.enable_grad():
            loss = self.call(without(point), point[X], inputs, factors)
        grads = dict(zip(point, grad(loss, list(point.values()), materialize_grads=True)))
        return Found(x, loss.detach(), grads[X], by_leaf(self.names, grads), None)

    def second(
        self, params: Params, x: Tensor, inputs: Any, factors: Tensor, kept: Any, bars: Params, dots: Tensor
    ) -> tuple[Tensor, Tensor, Params, Tensor]:
        point = live({**local(self.names, params), X: x})
        factors = factors.detach().requires_grad_()
        with torch.enable_grad():
            loss = self.call(without(point), point[X], inputs, factors)
            first = grad(loss, list(point.values()), create_graph=True, materialize_grads=True)
        seeds = {**local(self.names, bars), X: dots}
        wanted = [*point.values(), factors]
        *tangents, slopes = pullbacks(list(first), [seeds[name] for name in point], wanted)
        named = dict(zip(point, tangents))
        return dict(zip(point, first))[X].detach(), named[X], by_leaf(self.names, named), slopes


def local(names: Mapping[str, str], leaves: Params) -> Params:
    """Parameters by their names in a function, of leaves."""
    return {name: leaves[leaf] for name, leaf in names.items()}


def by_leaf(names: Mapping[str, str], terms: Params) -> Params:
    """Sums over the parameters that share a leaf."""
    sums: Params = {}
    for name, leaf in names.items():
        sums[leaf] = sums[leaf] + terms[name] if leaf in sums else terms[name]
    return sums
