"""A query's value and gradient by all processes of a job: each takes some of its parts.

A column is a sum of parts, a batch of rows or a question each. They are numbered over all columns; rank r of W takes
the parts r, W + r, 2W + r, … and each column is added up in the order of its parts (`parallel.sums`), which is how one
process does it: the bits are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from retrograd.core.optim import Params
from retrograd.parallel.group import Group
from retrograd.parallel.sums import OrderedSum
from retrograd.query.columns import Column, Queries, taken
from retrograd.query.named import Asked

__all__ = ["answering", "ask_together"]


def ask_together(group: Group, asked: Asked, params: Params) -> tuple[Tensor, Params]:
    """(φ [K] in nats, ∇φ [K, *shape]) at whole parameters. By rank 0, while the others serve."""
    if group.world == 1:
        return Queries(asked.columns)(params)
    group.call("ask", asked.name, params)
    return _answered(group, asked.columns, params)


def answering(group: Group, asked: Sequence[Asked]) -> Callable[[str, Params], object]:
    """What the other ranks do: (name of a query, parameters) → their parts of it."""
    columns = {one.name: one.columns for one in asked}
    return lambda name, params: _answered(group, columns[name], params)


def _answered(group: Group, columns: Sequence[Column], params: Params) -> tuple[Tensor, Params]:
    parts = [(k, part) for k, column in enumerate(columns) for part in column.parts]
    total, told = OrderedSum(group), list[tuple[int, int, Tensor]]()
    for start in range(0, len(parts), group.world):
        mine = start + group.rank
        into = [parts[n][0] if n < len(parts) else None for n in range(start, start + group.world)]
        if mine < len(parts):
            value, grads = taken(parts[mine][1], params)
            told.append((mine, parts[mine][0], value.cpu()))
        else:
            grads = {name: torch.zeros_like(theta) for name, theta in params.items()}
        total.add({name: grads[name] for name in params}, into)
    every = sorted((one for rank in group.collected(told) for one in rank), key=lambda one: one[0])
    sums = [total.result(k) for k in range(len(columns))]
    if group.rank:
        return torch.zeros(0), {}
    values: dict[int, Tensor] = {}
    for _, k, value in every:
        values[k] = values[k] + value if k in values else value
    found = torch.stack([values[k] for k in range(len(columns))])
    return found, {name: torch.stack([one[name] for one in sums]) for name in params}
