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

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from retrograd.core import tree
from retrograd.core.draws import random_draws
from retrograd.core.engine.heads import Head, by_leaf, local
from retrograd.core.engine.passes import Eager, Link, Passes, X, adjoint_jvp, vjp, vjp_along
from retrograd.core.optim import Params
from retrograd.core.residuals import Residual
from retrograd.core.step import Batch, Pull, coefficients

__all__ = ["Blocks", "Chain", "Micro", "Read", "Sums", "micros"]


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

    @property
    def uses(self) -> Counter[str]:
        """At how many places each leaf is used."""
        places = [self.embed.names, *(link.names for link in self.links), self.head.names]
        return Counter(leaf for names in places for leaf in set(names.values()))

    @property
    def passed(self) -> list[list[str]]:
        """The leaves of each place that has some, in the order that `first` and `second` ask for them."""
        forward: list[Link | Head] = [self.embed, *self.links, self.head]
        return [names for place in (*forward, *forward[-2::-1]) if (names := _leaves(place))]


class Micro(NamedTuple):
    """A micro-batch that goes along a chain. factors: its losses' coefficients; draws: its random numbers."""

    inputs: Any
    factors: Tensor
    draws: _Draws


@runtime_checkable
class Sums(Protocol):
    """Where gradients go, leaf by leaf, as they are found; each leaf's come in the order of its places from the last.

    At a place all micro-batches come in order before `done`, and `done` comes once for every place, wherever there is
    nothing to add too.
    """

    def add(self, part: int, terms: Params) -> None:
        """What a micro-batch gives at this place."""

    def done(self, names: Sequence[str]) -> None:
        """No more comes at this place, which has these leaves."""


Read = Callable[[Iterable[str]], Params]
"""Leaves by name. They are asked for place by place, in one order, and let go of before the next place asks."""


@dataclass(frozen=True, eq=False)
class Blocks:
    """Gradient half of a chain, one link at a time: less live memory than `Double`, for more arithmetic.

    In units of a forward pass: gradient 4; pullback 3 + 9, with K queries (1 + 2K) + (3 + 6K), and another gradient
    where ḡ is a function of it. Compiled passes keep products, and take 3 and 8K.

    `first` and `second` go over all micro-batches that they are given at one place before they come to the next, and
    ask for no leaf but those of the place: for parameters that have to be fetched. `gradient` and `pullback`, whose
    parameters are at hand, give them one micro-batch at a time, and hold the states of one.
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
        for part in micros(batches, weights, seed):
            micro_grads = _MicroSums()
            value, left = self.first(_at_hand(params), [part], micro_grads)
            loss = loss.to(value) + value
            _add(sums, micro_grads)
            residual += left
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
        scores, queries = [], len(next(iter(bars.values())))
        read = _at_hand(params), _at_hand(bars)
        for place, (part, batch) in enumerate(zip(micros(batches, weights, seed), batches)):
            products = _MicroSums()
            left = [None] if residual is None else residual[place : place + 1]
            (slopes,) = self.second(*read, queries, [part], products, left)
            _add(curvature, products)
            scores.append(slopes * batch.scale)
        zeros = {name: torch.zeros_like(bar) for name, bar in bars.items() if name not in curvature}
        return {name: (zeros if name in zeros else curvature)[name] for name in params}, torch.cat(scores, dim=1)

    def repeats(self, batches: Sequence[Batch]) -> bool:
        return True

    def first(self, read: Read, parts: Sequence[Micro], sums: Sums) -> tuple[Tensor, list[Residual | None]]:
        """Loss and gradient of micro-batches: states forward, then back with one link's graph at a time.

        Args:
            read: Parameters.
            parts: None where only leaves are to be fetched and sums taken, in step with others who have some.
            sums: Gets the gradient.
        Returns:
            Σ loss [], and what each micro-batch leaves for `second`.
        """
        links = list(enumerate(self.chain.links, start=1))
        with self._scope(parts):
            ways = self._entered(read, parts)
            for place, link in links:
                self._forward(place, link, read, ways)
            loss, residual = self._turned(read, ways, sums)
            for place, link in reversed(links):
                self._back(place, link, read, ways, sums)
            self._left(read, ways, sums)
        return loss, residual

    def second(
        self,
        read: Read,
        along: Read,
        queries: int,
        parts: Sequence[Micro],
        sums: Sums,
        residual: Sequence[Residual | None],
    ) -> list[Tensor]:
        """Tangents of the losses [K, *factors.shape] of micro-batches: tangents forward, then back.

        Args:
            read, along: Parameters, and ḡ [K, *shape].
            parts: As for `first`.
            sums: Gets H ḡ [K, *shape].
            residual: What `first` left of each micro-batch.
        """
        links = list(enumerate(self.chain.links, start=1))
        with self._scope(parts):
            ways = self._entered_along(read, along, queries, parts)
            for place, link in links:
                self._forward_along(place, link, read, along, ways)
            slopes = self._turned_along(read, along, ways, sums, residual)
            for place, link in reversed(links):
                self._back_along(place, link, read, along, ways, sums)
            self._left_along(read, along, ways, sums)
        return slopes

    # One place each, so that its leaves are let go of at the end.

    def _entered(self, read: Read, parts: Sequence[Micro]) -> list[_Way]:
        embed = self.chain.embed
        point, ways = _point(embed, read), []
        for micro in parts:
            with torch.no_grad(), micro.draws(0):
                x, contexts = embed.call(point, micro.inputs, None)
            ways.append(_Way(micro, contexts, x))
        return ways

    @torch.no_grad()
    def _forward(self, place: int, link: Link, read: Read, ways: list[_Way]) -> None:
        point = _point(link, read)
        for way in ways:
            with way.micro.draws(place):
                x, kept = self.passes.forward(link, {**point, X: way.x}, way.contexts[place - 1])
            way.passed(kept)
            way.x = x

    def _turned(self, read: Read, ways: list[_Way], sums: Sums) -> tuple[Tensor, list[Residual | None]]:
        """At the head."""
        head, loss, residual = self.chain.head, torch.zeros(()), list[Residual | None]()
        point = read(_leaves(head))
        for part, way in enumerate(ways):
            with way.micro.draws(len(self.chain.links) + 1):
                at_head = head.first(point, way.x, way.micro.inputs, way.micro.factors)
            loss = loss.to(at_head.loss) + at_head.loss
            residual.append(Residual.of(at_head.x, at_head.kept))
            way.bar = at_head.bar
            sums.add(part, at_head.grads)
        sums.done(_leaves(head))
        return loss, residual

    def _back(self, place: int, link: Link, read: Read, ways: list[_Way], sums: Sums) -> None:
        point = _point(link, read)
        for part, way in enumerate(ways):
            x, _, kept = way.path.pop()
            with way.micro.draws(place):
                pulled = self.passes.vjp(link, {**point, X: x}, way.contexts[place - 1], way.bar, kept)
            way.bar = pulled[X]
            sums.add(part, by_leaf(link.names, pulled))
        sums.done(_leaves(link))

    def _left(self, read: Read, ways: list[_Way], sums: Sums) -> None:
        """At the embedding."""
        embed = self.chain.embed
        if not embed.names:
            return
        point = _point(embed, read)
        for part, way in enumerate(ways):
            sums.add(part, by_leaf(embed.names, vjp(_start(embed, way.micro), point, way.bar)))
        sums.done(_leaves(embed))

    @torch.no_grad()
    def _entered_along(self, read: Read, along: Read, queries: int, parts: Sequence[Micro]) -> list[_Way]:
        embed, ways = self.chain.embed, []
        point, bars = _point(embed, read), _point(embed, along)
        for micro in parts:
            with micro.draws(0):
                x, contexts = embed.call(point, micro.inputs, None)
            dots, start = x.new_zeros((queries, *x.shape)), _start(embed, micro)
            if embed.names and self.chain.lookup:
                dots = tree.stacked([start({name: bar[k] for name, bar in bars.items()}) for k in range(queries)])
            elif embed.names:
                x, dots = adjoint_jvp(start, point, bars)
            ways.append(_Way(micro, contexts, x, dots))
        return ways

    @torch.no_grad()
    def _forward_along(self, place: int, link: Link, read: Read, along: Read, ways: list[_Way]) -> None:
        point, bars = _point(link, read), _point(link, along)
        for way in ways:
            here, there = {**point, X: way.x}, {**bars, X: way.dots}
            with way.micro.draws(place):
                x, dots, kept = self.passes.jvp(link, here, way.contexts[place - 1], there)
            way.passed(kept)
            way.x, way.dots = x, dots

    def _turned_along(
        self, read: Read, along: Read, ways: list[_Way], sums: Sums, residual: Sequence[Residual | None]
    ) -> list[Tensor]:
        head, slopes = self.chain.head, []
        point, bars = read(_leaves(head)), along(_leaves(head))
        for part, (way, left) in enumerate(zip(ways, residual, strict=True)):
            kept, micro = None if left is None else left.at(way.x), way.micro
            with micro.draws(len(self.chain.links) + 1):
                way.bar, way.dots, tangents, slope = head.second(
                    point, way.x, micro.inputs, micro.factors, kept, bars, way.dots
                )
            slopes.append(slope)
            sums.add(part, tangents)
        sums.done(_leaves(head))
        return slopes

    def _back_along(self, place: int, link: Link, read: Read, along: Read, ways: list[_Way], sums: Sums) -> None:
        point, bars = _point(link, read), _point(link, along)
        for part, way in enumerate(ways):
            x, dots, kept = way.path.pop()
            here, there, context = {**point, X: x}, {**bars, X: dots}, way.contexts[place - 1]
            with way.micro.draws(place):
                way.bar, tangents = self.passes.vjp_along(link, here, context, there, way.bar, way.dots, kept)
            way.dots = tangents[X]
            sums.add(part, by_leaf(link.names, tangents))
        sums.done(_leaves(link))

    def _left_along(self, read: Read, along: Read, ways: list[_Way], sums: Sums) -> None:
        embed = self.chain.embed
        if not embed.names:
            return
        point, bars = _point(embed, read), _point(embed, along)
        for part, way in enumerate(ways):
            start = _start(embed, way.micro)
            if self.chain.lookup:
                each = [vjp(start, point, dots) for dots in way.dots]
                tangents = {name: tree.stacked([pulled[name] for pulled in each]) for name in point}
            else:
                _, tangents = vjp_along(start, point, bars, way.bar, way.dots)
            sums.add(part, by_leaf(embed.names, tangents))
        sums.done(_leaves(embed))

    def _scope(self, parts: Sequence[Micro]) -> AbstractContextManager[Any]:
        return self.chain.scope(parts[0].factors.dtype) if parts else nullcontext()


def micros(batches: Sequence[Batch], weights: Tensor, seed: str | None) -> list[Micro]:
    """Micro-batches as they go along a chain."""
    return [Micro(batch.inputs, coefficients(batch, weights), _Draws(seed, part)) for part, batch in enumerate(batches)]


class _MicroSums(dict[str, Tensor]):
    """Sums of one micro-batch, held until all of them are there."""

    def add(self, part: int, terms: Params) -> None:
        _add(self, terms)

    def done(self, names: Sequence[str]) -> None:
        """They stay."""


@dataclass
class _Way:
    """A micro-batch on its way. x, dots: the state it is at, and its tangents [K, …]; on the way back `bar` is the
    cotangent of x and `dots` that one's tangents. path: what it has passed, and what links have kept."""

    micro: Micro
    contexts: Sequence[Any]
    x: Any
    dots: Any = None
    bar: Any = None
    path: list[tuple[Any, Any, Any]] = field(default_factory=list)

    def passed(self, kept: Any) -> None:
        self.path.append((self.x, self.dots, kept))


class _Draws(NamedTuple):
    """Random numbers as a function of (seed, step, micro-batch, link): every pass over a link draws the same."""

    seed: str | None
    part: int

    def __call__(self, place: int) -> AbstractContextManager[None]:
        return random_draws(None if self.seed is None else f"{self.seed}/{self.part}", place)


def _start(embed: Link, part: Micro) -> Callable[[Params], Tensor]:
    def call(point: Params) -> Tensor:
        with part.draws(0):
            return embed.call(point, part.inputs, None)[0]

    return call


def _at_hand(params: Params) -> Read:
    return lambda names: {name: params[name] for name in names}


def _leaves(place: Link | Head) -> list[str]:
    """The leaves of a place, each once."""
    return list(dict.fromkeys(place.names.values()))


def _point(link: Link, read: Read) -> Params:
    return local(link.names, read(_leaves(link)))


def _add(sums: Params, more: Params) -> None:
    for name, x in more.items():  # never in place: gradients may share memory
        sums[name] = sums[name] + x if name in sums else x
