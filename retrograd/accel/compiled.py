"""The passes over a link, compiled: one compilation of each for all links that share one `call`, and for all lengths.

Which graph serves a batch is a function of the batch's shapes alone, and a graph is optimised for sizes given
beforehand, not for the batch that comes first: a replay, in this process or another, has the same bits. Between the way
forward and the way back results of matrix products are kept: less arithmetic than eager passes need, for more memory.
"""

from __future__ import annotations

import itertools
import math
import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import grad

from retrograd.accel.graphs import Asked, Pair, Shape, compiled_pair
from retrograd.core import tree
from retrograd.core.engine.passes import Eager, Link, X, at, live, pullbacks, without
from retrograd.core.optim import Params

__all__ = ["Compiled", "no_compiler"]

_MOST = 16  # pairs of graphs; a chain takes two for each kind of layer and of mask
_LEAST = 11  # what stands for a size while a graph is traced; smaller ones are numbers of heads as well

_Call = Callable[[Params, Any, Any], Any]


class Compiled:
    """Passes over links, compiled where a `call` serves two links or more. Tangents go through one by one.

    sizes: of x but for its last dimension, (rows, length), or where rows may be joined (rows, states, longest): what
        the code is optimised for. It is right for all.
    graphs: compilations so far. fixed: those among them that serve a single shape. seconds: what they all took.
    """

    def __init__(self, links: Sequence[Link], sizes: Sequence[int]) -> None:
        self.sizes, self.graphs, self.fixed, self.seconds = tuple(sizes), 0, 0, 0.0
        uses = Counter(link.call for link in links)
        self.calls = {call for call, count in uses.items() if count > 1}
        self._eager = Eager()
        self._pairs: dict[Any, Pair | None] = {}

    @property
    def told(self) -> str:
        """For a report: how many compilations, and what they took."""
        once = f", {self.fixed} of them for a single shape of batch" if self.fixed else ""
        return f"{self.graphs} graphs{once}, {self.seconds:.0f} s"

    def forward(self, link: Link, point: Params, context: Any) -> tuple[Tensor, Any]:
        if link.call not in self.calls:
            return self._eager.forward(link, point, context)
        return self._early(_first, link, _at_point(link, point, context), (point[X],))

    def vjp(self, link: Link, point: Params, context: Any, bar: Tensor, kept: Any) -> Params:
        if link.call not in self.calls:
            return self._eager.vjp(link, point, context, bar, kept)
        return _late(_at_point(link, point, context), (bar,), kept)

    def jvp(self, link: Link, point: Params, context: Any, along: Params) -> tuple[Tensor, Tensor, Any]:
        if link.call not in self.calls:
            return self._eager.jvp(link, point, context, along)
        by_direction = []
        for k in range(len(along[X])):
            early = _at_point(link, point, context, _only(along, k))
            by_direction.append(self._early(_second, link, early, early[1]))
        values, kept = zip(*by_direction, strict=True)
        return values[0][0], _joined([dots for _, dots in values]), list(kept)

    def vjp_along(
        self, link: Link, point: Params, context: Any, along: Params, bar: Tensor, bardots: Tensor, kept: Any
    ) -> tuple[Tensor, Params]:
        if link.call not in self.calls:
            return self._eager.vjp_along(link, point, context, along, bar, bardots, kept)
        by_direction = []
        for k, of_direction in enumerate(kept):
            early = _at_point(link, point, context, _only(along, k))
            by_direction.append(_late(early, (bar, bardots[k : k + 1]), of_direction))
        return by_direction[0][0], {name: _joined([products[name] for _, products in by_direction]) for name in point}

    def _early(self, joint: Callable[..., Any], link: Link, early: _Early, late: tuple[Tensor, ...]) -> tuple[Any, Any]:
        """(what `joint` knows on the way forward, what `_late` goes on from); `late` are like the tensors to come."""
        pair = self._pair(joint, link.call, early, late)
        with torch.no_grad():
            value, handed = pair.early(_given(early))
        return value, (pair, handed)

    def _pair(self, joint: Callable[..., Any], call: _Call, early: _Early, late: tuple[Tensor, ...]) -> Pair:
        params, moving, context = early
        x, given = moving[0], tree.leaves((early, late))
        names = self._names(x)
        exact = tuple(tuple(t.shape) for t in given)
        varying: tuple[Shape, ...] = (
            *(tuple(t.shape) for t in tree.leaves(params)),
            *(_like(names, t) for t in moving),
            *(_around(x, names, t) for t in tree.leaves(context)),
            *(_like(names, t) for t in late),
        )
        for shapes in (varying, exact):
            asked = Asked(
                lambda first, last: joint(call, first, last), tree.frame(early), tree.frame(late), shapes,
                tuple((t.dtype, t.device) for t in given), self._hints(shapes), x.shape[-1] // 2,
            )  # fmt: skip
            # how sums are split among threads is compiled in
            key = (joint, call, torch.get_num_threads(), asked.early.key, asked.shapes, asked.like)
            if key not in self._pairs:
                self._pairs[key] = self._compiled(asked)
            if (pair := self._pairs[key]) is not None:
                return pair
        raise AssertionError("a graph for one shape assumes nothing of its sizes")

    def _compiled(self, asked: Asked) -> Pair | None:
        if self.graphs >= 2 * _MOST:
            raise ValueError(
                f"{self.graphs} graphs were compiled and batches go on needing others, now for {asked.shapes}: the "
                "layers cannot be compiled once for all batches. Leave --compile out."
            )
        start = time.perf_counter()
        pair = compiled_pair(asked)
        self.seconds += time.perf_counter() - start
        if pair is not None:
            self.graphs += 2
            self.fixed += 0 if asked.varies else 2
        return pair

    def _names(self, x: Tensor) -> Shape:
        """The shape of x with names for what varies, places in `sizes`; one row of states may be joined rows."""
        rows, length = x.shape[:-1]
        last = len(self.sizes) - 1 if rows > 1 else 1
        return ("0" if rows > 1 else 1, str(last) if length > 1 else 1, x.shape[-1])

    def _hints(self, shapes: Sequence[Shape]) -> dict[str, int]:
        """A number for each size that varies: a prime, not beside another number or a multiple of one.

        Sizes that are equal as numbers are taken for one, and among them are products: heads × rows, rows × length.
        """
        taken = {size for shape in shapes for size in shape if isinstance(size, int)}
        hints: dict[str, int] = {}

        def clear(size: int) -> bool:
            beside = (size - 1, size, size + 1)
            apart = all(near % other and (other + near - size) % size for other in hints.values() for near in beside)
            return apart and taken.isdisjoint(beside) and all(size % d for d in range(2, math.isqrt(size) + 1))

        for place, size in enumerate(self.sizes):
            hints[str(place)] = next(filter(clear, itertools.count(max(size, _LEAST))))
        return hints


def no_compiler(device: torch.device) -> str | None:
    """Why nothing can be compiled for a device, or None."""
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        return None if has_triton() else "torch.compile needs triton on a GPU, and it is not installed or does not run"
    from torch._inductor import config

    asked = config.cpp.cxx
    names = [name for name in (asked if isinstance(asked, (list, tuple)) else [asked]) if name]
    if any(shutil.which(name) for name in names):
        return None
    tried = f"none of {', '.join(names)} is found" if names else "CXX is empty"
    return f"torch.compile needs a C++ compiler, and {tried}; install g++, or name one in CXX"


# What a graph is given on the way forward: (constants, parameters, tangents), (x, its tangents), the context.
_Early = tuple[tuple[Params, ...], tuple[Tensor, ...], Any]


def _first(call: _Call, early: _Early, late: Any) -> tuple[Tensor, Params]:
    """Value | cotangents of the point."""
    ((constants, params), (x,), context), (bar,) = early, late
    leaves = live({**params, X: x})
    with torch.enable_grad():
        y = at(Link({}, call, constants), context)(leaves)
    slopes = grad(y, list(leaves.values()), bar, materialize_grads=True)
    return y.detach(), dict(zip(leaves, slopes))


def _second(call: _Call, early: _Early, late: Any) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Params]]:
    """Value and its tangent | cotangent of x and the tangents of the vjp.

    The jvp comes as the transpose of the vjp: in forward mode torch 2.13 fixes sizes while it traces.
    """
    ((constants, params, along), (x, dots), context), (bar, bardots) = early, late
    leaves, bar = live({**params, X: x}), bar.detach().requires_grad_()
    with torch.enable_grad():
        y = at(Link({}, call, constants), context)(leaves)
        first = grad(y, list(leaves.values()), bar, create_graph=True, materialize_grads=True)
    seeds = [*(along[name] for name in params), dots, bardots]
    *tangents, ydots = pullbacks([*first, y], seeds, [*leaves.values(), bar])
    cotangents = dict(zip(leaves, first))
    return (y.detach(), ydots), (cotangents[X].detach(), dict(zip(leaves, tangents)))


def _late(early: _Early, late: tuple[Tensor, ...], kept: Any) -> Any:
    pair, handed = kept
    with torch.no_grad():
        return pair.late([*_given(early), *_given(late), *handed])


def _at_point(link: Link, point: Params, context: Any, along: Params | None = None) -> _Early:
    if along is None:
        return (dict(link.constants), without(point)), (point[X],), context
    return (dict(link.constants), without(point), without(along)), (point[X], along[X]), context


def _given(operands: Any) -> list[Tensor]:
    return [x.detach().contiguous() for x in tree.leaves(operands)]


def _only(along: Params, k: int) -> Params:
    return {name: x[k : k + 1] for name, x in along.items()}


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _like(names: Shape, other: Tensor) -> Shape:
    """The shape of x, or of tangents of it: all but the last dimension vary."""
    return (*other.shape[: other.dim() - len(names)], *names)


def _around(x: Tensor, names: Shape, other: Tensor) -> Shape:
    """The shape of what goes with x, a mask or rotary embeddings: where it is as large as x at the same place, or as
    long as x anywhere, it varies with x. The place of joined rows, [1, 1, rows, longest] int64, has sizes of its own.
    """
    sizes = x.shape[:-1]
    if other.dtype == torch.int64 and other.dim() == 4:
        return (1, 1, *(name if size > 1 else 1 for name, size in zip(("0", "2"), other.shape[2:])))

    def name(place: int, size: int) -> int | str:
        if size > 1 and place < len(sizes) and sizes[place] == size:
            return names[place]
        return names[-2] if size > 1 and size == sizes[-1] else size

    return tuple(name(place, size) for place, size in enumerate(other.shape))
