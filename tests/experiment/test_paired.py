"""Means over seeds and questions with crossed resampling, against plain loops; positions; claims by made-up arms."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from retrograd.evaluate.verdict import Evaluated
from retrograd.experiment.claims import decided
from retrograd.experiment.paired import crossed, crossed_position
from retrograd.experiment.plan import Arm, ArmPlan
from retrograd.experiment.results import ArmResult, Measured
from retrograd.experiment.tune import Chosen
from retrograd.settings.experiment import (
    AskedSpec,
    CorporaSpec,
    ExperimentSpec,
    MethodSpec,
    TuneSpec,
    WeightingSpec,
)
from retrograd.settings.tasks import Task


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


SPEC = ExperimentSpec(
    base="base", corpora=CorporaSpec(("forget.jsonl",)),
    report=AskedSpec({"forget": Task("f", form="cloze", role="forget"), "retain": Task("r", form="cloze", role="retain")}),
    methods={"npo": MethodSpec("npo", tune=TuneSpec(budget=0.02, tolerance=0.2))},
    weightings={
        "value": WeightingSpec(scores="a:go"), "uniform": WeightingSpec(),
        "random": WeightingSpec(control="random_count", of="value"),
        "places": WeightingSpec(control="random_position", of="value"),
        "flipped": WeightingSpec(control="sign_flipped", of="value"),
    },
    match=("utility", "forgetting"), seeds=(0, 1, 2, 3, 4),
)  # fmt: skip


def arm(weighting: str, right: float, kl: float, match: Any = "utility", **changes: Any) -> ArmResult:
    """Five seeds, of which each has this share of 100 questions right."""
    seeds = {}
    for seed in changes.pop("seeds", SPEC.seeds):
        count = round(100 * right) + seed % 2
        answers = {"forget": np.r_[np.ones(count), np.zeros(100 - count)], "retain": np.ones(50)}
        kls, targets = np.full(20, 7 * kl), np.full(20, 7)
        seeds[seed] = Measured(answers, kls, targets, {}, {}, Evaluated("x", "d", {}))
    plan = ArmPlan(Arm(match, "npo", weighting), Chosen(1e-3, 0.02, True))
    given: dict[str, Any] = {
        "plan": plan, "seeds": seeds, "verdicts": dict.fromkeys(seeds, "healthy"), "seconds": {}, "missing": {},
        "same": 0.1,
    }  # fmt: skip
    return ArmResult(**{**given, **changes})


def claim(one: ArmResult, *others: ArmResult, spec: ExperimentSpec = SPEC) -> tuple[bool, str]:
    found = decided(spec, one, list(others))
    assert found is not None
    return found.better, found.reason


def test_better_is_what_beats_every_random_control_at_the_same_utility() -> None:
    better, reason = claim(arm("value", 0.3, 0.02), arm("random", 0.6, 0.02), arm("places", 0.5, 0.021))
    assert better
    assert "against random: forget accuracy -0.3000" in reason
    assert "against places: forget accuracy -0.2000" in reason


@pytest.mark.parametrize("others,told", [
    ([], "no matched random control"),
    ([("flipped", 0.9, 0.02), ("uniform", 0.9, 0.02)], "no matched random control"),
    ([("random", 0.6, 0.02), ("places", 0.3, 0.02)], "not better, against places"),
    ([("random", 0.31, 0.02)], "the interval includes 0, against random"),
    ([("random", 0.6, 0.015)], "utilities differ, by more than 0.004, against random"),
    ([("random", 0.2, 0.02)], "not better, against random"),
])  # fmt: skip
def test_why_no_claim_is_made(others: list[tuple[str, float, float]], told: str) -> None:
    better, reason = claim(arm("value", 0.3, 0.02), *(arm(*other) for other in others))
    assert not better
    assert told in reason


def test_few_seeds_missing_ones_broken_models_and_idle_controls_make_no_claim() -> None:
    import dataclasses

    control = arm("random", 0.6, 0.02)
    few = dataclasses.replace(SPEC, seeds=(0, 1, 2, 3))
    four = [arm(w, r, 0.02, seeds=(0, 1, 2, 3)) for w, r in (("value", 0.3), ("random", 0.6))]
    assert claim(*four, spec=few) == (False, "too few seeds: 4, and a claim takes 5")
    assert "seed 3 is missing: lost" in claim(arm("value", 0.3, 0.02, missing={3: "lost"}), control)[1]
    broken = {**dict.fromkeys(SPEC.seeds, "healthy"), 2: "destroyed"}
    assert "the model of seed 2 is destroyed" in claim(arm("value", 0.3, 0.02, verdicts=broken), control)[1]
    assert "leave more than three quarters" in claim(arm("value", 0.3, 0.02), arm("random", 0.6, 0.02, same=0.9))[1]
    assert "control random is missing" in claim(arm("value", 0.3, 0.02), arm("random", 0.6, 0.02, missing={1: "x"}))[1]
    assert "not matched" in claim(arm("value", 0.3, 0.02, match="none"), arm("random", 0.6, 0.02, match="none"))[1]
    assert decided(SPEC, arm("uniform", 0.3, 0.02), [control]) is None
    assert decided(SPEC, control, []) is None


def test_at_equal_forgetting_the_damage_decides() -> None:
    one = arm("value", 0.5, 0.01, "forgetting")
    assert claim(one, arm("random", 0.5, 0.03, "forgetting"))[0]
    assert "not better" in claim(one, arm("random", 0.5, 0.01, "forgetting"))[1]
    assert "forgetting differs" in claim(one, arm("random", 0.3, 0.03, "forgetting"))[1]


def test_an_arm_is_marked_where_it_reaches_the_model_that_never_knew_with_little_loss() -> None:
    import dataclasses

    from retrograd.experiment.table import lines

    def model(forget: int, retain: int) -> Measured:
        answers = {"forget": np.r_[np.ones(forget), np.zeros(100 - forget)],
                   "retain": np.r_[np.ones(retain), np.zeros(50 - retain)]}  # fmt: skip
        return Measured(answers, None, None, {}, {}, Evaluated("x", "d", {}))

    spec = dataclasses.replace(SPEC, weightings={"uniform": WeightingSpec()})
    base, never = model(100, 50), model(30, 50)
    marked = []
    for right, verdict in ((0.3, "healthy"), (0.6, "healthy"), (0.3, "destroyed")):
        one = arm("uniform", right, 0.02, verdicts=dict.fromkeys(SPEC.seeds, verdict))
        marked.append(lines(spec, [one], base, never)[0].reaches)
    worse = arm("uniform", 0.3, 0.02)
    for seed in worse.seeds:
        worse.seeds[seed] = model(30, 48)
    marked.append(lines(spec, [worse], base, never)[0].reaches)
    assert marked == [True, False, False, False]
