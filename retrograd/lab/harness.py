"""The lab's questions as tasks of lm-evaluation-harness, letter for letter as `retrograd evaluate` asks them.

    lm_eval --model hf --model_args pretrained=DIR/models/base --include_path DIR/lm_eval --tasks lab

A file for each side, split and form, and one for all of them together. They find the questions from where they lie, so
a lab can be moved.
"""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from retrograd.lab import lm_eval_questions
from retrograd.lab.exams import CHOICES, SPLITS
from retrograd.lab.subjects import SIDES
from retrograd.query.prompts import FORMS, LETTERS, Template, find_template
from retrograd.runs.files import write_atomic

__all__ = ["FOLDER", "harness_files", "harness_name", "harness_settings", "write_harness"]

FOLDER = "lm_eval"


def harness_name(task: str) -> str:
    """Name among all of lm-eval's tasks."""
    return f"lab_{task}"


def harness_files() -> dict[str, str]:
    """Texts of all files, by path under the lab; the same for every lab."""
    found = {f"{FOLDER}/questions.py": Path(lm_eval_questions.__file__).read_text(encoding="utf8")}
    names = []
    for side in SIDES:
        for split in SPLITS:
            for form in FORMS:
                names.append(harness_name(f"{side}_{split}_{form}"))
                task = {"task": names[-1], "custom_dataset": "", "dataset_kwargs": {"file": f"{side}_{split}.jsonl"},
                        "test_split": "test", **harness_settings(find_template(None, form), CHOICES)}  # fmt: skip
                text = yaml.safe_dump(task, sort_keys=False, allow_unicode=True)
                text = text.replace("custom_dataset: ''", "custom_dataset: !function questions.load")
                found[f"{FOLDER}/{names[-1]}.yaml"] = text
    group = {"group": "lab", "task": names, "metadata": {"version": 1.0}}
    return {**found, f"{FOLDER}/lab.yaml": yaml.safe_dump(group, sort_keys=False)}


def harness_settings(template: Template, choices: int) -> dict[str, Any]:
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


def write_harness(folder: Path) -> dict[str, dict[str, str]]:
    """Write all files under a lab, each whole or not at all; by path, the SHA-256 of its bytes."""
    found = {}
    for path, text in harness_files().items():
        write_atomic(folder / path, partial(Path.write_bytes, data=text.encode()))
        found[path] = {"sha256": hashlib.sha256(text.encode()).hexdigest()[:16]}
    return found
