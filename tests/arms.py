"""A tiny world for experiments: a model, corpora, questions for scores, tuning and report, and files of experiments."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import breaking
import quiz
import tiny
import yaml

from retrograd.experiment.lease import Queue


def save_world(folder: Path) -> Path:
    model = quiz.save(folder / "base", positions=128)
    breaking.changed(model, "never", lambda weights: breaking.noise(weights, 0.5))
    for name, count, seed in (("forget", 6, 3), ("retain", 7, 4), ("tune", 4, 5), ("report", 4, 6)):
        tiny.save_jsonl(folder / f"{name}.jsonl", tiny.sentences(count, seed=seed))
    for name, seed in (("go", 1), ("stay", 2), ("tune_go", 3), ("tune_stay", 4), ("report_go", 5), ("report_stay", 6)):
        rows = quiz.questions(8, seed)
        (folder / f"q_{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def settings(**more: Any) -> dict[str, Any]:
    """One method, weights by scores with a random control, and uniform ones."""
    return {
        "names": {"world": "."}, "base": "${world}/base", "never": "${world}/never",
        "corpora": {"forget": ["${world}/forget.jsonl"], "retain": ["${world}/retain.jsonl"]},
        "seeds": 2, "train": {"lr": 1e-2, "batch_size": 4},
        "scores": {"asked": {
            "queries": {"go": {"dataset": "${world}/q_go.jsonl", "form": "cloze"},
                        "stay": {"dataset": "${world}/q_stay.jsonl", "form": "cloze"}},
            "train": {"lr": 1e-3, "batch_size": 4},
        }},
        "weightings": {
            "uniform": {},
            "value": {"scores": "asked:go", "against": "asked:stay"},
            "random": {"control": "random_count", "of": "value"},
        },
        "methods": {"npo": {}},
        "report": asked("report"),
        **more,
    }  # fmt: skip


def asked(split: str) -> dict[str, Any]:
    return {
        "tasks": {side: {"dataset": f"${{world}}/q_{split}_{word}.jsonl", "form": "cloze", "role": side}
                  for side, word in (("forget", "go"), ("retain", "stay"))},
        "rows": [f"${{world}}/{split}.jsonl"],
    }  # fmt: skip


def tuning(**more: Any) -> dict[str, Any]:
    return {**asked("tune"), "low": 1e-5, "high": 1.0, "steps": 4, "budget": 0.05, **more}


def write(path: Path, **more: Any) -> Path:
    path.write_text(yaml.safe_dump(settings(**more)))
    return path


def outcomes(out: Path) -> dict[str, dict[str, Any]]:
    """Results by task."""
    queue = Queue(out / "tasks", 1)
    names = sorted(path.name for path in (out / "tasks").iterdir())
    return {name: found for name in names if (found := queue.result(name)) is not None}
