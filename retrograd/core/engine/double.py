"""The `double` engine: reverse over reverse, for any module and any loss.

The batch gradient is taken with its graph kept, then autograd runs once more over that graph for each query:

    (H ḡ_k, ∂⟨g, ḡ_k⟩/∂c) = grad(g, (θ, c), grad_outputs=ḡ_k)

c = w[index]·scale are the losses' coefficients; where the loss is linear in them the second part is ⟨∇loss_j, ḡ_k⟩.
With one micro-batch a gradient that ḡ is a function of falls out of the same graph; with several it is computed first.
Where an embedding's gradient is not its function's, H is the derivative of the gradient that training takes
(core/lookups).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.autograd import grad

from retrograd.core import lookups, tree
from retrograd.core.draws import random_draws
from retrograd.core.optim import Params
from retrograd.core.step import Batch, Objective, Pull, coefficients, is_linear

__all__ = ["Double", "Leaving"]


@runtime_checkable
class Leaving(Protocol):
    """An objective whose gradient leaves something for its pullback."""

    def leaving(self, params: Params, inputs: Any, factors: Tensor) -> tuple[Tensor, Any]:
        """The objective, and what it leaves."""

    def again(self, params: Params, inputs: Any, factors: Tensor, residual: Any) -> Tensor:
        """A scalar whose gradient has the pullback of the objective's; the gradient itself nobody looks at.

        `residual` is what `leaving` left at the same place, or None: no bit depends on which.
        """


@dataclass(frozen=True)
class Double:
    """Gradient half by double backward. `objective` must be twice differentiable: no flash or fused attention."""

    objective: Objective

    @property
    def linear(self) -> bool:
        return is_linear(self.objective)

    def gradient(
        self, params: Params, batches: Sequence[Batch], weights: Tensor, seed: str | None
    ) -> tuple[Tensor, Params, list[Any]]:
        """(Σ loss [], gradient) over the micro-batches, added in order, and what each of them leaves."""
        names, total = list(params), None
        sums: list[Tensor] = []
        residual: list[Any] = []
        for part, batch in enumerate(batches):
            leaves = _live(params)
            with torch.enable_grad(), random_draws(seed, part):
                given = (leaves, batch.inputs, coefficients(batch, weights))
                objective = self.objective
                loss, more = objective.leaving(*given) if isinstance(objective, Leaving) else (objective(*given), None)
            residual.append(more)
            grads = grad(loss, list(leaves.values()), materialize_grads=True)
            total = loss.detach() if total is None else total + loss.detach()
            sums = [a + b for a, b in zip(sums, grads)] if sums else list(grads)
        assert total is not None, "a step needs at least one batch"
        return total, dict(zip(names, sums)), residual

    def linearize(
        self, params: Params, batches: Sequence[Batch], weights: Tensor, seed: str | None
    ) -> tuple[Params, Pull]:
        """The gradient, and its pullback: of one micro-batch over the graph that gave it, which is held until then."""
        if len(batches) > 1:
            _, grads, residual = self.gradient(params, batches, weights, seed)
            return grads, partial(self.pullback, params, batches, weights, seed, residual=residual)
        graph = _Graph.of(self.objective, params, batches[0], weights, seed, 0)
        return {name: g.detach() for name, g in zip(graph.leaves, graph.grads)}, graph.pull

    def pullback(
        self,
        params: Params,
        batches: Sequence[Batch],
        weights: Tensor,
        seed: str | None,
        bars: Params,
        residual: Sequence[Any] | None = None,
    ) -> tuple[Params, Tensor]:
        """(H ḡ [K, *shape], scores [K, B(, L)])."""
        curvature: Params = {}
        scores = []
        for part, batch in enumerate(batches):
            objective = self.objective
            if isinstance(objective, Leaving):
                objective = partial(objective.again, residual=None if residual is None else residual[part])
            products, slopes = _Graph.of(objective, params, batch, weights, seed, part).pull(bars)
            curvature = {n: curvature[n] + products[n] for n in products} if curvature else products
            scores.append(slopes)
        return curvature, torch.cat(scores, dim=1)

    def tangent(
        self, params: Params, batches: Sequence[Batch], weights: Tensor, direction: Tensor, seed: str | None
    ) -> Params:
        """ġ = ∂g/∂w · direction, the gradient's tangent along a direction of the data weights.

        ∇_θ ⟨∂ℓ/∂c, ċ⟩ with ċ = direction[index]·scale, for mixed derivatives do not mind their order.
        """
        sums: list[Tensor] = []
        for part, batch in enumerate(batches):
            leaves = _live(params)
            factors = coefficients(batch, weights).requires_grad_()
            with torch.enable_grad(), random_draws(seed, part):
                slopes = grad(self.objective(leaves, batch.inputs, factors), factors, create_graph=True)[0]
                along = torch.sum(slopes * coefficients(batch, direction))
            tangents = grad(along, list(leaves.values()), materialize_grads=True)
            sums = [a + b for a, b in zip(sums, tangents)] if sums else list(tangents)
        return dict(zip(params, sums))

    def repeats(self, batches: Sequence[Batch]) -> bool:
        """Of one micro-batch the gradient falls out of the graph for the second backward."""
        return len(batches) > 1


def _live(params: Params) -> Params:
    return {name: theta.detach().requires_grad_() for name, theta in params.items()}


class _Graph(NamedTuple):
    """A micro-batch's gradient with its graph."""

    leaves: Params
    factors: Tensor
    grads: Sequence[Tensor]
    scale: Tensor
    passing: lookups.Passing

    @classmethod
    def of(
        cls, objective: Objective, params: Params, batch: Batch, weights: Tensor, seed: str | None, part: int
    ) -> _Graph:
        leaves = _live(params)
        factors = coefficients(batch, weights).requires_grad_()
        with torch.enable_grad(), random_draws(seed, part), lookups.twice() as passing:
            loss = objective(leaves, batch.inputs, factors)
            grads = grad(loss, list(leaves.values()), create_graph=True, materialize_grads=True)
        return cls(leaves, factors, grads, batch.scale, passing)

    def pull(self, bars: Params) -> tuple[Params, Tensor]:
        """The second backward, once for each query over the one graph, which is gone then."""
        self.passing.turn()
        live = [(g, bars[name]) for name, g in zip(self.leaves, self.grads) if g.requires_grad]
        queries = next(iter(bars.values())).shape[0]
        pulled = []
        for k in range(queries):
            outputs, seeds = [g for g, _ in live], [bar[k] for _, bar in live]
            wanted = [*self.leaves.values(), self.factors]
            pulled.append(grad(outputs, wanted, seeds, retain_graph=k + 1 < queries, materialize_grads=True))
        *products, slopes = [tree.stacked(group) for group in zip(*pulled)]
        return dict(zip(self.leaves, products)), slopes * self.scale
