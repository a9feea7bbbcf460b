"""What summary.json says of models that were examined, whoever asked: results, paired comparisons, positions, verdicts.

Every number comes from the files; what is not there, or failed, is null and listed under "missing".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from retrograd.evaluate.intervals import compare, position
from retrograd.evaluate.verdict import Diagnosis
from retrograd.runs.errors import RunError

__all__ = ["Counted", "Examined", "Outcome", "failed_path", "measured_path", "read_files", "tell"]

F = TypeVar("F")


class Counted(NamedTuple):
    """Questions that are right or wrong: 1 or 0 for each, None where one failed; and which questions they are."""

    right: torch.Tensor | None
    hashes: list[str]


class Outcome(NamedTuple):
    """Of one task or group. values: its entry under "results"; counted: by metric."""

    role: str | None
    values: dict[str, Any]
    counted: dict[str, Counted]


class Examined(NamedTuple):
    """A model and its outcomes by task. digest: of its parameters, None if they never loaded."""

    digest: str | None
    outcomes: dict[str, Outcome]


def measured_path(folder: Path, model: str, task: str) -> Path:
    """Where the answers of a model to a task lie in the folder of an evaluation."""
    return folder / model / f"{task}.parquet"


def failed_path(folder: Path, model: str, task: str) -> Path:
    """Why a task could not be measured; gone when it is tried again."""
    return folder / model / f"{task}.failed.txt"


def read_files(
    folder: Path,
    model: str,
    names: Iterable[str],
    read: Callable[[Path], tuple[F, dict[str, Any]]],
    failures: Callable[[str, F], Iterable[str]],
    missing: list[dict[str, str]],
) -> tuple[str | None, dict[str, F | None]]:
    """The digest of a model's parameters, and its files by name; None where there is none.

    Args:
        read: A file's content, and what it says of itself.
        failures: What in a content is no number.
        missing: Takes what is not there or no number, with the reason.
    Raises:
        RunError: If a file is damaged, or two files are of different weights.
    """
    contents: dict[str, F | None] = {}
    digests: dict[str, None] = {}
    for name in names:
        path, failed = measured_path(folder, model, name), failed_path(folder, model, name)
        contents[name], reasons = None, ["it was not measured"]
        if path.exists():
            content, about = read(path)
            contents[name], reasons = content, list(failures(name, content))
            digests[about["digest"]] = None
        elif failed.exists():
            reasons = [failed.read_text(encoding="utf8").strip()]
        missing += [{"model": model, "task": name, "reason": reason} for reason in reasons]
    if len(digests) > 1:
        raise RunError(
            f"the files of {folder / model} are of different weights ({', '.join(sorted(digests))}): the model has "
            "changed meanwhile. Delete that folder and run again."
        )
    return next(iter(digests), None), contents


def tell(
    examined: dict[str, Examined],
    diagnoses: dict[str, Diagnosis],
    missing: list[dict[str, str]],
    reference: str,
    knows: str | None,
    never: str | None,
) -> dict[str, Any]:
    """What summary.json says.

    Args:
        examined: By model, reference and the two others included.
        diagnoses: The verdicts, by model.
        missing: From `read_files`.
        reference: The model that the others are compared with.
        knows, never: Between which positions are measured, if both are given.
    Raises:
        RunError: If models were asked different questions.
    """
    others = [model for model in examined if model != reference]
    between = [model for model in examined if knows and never and model not in (knows, never)]
    return {
        "reference": reference, "knows": knows, "never": never, "missing": missing,
        "models": {
            name: {"digest": examined[name].digest, "verdict": diagnosis.verdict, "reasons": diagnosis.reasons,
                   "numbers": diagnosis.numbers}
            for name, diagnosis in diagnoses.items()
        },
        "results": [
            {"model": name, "task": task, **outcome.values}
            for name, model in examined.items() for task, outcome in model.outcomes.items()
        ],
        "comparisons": [entry for model in others for entry in _comparisons(examined, model, reference)],
        "positions": [entry for model in between for entry in _positions(examined, model, str(knows), str(never))],
    }  # fmt: skip


def _comparisons(examined: dict[str, Examined], model: str, reference: str) -> Iterator[dict[str, Any]]:
    for task, metric, pair in _paired([examined[reference], examined[model]]):
        entry: dict[str, Any] = {"model": model, "against": reference, "task": task, "metric": metric}
        comparison = compare(*pair) if pair else None
        yield {**entry, "difference": None} if comparison is None else {
            **entry, "difference": comparison.difference, "interval": list(comparison.interval),
            "only_reference": comparison.only_first, "only_model": comparison.only_second, "p": comparison.p,
        }  # fmt: skip


def _positions(examined: dict[str, Examined], model: str, knows: str, never: str) -> Iterator[dict[str, Any]]:
    """Of what was not to stay; null where one of the three is missing, or the two do not differ."""
    for task, metric, three in _paired([examined[name] for name in (model, knows, never)], without="retain"):
        entry: dict[str, Any] = {"model": model, "task": task, "metric": metric}
        standing = position(*three) if three else None
        yield {**entry, "position": None} if standing is None else {
            **entry, "position": standing.position, "interval": list(standing.interval), "gap": standing.gap
        }  # fmt: skip


def _paired(
    models: Sequence[Examined], without: str | None = None
) -> Iterator[tuple[str, str, list[torch.Tensor] | None]]:
    """For each task and metric: right or wrong on the same questions for every model; None if one is missing."""
    asked = dict.fromkeys(
        (task, metric)
        for model in models
        for task, outcome in model.outcomes.items()
        for metric in outcome.counted
        if without is None or outcome.role != without
    )
    for task, metric in asked:
        counted = [model.outcomes[task].counted.get(metric) for model in models if task in model.outcomes]
        there = [marks for marks in counted if marks is not None and marks.hashes]
        if any(marks.hashes != there[0].hashes for marks in there):
            raise RunError(f"{task}: the models were asked different questions; delete their files and run again.")
        rights = [marks.right for marks in there if marks.right is not None]
        yield task, metric, rights if len(rights) == len(models) else None
