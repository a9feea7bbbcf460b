"""Slopes of a function along random directions, by its pullback and by central differences.

    ⟨u, f̄⟩ = (f(x + hu) − f(x − hu))/2h + O(h²) + rounding/h

Rounding is measured. Kinks need a small h, rounding a large one; so several are tried, and one that agrees is enough.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from retrograd.core import tree
from retrograd.core.optim import Params

__all__ = ["Compared", "Slopes", "randomly", "scaled"]

_FINE = (1e-5, 1e-7, 1e-9, 1e-4, 1e-3, 1e-2)  # relative to a leaf's entries, in float64
_COARSE = (1e-2, 3e-3, 1e-3, 3e-4)
_NEAR = {torch.float64: 1e-3, torch.float32: 0.02}  # of the slope's usual size


class Compared(NamedTuple):
    """A slope by the pullback and one by differences, and whether they agree or nothing can be said."""

    pulled: float
    measured: float
    agrees: bool


class Slopes:
    """A function's slopes along directions, by its pullback and by central differences."""

    def __init__(self, value: Callable[[Params], float], point: Params, pulled: Params, draw: torch.Generator) -> None:
        self.value, self.point, self.pulled = value, point, pulled
        dtype = next(iter(point.values())).dtype
        self.sizes = _FINE if dtype == torch.float64 else _COARSE
        self.near = _NEAR[dtype]
        here, grain = value(point), 4 * torch.finfo(dtype).eps
        apart = [{n: x * (1 + grain * randomly(x, draw)) for n, x in point.items()} for _ in range(3)]
        # the change is rounding, or as small
        self.noise = 3 * max(abs(value(one) - here) for one in apart) + torch.finfo(dtype).eps * abs(here)

    def along(self, direction: Params) -> Compared:
        """Agreeing at one size is enough. Where none does, sizes that rounding leaves alone have to agree on another
        slope: at the run's precision kinks and steps give a slope of its own to every size, and nothing can be said.
        """
        pulled = float(sum(torch.sum(u.double() * self.pulled[n].double()) for n, u in direction.items()))
        squares = [float((u.double() * self.pulled[n].double()).square().sum()) for n, u in direction.items()]
        sure: list[float] = []
        for h in self.sizes:
            measured = (self._moved(direction, h) - self._moved(direction, -h)) / (2 * h)
            size, rounding = max(sum(squares) ** 0.5, abs(measured)), self.noise / h
            if rounding > self.near * size:
                continue
            if abs(measured - pulled) <= self.near * size + rounding:
                return Compared(pulled, measured, True)
            sure.append(measured)
        fine = self.sizes is _FINE  # small enough for every kink
        spread = max(sure) - min(sure) if sure else 0.0
        told = bool(sure) and (fine or (len(sure) > 2 and spread <= 0.1 * min(abs(x - pulled) for x in sure)))
        return Compared(pulled, sure[0] if sure else pulled, not told)

    def leaves(self, direction: Params) -> list[str]:
        """Leaves along which alone the slopes differ, the most wrong first."""
        each = {name: self.along({name: u}) for name, u in direction.items()}
        gaps = {name: abs(c.measured - c.pulled) for name, c in each.items() if not c.agrees}
        return sorted(gaps, key=lambda name: -gaps[name]) or list(direction)

    def _moved(self, direction: Params, h: float) -> float:
        moved = {n: torch.add(self.point[n], u, alpha=h) for n, u in direction.items()}
        return self.value({**self.point, **moved})


def scaled(like: Params, least: float, draw: torch.Generator) -> Params:
    """Random directions with the root mean square of each leaf; of a leaf of zeros that of all, or `least`."""
    entries = sum(x.numel() for x in like.values())
    whole = float(tree.norm(like)) / max(1, entries) ** 0.5 or least
    sizes = {name: float(x.double().norm()) / max(1, x.numel()) ** 0.5 or whole for name, x in like.items()}
    return {name: sizes[name] * randomly(x, draw) for name, x in like.items()}


def randomly(like: Tensor, draw: torch.Generator) -> Tensor:
    """Drawn on the host: the same on every device."""
    return torch.randn(like.shape, generator=draw, dtype=torch.float64).to(like)
