"""Which arm may be called better for its attribution, and why the others may not.

An arm by scores is better only if, against each of its random controls (the same method, the same weights on random
tokens, matched in the same way), over the same questions and seeds,

    utility      its forget accuracy is lower, with an interval that does not reach 0, and its damage is not larger
    forgetting   its damage is smaller, with an interval that does not reach 0, and its forget accuracy not higher

with five seeds or more. Not larger: by no more than tolerance·budget (tolerance·(1 − target)), on what is reported. All
controls have to be beaten, so one comparison more makes a claim harder, not easier.
"""

from __future__ import annotations

from typing import NamedTuple

from retrograd.evaluate.crossed import crossed
from retrograd.evaluate.intervals import Estimate
from retrograd.experiment.results import ArmResult, sides
from retrograd.select.controls import RANDOM
from retrograd.settings.experiment import ExperimentSpec

__all__ = ["FEWEST", "Claim", "Comparison", "compared", "decided"]

FEWEST = 5  # seeds
MOVED = 0.75  # a control that leaves more of the arm's weights where they were controls nothing


class Comparison(NamedTuple):
    """An arm minus another, over common seeds and questions; None where something is missing."""

    other: str
    seeds: list[int]
    forget: Estimate | None
    retain: Estimate | None
    kl: Estimate | None


class Claim(NamedTuple):
    """better: whether the claim is made; reason: what it rests on, or why it is not made."""

    better: bool
    reason: str


def compared(spec: ExperimentSpec, arm: ArmResult, other: ArmResult) -> Comparison:
    """Forget and retain accuracy, and KL, of an arm minus another's."""
    seeds = [seed for seed in spec.seeds if seed in arm.seeds and seed in other.seeds]

    def accuracy(role: str) -> Estimate | None:
        names = sides(spec.report.tasks, role)
        a, b = arm.matrix(names, seeds), other.matrix(names, seeds)
        return None if a is None or b is None else crossed(a - b)

    of_arm, of_other = arm.divergence(seeds), other.divergence(seeds)
    kl = None if of_arm is None or of_other is None else crossed(of_arm[0] - of_other[0], of_arm[1])
    return Comparison(other.plan.arm.weighting, seeds, accuracy("forget"), accuracy("retain"), kl)


def decided(spec: ExperimentSpec, arm: ArmResult, others: list[ArmResult]) -> Claim | None:
    """The claim of an arm by scores; None for an arm that is itself a control, or uniform.

    Args:
        others: All arms of the same match and method.
    """
    key = arm.plan.arm
    weighting = spec.weightings[key.weighting]
    if not weighting.scores or weighting.control is not None:
        return None
    if key.match == "none":
        return Claim(False, "utilities are not matched (match: none)")
    if arm.plan.reason is not None:
        return Claim(False, arm.plan.reason)
    if arm.missing:
        seed, reason = next(iter(arm.missing.items()))
        return Claim(False, f"seed {seed} is missing: {reason}")
    if len(spec.seeds) < FEWEST:
        return Claim(False, f"too few seeds: {len(spec.seeds)}, and a claim takes {FEWEST}")
    if broken := [seed for seed, verdict in arm.verdicts.items() if verdict in ("destroyed", None)]:
        return Claim(False, f"the model of seed {broken[0]} is {arm.verdicts[broken[0]] or 'without a verdict'}")
    controls = [other for other in others if _controls(spec, other, key.weighting)]
    moved = [control for control in controls if control.same is not None and control.same < MOVED]
    if not moved:
        why = f", for {len(controls)} leave more than three quarters of the weights where they were" if controls else ""
        return Claim(False, f"no matched random control{why}")
    reasons = []
    for control in moved:
        claim = _against(spec, arm, control)
        if not claim.better:
            return claim
        reasons.append(claim.reason)
    return Claim(True, "; ".join(reasons))


def _controls(spec: ExperimentSpec, arm: ArmResult, weighting: str) -> bool:
    other = spec.weightings[arm.plan.arm.weighting]
    return other.of == weighting and other.control in RANDOM


def _against(spec: ExperimentSpec, arm: ArmResult, control: ArmResult) -> Claim:
    name = control.plan.arm.weighting
    if control.plan.reason is not None or control.missing:
        return Claim(False, f"control {name} is missing: {control.plan.reason or next(iter(control.missing.values()))}")
    comparison, tune = compared(spec, arm, control), spec.methods[arm.plan.arm.method].tune
    damage = comparison.kl if tune.measure == "kl" else _minus(comparison.retain)
    if comparison.forget is None or damage is None:
        return Claim(False, f"against {name}: a number is missing")
    if arm.plan.arm.match == "utility":
        equal = _Equal("utilities differ", "damage", damage, tune.tolerance * tune.budget)
        return _judged(name, "forget accuracy", comparison.forget, equal)
    equal = _Equal("forgetting differs", "forget accuracy", comparison.forget, tune.tolerance * (1 - tune.target))
    return _judged(name, "damage", damage, equal)


class _Equal(NamedTuple):
    """What was to be equal: how it is called where it is not, its name, the difference, and what counts as equal."""

    differs: str
    name: str
    difference: Estimate
    slack: float


def _judged(control: str, what: str, gain: Estimate, equal: _Equal) -> Claim:
    words = f"against {control}: {what} {gain.told(digits=4)}, {equal.name} {equal.difference.told(digits=4)}"
    if equal.difference.value > equal.slack:
        return Claim(False, f"{equal.differs}, by more than {equal.slack:.3g}, {words}")
    if gain.value >= 0:
        return Claim(False, f"not better, {words}")
    if gain.high >= 0:
        return Claim(False, f"the interval includes 0, {words}")
    return Claim(True, words)


def _minus(estimate: Estimate | None) -> Estimate | None:
    return None if estimate is None else Estimate(-estimate.value, -estimate.high, -estimate.low)
