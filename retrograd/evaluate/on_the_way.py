"""Evaluation during a trajectory: ask at chosen steps, write what was found, keep the best step's model.

A session of training takes it as its watcher:

    prepared = prepare_on_the_way(config.evaluate, lm, tokenizer)        # refuses before anything is written
    with open_session(…, watch=watching(prepared)) as session: …     # session.train(); then session.show(console)

Nothing here touches the trajectory: its parameters are read, random numbers are put back, dropout is off meanwhile.
A step is evaluated before its state can become durable, so a run that was killed comes by it again if its line is
missing; and the line comes after the model it makes the best one.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from rich.console import Console

from retrograd.core import tree
from retrograd.core.step import State
from retrograd.core.sweep import Event, Remade, Reversed
from retrograd.evaluate.answers import write_measured
from retrograd.evaluate.curve import BEST, show_evaluations
from retrograd.evaluate.summary import described, failure, together
from retrograd.lm.model import CausalLM
from retrograd.lm.save import save_causal_lm
from retrograd.query.prepare import Measured, Prepared, prepare
from retrograd.runs.errors import RunError
from retrograd.runs.files import write_json
from retrograd.runs.identity import fingerprint
from retrograd.runs.journal import Journal, mirror, read_evaluations
from retrograd.runs.loggers import open_loggers
from retrograd.runs.manifest import Manifest
from retrograd.runs.progress import Bars
from retrograd.runs.session import Session
from retrograd.settings.on_the_way import OnTheWayConfig, Rule, best_of, evaluated_steps, parse_rule
from retrograd.settings.tasks import Task, tasks_on_the_way

__all__ = ["OnTheWay", "PreparedTasks", "answers_path", "prepare_on_the_way", "show_again", "watching"]

_FAILURES = (ValueError, OSError, RuntimeError, MemoryError, ArithmeticError)  # the model, the data, the memory


class PreparedTasks(NamedTuple):
    """What is asked of a model during a trajectory, read and tokenised; nothing if `tasks` is empty."""

    config: OnTheWayConfig
    model: CausalLM
    tokenizer: Any
    tasks: dict[str, Task]
    ready: dict[str, Prepared]
    rule: Rule | None

    @property
    def every(self) -> dict[str, Task]:
        """Tasks and groups by name."""
        return {**self.tasks, **{task.group: task for task in self.tasks.values() if task.group}}

    @property
    def asked(self) -> dict[str, str]:
        """What the lines of metrics.jsonl depend on, by task, and the rule: lines of others would not fit to them."""
        settings = {
            name: (dataclasses.replace(task, dataset=""), self.ready[name].asked) for name, task in self.tasks.items()
        }
        return {**{f"task {name}": fingerprint(*parts) for name, parts in settings.items()},
                **({"keep_best": self.rule.text} if self.rule else {})}  # fmt: skip


def prepare_on_the_way(config: OnTheWayConfig, model: CausalLM, tokenizer: Any) -> PreparedTasks:
    """Read all tasks of a configuration; of one without tasks, nothing.

    Raises:
        ValueError: If a task does not work with this model, or the rule names none of them.
    """
    tasks = tasks_on_the_way(config)
    for name, task in tasks.items():
        if not (task.ordinary or task.form == "generate"):
            raise ValueError(
                f"task {name!r} of form {task.form} is not asked on the way: ask the trained model with `retrograd "
                "evaluate`, and leave it out here"
            )
    ready = {name: prepare(task, model, tokenizer, config.batch_size) for name, task in tasks.items()}
    rule = parse_rule(config.keep_best) if config.keep_best else None
    prepared = PreparedTasks(config, model, tokenizer, tasks, ready, rule)
    for name in rule.names if rule else ():
        if name not in prepared.every or prepared.every[name].form == "generate":
            known = ", ".join(name for name, task in prepared.every.items() if task.form != "generate")
            raise ValueError(f"--evaluate.keep_best names {name!r}; the tasks with a number are: {known}")
    return prepared


class OnTheWay:
    """Observer of a trajectory that evaluates it on its way, each step once however often the run was killed.

    Args:
        prepared: The tasks; with none, nothing is done.
        steps: Of the trajectory.
        run: Folder of the run; the best model goes to `best` in it.
        journal: Of the run.
        manifest: Of the run; remembers what is asked.
    Raises:
        ValueError: If steps of this run were evaluated already with other tasks or another rule.
    """

    def __init__(
        self, prepared: PreparedTasks, steps: int, run: Path, journal: Journal, manifest: Manifest, bars: Bars
    ) -> None:
        self.prepared, self.last, self.run, self.journal, self.bars = prepared, steps, run, journal, bars
        config = prepared.config
        asked = evaluated_steps(steps, config.every, geometric=config.geometric, at=config.at)
        wanted = asked if prepared.tasks else []
        self.wanted, self.open = wanted, True
        if wanted:
            _begin(run, prepared, journal, manifest)

    def __call__(self, event: Event) -> None:
        """Evaluate the state of a forward step, if it is its turn."""
        if not isinstance(event, Reversed):
            self.at(event.state if isinstance(event, Remade) else event.outcome.state)

    def at(self, state: State) -> None:
        """Evaluate a state now, if it is its turn and it has no line yet."""
        if not self.open or state.step not in self.wanted or state.step in self.journal.evaluated:
            return
        start = time.monotonic()
        devices = [leaf.device for leaf in tree.leaves(state.params)[:1] if leaf.device.type == "cuda"]
        with torch.random.fork_rng(devices=devices):
            lines = self._measured(state)
        rule = self.prepared.rule
        evaluations = {**self._values(), state.step: lines}
        best = best_of(evaluations, rule) if rule else None
        if rule and best and best[0] == state.step:
            self._keep(state, rule, best[1], lines)
        self.journal.evaluation(state.step, tasks=lines, seconds=round(time.monotonic() - start, 3))

    def __enter__(self) -> OnTheWay:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """The way back replays steps: it must not evaluate them again. A training that failed shows how far it came."""
        self.open = False
        if isinstance(error, Exception):
            self.show(self.bars.progress.console)

    def show(self, console: Console) -> None:
        """Print what was found."""
        if self.wanted or self.journal.evaluated:
            show_evaluations(self.run, self.journal.evaluated, console, self.prepared.rule, self.wanted)

    def _values(self) -> dict[int, dict[str, Any]]:
        return {step: entry["tasks"] for step, entry in self.journal.evaluated.items()}

    def _measured(self, state: State) -> dict[str, Any]:
        """What is found by task and group, as plain values; what fails has null and its reason."""
        tasks, total = self.prepared.tasks, len(self.wanted) * len(self.prepared.tasks)
        measured: dict[str, Measured | None] = {}
        lines: dict[str, Any] = {}
        about = {"model": self.run.name, "step": state.step, "dtype": _dtype(state)}
        for number, (name, task) in enumerate(tasks.items(), start=len(self.journal.evaluated) * len(tasks) + 1):
            try:
                measured[name] = self.prepared.ready[name].measure(state.params)
                why = failure(measured[name], task)
            except RunError:
                raise
            except _FAILURES as error:
                measured[name], why = None, " ".join(f"{type(error).__name__}: {error}".split())
            if self.prepared.config.answers and (answers := measured[name]) is not None:
                write_measured(answers_path(self.run, state.step, name), answers, {**about, "task": name})
            lines[name] = _line(measured[name], task, why)
            self.bars.move("evaluate", number, f"step {state.step} {name}", total, "tasks")
        for group in dict.fromkeys(task.group for task in tasks.values() if task.group):
            parts = {name: part for name, part in measured.items() if tasks[name].group == group}
            missing = [name for name in parts if "missing" in lines[name]]
            why = f"missing: {', '.join(missing)}" if missing else None
            lines[group] = _line(together(list(parts.values())), self.prepared.every[group], why)
        return lines

    def _keep(self, state: State, rule: Rule, value: float, lines: dict[str, Any]) -> None:
        model, folder = self.prepared.model, self.run / "best"
        about = {"step": state.step, "rule": rule.text, "value": value, "of_steps": self.last, "tasks": lines,
                 "digest": tree.digest(dict(sorted(state.params.items())))}  # fmt: skip

        def more(target: Path) -> None:
            write_json(target / BEST, about)

        save_causal_lm(folder, model.module, self.prepared.tokenizer, state.params, more)


def watching(prepared: PreparedTasks) -> Callable[[Session], OnTheWay]:
    """What a session takes to be evaluated on its way."""
    return lambda on: OnTheWay(prepared, on.steps, on.run, on.journal, on.manifest, on.bars)


def show_again(run: Path, log: Sequence[str], config: OnTheWayConfig, console: Console) -> None:
    """What a finished run's journal holds: in the viewers asked for, and of its evaluations as a table."""
    path = run / "metrics.jsonl"
    if log:
        with open_loggers(log, run) as loggers:
            mirror(path, loggers)
    evaluations = read_evaluations(path)
    if evaluations:
        show_evaluations(run, evaluations, console)
    elif config.wanted:
        console.print("It was not evaluated on its way; `retrograd evaluate` asks models that are there.")


def answers_path(run: Path, step: int, task: str) -> Path:
    """Where the answers to a task at a step lie, if they are kept."""
    return run / "answers" / f"{step:06d}" / f"{task}.parquet"


def _dtype(state: State) -> str:
    return str(next(iter(state.params.values())).dtype).removeprefix("torch.")


def _line(measured: Measured | None, task: Task, why: str | None) -> dict[str, Any]:
    values = {name: value for name, value in described(measured, task).items() if name not in _LEFT_OUT}
    return values | ({"missing": why} if why else {})


_LEFT_OUT = ("form", "role", "normalised", "letters", "subjects")  # what a line at each step has no room for


def _begin(run: Path, prepared: PreparedTasks, journal: Journal, manifest: Manifest) -> None:
    """Remember what is asked, or refuse what does not fit to the lines that are there."""
    old, new = manifest.values.get("evaluation", {}), prepared.asked
    changed = [
        f"{name}: {old.get(name)} → {new.get(name)}"
        for name in sorted({**old, **new})
        if old.get(name) != new.get(name)
    ]
    if journal.evaluated and changed:
        lines = "\n  ".join(changed)
        raise ValueError(
            f"{run} has {len(journal.evaluated)} evaluated steps with other tasks or another rule:\n  {lines}\nPut "
            "them back, leave evaluation out, or start afresh with --overwrite."
        )
    manifest.update(evaluation=new)
