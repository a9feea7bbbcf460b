"""The `blocks` engine: the gradient half of a chain of functions, one function at a time.

A model as a chain x₀ = embed(θ), x_{i+1} = f_i(θ_i, x_i), loss = head(θ, x_n; c). With ḡ the tangent of θ, dots for
tangents along it, bars for cotangents of the loss:

    gradient        x_i forward without a graph; then from the last to the first, each f_i run again with its graph:
                    (θ̄_i, x̄_i) = vjp(f_i)(x̄_{i+1})
    tangent sweep   (x_{i+1}, ẋ_{i+1}) = jvp(f_i)(θ_i, x_i; ḡ_i, ẋ_i)                       forward
    back            (θ̄̇_i, x̄̇_i) = ∇²⟨x̄_{i+1}, f_i⟩ (ḡ_i, ẋ_i) + vjp(f_i)(x̄̇_{i+1})         H ḡ is Σ θ̄̇_i

and the head gives ⟨∇ce_j, ḡ⟩, the tangent of each loss. What lives at once is x_i and ẋ_i for all i and one function's
graph, where `double` holds the graph of the whole model twice over.

The last line is the tangent of the vjp; how it is computed is with the passes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.autograd import grad

from retrograd.core import tree
from retrograd.core.draws import random_draws
from retrograd.core.engine.passes import Eager, Link, Passes, X, adjoint_jvp, live, pullbacks, vjp, vjp_along, without
from retrograd.core.optim import Params
from retrograd.core.residuals import Residual
from retrograd.core.step import Batch, Pull, coefficients

__all__ = ["Blocks", "Chain", "Found", "Head", "PlainHead"]


class Found(NamedTuple):
    """What a head finds at x: the loss, the cotangent of x, the gradient by leaf, and what `second` can use again."""

    x: Tensor
    loss: Tensor
    bar: Tensor
    grads: Params
    kept: Any


@runtime_checkable
class Head(Protocol):
    """The end of the chain: (params, x, inputs, coefficients) → Σ_j c_j · loss_j."""

    def first(self, params: Params, x: Tensor, inputs: Any, factors: Tensor) -> Found:
        """Loss and gradient."""

    def second(
        self, params: Params, x: Tensor, inputs: Any, factors: Tensor, kept: Any, bars: Params, dots: Tensor
    ) -> tuple[Tensor, Tensor, Params, Tensor]:
        """Along (bars, dots), [K, …]: the cotangent of x, its tangents, those of the gradient by leaf and of loss_j.

        `kept` is what `first` kept at the same params and x, or None: nothing may depend on which.
        """


@dataclass(frozen=True, eq=False)
class Chain:
    """A model as a chain.

    embed: its `call` is (parameters, inputs, None) → (x, one context for each link); the contexts must not depend on
        the parameters.
    lookup: x is linear in embed's parameters and its vjp the transpose of that map, as for a table of tokens without a
        padding token: it is its own tangent map and has no curvature.
    scope: coefficient dtype → the context manager in which all of it runs.
    """

    embed: Link
    links: Sequence[Link]
    head: Head
    scope: Callable[[torch.dtype], AbstractContextManager[Any]]
    lookup: bool = False


@dataclass(frozen=True, eq=False)
class PlainHead:
    """A head given as a function of (parameters, x, inputs, coefficients), twice differentiable by reverse mode."""

    names: Mapping[str, str]
    call: Callable[[Params, Tensor, Any, Tensor], Tensor]

    def first(self, params: Params, x: Tensor, inputs: Any, factors: Tensor) -> Found:
        point = live({**_local(self.names, params), X: x})
        with torch.enable_grad():
            loss = self.call(without(point), point[X], inputs, factors)
        found = dict(zip(point, grad(loss, list(point.values()), materialize_grads=True)))
        return Found(x, loss.detach(), found[X], _by_leaf(self.names, found), None)

    def second(
        self, params: Params, x: Tensor, inputs: Any, factors: Tensor, kept: Any, bars: Params, dots: Tensor
    ) -> tuple[Tensor, Tensor, Params, Tensor]:
        point = live({**_local(self.names, params), X: x})
        factors = factors.detach().requires_grad_()
        with torch.enable_grad():
            loss = self.call(without(point), point[X], inputs, factors)
            first = grad(loss, list(point.values()), create_graph=True, materialize_grads=True)
        seeds = {**_local(self.names, bars), X: dots}
        wanted = [*point.values(), factors]
        *found, slopes = pullbacks(list(first), [seeds[name] for name in point], wanted)
        named = dict(zip(point, found))
        return dict(zip(point, first))[X].detach(), named[X], _by_leaf(self.names, named), slopes


@dataclass(frozen=True, eq=False)
class Blocks:
    """Gradient half of a chain, one link at a time: less live memory than `Double`, for more arithmetic.

    In units of a forward pass: gradient 4; pullback 3 + 9, with K queries (1 + 2K) + (3 + 6K), and another gradient
    where ḡ is a function of it. Compiled passes keep products, and take 3 and 8K.
    """

    chain: Chain
    passes: Passes = field(default_factory=Eager)
    linear: ClassVar[bool] = True  # a head is

    def gradient(
        self, params: Params, batches: Sequence[Batch], weights: Tensor, seed: str | None
    ) -> tuple[Tensor, Params, list[Residual | None]]:
        """(Σ loss [], gradient) over the micro-batches, added in order, and what each of them leaves."""
        assert batches, "a step needs at least one batch"
        loss, sums, residual = torch.zeros(()), dict[str, Tensor](), []
        for part, batch in enumerate(batches):
            found = self._first(params, batch, coefficients(batch, weights), _Draws(seed, part))
            loss = loss.to(found.loss) + found.loss
            _add(sums, found.grads)
            residual.append(Residual.of(found.x, found.kept))
        grads = {name: sums[name] if name in sums else torch.zeros_like(theta) for name, theta in params.items()}
        return loss, grads, residual

    def linearize(
        self, params: Params, batches: Sequence[Batch], weights: Tensor, seed: str | None
    ) -> tuple[Params, Pull]:
        """The gradient, and its pullback."""
        _, grads, residual = self.gradient(params, batches, weights, seed)
        return grads, partial(self.pullback, params, batches, weights, seed, residual=residual)

    def pullback(
        self,
        params: Params,
        batches: Sequence[Batch],
        weights: Tensor,
        seed: str | None,
        bars: Params,
        residual: Sequence[Residual | None] | None = None,
    ) -> tuple[Params, Tensor]:
        """(H ḡ [K, *shape], scores [K, B(, L)])."""
        curvature: Params = {}
        scores = []
        for part, batch in enumerate(batches):
            factors = coefficients(batch, weights)
            here = None if residual is None else residual[part]
            products, slopes = self._second(params, batch, factors, _Draws(seed, part), here, bars)
            _add(curvature, products)
            scores.append(slopes * batch.scale)
        zeros = {name: torch.zeros_like(bar) for name, bar in bars.items() if name not in curvature}
        return {name: (zeros if name in zeros else curvature)[name] for name in params}, torch.cat(scores, dim=1)

    def repeats(self, batches: Sequence[Batch]) -> bool:
        return True

    def _first(self, params: Params, batch: Batch, factors: Tensor, draws: _Draws) -> Found:
        """Loss and gradient: block inputs forward, then back with one link's graph at a time."""
        embed, links, head = self.chain.embed, self.chain.links, self.chain.head
        with self.chain.scope(factors.dtype):
            with torch.no_grad(), draws(0):
                x, contexts = embed.call(_local(embed.names, params), batch.inputs, None)
            xs, kept = [x], []
            for place, (link, context) in enumerate(zip(links, contexts, strict=True), start=1):
                with torch.no_grad(), draws(place):
                    x, more = self.passes.forward(link, {**_local(link.names, params), X: xs[-1]}, context)
                xs.append(x)
                kept.append(more)
            with draws(len(xs)):
                found = head.first(params, xs.pop(), batch.inputs, factors)
            bar, grads = found.bar, dict(found.grads)
            for place in range(len(links), 0, -1):
                link, x = links[place - 1], xs.pop()
                point = {**_local(link.names, params), X: x}
                with draws(place):
                    pulled = self.passes.vjp(link, point, contexts[place - 1], bar, kept.pop())
                bar = pulled[X]
                _add(grads, _by_leaf(link.names, pulled))
            if embed.names:
                pulled = vjp(_start(embed, batch.inputs, draws), _local(embed.names, params), bar)
                _add(grads, _by_leaf(embed.names, pulled))
        return found._replace(bar=bar, grads=grads)

    def _second(
        self, params: Params, batch: Batch, factors: Tensor, draws: _Draws, residual: Residual | None, bars: Params
    ) -> tuple[Params, Tensor]:
        """(H ḡ by leaf, tangents of the losses): tangents forward, then back."""
        embed, links, head = self.chain.embed, self.chain.links, self.chain.head
        with self.chain.scope(factors.dtype):
            path, contexts = self._tangents(params, batch.inputs, draws, bars)
            x, dots, _ = path.pop()
            kept = None if residual is None else residual.at(x)
            with draws(len(links) + 1):
                bar, bardots, curvature, slopes = head.second(params, x, batch.inputs, factors, kept, bars, dots)
            for place in range(len(links), 0, -1):
                link, (x, dots, more) = links[place - 1], path.pop()
                point, along = {**_local(link.names, params), X: x}, {**_local(link.names, bars), X: dots}
                with draws(place):
                    bar, found = self.passes.vjp_along(link, point, contexts[place - 1], along, bar, bardots, more)
                bardots = found[X]
                _add(curvature, _by_leaf(link.names, found))
            if embed.names:
                point, along = _local(embed.names, params), _local(embed.names, bars)
                start = _start(embed, batch.inputs, draws)
                if self.chain.lookup:
                    each = [vjp(start, point, one) for one in bardots]
                    found = {name: tree.stacked([pulled[name] for pulled in each]) for name in point}
                else:
                    _, found = vjp_along(start, point, along, bar, bardots)
                _add(curvature, _by_leaf(embed.names, found))
        return curvature, slopes

    def _tangents(
        self, params: Params, inputs: Any, draws: _Draws, bars: Params
    ) -> tuple[list[tuple[Tensor, Tensor, Any]], Sequence[Any]]:
        """(x_i, ẋ_i [K, …], what link i leaves to the way back) up to the head's x, and the contexts."""
        embed = self.chain.embed
        queries = len(next(iter(bars.values())))
        with torch.no_grad():
            with draws(0):
                x, contexts = embed.call(_local(embed.names, params), inputs, None)
            dots = x.new_zeros((queries, *x.shape))
            if embed.names:
                start, along = _start(embed, inputs, draws), _local(embed.names, bars)
                if self.chain.lookup:
                    dots = tree.stacked([start({n: bar[k] for n, bar in along.items()}) for k in range(queries)])
                else:
                    x, dots = adjoint_jvp(start, _local(embed.names, params), along)
            path = list[tuple[Tensor, Tensor, Any]]()
            for place, (link, context) in enumerate(zip(self.chain.links, contexts, strict=True), start=1):
                point, along = {**_local(link.names, params), X: x}, {**_local(link.names, bars), X: dots}
                with draws(place):
                    y, ydots, more = self.passes.jvp(link, point, context, along)
                path.append((x, dots, more))
                x, dots = y, ydots
        return [*path, (x, dots, None)], contexts


class _Draws(NamedTuple):
    """Random numbers as a function of (seed, step, micro-batch, link): every pass over a link draws the same."""

    seed: str | None
    part: int

    def __call__(self, place: int) -> AbstractContextManager[None]:
        return random_draws(None if self.seed is None else f"{self.seed}/{self.part}", place)


def _start(embed: Link, inputs: Any, draws: _Draws) -> Callable[[Params], Tensor]:
    def call(point: Params) -> Tensor:
        with draws(0):
            return embed.call(point, inputs, None)[0]

    return call


def _local(names: Mapping[str, str], leaves: Params) -> Params:
    return {local: leaves[leaf] for local, leaf in names.items()}


def _by_leaf(names: Mapping[str, str], found: Params) -> Params:
    """Sums over the parameters that share a leaf."""
    sums: Params = {}
    for local, leaf in names.items():
        sums[leaf] = sums[leaf] + found[local] if leaf in sums else found[local]
    return sums


def _add(sums: Params, more: Params) -> None:
    for name, x in more.items():  # never in place: gradients may share memory
        sums[name] = sums[name] + x if name in sums else x
