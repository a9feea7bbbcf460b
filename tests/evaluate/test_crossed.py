"""Means over seeds and questions with crossed resampling, against plain loops; positions."""

from __future__ import annotations

import numpy as np
import pytest

from retrograd.evaluate.crossed import clustered, crossed, crossed_difference, crossed_position


def test_the_interval_is_that_of_drawing_seeds_and_questions_by_hand() -> None:
    draw = np.random.default_rng(1)
    values, weights = draw.normal(size=(4, 9)), draw.uniform(1, 5, 9)
    found = crossed(values, weights, resamples=20_000)
    means = []
    for _ in range(20_000):
        seeds, questions = draw.integers(0, 4, 4), draw.integers(0, 9, 9)
        means.append(np.average(values[seeds][:, questions].mean(0), weights=weights[questions]))
    assert found.value == pytest.approx(np.average(values.mean(0), weights=weights))
    assert found.low == pytest.approx(np.quantile(means, 0.025), abs=0.03)
    assert found.high == pytest.approx(np.quantile(means, 0.975), abs=0.03)
    of_questions = crossed(values.mean(0)[None], weights)
    assert found.high - found.low > of_questions.high - of_questions.low  # seeds are drawn too


def test_it_covers_the_truth_as_often_as_it_says_or_more() -> None:
    draw, inside = np.random.default_rng(2), 0
    for trial in range(200):
        values = draw.normal(size=(5, 1)) + draw.normal(size=(1, 30)) + draw.normal(size=(5, 30))
        found = crossed(values, resamples=400, seed=trial)
        inside += found.low <= 0 <= found.high
    assert 165 <= inside <= 200  # five seeds: the percentile interval of a mean of five covers about 0.86


def test_positions_lie_between_the_two_models() -> None:
    knows, never = np.ones(40), np.r_[np.ones(10), np.zeros(30)]
    assert crossed_position(np.stack([never, never]), knows, never) == (0, 0, 0)
    assert crossed_position(np.stack([knows, knows]), knows, never) == (1, 1, 1)
    half = np.stack([np.r_[np.ones(25), np.zeros(15)]] * 2)
    found = crossed_position(half, knows, never)
    assert found is not None
    assert found.value == pytest.approx(0.5)
    assert found.low < 0.5 < found.high
    assert crossed_position(half, never, never) is None
    with pytest.raises(ValueError, match="are not finite"):
        crossed(np.array([[np.nan]]))


def test_seeds_of_two_kinds_are_both_drawn() -> None:
    draw = np.random.default_rng(3)
    values = draw.normal(size=(3, 1, 1)) + draw.normal(size=(1, 4, 1)) + draw.normal(size=(3, 4, 8))
    found = crossed(values, resamples=20_000)
    means = []
    for _ in range(20_000):
        models, seeds, questions = draw.integers(0, 3, 3), draw.integers(0, 4, 4), draw.integers(0, 8, 8)
        means.append(values[models][:, seeds][:, :, questions].mean())
    assert found.value == pytest.approx(values.mean())
    assert found[1:] == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.04)


def test_a_difference_draws_models_apart_and_the_rest_together() -> None:
    draw = np.random.default_rng(4)
    shared = 5 * draw.normal(size=(1, 9))  # of the questions: it cancels
    first, second = draw.normal(size=(3, 9)) + shared, draw.normal(size=(4, 9)) + 1 + shared
    found = crossed_difference(first, second, resamples=20_000)
    means = []
    for _ in range(20_000):
        one, two, questions = draw.integers(0, 3, 3), draw.integers(0, 4, 4), draw.integers(0, 9, 9)
        means.append(second[two][:, questions].mean() - first[one][:, questions].mean())
    assert found.value == pytest.approx(second.mean() - first.mean())
    assert found[1:] == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.04)
    assert found.high - found.low < 3  # and would be above 6 if questions were drawn apart


def test_clusters_are_drawn_whole() -> None:
    values, clusters = np.array([[1.0, 1.0, 0.0, 0.0, 0.0]]), np.array(["a", "a", "b", "b", "b"])
    means, sizes = clustered(values, clusters)
    assert crossed(means, sizes).value == pytest.approx(0.4)
    assert crossed(means, sizes)[1:] == (0.0, 1.0)  # one of the two, twice
    with pytest.raises(ValueError, match="at least one of each"):
        crossed(np.ones(3))
