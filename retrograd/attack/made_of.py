"""The file in a folder of answers that says which attack they are of, and what it was made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from retrograd.runs.files import write_json

__all__ = ["claim_answers"]


def claim_answers(path: Path, about: dict[str, Any], made_of: dict[str, Any]) -> dict[str, Any]:
    """Let the answers beside a file be of one set of questions and data; gives what the file says then.

    Raises:
        ValueError: If they are of another.
    """
    old: dict[str, Any] = json.loads(path.read_text(encoding="utf8")) if path.exists() else {}
    if (before := old.get("made_of", made_of)) != made_of:
        lines = "\n  ".join(f"{key}: {before.get(key)!r} → {made_of[key]!r}" for key in made_of
                            if before.get(key) != made_of[key])  # fmt: skip
        raise ValueError(
            f"{path.parent} has answers of another attack:\n  {lines}\nUse another folder, or put it back."
        )
    record = {**old, **about, "made_of": made_of}
    write_json(path, record)
    return record
