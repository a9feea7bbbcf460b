"""Carrying out a task, by its kind, in the folder of whoever has it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from retrograd.attack.folder import configuration_from
from retrograd.durable import remove
from retrograd.evaluate.folder import content
from retrograd.experiment.grid import attribute
from retrograd.experiment.measure import measure
from retrograd.experiment.tasks import Task, unlearn_config
from retrograd.experiment.within import scores_within
from retrograd.runs.files import write_atomic
from retrograd.select import weights as weights_file
from retrograd.select.analysis import analyse
from retrograd.select.arms import Arm, Arms
from retrograd.select.files import Stated
from retrograd.select.sources import DataSet, Scored, load_data, load_scores
from retrograd.settings.attack import Configuration
from retrograd.settings.parse import build, dump_yaml
from retrograd.settings.run import MagicConfig
from retrograd.settings.select import FeasibleConfig, SelectConfig
from retrograd.settings.unlearn import ONES, UnlearnConfig, parse_source

__all__ = ["MEETING", "MODEL", "Runners", "carry_out"]

RUN, MODEL, MEETING = "run", "run/model", "meeting"  # in a task's folder
_HEARTBEAT = 5.0  # seconds between resume points, unless the file says otherwise


class Runners(NamedTuple):
    """The commands that a task is a run of; they stand above this room.

    meet: an attack's configuration against a model: its settings, the configuration, the model, and where it goes.
    """

    magic: Callable[[MagicConfig, Console], Any]
    unlearn: Callable[[UnlearnConfig, Console], Any]
    meet: Callable[[dict[str, Any], Configuration, str, Path], Any]


def carry_out(
    task: Task, folder: Path, done: Callable[[str], Path], runners: Runners, console: Console
) -> dict[str, Any]:
    """Do a task, or go on with it where its folder says that it was left; returns its outcome.

    Args:
        folder: Of whoever has it.
        done: The folder of a task that is done.
    Raises:
        ValueError, RunError, …: As the commands do.
    """
    what = task.what
    match task.kind:
        case "scores":
            config = build(MagicConfig, what["settings"], task.name)
            replay = dataclasses.replace(config.replay, heartbeat=min(config.replay.heartbeat, _HEARTBEAT))
            runners.magic(dataclasses.replace(config, run=folder / RUN, replay=replay), console)
            return {}
        case "select":
            return _select(what, folder, done)
        case "analyse":
            return _analysed(what, folder, done)
        case "train":
            runners.unlearn(_training(task, folder / RUN, done), console)
            remove(folder / RUN / "checkpoints")  # its model is what is left of it
            return {}
        case "attribute":
            return attribute(task, folder / RUN, runners.magic, console)
        case "measure":
            return measure(what, _model(what, done), folder / "answers")
        case "attack":
            configuration = configuration_from(what["configuration"], task.name)
            runners.meet(what["settings"], configuration, _model(what, done), folder / MEETING)
            return {}


def _model(what: dict[str, Any], done: Callable[[str], Path]) -> str:
    asked = what["model"]
    return str(done(asked["task"]) / MODEL) if "task" in asked else str(asked["folder"])


def _training(task: Task, run: Path, done: Callable[[str], Path]) -> UnlearnConfig:
    what = task.what
    weights = [name if name == ONES or Path(name).exists() else str(done(name) / "weights") for name in what["weights"]]
    given = () if set(weights) == {ONES} else tuple(weights)
    settings = {name: value for name, value in what["settings"].items() if name != "method"}
    config = unlearn_config(what["method"], settings, task.name)
    return dataclasses.replace(config, run=run, weights=given, heartbeat=min(config.heartbeat, _HEARTBEAT))


def _select(what: dict[str, Any], folder: Path, done: Callable[[str], Path]) -> dict[str, Any]:
    """Weights of one corpus: the arm's, or one control's at one seed."""
    config = _selection(what, folder, done, **what["select"])
    data, forget, retain = _scored(what, config)
    arms = Arms(config, data, forget, retain)
    made: Arm = next(arms.each_control()) if config.controls else arms.arm()
    record = {
        "rule": config.rule, "use": config.use, "scores": forget.records, "against": retain.records if retain else [],
        "control": made.control, "seed": made.seed,
    }  # fmt: skip
    weights_file.write(folder / "weights", made.weights, made.kept, data.places, record)
    arm = arms.arm().weights
    same = float((arm == made.weights)[arm != 0].double().mean())
    return {"tokens": len(made.weights), "weighed": int((made.weights != 0).sum()), "same_as_arm": same}


def _analysed(what: dict[str, Any], folder: Path, done: Callable[[str], Path]) -> dict[str, Any]:
    config = _selection(what, folder, done, controls=[], alpha=what["alpha"])
    data, forget, retain = _scored(what, config)
    assert retain is not None, "checked by the settings"
    return {"corpus": what["corpus"],
            **analyse(forget.values, retain.values, data.places, FeasibleConfig(), alpha=what["alpha"])}  # fmt: skip


def _selection(what: dict[str, Any], folder: Path, done: Callable[[str], Path], **more: Any) -> SelectConfig:
    """The configuration that `retrograd select` would have; rows.yaml says which rows scores from files are of."""
    common = UnlearnConfig(max_length=what["max_length"], min_chars=what["min_chars"])
    data = dataclasses.asdict(parse_source(what["corpus"], common))
    rows = dump_yaml({"model": what["base"], "data": data})
    write_atomic(folder / "rows.yaml", lambda temporary: temporary.write_text(rows, encoding="utf8"))
    sides: dict[str, Any] = {}
    for side, prefix in (("scores", ""), ("against", "against_")):
        sources: list[str] = []
        for entry in what[side]:
            run = str(done(entry["task"]) / RUN) if "task" in entry else entry["folder"]
            if "folder" in entry and content(entry["folder"]) != entry["content"]:
                raise ValueError(f"{entry['folder']} has changed since the experiment began")
            source = f"{run}:{entry['query']}" if entry["query"] else run
            if entry.get("within"):
                table = folder / f"{side}-{len(sources)}.parquet"
                source = scores_within(source, str(data["dataset"]), folder / "rows.yaml", table)
                entry = {**entry, "sign": "negative", "alignment": "target"}
            sources.append(source)
            sides |= {f"{prefix}sign": entry["sign"], f"{prefix}alignment": entry["alignment"]}
        sides[side] = sources
    settings = {**more, **sides, "out": folder, "rows": folder / "rows.yaml", "seeds": 1}
    config: SelectConfig = build(SelectConfig, settings, "selection")
    return config


def _scored(what: dict[str, Any], config: SelectConfig) -> tuple[DataSet, Scored, Scored | None]:
    data = load_data(config)
    forget = load_scores(config.scores, data, Stated(config.sign, config.alignment))
    if not config.against:
        return data, forget, None
    stated = Stated(config.against_sign, config.against_alignment, "against_")
    retain = load_scores(config.against, data, stated)
    if forget.per_token != retain.per_token:
        raise ValueError("one score set is of tokens and the other of documents; both have to be of the same")
    return data, forget, retain
