"""The passes over a link, compiled: one compilation of each for all links that share one `call`.

Forward, vjp, jvp and the vjp's tangent are each one graph (`torch.compile`, fullgraph) with the link's parameters as
inputs. The last is the pullback of the vjp, as in eager; the compiler then drops what nothing asks for, the parameters'
own gradient among it. Links with a function of their own (the final norm) stay eager.

Every shape of batch has a compilation of its own, so what serves a batch does not depend on the batches before it: a
replay, in this process or another, has the same bits. One compilation for all lengths is not on offer: with torch 2.13
the sizes of cotangents and tangents are fixed when they are first seen, whatever `dynamic` says.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp, vjp, vmap

from retrograd.core import tree
from retrograd.core.engine.blocks import Eager, Link
from retrograd.core.optim import Params

__all__ = ["Compiled", "no_compiler"]

_X = ""  # the key of x in a point
_CHUNK = 8  # tangents at once
_LIMIT = 64  # compilations of one function before the compiler gives up, which is an error


class Compiled:
    """Passes over links, compiled where a `call` serves two links or more.

    graphs: compilations so far.
    """

    def __init__(self, links: Sequence[Link]) -> None:
        self.graphs = 0
        self._eager = Eager()
        uses = Counter(link.call for link in links)
        self.calls = {call for call, count in uses.items() if count > 1}
        passes: list[Callable[..., Any]] = [_forward, _vjp, _jvp, _jvps, _vjp_along, _vjps_along]
        self._passes = {
            each: torch.compile(each, fullgraph=True, dynamic=False, backend=self._backend) for each in passes
        }

    def forward(self, link: Link, point: Params, context: Any) -> Tensor:
        if link.call not in self.calls:
            return self._eager.forward(link, point, context)
        return self._run(_forward, link, point, context)

    def vjp(self, link: Link, point: Params, context: Any, bar: Tensor) -> Params:
        if link.call not in self.calls:
            return self._eager.vjp(link, point, context, bar)
        return self._run(_vjp, link, point, context, bar)

    def jvp(self, link: Link, point: Params, context: Any, along: Params) -> tuple[Tensor, Tensor]:
        if link.call not in self.calls:
            return self._eager.jvp(link, point, context, along)
        found = [self._run(_jvp if one else _jvps, link, point, context, part) for one, part in _chunks(along)]
        return found[0][0], _joined([dots for _, dots in found], len(along[_X]))

    def vjp_along(
        self, link: Link, point: Params, context: Any, along: Params, bar: Tensor, bardots: Tensor
    ) -> tuple[Tensor, Params]:
        if link.call not in self.calls:
            return self._eager.vjp_along(link, point, context, along, bar, bardots)
        seeds = {"bar": bardots, **{f"point {name}": x for name, x in along.items()}}
        parts = []
        for one, part in _chunks(seeds):
            dots = part.pop("bar")
            tangents = {name.removeprefix("point "): x for name, x in part.items()}
            parts.append(self._run(_vjp_along if one else _vjps_along, link, point, context, tangents, bar, dots))
        return parts[0][0], {name: _joined([found[name] for _, found in parts], len(bardots)) for name in point}

    def _run(self, function: Callable[..., Any], link: Link, point: Params, *others: Any) -> Any:
        # views are compiled for the tensor that they are a view of: the compiler gets none
        operands: list[Any] = tree.map(lambda x: x.data, [dict(link.constants), point, *others])
        limits = torch._dynamo.config.patch(recompile_limit=_LIMIT, accumulated_recompile_limit=100 * _LIMIT)
        with torch.no_grad(), limits:
            return self._passes[function](link.call, *operands)

    def _backend(self, graph: Any, inputs: Any, **options: Any) -> Any:
        from torch._inductor.compile_fx import compile_fx

        self.graphs += 1
        return compile_fx(graph, inputs, **options)


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
    return (
        f"torch.compile needs a C++ compiler, and none of {', '.join(names)} is found; install g++, or name one in CXX"
    )


def _chunks(tangents: Params) -> list[tuple[bool, Params]]:
    """Tangents [K, …] in chunks; a single one without its first dimension, and True."""
    count = len(next(iter(tangents.values())))
    if count == 1:
        return [(True, {name: x[0] for name, x in tangents.items()})]
    starts = range(0, count, _CHUNK)
    return [(False, {name: x[start : start + _CHUNK] for name, x in tangents.items()}) for start in starts]


def _joined(parts: list[Tensor], count: int) -> Tensor:
    if count == 1:
        return parts[0].unsqueeze(0)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


_Call = Callable[[Params, Any, Any], Any]


def _forward(call: _Call, constants: Params, point: Params, context: Any) -> Tensor:
    params = {name: x for name, x in point.items() if name != _X}
    return call({**constants, **params}, point[_X], context)


def _vjp(call: _Call, constants: Params, point: Params, context: Any, bar: Tensor) -> Params:
    pull: Any = vjp(lambda at: _forward(call, constants, at, context), point)[1]
    return pull(bar)[0]


def _jvp(call: _Call, constants: Params, point: Params, context: Any, along: Params) -> tuple[Tensor, Tensor]:
    found: Any = jvp(lambda at: _forward(call, constants, at, context), (point,), (along,))
    return found


def _jvps(call: _Call, constants: Params, point: Params, context: Any, along: Params) -> tuple[Tensor, Tensor]:
    y = _forward(call, constants, point, context)
    return y, vmap(lambda one: _jvp(call, constants, point, context, one)[1])(along)


def _pull(call: _Call, constants: Params, point: Params, context: Any, bar: Tensor) -> tuple[Tensor, Any]:
    def both(at: Params) -> tuple[Tensor, Params]:
        found: Any = vjp(lambda inner: _forward(call, constants, inner, context), at)
        y, pull = found
        return y, pull(bar)[0]

    found: Any = vjp(both, point)
    (_, first), pull = found
    return first[_X], pull


def _vjp_along(
    call: _Call, constants: Params, point: Params, context: Any, along: Params, bar: Tensor, bardots: Tensor
) -> tuple[Tensor, Params]:
    back, pull = _pull(call, constants, point, context, bar)
    return back, pull((bardots, along))[0]


def _vjps_along(
    call: _Call, constants: Params, point: Params, context: Any, along: Params, bar: Tensor, bardots: Tensor
) -> tuple[Tensor, Params]:
    back, pull = _pull(call, constants, point, context, bar)
    return back, vmap(lambda dots, one: pull((dots, one))[0])(bardots, along)
