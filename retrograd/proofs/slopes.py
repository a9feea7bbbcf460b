"""Slopes of a function by central differences: along random directions, beside its pullback; or to the last digit.

    ⟨u, f̄⟩ = (f(x + hu) − f(x − hu))/2h + O(h²) + rounding/h

Rounding is measured. Kinks need a small h, rounding a large one; so several are tried, and one that agrees is enough.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from retrograd.core import tree
from retrograd.core.optim import Params

__all__ = ["Compared", "Draws", "Measured", "Slopes", "extrapolated_slope", "scaled"]

_FINE = (1e-5, 1e-7, 1e-9, 1e-4, 1e-3, 1e-2)  # relative to a leaf's entries, in float64
_COARSE = (1e-2, 3e-3, 1e-3, 3e-4)
_EACH = 8  # leaves that are tried one by one
_NEAR = {torch.float64: 1e-3, torch.float32: 0.02}  # of the slope's usual size


class Compared(NamedTuple):
    """A slope by the pullback and one by differences, and whether they agree or nothing can be said."""

    pulled: float
    measured: float
    agrees: bool


class Measured(NamedTuple):
    """A slope measured by retraining, [K], with its uncertainty [K]; retrainings it took."""

    slope: Tensor
    uncertainty: Tensor
    trainings: int


class Draws:
    """Random numbers by a leaf's name and how often it was asked: those of a piece are its own, wherever it lies."""

    def __init__(self) -> None:
        self._asked = Counter[str]()

    def like(self, name: str, x: Tensor) -> Tensor:
        """The next of a leaf, of its shape. Drawn on the host: the same on every device."""
        self._asked[name] += 1
        seed = hashlib.blake2b(f"{name}/{self._asked[name]}".encode(), digest_size=7).digest()
        draw = torch.Generator().manual_seed(int.from_bytes(seed))
        return torch.randn(x.shape, generator=draw, dtype=torch.float64).to(x)


class Slopes:
    """A function's slopes along directions, by its pullback and by central differences."""

    def __init__(self, value: Callable[[Params], float], point: Params, pulled: Params, draw: Draws) -> None:
        self.value, self.point, self.pulled = value, point, pulled
        dtype = next(iter(point.values())).dtype
        self.sizes = _FINE if dtype == torch.float64 else _COARSE
        self.near = _NEAR[dtype]
        here, grain = value(point), 4 * torch.finfo(dtype).eps
        # the change is rounding, or as small; one moved copy at a time, each as large as the model
        apart = max(
            abs(value({n: x * (1 + grain * draw.like(n, x)) for n, x in point.items()}) - here) for _ in range(3)
        )
        self.noise = 3 * apart + torch.finfo(dtype).eps * abs(here)

    def along(self, direction: Params) -> Compared:
        """Agreeing at one size is enough. Where none does, sizes that rounding leaves alone have to agree on another
        slope: at the run's precision kinks and steps give a slope of its own to every size, and nothing can be said.
        """
        sums = [_sums(u.double() * self.pulled[n].double()) for n, u in direction.items()]  # leaf by leaf
        pulled, square = tree.total(torch.tensor(sums, dtype=torch.float64).sum(0)).tolist()
        sure: list[float] = []
        for h in self.sizes:
            measured = (self._moved(direction, h) - self._moved(direction, -h)) / (2 * h)
            size, rounding = max(square**0.5, abs(measured)), self.noise / h
            if rounding > self.near * size:
                continue
            if abs(measured - pulled) <= self.near * size + rounding:
                return Compared(pulled, measured, True)
            sure.append(measured)
        fine = self.sizes is _FINE  # small enough for every kink
        spread = max(sure) - min(sure) if sure else 0.0
        certain = bool(sure) and (fine or (len(sure) > 2 and spread <= 0.1 * min(abs(x - pulled) for x in sure)))
        return Compared(pulled, sure[0] if sure else pulled, not certain)

    def leaves(self, direction: Params) -> list[str]:
        """Leaves along which alone the slopes differ, the most wrong first; of many leaves one, found by halves."""
        if len(direction) > _EACH:
            names = list(direction)
            half = {name: direction[name] for name in names[: len(names) // 2]}
            if self.along(half).agrees:
                half = {name: direction[name] for name in names[len(names) // 2 :]}
            return self.leaves(half)
        each = {name: self.along({name: u}) for name, u in direction.items()}
        gaps = {name: abs(c.measured - c.pulled) for name, c in each.items() if not c.agrees}
        return sorted(gaps, key=lambda name: -gaps[name]) or list(direction)

    def _moved(self, direction: Params, h: float) -> float:
        moved = {n: torch.add(self.point[n], u, alpha=h) for n, u in direction.items()}
        return self.value({**self.point, **moved})


def _sums(terms: Tensor) -> tuple[float, float]:
    return float(terms.sum()), float(terms.square().sum())


def extrapolated_slope(
    values: Callable[[float], Tensor], sizes: Sequence[float], noise: float, goal: Tensor, expected: Tensor
) -> Measured:
    """dφ/dh at 0 from central differences D(h) at falling h, extrapolated to h = 0.

        E_i = D_i + (D_i − D_{i−1})/(f − 1), f = (h_{i−1}/h_i)²        uncertainty |E_i − E_{i−1}| + noise·|φ|/h_i

    A rough φ has another slope at a larger scale, and differences that agree there would be sure of a wrong one. So a
    size counts only where D_{i−1} − D_{i−2} is f times D_i − D_{i−1}, give or take 1.7, or both are rounding, and no
    later D is farther from E_i. It stops early only at the slope expected; another one has to outlast every size. And
    since a few rough differences now and then agree by chance, another one has to have two sizes in a row that count,
    is measured again at the sizes in between, and is no surer than the two are near, or than |D_i − D_{i−2}| of either.
    Richardson, Phil. Trans. R. Soc. A 210 (1911) 307.

    Args:
        values: h → φ [K] at that place.
        sizes: Falling h, each the same multiple of the next; at least three.
        noise: Rounding error to be expected of a value of φ, relative to it.
        goal: Uncertainty that is good enough, [K] float64.
        expected: Slope at which an early stop is allowed, [K] float64, within twice the goal.
    Returns:
        The surest slopes; where no size counts their uncertainty is infinite.

    >>> goal = torch.zeros(1, dtype=torch.float64)
    >>> extrapolated_slope(lambda h: goal.new_tensor([h]).sin(), (0.04, 0.02, 0.01), 1e-16, goal, goal + 1).slope
    tensor([1.0000], dtype=torch.float64)
    """
    first, spread = _ladder(values, sizes, noise, goal, expected)
    apart = (first.slope - expected).abs()
    doubted = torch.isfinite(first.uncertainty) & (apart > torch.maximum(2 * goal, first.uncertainty))
    if not doubted.any():
        return first
    between = (sizes[1] / sizes[0]) ** 0.5
    second, other = _ladder(values, [h * between for h in sizes], noise, goal, expected)
    distance = (first.slope - second.slope).abs()
    widest = torch.stack([first.uncertainty, second.uncertainty, distance, spread, other]).amax(0)
    uncertainty = torch.where(doubted, widest, first.uncertainty)
    return Measured(first.slope, uncertainty, first.trainings + second.trainings)


def _ladder(
    values: Callable[[float], Tensor], sizes: Sequence[float], noise: float, goal: Tensor, expected: Tensor
) -> tuple[Measured, Tensor]:
    """The surest extrapolation along one ladder of sizes, and how far its differences are apart, [K].

    These are infinitely far apart where no two sizes in a row count.
    """
    factor, spread = (sizes[0] / sizes[1]) ** 2, goal * 0
    counted = settled = torch.zeros_like(goal, dtype=torch.bool)
    slope, uncertainty, distance = goal * 0, torch.full_like(goal, torch.inf), goal * 0
    differences: list[Tensor] = []
    for h in sizes:
        ahead, behind = values(h).to(goal), values(-h).to(goal)
        differences.append((ahead - behind) / (2 * h))
        if len(differences) < 3:
            continue
        before, last, now = differences[-3:]
        rounding = noise * torch.maximum(ahead.abs(), behind.abs()) / h
        uncertainty[(now - slope).abs() > distance + rounding + uncertainty] = torch.inf
        earlier, later = last - before, now - last
        smooth = (earlier / later / factor).log().abs() <= math.log(1.7)  # NaN for opposite signs: not smooth
        counts = smooth | (torch.maximum(earlier.abs(), later.abs()) <= rounding)
        settled, counted = settled | (counts & counted), counts
        extrapolated = now + later / (factor - 1)
        error = (extrapolated - last - earlier / (factor - 1)).abs() + rounding
        better = counts & (error < uncertainty)
        slope, uncertainty = torch.where(better, extrapolated, slope), torch.where(better, error, uncertainty)
        distance = torch.where(better, (now - extrapolated).abs(), distance)
        spread = torch.where(better, (now - before).abs(), spread)
        if ((uncertainty <= goal) & ((slope - expected).abs() <= 2 * goal)).all():
            break
    return Measured(slope, uncertainty, 2 * len(differences)), torch.where(settled, spread, torch.inf)


def scaled(like: Params, least: float, draw: Draws) -> Params:
    """Random directions with the root mean square of each leaf; of a leaf of zeros that of all, or `least`."""
    entries = float(tree.total(torch.tensor(sum(x.numel() for x in like.values()))))
    whole = float(tree.norm(like)) / max(1, entries) ** 0.5 or least
    sizes = {name: float(x.double().norm()) / max(1, x.numel()) ** 0.5 or whole for name, x in like.items()}
    return {name: sizes[name] * draw.like(name, x) for name, x in like.items()}
