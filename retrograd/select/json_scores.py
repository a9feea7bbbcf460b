"""Scores in a JSON file, however a tool wrote them: a list, lists by row, numbers by document, or records.

[0.1, -0.2, …]                                a document each, in the data set's order
[[0, 0.1, …], …]                              a row of tokens each
{"0": 0.1, "7": -0.2, …}                      by document id
[{"doc_id": 0, "score": 0.1}, …]              records; with several queries "scores": {"name": 0.1, …}
{"examples": [records]}                       as a run's all_scores.json has them
{"query/0": any of the above, …}              several columns by name
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["json_columns", "json_scores"]


def json_columns(content: Any) -> list[str]:
    """The names of its columns; none if it has a single one."""
    if isinstance(content, dict) and "examples" in content:
        content = content["examples"]
    if isinstance(content, list) and content and isinstance(content[0], dict):
        return list(content[0].get("scores", ()))
    if isinstance(content, dict) and not all(key.isdecimal() for key in content):
        return [key for key, value in content.items() if isinstance(value, list | dict)]
    return []


def json_scores(file: Path, content: Any, column: str | None, documents: int) -> tuple[Tensor, Tensor | None]:
    """Scores of documents, [documents], or of tokens, [rows, length], float64; and where there are any, None: all.

    Args:
        column: Where there are several.
        documents: In the data set.
    Raises:
        ValueError: If the file holds something else, has no such column, or names a document that is not there.
    """
    columns = json_columns(content)
    if column is not None and column not in columns:
        raise ValueError(
            f"{file} has no column {column!r}; it has {', '.join(columns) or 'a single one without a name'}"
        )
    if column is None and len(columns) > 1:
        raise ValueError(f"{file} has {len(columns)} columns; name one as {file}:{columns[0]}")
    if isinstance(content, dict) and "examples" in content:
        content = content["examples"]
    if isinstance(content, dict) and columns:
        content = content[column or columns[0]]
    try:
        return _numbers(content, column or (columns[0] if columns else None), documents)
    except (TypeError, KeyError, IndexError, ValueError) as error:
        raise ValueError(
            f"{file} holds no scores that can be read ({type(error).__name__}: {error}): give a list of numbers, one "
            f"for each of {documents} documents; lists of numbers by row; an object of numbers by document id; or "
            "records with doc_id and score"
        ) from error


def _numbers(content: Any, column: str | None, documents: int) -> tuple[Tensor, Tensor | None]:
    if isinstance(content, dict):
        return _by_document([int(key) for key in content], [float(value) for value in content.values()], documents)
    if content and isinstance(content[0], dict):
        several = "scores" in content[0]
        values = [float(record["scores"][column] if several else record["score"]) for record in content]
        return _by_document([int(record["doc_id"]) for record in content], values, documents)
    if content and isinstance(content[0], list):
        scores = torch.zeros((len(content), max(map(len, content))), dtype=torch.float64)
        for row, values in enumerate(content):
            scores[row, : len(values)] = torch.tensor(values, dtype=torch.float64)
        return scores, None
    return torch.tensor([float(value) for value in content], dtype=torch.float64), None


def _by_document(ids: Sequence[int], values: Sequence[float], documents: int) -> tuple[Tensor, Tensor]:
    """The numbers at their documents; those that have none are not listed."""
    outside = [document for document in ids if not 0 <= document < documents]
    if outside:
        raise ValueError(f"document {outside[0]} is not among the {documents} of the data here")
    if len(set(ids)) < len(ids):
        raise ValueError(f"{len(ids)} scores for {len(set(ids))} different documents")
    scores, listed = torch.zeros((2, documents), dtype=torch.float64)
    scores[list(ids)] = torch.tensor(values, dtype=torch.float64)
    listed[list(ids)] = 1
    return scores, listed
