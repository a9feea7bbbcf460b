"""Documents as rows of tokens, with the document of every target.

Token k of a row is a valid target when a token of the same document stands before it in the row and the data set
supervises it. Everything is aligned with targets: `target_mask[k]` and `doc_ids[k]` speak of predicting token k, so
column 0 is never a target and a packed document's first token is never charged to its predecessor.

Rows are one document each, or chunks of fixed length in which documents follow each other (packed). A packed row is
meant for attention masked at document boundaries, with positions restarting there: see `pad`.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from retrograd.data.readers import Reader, Tokens, reader

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["Rows", "build_rows", "pad"]

_BATCH = 1000  # documents tokenised in one call


@dataclass(frozen=True, eq=False)
class Rows:
    """Token rows of different lengths T_r; row r is `input_ids[r]`.

    Args:
        input_ids: Tokens of each row, [T_r], int64.
        target_mask: Whether token k is a valid target, [T_r], bool.
        doc_ids: Document of token k, its position in the data set, [T_r], int64.
        documents: Documents in the data set, skipped ones included.
        skipped: Reason for each document that has no row.
        truncated: Documents cut by max_length.
        packed: Whether rows are chunks of several documents.
        skipped_chunks: Chunks left out because no token in them is a valid target.
    """

    input_ids: list[np.ndarray]
    target_mask: list[np.ndarray]
    doc_ids: list[np.ndarray]
    documents: int
    skipped: dict[int, str]
    truncated: int = 0
    packed: bool = False
    skipped_chunks: int = 0

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens in each row, [rows], int64."""
        return np.array([len(ids) for ids in self.input_ids], dtype=np.int64)

    @property
    def max_length(self) -> int:
        """Tokens in the longest row."""
        return int(self.lengths.max(initial=0))

    @property
    def targets(self) -> int:
        """Valid targets in all rows."""
        return sum(int(mask.sum()) for mask in self.target_mask)

    def digest(self) -> str:
        """Hash of the tokens, masks, documents and row boundaries; the same in every process and on every machine."""
        total = hashlib.sha256(f"rows 1 {self.packed} {self.documents} {len(self)}".encode())
        total.update(self.lengths.astype("<i8").tobytes())
        for ids, mask, documents in zip(self.input_ids, self.target_mask, self.doc_ids, strict=True):
            total.update(ids.astype("<i8").tobytes() + mask.astype("?").tobytes() + documents.astype("<i8").tobytes())
        return total.hexdigest()


def build_rows(
    documents: Dataset,
    tokenizer: Any | None,
    *,
    text_column: str | None = None,
    max_length: int | None = None,
    chunk_length: int | None = None,
    min_chars: int = 0,
    assistant_only_loss: bool = False,
    vocab_size: int | None = None,
) -> Rows:
    """Token rows of a data set; a document's id is its position there, whatever is skipped.

    The columns decide how a document is read, the first of these that exist:

    - `text_column`, if given: plain text, with the tokenizer's default special tokens and no EOS added. A text that
      begins or ends with those itself gets no second ones.
    - `input_ids`: tokens; `labels`, if there, is -100 at unsupervised tokens and equals `input_ids` elsewhere.
    - `messages` or `conversations`: a chat, through the tokenizer's chat template, with the row's `tools`; every token
      is a target, or what the assistant says alone (see `chats`). `from` and `value` are read as `role` and `content`.
    - `prompt` and `completion`: texts, tokenised as one, EOS last; only the completion is a target, from the first
      token that holds a character of it (see `tokens`). Or messages both: a chat of which the completion is a target.
    - `text`: plain text.

    Args:
        documents: The data set, from `load_documents` for instance.
        tokenizer: A transformers tokenizer. None is enough for `input_ids` without packing.
        text_column: Column of plain text to read instead.
        max_length: Cut documents to this many tokens, from the right.
        chunk_length: Pack instead: documents, each ended by EOS, joined in order and cut every `chunk_length` tokens.
        min_chars: Skip documents with fewer characters than this (prompt and completion together); chats are not
            counted.
        assistant_only_loss: Of a chat, only what the assistant says is a target.
        vocab_size: Rows of the model's embedding; token ids must be below.
    Raises:
        ValueError: If columns, tokenizer, lengths or tokens do not fit, or no document has a valid target.

    Example:
        >>> import datasets
        >>> rows = build_rows(datasets.Dataset.from_dict({"input_ids": [[5, 6, 7], [8], [9, 4]]}), None)
        >>> rows.input_ids[1].tolist(), rows.doc_ids[1].tolist(), rows.skipped
        ([9, 4], [2, 2], {1: 'one token'})
    """
    _check_lengths(max_length, chunk_length)
    columns, read = reader(documents.column_names, tokenizer, text_column, min_chars, assistant_only_loss)
    eos = None if chunk_length is None else _eos(tokenizer)
    kept: dict[int, Tokens] = {}
    skipped: dict[int, str] = {}
    truncated = 0
    for document, tokens in enumerate(_read(documents, columns, read)):
        result = tokens if isinstance(tokens, str) else _finish(tokens, document, eos, max_length, vocab_size)
        if isinstance(result, str):
            skipped[document] = result
        else:
            kept[document] = result
        truncated += not isinstance(tokens, str) and max_length is not None and len(tokens.ids) > max_length
    parts = _rows(kept) if chunk_length is None else _chunks(kept, chunk_length)
    rows = Rows(*parts[:3], len(documents), skipped, truncated, chunk_length is not None, parts[3])
    if not len(rows):
        reasons = (
            ", ".join(f"{reason}: {count}" for reason, count in Counter(skipped.values()).items()) or "none skipped"
        )
        raise ValueError(
            f"no valid target in any of {len(documents)} documents ({reasons}; chunks without a target: "
            f"{rows.skipped_chunks}). Targets need a token of their document before them; check column and lengths."
        )
    return rows


def pad(rows: Rows, index: Sequence[int] | np.ndarray, pad_id: int = 0) -> dict[str, Tensor]:
    """Batch of rows, padded on the right to the longest of them, L.

    Args:
        rows: The rows.
        index: Which of them, [B].
        pad_id: Token id of the padding; no valid target, so its value reaches no loss.
    Returns:
        `input_ids`, `doc_ids` [B, L] int64 (padding belongs to the last token's document), `target_mask` [B, L] bool,
        `lengths` [B] int64. For packed rows also `position_ids` [B, L] int64, from 0 in each document (padding: 0), and
        `segment_ids` [B, L] int64, 0, 1, 2 … for the documents of the row (padding: -1).
    """
    lengths = np.array([len(rows.input_ids[row]) for row in index], dtype=np.int64)
    shape = (len(lengths), int(lengths.max(initial=0)))
    batch = {
        "input_ids": np.full(shape, pad_id, dtype=np.int64),
        "target_mask": np.zeros(shape, dtype=bool),
        "doc_ids": np.zeros(shape, dtype=np.int64),
    }
    if rows.packed:
        batch["position_ids"] = np.zeros(shape, dtype=np.int64)
        batch["segment_ids"] = np.full(shape, -1, dtype=np.int64)
    for place, (row, length) in enumerate(zip(index, lengths, strict=True)):
        batch["input_ids"][place, :length] = rows.input_ids[row]
        batch["target_mask"][place, :length] = rows.target_mask[row]
        batch["doc_ids"][place] = rows.doc_ids[row][-1]
        batch["doc_ids"][place, :length] = rows.doc_ids[row]
        if rows.packed:
            first = _first_tokens(rows.doc_ids[row])
            batch["segment_ids"][place, :length] = segments = np.cumsum(first) - 1
            batch["position_ids"][place, :length] = np.arange(length) - np.flatnonzero(first)[segments]
    return {name: torch.from_numpy(values) for name, values in {**batch, "lengths": lengths}.items()}


def _check_lengths(max_length: int | None, chunk_length: int | None) -> None:
    for name, length in (("max_length", max_length), ("chunk_length", chunk_length)):
        if length is not None and length < 2:
            raise ValueError(f"{name} is {length}; a row needs at least 2 tokens to hold a target and its context")
    if max_length is not None and chunk_length is not None:
        raise ValueError(
            f"max_length={max_length} and chunk_length={chunk_length}: one cuts documents, the other packs them whole; "
            "give one of them"
        )


def _eos(tokenizer: Any | None) -> int:
    if tokenizer is None:
        raise ValueError(
            "chunk_length packs documents, each ended by EOS, and there is no tokenizer to say which: give one"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError("chunk_length packs documents, each ended by EOS, and the tokenizer has no eos_token: set it")
    return int(tokenizer.eos_token_id)


def _finish(
    tokens: Tokens, document: int, eos: int | None, max_length: int | None, vocab_size: int | None
) -> Tokens | str:
    """The document as it goes into rows, or why it cannot."""
    ids, supervised = tokens
    if len(ids) == 0:
        return "blank"
    if not supervised.any():
        return "masked"
    if eos is not None and ids[-1] != eos:
        ids, supervised = np.append(ids, eos), np.append(supervised, True)
    bad = ids[(ids < 0) | (ids >= (np.inf if vocab_size is None else vocab_size))]
    if len(bad):
        size = "the vocabulary" if vocab_size is None else f"the vocabulary of {vocab_size}"
        raise ValueError(
            f"document {document} has token id {bad[0]}, outside {size}: data set, tokenizer and model do not match"
        )
    ids, supervised = ids[:max_length], supervised[:max_length]
    if len(ids) == 1:
        return "one token"
    return Tokens(ids, supervised) if supervised[1:].any() else "masked"


def _first_tokens(doc_ids: np.ndarray) -> np.ndarray:
    """Where a document starts, [T], bool."""
    return np.diff(doc_ids, prepend=-1) != 0


_Parts = tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray], int]


def _rows(kept: dict[int, Tokens]) -> _Parts:
    masks = [tokens.supervised for tokens in kept.values()]
    for mask in masks:
        mask[0] = False
    doc_ids = [np.full(len(tokens.ids), document, dtype=np.int64) for document, tokens in kept.items()]
    return [tokens.ids for tokens in kept.values()], masks, doc_ids, 0


def _chunks(kept: dict[int, Tokens], chunk_length: int) -> _Parts:
    if not kept:
        return [], [], [], 0
    ids = np.concatenate([tokens.ids for tokens in kept.values()])
    mask = np.concatenate([tokens.supervised for tokens in kept.values()])
    doc_ids = np.repeat(np.array(list(kept), dtype=np.int64), [len(tokens.ids) for tokens in kept.values()])
    mask[_first_tokens(doc_ids)] = False
    mask[::chunk_length] = False  # the rest of a document finds no context in the next chunk
    cuts = [slice(start, start + chunk_length) for start in range(0, len(ids), chunk_length)]
    used = [cut for cut in cuts if mask[cut].any()]
    return (
        [ids[cut] for cut in used],
        [mask[cut] for cut in used],
        [doc_ids[cut] for cut in used],
        len(cuts) - len(used),
    )


def _read(documents: Dataset, columns: list[str], read: Reader) -> Iterator[Tokens | str]:
    first = 0
    for batch in documents.with_format(None).select_columns(columns).iter(batch_size=_BATCH):
        values = [batch[column] for column in columns]
        yield from read(values, first)
        first += len(values[0])
