"""The lab's questions and prose as tasks of an evaluation, in a file that lies in the lab.

`tasks.yaml` is the last file that a lab gets but for lab.json's scores: where it is, the lab is finished.
"""

from __future__ import annotations

import dataclasses
import hashlib
from functools import partial
from pathlib import Path
from typing import Any

from retrograd.evaluate.summary import described, failure
from retrograd.lab.exams import ALIAS, SPLITS
from retrograd.lab.subjects import SIDES
from retrograd.lm.model import load_causal_lm, load_tokenizer
from retrograd.query.prepare import prepare
from retrograd.query.prompts import FORMS, find_template
from retrograd.runs.files import write_atomic
from retrograd.settings.parse import dump_yaml
from retrograd.settings.tasks import LAB_TASKS, Task, tasks_of_lab

__all__ = ["question_tasks", "scores_of", "write_tasks"]

_BATCH = 64
_PROSE = "corpora/prose_heldout.jsonl"


def question_tasks(*, aliases: bool = False) -> dict[str, Task]:
    """Every side, split and form; data sets are named from the lab's folder."""
    tasks = {}
    for side in SIDES:
        for form in FORMS:
            asked: dict[str, Any] = {"form": form, "template": find_template(None, form).name, "role": side}
            for split in (*SPLITS, ALIAS) if aliases else SPLITS:
                tasks[_name(side, split, form)] = Task(f"questions/{side}_{split}.jsonl", **asked)
    return tasks


def write_tasks(folder: Path, *, aliases: bool = False) -> dict[str, dict[str, str]]:
    """Write tasks.yaml: all questions, held-out prose, and a few continuations of it; by path, its SHA-256."""
    prose = {"prose_heldout": Task(_PROSE, form="text"), "samples": Task(_PROSE, form="generate", limit=4)}
    settings = {name: _settings(task) for name, task in {**question_tasks(aliases=aliases), **prose}.items()}
    text = "# Tasks of `retrograd evaluate`; data sets lie beside this file.\n"
    text += dump_yaml(settings)
    write_atomic(folder / LAB_TASKS, partial(Path.write_bytes, data=text.encode()))
    return {LAB_TASKS: {"sha256": hashlib.sha256(text.encode()).hexdigest()[:16]}}


def scores_of(folder: Path, name: str) -> list[dict[str, Any]]:
    """Accuracy of models/NAME on every side, split and form, with its 95 % interval.

    Letter questions also tell the mean probability of the four letters together.

    Raises:
        ValueError: If the model does not answer every question.
    """
    source = str(folder / "models" / name)
    lm, tokenizer, tasks = load_causal_lm(source), load_tokenizer(source), tasks_of_lab(folder)
    entries = []
    for side in SIDES:
        for split in (split for split in (*SPLITS, ALIAS) if _name(side, split, "cloze") in tasks):
            for form in FORMS:
                task = tasks[_name(side, split, form)]
                answers = prepare(task, lm, tokenizer, _BATCH).measure(lm.params)
                if why := failure(answers, task):
                    raise ValueError(f"{source}, {_name(side, split, form)}: {why}; build the lab with a lower --lr")
                values = described(answers, task)
                entry = {"model": name, "side": side, "split": split, "form": form}
                entry |= {key: values[key] for key in ("questions", "accuracy", "interval")}
                if "letters" in values:
                    entry["letter_mass"] = values["letters"]["mass"]
                entries.append(entry)
    return entries


def _name(side: str, split: str, form: str) -> str:
    return f"{side}_{split}_{form}"


def _settings(task: Task) -> dict[str, Any]:
    """What differs from a task's defaults."""
    return {f.name: value for f in dataclasses.fields(task) if (value := getattr(task, f.name)) != f.default}
