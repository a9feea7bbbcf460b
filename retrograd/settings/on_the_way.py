"""Evaluation during a trajectory: its settings, the steps it happens at, and the rule that says which step was best.

Step t is the model after t training steps; step 0 is the start. A rule is a text:

    max:TASK                                         the highest accuracy
    min:TASK                                         the lowest; of a text, the lowest mean loss in nats per token
    min:forget while retain >= 0.9                   the same among the steps at which all conditions hold
    min:forget while retain >= start - 0.02 and prose <= start + 0.1

`start` is the value of the condition's own task at step 0. Of equals the earlier step is the best. A step with one of
the rule's values missing is never the best. No heavy imports here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

__all__ = [
    "Condition",
    "OnTheWayConfig",
    "Rule",
    "best_of",
    "check_on_the_way",
    "evaluated_steps",
    "parse_rule",
    "value_of",
]

ROUNDING = 1e-9  # 0.9 - 0.05 is above 0.85, and 17 of 20 right are exactly 0.85


@dataclass(frozen=True)
class OnTheWayConfig:
    """Ask questions at chosen steps while it runs; always at the start and at the end. The run's bits stay the same."""

    tasks: Path | None = None
    """YAML file of tasks, as for `retrograd evaluate`; a task's `limit` keeps it quick."""
    lab: Path | None = None
    """Or a folder of `retrograd lab`: all its questions and its held-out prose."""
    every: int | None = None
    """Evaluate every so many steps."""
    geometric: bool = False
    """Evaluate at steps 1, 2, 4, 8, …"""
    at: tuple[int, ...] = ()
    """Evaluate at these steps."""
    limit: int | None = None
    """The first questions or documents of each task only, where the task itself has no smaller limit."""
    keep_best: str | None = None
    """Keep the best step's model in RUN/best. max:TASK or min:TASK, by accuracy (texts: by loss), with conditions if
    wanted: "min:forget while retain >= 0.9", "max:a while b >= start - 0.02 and c <= 0.5". Equal: the earlier step."""
    batch_size: int = 16
    """Questions read at once."""
    answers: bool = False
    """Keep every answer: RUN/answers/STEP/TASK.parquet."""

    @property
    def wanted(self) -> bool:
        return self.tasks is not None or self.lab is not None


class Condition(NamedTuple):
    """value(task) ≥ bound, or ≤; `relative` bounds are added to the task's value at step 0."""

    task: str
    at_least: bool
    bound: float
    relative: bool


class Rule(NamedTuple):
    """The best step is that of the largest (or smallest) value of a task, among the steps that meet all conditions."""

    text: str
    largest: bool
    task: str
    conditions: tuple[Condition, ...]

    @property
    def names(self) -> list[str]:
        """All tasks that the rule reads."""
        return list(dict.fromkeys([self.task, *(condition.task for condition in self.conditions)]))


def check_on_the_way(config: OnTheWayConfig, prefix: str = "evaluate") -> None:
    """Refuse, before anything is loaded, what cannot work.

    Raises:
        ValueError: With the setting, its value and what it has to be.
    """
    if config.tasks is not None and config.lab is not None:
        raise ValueError(f"--{prefix}.tasks and --{prefix}.lab exclude each other: give one of them")
    if not config.wanted and config != OnTheWayConfig():
        raise ValueError(
            f"--{prefix} has settings but nothing to ask; give --{prefix}.tasks FILE.yaml or --{prefix}.lab DIR"
        )
    for name in ("every", "limit", "batch_size"):
        number = getattr(config, name)
        if number is not None and number < 1:
            raise ValueError(f"--{prefix}.{name} is {number}; it has to be at least 1")
    if config.at and min(config.at) < 0:
        raise ValueError(f"--{prefix}.at names step {min(config.at)}; the first step is 0")
    if config.keep_best is not None:
        parse_rule(config.keep_best)


def evaluated_steps(
    last: int, every: int | None = None, *, geometric: bool = False, at: Iterable[int] = ()
) -> list[int]:
    """Steps at which a trajectory of `last` steps is evaluated, ascending: 0, those asked for, and the last.

    >>> evaluated_steps(10, every=4, geometric=True)
    [0, 1, 2, 4, 8, 10]
    """
    steps = {0, last, *at}
    if every is not None:
        steps.update(range(0, last, every))
    if geometric:
        steps.update(1 << power for power in range(max(0, last).bit_length()))
    return sorted(step for step in steps if 0 <= step <= last)


_TASK, _NUMBER = r"[A-Za-z0-9][\w.-]*", r"\d*\.?\d+(?:[eE][+-]?\d+)?"
_GOAL = re.compile(rf"\s*(max|min)\s*:\s*({_TASK})\s*")
_CONDITION = re.compile(rf"\s*({_TASK})\s*(>=|<=)\s*(?:start(?:\s*([+-])\s*({_NUMBER}))?|(-?{_NUMBER}))\s*")


def parse_rule(text: str) -> Rule:
    """The rule that a text states.

    Raises:
        ValueError: If it is no such text.

    >>> parse_rule("min:forget while retain >= start - 0.02").conditions
    (Condition(task='retain', at_least=True, bound=-0.02, relative=True),)
    """
    first, *rest = re.split(r"\swhile\s", text)
    goal = _GOAL.fullmatch(first)
    parts = re.split(r"\sand\s", rest[0]) if len(rest) == 1 else []
    matches = [_CONDITION.fullmatch(part) for part in parts]
    if goal is None or len(rest) > 1 or None in matches:
        raise ValueError(
            f"rule {text!r} is not understood; write max:TASK or min:TASK, and conditions such as "
            "'min:TASK while OTHER >= 0.9 and THIRD <= start + 0.1'"
        )
    conditions = tuple(_condition(match) for match in matches if match is not None)
    return Rule(" ".join(text.split()), goal[1] == "max", goal[2], conditions)


def _condition(match: re.Match[str]) -> Condition:
    task, comparison, sign, shift, number = match.groups()
    bound = float(number) if number is not None else float(f"{sign or ''}{shift or 0}")
    return Condition(task, comparison == ">=", bound, number is None)


def value_of(entry: Mapping[str, Any]) -> float | None:
    """What rules compare: accuracy, or the mean loss of texts in nats per token; None if it is missing."""
    return entry["accuracy"] if "accuracy" in entry else entry.get("nats_per_token")


def best_of(evaluations: Mapping[int, Mapping[str, Any]], rule: Rule) -> tuple[int, float] | None:
    """The best step and its value; None if no step meets the conditions.

    Args:
        evaluations: By step, what was found by task.
    """
    best: tuple[int, float] | None = None
    for step in sorted(evaluations):
        value = value_of(evaluations[step].get(rule.task, {}))
        if value is None or not all(_holds(condition, evaluations, step) for condition in rule.conditions):
            continue
        if best is None or (value > best[1] if rule.largest else value < best[1]):
            best = step, value
    return best


def _holds(condition: Condition, evaluations: Mapping[int, Mapping[str, Any]], step: int) -> bool:
    value = value_of(evaluations[step].get(condition.task, {}))
    start = value_of(evaluations.get(0, {}).get(condition.task, {})) if condition.relative else 0.0
    if value is None or start is None:
        return False
    bound = start + condition.bound
    return value >= bound - ROUNDING if condition.at_least else value <= bound + ROUNDING
