"""The summary of an evaluation: from the files of single models and tasks to accuracies, comparisons and verdicts.

Every number comes from the files; what is not there, or failed, is null and listed under "missing".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from retrograd.evaluate.answers import read_measured
from retrograd.evaluate.intervals import compare, position, wilson
from retrograd.evaluate.letter_habits import letter_habits
from retrograd.evaluate.verdict import Evaluated, diagnose
from retrograd.query.choices import Scored
from retrograd.query.prepare import Answers, Measured, Samples, Texts
from retrograd.runs.errors import RunError
from retrograd.settings.tasks import Task

__all__ = ["described", "failed_path", "failure", "measured_path", "summarise", "together"]


def measured_path(folder: Path, model: str, task: str) -> Path:
    """Where the answers of a model to a task lie in the folder of an evaluation."""
    return folder / model / f"{task}.parquet"


def failed_path(folder: Path, model: str, task: str) -> Path:
    """Why a task could not be measured; gone when it is tried again."""
    return folder / model / f"{task}.failed.txt"


def summarise(
    folder: Path, models: Sequence[str], tasks: dict[str, Task], reference: str, knows: str | None, never: str | None
) -> dict[str, Any]:
    """What summary.json says.

    Args:
        folder: Of the evaluation.
        models: By name, reference and the two others included.
        reference: The model that the others are compared with.
        knows, never: Between which positions are measured, if both are given.
    Raises:
        RunError: If a file is damaged, or two files of a model are of different weights.
    """
    missing: list[dict[str, str]] = []
    found = {name: _evaluated(folder, name, tasks, missing) for name in models}
    every = {**tasks, **{task.group: task for task in tasks.values() if task.group}}
    base, asked = found[reference], [name for name, task in every.items() if task.choices]
    whole = {name: task for name, task in every.items() if not task.group or name not in tasks}
    told = {name: diagnose(found[name], base, whole) for name in models}
    return {
        "reference": reference, "knows": knows, "never": never, "missing": missing,
        "models": {
            name: {"digest": found[name].digest, "verdict": one.verdict, "reasons": one.reasons, "numbers": one.numbers}
            for name, one in told.items()
        },
        "results": [_result(found[name], task, every[task]) for name in models for task in found[name].results],
        "comparisons": [
            _comparison(found[name], base, task, every[task]) for name in models if name != reference for task in asked
        ],
        "positions": [
            _position(found[name], found[knows], found[never], task, every[task])
            for name in models if knows and never and name not in (knows, never)
            for task in asked if every[task].role != "retain"
        ],
    }  # fmt: skip


def _evaluated(folder: Path, model: str, tasks: dict[str, Task], missing: list[dict[str, str]]) -> Evaluated:
    results: dict[str, Measured | None] = {}
    digests: dict[str, str] = {}
    for name, task in tasks.items():
        path, failed = measured_path(folder, model, name), failed_path(folder, model, name)
        results[name], why = None, None
        if path.exists():
            results[name], about = read_measured(path)
            digests[str(path)] = about["digest"]
            why = failure(results[name], task)
        else:
            why = failed.read_text(encoding="utf8").strip() if failed.exists() else "it was not measured"
        if why:
            missing.append({"model": model, "task": name, "reason": why})
    if len(set(digests.values())) > 1:
        raise RunError(
            f"the files of {folder / model} are of different weights ({', '.join(sorted(digests))}): the model has "
            "changed meanwhile. Delete that folder and run again."
        )
    for group in dict.fromkeys(task.group for task in tasks.values() if task.group):
        results[group] = together([results[name] for name, task in tasks.items() if task.group == group])
    return Evaluated(model, next(iter(digests.values()), None), results)


def failure(measured: Measured | None, task: Task) -> str | None:
    """What in a file is no number."""
    if isinstance(measured, Answers) and (bad := int(measured.scored.failed.sum())):
        return f"{bad} of {len(measured.scored.gold)} questions have no finite log-probability"
    if isinstance(measured, Texts) and not math.isfinite(measured.perplexity):
        return f"the mean loss is {measured.loss:.4g} nats: no finite perplexity"
    if isinstance(measured, Samples) and (bad := measured.texts.count(None)):
        return f"{bad} of {len(measured.texts)} continuations have no finite logits"
    return None


def together(parts: Sequence[Measured | None]) -> Answers | None:
    """All questions of a group; None if a part is missing."""
    answers = [part for part in parts if isinstance(part, Answers)]
    if len(answers) < len(parts):
        return None
    scored = [one.scored for one in answers]
    most = max(one.logprobs.shape[1] for one in scored)

    def joined(values: list[torch.Tensor], fill: float) -> torch.Tensor:
        return torch.cat([torch.nn.functional.pad(v, (0, most - v.shape[1]), value=fill) for v in values])

    mass = [one.mass for one in scored if one.mass is not None]
    both = Scored(
        joined([one.logprobs for one in scored], -torch.inf), joined([one.widths for one in scored], 0.0),
        torch.cat([one.gold for one in scored]), torch.cat(mass) if mass else None,
        [text for one in scored for text in one.hashes],
    )  # fmt: skip
    return Answers(both, [subject for one in answers for subject in one.subjects])


def _result(model: Evaluated, name: str, task: Task) -> dict[str, Any]:
    return {"model": model.name, "task": name, **described(model.results[name], task)}


def described(measured: Measured | None, task: Task) -> dict[str, Any]:
    """One model and task as plain values; null where missing."""
    found: dict[str, Any] = {"form": task.form, "role": task.role}
    if isinstance(measured, Answers):
        return found | _accuracy(measured, task)
    if isinstance(measured, Texts):
        good = math.isfinite(measured.perplexity)
        return found | {
            "perplexity": measured.perplexity if good else None, "nats_per_token": measured.loss if good else None,
            "tokens": sum(measured.targets), "documents": len(measured.documents),
        }  # fmt: skip
    if isinstance(measured, Samples):
        samples = [{"prompt": a, "text": b} for a, b in zip(measured.prompts, measured.texts)]
        return found | {"samples": samples}
    empty = {"text": "perplexity", "generate": "samples"}.get(task.form, "accuracy")
    return found | {empty: None}


def _accuracy(answers: Answers, task: Task) -> dict[str, Any]:
    scored, right = answers.scored, answers.rights(task)
    n, failed = len(right), int(scored.failed.sum())
    found: dict[str, Any] = {"questions": n, "failed": failed, "normalised": task.normalise, **_share(right)}
    if not failed:
        four_way = scored.logprobs.softmax(1).gather(1, scored.gold[:, None])
        found["mean_probability_of_right"] = float(four_way.mean())  # among the options
        if scored.mass is None:
            found |= {"accuracy_plain": scored.accuracy, "accuracy_norm": scored.accuracy_norm}
    if scored.mass is not None and (habits := letter_habits(scored)):
        found["letters"] = {name: value for name, value in habits._asdict().items() if name != "questions"}
    subjects = dict.fromkeys(subject for subject in answers.subjects if subject)
    if len(subjects) > 1:
        of = {s: torch.tensor([i for i, other in enumerate(answers.subjects) if other == s]) for s in subjects}
        found["subjects"] = {s: {"questions": len(places), **_share(right[places])} for s, places in of.items()}
    return found


def _share(right: torch.Tensor) -> dict[str, Any]:
    """Accuracy with its interval; null if a question failed."""
    if right.isnan().any():
        return {"accuracy": None, "interval": None, "right": None}
    count = int(right.sum())
    return {"accuracy": float(right.mean()), "interval": list(wilson(count, len(right))), "right": count}


def _comparison(model: Evaluated, reference: Evaluated, name: str, task: Task) -> dict[str, Any]:
    found: dict[str, Any] = {"model": model.name, "against": reference.name, "task": name, "difference": None}
    pair = _paired([reference, model], name, task)
    if pair is None:
        return found
    one = compare(*pair)
    return found | {
        "difference": one.difference, "interval": list(one.interval), "only_reference": one.only_first,
        "only_model": one.only_second, "p": one.p,
    }  # fmt: skip


def _position(model: Evaluated, knows: Evaluated, never: Evaluated, name: str, task: Task) -> dict[str, Any]:
    """Null where one of the three is missing, or the two do not differ."""
    found: dict[str, Any] = {"model": model.name, "task": name, "position": None}
    three = _paired([model, knows, never], name, task)
    one = position(*three) if three else None
    return found if one is None else found | {
        "position": one.position, "interval": list(one.interval), "gap": one.gap
    }  # fmt: skip


def _paired(models: list[Evaluated], name: str, task: Task) -> list[torch.Tensor] | None:
    """Right or wrong on the same questions, for each model; None if anything is missing."""
    results = [model.results[name] for model in models]
    answers = [one for one in results if isinstance(one, Answers)]
    if len(answers) < len(models):
        return None
    if any(one.scored.hashes != answers[0].scored.hashes for one in answers):
        raise RunError(f"{name}: the models were asked different questions; delete their files and run again.")
    found = [one.rights(task) for one in answers]
    return None if any(bool(right.isnan().any()) for right in found) else found
