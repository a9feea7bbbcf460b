"""What accuracies allow one to say: intervals, and comparisons of two models on the same questions.

    Wilson        the shares p that a test of level α would not reject: |p̂ − p| ≤ z·√(p(1−p)/n)
    difference    mean(b − a) over questions, with the bootstrap's percentile interval: questions are drawn again
    McNemar       of the questions that only one model has right, is each model's share a half? Exact, by binomial
    position      (p − p₀)/(p₁ − p₀) between a model that never knew (0) and one that knows (1), by the same bootstrap

Sources: Wilson, JASA 22 (1927) 209; Efron & Tibshirani, An Introduction to the Bootstrap (1993), chapter 13; McNemar,
Psychometrika 12 (1947) 153, in the exact form.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Compared", "Estimate", "Interval", "Position", "compare", "mcnemar", "position", "wilson"]


class Interval(NamedTuple):
    """low ≤ high, both in the quantity's own unit."""

    low: float
    high: float


class Estimate(NamedTuple):
    """low ≤ high, in the quantity's own unit."""

    value: float
    low: float
    high: float

    def told(self, scale: float = 1.0, digits: int = 1) -> str:
        """value [low, high]."""
        value, low, high = (f"{scale * x:.{digits}f}" for x in self)
        return f"{value} [{low}, {high}]"


class Compared(NamedTuple):
    """Two models on the same questions.

    difference: accuracy of the second minus that of the first, in [−1, 1]; interval: its bootstrap interval.
    only_first, only_second: questions that only this model has right.
    p: exact two-sided p-value of McNemar's test.
    """

    difference: float
    interval: Interval
    only_first: int
    only_second: int
    p: float


class Position(NamedTuple):
    """Where a model stands: 0 with the model that never knew, 1 with the one that knows; outside is possible.

    gap: accuracy of the model that knows minus that of the one that does not.
    """

    position: float
    interval: Interval
    gap: float


def wilson(right: int, n: int, level: float = 0.95) -> Interval:
    """Wilson's interval of a share.

    Raises:
        ValueError: If there is no question, or the counts or the level are none.

    >>> [round(end, 3) for end in wilson(5, 10)]
    [0.237, 0.763]
    """
    if not 0 <= right <= n or n < 1:
        raise ValueError(f"{right} right of {n}: a share needs at least one question, and no more right than there are")
    z, share = NormalDist().inv_cdf((1 + _checked(level)) / 2), right / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    # at 0 and n of n the end is exact, whatever the rounding
    return Interval(0.0 if right == 0 else middle - half, 1.0 if right == n else middle + half)


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided p-value: min(1, 2·P[X ≤ the smaller]) for X binomial(both together, ½); 1 if there is none.

    >>> mcnemar(1, 7)
    0.0703125
    """
    if min(only_first, only_second) < 0:
        raise ValueError(f"{only_first} and {only_second} questions: counts are 0 or more")
    n, fewer = only_first + only_second, min(only_first, only_second)
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(fewer + 1)) / 2**n)


def compare(first: Any, second: Any, *, resamples: int = 10_000, level: float = 0.95, seed: int = 0) -> Compared:
    """Compare two models by which of the same questions they have right.

    Args:
        first: For each question 1 if the first model is right, else 0, [n]: a list, array or tensor, such as
            `Scored.correct`.
        second: The same for the second model, question by question.
        resamples: Of the bootstrap.
        level: Of its interval.
        seed: Of the resampling.
    Raises:
        ValueError: If the questions are not the same in number, there is none, or an answer is missing (NaN).
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise ValueError(f"answers of shapes {a.shape} and {b.shape} are not of the same questions; at least one")
    bad = int((~(np.isin(a, (0, 1)) & np.isin(b, (0, 1)))).sum())
    if bad:
        raise ValueError(
            f"{bad} of {len(a)} questions have an answer that is neither right (1) nor wrong (0). A failed question "
            "is missing: leave it out for both models, and say so"
        )
    if resamples < 1:
        raise ValueError(f"resamples is {resamples}; it has to be at least 1")
    n, only_a, only_b = len(a), int(((a == 1) & (b == 0)).sum()), int(((a == 0) & (b == 1)).sum())
    # a difference is −1, 0 or 1, so drawing n questions is drawing how many there are of each
    shares = [only_a / n, only_b / n, (n - only_a - only_b) / n]
    drawn = np.random.default_rng(seed).multinomial(n, shares, size=resamples)
    tail = (1 - _checked(level)) / 2
    low, high = np.quantile((drawn[:, 1] - drawn[:, 0]) / n, [tail, 1 - tail])
    interval = Interval(float(low), float(high))
    return Compared((only_b - only_a) / n, interval, only_a, only_b, mcnemar(only_a, only_b))


def position(
    model: Any, knows: Any, never: Any, *, resamples: int = 10_000, level: float = 0.95, seed: int = 0
) -> Position | None:
    """Where a model stands between two others, by which of the same questions each has right.

    Args:
        model, knows, never: For each question 1 if this model is right, else 0, [n].
    Returns:
        None if the gap is not positive in all but (1 − level)/2 of the resamples: nothing to stand between.
    Raises:
        ValueError: If the questions are not the same in number, there is none, or an answer is missing (NaN).
    """
    gap = compare(never, knows, resamples=resamples, level=level, seed=seed)
    compare(never, model, resamples=1, level=level)  # the same refusals
    if gap.interval.low <= 0:
        return None
    x, a, b = (np.asarray(right, dtype=np.float64) for right in (model, knows, never))
    # a question is one of eight patterns; drawing n questions is drawing how many there are of each
    pattern = (4 * x + 2 * a + b).astype(np.int64)
    shares = np.bincount(pattern, minlength=8) / len(x)
    drawn = np.random.default_rng(seed).multinomial(len(x), shares, size=resamples)
    rights = [drawn[:, [k for k in range(8) if k >> bit & 1]].sum(1) for bit in (2, 1, 0)]
    gaps = rights[1] - rights[2]
    there = gaps > 0
    tail = (1 - level) / 2
    low, high = np.quantile((rights[0] - rights[2])[there] / gaps[there], [tail, 1 - tail])
    share = float((x.mean() - b.mean()) / (a.mean() - b.mean()))
    return Position(share, Interval(float(low), float(high)), gap.difference)


def _checked(level: float) -> float:
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; it has to be between 0 and 1, such as 0.95")
    return level
