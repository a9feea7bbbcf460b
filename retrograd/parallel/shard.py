"""An engine over parameters that lie in pieces: gathered for the pass over a step's rows, and let go of after it.

    θ, ḡ = whole(pieces)          g_s, H_s ḡ on a shard's rows, by the engine as it is          Σ_s dealt out in pieces

A step's gradient is a sum over rows of functions of the whole parameters, so nothing needs to be differentiated through
what processes exchange: the sums of first-order values are exact. What stays on a process between passes, parameters,
moments, cotangents, kept states and gradients, is its pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from retrograd.core.optim import Params
from retrograd.core.step import Batch
from retrograd.parallel.pieces import Pieces, PieceSum
from retrograd.parallel.split import Split, cut
from retrograd.parallel.sums import OrderedSum

__all__ = ["Sharded", "release"]


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

    def _sum(self, like: Params) -> OrderedSum:
        return PieceSum(self.lying, like)

    def _told(self, mine: list[tuple[int, float, dict[str, float]]]) -> Tensor:
        return self._added([one for rank in self.group.everywhere(mine) for one in rank])

    def _scores(self, batches: Sequence[Batch], mine: list[Tensor]) -> list[Tensor]:
        """The scores of every shard in order, [K, rows of the shard (, L)], on every process."""
        rows = [sum(len(part.index) for part in cut(batches, s, self.shards, self.unit)) for s in range(self.shards)]
        found = list[Tensor]()
        for slopes in mine:
            ends = [0, 0] * (slopes.ndim - 2) + [0, max(rows) - slopes.shape[1]]
            found += self.group.shared(F.pad(slopes, ends))
        return [slopes[:, :count] for slopes, count in zip(found, rows, strict=True)]


def release(*params: Tensor) -> None:
    """Let go of the memory of whole parameters, which lie in pieces from now on; shapes and dtypes stay known."""
    stubs: dict[int, Tensor] = {}  # what shares storage goes on sharing it
    for x in params:
        stub = stubs.setdefault(x.untyped_storage().data_ptr(), torch.zeros((), dtype=x.dtype, device=x.device))
        x.data = stub.expand(x.shape)
