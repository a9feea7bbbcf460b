"""An engine whose steps are shared: the rows of every micro-batch, split into logical shards.

A run has S logical shards, as many as it was begun with processes. Shard s has the s-th part of the rows of every
micro-batch, and a step's loss, gradient and H ḡ are sums over shards in their order (`sums`), each of them the sum over
its parts of the micro-batches in theirs. Random numbers are drawn by (seed, step, shard, micro-batch). None of it says
which process takes a shard: rank r of W takes r, W + r, 2W + r, …, and any W that divides S gives the same bits.

The coefficients of a batch have the normaliser of the whole one in them, so that sums over parts are the objective.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from retrograd.core import tree
from retrograd.core.optim import Params
from retrograd.core.step import Batch, Engine, Pull
from retrograd.parallel.group import Group
from retrograd.parallel.sums import OrderedSum

__all__ = ["Noting", "Split", "cut"]


_ShardPull = Callable[[Any, Params], Tensor | None]  # (where H ḡ goes, ḡ) → scores


@runtime_checkable
class Noting(Protocol):
    """An objective of several terms that says what each came to."""

    def noted(self) -> dict[str, float]:
        """The terms by name, since it was asked last."""


@dataclass(frozen=True, eq=False)
class Split:
    """The gradient half, over logical shards. Rank 0 calls it, and the others `serve`.

    Args:
        engine: What takes the rows of a shard.
        shards: How many there are.
        group: The processes.
        unit: Rows that stay together.
    """

    engine: Engine
    shards: int
    group: Group
    unit: int = 1
    _held: list[tuple[int, _ShardPull]] = field(default_factory=list)  # of a gradient with its graph, by shard
    _terms: dict[str, float] = field(default_factory=dict)

    @property
    def linear(self) -> bool:
        return self.engine.linear

    def noted(self) -> dict[str, float]:
        """The terms of the loss over all shards, since it was asked last; see `Noting`."""
        terms = dict(self._terms)
        self._terms.clear()
        return terms

    def gradient(
        self, params: Params, batches: Sequence[Batch], weights: Tensor, seed: str | None
    ) -> tuple[Tensor, Params, None]:
        """(Σ loss [], gradient) over shards; nothing is left for the pullback."""
        loss, grads = self._all("gradient", params, *_alone(batches, weights), seed)
        return loss, grads, None

    def linearize(
        self, params: Params, batches: Sequence[Batch], weights: Tensor, seed: str | None
    ) -> tuple[Params, Pull]:
        """The gradient, and its pullback: every process holds what its own shards leave until then."""
        own, ones = _alone(batches, weights)
        grads: Params = self._all("linearize", params, own, ones, seed)

        def pull(bars: Params) -> tuple[Params, Tensor]:
            return self._placed(own, self._all("pull", own, bars))

        return grads, pull

    def pullback(
        self, params: Params, batches: Sequence[Batch], weights: Tensor, seed: str | None, bars: Params,
        residual: None = None,
    ) -> tuple[Params, Tensor]:  # fmt: skip
        """(H ḡ [K, *shape], scores [K, B(, L)])."""
        own, ones = _alone(batches, weights)
        return self._placed(own, self._all("pullback", params, own, ones, seed, bars))

    def tangent(
        self, params: Params, batches: Sequence[Batch], weights: Tensor, direction: Tensor, seed: str | None
    ) -> Params:
        """ġ = ∂g/∂w · direction, as the engine has it (`Double.tangent`)."""
        own, ones = _alone(batches, weights)
        along = _alone(batches, direction)[1]
        dots: Params = self._all("tangent", params, own, ones, along, seed)
        return dots

    def repeats(self, batches: Sequence[Batch]) -> bool:
        parts = [mine for shard in range(self.shards) if (mine := cut(batches, shard, self.shards, self.unit))]
        return all(map(self.engine.repeats, parts))

    @property
    def doing(self) -> dict[str, Callable[..., Any]]:
        """What every process does for rank 0, by name."""
        return {
            "gradient": self._gradient, "linearize": self._linearize, "pull": self._pull, "pullback": self._pullback,
            "tangent": self._tangent,
        }  # fmt: skip

    def _all(self, name: str, *arguments: Any) -> Any:
        """Have every process do it, this one too."""
        self.group.call(name, *arguments)
        return self.doing[name](*arguments)

    def _sum(self, like: Params) -> Any:
        """For sums of tensors like these over shards."""
        return OrderedSum(self.group)

    def _own(self, batches: Sequence[Batch]) -> Iterator[tuple[int, list[Batch]]]:
        """This process's shards in order, with their parts of the micro-batches; none where there are few rows."""
        for shard in range(self.group.rank, self.shards, self.group.world):
            yield shard, cut(batches, shard, self.shards, self.unit)

    def _gradient(
        self, params: Params, batches: Sequence[Batch], weights: Tensor, seed: str | None
    ) -> tuple[Tensor, Params]:
        total, shares = self._sum(params), []
        self._note()  # of what was tried before
        for shard, mine in self._own(batches):
            loss = self._first(total, params, mine, weights, _seed(seed, shard))
            shares.append((shard, loss, self._note()))
        return self._told(shares), total.result()

    def _linearize(self, params: Params, batches: Sequence[Batch], weights: Tensor, seed: str | None) -> Params:
        total = self._sum(params)
        self._held.clear()
        for shard, mine in self._own(batches):
            self._held.append((shard, self._linear(total, params, mine, weights, _seed(seed, shard))))
        self._note()
        return total.result()

    def _pull(self, batches: Sequence[Batch], bars: Params) -> tuple[Params, list[Tensor]]:
        pulls = dict(self._held)
        self._held.clear()
        return self._pulled(batches, bars, lambda total, shard, mine: pulls.pop(shard)(total, bars))

    def _pullback(
        self, params: Params, batches: Sequence[Batch], weights: Tensor, seed: str | None, bars: Params
    ) -> tuple[Params, list[Tensor]]:
        def pull(total: Any, shard: int, mine: list[Batch]) -> Tensor | None:
            return self._second(total, params, mine, weights, _seed(seed, shard), bars)

        return self._pulled(batches, bars, pull)

    def _pulled(
        self, batches: Sequence[Batch], bars: Params, pull: Callable[[Any, int, list[Batch]], Tensor | None]
    ) -> tuple[Params, list[Tensor]]:
        """H ḡ, and the scores of this process's shards, sent to rank 0."""
        total, scores = self._sum(bars), []
        queries = len(next(iter(bars.values())))
        for shard, mine in self._own(batches):
            slopes = pull(total, shard, mine)
            none = batches[0].scale.new_zeros((queries, 0, *batches[0].scale.shape[1:]))
            scores.append(none if slopes is None else slopes)
        curvature = total.result()
        return curvature, self._scores(batches, scores)

    # What one shard adds to a sum. `mine` is empty where the shard has no rows.

    def _first(self, total: Any, params: Params, mine: list[Batch], weights: Tensor, seed: str | None) -> float:
        """The gradient; its loss."""
        if not mine:
            total.add({name: torch.zeros_like(theta) for name, theta in params.items()})
            return 0.0
        loss, grads, _ = self.engine.gradient(params, mine, weights, seed)
        total.add({name: grads[name] for name in params})
        return float(loss)

    def _linear(self, total: Any, params: Params, mine: list[Batch], weights: Tensor, seed: str | None) -> _ShardPull:
        """The gradient; its pullback."""
        if not mine:
            total.add({name: torch.zeros_like(theta) for name, theta in params.items()})
            return partial(_pulled_to, None)
        grads, pull = self.engine.linearize(params, mine, weights, seed)
        total.add({name: grads[name] for name in params})
        return partial(_pulled_to, pull)

    def _second(
        self, total: Any, params: Params, mine: list[Batch], weights: Tensor, seed: str | None, bars: Params
    ) -> Tensor | None:
        """H ḡ; the scores, None where there are no rows."""
        pull = partial(self.engine.pullback, params, mine, weights, seed) if mine else None
        return _pulled_to(pull, total, bars)

    def _scores(self, batches: Sequence[Batch], mine: list[Tensor]) -> list[Tensor]:
        """The scores of every shard in order, [K, rows of the shard (, L)]; of rank 0's use only."""
        if self.group.rank:
            for slopes in mine:
                if slopes.numel():
                    self.group.sent(slopes)
            return []
        scores = list[Tensor]()
        for shard in range(self.shards):
            turn, rank = divmod(shard, self.group.world)
            if rank == 0:
                scores.append(mine[turn])
                continue
            rows = sum(len(part.index) for part in cut(batches, shard, self.shards, self.unit))
            like = mine[0].new_empty((len(mine[0]), rows, *mine[0].shape[2:]))
            scores.append(self.group.received(like, rank) if like.numel() else like)
        return scores

    def _placed(self, batches: Sequence[Batch], pulled: tuple[Params, list[Tensor]]) -> tuple[Params, Tensor]:
        """The scores of all shards in the order of the batch's rows."""
        curvature, scores = pulled
        rows = [len(batch.index) for batch in batches]
        whole = scores[0].new_empty((len(scores[0]), sum(rows), *scores[0].shape[2:]))
        for shard, slopes in enumerate(scores):
            whole[:, _places(rows, shard, self.shards, self.unit)] = slopes
        return curvature, whole

    def _tangent(
        self, params: Params, batches: Sequence[Batch], weights: Tensor, direction: Tensor, seed: str | None
    ) -> Params:
        total = self._sum(params)
        for shard, mine in self._own(batches):
            dots = {name: torch.zeros_like(theta) for name, theta in params.items()}
            if mine:
                engine: Any = self.engine
                dots = engine.tangent(params, mine, weights, direction, _seed(seed, shard))
            total.add({name: dots[name] for name in params})
        return total.result()

    def _note(self) -> dict[str, float]:
        objective = getattr(self.engine, "objective", None)
        return objective.noted() if isinstance(objective, Noting) else {}

    def _told(self, mine: list[tuple[int, float, dict[str, float]]]) -> Tensor:
        """Σ loss [] in float64, in the order of shards, and the terms noted; of rank 0's use only."""
        return self._added([share for rank in self.group.collected(mine) for share in rank])

    def _added(self, shares: list[tuple[int, float, dict[str, float]]]) -> Tensor:
        for _, _, terms in sorted(shares, key=lambda share: share[0]):
            for name, value in terms.items():
                self._terms[name] = self._terms.get(name, 0.0) + value
        losses = [loss for _, loss, _ in sorted(shares, key=lambda share: share[0])]
        return torch.tensor(sum(losses), dtype=torch.float64)


def _pulled_to(pull: Pull | None, total: Any, bars: Params) -> Tensor | None:
    """The scores of a shard, whose H ḡ goes to a sum."""
    if pull is None:
        total.add({name: torch.zeros_like(bar) for name, bar in bars.items()})
        return None
    curvature, slopes = pull(bars)
    total.add({name: curvature[name] for name in bars})
    return slopes


def cut(batches: Sequence[Batch], shard: int, shards: int, unit: int = 1) -> list[Batch]:
    """A shard's rows of every micro-batch that has some for it."""
    parts = []
    for batch in batches:
        start, stop = _bounds(len(batch.index), shard, shards, unit)
        if stop > start:
            parts.append(tree.map(lambda x, rows=slice(start, stop): x[rows], batch))
    return parts


def _bounds(rows: int, shard: int, shards: int, unit: int) -> tuple[int, int]:
    """The first shards have a unit more where it does not divide."""
    assert rows % unit == 0, "a batch is whole units"
    units = rows // unit
    start = shard * (units // shards) + min(shard, units % shards)
    stop = start + units // shards + (shard < units % shards)
    return start * unit, stop * unit


def _places(rows: Sequence[int], shard: int, shards: int, unit: int) -> Tensor:
    """Where a shard's rows are in the whole batch."""
    before, places = 0, []
    for count in rows:
        places.append(before + torch.arange(*_bounds(count, shard, shards, unit)))
        before += count
    return torch.cat(places)


def _alone(batches: Sequence[Batch], weights: Tensor) -> tuple[list[Batch], Tensor]:
    """The same batches with weights of their own, [entries], instead of the run's."""
    alone, own, start = [], [], 0
    for batch in batches:
        entries = batch.index.numel()
        place = torch.arange(start, start + entries, device=batch.index.device).view(batch.index.shape)
        own.append(weights.flatten()[batch.index.flatten().to(weights.device)])
        alone.append(batch._replace(index=place))
        start += entries
    return alone, torch.cat(own)


def _seed(seed: str | None, shard: int) -> str | None:
    return None if seed is None else f"{seed}/shard {shard}"
