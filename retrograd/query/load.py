"""Data sources of a configuration as a model reads them: token rows with excerpts of their documents, and questions."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from retrograd.data.chats import as_messages
from retrograd.data.documents import EXCERPT, documents_of
from retrograd.data.readers import columns_shown
from retrograd.data.rows import Rows, build_rows
from retrograd.lm.model import CausalLM
from retrograd.lm.spans import text_config
from retrograd.query.aliases import aliased
from retrograd.query.questions import Questions, build_questions
from retrograd.settings.question import Question, Source
from retrograd.settings.tasks import Task

__all__ = ["context_length", "load_choices", "load_rows"]


def load_rows(
    source: Source, tokenizer: Any, model: CausalLM, flag: str | None, *, chunk_length: int | None = None,
    min_chars: int = 0,
) -> tuple[Rows, list[str]]:  # fmt: skip
    """Token rows of a data set, and an excerpt of each document.

    Args:
        flag: What precedes the settings' names on the command line, for messages; None where there is no flag.
    Raises:
        ValueError: If the data set cannot be loaded, or does not fit the tokenizer or the model.
    """
    documents = documents_of(source)
    settings, longest = context_length(model, source.max_length or chunk_length, flag)
    longest = None if chunk_length else longest
    try:
        rows = build_rows(
            documents, tokenizer, text_column=source.text_column, max_length=longest, chunk_length=chunk_length,
            min_chars=min_chars, assistant_only_loss=source.assistant_only_loss, vocab_size=settings.vocab_size,
        )  # fmt: skip
    except ValueError as error:
        raise ValueError(f"{_named(source, flag)}: {error}") from error
    if rows.truncated and getattr(source, "form", "text") != "generate":
        warnings.warn(
            f"{_named(source, flag)}: {rows.truncated} of {rows.documents} documents were cut to {longest} tokens; "
            "what is behind has no part in the result",
            stacklevel=2,
        )
    return rows, _excerpts(documents, source.text_column, tokenizer)


def load_choices(question: Question, tokenizer: Any, model: CausalLM, flag: str | None) -> Questions:
    """Multiple-choice questions of a data set; arguments and errors as `load_rows`."""
    documents = documents_of(question)
    if isinstance(question, Task) and question.alias:
        documents = aliased(documents, Path(question.alias))
    settings, longest = context_length(model, question.max_length, flag)
    try:
        return build_questions(
            documents, tokenizer, form=question.form, template=question.template, max_length=longest,
            vocab_size=settings.vocab_size,
        )  # fmt: skip
    except ValueError as error:
        raise ValueError(f"{_named(question, flag)}: {error}") from error


def context_length(model: CausalLM, asked: int | None, flag: str | None) -> tuple[Any, int | None]:
    """The language model's settings, and how many tokens a row may have: as asked for, else what the model can read.

    Raises:
        ValueError: If more was asked for than the model can read.
    """
    settings = text_config(model.module)
    context = getattr(settings, "max_position_embeddings", None)
    if context and (asked or 0) > context:
        raise ValueError(f"--{flag or 'max_length'}: rows of {asked} tokens exceed the model's context of {context}")
    return settings, asked or context


def _named(source: Source, flag: str | None) -> str:
    return f"--{flag}.dataset {source.dataset}" if flag else str(source.dataset)


def _excerpts(documents: Any, column: str | None, tokenizer: Any) -> list[str]:
    rows = zip(*(documents[name] for name in columns_shown(documents.column_names, column)))
    return [_excerpt(row, tokenizer) for row in rows]


def _excerpt(values: tuple[Any, ...], tokenizer: Any) -> str:
    parts = []
    for value in values:
        if isinstance(value, list) and value and isinstance(value[0], dict):
            turns = as_messages(value, 0)
            parts.append(" ".join(f"{turn.get('role')}: {turn.get('content')}" for turn in turns))
        elif isinstance(value, list):
            parts.append(tokenizer.decode(value[:EXCERPT]))
        else:
            parts.append(str(value or ""))
    text = " ".join(" ".join(parts).split())
    return text if len(text) <= EXCERPT else text[: EXCERPT - 1] + "…"
