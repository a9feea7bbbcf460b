"""Intervals and paired comparisons against scipy, brute force and their own promises."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest

from retrograd.evaluate.intervals import compare, mcnemar, wilson


@pytest.mark.parametrize(("right", "n"), [(0, 6), (3, 11), (240, 240), (217, 868), (1, 1)])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_wilson_is_scipys(right: int, n: int, level: float) -> None:
    expected = binomtest(right, n).proportion_ci(level, method="wilson")
    assert wilson(right, n, level) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_at_the_ends_is_exact() -> None:
    assert wilson(0, 50).low == 0
    assert wilson(50, 50).high == 1


def test_wilson_covers_as_often_as_it_says() -> None:
    right = np.random.default_rng(0).binomial(60, 0.3, 4000)
    covered = np.mean([low <= 0.3 <= high for low, high in (wilson(int(k), 60) for k in right)])
    assert 0.93 < covered < 0.97


@pytest.mark.parametrize("pair", [(0, 0), (0, 1), (5, 5), (1, 7), (30, 12), (200, 260)])
def test_mcnemar_is_the_exact_binomial_test(pair: tuple[int, int]) -> None:
    expected = binomtest(pair[0], sum(pair)).pvalue if sum(pair) else 1.0
    assert mcnemar(*pair) == pytest.approx(expected, rel=1e-10)
    assert mcnemar(*pair) == mcnemar(*pair[::-1])


def test_the_bootstrap_is_that_of_drawing_questions() -> None:
    draw = np.random.default_rng(1)
    a, b = (draw.random(200) < 0.5).astype(float), (draw.random(200) < 0.65).astype(float)
    found = compare(a, b, resamples=20_000)
    places = draw.integers(0, 200, (20_000, 200))
    low, high = np.quantile((b - a)[places].mean(1), [0.025, 0.975])
    assert found.difference == pytest.approx((b - a).mean())
    assert found.interval == pytest.approx((low, high), abs=0.006)
    assert found.only_first == ((a == 1) & (b == 0)).sum()
    assert found.p == mcnemar(found.only_first, found.only_second)


def test_pairing_sees_what_two_intervals_do_not() -> None:
    a = np.tile([1.0, 0.0], 100)
    b = a.copy()
    b[1:17:2] = 1  # eight more right, none lost
    found = compare(a, b)
    assert found.interval.low > 0
    assert found.p < 0.01
    assert wilson(100, 200).high > wilson(108, 200).low


def test_the_same_answers_differ_in_nothing() -> None:
    found = compare([1, 0, 1], [1, 0, 1])
    assert found == (0.0, (0.0, 0.0), 0, 0, 1.0)


def test_swapping_the_models_swaps_the_signs() -> None:
    a, b = [1, 0, 0, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0, 1, 0]
    there, back = compare(a, b), compare(b, a)
    assert there.difference == -back.difference
    assert (there.only_first, there.only_second) == (back.only_second, back.only_first)


def test_a_seed_gives_one_interval() -> None:
    a, b = [1, 0, 0, 1, 1], [0, 1, 1, 1, 0]
    assert compare(a, b, seed=3) == compare(a, b, seed=3)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="at least one question"):
        wilson(0, 0)
    with pytest.raises(ValueError, match="no more right than there are"):
        wilson(3, 2)
    with pytest.raises(ValueError, match="between 0 and 1"):
        wilson(1, 2, 95.0)
    with pytest.raises(ValueError, match="0 or more"):
        mcnemar(-1, 2)
    with pytest.raises(ValueError, match="same questions"):
        compare([1, 0], [1])
    with pytest.raises(ValueError, match="1 of 2 questions have an answer that is neither"):
        compare([1, float("nan")], [1, 0])
    with pytest.raises(ValueError, match="resamples is 0"):
        compare([1], [0], resamples=0)
