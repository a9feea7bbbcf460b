"""The summary of an evaluation by lm-eval: its metrics, with intervals and paired comparisons where questions are right
or wrong, and a verdict where answers are letters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from retrograd.evaluate.intervals import wilson
from retrograd.evaluate.lm_eval.samples import Sample, Sampled, answers_of, form_of, read_sampled
from retrograd.evaluate.summary import together
from retrograd.evaluate.tell import Counted, Examined, Outcome, read_files, tell
from retrograd.evaluate.verdict import Diagnosis, Evaluated, diagnose
from retrograd.query.prepare import Answers
from retrograd.settings.tasks import Role, Task

__all__ = ["summarise_harness"]

_NO_LETTERS = (
    "no verdict: none of these tasks is answered by letter, so nothing here shows whether the answers depend on the "
    "questions"
)

Form = Literal["letter", "cloze"]
_FORMS: tuple[Form, ...] = ("letter", "cloze")


class _Model(NamedTuple):
    """One model's files by name; None where missing."""

    name: str
    digest: str | None
    files: dict[str, Sampled | None]


class _Metric(NamedTuple):
    """Of one task or group: what lm-eval says, and which questions are right where that is all it says."""

    value: float | None
    stderr: float | None
    higher: bool | None
    right: list[float] | None
    hashes: list[str]


def summarise_harness(
    folder: Path, models: Sequence[str], names: dict[str, Role], reference: str, knows: str | None,
    never: str | None,
) -> dict[str, Any]:  # fmt: skip
    """What summary.json says.

    Args:
        folder: Of the evaluation.
        models: By name, reference and the two others included.
        names: What lm-eval was asked for, with its role.
        reference: The model that the others are compared with.
        knows, never: Between which positions are measured, if both are given.
    Raises:
        RunError: If a file is damaged, or two files of a model are of different weights or versions of lm-eval.
    """
    missing: list[dict[str, str]] = []
    every = {model: _read(folder, model, names, missing) for model in models}
    examined = {name: Examined(model.digest, _outcomes(model, names)) for name, model in every.items()}
    return tell(examined, _diagnoses(every, names, reference), missing, reference, knows, never)


def _read(folder: Path, model: str, names: dict[str, Role], missing: list[dict[str, str]]) -> _Model:
    digest, contents = read_files(folder, model, names, read_sampled, lambda _, sampled: _failures(sampled), missing)
    return _Model(model, digest, contents)


def _failures(sampled: Sampled) -> Iterator[str]:
    """What in a file is no number."""
    for task in sampled.tasks:
        why = sampled.failure(task)
        lost = [label for label, metric in _metrics(sampled, task).items() if metric.value is None]
        if why or lost:
            yield f"{task}: {why or ', '.join(lost) + ' is not finite'}"


def _first_filter(samples: list[Sample]) -> list[Sample]:
    """Each question once."""
    return [sample for sample in samples if sample.filter == samples[0].filter]


def _parts(sampled: Sampled, name: str) -> list[str]:
    """The tasks of a group, groups inside it opened; a task is its own part."""
    if name in sampled.tasks:
        return [name]
    children = sampled.told["group_subtasks"].get(name, [])
    return list(dict.fromkeys(part for child in children for part in _parts(sampled, child)))


def _metrics(sampled: Sampled, name: str) -> dict[str, _Metric]:
    """By label: the metric, and its filter if it has one with a name."""
    results, metrics = sampled.told["results"][name], {}
    parts = _parts(sampled, name)
    samples = [sample for part in parts for sample in sampled.tasks[part]]
    failed = any(sampled.failure(part) for part in parts)
    higher = sampled.told["higher_is_better"].get(name, {})
    for key, value in results.items():
        metric, comma, kind = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        value = None if failed else _finite(value)
        right, hashes = _right(samples, parts, metric, kind, value)
        stderr = None if failed else _finite(results.get(f"{metric}_stderr,{kind}"))
        label = metric if kind == "none" else key
        metrics[label] = _Metric(value, stderr, higher.get(metric), right, hashes)
    return metrics


def _finite(value: Any) -> float | None:
    number = isinstance(value, int | float) and math.isfinite(value)
    return float(value) if number else None


def _right(
    samples: list[Sample], parts: list[str], metric: str, kind: str, value: float | None
) -> tuple[list[float] | None, list[str]]:
    """1 or 0 for each question, if the metric is their mean; every question of a group counts once."""
    asked = [sample for sample in samples if sample.filter == kind]
    marks = [sample.metrics.get(metric) for sample in asked]
    right = [mark for mark in marks if mark in (0.0, 1.0) and mark is not None]
    all_parts = {sample.task for sample in asked} == set(parts)
    if value is None or not right or len(right) < len(marks) or not all_parts:
        return None, []
    if not math.isclose(sum(right) / len(right), value, rel_tol=1e-9, abs_tol=1e-12):
        return None, []
    return right, [f"{sample.task} {sample.question} {sample.doc_hash} {sample.prompt_hash}" for sample in asked]


def _outcomes(model: _Model, names: dict[str, Role]) -> dict[str, Outcome]:
    """Of every task and group under the names; nulls where a name is missing."""
    outcomes: dict[str, Outcome] = {}
    for name, role in names.items():
        sampled = model.files[name]
        if sampled is None:
            gone = {"asked": name, "form": None, "role": role, "accuracy": None, "metrics": None}
            outcomes[name] = Outcome(role, gone, {})
            continue
        for task in sampled.told["results"]:
            if metrics := _metrics(sampled, task):
                outcomes[task] = Outcome(role, _values(sampled, name, task, role, metrics), _counted(metrics))
    return outcomes


def _counted(metrics: dict[str, _Metric]) -> dict[str, Counted]:
    return {
        label: Counted(torch.tensor(metric.right, dtype=torch.float64), metric.hashes)
        for label, metric in metrics.items()
        if metric.right is not None
    }


def _values(sampled: Sampled, name: str, task: str, role: Role, metrics: dict[str, _Metric]) -> dict[str, Any]:
    samples = [sample for part in _parts(sampled, task) for sample in _first_filter(sampled.tasks[part])]
    harness = sampled.told
    values: dict[str, Any] = {
        "asked": name, "form": form_of(samples) or "other", "role": role, "version": harness["versions"].get(task),
        "num_fewshot": harness["n-shot"].get(task), "questions": len(samples),
        "of": harness["n-samples"].get(task, {}).get("original"), "failed": sum(sample.failed for sample in samples),
        "metrics": {label: _entry(metric) for label, metric in metrics.items()},
    }  # fmt: skip
    if (acc := metrics.get("acc")) is not None:
        values |= {"accuracy": acc.value, **{key: _entry(acc).get(key) for key in ("interval", "right")}}
    return values


def _entry(metric: _Metric) -> dict[str, Any]:
    entry: dict[str, Any] = {"value": metric.value, "stderr": metric.stderr, "higher_is_better": metric.higher}
    if metric.right is not None:
        count = int(sum(metric.right))
        entry |= {"interval": list(wilson(count, len(metric.right))), "right": count}
    return entry


def _diagnoses(every: dict[str, _Model], names: dict[str, Role], reference: str) -> dict[str, Diagnosis]:
    """By name and form of what was asked; nothing is said where no answer is a letter."""
    answers = {name: dict(_answers(model)) for name, model in every.items()}
    forms = {(name, form) for by_form in answers.values() for name, form in by_form}
    if not any(form == "letter" for _, form in forms):
        return {model: Diagnosis(None, [_NO_LETTERS], {}) for model in every}
    forms |= {(name, "letter") for name in names if all(model.files[name] is None for model in every.values())}
    asked = [(name, form) for name in names for form in _FORMS if (name, form) in forms]
    labels = {(name, form): name if len({*_both(name)} & forms) == 1 else f"{name} ({form})" for name, form in asked}
    tasks = {labels[name, form]: Task("lm-eval", form=form, role=names[name]) for name, form in asked}
    rated = {
        name: Evaluated(name, model.digest, {label: answers[name].get(key) for key, label in labels.items()})
        for name, model in every.items()
    }
    return {name: diagnose(model, rated[reference], tasks) for name, model in rated.items()}


def _both(name: str) -> list[tuple[str, Form]]:
    return [(name, form) for form in _FORMS]


def _answers(model: _Model) -> Iterator[tuple[tuple[str, Form], Answers]]:
    """Answers to all multiple-choice questions of a name, by form."""
    for name, sampled in model.files.items():
        parts = [] if sampled is None else [_first_filter(every) for every in sampled.tasks.values()]
        for form in _FORMS:
            of_form = [answers_of(samples) for samples in parts if form_of(samples) == form]
            readable = [answers for answers in of_form if answers is not None]
            if readable and len(readable) == len(of_form) and (joined := together(readable)):
                yield (name, form), joined
