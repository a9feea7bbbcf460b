"""Bisection of a setting, against looking at all of a grid."""

from __future__ import annotations

import math
import random

import pytest

from retrograd.experiment.tune import Chosen, Goal, Impossible, Try, bisect


def searched(goal: Goal, q) -> tuple[Chosen | Impossible, dict[float, float]]:
    known: dict[float, float] = {}
    while isinstance(step := bisect(goal, known), Try):
        assert step.setting not in known
        known[step.setting] = q(step.setting)
    return step, known


@pytest.mark.parametrize("side", ["below", "above"])
@pytest.mark.parametrize("seed", range(5))
def test_it_ends_within_a_step_of_the_exact_setting(side, seed: int) -> None:
    draw = random.Random(seed)
    power, scale = draw.uniform(0.5, 3), draw.uniform(0.5, 50)
    goal = Goal(1e-4, 1.0, None, 12, 0.1, 0.0, side)
    found, known = searched(goal, lambda x: scale * x**power)
    exact = (0.1 / scale) ** (1 / power)
    assert len(known) == 12
    width = 1e4 ** (1 / 2**11)  # what twelve halvings leave of four decades
    assert isinstance(found, Chosen)
    ratio = exact / found.setting if side == "below" else found.setting / exact
    assert 1 - 1e-4 <= ratio <= width
    right = [x for x, value in known.items() if (value <= 0.1 if side == "below" else value >= 0.1)]
    assert found.setting == (max(right) if side == "below" else min(right))


def test_it_stops_when_it_is_close_enough_and_starts_where_told() -> None:
    found, known = searched(Goal(1e-4, 1.0, 0.1, 12, 0.1, 0.2, "below"), lambda x: 0.9 * x)
    assert found == Chosen(0.1, pytest.approx(0.09), True)
    assert list(known) == [0.1]


def test_what_is_not_finite_lies_above_and_is_never_chosen() -> None:
    found, _ = searched(Goal(1e-4, 1.0, None, 10, 0.1, 0.0, "above"), lambda x: x if x < 0.3 else math.nan)
    assert isinstance(found, Chosen)
    assert 0.1 <= found.setting < 0.3


def test_none_is_told_with_what_was_tried() -> None:
    found, _ = searched(Goal(0.1, 1.0, None, 2, 0.01, 0.2, "below"), lambda x: x)
    assert isinstance(found, Impossible)
    assert "none of 2 settings from 0.1 to 1 gives at most 0.01" in found.reason
    found, _ = searched(Goal(0.1, 1.0, None, 3, 2.0, 0.2, "below"), lambda x: x)
    assert isinstance(found, Chosen)
    assert not found.close  # all are allowed, the largest tried is taken
