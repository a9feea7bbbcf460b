"""Evaluation on the way of a training: accuracies with their intervals, losses, and samples, by step."""

from __future__ import annotations

import json
from typing import Any

from retrograd.report.panel import Content, Source, View
from retrograd.report.panels.setup import reproduce
from retrograd.report.subjects import Attribution, Training
from retrograd.settings.on_the_way import value_of

__all__ = ["way"]


def way(run: Attribution | Training, view: View) -> Content | None:
    """Values by task and step; None of a run that was not evaluated on its way."""
    evaluations = run.evaluations
    if not evaluations:
        return None
    steps = sorted(evaluations)
    names = dict.fromkeys(name for step in steps for name in evaluations[step]["tasks"])
    tasks, samples = [], []
    for name in names:
        entries = [evaluations[step]["tasks"].get(name, {}) for step in steps]
        if any("samples" in entry for entry in entries):
            samples += [_samples(name, step, entry, view) for step, entry in zip(steps, entries) if "samples" in entry]
            continue
        unit = "accuracy" if any("accuracy" in entry for entry in entries) else "nats"
        tasks.append({"name": name, "unit": unit, "values": [value_of(entry) for entry in entries],
                      "intervals": [entry.get("interval") for entry in entries]})  # fmt: skip
    best = run.folder / "best" / "best.json"
    kept = json.loads(best.read_text(encoding="utf8")) if best.exists() else None
    ends = samples[:1] + samples[-1:] if len(samples) > 1 else samples
    data: dict[str, Any] = {"steps": steps, "tasks": tasks, "best": kept, "samples": ends}
    return Content(data, [Source(run.folder / "metrics.jsonl", reproduce(run))])


def _samples(name: str, step: int, entry: dict[str, Any], view: View) -> dict[str, Any]:
    texts = [
        {"prompt": view.mask.text(sample["prompt"]), "text": view.mask.text(sample["text"] or "")}
        for sample in entry["samples"][:8]
    ]
    return {"name": name, "step": step, "texts": texts}
