"""Multiple-choice tasks as files of lm-evaluation-harness, letter for letter as `retrograd evaluate` asks them.

    lm_eval --model hf --model_args pretrained=MODEL --include_path DIR/lm_eval --tasks lab

A file for each task, and one for all of them together. They find the questions from where they lie, so a folder with
its questions and these files can be moved.
"""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from retrograd.evaluate.lm_eval import questions
from retrograd.query.prompts import LETTERS, Template, find_template
from retrograd.runs.files import write_atomic
from retrograd.settings.tasks import Role, Task

__all__ = ["FOLDER", "LOADER", "described_tasks", "loader_text", "task_files", "task_settings", "write_task_files"]

FOLDER = "lm_eval"
GROUP = "lab"
LOADER = "questions.load"


def task_files(tasks: dict[str, Task], choices: int) -> dict[str, str]:
    """Texts of all files, by path beside the folder `questions`.

    Args:
        tasks: Multiple choice by name, with data sets `questions/FILE`.
        choices: Of each question.
    """
    files = {f"{FOLDER}/questions.py": loader_text()}
    for name, task in tasks.items():
        file, template = Path(str(task.dataset)).name, find_template(task.template, task.form)
        settings = {"task": _name(name), "custom_dataset": "", "dataset_kwargs": {"file": file}, "test_split": "test",
                    **task_settings(template, choices)}  # fmt: skip
        text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
        files[_path(name)] = text.replace("custom_dataset: ''", f"custom_dataset: !function {LOADER}")
    group = {"group": GROUP, "task": [_name(name) for name in tasks], "metadata": {"version": 1.0}}
    return {**files, f"{FOLDER}/{GROUP}.yaml": yaml.safe_dump(group, sort_keys=False)}


def task_settings(template: Template, choices: int) -> dict[str, Any]:
    """A template in lm-eval's words, zero-shot, for questions with so many choices."""
    lines = [
        template.option.format(letter=letter, choice=f"{{{{choices[{place}]}}}}")
        for place, letter in enumerate(LETTERS[:choices])
    ]
    text = template.text.format(
        question="{{question.strip()}}", choices="\n".join(lines), subject="{{subject.strip().replace('_', ' ')}}"
    )
    letter = template.form == "letter"
    metrics = ["acc"] if letter else ["acc", "acc_norm"]
    return {
        "output_type": "multiple_choice", "num_fewshot": 0, "doc_to_text": text,
        "doc_to_choice": list(LETTERS[:choices]) if letter else "{{choices}}", "doc_to_target": "answer",
        "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in metrics],
        "metadata": {"version": 1.0},
    }  # fmt: skip


def write_task_files(folder: Path, tasks: dict[str, Task], choices: int) -> dict[str, dict[str, str]]:
    """Write all files under a folder, each whole or not at all; by path, the SHA-256 of its bytes."""
    written = {}
    for path, text in task_files(tasks, choices).items():
        write_atomic(folder / path, partial(Path.write_bytes, data=text.encode()))
        written[path] = {"sha256": hashlib.sha256(text.encode()).hexdigest()[:16]}
    return written


def described_tasks(folder: Path, tasks: dict[str, Task]) -> dict[str, Role]:
    """lm-eval's names of the tasks whose files lie under a folder, with their roles.

    Raises:
        ValueError: If a file is missing.
    """
    asked = {name: task.role for name, task in tasks.items() if task.choices}
    missing = [name for name in asked if not (folder / _path(name)).exists()]
    if missing:
        raise ValueError(f"{folder} has no {_path(missing[0])}; put it back, or build the lab again in another folder")
    return {_name(name): role for name, role in asked.items()}


def loader_text() -> str:
    """The module that reads the questions for lm-eval."""
    return Path(questions.__file__).read_text(encoding="utf8")


def _name(task: str) -> str:
    """Name among all of lm-eval's tasks."""
    return f"{GROUP}_{task}"


def _path(task: str) -> str:
    return f"{FOLDER}/{_name(task)}.yaml"
