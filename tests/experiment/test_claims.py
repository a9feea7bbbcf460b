"""Claims by made-up arms."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from retrograd.evaluate.verdict import Evaluated
from retrograd.experiment.claims import decided
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

SPEC = ExperimentSpec(
    base="base", corpora=CorporaSpec(("forget.jsonl",)),
    report=AskedSpec({"forget": Task("f", form="cloze", role="forget"), "retain": Task("r", form="cloze", role="retain")}),
    methods={"npo": MethodSpec("npo", tune=TuneSpec(budget=0.02, tolerance=0.2))},
    weightings={
        "value": WeightingSpec(scores=("a:go",)), "uniform": WeightingSpec(),
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
