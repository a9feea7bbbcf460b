"""The rules behind replay plans: which state to hold next.

Source: Griewank & Walther, "Algorithm 799: revolve", ACM TOMS 26(1), 2000, doi 10.1145/347837.347846.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

__all__ = ["Rule", "hold_all", "hold_binomial", "hold_middle", "hold_segment", "repeats"]

Rule = Callable[[int, int, int], int | None]
"""(here, last, held) → the next state to hold, at most `last`, or None to advance to `last` and hold nothing more.

`here` is the working state, just held, `last` the next step to reverse and `held` the slots in use.
"""


def hold_all(here: int, last: int, held: int) -> int:
    """Every state."""
    return here + 1


def hold_segment(every: int, here: int, last: int, held: int) -> int:
    """Bases below the segment of `last`, and every state within it."""
    return here + 1 if here >= last // every * every else here + every


def hold_middle(here: int, last: int, held: int) -> int | None:
    """The state in the middle."""
    middle = (here + last + 1) // 2
    return middle if middle < last else None


def hold_binomial(slots: int, here: int, last: int, held: int) -> int | None:
    """The next state of the plan of fewest advances with `slots`, those held among them."""
    length = _binomial_length(last + 1 - here, slots - held + 1)  # slots - held are free, and `here` has its own
    return here + length if here + length < last else None


@lru_cache(maxsize=1 << 16)
def _binomial_length(steps: int, slots: int) -> int:
    """How far to advance before the next snapshot, to reverse `steps` ≥ 2 steps with `slots`.

    Every m is optimal that leaves the left part, of m steps, one repeat fewer than the right part, which has one slot
    fewer. This is the m of Griewank & Walther (p. 34), which takes the fewest snapshots too.
    """
    if slots == 1:
        return steps - 1  # no slot for a snapshot; and no need to count up to r = steps - 1
    times = repeats(steps, slots)
    if times == 1:
        return 1  # a slot for every state
    least, most = math.comb(slots + times - 2, slots), math.comb(slots + times - 1, slots)
    right = math.comb(slots + times - 2, slots - 1) + math.comb(slots + times - 3, slots - 2)
    return min(max(least, steps - right), most)


def repeats(steps: int, slots: int) -> int:
    """The least r with C(slots + r, slots) ≥ steps: how often any one step is taken at most."""
    times, reach = 0, 1
    while reach < steps:
        times += 1
        reach = reach * (slots + times) // times
    return times
