"""The setting of an arm at a budget, by bisection of its logarithm: a pure function of what was tried.

A quantity q that grows with the setting (retain damage; forgetting) is to be at its limit:

    below   the largest setting tried with q ≤ limit       match utility: as much change as the damage allows
    above   the smallest setting tried with q ≥ limit      match forgetting: as little change as forgetting takes

Tried are `start`, then the geometric middle of what is known to be on either side, `steps` times at most, and no more
once q is on the right side and within tolerance·limit. A q that is not finite lies above, and is never chosen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

__all__ = ["Chosen", "Goal", "Impossible", "Try", "bisect", "rounded"]


class Goal(NamedTuple):
    """Between which settings, what q is to be, and how exactly."""

    low: float
    high: float
    start: float | None
    steps: int
    limit: float
    tolerance: float
    side: Literal["below", "above"]


class Try(NamedTuple):
    """A setting whose q is not known yet."""

    setting: float


class Chosen(NamedTuple):
    """The setting, its q, and whether q is within tolerance of the limit."""

    setting: float
    value: float
    close: bool


class Impossible(NamedTuple):
    """Why no setting was found."""

    reason: str


def bisect(goal: Goal, known: Mapping[float, float]) -> Try | Chosen | Impossible:
    """What to try next, or the setting.

    Args:
        known: q by setting, of all that was tried.

    >>> bisect(Goal(1e-4, 1e-2, None, 3, 0.1, 0.2, "below"), {0.001: 0.05})
    Try(setting=0.00316228)
    """
    low, high, setting = goal.low, goal.high, goal.start or math.sqrt(goal.low * goal.high)
    best: Chosen | None = None
    for _ in range(goal.steps):
        setting = rounded(setting)
        if setting not in known:
            return Try(setting)
        value = known[setting]
        above = not math.isfinite(value) or value > goal.limit
        right = value <= goal.limit if goal.side == "below" else value >= goal.limit and math.isfinite(value)
        if right:
            close = abs(value - goal.limit) <= goal.tolerance * goal.limit
            best = Chosen(setting, value, close)  # each right one lies nearer to the limit's setting than the last
            if close:
                return best
        if above:
            high = setting
        else:
            low = setting
        setting = math.sqrt(low * high)
    if best is not None:
        return best
    tried = ", ".join(f"{value:.3g} at {setting:.3g}" for setting, value in sorted(known.items()))
    bound = "at most" if goal.side == "below" else "at least"
    return Impossible(f"none of {goal.steps} settings from {goal.low:g} to {goal.high:g} gives {bound} "
                      f"{goal.limit:g} ({tried})")  # fmt: skip


def rounded(setting: float) -> float:
    """To six digits, as it is written in files and names."""
    return float(f"{setting:.6g}")
