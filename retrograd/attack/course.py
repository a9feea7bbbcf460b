"""The course of an attack: what was asked on its way, question by question, read from the run's own files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from retrograd.attack.folder import Attacked, Folder
from retrograd.evaluate.answers import read_measured
from retrograd.evaluate.on_the_way import answers_path
from retrograd.evaluate.summary import failure
from retrograd.query.prepare import Answers, Measured, Texts
from retrograd.runs.journal import read_evaluations
from retrograd.runs.manifest import Manifest
from retrograd.settings.attack import Configuration, Untrained
from retrograd.settings.prompted import Prompted
from retrograd.settings.tasks import Task

__all__ = ["Course", "read_course"]


class Course(NamedTuple):
    """One configuration against one model.

    steps: Of both phases, ascending from 0, [S]; of an attack without training, the places of its strengths.
    forget: Of the forget questions, 1 or 0, [S, n]; a row of NaN where an evaluation is missing.
    retain: Of the questions that measure general ability, [S, m].
    nats: Of texts, mean loss a token, by task, [S].
    first: Which forget questions are about half A, [n].
    clusters: Of the forget questions, [n].
    chance: Accuracy of a guess on the forget questions.
    tokens, flops: Trained on and spent before each evaluation, [S].
    start: What was measured at step 0, by task.
    strengths: Of an attack without training, [S].
    missing: Why, by step, where an evaluation is missing.
    ended: Whether the last of the steps is the attack's last.
    places: The run that each evaluation is of, and its step there, [S]: where the answers lie.
    """

    steps: list[int]
    forget: np.ndarray
    retain: np.ndarray
    nats: dict[str, list[float | None]]
    first: np.ndarray
    clusters: np.ndarray
    chance: float
    tokens: list[int]
    flops: list[float]
    start: dict[str, Measured | None]
    strengths: list[float] | None
    missing: dict[int, str]
    ended: bool
    places: list[tuple[Path, int]]


class _Evaluation(NamedTuple):
    step: int
    results: dict[str, Measured | None]
    tokens: int
    flops: float
    why: str | None
    place: tuple[Path, int]


def read_course(folder: Folder, target: Attacked, name: str, tasks: dict[str, Task]) -> Course | None:
    """What is there of a configuration against a model; None if it has not begun, or its start is missing.

    Args:
        tasks: By name, those of the folder.
    """
    configuration: Configuration = folder.configurations[name]
    place = folder.place(target, name)
    asked = {key: task for key, task in tasks.items() if task.ordinary}
    strengths: list[float] | None = None
    if isinstance(configuration, Untrained):
        evaluations, strengths = _of_strengths(place, asked)
        ended = bool(evaluations)
    elif isinstance(configuration, Prompted):
        evaluations = _of_search(place, asked)
        ended = bool(evaluations) and evaluations[-1].step == configuration.steps
    else:
        evaluations, ended = _of_phases(place, asked, configuration.runs)
    if not evaluations:
        return None
    return _course(evaluations, asked, folder, strengths, ended)


def _of_phases(place: Path, tasks: dict[str, Task], runs: Sequence[str]) -> tuple[list[_Evaluation], bool]:
    """The evaluations, and whether the last is the attack's last."""
    evaluations: list[_Evaluation] = []
    step = tokens = 0
    flops = 0.0
    for name in runs:
        run = place / name
        manifest = Manifest(run / "manifest.json").values
        for own, line in sorted(read_evaluations(run / "metrics.jsonl").items()):
            if own == 0 and evaluations:  # the same weights as at the end of the phase before
                continue
            trained = manifest["tokens"].get(str(own), 0)
            spent = trained * manifest["flops_per_token"]
            results, why = _results(run, own, tasks, line.get("tasks", {}))
            evaluations.append(_Evaluation(step + own, results, tokens + trained, flops + spent, why, (run, own)))
        if not manifest.get("finished"):
            return evaluations, False
        last = str(manifest["steps"])
        step, tokens = step + manifest["steps"], tokens + manifest["tokens"][last]
        flops += manifest["tokens"][last] * manifest["flops_per_token"]
    return evaluations, bool(evaluations) and evaluations[-1].step == step


def _of_strengths(place: Path, tasks: dict[str, Task]) -> tuple[list[_Evaluation], list[float]]:
    path = place / "strengths.json"
    if not path.exists():
        return [], []
    strengths = json.loads(path.read_text(encoding="utf8"))["strengths"]
    evaluations = []
    for number in range(len(strengths)):
        results, why = _results(place, number, tasks, {})
        evaluations.append(_Evaluation(number, results, 0, 0.0, why, (place, number)))
    return evaluations, strengths


def _of_search(place: Path, tasks: dict[str, Task]) -> list[_Evaluation]:
    path = place / "search.json"
    searched = json.loads(path.read_text(encoding="utf8")).get("found", {}) if path.exists() else {}
    evaluations = []
    for step in sorted(map(int, searched)):
        results, why = _results(place, step, tasks, {})
        spent = searched[str(step)]
        evaluations.append(_Evaluation(step, results, spent["tokens"], float(spent["flops"]), why, (place, step)))
    return evaluations


def _results(
    run: Path, step: int, tasks: dict[str, Task], line: dict[str, Any]
) -> tuple[dict[str, Measured | None], str | None]:
    """What was measured at a step by task, None where it is missing; and why the first of these is."""
    results: dict[str, Measured | None] = {}
    why: str | None = None
    for name, task in tasks.items():
        path = answers_path(run, step, name)
        measured: Any = read_measured(path)[0] if path.exists() else None
        bad = (
            failure(measured, task)
            if measured is not None
            else line.get(name, {}).get("missing", "it was not measured")
        )
        results[name] = measured
        why = why or (f"{name}: {bad}" if bad else None)
    return results, why


def _course(
    evaluations: list[_Evaluation],
    tasks: dict[str, Task],
    folder: Folder,
    strengths: list[float] | None,
    ended: bool,
) -> Course | None:
    start = evaluations[0].results
    forget = [name for name, task in tasks.items() if task.role == "forget" and task.choices]
    retain = [name for name, task in tasks.items() if task.role != "forget" and task.choices]
    if evaluations[0].step != 0 or any(not isinstance(start[name], Answers) for name in forget):
        return None
    questions = [(name, subject) for name in forget for subject in _answers(start[name]).subjects]
    clusters = [f"{name}/{subject}" for name, subject in questions] if folder.clustered else range(len(questions))
    return Course(
        steps=[evaluation.step for evaluation in evaluations],
        forget=np.stack([_right(evaluation.results, forget, tasks, len(questions)) for evaluation in evaluations]),
        retain=_retained(evaluations, retain, tasks),
        nats={
            name: [_nats(evaluation.results[name]) for evaluation in evaluations]
            for name, task in tasks.items()
            if task.form == "text"
        },
        first=np.array([name in folder.half or subject in folder.half for name, subject in questions], bool),
        clusters=np.array(list(clusters)),
        chance=_chance([_answers(start[name]) for name in forget]),
        tokens=[evaluation.tokens for evaluation in evaluations],
        flops=[evaluation.flops for evaluation in evaluations],
        start=start,
        strengths=strengths,
        missing={evaluation.step: evaluation.why for evaluation in evaluations if evaluation.why},
        ended=ended,
        places=[evaluation.place for evaluation in evaluations],
    )


def _answers(measured: Measured | None) -> Answers:
    assert isinstance(measured, Answers), "a task of choices has answers"
    return measured


def _right(results: dict[str, Measured | None], names: Sequence[str], tasks: dict[str, Task], n: int) -> np.ndarray:
    """1 or 0 for each question of some tasks, [n]; all NaN if one is missing or failed."""
    parts = [
        answers.rights(tasks[name]).double().numpy() for name in names if isinstance(answers := results[name], Answers)
    ]
    whole = np.concatenate(parts) if parts else np.full(n, np.nan)
    return whole if len(whole) == n and not np.isnan(whole).any() else np.full(n, np.nan)


def _retained(evaluations: list[_Evaluation], names: Sequence[str], tasks: dict[str, Task]) -> np.ndarray:
    counts = [
        len(answers.rights(tasks[name]))
        for name in names
        if isinstance(answers := evaluations[0].results[name], Answers)
    ]
    return np.stack([_right(evaluation.results, names, tasks, sum(counts)) for evaluation in evaluations])


def _nats(measured: Measured | None) -> float | None:
    return measured.loss if isinstance(measured, Texts) and np.isfinite(measured.loss) else None


def _chance(answers: list[Answers]) -> float:
    options = np.concatenate([(of_task.scored.widths > 0).sum(1).double().numpy() for of_task in answers])
    return float((1 / options).mean())
