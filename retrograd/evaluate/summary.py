"""The summary of an evaluation by this package: files of single models and tasks to accuracies and verdicts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from retrograd.evaluate.answers import Kept, read_measured
from retrograd.evaluate.depth import Patched
from retrograd.evaluate.divergence import Divergence
from retrograd.evaluate.intervals import wilson
from retrograd.evaluate.letter_habits import letter_habits
from retrograd.evaluate.memory import Memory
from retrograd.evaluate.metrics import Given, metrics_of
from retrograd.evaluate.tell import Counted, Examined, Outcome, read_files, tell
from retrograd.evaluate.verdict import Evaluated, diagnose
from retrograd.query.choices import Scored
from retrograd.query.prepare import Answers, Samples, Texts
from retrograd.settings.tasks import Task

__all__ = ["described", "failure", "summarise", "together"]


def summarise(
    folder: Path, models: Sequence[str], tasks: dict[str, Task], reference: str, knows: str | None, never: str | None
) -> dict[str, Any]:
    """What summary.json says: `tell`.

    Args:
        folder: Of the evaluation.
        models: By name, reference and the two others included.
    Raises:
        RunError: If a file is damaged, or two files of a model are of different weights.
    """
    missing: list[dict[str, str]] = []
    every = {**tasks, **{task.group: task for task in tasks.values() if task.group}}
    whole = {name: task for name, task in every.items() if not task.group or name not in tasks}
    rated = {model: _evaluated(folder, model, tasks, missing) for model in models}
    diagnoses = {model: diagnose(rated[model], rated[reference], whole) for model in models}
    floor = None if never is None else rated[never].results
    examined = {name: Examined(model.digest, _outcomes(model, every, floor)) for name, model in rated.items()}
    return tell(examined, diagnoses, missing, reference, knows, never)


def _evaluated(folder: Path, model: str, tasks: dict[str, Task], missing: list[dict[str, str]]) -> Evaluated:
    def failures(name: str, measured: Kept) -> list[str]:
        why = failure(measured, tasks[name])
        return [why] if why else []

    digest, results = read_files(folder, model, tasks, read_measured, failures, missing)
    for group in dict.fromkeys(task.group for task in tasks.values() if task.group):
        results[group] = together([results[name] for name, task in tasks.items() if task.group == group])
    return Evaluated(model, digest, results)


def _outcomes(model: Evaluated, tasks: dict[str, Task], never: Mapping[str, Any] | None) -> dict[str, Outcome]:
    outcomes = {}
    for name, measured in model.results.items():
        values = described(measured, tasks[name])
        values["metrics"] = None if measured is None else _metrics(values, tasks[name])
        values["of_unlearning"] = metrics_of(Given(name, tasks, model.results, never))
        outcomes[name] = Outcome(tasks[name].role, values, _counted(measured, tasks[name]))
    return outcomes


def _metrics(values: dict[str, Any], task: Task) -> dict[str, dict[str, Any]]:
    """The value that a task is told by, as lm-eval's metrics are."""
    if not task.ordinary:
        return {}
    if not task.choices:
        return {"perplexity": {"value": values["perplexity"], "stderr": None, "higher_is_better": False}}
    metric = {"value": values["accuracy"], "stderr": None, "higher_is_better": True}
    return {_metric(task): metric | {key: values[key] for key in ("interval", "right")}}


def _metric(task: Task) -> str:
    return "acc_norm" if task.normalise else "acc"


def _counted(measured: Kept | None, task: Task) -> dict[str, Counted]:
    if not task.choices:
        return {}
    if not isinstance(measured, Answers):
        return {_metric(task): Counted(None, [])}
    right = measured.rights(task)
    return {_metric(task): Counted(None if right.isnan().any() else right, measured.scored.hashes)}


def failure(measured: Kept | None, task: Task) -> str | None:
    """What in a file is no number."""
    if isinstance(measured, Answers) and (bad := int(measured.scored.failed.sum())):
        return f"{bad} of {len(measured.scored.gold)} questions have no finite log-probability"
    if isinstance(measured, Texts) and not math.isfinite(measured.perplexity):
        return f"the mean loss is {measured.loss:.4g} nats: no finite perplexity"
    if isinstance(measured, Samples) and (bad := measured.texts.count(None)):
        return f"{bad} of {len(measured.texts)} continuations have no finite logits"
    numbers = _numbers(measured)
    if bad := sum(not math.isfinite(value) for value in numbers):
        return f"{bad} of {len(numbers)} numbers are not finite"
    return None


def _numbers(measured: Kept | None) -> list[float]:
    if isinstance(measured, Memory):
        return [*measured.nats, *measured.min_k, *measured.min_k_plus]
    if isinstance(measured, Divergence):
        return measured.nats
    return [delta for row in measured.lost for delta in row] if isinstance(measured, Patched) else []


def together(parts: Sequence[Kept | None]) -> Answers | None:
    """All questions of a group; None if a part is missing."""
    answers = [part for part in parts if isinstance(part, Answers)]
    if len(answers) < len(parts):
        return None
    scored = [part.scored for part in answers]
    most = max(part.logprobs.shape[1] for part in scored)

    def joined(tensors: list[torch.Tensor], fill: float) -> torch.Tensor:
        return torch.cat([torch.nn.functional.pad(v, (0, most - v.shape[1]), value=fill) for v in tensors])

    tokens = [part.tokens for part in scored if part.tokens is not None]
    mass = [part.mass for part in scored if part.mass is not None]
    both = Scored(
        joined([part.logprobs for part in scored], -torch.inf), joined([part.widths for part in scored], 0.0),
        torch.cat([part.gold for part in scored]), torch.cat(mass) if mass else None,
        [text for part in scored for text in part.hashes], joined(tokens, 0) if len(tokens) == len(scored) else None,
    )  # fmt: skip
    return Answers(both, [subject for part in answers for subject in part.subjects])


def described(measured: Kept | None, task: Task) -> dict[str, Any]:
    """One model and task as plain values; null where missing."""
    entry: dict[str, Any] = {"form": task.form, "role": task.role}
    if isinstance(measured, Answers):
        return entry | _accuracy(measured, task)
    if isinstance(measured, Texts):
        good = math.isfinite(measured.perplexity)
        return entry | {
            "perplexity": measured.perplexity if good else None, "nats_per_token": measured.loss if good else None,
            "tokens": sum(measured.targets), "documents": len(measured.documents),
        }  # fmt: skip
    if isinstance(measured, Samples):
        samples = [{"prompt": a, "text": b} for a, b in zip(measured.prompts, measured.texts)]
        return entry | {"samples": samples}
    if isinstance(measured, (Memory, Divergence)):
        return entry | {"documents": len(measured.targets), "tokens": sum(measured.targets)}
    if isinstance(measured, Patched):
        return entry | {"questions": len(measured.lost), "lost_by_block": np.mean(measured.lost, 0).tolist()}
    if not (task.ordinary or task.form == "generate"):
        return entry
    empty = {"text": "perplexity", "generate": "samples"}.get(task.form, "accuracy")
    return entry | {empty: None}


def _accuracy(answers: Answers, task: Task) -> dict[str, Any]:
    scored, right = answers.scored, answers.rights(task)
    n, failed = len(right), int(scored.failed.sum())
    entry: dict[str, Any] = {"questions": n, "failed": failed, "normalised": task.normalise, **_share(right)}
    if not failed:
        four_way = scored.logprobs.softmax(1).gather(1, scored.gold[:, None])
        entry["mean_probability_of_right"] = float(four_way.mean())  # among the options
        if scored.mass is None:
            entry |= {"accuracy_plain": scored.accuracy, "accuracy_norm": scored.accuracy_norm}
    if scored.mass is not None and (habits := letter_habits(scored)):
        entry["letters"] = {name: value for name, value in habits._asdict().items() if name != "questions"}
    subjects = dict.fromkeys(subject for subject in answers.subjects if subject)
    if len(subjects) > 1:
        of = {s: torch.tensor([i for i, other in enumerate(answers.subjects) if other == s]) for s in subjects}
        entry["subjects"] = {s: {"questions": len(places), **_share(right[places])} for s, places in of.items()}
    return entry


def _share(right: torch.Tensor) -> dict[str, Any]:
    """Accuracy with its interval; null if a question failed."""
    if right.isnan().any():
        return {"accuracy": None, "interval": None, "right": None}
    count = int(right.sum())
    return {"accuracy": float(right.mean()), "interval": list(wilson(count, len(right))), "right": count}
