"""The plans of commands that are many trainings: `validate`, and `experiment`."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console

from retrograd.attack.beforehand import check_data
from retrograd.attack.material import check_half
from retrograd.experiment.grid import GridMaker
from retrograd.experiment.lease import Queue
from retrograd.experiment.plan import planned
from retrograd.experiment.seen import refuse_oracles
from retrograd.experiment.tasks import Maker, Task, unlearn_config
from retrograd.lm.model import load_tokenizer
from retrograd.plan.machine import machine_of, resident
from retrograd.plan.probe import probe, stack_seconds
from retrograd.plan.run import plan_run, precision_of
from retrograd.plan.weightless import weightless
from retrograd.plan.work import Asks, Work, matter_of, model_of, steps_of
from retrograd.query.load import load_choices, load_rows
from retrograd.runs.run_folder import finished
from retrograd.settings.attacked import LAB
from retrograd.settings.commands import ValidateConfig
from retrograd.settings.experiment import ExperimentConfig, lab_of, read_experiment
from retrograd.settings.grid import is_grid, read_grid
from retrograd.settings.parse import build
from retrograd.settings.plan import PlanConfig
from retrograd.settings.run import MagicConfig
from retrograd.settings.tasks import Task as Question
from retrograd.settings.train import LoraConfig, TrainConfig
from retrograd.settings.unlearn import UnlearnConfig, parse_source
from retrograd.trust.retrain import Conditions
from retrograd.trust.rivals import STATES
from retrograd.trust.validate import check_validate, prepared

__all__ = ["Part", "PlannedMany", "plan_experiment", "plan_validate"]

TASKS = "tasks"
_TRAINED = ("scores", "train", "attribute")  # kinds of tasks that are a run


class Part(NamedTuple):
    """Trainings or tasks that take alike.

    Args:
        what: For people.
        number, done: How many there are, and how many of them are done.
        seconds: Of one; None where not known.
        source: Where that is from.
        memory, disk: Bytes of one, on the host and on disk.
    """

    what: str
    number: int
    done: int
    seconds: float | None
    source: str
    memory: int = 0
    disk: int = 0

    @property
    def left(self) -> float:
        return (self.seconds or 0.0) * (self.number - self.done)


class PlannedMany(NamedTuple):
    """The parts of a command.

    Args:
        workers: Processes side by side.
        more: Tasks that are not known yet, at most.
        host: Bytes of host memory that are free.
    """

    parts: list[Part]
    workers: int
    more: int = 0
    host: int = 0

    @property
    def seconds(self) -> float:
        """As if nothing waited for another."""
        return sum(part.left for part in self.parts) / self.workers

    @property
    def memory(self) -> int:
        """Bytes of host memory, each worker at what takes the most."""
        return self.workers * max((part.memory for part in self.parts if part.number > part.done), default=0)

    @property
    def disk(self) -> int:
        return sum(part.disk * (part.number - part.done) for part in self.parts)


def plan_validate(
    config: ValidateConfig, plan: PlanConfig, console: Console, clock: Callable[[], float] = time.perf_counter
) -> PlannedMany:
    """Retrainings that are missing, and what one takes, timed here by three of its steps.

    Raises:
        ValueError: As `validate`; if no time can be measured, for it runs where its run is.
    """
    check_validate(config)
    if plan.by_arithmetic:
        raise ValueError("validate retrains a run that is there, so its plan is timed here: leave --rate, --hardware, "
                         "--rows and --model_only out")  # fmt: skip
    stored, manifest = finished(config.run)
    device = torch.device(manifest.values["arithmetic"]["device"])
    machine = machine_of(plan, config.run, device, precision_of(stored))
    made = prepared(replace(config, rivals=()), manifest, "", console)  # whose scores take gradients and trainings
    loaded, conditions = made.run.loaded, made.conditions
    columns = len(loaded.queries.columns)
    micro = loaded.training.recipe.micro_batch_size
    work = Work(
        steps_of(loaded.stream, micro), model_of(loaded.model.module, loaded.initial.params),
        matter_of(loaded.training, loaded.initial), Asks(columns), 0, loaded.engine.name,
    )  # fmt: skip
    pace = probe(loaded, work, loaded.asked, None, clock)
    seconds = work.steps.steps * pace.step + pace.query / 3  # values alone
    sets = {left_out.key for left_out in made.mine if not made.bank.done(left_out.key, model=config.save_models)}
    number, source = len({left_out.key for left_out in made.mine}), "three steps timed here"
    if conditions.together > 1:
        stacked = stack_seconds(loaded, work, conditions.together, clock)
        seconds = work.steps.steps * stacked / max(1, conditions.together - 1) + pace.query / 3
        source = f"three steps of a stack of {conditions.together} timed here"
    memory = max(resident("VmHWM"), machine.base + 4 * work.matter.state * conditions.together)
    disk = work.matter.params if config.save_models else 0
    own = Part("retrainings", number, number - len(sets), seconds, source, memory, disk)
    alone = work.steps.steps * pace.step + pace.query / 3
    known = made.bank.baseline(conditions.alone.bits) is not None or not sets
    parts = [own, Part("with everything", 1, int(known), alone, "three steps timed here", memory)]
    if config.rivals and config.top:
        each = len(config.top) * len(config.weight) * columns * (1 + config.controls * config.tokens)
        parts.append(Part("rivals' strongest, at most", len(config.rivals) * each, 0, seconds, source, memory, disk))
    # a gradient of every row at each state
    read = pace.step * len(loaded.rows) / loaded.stream.batch_size
    parts += [
        Part(f"scores of {name}", 1, 0, STATES[name] * read + (name == "tracin") * alone, "three steps timed here")
        for name in config.rivals
        if name in STATES
    ]
    return PlannedMany(parts, _workers(conditions), 0, machine.host)


def _workers(conditions: Conditions) -> int:
    return max(1, conditions.workers)


def plan_experiment(
    config: ExperimentConfig, plan: PlanConfig, clock: Callable[[], float] = time.perf_counter
) -> PlannedMany:
    """The tasks of an experiment as far as they are known, by kind and method.

    Of tasks of which some are done the mean of those counts; else one of them is planned as its own command is, and a
    measuring is counted as forward passes at that rate.

    Raises:
        ValueError: As `experiment`.
    """
    maker, queue = _maker(config), Queue(config.out.resolve() / TASKS, config.lease)
    tasks = planned(maker, queue)
    groups: dict[str, list[Task]] = {}
    for task in tasks.tasks.values():
        groups.setdefault(_group(task), []).append(task)
    torch.set_num_threads(maker.spec.threads)
    host = machine_of(plan, config.out, torch.device("cpu"), None if plan.hardware == "here" else "float32").host
    parts, forward = list[Part](), None
    for name, members in sorted(groups.items(), key=lambda group: group[1][0].kind not in _TRAINED):
        part, measured = _part(name, members, config, plan, queue, forward, clock)
        parts.append(part)
        forward = forward or measured
    return PlannedMany(parts, config.workers, tasks.more, host)


def _maker(config: ExperimentConfig) -> Maker | GridMaker:
    if is_grid(config.file):
        return GridMaker(read_grid(config.file, config.names))
    built, names = lab_of(config.file, config.names, config.out.resolve() / LAB), config.names
    if built is not None:
        if not built.dir.exists():
            raise ValueError(
                f"{config.file} builds a lab first, which its tasks read: make one by `retrograd lab DIR`, name it by "
                f"--names {LAB}=DIR, and plan then"
            )
        names = (*names, f"{LAB}={built.dir}")
    spec = read_experiment(config.file, names)
    refuse_oracles(spec)
    if (attacked := spec.attacked()) is not None:
        check_half(attacked)
        check_data(attacked)
    return Maker(spec)


def _group(task: Task) -> str:
    """Tasks that take alike: of one kind, and of one method, model or split."""
    match task.kind:
        case "train":
            return f"train {task.what['method']}"
        case "measure":
            return f"measure {task.what['split']}"
        case "scores":
            return f"scores {task.label}"
        case "attribute":
            return "attribute, as the first cell"
    return task.kind


def _part(
    name: str, members: list[Task], config: ExperimentConfig, plan: PlanConfig, queue: Queue,
    forward: float | None, clock: Callable[[], float],
) -> tuple[Part, float | None]:  # fmt: skip
    """A group, and seconds of a forward pass of one token, where its own plan says so."""
    results = [result for task in members if (result := queue.result(task.name)) is not None]
    done, times = len(results), [float(result["seconds"]) for result in results if "seconds" in result]
    seconds, source = (sum(times) / len(times), f"mean of {len(times)} that are done") if times else (None, "not known")
    first = members[0]
    if first.kind not in _TRAINED:
        if seconds is None and first.kind == "measure" and forward is not None:
            seconds, source = forward * _read_by(first.what), "forward passes, at the pace of a training"
        return Part(name, len(members), done, seconds, source), None
    if done == len(members):
        return Part(name, len(members), done, seconds, source), None
    forecast = plan_run(_configured(first, config.out), plan, clock).forecast
    pace, tokens = forecast.pace, forecast.work.steps.tokens / forecast.work.steps.steps
    if seconds is None and forecast.seconds:
        seconds = forecast.total
        if (
            first.kind == "attribute"
        ):  # and three trainings for smoothness, and the retrainings with the one of everything
            seconds += (4 + first.what["subsets"]) * forecast.seconds["train"]
        source = "arithmetic" if plan.by_arithmetic else "three steps timed here"
    disk = sum(forecast.disk.values()) if first.kind == "scores" else forecast.disk.get("model", 0)
    part = Part(name, len(members), done, seconds, source, forecast.host_peak, disk)
    return part, None if pace is None else pace.step / 3 / tokens


def _configured(task: Task, out: Path) -> MagicConfig | UnlearnConfig:
    """A training's configuration; with weights of one, which take as long as any."""
    settings = {name: value for name, value in task.what["settings"].items() if name != "method"}
    if task.kind == "train":
        return dataclasses.replace(unlearn_config(task.what["method"], settings, task.name), run=out)
    scores: MagicConfig = build(MagicConfig, settings, task.name)
    return dataclasses.replace(scores, run=out)


_READ: dict[str, int] = {}  # tokens by what is measured


def _read_by(what: dict[str, Any]) -> int:
    """Tokens that a measuring reads: its questions once, its held-out rows by the model and by the base."""
    key = json.dumps({**what, "model": None}, sort_keys=True, default=str)
    if key not in _READ:
        tokenizer = load_tokenizer(what["tokenizer"] or what["base"])
        lm = weightless(what["base"], what["dtype"], torch.device("cpu"), LoraConfig(), TrainConfig())
        total = 0
        for name, settings in what["tasks"].items():
            question: Question = build(Question, settings, name)
            if question.choices:
                asked = load_choices(question, tokenizer, lm, None)
                total += sum(len(row) for rows in asked.rows for row in rows)
            else:
                total += int(load_rows(question, tokenizer, lm, None)[0].lengths.sum())
        for source in what["rows"]:
            total += 2 * int(load_rows(parse_source(source, UnlearnConfig()), tokenizer, lm, None)[0].lengths.sum())
        _READ[key] = total
    return _READ[key]
