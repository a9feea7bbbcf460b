"""Learning-rate schedules as data: lr_t as a function of the step t.

With W warmup steps, T total steps, p = (t − W)/(T − W), the rate a where warmup begins and z where the decay ends:

    constant    lr                             linear      z + (lr − z)·(1 − p)
    cosine      z + (lr − z)·½(1 + cos πp)     polynomial  z + (lr − z)·(1 − p)^power
    one-cycle   a → lr over W, then lr → z, both along a half cosine
    one-cycle-linear                           the same, along straight lines

The first four rise as a + (lr − a)·t/W during warmup, with a and z 0 as in transformers' schedules, unless given; the
others are torch's `OneCycleLR`, with a = lr/25 and z = a/10,000 unless given.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

__all__ = ["SCHEDULES", "Schedule"]

SCHEDULES = ("constant", "linear", "cosine", "polynomial", "one-cycle", "one-cycle-linear")


@dataclass(frozen=True)
class Schedule:
    """Learning rate by step; call it with a step t in [0, total_steps).

    Args:
        kind: One of `SCHEDULES`.
        lr: Peak learning rate.
        total_steps: Length of the run, T.
        warmup_steps: W, fewer than T.
        power: Exponent of "polynomial".
        start: Learning rate at the first step of the warmup, a.
        end: Learning rate that the decay ends at, z: one-cycle at step T − 1, the others at step T.
    Raises:
        ValueError: If the kind is unknown, a rate negative, not finite or above the peak, the step counts do not fit,
            or there is no warmup to start or no decay to end.

    >>> Schedule("linear", 1.0, total_steps=4)(1)
    0.75
    """

    kind: str
    lr: float
    total_steps: int
    warmup_steps: int = 0
    power: float = 2.0
    start: float | None = field(default=None, metadata={"later": True})
    end: float | None = field(default=None, metadata={"later": True})

    def __post_init__(self) -> None:
        if self.kind not in SCHEDULES:
            raise ValueError(f"unknown learning-rate schedule {self.kind!r}; the schedules are {', '.join(SCHEDULES)}")
        if not (math.isfinite(self.lr) and self.lr >= 0):
            raise ValueError(f"learning rate is {self.lr}; it has to be a finite number, 0 or more")
        if self.total_steps < 1 or not 0 <= self.warmup_steps < self.total_steps:
            raise ValueError(
                f"{self.warmup_steps} warmup steps of {self.total_steps} in all: warmup has to be shorter than the run"
            )
        for name, rate in (("starts", self.start), ("ends", self.end)):
            if rate is not None and not 0 <= rate <= self.lr:
                raise ValueError(f"the learning rate {name} at {rate}; it has to be from 0 to its peak, {self.lr}")
        if self.start is not None and not self.warmup_steps:
            raise ValueError(f"the learning rate is to start at {self.start}, and there is no step of warmup to do so")
        if self.end is not None and self.kind == "constant":
            raise ValueError(f"the learning rate is to end at {self.end}, and a constant one has no decay to end")

    def __call__(self, step: int) -> float:
        if self.kind.startswith("one-cycle"):
            return self._one_cycle(step, _half_cosine if self.kind == "one-cycle" else _line)
        start, end = self.start or 0.0, self.end or 0.0
        if step < self.warmup_steps:
            return (self.lr - start) * step / self.warmup_steps + start
        progress = min(1.0, (step - self.warmup_steps) / (self.total_steps - self.warmup_steps))
        match self.kind:
            case "linear":
                return (self.lr - end) * (1 - progress) + end
            case "cosine":
                return (self.lr - end) * 0.5 * (1 + math.cos(math.pi * progress)) + end
            case "polynomial":
                return (self.lr - end) * (1 - progress) ** self.power + end
        return self.lr

    def _one_cycle(self, step: int, along: Callable[[float, float, float], float]) -> float:
        top = self.warmup_steps - 1.0  # OneCycleLR reaches its peak at pct_start·T − 1 and its end at T − 1
        low = self.lr / 25 if self.start is None else self.start
        end = low / 1e4 if self.end is None else self.end
        if step <= top:
            return along(low, self.lr, step / top if top else 1.0)
        return along(self.lr, end, (step - top) / (self.total_steps - 1 - top))


def _half_cosine(start: float, stop: float, progress: float) -> float:
    return stop + (start - stop) / 2 * (1 + math.cos(math.pi * progress))


def _line(start: float, stop: float, progress: float) -> float:
    return start + (stop - start) * progress
