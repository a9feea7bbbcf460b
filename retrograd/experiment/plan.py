"""What is to be done: a pure function of the experiment and of what is done already.

For each arm (match, method, weighting) its setting is found on the first seed, a training and a measuring after the
other (`tune`); then every seed is trained at it and reported. So the tasks are known as far as what is done tells, and
whoever looks at the same results sees the same tasks. With an entry `attack` every model of a report then meets every
configuration, controls beside them; one configuration after the other, so that what is done first is a whole column.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, runtime_checkable

from retrograd.attack.material import attacked_models
from retrograd.experiment.grid import GridMaker
from retrograd.experiment.seen import tuning_value
from retrograd.experiment.tasks import Maker, Task
from retrograd.experiment.tune import Chosen, Goal, Impossible, Try, bisect
from retrograd.settings.attack import Configuration, configurations
from retrograd.settings.experiment import Match, TuneSpec

__all__ = ["Arm", "ArmPlan", "Meeting", "Plan", "Results", "planned"]


@runtime_checkable
class Results(Protocol):
    """What is settled, such as `lease.Queue`."""

    def result(self, name: str) -> dict | None:
        """The outcome of a task that is done."""

    def failure(self, name: str) -> str | None:
        """Why a task failed."""


class Arm(NamedTuple):
    """One line of the table."""

    match: Match
    method: str
    weighting: str

    @property
    def label(self) -> str:
        return f"{self.method} × {self.weighting}"


@dataclass
class ArmPlan:
    """How far an arm is known.

    setting: what its bisection chose; None where nothing is matched, or not yet. reports: the measuring of each seed.
    reason: why there is no setting. tries: (setting, value) in their order.
    """

    arm: Arm
    chosen: Chosen | None = None
    trains: dict[int, str] = field(default_factory=dict)
    reports: dict[int, str] = field(default_factory=dict)
    reason: str | None = None
    tries: list[tuple[float, float]] = field(default_factory=list)
    more: int = 0  # tasks to come that are not known yet


class Meeting(NamedTuple):
    """A configuration of an attack against a model. group: the arm, of whose seeds the model is one; model: the task
    that trains it, or its folder; task: the meeting's own."""

    role: str
    group: str | None
    model: Task | str
    configuration: Configuration
    task: str


class Plan(NamedTuple):
    """tasks: by name, in the order in which they are wanted; base, never: their measurings of the report."""

    tasks: dict[str, Task]
    arms: list[ArmPlan]
    base: str | None
    never: str | None
    analyses: dict[str, list[str]]
    meetings: tuple[Meeting, ...] = ()

    @property
    def more(self) -> int:
        """At most so many tasks are not known yet."""
        return sum(arm.more for arm in self.arms)

    def lost(self, results: Results) -> dict[str, str]:
        """Tasks that cannot be done, with the reason: those that failed, and those that need one of them."""
        lost: dict[str, str] = {}
        for name, task in self.tasks.items():
            reason = results.failure(name)
            if reason is not None:
                lost[name] = reason
            elif (missing := [need for need in task.needs if need in lost]) and results.result(name) is None:
                lost[name] = f"needs {missing[0]}, which failed"
        return lost


def planned(maker: Maker | GridMaker, results: Results) -> Plan:
    """All tasks that are known to be wanted, each behind what it needs."""
    if isinstance(maker, GridMaker):
        return Plan({task.name: task for task in maker.cells.values()}, [], None, None, {})
    spec, tasks = maker.spec, dict[str, Task]()

    def add(*more: Task) -> Task:
        for task in more:
            tasks.setdefault(task.name, task)
        return more[-1]

    analyses: dict[str, list[str]] = {}
    for name in spec.analyses:
        for corpus in range(len(spec.corpora.forget)):
            made, needs = maker.analyse(name, corpus)
            analyses.setdefault(name, []).append(add(*needs, made).name)
    if not (spec.methods and spec.weightings):
        return Plan(tasks, [], None, None, analyses)
    base = add(maker.measure(spec.base, "report")).name
    never = add(maker.measure(spec.never, "report")).name if spec.never else None
    arms = [
        _arm(maker, results, Arm(match, method, weighting), add)
        for match in spec.match
        for method in spec.methods
        for weighting in spec.methods[method].weightings or spec.weightings
    ]
    return Plan(tasks, arms, base, never, analyses, tuple(_meetings(maker, arms, tasks, add)))


def _meetings(maker: Maker, arms: list[ArmPlan], tasks: dict[str, Task], add: Callable[..., Task]) -> Iterator[Meeting]:
    """Every model under every configuration, controls first; those of arms whose setting is not known come later."""
    config = maker.spec.attacked()
    if config is None:
        return
    lab = config.lab if config.shallow is None else None
    made = add(maker.shallow(lab)) if lab is not None else None
    models: list[tuple[str, str | None, Task | str]] = [
        (role, None, source) for role, source in attacked_models(config, config.shallow) if role != "model"
    ]
    models += [("shallow", None, made)] if made is not None else []
    models += [("model", _group(maker, arm), tasks[name]) for arm in arms for name in arm.trains.values()]
    every = configurations(config)
    for arm in arms:
        arm.more += len(every) * (len(maker.spec.seeds) - len(arm.trains)) if not arm.reason else 0
    for configuration in every:
        for role, group, model in models:
            yield Meeting(role, group, model, configuration, add(maker.attack(model, configuration)).name)


def _group(maker: Maker, plan: ArmPlan) -> str:
    """An arm among those that are attacked."""
    arm = plan.arm
    parts = [arm.method, *([arm.weighting] if len(maker.spec.weightings) > 1 else []),
             *([arm.match] if len(maker.spec.match) > 1 else [])]  # fmt: skip
    return " × ".join(parts)


def _arm(maker: Maker, results: Results, arm: Arm, add: Callable[..., Task]) -> ArmPlan:
    plan, setting = ArmPlan(arm), None
    tune, seeds = maker.spec.methods[arm.method].tune, maker.spec.seeds
    if arm.match != "none":
        _tuned(maker, results, plan, tune, add)
        if plan.chosen is None:
            return plan
        setting = (tune.setting, plan.chosen.setting)
    for seed in seeds:
        trained = add(*maker.train(arm.method, arm.weighting, seed, setting))
        plan.trains[seed] = trained.name
        plan.reports[seed] = add(maker.measure(trained, "report")).name
    return plan


def _tuned(maker: Maker, results: Results, plan: ArmPlan, tune: TuneSpec, add: Callable[..., Task]) -> None:
    """The bisection as far as it has come; its next training, if one is wanted."""
    arm, seeds = plan.arm, maker.spec.seeds
    base = None
    if arm.match == "utility" and tune.measure == "accuracy":
        base = add(maker.measure(maker.spec.base, "tune")).name
        if results.result(base) is None:
            plan.more = 2 * (tune.steps + len(seeds))
            plan.reason = results.failure(base) and f"the base could not be measured: {results.failure(base)}"
            return
    goal, known = _goal(arm.match, tune), dict[float, float]()
    while True:
        step = bisect(goal, known)
        if isinstance(step, Chosen):
            plan.chosen = step
            return
        if isinstance(step, Impossible):
            plan.reason = step.reason
            return
        assert isinstance(step, Try)
        trained = add(*maker.train(arm.method, arm.weighting, seeds[0], (tune.setting, step.setting)))
        measured = add(maker.measure(trained, "tune"))
        outcome = results.result(measured.name)
        if outcome is None:
            plan.more = 2 * (tune.steps - len(known) - 1 + len(seeds))
            plan.reason = _why(results, (*trained.needs, trained.name, measured.name))
            plan.more = 0 if plan.reason else plan.more
            return
        against = results.result(base) if base else None
        value = tuning_value(arm.match, tune.measure, outcome, against)
        if value is None:
            plan.reason = f"its tuning at {tune.setting} {step.setting:g} has a missing value"
            return
        known[step.setting] = value
        plan.tries.append((step.setting, value))


def _goal(match: Match, tune: TuneSpec) -> Goal:
    if match == "utility":
        return Goal(tune.low, tune.high, tune.start, tune.steps, tune.budget, tune.tolerance, "below")
    return Goal(tune.low, tune.high, tune.start, tune.steps, 1 - tune.target, tune.tolerance, "above")


def _why(results: Results, names: tuple[str, ...]) -> str | None:
    failed = [(name, reason) for name in names if (reason := results.failure(name)) is not None]
    return f"{failed[0][0]} failed: {failed[0][1]}" if failed else None
