"""The folder of attacks: which models, which configurations, and where each meeting of the two lies.

    attack.json                                  models with their roles, configurations, the questions
    data/                                        what a lab's attacks train on and ask
    shallow/                                     a lab's run of an unlearning that is known to be shallow
    models/MODEL/CONFIGURATION/                  configuration.json
    models/MODEL/CONFIGURATION/before, attack    runs of a fine-tuning attack
    models/MODEL/CONFIGURATION/answers           of an attack without training by strength, of a prompt by step

Names end in a hash of what they name, so that two models or configurations never share one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from retrograd.attack.material import Material
from retrograd.durable import LOCK, foreign
from retrograd.evaluate.folder import content, plain
from retrograd.runs.files import write_json
from retrograd.runs.lock import locked
from retrograd.settings.attack import Configuration, Finetune, Untrained, name_of
from retrograd.settings.parse import build
from retrograd.settings.prompted import Prompted

__all__ = [
    "Attacked", "Folder", "begun_meetings", "claim_folder", "configuration_from", "forget_unmet", "read_folder",
    "refuse_foreign", "target_name", "values_of",
]  # fmt: skip


class Attacked(NamedTuple):
    """A model by its name in the folder. role: of CONTROLS, or "model"; groups: it is one of the seeds of, if known."""

    name: str
    source: str
    role: str
    groups: tuple[str, ...] = ()


class Folder(NamedTuple):
    """What is attacked and how, by name, in the order in which it joined."""

    path: Path
    targets: list[Attacked]
    configurations: dict[str, Configuration]
    tasks: Path
    half: tuple[str, ...]
    clustered: bool

    def place(self, target: Attacked, configuration: str) -> Path:
        """Where a configuration against a model lies."""
        return self.path / "models" / target.name / configuration

    def of_role(self, role: str) -> Attacked | None:
        return next((target for target in self.targets if target.role == role), None)


def refuse_foreign(path: Path) -> None:
    """Refuse a folder that holds something else, before anything is written there.

    Raises:
        ValueError: If it does.
    """
    if not path.exists() or (path / "attack.json").exists():
        return
    if not path.is_dir() or set(foreign(path)) - {"data", "shallow"}:
        raise ValueError(f"{path} exists and holds no attacks; choose another folder")


def target_name(source: str) -> str:
    """A name for a model: the end of its path, and a hash of its content or, of one on the hub, of its name."""
    whole = plain(source)
    parts = [part for part in whole.split("/") if part][-2:]
    readable = re.sub(r"[^\w.-]", "-", "-".join(parts)).lstrip(".-") or "model"
    digest = hashlib.sha256(f"{whole} {content(source)}".encode()).hexdigest()
    return f"{readable}-{digest[:8]}"


def claim_folder(
    path: Path, sources: Iterable[tuple[str, str]], configurations: Iterable[Configuration], material: Material,
    groups: Mapping[str, Sequence[str]] | None = None,
) -> Folder:  # fmt: skip
    """Let models and configurations join the folder, or refuse what does not fit to what is there.

    Args:
        sources: (role, source) of each model.
        groups: By source: what it is one of the seeds of, where that is known.
    Raises:
        ValueError: If a model has changed or has two roles, or the folder was asked other questions.
    """
    inside = material.tasks.is_relative_to(path)  # the folder may be moved then
    tasks = material.tasks.relative_to(path) if inside else material.tasks.resolve()
    questions = {"content": content(str(material.tasks)), "half": list(material.half), "clustered": material.clustered}
    old = json.loads((path / "attack.json").read_text(encoding="utf8")) if (path / "attack.json").exists() else {}
    before = {key: value for key, value in old.get("questions", questions).items() if key != "tasks"}
    if before != questions:
        raise ValueError(
            f"{path} holds attacks that were asked other questions:\n  {before} → {questions}\nUse another folder, or "
            "put them back."
        )
    targets = old.get("models", {})
    for name, target in targets.items():
        if target_name(target["source"]) != name:
            raise ValueError(
                f"{target['source']} is gone or has changed since {path} attacked it; put it back, or use another "
                "folder"
            )
    for role, source in sources:
        name = target_name(source)
        known = targets.get(name)
        if known and known["role"] != role:
            raise ValueError(f"{source} is {known['role']} and {role} at once; a model has one role")
        taken = [
            other for other, target in targets.items() if target["role"] == role and other != name and role != "model"
        ]
        if taken:
            raise ValueError(f"{path} has {taken[0]} as its {role}, now it is {source}; use another folder")
        targets[name] = {"source": plain(source), "role": role}
        if groups and source in groups:
            targets[name]["groups"] = list(groups[source])
    named = old.get("configurations", {}) | {
        name_of(configuration): values_of(configuration) for configuration in configurations
    }
    asked = {"tasks": str(tasks), **questions}
    write_json(path / "attack.json", {"models": targets, "configurations": named, "questions": asked})
    return read_folder(path)


def forget_unmet(folder: Folder, target: Attacked, configuration: str, asked: Collection[str]) -> None:
    """Take a meeting that cannot work out of the folder again: its configuration and its model, each if this call asks
    for it, or if it has met nothing. Later calls, which do all that the folder knows of, would fail at it for ever;
    what others have found stays on disk, for a call that asks for it again.

    Args:
        asked: Names of this call's configurations, and sources of its models but for controls.
    """
    path = folder.path / "attack.json"
    with locked(folder.path, f"{LOCK}-unmet", patience=60, tidy=False):  # other processes may fail too
        record = json.loads(path.read_text(encoding="utf8"))
        if configuration in asked or not any(_met(folder.place(other, configuration)) for other in folder.targets):
            record["configurations"].pop(configuration, None)
        if target.source in asked or not any(_met(folder.place(target, name)) for name in folder.configurations):
            record["models"].pop(target.name, None)
        write_json(path, record)


def begun_meetings(folder: Folder) -> set[tuple[str, str]]:
    """(model, configuration) of all that have met."""
    return {
        (target.name, name)
        for target in folder.targets
        for name in folder.configurations
        if _met(folder.place(target, name))
    }


def _met(place: Path) -> bool:
    """Whether a run was begun or an answer is there: what is asked for is written down before anything is loaded."""
    return any(file.name == "manifest.json" or file.suffix == ".parquet" for file in place.rglob("*"))


def read_folder(path: Path) -> Folder:
    """A folder of attacks.

    Raises:
        ValueError: If it is none.
    """
    if not (path / "attack.json").exists():
        raise ValueError(f"{path} has no attack.json: it is no folder of `retrograd attack`")
    record = json.loads((path / "attack.json").read_text(encoding="utf8"))
    targets = [Attacked(name, target["source"], target["role"], tuple(target.get("groups", ())))
               for name, target in record["models"].items()]  # fmt: skip
    asked = record["questions"]
    configurations = {
        name: configuration_from(settings, f"{path}: {name}") for name, settings in record["configurations"].items()
    }
    return Folder(path, targets, configurations, path / asked["tasks"], tuple(asked["half"]), asked["clustered"])


def values_of(configuration: Configuration) -> dict[str, Any]:
    """A configuration as plain values."""
    kind = next(name for name, known in _KINDS.items() if isinstance(configuration, known))
    return {"kind": kind, **dataclasses.asdict(configuration)}


def configuration_from(values: dict[str, Any], where: str) -> Configuration:
    """The configuration of plain values."""
    values = dict(values)
    kind: Any = _KINDS[values.pop("kind")]
    configuration: Configuration = build(kind, values, where)
    return configuration


_KINDS: dict[str, type] = {"finetune": Finetune, "untrained": Untrained, "prompted": Prompted}
