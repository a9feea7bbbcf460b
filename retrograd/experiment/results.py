"""What the workers left, by arm: matrices of seeds × questions for means, intervals and comparisons."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from retrograd.evaluate.summary import failure
from retrograd.evaluate.verdict import Evaluated, diagnose
from retrograd.experiment.measure import read_answers, read_divergence
from retrograd.experiment.plan import ArmPlan, Plan, Results
from retrograd.query.prepare import Answers
from retrograd.settings.experiment import ExperimentSpec
from retrograd.settings.tasks import Task

__all__ = ["ArmResult", "Measured", "collected", "read_model", "sides"]


@dataclass(frozen=True)
class Measured:
    """One model on the report's split. right: by task, [questions]; kl: nats by document, [documents]."""

    right: dict[str, np.ndarray]
    kl: np.ndarray | None
    targets: np.ndarray | None
    perplexity: dict[str, float]
    missing: dict[str, str]
    evaluated: Evaluated

    def side(self, names: list[str]) -> np.ndarray | None:
        """All questions of these tasks, [questions]; None if one is missing."""
        if not names or any(name not in self.right for name in names):
            return None
        return np.concatenate([self.right[name] for name in names])


class ArmResult(NamedTuple):
    """An arm with what was measured of its seeds; missing: why, by seed; same: share of the arm's own weights that a
    control left where they were."""

    plan: ArmPlan
    seeds: dict[int, Measured]
    verdicts: dict[int, str | None]
    seconds: dict[int, float]
    missing: dict[int, str]
    same: float | None

    def matrix(self, names: list[str], seeds: list[int]) -> np.ndarray | None:
        """Right or not, [seeds, questions]; None where something is missing."""
        rows = [self.seeds[seed].side(names) if seed in self.seeds else None for seed in seeds]
        there = [row for row in rows if row is not None]
        return np.stack(there) if there and len(there) == len(rows) else None

    def divergence(self, seeds: list[int]) -> tuple[np.ndarray, np.ndarray] | None:
        """KL in nats per token of each document, [seeds, documents], and targets, [documents]."""
        rows = [self.seeds[seed] for seed in seeds if seed in self.seeds]
        if (
            len(rows) < len(seeds)
            or not rows
            or any(measured.kl is None or measured.targets is None for measured in rows)
        ):
            return None
        targets = rows[0].targets
        assert targets is not None
        return np.stack([measured.kl / np.maximum(targets, 1) for measured in rows if measured.kl is not None]), targets


def collected(spec: ExperimentSpec, plan: Plan, results: Results) -> list[ArmResult]:
    """All arms, as far as they are done."""
    base = read_model(spec, results, plan.base)
    lost = plan.lost(results)
    return [_arm(spec, plan, arm, results, base, lost) for arm in plan.arms]


def read_model(spec: ExperimentSpec, results: Results, name: str | None) -> Measured | None:
    """What a measuring of the report found; None if it is not done."""
    outcome = results.result(name) if name else None
    if outcome is None:
        return None
    folder, tasks = Path(outcome["place"]) / "answers", spec.report.tasks
    answers = read_answers(folder, list(tasks))
    right = {
        name: measured.rights(tasks[name]).numpy()
        for name, measured in answers.items()
        if isinstance(measured, Answers) and failure(measured, tasks[name]) is None
    }
    kl = read_divergence(folder)
    good = kl is not None and outcome["kl"] is not None
    return Measured(
        right,
        np.array(kl.nats) if good and kl is not None else None,
        np.array(kl.targets) if good and kl is not None else None,
        {name: value for name, value in outcome["perplexity"].items() if value is not None},
        outcome["missing"],
        Evaluated(name or "", outcome["digest"], answers),
    )


def sides(tasks: dict[str, Task], role: str) -> list[str]:
    """The tasks with right answers of a role."""
    return [name for name, task in tasks.items() if task.choices and task.role == role]


def _arm(
    spec: ExperimentSpec, plan: Plan, arm: ArmPlan, results: Results, base: Measured | None, lost: dict[str, str]
) -> ArmResult:
    seeds: dict[int, Measured] = {}
    verdicts: dict[int, str | None] = {}
    seconds: dict[int, float] = {}
    missing: dict[int, str] = {}
    same: list[float] = []
    for seed in spec.seeds:
        if arm.reason is not None or seed not in arm.reports:
            missing[seed] = arm.reason or "its setting is not known yet"
            continue
        trained, measured = results.result(arm.trains[seed]), read_model(spec, results, arm.reports[seed])
        if trained is None or measured is None:
            missing[seed] = lost.get(arm.trains[seed]) or lost.get(arm.reports[seed]) or "not done yet"
            continue
        seeds[seed], seconds[seed] = measured, trained["seconds"]
        if base is not None:
            verdicts[seed] = diagnose(measured.evaluated, base.evaluated, spec.report.tasks).verdict
        for need in plan.tasks[arm.trains[seed]].needs:
            outcome = results.result(need)
            same += [outcome["same_as_arm"]] if outcome and "same_as_arm" in outcome else []
    return ArmResult(arm, seeds, verdicts, seconds, missing, float(np.mean(same)) if same else None)
