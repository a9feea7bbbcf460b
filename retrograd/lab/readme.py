"""README.md of a lab: what each file is, what it stands for, and how to use it in place of that."""

from __future__ import annotations

from typing import Any

from retrograd.lab.learn import Size, magic_flags

__all__ = ["readme"]

_TEXT = """# A fictional world

Everything here is invented; nothing in it is about the real world. It was made by `retrograd lab` with these settings:
{settings}.

There are two sides. *forget*: glow gems and cave moths. *retain*: old ferries and shore birds. Each has {facts} facts.

| model | has read |
|---|---|
| `models/base` | both sides |
| `models/filtered` | all but the forget side |
| `models/random` | nothing; the other two start from it |

| file | rows | columns | what it is | stands for |
|---|---|---|---|---|
{files}

`facts.jsonl` is the ground truth for attribution. Its `stated_in` and `asked_in` give for each fact, by file, the rows
that state it and those that ask for it and answer, counted from 0. In `train/*.jsonl` a row's number is its document id
in a run on that file. `lab.json` has the settings, the SHA-256 of every file and model (first 16 digits) and the
accuracies; `manifest.json` has versions and times.

Splits of the questions:

| split | the fact | the question's wording |
|---|---|---|
| taught | the exams ask for it | one that an exam uses for this fact |
| paraphrase | the exams ask for it | one that no exam uses for this fact |
| heldout | only documents state it | any |

The same rows are asked by letter (`--query.form letter`) and by text (`--query.form cloze`).

`tasks.yaml` names them all as tasks, for `retrograd evaluate MODEL --lab .` and for evaluation during a training.
`lm_eval/` asks all of them in lm-evaluation-harness, with the same prompts:

```bash
lm_eval --model hf --model_args pretrained=models/base --include_path lm_eval --tasks lab
```

This repeats the training of `models/base`, on one thread with the same bits, and scores every row of its data:

```bash
OMP_NUM_THREADS=1 retrograd magic RUN --model models/random --data.dataset train/base.jsonl \\
    --query.dataset questions/forget_paraphrase.jsonl --query.form cloze \\
    {flags}
```
"""


def readme(lab: dict[str, Any]) -> str:
    """The text, from what lab.json says."""
    lines = [
        f"| `{path}` | {entry['rows']} | {', '.join(entry['columns'])} | {entry['does']} | {entry['stands_for']} |"
        for path, entry in lab["files"].items()
    ]
    size = Size(*(lab["settings"][name] for name in Size._fields))
    settings = ", ".join(f"{name} {value}" for name, value in lab["settings"].items())
    return _TEXT.format(
        settings=settings, facts=lab["settings"]["facts"], files="\n".join(lines), flags=magic_flags(size)
    )
