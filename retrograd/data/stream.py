"""DataStream: step → batch, a pure function, with one data weight per example or per token.

Epoch e visits the rows in the order `numpy.random.default_rng(seed + e).permutation(N)`, which is what
`datasets.Dataset.shuffle(seed + e)` gives; unshuffled, in file order. The last batch of an epoch is simply shorter.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retrograd.core import tree
from retrograd.core.step import Batch
from retrograd.data.rows import Rows, build_rows, pad

__all__ = ["DataStream", "token_rows"]


class DataStream:
    """Batches of rows as a function of the step.

    Args:
        rows: A Hugging Face data set (of `text` or `input_ids`, among others: `rows.build_rows`), token rows (`Rows`,
            or lists of token ids), or a pytree of tensors that share their first dimension N.
        tokenizer: Of a data set of texts. A whole number in this place is the batch size.
        batch_size: Rows in a batch; the last batch of an epoch may be shorter.
        epochs: Passes over the data.
        shuffle: Visit rows in a new random order each epoch, or in file order.
        seed: Of that order.
        weight_shape: (documents,), the default: one weight per example; or one per token: (documents or rows, L), with
            L at least the longest row. A data set's documents are cut to L tokens.
        weights: Data weights of that shape, ones if not given.
        max_length: Cut a data set's documents to this many tokens.
        text_column: A data set's column of text; found by itself when None.
        dtype: Of the weights and of the loss coefficients; when None that of the weights given, else float32, and a
            `Trainer` takes its model's precision.
        device: Where batches go.
        steps: Stop after so many, within a pass too; all of the passes when None.
    Raises:
        ValueError: If a size is below 1, there are not so many steps, the shape does not fit, a weight is not finite,
            there is no row, the data set cannot be read, or the device cannot be used.

    >>> stream = DataStream({"x": torch.zeros(5, 2)}, batch_size=2)
    >>> len(stream), stream.weights.shape, [len(stream[t].index) for t in range(3)]
    (3, torch.Size([5]), [2, 2, 1])
    """

    def __init__(
        self,
        rows: Any,
        tokenizer: Any = None,
        batch_size: int | None = None,
        *,
        epochs: int = 1,
        shuffle: bool = True,
        seed: int = 0,
        weight_shape: Sequence[int] | None = None,
        weights: Tensor | None = None,
        max_length: int | None = None,
        text_column: str | None = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        steps: int | None = None,
    ) -> None:
        if isinstance(tokenizer, int):
            if batch_size is not None:
                raise ValueError(f"{tokenizer} stands where the tokenizer does, and batch_size is {batch_size}")
            tokenizer, batch_size = None, tokenizer
        if batch_size is None:
            raise ValueError("give batch_size, the rows of a step")
        for name, number in (("batch_size", batch_size), ("epochs", epochs)):
            if number < 1:
                raise ValueError(f"{name} is {number}; it has to be at least 1")
        width = weight_shape[1] if weight_shape is not None and len(weight_shape) == 2 else None
        self.rows = _read(rows, tokenizer, text_column, max_length, width)
        self.size = len(self.rows) if isinstance(self.rows, Rows) else _common_length(self.rows)
        self.batch_size, self.epochs, self.shuffle, self.seed = batch_size, epochs, shuffle, seed
        whole = epochs * self.steps_per_epoch
        if steps is not None and not 1 <= steps <= whole:
            raise ValueError(f"{steps} steps of the {whole} that {epochs} passes over {self.size} rows make")
        self.steps = whole if steps is None else steps
        self._settled = dtype is not None
        self.dtype = dtype or torch.promote_types(torch.float32 if weights is None else weights.dtype, torch.float32)
        self.device = _usable(device)
        self.weights = self._weights(weight_shape, weights)
        self.per_token = self.weights.ndim == 2
        self._order = lru_cache(maxsize=2)(self._permutation)

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.size // self.batch_size)

    def in_precision(self, dtype: torch.dtype) -> DataStream:
        """This stream with weights and coefficients as a model of `dtype` needs them, unless they were settled.

        float64 for float64, or the factors 1/Z would bring rounding of their own; float32 for all else.
        """
        wanted = torch.promote_types(dtype, torch.float32)
        if self._settled or wanted == self.dtype:
            return self
        other = copy.copy(self)
        other.dtype, other.weights = wanted, self.weights.to(wanted)
        return other

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Batch:
        if not 0 <= step < len(self):
            raise IndexError(f"step {step} is outside this stream of {len(self)} steps")
        chosen = self.rows_at(step)
        batch = self._tokens(chosen) if isinstance(self.rows, Rows) else self._tensors(chosen)
        return tree.map(lambda x: x.to(self.device), batch)

    def rows_at(self, step: int) -> np.ndarray:
        """The rows that step `step` trains on, [B] int64."""
        epoch, within = divmod(step, self.steps_per_epoch)
        return self._order(epoch)[within * self.batch_size : (within + 1) * self.batch_size]

    def steps_of_rows(self) -> list[list[int]]:
        """The steps at which each row is trained on, in order: one in each epoch, unless the stream stops before."""
        steps: list[list[int]] = [[] for _ in range(self.size)]
        for t in range(len(self)):
            for row in self.rows_at(t).tolist():
                steps[row].append(t)
        return steps

    def _permutation(self, epoch: int) -> np.ndarray:
        return np.random.default_rng(self.seed + epoch).permutation(self.size) if self.shuffle else np.arange(self.size)

    def _tokens(self, chosen: np.ndarray) -> Batch:
        inputs = pad(self.rows, chosen)
        mask, lengths = inputs["target_mask"], inputs["lengths"]
        documents = inputs.pop("doc_ids")
        if self.per_token:
            lines = torch.from_numpy(chosen) if len(self.weights) == self.size else documents[:, 0]
            index = lines[:, None] * self.weights.shape[1] + torch.arange(mask.shape[1])
        else:
            index = documents
        assert len(lengths) == len(index), "one length for each row"
        return Batch(inputs, index, mask.to(self.dtype) / mask.sum())

    def _tensors(self, chosen: np.ndarray) -> Batch:
        rows = torch.from_numpy(chosen)
        index = rows
        if self.per_token:
            width = self.weights.shape[1]
            index = rows[:, None] * width + torch.arange(width)
        scale = torch.full(index.shape, 1 / index.numel(), dtype=self.dtype)
        return Batch(tree.map(lambda x: x[rows.to(x.device)], self.rows), index, scale)

    def _weights(self, shape: Sequence[int] | None, weights: Tensor | None) -> Tensor:
        examples, lines, longest = (self.size,), {self.size}, 1
        if isinstance(self.rows, Rows):
            examples, longest = (self.rows.documents,), self.rows.max_length
            lines = {self.size} if self.rows.packed else {self.size, self.rows.documents}
        wanted = tuple(shape) if shape is not None else tuple(weights.shape) if weights is not None else examples
        fits = wanted == examples or (len(wanted) == 2 and wanted[0] in lines and wanted[1] >= longest)
        if not fits or (weights is not None and tuple(weights.shape) != wanted):
            given = tuple(weights.shape) if weights is not None else wanted
            raise ValueError(
                f"weights of shape {given} do not fit: one per example is {examples}, one per token "
                f"({' or '.join(map(str, sorted(lines)))}, L) with L at least {longest}, the longest row"
            )
        if weights is None:
            return torch.ones(wanted, dtype=self.dtype, device=self.device)
        if not torch.isfinite(weights).all():
            bad = (~torch.isfinite(weights)).nonzero()[0].tolist()
            raise ValueError(
                f"{int((~torch.isfinite(weights)).sum())} of {weights.numel()} data weights are NaN or infinite, the "
                f"first at {bad}; give finite weights, 0 to leave an example out"
            )
        return weights.to(self.device, self.dtype)


def _read(rows: Any, tokenizer: Any, text_column: str | None, max_length: int | None, width: int | None) -> Any:
    """Rows of whatever was given; documents are cut to the width of the weights, if they have one."""
    columns = getattr(rows, "column_names", None)
    if columns is None:
        given = {"tokenizer": tokenizer, "text_column": text_column, "max_length": max_length}
        unread = [name for name, value in given.items() if value is not None]
        if unread:
            raise ValueError(f"{', '.join(unread)}: for a Hugging Face data set; {type(rows).__name__} is not one")
        return token_rows(rows) if isinstance(rows, list) else rows
    if isinstance(columns, dict):
        raise ValueError(
            f"the data set has the splits {', '.join(columns)}; give one, such as dataset[{next(iter(columns))!r}]"
        )
    if not hasattr(rows, "__len__"):
        raise ValueError(
            f"{type(rows).__name__} has no length, and a step's rows have to be found again on the way back: load the "
            "data set without streaming, or take what you need of it into a Dataset"
        )
    return build_rows(rows, tokenizer, text_column=text_column, max_length=max_length or width)


def _usable(device: str | torch.device) -> torch.device:
    try:
        torch.zeros((), device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device} cannot be used here: {str(error).splitlines()[0]}") from error
    return torch.device(device)


def token_rows(ids: list[Any]) -> Rows:
    """Rows from lists of token ids, one document each; every token but a row's first is a target.

    Raises:
        ValueError: If a row is text, or has fewer than two tokens.
    """
    if any(isinstance(row, str) for row in ids):
        raise ValueError(
            "the rows are texts; give token ids, or a data set with its tokenizer: "
            'DataStream(datasets.Dataset.from_dict({"text": texts}), tokenizer, batch_size=4)'
        )
    arrays = [np.asarray(row, dtype=np.int64) for row in ids]
    for number, row in enumerate(arrays):
        if row.ndim != 1 or len(row) < 2:
            raise ValueError(f"row {number} has {row.size} tokens and so no target; leave it out")
    masks = [np.arange(len(row)) > 0 for row in arrays]
    documents = [np.full(len(row), number, dtype=np.int64) for number, row in enumerate(arrays)]
    return Rows(arrays, masks, documents, len(arrays), {})


def _common_length(tensors: Any) -> int:
    lengths = {len(x) for x in tree.leaves(tensors)}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(
            f"a stream needs tensors of one common length, at least 1; their lengths are {sorted(lengths)}"
        )
    return lengths.pop()
