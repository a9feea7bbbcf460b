"""What attacks bring back, by hand-made numbers."""

from __future__ import annotations

import numpy as np
import pytest

from retrograd.attack import recovery
from retrograd.attack.recovery import Reached, resampled

N = 40
BASE = np.ones(N)
STEPS = [0, 1, 2, 5, 10]


def rights(*counts: int | None, n: int = N) -> np.ndarray:
    """Evaluations with so many right answers, the first questions; None: it failed."""
    rows = [np.full(n, np.nan) if count is None else (np.arange(n) < count).astype(float) for count in counts]
    return np.stack(rows)


def test_shares_of_the_gap_are_what_the_hand_finds() -> None:
    assert recovery.recovered(rights(10, 25, 40), BASE).tolist() == [0.0, 0.5, 1.0]
    assert np.isnan(recovery.recovered(rights(10, None, 40), BASE)).tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("counts", "q", "expected"),
    [
        ((10, 12, 30, 31, 40), 0.5, Reached(2, 1)),  # R = 0.07, 0.67, 0.7, 1
        ((10, 12, 30, 31, 40), 0.9, Reached(None, 5, unconfirmed=True)),  # only the last, and nothing agrees
        ((10, 30, 12, 31, 40), 0.5, Reached(5, 2)),  # step 1 is contradicted by step 2
        ((10, 12, 13, 14, 15), 0.5, Reached(None, 10)),  # never: beyond the last evaluation
        ((10, 30, 31, 32, 33), 0.5, Reached(1, 0)),
        ((10, None, 30, None, 32), 0.5, Reached(2, 0)),  # what is missing neither agrees nor fails
        ((10, 12, 30, None, None), 0.5, Reached(None, 1, unconfirmed=True)),
    ],
)
def test_the_step_of_recovery(counts: tuple[int | None, ...], q: float, expected: Reached) -> None:
    assert recovery.recovery_step(STEPS, rights(*counts), BASE, q) == expected


def test_the_last_evaluation_of_an_attack_needs_none_after_it() -> None:
    late, failed = rights(10, 12, 13, 14, 40), rights(10, 12, 13, 40, None)
    assert recovery.recovery_step(STEPS, late, BASE, 0.5) == Reached(None, 5, unconfirmed=True)
    assert recovery.recovery_step(STEPS, late, BASE, 0.5, ended=True) == Reached(10, 5)
    assert recovery.recovery_step(STEPS, failed, BASE, 0.5, ended=True) == Reached(None, 2, unconfirmed=True)
    assert recovery.recovery_step(STEPS, rights(10, 30, 12, 13, 14), BASE, 0.5, ended=True) == Reached(None, 10)


def test_a_rise_that_chance_explains_is_no_recovery() -> None:
    """R is above a half, but 6 of 10 has a lower end of 31 %, below the 40 % of the start."""
    base = np.r_[np.ones(7), np.zeros(3)]
    few = rights(4, 6, 6, n=10)
    assert recovery.recovered(few, base)[1] > 0.5
    assert recovery.recovery_step([0, 1, 2], few, base, 0.5) == Reached(None, 2)
    many = rights(160, 240, 240, n=400)
    assert recovery.recovery_step([0, 1, 2], many, np.repeat(base, 40), 0.5) == Reached(1, 0)


def test_one_question_has_no_standard_error() -> None:
    gap = recovery.gap_of(np.ones(1), np.zeros(1))
    assert gap.error is None  # not an infinite one, which JSON has no word for
    assert "one question alone: the gap to the base model is 1.000" in str(gap.why_none)


def test_a_small_gap_gives_no_verdict() -> None:
    start = rights(10)[0]
    assert recovery.gap_of(BASE, start).why_none is None
    assert "nothing to come back" in str(recovery.gap_of(start, start).why_none)
    one_better = rights(11)[0]
    gap = recovery.gap_of(one_better, start)
    assert gap.gap == pytest.approx(1 / N)
    assert gap.error == pytest.approx(np.std(one_better - start, ddof=1) / np.sqrt(N))
    assert gap.why_none is not None
    assert recovery.gap_of(start, BASE).why_none is not None  # what knows more than the base has nothing to recover


def test_the_area_counts_geometric_steps_alike() -> None:
    # log(1 + s) is 0, log 2, 2·log 2: triangle ½ and square 1 of two
    assert recovery.area([0, 1, 3], np.array([0.0, 1.0, 1.0])) == pytest.approx(0.75)
    assert recovery.area([0, 1, 3], np.array([0.0, np.nan, 1.0])) == pytest.approx(0.5)
    assert np.isnan(recovery.area([0, 1], np.array([0.0, np.nan])))


def test_intervals_hold_the_value_and_shrink_with_questions() -> None:
    small, large = (
        recovery.recovery_measures([0, 1, 3], rights(n // 4, n // 2, n, n=n), np.ones(n), np.arange(n))
        for n in (40, 4000)
    )
    for name, value in (("most", 1.0), ("area", (1 / 6 + 2 / 3) / 2)):
        assert small[name].value == pytest.approx(value)
        assert small[name].interval.low <= value <= small[name].interval.high
        width = [one[name].interval.high - one[name].interval.low for one in (large, small)]
        assert width[0] <= width[1]


def test_latent_is_what_rises_beyond_the_model_that_never_knew() -> None:
    never = rights(10, 8, None)
    found = recovery.latent_rise(rights(12, 30, 40), never, np.arange(N))
    assert [one.value if one else None for one in found] == [0.0, pytest.approx((18 + 2) / N), None]
    assert found[1] is not None
    assert found[1].interval.low > 0
    same = recovery.latent_rise(rights(10, 8), rights(10, 8), np.arange(N))
    assert same[1] is not None
    assert same[1].value == 0


def drawn_again(clusters: np.ndarray, resamples: int = recovery.RESAMPLES) -> np.ndarray:
    """How often each question is drawn in each resample, [resamples, n], with its cluster."""
    names, place = np.unique(clusters, return_inverse=True)
    shares = np.full(len(names), 1 / len(names))
    return np.random.default_rng(0).multinomial(len(names), shares, size=resamples)[:, place]


def percentiles(values: list[float]) -> tuple[float, float]:
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


@pytest.mark.parametrize("clusters", [np.arange(N), np.arange(N) // 6], ids=["questions", "clusters of many sizes"])
def test_intervals_are_those_of_questions_drawn_one_resample_after_another(clusters: np.ndarray) -> None:
    right = np.random.default_rng(1).random((5, N)) < np.array([0.2, 0.3, 0.5, 0.6, 0.9])[:, None]
    asked = right.astype(float)
    asked[3] = np.nan
    areas, most, rises = [], [], []
    for counts in drawn_again(clusters):
        questions = np.repeat(np.arange(N), counts)
        shares = recovery.recovered(asked[:, questions], BASE[questions])
        areas.append(recovery.area(STEPS, shares))
        most.append(float(np.nanmax(shares)))
        rises.append(float((asked[4] - asked[0])[questions].mean()))
    found = recovery.recovery_measures(STEPS, asked, BASE, clusters)
    assert found["area"].interval == pytest.approx(percentiles(areas), rel=1e-12)
    assert found["most"].interval == pytest.approx(percentiles(most), rel=1e-12)
    latent = recovery.latent_rise(asked, np.zeros((5, N)), clusters)
    assert latent[3] is None
    assert latent[4] is not None
    assert latent[4].interval == pytest.approx(percentiles(rises), rel=1e-12)
    assert resampled(asked[4] - asked[0], clusters) == latent[4]


def test_questions_of_one_cluster_are_drawn_together() -> None:
    wide, narrow = (
        recovery.latent_rise(rights(0, 20), rights(0, 0), clusters)[1]
        for clusters in (np.repeat(np.arange(4), 10), np.arange(N))
    )
    assert wide is not None
    assert narrow is not None
    assert wide.interval.high - wide.interval.low > narrow.interval.high - narrow.interval.low


def test_the_worst_case_is_reported_on_questions_it_was_not_chosen_by() -> None:
    draw = np.random.default_rng(0)
    noise = [(draw.random(400) < 0.5).astype(float) for _ in range(200)]
    chosen = recovery.selected(noise, np.arange(400))
    assert chosen is not None
    best, reported = chosen
    assert reported.sum() == 200
    assert noise[best][~reported].mean() > 0.58  # the best of 200 by luck
    assert 0.42 < noise[best][reported].mean() < 0.58  # and no luck where it is told
    better = rights(10, 39)
    assert recovery.selected([*better, np.full(N, np.nan)], np.arange(N))[0] == 1  # type: ignore[index]
    assert recovery.selected([np.full(N, np.nan)], np.arange(N)) is None
    halves = recovery.selected([better[0]], np.repeat(np.arange(10), 4))
    assert halves is not None
    assert (halves[1].reshape(10, 4) == halves[1].reshape(10, 4)[:, :1]).all()


def test_questions_of_one_cluster_count_as_one() -> None:
    values = np.repeat([1.0, 0.0, 0.0, 1.0, 0.0], 8)
    whole, apart = resampled(values, np.repeat(range(5), 8)), resampled(values, np.arange(40))
    assert whole.value == apart.value == pytest.approx(0.4)
    assert np.ptp(whole.interval) > 2 * np.ptp(apart.interval)
