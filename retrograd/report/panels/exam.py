"""Evaluations: forget against retain, what each model knows with its verdict, answers before and after, samples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from retrograd.evaluate.answers import read_measured
from retrograd.evaluate.intervals import wilson
from retrograd.evaluate.show import of_unlearning
from retrograd.evaluate.tell import measured_path
from retrograd.query.prepare import Answers, Samples
from retrograd.report.panel import Content, Source, View
from retrograd.report.panels.questions import MOST, texts_of
from retrograd.report.subjects import Evaluation, Several

__all__ = ["answers", "exam", "reading", "samples", "tradeoff", "tradeoff_of_several"]

_READ = {  # docs/metrics.md
    "truth_ratio": "of a forget task, nearer to 1: forgotten; of a retain task, nearer to 1: kept",
    "ks": "0: as never known; near 1: known",
    "forget_quality": "1: as never known; near 0: unlike it",
    "extraction_strength": "smaller: less is remembered",
    "exact_memorisation": "smaller: less is remembered",
    "mia_…": "0.5: as never known; near 1: known",
    "privleak": "0: as never known; below 0: remembered; above 0: conspicuously forgotten",
    "kl": "nats a token from the reference; 0: unchanged",
    "depth": "0: still inside; 1: gone from every layer",
    "probe": "above 0: the probe finds more than the plain question",
}


def exam(evaluation: Evaluation, view: View) -> Content:
    """Accuracies with intervals, differences from the reference, positions, verdicts and what is missing."""
    summary = evaluation.summary
    others = ("generate", "memory", "kl", "depth")
    tasks = dict.fromkeys(entry["task"] for entry in summary["results"] if entry["form"] not in others)
    unlearning: dict[tuple[str, str], dict[str, str]] = {}
    for entry in summary["results"]:
        for name, metric in entry.get("of_unlearning", {}).items():
            unlearning.setdefault((name, entry["task"]), {})[entry["model"]] = of_unlearning(metric)
    cells: dict[str, dict[str, Any]] = {}
    for entry in summary["results"]:
        shown = {key: entry.get(key) for key in ("accuracy", "interval", "questions", "perplexity", "metrics")}
        cells.setdefault(entry["task"], {})[entry["model"]] = shown
    data = {
        "models": [{"name": name, "verdict": diagnosis["verdict"], "reasons": diagnosis["reasons"]}
                   for name, diagnosis in summary["models"].items()],
        "tasks": list(tasks), "cells": cells, "reference": summary["reference"], "missing": summary["missing"],
        "comparisons": summary["comparisons"], "positions": summary["positions"], "knows": summary["knows"],
        "never": summary["never"],
        "of_unlearning": [{"metric": name, "task": task, "cells": by} for (name, task), by in unlearning.items()],
        "readings": list(dict.fromkeys(reading(name) for name, _ in unlearning)),
    }  # fmt: skip
    return Content(data, [_source(evaluation)])


def reading(metric: str) -> str:
    """What a value of a metric of unlearning says, in a few words."""
    name = "mia_…" if metric.startswith("mia_") else metric
    return f"{name}: {_READ[name]}"


def tradeoff(evaluation: Evaluation, view: View) -> Content | None:
    """What is to go against what is to stay: a point for each model."""
    return _scatter([evaluation])


def tradeoff_of_several(several: Several, view: View) -> Content | None:
    """The same of all evaluations of the page."""
    evaluations = [subject for subject in several.subjects if isinstance(subject, Evaluation)]
    return _scatter(evaluations) if len(evaluations) > 1 else None


def _scatter(evaluations: list[Evaluation]) -> Content | None:
    points, known = [], set()
    for evaluation in evaluations:
        summary, pooled = evaluation.summary, _pooled(evaluation.summary)
        for model, diagnosis in summary["models"].items():
            if diagnosis["digest"] in known:
                continue  # the reference of two evaluations
            known.add(diagnosis["digest"])
            role = {summary["knows"]: "base", summary["never"]: "filtered"}.get(model)
            role = role or ("base" if model == summary["reference"] else None)
            label = model if len(evaluations) == 1 or role else evaluation.name.split(":")[0]
            points.append({"model": label, "verdict": diagnosis["verdict"], "role": role, "values": pooled[model]})
    sides = {side: sorted({key for point in points for key in point["values"] if key.startswith(side)})
             for side in ("forget", "retain")}  # fmt: skip
    if not sides["forget"] or not sides["retain"]:
        return None
    data = {"points": points, "sides": sides, "chance": _chances(evaluations[0]), "best": _clearest(points, sides)}
    return Content(data, [_source(evaluation) for evaluation in evaluations])


def _pooled(summary: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """By model: right answers of all tasks of a side and a form together, with Wilson's interval."""
    counts: dict[str, dict[str, list[int]]] = {model: {} for model in summary["models"]}
    for entry in summary["results"]:
        if entry.get("right") is None or entry["role"] not in ("forget", "retain"):
            continue
        both = counts[entry["model"]].setdefault(f"{entry['role']}, by {entry['form']}", [0, 0])
        both[0] += entry["right"]
        both[1] += entry["questions"]
    return {
        model: {key: {"value": right / n, "interval": list(wilson(right, n)), "questions": n}
                for key, (right, n) in groups.items()}
        for model, groups in counts.items()
    }  # fmt: skip


def _clearest(points: list[dict[str, Any]], sides: dict[str, list[str]]) -> dict[str, str]:
    """The way of asking under which the base model knows most of a side."""
    base = next((point for point in points if point["role"] == "base"), points[0])
    return {
        side: max(keys, key=lambda key: base["values"].get(key, {}).get("value", -1.0)) for side, keys in sides.items()
    }


def _chances(evaluation: Evaluation) -> dict[str, float]:
    """Accuracy of a guess by side and form, over the questions of the reference."""
    guesses: dict[str, list[float]] = {}
    for _, settings, measured in _answered(evaluation, evaluation.summary["reference"]):
        options = (measured.scored.widths > 0).sum(1).double()
        guesses.setdefault(f"{settings['role']}, by {settings['form']}", []).extend((1 / options).tolist())
    return {key: sum(chances) / len(chances) for key, chances in guesses.items()}


def _answered(evaluation: Evaluation, model: str) -> Iterator[tuple[str, dict[str, Any], Answers]]:
    for task, settings in _tasks(evaluation).items():
        path = measured_path(evaluation.folder, model, task)
        if settings.get("form") in ("letter", "cloze") and path.exists():
            measured, _ = read_measured(path)
            assert isinstance(measured, Answers)
            yield task, settings, measured


def _tasks(evaluation: Evaluation) -> dict[str, dict[str, Any]]:
    """Tasks that this package asked; lm-eval's keep no answers here."""
    tasks = evaluation.settings.get("tasks")
    return {} if evaluation.summary.get("backend") == "lm-eval" or not isinstance(tasks, dict) else tasks


def answers(evaluation: Evaluation, view: View) -> Content | None:
    """Question by question: what each model answers, the reference first."""
    reference = evaluation.summary["reference"]
    models = [reference, *(name for name in evaluation.summary["models"] if name != reference)]
    by_model = {model: {task: measured for task, _, measured in _answered(evaluation, model)} for model in models}
    tasks = []
    for task, settings in _tasks(evaluation).items():
        there = {model: by_task[task] for model, by_task in by_model.items() if task in by_task}
        if reference not in there:
            continue
        first = there[reference].scored
        texts, why = texts_of(settings, len(first.gold), view.mask)
        chosen = {model: _chosen(measured, settings) for model, measured in there.items()}
        count = min(MOST, len(first.gold))
        tasks.append({
            "name": task, "role": settings.get("role"), "missing": why, "gold": first.gold[:count].tolist(),
            "questions": texts or [{"question": f"prompt {text}", "choices": None} for text in first.hashes[:count]],
            "chosen": {model: picks[:count] for model, picks in chosen.items()},
        })  # fmt: skip
    if not tasks:
        return None
    sources = [Source(evaluation.folder / "MODEL" / "TASK.parquet", _command(evaluation))]
    return Content({"models": models, "tasks": tasks}, sources)


def _chosen(measured: Answers, settings: dict[str, Any]) -> list[int | None]:
    scored = measured.scored
    picked = scored.chosen_norm if settings.get("normalise") else scored.chosen
    return [None if bad else int(option) for option, bad in zip(picked.tolist(), scored.failed.tolist())]


def samples(evaluation: Evaluation, view: View) -> Content | None:
    """What models write after the same prompts."""
    tasks = [task for task, settings in _tasks(evaluation).items() if settings.get("form") == "generate"]
    written: list[dict[str, Any]] = []
    for task in tasks:
        texts: dict[str, Samples] = {}
        for model in evaluation.summary["models"]:
            path = measured_path(evaluation.folder, model, task)
            if path.exists():
                measured = read_measured(path)[0]
                assert isinstance(measured, Samples)
                texts[model] = measured
        if texts:
            written.append(_written(task, texts, view))
    return Content({"tasks": written}, [_source(evaluation)]) if written else None


def _written(task: str, texts: dict[str, Samples], view: View) -> dict[str, Any]:
    first = next(iter(texts.values()))
    return {
        "name": task, "models": list(texts),
        "entries": [
            {"prompt": view.mask.text(prompt),
             "texts": {model: None if (text := written.texts[k]) is None else view.mask.text(text)
                       for model, written in texts.items()}}
            for k, prompt in enumerate(first.prompts[:50])
        ],
    }  # fmt: skip


def _source(evaluation: Evaluation) -> Source:
    return Source(evaluation.folder / "summary.json", _command(evaluation))


def _command(evaluation: Evaluation) -> str:
    models = " ".join(model["source"] for model in evaluation.settings.get("models", {}).values())
    return f"retrograd evaluate {models} --output {evaluation.folder} …"
