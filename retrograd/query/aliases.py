"""The same questions about things under other names: what a model knows of a name and not of the thing."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["aliased", "renamed"]


def aliased(documents: Dataset, path: Path) -> Dataset:
    """The questions with every name of a JSON file {name: other name} replaced, as whole words.

    Raises:
        ValueError: If the file is no such file, or a question has none of its names.
    """
    try:
        names = json.loads(path.read_text(encoding="utf8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"alias {path} cannot be read as JSON ({error}); it has to be {{name: other name}}") from error
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) and name for name in names.values()):
        raise ValueError(f"alias {path} has to be {{name: other name}}, texts both, at least one")
    questions = documents["question"]
    new = [renamed(str(text), names) for text in questions]
    same = [number for number, (old, text) in enumerate(zip(questions, new)) if old == text]
    if same and not all(old == other for old, other in names.items()):
        raise ValueError(
            f"{len(same)} of {len(new)} questions have no name of {path}, question {same[0]} first: "
            f"{str(questions[same[0]])[:80]!r}. It would be asked plainly: add its name, or leave the question out"
        )
    changed: Any = documents.remove_columns("question").add_column("question", new)
    return changed


def renamed(text: str, names: dict[str, str]) -> str:
    """A text with names replaced, whole words, the longest name first, each place once.

    >>> renamed("Where is Ann, and Anna?", {"Ann": "Bo", "Bo": "Cy"})
    'Where is Bo, and Anna?'
    """
    pattern = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    return re.sub(rf"(?<!\w)(?:{pattern})(?!\w)", lambda match: names[match[0]], text)
