"""Every meeting of a model and an attack in some folders of attacks, ready to be compared.

An attack is a configuration whatever its seed; a group is what models of different seeds are of: an arm of an
experiment, or runs of `retrograd unlearn` whose settings differ in nothing but the seed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from retrograd.attack.course import Course
from retrograd.attack.findings import courses_of, findings, unseen
from retrograd.attack.folder import Attacked, Folder, read_folder
from retrograd.attack.recovery import means
from retrograd.runs.manifest import Manifest
from retrograd.settings.attack import Configuration, name_of
from retrograd.settings.parse import load_yaml
from retrograd.settings.tasks import tasks_from

__all__ = ["Faced", "Rise", "read_faced"]

_NOT_THE_GROUP = ("run", "heartbeat", "export", "evaluate", "log", "device")


class Rise(NamedTuple):
    """The rise on what an attack did not show beyond that of the model that never knew, [n], clusters, [n], and the
    place of the evaluation that it is read at."""

    values: np.ndarray
    clusters: np.ndarray
    place: int


class Faced(NamedTuple):
    """A model under a configuration of an attack.

    attack, seed: the configuration without its seed, and that; readable: the attack's name for people.
    groups: what the model is one of the seeds of; method: of unlearning, if its run tells it.
    least: the general accuracy to be kept; rise: at the last step; None where the attack shows everything.
    reached: the step at which half came back, as `findings` tells it.
    folder: of attacks; unseen: the forget questions whose answers the attack does not show, [n], None if it shows all.
    """

    folder: Path
    model: str
    method: str | None
    role: str
    groups: tuple[str, ...]
    configuration: str
    attack: str
    readable: str
    seed: int
    course: Course
    least: float
    unseen: np.ndarray | None
    rise: Rise | None
    reached: dict[str, Any] | None
    valid: bool | None
    probe: bool


def read_faced(folders: Sequence[Path], utility: float) -> list[Faced]:
    """Every meeting of a model and an attack in some folders, each once.

    Raises:
        ValueError: If one is no folder of attacks, they were asked different questions, or an attack of one name was
            of different rows.
    """
    met: dict[tuple[str, str], Faced] = {}
    asked: set[str] = set()
    trained: dict[str, tuple[Path, list[str | None]]] = {}
    for path in folders:
        folder = read_folder(path)
        courses = courses_of(folder, tasks_from(folder.tasks))
        recovery = findings(folder, (utility,), courses)
        of = {(meeting["model"], meeting["configuration"]): meeting for meeting in recovery["meetings"]}
        base = folder.of_role("base")
        for name in folder.configurations:
            if base is None or (base.name, name) not in courses:
                continue
            _check_rows(trained, name, path, folder.place(base, name))
            for target in folder.targets:
                if (target.name, name) in courses:
                    asked.add(_questions(path))
                    entry = of[target.name, name]
                    met.setdefault((target.name, name), _faced(folder, target, base, name, courses, entry, utility))
    if len(asked) > 1:
        raise ValueError("these folders were asked different questions: attack all models in one folder")
    if not any(meeting.role == "model" for meeting in met.values()):
        controls = ", ".join(sorted({meeting.role for meeting in met.values()})) or "none"
        raise ValueError(
            f"{', '.join(map(str, folders))}: no model has met an attack beside the controls ({controls}); "
            "run `retrograd attack` with a --model that is none of them"
        )
    return list(met.values())


def _faced(
    folder: Folder, target: Attacked, base: Attacked, name: str, courses: Mapping[tuple[str, str], Course],
    meeting: dict[str, Any], utility: float,
) -> Faced:  # fmt: skip
    configuration, course = folder.configurations[name], courses[target.name, name]
    filtered = folder.of_role("filtered")
    never = courses.get((filtered.name, name)) if filtered is not None else None
    method, groups = _groups(target)
    return Faced(
        folder.path, target.name, method, target.role, groups, name,
        name_of(dataclasses.replace(configuration, seed=0)), configuration.readable.rpartition("-s")[0],
        configuration.seed, course, means(courses[base.name, name].retain)[0] - utility,
        unseen(configuration, course.first), _rise(course, never, configuration), meeting.get("reached", {}).get("0.5"),
        meeting["valid"]["valid"], configuration.probe,
    )  # fmt: skip


def _rise(course: Course, never: Course | None, configuration: Configuration) -> Rise | None:
    """At the last step that both have."""
    mask = None if never is None else unseen(configuration, course.first)
    if never is None or mask is None:
        return None
    last = max(set(course.steps) & set(never.steps))
    own, other = (x.forget[x.steps.index(last)] - x.forget[0] for x in (course, never))
    values = (own - other)[mask]
    return None if np.isnan(values).any() else Rise(values, course.clusters[mask], course.steps.index(last))


def _check_rows(trained: dict[str, tuple[Path, list[str | None]]], name: str, path: Path, place: Path) -> None:
    """Refuse an attack that trained on other rows in another folder: a name tells its settings alone."""
    manifests = [Manifest(place / phase / "manifest.json").values for phase in ("before", "attack")]
    rows = [manifest.get("hashes", {}).get("rows") for manifest in manifests]
    first, others = trained.setdefault(name, (path, rows))
    if rows != others:
        raise ValueError(f"attack {name} trained on other rows in {path} than in {first}: attack all models in one "
                         "folder")  # fmt: skip


def _questions(path: Path) -> str:
    return str(json.loads((path / "attack.json").read_text(encoding="utf8"))["questions"]["content"])


def _groups(target: Attacked) -> tuple[str | None, tuple[str, ...]]:
    """The method that an unlearning run's manifest names, and what the model is a seed of: by its run's settings, where
    nothing else says so."""
    run = Path(target.source).parent
    method: str | None = Manifest(run / "manifest.json").values.get("method")
    if target.groups or target.role != "model":
        return method, target.groups or (target.role,)
    path = run / "run_config.yaml"
    if method is None or not path.exists():
        return method, (target.name,)
    settings = load_yaml(path.read_text(encoding="utf8"))
    settings = {name: value for name, value in settings.items() if name not in _NOT_THE_GROUP}
    settings["train"] = {**settings.get("train", {}), "seed": None}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()
    return method, (f"{method}-{digest[:8]}",)
