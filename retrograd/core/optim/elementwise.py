"""Elementwise formulas over all leaves, on pieces of a convenient size; no bit of a formula depends on how it is cut.

A formula is a pure function (at, bar) → results, of tensors [*shape] of one leaf and of cotangents [K, *shape].
On a CPU large leaves are cut, so that temporaries stay in cache. On an accelerator small ones are joined, for a launch
takes longer than their work; and wherever a derivative is traced through the formula, for a traced operation does, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from retrograd.core import memory, tree
from retrograd.core.optim.protocol import Params

__all__ = ["Formula", "elementwise", "is_traced"]

_PIECE = 1 << 18  # entries; measured flat between 2¹⁷ and 2¹⁸, where whole leaves take 3 to 4 times as long
_JOINED = {"cuda"}  # devices whose small leaves are joined,
_BUCKET = 1 << 22  # up to this many entries; not measured

Formula = Callable[[Sequence[Tensor], Sequence[Tensor]], tuple[Tensor, ...]]


def elementwise(
    formula: Formula, at: Sequence[Params], bar: Sequence[Params], like: Sequence[Params]
) -> tuple[list[Params], list[Tensor]]:
    """The results of a formula, leaf by leaf, and its sums.

    Args:
        at: Trees of the leaves [*shape] that the formula is given.
        bar: Trees of cotangents [K, *shape] that it is given; none for an update.
        like: What each result is like. Whatever the formula returns beyond those is added up, over pieces, leaves and
            the processes that have some.
    """

    def apply(leaves: Sequence[Tensor], wide: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        results = formula(leaves, wide)
        return results[: len(like)], results[len(like) :]

    queries = max((len(x) for bars in bar for x in bars.values()), default=1)
    gathered: list[Params] = [{} for _ in like]
    sums: list[Tensor] = []
    for names in _groups([*at, *bar]):
        leaves, wide, patterns = ([[params[name] for name in names] for params in trees] for trees in (at, bar, like))
        if len(names) == 1:
            single = ([x[0] for x in leaves], [x[0] for x in wide], [x[0] for x in patterns])
            results, more = _in_pieces(apply, *single, queries)
            parts = [[x] for x in results]
        else:
            joined = [torch.cat([x.reshape(queries, -1) for x in each], 1) for each in wide]
            results, more = apply([torch.cat([x.flatten() for x in each]) for each in leaves], joined)
            sizes = [x.numel() for x in leaves[0]] if leaves else [x[0].numel() for x in wide[0]]
            parts = [list(x.split(sizes, -1)) for x in results]
        for result, each, pattern in zip(gathered, parts, patterns, strict=True):
            result.update({name: x.view(p.shape) for name, x, p in zip(names, each, pattern, strict=True)})
        sums = _added(sums, more)
    return gathered, [tree.total(x) for x in sums]


def is_traced(x: Tensor) -> bool:
    """Whether autograd or a transform of torch.func looks on."""
    return x.requires_grad or torch._C._functorch.is_functorch_wrapped_tensor(x)


def _added(sums: Sequence[Tensor], more: Sequence[Tensor]) -> list[Tensor]:
    return [a + b for a, b in zip(sums, more, strict=True)] if sums else list(more)


def _groups(trees: Sequence[Params]) -> list[list[str]]:
    """The leaves' names in order; those together that are worked on at once.

    A leaf that would leave the next one unaligned stays alone: states read back are aligned, and bits depend on it.
    Where a derivative is traced no state is made.
    """
    groups, filled, before = list[list[str]](), 0, None
    for name, leaf in trees[0].items():
        traced = all(type(params[name]) is Tensor and is_traced(params[name]) for params in trees)
        odd = leaf.numel() * leaf.element_size() % 64 != 0
        plain = not odd and leaf.device.type in _JOINED and not any(is_traced(params[name]) for params in trees)
        kind = [(traced, params[name].dtype, params[name].device) for params in trees] if traced or plain else None
        filled += leaf.numel()
        if kind is None or kind != before or filled > _BUCKET:
            groups.append([])
            filled, before = leaf.numel(), kind
        groups[-1].append(name)
    return groups


def _in_pieces(
    apply: Callable[..., tuple[tuple[Tensor, ...], tuple[Tensor, ...]]],
    leaves: Sequence[Tensor],
    wide: Sequence[Tensor],
    like: Sequence[Tensor],
    queries: int,
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Results and sums of one leaf; a large one is cut, and each piece's results are written where they belong."""
    size = leaves[0].numel() if leaves else wide[0][0].numel()
    piece = max(1, _PIECE // queries)
    if size <= piece or any(x.device.type != "cpu" or is_traced(x) for x in (*leaves, *wide)):
        return apply(leaves, wide)
    outs = [memory.empty_like(x) for x in like]
    flat, across = [x.reshape(-1) for x in leaves], [x.reshape(queries, -1) for x in wide]
    places = [x.view(queries, -1) if wide else x.view(-1) for x in outs]
    sums: list[Tensor] = []
    for start in range(0, size, piece):
        part = slice(start, start + piece)
        results, more = apply([x[part] for x in flat], [x[:, part] for x in across])
        for place, result in zip(places, results, strict=True):
            place[..., part].copy_(result)
        sums = _added(sums, more)
    return outs, sums
