"""Tasks of an evaluation: what is asked, from which data set, how it is written. No heavy imports here.

WMDP's and MMLU's names, subsets, splits and numbers of questions are those of Deep Ignorance, arXiv:2508.06601.
"""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from retrograd.settings.on_the_way import OnTheWayConfig
from retrograd.settings.parse import build, read_yaml
from retrograd.settings.question import Form, Question

__all__ = ["LAB_TASKS", "READY", "Role", "Task", "check_tasks", "lab_metrics", "tasks_from", "tasks_of", "tasks_of_lab"]

LAB_TASKS = "tasks.yaml"  # in the folder of a lab

Role = Literal["forget", "retain"] | None


@dataclass(frozen=True)
class Task(Question):
    """One task, as a YAML file writes it."""

    dataset: str = ""
    """Hub name, folder saved by `datasets`, or a file, as everywhere; or what lies beside the YAML file."""
    form: Form = "letter"
    """What is asked: `settings.question`."""
    role: Role = None
    """forget: knowledge that is to go, not counted as damage. All else measures general ability."""
    group: str | None = None
    """Tasks of one group are also told together, every question counting once (weighted by size)."""
    expect: int | None = None
    """Questions that the set has to have; another number is another set. Not checked with a limit."""
    prompt_tokens: int = 8
    """generate: tokens of each document that are given."""
    new_tokens: int = 32
    """generate: tokens to write."""
    against: str | None = None
    """memory: the task of this form whose documents no model was trained on, for membership inference."""
    probe_of: str | None = None
    """letter, cloze: the task that asks the same questions plainly, in the same order; this one has other words."""
    alias: str | None = None
    """letter, cloze: JSON file {name: other name}; every question is asked with the other names."""

    @property
    def ordinary(self) -> bool:
        """Whether it is right answers or a loss, from the model alone."""
        return self.choices or self.form == "text"

    def limited(self, limit: int | None) -> Task:
        """The first questions alone; its own limit where that is lower."""
        if limit is None or (self.limit is not None and self.limit <= limit):
            return self
        return dataclasses.replace(self, limit=limit)


_LAB = "lab.json"
_ROBUST = {
    "bioweapons_and_bioterrorism": 190,
    "dual_use_virology": 28,
    "enhanced_potential_pandemic_pathogens": 102,
    "expanding_access_to_threat_vectors": 21,
    "reverse_genetics_and_easy_editing": 186,
    "viral_vector_research": 341,
}
_WMDP: dict[str, Any] = {"role": "forget", "template": "wmdp"}

READY: dict[str, dict[str, Task]] = {
    "wmdp_bio_robust": {
        f"wmdp_bio_robust_{subset}": Task(
            "EleutherAI/wmdp_bio_robust_mcqa", subset, "robust", group="wmdp_bio_robust", expect=number, **_WMDP
        )
        for subset, number in _ROBUST.items()
    },
    "wmdp_bio_cloze": {
        "wmdp_bio_cloze": Task(
            "EleutherAI/wmdp_bio_cloze", split="cloze_compatible", form="cloze", template="wmdp_cloze", normalise=True,
            role="forget", expect=1076,
        )
    },
    "mmlu": {"mmlu": Task("cais/mmlu", "all", "test", template="mmlu", role="retain", expect=14042)},
}  # fmt: skip
"""Tasks by ready-made name."""


def tasks_from(path: Path) -> dict[str, Task]:
    """The tasks of a YAML file, by name. A name of READY needs no settings; those given change the ready ones.

    A data set that lies where the file lies is taken from there; any other is named as everywhere.

    Raises:
        ValueError: If the file is no such file, or a task cannot work.
    """
    return tasks_of(read_yaml(path), path.parent, str(path))


def tasks_of(values: Any, folder: Path, where: str) -> dict[str, Task]:
    """As `tasks_from`, of settings by name that a file in `folder` holds."""
    tasks: dict[str, Task] = {}
    if not isinstance(values, dict):
        raise ValueError(f"{where} is {values!r}; it has to be tasks by name, such as {{mine: {{dataset: …}}}}")
    for name, settings in values.items():
        which = f"{where}: {name}"
        if settings is not None and not isinstance(settings, dict):
            raise ValueError(f"{which} is {settings!r}; it has to be settings, such as {{dataset: …, form: cloze}}")
        if name in READY:
            tasks |= {ready: _changed(task, settings or {}, which) for ready, task in READY[name].items()}
        elif "dataset" not in (settings or {}):
            raise ValueError(f"{which} has no dataset; give one, or take a ready-made task: {', '.join(READY)}")
        else:
            tasks[str(name)] = build(Task, settings or {}, which)
    check_tasks(tasks, where)
    return {name: _beside(folder, task) for name, task in tasks.items()}


def tasks_on_the_way(config: OnTheWayConfig) -> dict[str, Task]:
    """The tasks of a training that is evaluated on its way; none where it is not.

    Raises:
        ValueError: As `tasks_from` and `tasks_of_lab`.
    """
    tasks: dict[str, Task] = {}
    if config.tasks is not None:
        tasks = tasks_from(config.tasks)
    elif config.lab is not None:
        tasks = tasks_of_lab(config.lab)
    return {name: task.limited(config.limit) for name, task in tasks.items()}


def tasks_of_lab(folder: Path) -> dict[str, Task]:
    """The tasks that a lab has written: all its questions, held-out prose, and a few continuations of it.

    Raises:
        ValueError: If the folder is no finished lab, or of a version that wrote no such file.
    """
    path = folder / LAB_TASKS
    if path.exists() and (folder / _LAB).exists():
        return tasks_from(path)
    if (folder / _LAB).exists() and "scores" in json.loads((folder / _LAB).read_text(encoding="utf8")):
        raise ValueError(
            f"--lab {folder} has no {LAB_TASKS}: an earlier version built it. Build the lab again in another folder"
        )
    raise ValueError(f"--lab {folder} is no finished lab; build it with `retrograd lab {folder}`")


def check_tasks(tasks: dict[str, Task], where: str) -> None:
    """Refuse, before anything is loaded, what cannot work."""
    if not tasks:
        raise ValueError(f"{where} has no task; give at least one")
    for name, task in tasks.items():
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
            raise ValueError(f"{where}: task {name!r} names a file; use letters, digits, '.', '_' and '-'")
        for setting in ("limit", "max_length", "prompt_tokens", "new_tokens"):
            number = getattr(task, setting)
            if number is not None and number < 1:
                raise ValueError(f"{where}: task {name!r}: {setting} is {number}; it has to be at least 1")
        unread = [s for s in _UNREAD[task.form] if getattr(task, s) != _DEFAULTS[s]]
        if unread:
            raise ValueError(
                f"{where}: task {name!r}: form {task.form} has no use for {', '.join(unread)}; leave it out"
            )
        _check_pairs(name, task, tasks, where)
        if task.group in tasks:
            raise ValueError(f"{where}: task {name!r}: group {task.group!r} is a task; give the group another name")
        forms = {(t.form, t.role, t.normalise) for t in tasks.values() if task.group and t.group == task.group}
        if len(forms) > 1:
            raise ValueError(
                f"{where}: group {task.group!r} has tasks of several forms or roles, which have no common accuracy"
            )


def _check_pairs(name: str, task: Task, tasks: dict[str, Task], where: str) -> None:
    """What a task is compared with has to be there, and of its form."""
    for setting in ("against", "probe_of"):
        other = getattr(task, setting)
        if other is None:
            continue
        fitting = [candidate for candidate, its in tasks.items() if its.form == task.form and candidate != name]
        if other not in fitting:
            raise ValueError(
                f"{where}: task {name!r}: {setting} is {other!r}, which is no other task of form {task.form}; there "
                f"are {', '.join(fitting) or 'none'}"
            )


def lab_metrics(tasks: dict[str, Task], folder: Path) -> dict[str, Task]:
    """The tasks of a lab with those that the metrics of unlearning need: documents by heart, divergence, depth, probes.

    Documents that no model was trained on are the papers with every fact wrong: the same words, other values.
    """
    probed = {name: dataclasses.replace(task, probe_of=plain) if (plain := _taught(name)) in tasks else task
             for name, task in tasks.items()}  # fmt: skip
    corpora = folder / "corpora"
    return probed | {
        "memory_forget": Task(str(corpora / "forget.jsonl"), form="memory", role="forget", against="memory_unseen"),
        "memory_unseen": Task(str(corpora / "lie.jsonl"), form="memory", role="forget"),
        "kl_retain": Task(str(corpora / "retain.jsonl"), form="kl", role="retain", limit=120),
        "kl_prose": Task(str(corpora / "prose_heldout.jsonl"), form="kl"),
        "depth_forget": Task(str(folder / "questions/forget_paraphrase.jsonl"), form="depth", role="forget", limit=60),
    }


def _taught(name: str) -> str | None:
    """The lab's task that asks the same in wordings of the exams, or under the first name."""
    return next((name.replace(wording, "_taught_") for wording in ("_paraphrase_", "_alias_") if wording in name), None)


def _beside(folder: Path, task: Task) -> Task:
    files: dict[str, Any] = {setting: str(folder / path) for setting in ("dataset", "alias")
             if (path := getattr(task, setting)) and (folder / path).exists()}  # fmt: skip
    return dataclasses.replace(task, **files)


def _changed(task: Task, settings: dict[str, Any], where: str) -> Task:
    """A ready-made task with other settings; another data set has another number of questions."""
    values = {f.name: getattr(task, f.name) for f in dataclasses.fields(task)}
    if {"dataset", "subset", "split"} & settings.keys():
        values["expect"] = None
    changed: Task = build(Task, {**values, **settings}, where)
    return changed


_DEFAULTS = {f.name: f.default for f in dataclasses.fields(Task)}
_GENERATE = ("prompt_tokens", "new_tokens")
_PROBES = ("probe_of", "alias")
_TEXTS = ("template", "normalise", "group", "expect", *_GENERATE, *_PROBES)
_UNREAD = {
    "letter": ("text_column", "assistant_only_loss", "normalise", "against", *_GENERATE),
    "cloze": ("text_column", "assistant_only_loss", "against", *_GENERATE),
    "text": (*_TEXTS, "against"),
    "generate": ("template", "normalise", "group", "expect", "role", "against", *_PROBES),
    "memory": _TEXTS,
    "kl": (*_TEXTS, "against"),
    "depth": ("text_column", "assistant_only_loss", "normalise", "group", "expect", "against", "probe_of", *_GENERATE),
}
