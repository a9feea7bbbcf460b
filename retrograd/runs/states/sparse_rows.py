"""Matrices by those of their rows that are not zero: an embedding's gradient has one for each token of the batch."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from retrograd.core import memory
from retrograd.core.optim import Params
from retrograd.runs.states.buffers import as_bytes

__all__ = ["Rows", "thin_like", "thinned", "whole"]

_LARGE = 1 << 20  # bytes; of less there is nothing to spare
_LOOKED_AT = 64  # rows, before the others are
_WORTH = 1 / 2  # of the rows: with more of them a matrix stays as it is

Thin = dict[str, Any]  # of Tensor | Rows, and fit to stand for a state's parameters


class Rows(NamedTuple):
    """index: the rows there are, [R] int64. values: what is in them, [R, …]."""

    index: Tensor  # type: ignore[assignment]  # tuple.index is never called on rows
    values: Tensor


def thinned(params: Params) -> Thin:
    """The same tensors of host memory, those with few rows that are not zero as `Rows`; -0.0 is not zero."""
    return {
        name: _rows(leaf) if leaf.numel() * leaf.element_size() >= _LARGE else leaf for name, leaf in params.items()
    }


def whole(thin: Thin, like: Params) -> Params:
    """The tensors that were `thinned`."""
    return {name: _filled(leaf, like[name]) if isinstance(leaf, Rows) else leaf for name, leaf in thin.items()}


def thin_like(params: Params, tensors: dict[str, Tensor], prefix: str) -> Thin:
    """What a file of named tensors holds of `params`: those of `tensors` in place of those that it has as `Rows`."""
    names = {name: [f"{prefix}{name}.{part}" for part in Rows._fields] for name in params}
    return {
        name: Rows(*(tensors[part] for part in parts)) if all(part in tensors for part in parts) else params[name]
        for name, parts in names.items()
    }


def _rows(leaf: Tensor) -> Tensor | Rows:
    if leaf.ndim < 2 or leaf.numel() == 0 or not leaf.is_contiguous():
        return leaf
    rows = as_bytes(leaf).reshape(len(leaf), -1)  # by numpy: torch would start a team of threads in the store's own
    if rows[:: max(1, len(leaf) // _LOOKED_AT)].any(1).mean() > _WORTH:
        return leaf
    words = rows.view(np.uint64) if rows.shape[1] % 8 == 0 else rows
    index = np.flatnonzero(words.any(1))
    if len(index) > _WORTH * len(leaf):
        return leaf
    values = torch.from_numpy(rows[index].reshape(-1)).view(leaf.dtype).view(len(index), *leaf.shape[1:])
    return Rows(torch.from_numpy(index), values)


def _filled(rows: Rows, like: Tensor) -> Tensor:
    dense = memory.empty(like.shape, rows.values).zero_()
    return dense.index_copy_(0, rows.index, rows.values)
