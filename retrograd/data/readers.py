"""Columns of a data set as tokens: which columns are read, and how.

`build_rows` says what each kind of column means; here a batch of values becomes documents of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from retrograd.data.chats import Chat, as_messages, read_chats, tools_of
from retrograd.data.tokens import encode, encode_pairs, without_doubles

__all__ = ["READ", "Reader", "Tokens", "columns_read", "columns_shown", "reader"]

READ = ("input_ids", "labels", "attention_mask", "messages", "conversations", "prompt", "completion", "tools", "text")
"""Columns that are read by name."""

_IGNORED = -100  # label of an unsupervised token, by the convention of transformers


class Tokens(NamedTuple):
    """One document."""

    ids: np.ndarray  # [n] int64
    supervised: np.ndarray  # [n] bool


Reader = Callable[[list[list[Any]], int], list["Tokens | str"]]
"""The chosen columns' values in a batch, and the first document's id → each document, or why it is skipped."""


def columns_read(columns: Sequence[str], text_column: str | None = None) -> list[str]:
    """The columns that documents are read from, of those that a data set has.

    Raises:
        ValueError: If there is none.
    """
    if text_column is not None:
        if text_column not in columns:
            raise ValueError(f"no column {text_column!r}; the data set has {', '.join(columns)}")
        return [text_column]
    for needed, more in _KINDS:
        if set(needed) <= set(columns):
            return [*needed, *(name for name in more if name in columns)]
    raise ValueError(
        f"no column to read among {', '.join(columns)}; the data set needs input_ids, messages (or conversations), "
        "prompt and completion, or text. Name another column of text with text_column, or say which column is what, "
        "as in --data.columns prompt=question completion=answer."
    )


def columns_shown(columns: Sequence[str], text_column: str | None = None) -> list[str]:
    """The columns that an excerpt of a document is made of: texts before tokens."""
    if text_column is not None:
        return [text_column]
    return next(list(needed) for needed, _ in (*_KINDS[1:], _KINDS[0]) if set(needed) <= set(columns))


_KINDS = (
    (("input_ids",), ("labels", "attention_mask")),
    (("messages",), ("tools",)),
    (("conversations",), ("tools",)),
    (("prompt", "completion"), ("tools",)),
    (("text",), ()),
)


def reader(
    columns: Sequence[str], tokenizer: Any | None, text_column: str | None, min_chars: int, assistant_only: bool
) -> tuple[list[str], Reader]:
    """The columns to read, and how.

    Raises:
        ValueError: If no column can be read, or not with this tokenizer, or not as asked.
    """
    used = columns_read(columns, text_column)
    kind = "text" if text_column is not None else used[0]
    if assistant_only and kind not in ("messages", "conversations", "prompt"):
        raise ValueError(
            f"assistant_only_loss is for chats (messages, conversations, prompt and completion), and column "
            f"{used[0]!r} is read here: leave it out, or say with columns which one holds the chats"
        )
    if kind == "input_ids":
        return used, partial(_read_tokens, used)
    if tokenizer is None:
        raise ValueError(f"column {used[0]!r} needs a tokenizer; only input_ids can do without")
    if kind in ("messages", "conversations"):
        check_template(tokenizer, f"the data set has {kind}")
        return used, partial(_read_chats, tokenizer, assistant_only)
    if kind == "prompt":
        return used, partial(_read_completions, tokenizer, min_chars, assistant_only)
    return used, partial(_read_texts, tokenizer, min_chars)


def check_template(tokenizer: Any, what: str) -> None:
    """Refuse a tokenizer that cannot write chats."""
    if not tokenizer.chat_template:
        raise ValueError(
            f"{what} and the tokenizer has no chat_template: set one, take the tokenizer of an instruction-tuned "
            "model, or name a column of text with text_column"
        )


def _read_tokens(names: list[str], values: list[list[Any]], first: int) -> list[Tokens | str]:
    return [_pretokenised(dict(zip(names, row)), document) for document, row in enumerate(zip(*values), start=first)]


def _pretokenised(fields: dict[str, Any], document: int) -> Tokens | str:
    if fields["input_ids"] in (None, []):
        return "blank"
    ids = np.asarray(fields["input_ids"])
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ValueError(
            f"document {document}: input_ids must be a list of integers, not {str(fields['input_ids'])[:60]}"
        )
    if 0 in (fields.get("attention_mask") or ()):
        raise ValueError(
            f"document {document}: attention_mask hides some of its tokens, and padding would be trained on like text. "
            "Store documents without padding, or drop the column if they have none."
        )
    labels = np.asarray(fields.get("labels", ids))
    if labels.shape != ids.shape:
        raise ValueError(f"document {document}: labels of shape {labels.shape} for input_ids of shape {ids.shape}")
    supervised = labels != _IGNORED
    wrong = np.flatnonzero(supervised & (labels != ids))
    if len(wrong):
        k = wrong[0]
        raise ValueError(
            f"document {document}: label {labels[k]} at token {k}, where input_ids has {ids[k]}. Labels are {_IGNORED} "
            "or the token itself, unshifted: position k is the target k."
        )
    return Tokens(ids.astype(np.int64), supervised)


def _read_texts(tokenizer: Any, min_chars: int, values: list[list[Any]], first: int) -> list[Tokens | str]:
    reasons = [_text_reason([text], document, min_chars) for document, text in enumerate(values[0], start=first)]
    texts = [text for text, reason in zip(values[0], reasons) if reason is None]
    return _fill(reasons, (_tokens(without_doubles(text).ids) for text in encode(tokenizer, texts)))


def _read_completions(
    tokenizer: Any, min_chars: int, assistant_only: bool, values: list[list[Any]], first: int
) -> list[Tokens | str]:
    pairs = list(zip(values[0], values[1]))
    if any(isinstance(prompt, list) and isinstance(end, list) for prompt, end in pairs):
        check_template(tokenizer, "prompt and completion hold messages")
        return _read_chat_completions(tokenizer, assistant_only, values, first)
    if assistant_only:
        raise ValueError(
            "assistant_only_loss is for chats, and prompt and completion hold texts, of which the completion alone is "
            "a target: leave it out"
        )
    reasons = [_text_reason([prompt or "", end], first + i, min_chars) for i, (prompt, end) in enumerate(pairs)]
    good = [(prompt or "", completion) for (prompt, completion), reason in zip(pairs, reasons) if reason is None]
    eos = tokenizer.eos_token_id
    pairs_of_tokens = encode_pairs(tokenizer, good)
    ended = ((ids if eos is None or ids[-1:] == [eos] else [*ids, eos], first) for (ids, *_), first in pairs_of_tokens)
    return _fill(reasons, (_tokens(ids, first) for ids, first in ended))


def _read_chat_completions(
    tokenizer: Any, assistant_only: bool, values: list[list[Any]], first: int
) -> list[Tokens | str]:
    chats = []
    for document, (prompt, completion, *tools) in enumerate(zip(*values), start=first):
        asked = as_messages(prompt or [], document)
        said = as_messages(completion or [], document)
        chats.append(Chat(document, [*asked, *said] if said else [], len(asked), tools_of([*tools, None][0], document)))
    return _chats(tokenizer, assistant_only, chats)


def _read_chats(tokenizer: Any, assistant_only: bool, values: list[list[Any]], first: int) -> list[Tokens | str]:
    chats = []
    for document, (messages, *tools) in enumerate(zip(*values), start=first):
        turns = as_messages(messages or [], document)
        chats.append(Chat(document, turns, 0, tools_of([*tools, None][0], document)))
    return _chats(tokenizer, assistant_only, chats)


def _chats(tokenizer: Any, assistant_only: bool, chats: list[Chat]) -> list[Tokens | str]:
    reasons = [None if chat.messages else "blank" for chat in chats]
    read = read_chats(tokenizer, [chat for chat in chats if chat.messages], assistant_only)
    return _fill(reasons, (Tokens(np.array(ids, np.int64), np.array(held, bool)) for ids, held in read))


def _text_reason(texts: list[Any], document: int, min_chars: int) -> str | None:
    """Why a document is skipped; its last text is what is trained on."""
    for text in texts:
        if text is not None and not isinstance(text, str):
            raise ValueError(
                f"document {document} is {type(text).__name__} {str(text)[:60]!r}, not text: name a text column"
            )
    if texts[-1] is None or not texts[-1].strip():
        return "blank"
    return f"shorter than min_chars={min_chars}" if sum(map(len, texts)) < min_chars else None


def _tokens(ids: list[int], unsupervised: int = 0) -> Tokens:
    return Tokens(np.array(ids, dtype=np.int64), np.arange(len(ids)) >= unsupervised)


def _fill(reasons: list[str | None], tokens: Iterator[Tokens]) -> list[Tokens | str]:
    """Documents in their places: the next tokens where there is no reason to skip."""
    return [next(tokens) if reason is None else reason for reason in reasons]
