"""An engine over parameters that lie in pieces: gathered where rows are passed over, and let go of after it.

    θ, ḡ = whole(pieces)          g_s, H_s ḡ on a shard's rows, by the engine as it is          Σ_s dealt out in pieces

The `blocks` engine does this link by link (`ByBlock`), any other for the whole model at once (`Sharded`).
A step's gradient is a sum over rows of functions of the whole parameters, so nothing needs to be differentiated through
what processes exchange: the sums of first-order values are exact. What stays on a process between passes, parameters,
moments, cotangents, kept states and gradients, is its pieces.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from retrograd.core.engine.blocks import Blocks, Chain, Micro, Read, micros
from retrograd.core.optim import Params
from retrograd.core.step import Batch
from retrograd.parallel.group import RankError
from retrograd.parallel.pieces import Pieces, PieceSum
from retrograd.parallel.split import Split, cut

__all__ = ["Ahead", "ByBlock", "Sharded", "release"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Sharded(Split):
    """The gradient half over logical shards, of parameters in pieces. Every process calls it, with its own pieces.

    Args:
        lying: How parameters lie.
        first: This process's pieces of the parameters that training starts from.
    """

    lying: Pieces
    first: Params

    def _all(self, name: str, *arguments: Any) -> Any:
        return self.doing[name](*(self.lying.whole(x) if isinstance(x, dict) else x for x in arguments))

    def _sum(self, like: Params) -> Any:
        return PieceSum(self.lying, like)

    def _told(self, mine: list[tuple[int, float, dict[str, float]]]) -> Tensor:
        return self._added([shard for rank in self.group.everywhere(mine) for shard in rank])

    def _scores(self, batches: Sequence[Batch], mine: list[Tensor]) -> list[Tensor]:
        """The scores of every shard in order, [K, rows of the shard (, L)], on every process."""
        rows = [sum(len(part.index) for part in cut(batches, s, self.shards, self.unit)) for s in range(self.shards)]
        padded = list[Tensor]()
        for slopes in mine:
            ends = [0, 0] * (slopes.ndim - 2) + [0, max(rows) - slopes.shape[1]]
            padded += self.group.shared(F.pad(slopes, ends))
        return [slopes[:, :count] for slopes, count in zip(padded, rows, strict=True)]


@dataclass(frozen=True, eq=False, kw_only=True)
class ByBlock(Sharded):
    """`Sharded` for the `blocks` engine: what a link needs is gathered when it runs, and let go of after it.

    A rank has a link's parameters, cotangents and gradient whole, and of all others its pieces; but for the parameters
    and cotangents of the next link, which are on their way while this one is passed. In every round all
    ranks go over the chain in step, those without rows too. All micro-batches of a shard pass a link before the next
    one is gathered: their states are held together.
    """

    @property
    def blocks(self) -> Blocks:
        """The engine of a shard."""
        assert isinstance(self.engine, Blocks), "what goes by block is the blocks engine"
        return self.engine

    def runs(self, params: Params, batches: Sequence[Batch], weights: Tensor, seed: str | None) -> bool:
        """Whether a gradient can be had of parameters of this dtype, on every process: all say the same.

        Every process passes over all rows. Before anything is gathered they say how it goes, and where one has failed
        nobody goes on: or the others would wait for it.
        """

        def read(names: Iterable[str]) -> Params:
            if self._somewhere(False):
                raise _ElsewhereError
            return self.lying.some(params, names)

        dtypes = _Dtypes()
        try:
            self.blocks.first(read, micros(batches, weights, seed), dtypes)
        except _ElsewhereError:
            return False
        except (RankError, torch.OutOfMemoryError):
            raise
        except Exception:  # a loss raises what it likes
            self._somewhere(True)
            return False
        return not self._somewhere(dtypes.dtypes != {next(iter(params.values())).dtype})

    def _somewhere(self, here: bool) -> bool:
        return any(self.group.shared(torch.tensor(int(here))))

    def _all(self, name: str, *arguments: Any) -> Any:
        return self.doing[name](*arguments)

    def _sum(self, like: Params) -> Any:
        return BlockSum(self.lying, self.blocks.chain, like)

    def _first(self, total: Any, params: Params, mine: list[Batch], weights: Tensor, seed: str | None) -> float:
        return float(self.blocks.first(self._reading(params), micros(mine, weights, seed), total)[0])

    def _linear(self, total: Any, params: Params, mine: list[Batch], weights: Tensor, seed: str | None) -> Any:
        parts = micros(mine, weights, seed)
        _, residual = self.blocks.first(self._reading(params), parts, total)
        return lambda total, bars: self._tangents(total, params, mine, parts, bars, residual)

    def _second(
        self, total: Any, params: Params, mine: list[Batch], weights: Tensor, seed: str | None, bars: Params
    ) -> Tensor | None:
        return self._tangents(total, params, mine, micros(mine, weights, seed), bars, [None] * len(mine))

    def _tangents(
        self, total: Any, params: Params, mine: list[Batch], parts: list[Micro], bars: Params, residual: Sequence[Any]
    ) -> Tensor | None:
        read, along = self._reading(params), self._reading(bars)
        slopes = self.blocks.second(read, along, len(next(iter(bars.values()))), parts, total, residual)
        scores = [slope * batch.scale for slope, batch in zip(slopes, mine, strict=True)]
        return torch.cat(scores, dim=1) if scores else None

    def _reading(self, own: Params) -> Read:
        return Ahead(self.lying, own, self.blocks.chain.passed)


class Ahead:
    """Leaves of places in the order that a pass comes to them: those of the next are on their way meanwhile. A `Read`.

    Args:
        lying: How leaves lie.
        own: This process's pieces.
        places: The leaves of every place, in order.
    """

    def __init__(self, lying: Pieces, own: Params, places: Iterable[Sequence[str]]) -> None:
        self.lying, self.own, self.places = lying, own, iter(places)
        self.coming = self._next()

    def __call__(self, names: Iterable[str]) -> Params:
        wanted = list(names)
        if not wanted:
            return {}
        params = self.coming()
        assert list(params) == wanted, "every rank passes the places in one order"
        self.coming = self._next()
        return params

    def _next(self) -> Callable[[], Params]:
        place = next(self.places, None)
        return dict if place is None else self.lying.coming(self.own, place)


class _ElsewhereError(Exception):
    """Another process has failed."""


class _Dtypes:
    """`Sums` of which only the dtypes are wanted."""

    def __init__(self) -> None:
        self.dtypes = set[torch.dtype]()

    def add(self, part: int, terms: Params) -> None:
        self.dtypes.update(x.dtype for x in terms.values())

    def done(self, names: Sequence[str]) -> None:
        pass


class BlockSum:
    """Σ_s x_s of gradients that a chain's places give one by one, of which every process keeps its pieces: `Sums`.

    A leaf's sum over the places and micro-batches of a shard is taken as `Blocks` takes it, and dealt out as soon as
    its last place is done. One that several places share is held until then, once for each micro-batch.

    Args:
        lying: How leaves lie.
        chain: Whose places give them.
        like: This process's pieces of what is summed.
    """

    def __init__(self, lying: Pieces, chain: Chain, like: Params) -> None:
        self.lying, self.like = lying, like
        self.uses = chain.uses
        self.seen = Counter[str]()  # in this round
        self.held: dict[str, dict[int, Tensor]] = {}  # by leaf and micro-batch; of a single place, their sum
        self.sums: dict[tuple[str, ...], PieceSum] = {}

    def add(self, part: int, terms: Params) -> None:
        for name, x in terms.items():
            parts, key = self.held.setdefault(name, {}), part if self.uses[name] > 1 else 0
            parts[key] = parts[key] + x if key in parts else x

    def done(self, names: Sequence[str]) -> None:
        self.seen.update(names)
        ended = tuple(name for name in names if self.seen[name] == self.uses[name])
        if not ended:
            return
        term = {name: self._taken(name) for name in ended}
        self.sums.setdefault(ended, PieceSum(self.lying, term)).add(term)
        for name in ended:
            del self.seen[name]

    def result(self) -> Params:
        """The pieces of the sum that are this process's; it is given away."""
        pieces: Params = {}
        while self.sums:
            pieces.update(self.sums.popitem()[1].result())
        return {label: pieces[label] if label in pieces else torch.zeros_like(x) for label, x in self.like.items()}

    def _taken(self, name: str) -> Tensor:
        """A leaf's sum over micro-batches; zeros of a shard without rows."""
        parts = self.held.pop(name, None)
        if parts is None:
            return self.lying.zeros(name, self.like)
        first, *others = (parts.pop(part) for part in sorted(parts))
        return sum(others, start=first)


def release(*params: Tensor) -> None:
    """Let go of the memory of whole parameters, which lie in pieces from now on; shapes and dtypes stay known."""
    stubs: dict[int, Tensor] = {}  # what shares storage goes on sharing it
    for x in params:
        stub = stubs.setdefault(x.untyped_storage().data_ptr(), torch.zeros((), dtype=x.dtype, device=x.device))
        x.data = stub.expand(x.shape)
