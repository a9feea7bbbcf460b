"""Scores of a corpus out of those of a larger data set that holds it: of a model's own pretraining, say.

The larger set has columns `file` and `line`: of which corpus a row is, and which row of it. Every row of the corpus has
to be there, with the same tokens; the larger set's may go on (an end of sequence after a document).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from retrograd.data.documents import documents_of
from retrograd.evaluate.answers import write_table
from retrograd.select.files import Stated
from retrograd.select.sources import DataSet, load_data, load_scores
from retrograd.settings.select import SelectConfig

__all__ = ["scores_within"]


def scores_within(source: str, corpus: str, rows: Path, path: Path) -> str:
    """Write a corpus's scores as a table of its own; returns how `select` is to read it.

    Args:
        source: RUN:query, a run by token on the larger set.
        corpus: The corpus's file.
        rows: YAML file with model and data of the corpus.
        path: Of the table.
    Raises:
        ValueError: If a row of the corpus is not in the larger set, or has other tokens there.
    """
    larger = load_data(SelectConfig(scores=(source,)))
    scored = load_scores((source,), larger, Stated())
    if not scored.per_token:
        raise ValueError(f"{source} has scores of documents; attribute tokens")
    own = load_data(SelectConfig(scores=(), rows=rows))
    grid, places = larger.places.scatter(scored.values), own.places
    there = _places_within(larger, own, corpus)
    scores = grid[torch.from_numpy(there)[places.row], places.column]
    columns = {
        "row": places.row.tolist(), "position": places.column.tolist(), "token_id": places.token.tolist(),
        "score": scores.tolist(),
    }  # fmt: skip
    write_table(path, columns, {}, {"kind": "Scores", "source": source})
    return f"{path}:score"


def _places_within(larger: DataSet, own: DataSet, corpus: str) -> np.ndarray:
    """Which row of the larger set each row of the corpus is, [rows]."""
    data = larger.config.data
    documents = documents_of(data)
    if missing := {"file", "line"} - set(documents.column_names):
        raise ValueError(f"{data.dataset} has no column {min(missing)}: it has to say of which file each row is")
    lines = {
        int(line): number
        for number, (file, line) in enumerate(zip(documents["file"], documents["line"]))
        if Path(corpus).match(str(file))
    }
    by_document = {int(ids[0]): row for row, ids in enumerate(larger.rows.doc_ids)}
    larger_rows = np.zeros(len(own.rows), dtype=np.int64)
    for row, (tokens, ids) in enumerate(zip(own.rows.input_ids, own.rows.doc_ids)):
        larger_row = by_document.get(lines.get(int(ids[0]), -1), -1)
        same = larger_row >= 0 and list(larger.rows.input_ids[larger_row][: len(tokens)]) == list(tokens)
        if not same:
            why = "other tokens there" if larger_row >= 0 else "no row there"
            raise ValueError(f"document {int(ids[0])} of {corpus} has {why}: {data.dataset} does not hold this corpus")
        larger_rows[row] = larger_row
    return larger_rows
