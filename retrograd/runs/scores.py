"""Score files: tensors for programs, parquet for tables, JSON with excerpts for people.

Scores come with a leading query axis [K, …] and are stored with a trailing one when K > 1: [docs] or [docs, K] per
example, [rows, length] or [rows, length, K] per token, rows in data-set order whatever order they were visited in.
Where data sets are joined, as forget and retain rows are, rows and documents are numbered through all of them, and
parquet and JSON say of each its side, data set and number there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retrograd.data.pairs import Part
from retrograd.data.rows import Rows
from retrograd.runs.files import write_atomic, write_json, write_torch
from retrograd.runs.manifest import SIGN

__all__ = [
    "Ranked", "detractors", "doc_ids", "origins_of", "per_document", "proponents", "ranked", "read_scores",
    "write_scores",
]  # fmt: skip

TOP = 50


@dataclass(frozen=True)
class Ranked:
    """A document with its score(s), for people. origin: where it is from, where several data sets are joined."""

    doc_id: int
    score: float
    scores: list[float]
    steps: list[int]
    targets: int
    text: str
    origin: dict[str, Any] = field(default_factory=dict)


def origins_of(parts: Sequence[Part]) -> list[dict[str, Any]]:
    """Of each document of joined data sets: its side, its data set, and its number there. None for a plain run."""
    return [
        {"side": part.side, "dataset": part.dataset, "document": number}
        for part in parts
        for number in range(part.documents)
    ]


def doc_ids(rows: Rows) -> Tensor:
    """Original document id of every position, [rows, length]; padding carries its row's last document."""
    ids = torch.empty((len(rows), rows.max_length), dtype=torch.int64)
    for number, documents in enumerate(rows.doc_ids):
        ids[number, : len(documents)] = torch.from_numpy(np.asarray(documents))
        ids[number, len(documents) :] = int(documents[-1])
    return ids


def per_document(scores: Tensor, rows: Rows) -> Tensor:
    """Scores summed by document, [K, documents], from [K, documents] or [K, rows, length]."""
    if scores.ndim == 2:
        return scores
    totals = torch.zeros((len(scores), rows.documents), dtype=scores.dtype)
    return totals.index_add_(1, doc_ids(rows).flatten(), scores.flatten(1))


def ranked(
    scores: Tensor, rows: Rows, steps: Sequence[Sequence[int]], texts: Sequence[str], leading: int | None = None,
    origins: Sequence[dict[str, Any]] = (),
) -> list[Ranked]:  # fmt: skip
    """Every document that has a row, by ascending score.

    Args:
        scores: [K, documents]; the score that ranks is the mean over the `leading` first of the K, all if None.
        steps: The steps at which each row is trained on.
        texts: Excerpt of each document.
        origins: Where each document is from, if there are several data sets.
    """
    where: dict[int, set[int]] = {}
    targets: dict[int, int] = {}
    for row, (documents, mask) in enumerate(zip(rows.doc_ids, rows.target_mask)):
        for document in np.unique(documents):
            where.setdefault(int(document), set()).update(steps[row])
            targets[int(document)] = targets.get(int(document), 0) + int(mask[documents == document].sum())
    records = [
        Ranked(
            doc,
            float(scores[:leading, doc].mean()),
            scores[:, doc].tolist(),
            sorted(where[doc]),
            targets[doc],
            texts[doc],
            origins[doc] if origins else {},
        )
        for doc in where
    ]
    return sorted(records, key=lambda record: record.score)


def proponents(order: Sequence[Ranked], count: int) -> list[Ranked]:
    """The strongest proponents, `count` at most: the lowest scores, as far as they are negative."""
    return [record for record in order[:count] if record.score < 0]


def detractors(order: Sequence[Ranked], count: int) -> list[Ranked]:
    """The strongest detractors, `count` at most: the highest scores, as far as they are positive."""
    return [record for record in order[::-1][:count] if record.score > 0]


def read_scores(path: Path, per_token: bool) -> Tensor:
    """Scores of a `scores.pt`, with a leading query axis [K, …]."""
    scores = torch.load(path, weights_only=True)
    return scores[None] if scores.ndim == (2 if per_token else 1) else scores.movedim(-1, 0)


def write_scores(
    folder: Path,
    scores: Tensor,
    rows: Rows,
    steps: Sequence[Sequence[int]],
    order: list[Ranked],
    token_text: Any,
    names: Sequence[str],
    origins: Sequence[dict[str, Any]] = (),
) -> None:
    """Write every score file of a run.

    Args:
        scores: [K, documents] or [K, rows, length].
        order: From `ranked`.
        token_text: Function from token ids to their texts.
        names: Of the K queries.
        origins: As for `ranked`.
    """
    trailing = scores[0] if len(scores) == 1 else scores.movedim(0, -1)
    if scores.ndim == 3:
        write_torch(folder / "doc_ids.pt", doc_ids(rows))
        table = _token_table(scores, rows, steps, token_text, names, origins)
    else:
        table = _document_table(order, names)
    _write_parquet(folder / "scores.parquet", table)
    records = [_record(record, names) for record in order]
    by_id = sorted(records, key=lambda record: record["doc_id"])
    write_json(folder / "all_scores.json", {"meaning": SIGN, "examples": by_id})
    shown = min(TOP, len(records))
    lowest = _end("lowest", "negative", "proponent", len(proponents(order, TOP)), shown)
    highest = _end("highest", "positive", "detractor", len(detractors(order, TOP)), shown)
    write_json(folder / "lowest_attribution.json", {"meaning": lowest + SIGN, "examples": records[:TOP]})
    write_json(folder / "highest_attribution.json", {"meaning": highest + SIGN, "examples": records[::-1][:TOP]})
    write_torch(folder / "scores.pt", trailing)  # last: whoever sees it sees all


def _end(end: str, sign: str, kind: str, number: int, shown: int) -> str:
    """What one end of the ranking is, in words."""
    if number == 0:
        return f"The {shown} {end} scores; none is {sign}, so none of these is a {kind}. "
    if number < shown:
        return f"The {shown} {end} scores; only the first {number} are {sign}: the strongest {kind}s. "
    return f"The {shown} {end} scores, all {sign}: the strongest {kind}s. "


def _record(record: Ranked, names: Sequence[str]) -> dict[str, Any]:
    values = {
        "doc_id": record.doc_id,
        **record.origin,
        "score": record.score,
        "steps": record.steps,
        "targets": record.targets,
    }
    several = {"scores": dict(zip(names, record.scores, strict=True))} if len(record.scores) > 1 else {}
    return {**values, **several, "text": record.text}


def _score_columns(values: np.ndarray, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Columns "score", or "score_NAME" for each of several queries, of values [n, K]."""
    if values.shape[1] == 1:
        return {"score": values[:, 0]}
    return {f"score_{name}": values[:, k] for k, name in enumerate(names)}


def _origin_columns(origins: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """Columns side, dataset and document; none for a plain run."""
    return {name: [origin[name] for origin in origins] for name in (origins[0] if origins else ())}


def _document_table(order: list[Ranked], names: Sequence[str]) -> dict[str, Any]:
    order = sorted(order, key=lambda record: record.doc_id)
    return {
        "doc_id": [record.doc_id for record in order],
        **_origin_columns([record.origin for record in order if record.origin]),
        **_score_columns(np.array([record.scores for record in order]), names),
        "steps": [record.steps for record in order],
        "targets": [record.targets for record in order],
        "text": [record.text for record in order],
    }


def _token_table(
    scores: Tensor, rows: Rows, steps: Sequence[Sequence[int]], token_text: Any, names: Sequence[str],
    origins: Sequence[dict[str, Any]],
) -> dict[str, Any]:  # fmt: skip
    lengths = [len(ids) for ids in rows.input_ids]
    ids = np.concatenate([np.asarray(x) for x in rows.input_ids])
    row = np.repeat(np.arange(len(rows)), lengths)
    position = np.concatenate([np.arange(n) for n in lengths])
    values = scores[:, torch.from_numpy(row), torch.from_numpy(position)].T.numpy()
    documents = np.concatenate([np.asarray(x) for x in rows.doc_ids])
    return {
        "row": row,
        "position": position,
        "doc_id": documents,
        **_origin_columns([origins[document] for document in documents] if origins else []),
        "token_id": ids,
        "token": token_text(ids),
        "target": np.concatenate([np.asarray(x) for x in rows.target_mask]),
        **_score_columns(values, names),
        "steps": [list(steps[r]) for r in row.tolist()],
    }


def _write_parquet(path: Path, columns: dict[str, Any]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table(columns).replace_schema_metadata({"meaning": SIGN})
    write_atomic(path, lambda temporary: pq.write_table(table, temporary))
