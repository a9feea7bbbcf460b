"""PairStream: forget and retain rows under one tensor of data weights, step → batch, a pure function.

    weights [N_forget + N_retain (+ N_alternatives), L]        one row for each row, in this order

or, with `per_token=False`, [documents] of all sides: one that multiplies the weights of all tokens of a document.

A step trains on b_f forget and b_r retain rows, each side with its own normaliser: `scale` is mask/Z_f on forget rows
and mask/Z_r on retain rows, Z the valid targets of that side in the whole batch. So Σ w·scale·loss is the sum of two
token means, whatever micro-batches do.

Each side is visited pass after pass without end, pass j in the order of `numpy.random.default_rng(seed + j)`'s
permutation (unshuffled: as given), and every batch is whole. The side that needs more batches sets the length; the
shorter one starts over. Where the length does not divide, the last batch takes its last rows from one more pass.

Rows of a batch lie in units of b_f/g forget, b_r/g retain and b_f/g alternative rows, g = gcd(b_f, b_r), so that a
micro-batch, which is a slice of rows, holds whole units where its size is a multiple of one: see `unit`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from retrograd.core import tree
from retrograd.core.step import Batch
from retrograd.data.rows import Rows, pad
from retrograd.data.stream import DataStream, token_rows

__all__ = ["ALTERNATIVE", "FORGET", "RETAIN", "PairStream", "Part", "joined", "parts_of"]

FORGET, RETAIN, ALTERNATIVE = 0, 1, 2
_NAMES = ("forget", "retain", "alternative")


class PairStream:
    """Batches of forget and retain rows as a function of the step.

    Besides what `rows.pad` makes, `inputs` holds for each row of a batch, [B]:

    - side: FORGET, RETAIN or ALTERNATIVE.
    - progress: p_k = min(1, k/horizon), k the optimizer step.
    - share: 1/(rows of this side in the whole batch), so that sums over micro-batches are means.
    - pair: the number of the unit this row belongs to, over the whole run: k·g + its place in the batch.

    and `scale` [B, L], as the batch has it, so that an objective can tell a weight from its normaliser.

    Args:
        forget: Rows to forget.
        retain: Rows to keep; None for methods that take none.
        alternatives: One row for each forget row, in the same order: what is to be said instead (dpo).
        forget_batch, retain_batch: b_f and b_r; b_r is ignored without retain rows.
        epochs: Passes over the longer side.
        shuffle: Visit rows in a new random order in each pass, or as given.
        order: A curriculum: every pass visits the forget rows by the mean weight of their valid targets, the heaviest
            first or last, equal ones as given. None: as `shuffle` says.
        seed: Of that order; the retain side draws from seed + 1,000,003.
        horizon: Steps until p_k is 1; those of the stream if not given.
        weights: Weights of the tokens [N, L], L at least the longest row; ones if not given.
        per_token: Whether these are the data weights. If not, data weights are ones for the documents of all sides, and
            a token is weighed by the product.
        dtype: Of the weights and of the loss coefficients.
        device: Where batches go.
    Raises:
        ValueError: If a side is empty, a size is below 1, rows are packed, alternatives do not match, or weights do not
            fit.

    >>> stream = PairStream([[1, 2, 3], [4, 5]], [[6, 7], [8, 9], [1, 3]], forget_batch=1, retain_batch=1)
    >>> len(stream), stream.weights.shape, stream[0].inputs["side"].tolist()
    (3, torch.Size([5, 3]), [0, 1])
    """

    def __init__(
        self,
        forget: Rows | list[Any],
        retain: Rows | list[Any] | None,
        alternatives: Rows | list[Any] | None = None,
        *,
        forget_batch: int,
        retain_batch: int,
        epochs: int = 1,
        shuffle: bool = True,
        order: Literal["heaviest", "lightest"] | None = None,
        seed: int = 0,
        horizon: int | None = None,
        weights: Tensor | None = None,
        per_token: bool = True,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> None:
        for name, number in (("forget_batch", forget_batch), ("retain_batch", retain_batch), ("epochs", epochs)):
            if number < 1:
                raise ValueError(f"{name} is {number}; it has to be at least 1")
        if horizon is not None and horizon < 1:
            raise ValueError(f"horizon is {horizon}; progress needs at least 1 step, or None for the whole run")
        sides = [None if side is None else _checked(side, name) for side, name in
                 zip((forget, retain, alternatives), _NAMES)]  # fmt: skip
        self.sizes = tuple(0 if side is None else len(side) for side in sides)
        if alternatives is not None and self.sizes[ALTERNATIVE] != self.sizes[FORGET]:
            raise ValueError(
                f"{self.sizes[ALTERNATIVE]} alternative rows do not pair with {self.sizes[FORGET]} forget rows: give "
                "one for each, in the same order"
            )
        self.rows = joined([side for side in sides if side is not None])
        self.batches = (forget_batch, retain_batch if retain is not None else 0, forget_batch if alternatives else 0)
        self.epochs, self.shuffle, self.seed = epochs, shuffle, seed
        self.dtype, self.device, self.per_token = dtype, device, per_token
        # columns beyond the longest row are no token's
        shape = (len(self.rows), self.rows.max_length)
        if weights is not None and weights.ndim == 2:
            shape = (int(weights.shape[0]), int(weights.shape[1]))
        checked = DataStream(
            self.rows, self.batch_size, weight_shape=shape, weights=weights, dtype=dtype, device=device
        )
        self.token_weights: Tensor = checked.weights
        examples = torch.ones(self.rows.documents, dtype=dtype, device=device)
        self.weights = self.token_weights if per_token else examples
        self.order, self._ranked = order, self._by_weight(order)
        self.horizon = len(self) if horizon is None else horizon
        self._order = lru_cache(maxsize=8)(self._permutation)

    @property
    def batch_size(self) -> int:
        """Rows of a batch, of all sides."""
        return sum(self.batches)

    @property
    def units(self) -> int:
        """Units of a batch, g = gcd(b_f, b_r)."""
        return math.gcd(*(b for b in self.batches if b))

    @property
    def unit(self) -> int:
        """Rows that belong together: micro-batches of a multiple of it take no pair apart."""
        return self.batch_size // self.units

    @property
    def offsets(self) -> tuple[int, int, int]:
        """The first row of each side among all."""
        forget, retain, _ = self.sizes
        return (0, forget, forget + retain)

    def side_weights(self, side: int) -> Tensor:
        """The tokens' weights of one side, [rows of the side, L]; scores of the same shape are cut the same way."""
        return self.token_weights[self.offsets[side] : self.offsets[side] + self.sizes[side]]

    def __len__(self) -> int:
        return max(-(-self.epochs * n // b) for n, b in zip(self.sizes, self.batches) if b)

    def __getitem__(self, step: int) -> Batch:
        if not 0 <= step < len(self):
            raise IndexError(f"step {step} is outside this stream of {len(self)} steps")
        chosen, side, pair = self._chosen(step)
        inputs = pad(self.rows, chosen)
        del inputs["lengths"]
        documents = inputs.pop("doc_ids")
        sides, mask = torch.from_numpy(side), inputs["target_mask"]
        normaliser = torch.stack([mask[sides == s].sum() for s in range(3)])[sides]  # Z of each row's side
        scale = mask.to(self.dtype) / normaliser[:, None]
        rows = torch.tensor(self.batches)[sides]
        progress = torch.full((len(chosen),), min(1.0, step / self.horizon), dtype=self.dtype)
        inputs.update(
            side=sides, progress=progress, share=1 / rows.to(self.dtype), pair=torch.from_numpy(pair), scale=scale
        )
        rows_chosen = torch.from_numpy(chosen)
        if self.per_token:
            index = rows_chosen[:, None] * self.weights.shape[1] + torch.arange(mask.shape[1])
        else:  # the tokens' own weights are constants
            index = documents
            scale = scale * self.token_weights[rows_chosen.to(self.token_weights.device), : mask.shape[1]].to(scale)
        return tree.map(lambda x: x.to(self.device), Batch(inputs, index, scale))

    def rows_at(self, step: int) -> np.ndarray:
        """The rows that step `step` trains on, numbered over all sides, [B] int64."""
        return self._chosen(step)[0]

    def steps_of_rows(self) -> list[list[int]]:
        """The steps at which each row is trained on, in order; a row of the shorter side has more of them."""
        steps: list[list[int]] = [[] for _ in range(len(self.rows))]
        for step in range(len(self)):
            for row in self.rows_at(step):
                steps[row].append(step)
        return steps

    def _chosen(self, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(rows, side, pair), [B] int64 each, in units."""
        parts = []
        for side, b in enumerate(self.batches):
            if b:
                # an alternative goes with its forget row
                source = FORGET if side == ALTERNATIVE else side
                places = np.arange(step * b, (step + 1) * b)
                local = [self._order(source, p // self.sizes[source])[p % self.sizes[source]] for p in places.tolist()]
                rows = np.array(local, dtype=np.int64) + self.offsets[side]
                parts.append((rows.reshape(self.units, -1), side))
        chosen = np.concatenate([rows for rows, _ in parts], axis=1)
        sides = np.concatenate([np.full_like(rows, side) for rows, side in parts], axis=1)
        pair = np.repeat(step * self.units + np.arange(self.units), chosen.shape[1])
        return chosen.reshape(-1), sides.reshape(-1), pair

    def _permutation(self, side: int, number: int) -> np.ndarray:
        if side == FORGET and self._ranked is not None:
            return self._ranked
        if not self.shuffle:
            return np.arange(self.sizes[side])
        return np.random.default_rng(self.seed + 1_000_003 * side + number).permutation(self.sizes[side])

    def _by_weight(self, order: str | None) -> np.ndarray | None:
        """The forget rows in the order of a curriculum."""
        if order is None:
            return None
        weights, masks = self.side_weights(FORGET).cpu(), self.rows.target_mask
        means = [float(row[: len(mask)][torch.from_numpy(mask)].mean()) for row, mask in zip(weights, masks)]
        return np.argsort(np.array(means) * (-1 if order == "heaviest" else 1), kind="stable")


class Part(NamedTuple):
    """A data set among those whose rows are joined: what it is for, and where it lies among all.

    Args:
        side: forget, retain or alternative.
        dataset: As it was given.
        first_row, rows: Its rows.
        length: Tokens of its longest row.
        first_document, documents: Its documents, skipped ones included.
        digest: Hash of its rows by themselves, 16 hex digits.
    """

    side: str
    dataset: str
    first_row: int
    rows: int
    length: int
    first_document: int
    documents: int
    digest: str


def parts_of(named: Sequence[tuple[str, str, Rows]]) -> list[Part]:
    """Where each of several data sets, (side, data set, rows), lies among the rows joined in this order."""
    parts, row, document = [], 0, 0
    for side, dataset, rows in named:
        size = (len(rows), rows.max_length)
        parts.append(Part(side, dataset, row, *size, document, rows.documents, rows.digest()[:16]))
        row, document = row + len(rows), document + rows.documents
    return parts


def joined(sides: Sequence[Rows]) -> Rows:
    """Rows one after the other; documents of a later set are numbered after those of the sets before it."""
    documents = np.cumsum([0, *(side.documents for side in sides)])
    return Rows(
        [ids for side in sides for ids in side.input_ids],
        [mask for side in sides for mask in side.target_mask],
        [ids + start for side, start in zip(sides, documents) for ids in side.doc_ids],
        int(documents[-1]),
        {document + int(start): why for side, start in zip(sides, documents) for document, why in side.skipped.items()},
        sum(side.truncated for side in sides),
    )


def _checked(rows: Rows | list[Any], name: str) -> Rows:
    if not len(rows):
        raise ValueError(f"there is no {name} row: nothing is left after selection, or the file is empty")
    rows = token_rows(rows) if isinstance(rows, list) else rows
    if rows.packed:
        raise ValueError(
            f"the {name} rows are packed; sides are counted in sequences, so give one document a row (no chunk_length)"
        )
    return rows
