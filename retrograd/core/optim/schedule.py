"""Learning-rate schedules as data: lr_t as a function of the step t.

With W warmup steps, T total steps and p = (t − W)/(T − W):

    constant    lr                             linear      lr·(1 − p)
    cosine      lr·½(1 + cos πp)               polynomial  lr·(1 − p)^power
    one-cycle   lr/25 → lr over W, then lr → lr/250,000, both along a half cosine

The first four rise as lr·t/W during warmup, as transformers' schedules do; one-cycle is torch's `OneCycleLR`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["SCHEDULES", "Schedule"]

SCHEDULES = ("constant", "linear", "cosine", "polynomial", "one-cycle")


@dataclass(frozen=True)
class Schedule:
    """Learning rate by step; call it with a step t in [0, total_steps).

    Args:
        kind: One of `SCHEDULES`.
        lr: Peak learning rate.
        total_steps: Length of the run, T.
        warmup_steps: W, fewer than T.
        power: Exponent of "polynomial".
    Raises:
        ValueError: If the kind is unknown, the rate negative or not finite, or the step counts do not fit.

    >>> Schedule("linear", 1.0, total_steps=4)(1)
    0.75
    """

    kind: str
    lr: float
    total_steps: int
    warmup_steps: int = 0
    power: float = 2.0

    def __post_init__(self) -> None:
        if self.kind not in SCHEDULES:
            raise ValueError(f"unknown learning-rate schedule {self.kind!r}; the schedules are {', '.join(SCHEDULES)}")
        if not (math.isfinite(self.lr) and self.lr >= 0):
            raise ValueError(f"learning rate is {self.lr}; it has to be a finite number, 0 or more")
        if self.total_steps < 1 or not 0 <= self.warmup_steps < self.total_steps:
            raise ValueError(
                f"{self.warmup_steps} warmup steps of {self.total_steps} in all: warmup has to be shorter than the run"
            )

    def __call__(self, step: int) -> float:
        if self.kind == "one-cycle":
            return self._one_cycle(step)
        if step < self.warmup_steps:
            return self.lr * step / self.warmup_steps
        progress = min(1.0, (step - self.warmup_steps) / (self.total_steps - self.warmup_steps))
        match self.kind:
            case "linear":
                return self.lr * (1 - progress)
            case "cosine":
                return self.lr * 0.5 * (1 + math.cos(math.pi * progress))
            case "polynomial":
                return self.lr * (1 - progress) ** self.power
        return self.lr

    def _one_cycle(self, step: int) -> float:
        top = self.warmup_steps - 1.0  # OneCycleLR reaches its peak at pct_start·T − 1 and its end at T − 1
        low, end = self.lr / 25, self.lr / 25 / 1e4
        if step <= top:
            return _half_cosine(low, self.lr, step / top if top else 1.0)
        return _half_cosine(self.lr, end, (step - top) / (self.total_steps - 1 - top))


def _half_cosine(start: float, stop: float, progress: float) -> float:
    return stop + (start - stop) / 2 * (1 + math.cos(math.pi * progress))
