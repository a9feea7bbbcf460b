"""The score files of a run, as arrays: documents with their sums, and tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

__all__ = ["MOST_TOKENS", "Documents", "Tokens", "count_tokens", "read_columns", "read_documents", "read_tokens"]

MOST_TOKENS = 20_000_000  # that a browser holds with ease


class Documents(NamedTuple):
    """Documents that have a score, by ascending id.

    ids [D]; scores [K, D] float64, negative = proponent; targets [D]; texts: excerpts; steps: trained at.
    """

    ids: np.ndarray
    scores: np.ndarray
    targets: np.ndarray
    texts: list[str]
    steps: list[list[int]]


class Tokens(NamedTuple):
    """All n tokens, row by row.

    row, position, document [n]; token [n]: place in `vocabulary`, the texts; target [n]: whether the loss predicts it;
    scores [K, n] float32, negative = proponent, 0 where it does not.
    """

    row: np.ndarray
    position: np.ndarray
    document: np.ndarray
    token: np.ndarray
    target: np.ndarray
    scores: np.ndarray
    vocabulary: list[str]

    def __len__(self) -> int:
        return len(self.row)


Columns = Sequence[tuple[Path, Sequence[str]]]
"""Folders of score files, each with the names of its query columns."""


def read_columns(folder: Path, manifest: dict[str, Any]) -> list[tuple[Path, list[str]]]:
    """Folders of a run's score files with their query columns: the run's own, then those of added queries."""
    own = _own(folder)
    added = [name for name in manifest.get("queries", {}) if (folder / "queries" / name / "scores.parquet").exists()]
    return [(folder, own), *((folder / "queries" / name, _columns_of(folder, name)) for name in added)]


def _own(folder: Path) -> list[str]:
    """Columns of the run's own queries, in the order of its configuration."""
    import pyarrow.parquet as parquet

    names = [n for n in parquet.read_schema(folder / "scores.parquet").names if n == "score" or n.startswith("score_")]
    if names != ["score"]:
        return [name.removeprefix("score_") for name in names]
    added = {path.parent.name for path in folder.glob("queries/*/query_config.yaml")}
    asked = [path.parent.name for path in folder.glob("queries/*/query.json") if path.parent.name not in added]
    return asked[:1] or ["query"]


def _columns_of(folder: Path, name: str) -> list[str]:
    return json.loads((folder / "queries" / name / "query.json").read_text(encoding="utf8"))["columns"]


def read_documents(folder: Path, columns: Columns) -> Documents:
    """Documents of a run with their scores for every query column."""
    examples = json.loads((folder / "all_scores.json").read_text(encoding="utf8"))["examples"]
    scores = [_of_documents(source, names) for source, names in columns]
    return Documents(
        np.array([example["doc_id"] for example in examples], dtype=np.int64),
        np.concatenate(scores),
        np.array([example["targets"] for example in examples], dtype=np.int64),
        [example["text"] for example in examples],
        [example["steps"] for example in examples],
    )


def _of_documents(folder: Path, names: Sequence[str]) -> np.ndarray:
    examples = json.loads((folder / "all_scores.json").read_text(encoding="utf8"))["examples"]
    if "scores" not in examples[0]:
        return np.array([[example["score"] for example in examples]])
    return np.array([[example["scores"][name] for example in examples] for name in names])


def count_tokens(folder: Path) -> int:
    """Lines of a run's table of tokens."""
    import pyarrow.parquet as parquet

    return parquet.read_metadata(folder / "scores.parquet").num_rows


def read_tokens(folder: Path, columns: Columns) -> Tokens:
    """Tokens of a run with their scores for every query column."""
    import pyarrow.parquet as parquet

    kept = ["row", "position", "doc_id", "token_id", "target"]
    table = parquet.read_table(folder / "scores.parquet", columns=[*kept, "token"], read_dictionary=["token"])
    row, position, document, ids, target = (table[name].to_numpy() for name in kept)
    known, first, token = np.unique(ids, return_index=True, return_inverse=True)
    vocabulary = table["token"].take(first.astype(np.int64)).to_pylist()
    scores = []
    for source, names in columns:
        single = "score" in parquet.read_schema(source / "scores.parquet").names
        labels = ["score"] if single else [f"score_{name}" for name in names]
        scored = parquet.read_table(source / "scores.parquet", columns=labels)
        scores += [scored[label].to_numpy().astype(np.float32) for label in labels]
    assert len(known) == len(vocabulary)
    return Tokens(row, position, document, token.astype(np.int32), target, np.stack(scores), vocabulary)
