"""The lab's questions and prose as tasks of an evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from retrograd.lab.exams import SPLITS
from retrograd.lab.harness import FOLDER, harness_name
from retrograd.lab.subjects import SIDES
from retrograd.query.prompts import FORMS
from retrograd.settings.tasks import Role, Task

__all__ = ["harness_tasks", "lab_tasks"]


def lab_tasks(folder: Path) -> dict[str, Task]:
    """Every side, split and form, held-out prose, and a few continuations of it.

    Raises:
        ValueError: If the folder is no finished lab.
    """
    path = folder / "lab.json"
    if not path.exists() or "scores" not in json.loads(path.read_text(encoding="utf8")):
        raise ValueError(f"--lab {folder} is no finished lab; build it with `retrograd lab {folder}`")
    prose = str(folder / "corpora" / "prose_heldout.jsonl")
    found = {}
    for side in SIDES:
        for form in FORMS:
            asked: dict[str, Any] = {
                "role": side,
                "form": form,
                "template": "plain" if form == "letter" else "plain_cloze",
            }
            for split in SPLITS:
                questions = str(folder / "questions" / f"{side}_{split}.jsonl")
                found[f"{side}_{split}_{form}"] = Task(questions, **asked)
    return {**found, "prose_heldout": Task(prose, form="text"), "samples": Task(prose, form="generate", limit=4)}


def harness_tasks(folder: Path) -> tuple[dict[str, Role], Path]:
    """The same questions as tasks of lm-eval: names with their roles, and the folder of their files.

    Raises:
        ValueError: If the folder is no finished lab, or of a version that wrote no such files.
    """
    asked = {name: task for name, task in lab_tasks(folder).items() if task.choices}
    missing = [name for name in asked if not (folder / FOLDER / f"{harness_name(name)}.yaml").exists()]
    if missing:
        raise ValueError(
            f"--lab {folder} has no {FOLDER}/{harness_name(missing[0])}.yaml: an earlier version built it. Build the "
            "lab again in another folder"
        )
    return {harness_name(name): task.role for name, task in asked.items()}, folder / FOLDER
