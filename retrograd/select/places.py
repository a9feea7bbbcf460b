"""The real tokens of a data set, as one flat axis: statistics over them cannot meet padding.

A real token is a valid target: a token that the training loss predicts. Padding, a row's first token and tokens that
the data set does not supervise are none, and have score 0 and weight 0.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from retrograd.data.rows import Rows

__all__ = ["Places", "places_of"]


class Places(NamedTuple):
    """n real tokens, row by row.

    row, column, document, token: Of each, [n] int64; `column` is its position in the row, `token` its id.
    shape: Rows, and tokens in the longest.
    documents: In the data set, those without a real token included.
    digest: Hash of the rows.
    """

    row: Tensor
    column: Tensor
    document: Tensor
    token: Tensor
    shape: tuple[int, int]
    documents: int
    digest: str

    def __len__(self) -> int:
        return len(self.row)

    def gather(self, values: Tensor) -> Tensor:
        """[rows, length] → [n]."""
        return values[self.row, self.column]

    def scatter(self, values: Tensor) -> Tensor:
        """[n] → [rows, length], 0 elsewhere."""
        grid = torch.zeros(self.shape, dtype=values.dtype)
        grid[self.row, self.column] = values
        return grid

    def outside(self, values: Tensor) -> int:
        """Places of [rows, length] that are no real token and hold anything but 0."""
        real = torch.zeros(self.shape, dtype=torch.bool)
        real[self.row, self.column] = True
        return int(((values != 0) & ~real).sum())

    def present(self) -> Tensor:
        """Ids of the documents that have a real token, ascending, [d] int64."""
        return torch.unique(self.document)

    def per_document(self, values: Tensor) -> Tensor:
        """Sums by document of [n], for those of `present`, [d]."""
        totals = torch.zeros(self.documents, dtype=values.dtype).index_add_(0, self.document, values)
        return totals[self.present()]

    def at_tokens(self, values: Tensor) -> Tensor:
        """Each token's document's value, [n], of values for those of `present`, [d]."""
        rank = torch.zeros(self.documents, dtype=torch.int64)
        present = self.present()
        rank[present] = torch.arange(len(present))
        return values[rank[self.document]]


def places_of(rows: Rows) -> Places:
    """The real tokens of the rows."""
    masks = [np.asarray(mask) for mask in rows.target_mask]
    columns = [np.flatnonzero(mask) for mask in masks]
    flat = (
        np.repeat(np.arange(len(rows)), [len(targets) for targets in columns]),
        np.concatenate(columns),
        np.concatenate([np.asarray(ids)[targets] for ids, targets in zip(rows.doc_ids, columns)]),
        np.concatenate([np.asarray(ids)[targets] for ids, targets in zip(rows.input_ids, columns)]),
    )
    row, column, document, token = (torch.from_numpy(array.astype(np.int64)) for array in flat)
    return Places(row, column, document, token, (len(rows), rows.max_length), rows.documents, rows.digest()[:16])
