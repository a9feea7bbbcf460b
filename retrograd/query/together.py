"""A query's value and gradient by all processes of a job: each takes some of its parts.

A column is a sum of parts, a batch of rows or a question each. They are numbered over all columns; rank r of W takes
the parts r, W + r, 2W + r, … and each column is added up in the order of its parts (`parallel.sums`), which is how one
process does it: the bits are the same.

Where parameters lie in pieces every rank is sent them whole, and keeps its pieces of the gradient. That is never there
whole: a part's graph is gone back over for an eighth of the leaves at a time, which is exchanged and let go of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from retrograd.core import tree
from retrograd.core.optim import Params
from retrograd.parallel.group import Group
from retrograd.parallel.pieces import Pieces, PieceSum
from retrograd.parallel.sums import OrderedSum
from retrograd.query.columns import Column, Queries, graph_of
from retrograd.query.named import Asked

__all__ = ["answering", "ask_together", "given"]

_BUNDLES = 8  # of leaves, whose gradient is there at once


def ask_together(group: Group, asked: Asked, params: Params, lying: Pieces | None = None) -> tuple[Tensor, Params]:
    """(φ [K] in nats, ∇φ [K, *shape]) at whole parameters. By rank 0, while the others serve.

    Args:
        lying: Where parameters lie in pieces: then so does the gradient. The others keep theirs until `given`.
    """
    if group.world == 1:
        return Queries(asked.columns)(params)
    group.call("ask", asked.name, params)
    return _answered(group, asked.columns, params, lying)


def given(lying: Pieces, own: Params) -> Iterator[Tensor]:
    """The gradient that lies in pieces, leaf by leaf whole. By rank 0, while the others serve."""
    lying.group.call("give")
    yield from _gathered(lying, own)


def answering(group: Group, asked: Sequence[Asked], lying: Pieces | None) -> dict[str, Callable[..., object]]:
    """What the other ranks do, by name: (name of a query, parameters) → their parts of it; and give what they keep."""
    columns, kept = {query.name: query.columns for query in asked}, dict[str, Tensor]()

    def answer(name: str, params: Params) -> None:
        kept.update(_answered(group, columns[name], params, lying)[1])

    def give() -> None:
        assert lying is not None, "what is whole is rank 0's"
        for _ in _gathered(lying, kept):
            pass
        kept.clear()

    return {"ask": answer, "give": give}


def _gathered(lying: Pieces, own: Params) -> Iterator[Tensor]:
    for name in lying.shapes:
        yield lying.some(own, [name])[name]


def _answered(group: Group, columns: Sequence[Column], params: Params, lying: Pieces | None) -> tuple[Tensor, Params]:
    parts = [(k, part) for k, column in enumerate(columns) for part in column.parts]
    bundles, terms = _bundles(params, 1 if lying is None else _BUNDLES), list[tuple[int, int, Tensor]]()
    totals = [_sum(group, {name: params[name] for name in names}, lying) for names in bundles]
    for start in range(0, len(parts), group.world):
        mine, graph = start + group.rank, None
        into = [parts[n][0] if n < len(parts) else None for n in range(start, start + group.world)]
        if mine < len(parts):
            graph = graph_of(parts[mine][1], params)
            terms.append((mine, parts[mine][0], graph[0].detach().cpu()))
        for names, total in zip(bundles, totals, strict=True):
            total.add(_slopes(graph, {name: params[name] for name in names}, names is not bundles[-1]), into)
    every = sorted((term for rank in group.collected(terms) for term in rank), key=lambda term: term[0])
    gradient: Params = {}
    while totals:  # each given up as it is copied
        total = totals.pop(0)
        sums = [total.result(k) for k in range(len(columns))]
        gradient.update({name: torch.stack([slopes[name] for slopes in sums]) for name in sums[0]})
    if group.rank:
        return torch.zeros(0), gradient
    values: dict[int, Tensor] = {}
    for _, k, value in every:
        values[k] = values[k] + value if k in values else value
    return torch.stack([values[k] for k in range(len(columns))]), gradient


def _slopes(graph: tuple[Tensor, Params] | None, like: Params, again: bool) -> Params:
    """A part's gradient by some leaves; zeros of a rank that has none in this round. again: the graph is needed."""
    if graph is None:
        return {name: torch.zeros_like(theta) for name, theta in like.items()}
    value, leaves = graph
    wanted = [leaves[name] for name in like]
    return dict(zip(like, torch.autograd.grad(value, wanted, retain_graph=again, materialize_grads=True)))


def _sum(group: Group, like: Params, lying: Pieces | None) -> OrderedSum:
    return OrderedSum(group) if lying is None else PieceSum(lying, like)


def _bundles(params: Params, count: int) -> list[list[str]]:
    """Names of neighbours, each time about so many a part of all bytes, or one large leaf."""
    most, bundles, size = tree.nbytes(params) / count, list[list[str]](), 0
    for name, theta in params.items():
        if not bundles or size + theta.nbytes > most:
            bundles.append([])
            size = 0
        bundles[-1].append(name)
        size += theta.nbytes
    return bundles
