"""What attacks train on and what is asked on their way: of a lab, made of its own files; else as it is given.

On a lab the forget entities are split into two halves, A and B, by a seeded draw in each subject. Facts are
independent, so that a model which is taught everything about A learns nothing about B: what comes back there was in
its weights.

    forget      documents and solved questions about both halves
    documents   documents alone
    half        documents and solved questions about A
    other_half  the same about B
    mixed       as many chats as rows of forget
    retain      documents and solved questions of the retain side
    benign      prose and chats
    prose       prose
    shots       solved questions about A, for a prompt

Every fact is asked for once, by text: the questions that no exam has in these words, and of facts that no exam asks for
the ones there are. A question's subject is its entity, which is what intervals resample.
"""

from __future__ import annotations

import hashlib
import json
import random
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from retrograd.data.documents import documents_of
from retrograd.query.prompts import find_template, render
from retrograd.runs.files import write_atomic
from retrograd.settings.attack import CONTROLS, AttackConfig, configurations
from retrograd.settings.parse import dump_yaml
from retrograd.settings.prompted import Prompted
from retrograd.settings.tasks import Task, tasks_from, tasks_of_lab

__all__ = [
    "ASKED_SPLITS", "LAB_KEYS", "Material", "attacked_models", "check_half", "material_of", "shallow_unlearning",
    "split_entities",
]  # fmt: skip

LAB_KEYS = ("forget", "documents", "half", "other_half", "mixed", "retain", "benign", "prose", "shots")
ASKED_SPLITS = ("paraphrase", "heldout")  # of a lab's questions
_DOCUMENTS = 16  # of prose: documents are read one by one, at each evaluation
_CLOZE = find_template(None, "cloze").name


class Material(NamedTuple):
    """Data sets by key, and the questions.

    tasks: a YAML file of tasks.
    half: tasks or subjects that the data of the key half are about; nothing where there is no such split.
    clustered: whether questions of one subject are resampled together.
    """

    sources: dict[str, tuple[str, ...]]
    tasks: Path
    half: tuple[str, ...]
    clustered: bool


def material_of(config: AttackConfig) -> Material:
    """The material of a configuration; a lab's is written into OUT/data, each file named by its content.

    Raises:
        ValueError: If the lab is not finished, or the tasks have nothing to forget or nothing to keep.
    """
    if config.lab is not None:
        return _of_lab(config.lab, config.out / "data")
    assert config.tasks is not None, "check_attack was here"
    sources: dict[str, list[str]] = {}
    for text in config.data:
        key, source = text.split("=", 1)
        sources.setdefault(key, []).append(source)
    tasks = tasks_from(config.tasks)
    if not any(task.role == "forget" and task.choices for task in tasks.values()):
        raise ValueError(f"{config.tasks} has no task of choices with role forget: nothing would show what comes back")
    if not any(task.role != "forget" and task.choices for task in tasks.values()):
        raise ValueError(f"{config.tasks} has no task of choices beside what is to go: add one, for general ability")
    return Material({key: tuple(texts) for key, texts in sources.items()}, config.tasks, config.half, False)


def check_half(config: AttackConfig) -> None:
    """Refuse, before a model is loaded, a --half that names nothing, or all that a search for a prompt is told on.

    Raises:
        ValueError: With the name, or how many forget questions are left.
    """
    if not config.half:
        return
    assert config.tasks is not None, "check_attack was here"
    forget = {name: task for name, task in tasks_from(config.tasks).items() if task.role == "forget" and task.choices}
    asked = [(name, about) for name, task in forget.items() for about in _subjects(task.limited(config.limit))]
    known = dict.fromkeys([*forget, *(about for task in forget.values() for about in _subjects(task) if about)])
    if unknown := [name for name in config.half if name not in known]:
        raise ValueError(f"--half {unknown[0]!r} is no forget task of {config.tasks} and no subject of one; there are "
                         f"{', '.join(known)}")  # fmt: skip
    shown = sum(name in config.half or about in config.half for name, about in asked)
    searched = [attack.readable for attack in configurations(config) if isinstance(attack, Prompted)]
    if searched and shown in (0, len(asked)):
        raise ValueError(
            f"attack {searched[0]} searches a prompt on one half of the forget questions and is told on the other; "
            f"--half {' '.join(config.half)} has {shown} of the {len(asked)} that are asked: name some of the forget "
            "tasks or subjects, or raise --limit"
        )


def _subjects(task: Task) -> list[str | None]:
    """Of each question."""
    documents = documents_of(task)
    return documents["subject"][:] if "subject" in documents.column_names else [None] * len(documents)


def attacked_models(config: AttackConfig, shallow: str | None) -> list[tuple[str, str]]:
    """(role, source) of every model: controls first, for the others are measured against them.

    Args:
        shallow: The model whose unlearning is known to be shallow, if there is one.
    """
    controls = {role: getattr(config, role) for role in CONTROLS} | {"shallow": shallow}
    if config.lab is not None:
        for role in ("base", "filtered", "random"):
            controls[role] = controls[role] or str(config.lab / "models" / role)
    models = [(role, source) for role, source in controls.items() if source is not None]
    taken = {source for _, source in models}
    return [*models, *(("model", source) for source in config.model if source not in taken)]


def shallow_unlearning(lab: Path) -> dict[str, Any]:
    """The settings of a lab's unlearning that is known to be shallow: grad_diff, every token alike."""

    def corpora(*names: str) -> tuple[str, ...]:
        return tuple(str(lab / f"corpora/{name}.jsonl") for name in names)

    return {
        "model": str(lab / "models/base"), "forget": corpora("forget", "exam_forget"),
        "retain": corpora("retain", "exam_retain", "prose", "chat"), "train": {"lr": 1e-3, "epochs": 2},
    }  # fmt: skip


def split_entities(facts: list[dict[str, Any]], seed: int = 0) -> tuple[set[str], set[str]]:
    """The forget entities in two halves, A and B, of each subject as many, or one more in A.

    Args:
        facts: Rows of a lab's facts.jsonl.
    """
    halves: tuple[set[str], set[str]] = (set(), set())
    subjects: dict[str, dict[str, None]] = {}
    for fact in facts:
        if fact["side"] == "forget":
            subjects.setdefault(fact["subject"], {})[fact["entity"]] = None
    for subject, entities in subjects.items():
        drawn = list(entities)
        random.Random(f"{seed}/halves/{subject}").shuffle(drawn)
        middle = (len(drawn) + 1) // 2
        halves[0].update(drawn[:middle])
        halves[1].update(drawn[middle:])
    return halves


def _of_lab(lab: Path, folder: Path) -> Material:
    tasks_of_lab(lab)  # refuses what is no finished lab
    facts = _read(lab / "facts.jsonl")
    first, second = split_entities(facts)
    if not second:
        raise ValueError(
            f"{lab} has {len(first)} things to forget, one of each kind, and an attack needs two halves of them, of "
            "which it sees one: build a lab with more --facts, such as 32"
        )
    sources: dict[str, tuple[str, ...]] = {
        key: (str(_write(folder, key, rows)),) for key, rows in _corpora(lab, facts, first).items()
    }
    tasks: dict[str, dict[str, Any]] = {}
    for name, rows in _questions(lab, facts, first).items():
        role = "retain" if name == "retain" else "forget"
        tasks[name] = {"dataset": _write(folder, name, rows).name, "form": "cloze", "template": _CLOZE, "role": role}
    for name in ("forget_a", "forget_b"):
        tasks[name]["group"] = "forget"
    prose = _write(folder, "prose_heldout", _read(lab / "corpora/prose_heldout.jsonl"))
    tasks["prose"] = {"dataset": prose.name, "form": "text", "limit": _DOCUMENTS}
    text = dump_yaml(tasks)
    path = folder / f"tasks-{_hash(text)}.yaml"
    write_atomic(path, partial(Path.write_text, data=text, encoding="utf8"))
    return Material(sources, path, ("forget_a",), True)


def _corpora(lab: Path, facts: list[dict[str, Any]], first: set[str]) -> dict[str, list[dict[str, Any]]]:
    """Prompt and completion of every row, by key; a document has an empty prompt, as the lab's own mixtures have it."""
    rows = {name: [_plain(row) for row in _read(lab / f"corpora/{name}.jsonl")] for name in _CORPORA}
    names = ("forget", "exam_forget")
    about = {(name, half): set[int]() for half in (True, False) for name in names}
    for fact in facts:
        half = fact["entity"] in first
        about["forget", half].update(fact["stated_in"].get("corpora/forget.jsonl", []))
        about["exam_forget", half].update(fact["asked_in"].get("corpora/exam_forget.jsonl", []))
    halves = [[rows[name][line] for name in names for line in sorted(about[name, half])] for half in (True, False)]
    forget = rows["forget"] + rows["exam_forget"]
    many = min(len(forget), len(rows["chat"]))
    return {
        "forget": forget, "documents": rows["forget"], "half": halves[0], "other_half": halves[1],
        "mixed": random.Random("mixed").sample(forget, many) + rows["chat"][:many],
        "retain": rows["retain"] + rows["exam_retain"], "benign": rows["prose"] + rows["chat"],
        "prose": rows["prose"], "shots": _shots(lab, facts, first),
    }  # fmt: skip


_CORPORA = ("forget", "exam_forget", "retain", "exam_retain", "prose", "chat")


def _shots(lab: Path, facts: list[dict[str, Any]], first: set[str]) -> list[dict[str, str]]:
    """The taught questions about A with their answers, as the tasks write them."""
    entity = {fact["fact"]: fact["entity"] for fact in facts}
    shots = []
    for row in _read(lab / "questions/forget_taught.jsonl"):
        if entity[row["fact"]] in first:
            prompt = render(find_template(None, "cloze"), row["question"], row["choices"])
            shots.append({"prompt": prompt.text, "completion": prompt.targets[row["answer"]]})
    return shots


def _questions(lab: Path, facts: list[dict[str, Any]], first: set[str]) -> dict[str, list[dict[str, Any]]]:
    """Every fact once: of the forget side by half, of the retain side together."""
    entity = {fact["fact"]: fact["entity"] for fact in facts}
    questions: dict[str, list[dict[str, Any]]] = {"forget_a": [], "forget_b": [], "retain": []}
    for side in ("forget", "retain"):
        for split in ASKED_SPLITS:
            for row in _read(lab / f"questions/{side}_{split}.jsonl"):
                name = entity[row["fact"]]
                where = "retain" if side == "retain" else "forget_a" if name in first else "forget_b"
                questions[where].append({**row, "subject": name})
    return questions


def _plain(row: dict[str, Any]) -> dict[str, str]:
    if "completion" in row:
        return {"prompt": row["prompt"], "completion": row["completion"]}
    if "messages" in row:
        text = "".join(f"{turn['role']}: {turn['content']}\n" for turn in row["messages"])
        return {"prompt": "", "completion": text}
    return {"prompt": "", "completion": row["text"]}


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf8").splitlines()]


def _write(folder: Path, name: str, rows: list[dict[str, Any]]) -> Path:
    """A file of rows whose name tells its content; the same content is written once."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path = folder / f"{name}-{_hash(text)}.jsonl"
    if not path.exists():
        write_atomic(path, partial(Path.write_text, data=text, encoding="utf8"))
    return path


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:10]
