"""A folder belongs to one evaluation: what was asked of whom, and the refusal of anything else.

What is on this machine counts by its content, the rest by its name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from retrograd.durable import foreign
from retrograd.runs.files import file_digest, write_json

__all__ = ["begin_evaluation", "content", "plain"]


def begin_evaluation(output: Path, settings: dict[str, Any], *, write: bool) -> None:
    """Make the folder that of this evaluation, or refuse; further models may join.

    Args:
        settings: tasks and models, by name; the rest has to be the same.
        write: Whether to write evaluation.json, or only look.
    Raises:
        ValueError: If the folder holds something else, or a model or data set has changed.
    """
    path = output / "evaluation.json"
    settings = json.loads(json.dumps(settings))
    tasks, models = settings["tasks"], settings["models"]
    if path.exists():
        old = json.loads(path.read_text(encoding="utf8"))
        rest = sorted((old.keys() | settings.keys()) - {"tasks", "models"})
        changed = [*_changes(old, settings, rest), *_changes(old["tasks"], tasks),
                   *_changes(old["models"], models, sorted(old["models"].keys() & models.keys()))]  # fmt: skip
        if changed:
            lines = "\n  ".join(changed)
            raise ValueError(f"{output} holds another evaluation:\n  {lines}\nUse another folder, or delete this one.")
        settings["models"] = {**old["models"], **models}
    elif write and output.exists() and (not output.is_dir() or any(foreign(output))):
        raise ValueError(f"{output} exists and is no evaluation; choose another folder")
    if write:
        write_json(path, settings)


def plain(source: str) -> str:
    """The same model or data set under one spelling."""
    return str(Path(source).resolve()) if Path(source).exists() else source


def content(source: str) -> str | None:
    """Hash of a file, or of a folder's files with their names; None for the hub, or if it is not there."""
    path = Path(source).expanduser()
    if path.is_file():
        return file_digest(path)
    if not path.is_dir():
        return None
    files = sorted(file for file in path.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    lines = [f"{file.relative_to(path)} {file_digest(file)}" for file in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _changes(old: dict[str, Any], new: dict[str, Any], names: Sequence[str] | None = None) -> list[str]:
    """Lines "name: old → new"; of records, only what differs. A file that was not there yet may come."""
    lines = []
    for name in sorted(old.keys() | new.keys()) if names is None else names:
        a, b = old.get(name), new.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            came = a.get("content") is None and b.get("content") is not None
            inner = [key for key in {**a, **b} if not came or key not in ("content", "source", "dataset")]
            lines += [f"{name}.{line}" for line in _changes(a, b, inner)]
        elif a != b:
            lines.append(f"{name}: {_short(a)} → {_short(b)}")
    return lines


def _short(value: Any) -> str:
    return "nothing" if value is None else "a task" if isinstance(value, dict) else repr(value)
