"""Queries: scalars of the final parameters, in nats, with their gradients.

A language-model query is the mean token loss of held-out rows: one value for the set ("mean"), or one for each
document ("none"). K values share the final state and, in the sweep, all replay.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from retrograd.core.optim import Params
from retrograd.core.step import Batch, Engine
from retrograd.core.sweep import Query
from retrograd.lm.rows import Rows
from retrograd.lm.stream import DataStream

__all__ = ["lm_query", "query_columns"]


def query_columns(
    rows: Rows,
    reduction: str = "mean",
    *,
    batch_size: int = 8,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> list[list[Batch]]:
    """For each query column, the batches whose objective sums to its mean token loss.

    Args:
        reduction: "mean": one column for all rows; "none": one for each row.
    """
    if reduction not in ("mean", "none"):
        raise ValueError(f"unknown query reduction {reduction!r}; it is mean (one score) or none (one per document)")
    size = 1 if reduction == "none" else batch_size
    stream = DataStream(rows, size, shuffle=False, dtype=dtype, device=device)
    batches = [stream[t] for t in range(len(stream))]
    if reduction == "none":
        return [[batch] for batch in batches]
    share = [int(batch.inputs["target_mask"].sum()) / rows.targets for batch in batches]
    return [[batch._replace(scale=batch.scale * part) for batch, part in zip(batches, share)]]


def lm_query(engine: Engine, columns: Sequence[Sequence[Batch]]) -> Query:
    """params → (φ [K] in nats, ∇φ [K, *shape])."""

    def query(params: Params) -> tuple[Tensor, Params]:
        values, grads = [], []
        for batches in columns:
            # data weights of one, wherever the batches point
            top = max(int(batch.index.max()) for batch in batches) + 1
            ones = torch.ones(top, dtype=batches[0].scale.dtype, device=batches[0].scale.device)
            value, grad = engine.gradient(params, batches, ones, None)
            values.append(value)
            grads.append(grad)
        return torch.stack(values), {name: torch.stack([grad[name] for grad in grads]) for name in params}

    return query
