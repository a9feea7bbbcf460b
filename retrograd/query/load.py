"""Data sources of a configuration: token rows, excerpts of documents, and queries with their columns."""

from __future__ import annotations

import hashlib
import inspect
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from retrograd.core.optim import Params
from retrograd.data.documents import EXCERPT, load_documents
from retrograd.data.rows import Rows, build_rows
from retrograd.lm.model import CausalLM, bound_model
from retrograd.lm.spans import text_config
from retrograd.query.answers import prove_answers
from retrograd.query.choices import (
    Questions,
    Scored,
    build_questions,
    choice_columns,
    choice_objective,
    score_questions,
)
from retrograd.query.columns import (
    Column,
    Queries,
    batch_columns,
    contrast,
    function_column,
    load_function,
    query_columns,
)
from retrograd.settings.run import QueryConfig

__all__ = ["Asked", "context_length", "load_queries", "load_rows"]


class Asked(NamedTuple):
    """A named query, loaded. record: what query.json says of it; measure: further numbers at given parameters."""

    name: str
    columns: list[Column]
    digest: str
    record: dict[str, Any]
    measure: Callable[[Params], dict[str, Any]] = lambda params: {}


def load_queries(
    configs: dict[str, QueryConfig], model: CausalLM, tokenizer: Any, *, batch_size: int, like: torch.Tensor
) -> list[Asked]:
    """Load and check named queries; contrasts after what they contrast.

    Args:
        like: A tensor of the dtype and device of the coefficients.
    """
    known: dict[str, Asked] = {}
    for name, config in configs.items():
        if config.contrast:
            continue
        if config.function:
            known[name] = _function(name, config.function, model, tokenizer, like)
        else:
            kind = _text if config.form == "text" else _choices
            known[name] = kind(name, config, model, tokenizer, batch_size, like)
    for name, config in configs.items():
        if config.contrast:
            first, second = (known[other] for other in config.contrast)
            columns = contrast(name, first.columns, second.columns)
            record = {"kind": "contrast", "of": list(config.contrast)}
            known[name] = Asked(name, columns, _hash("contrast", first.digest, second.digest), record)
    return [known[name] for name in configs]


def _text(
    name: str, config: QueryConfig, model: CausalLM, tokenizer: Any, batch_size: int, like: torch.Tensor
) -> Asked:
    rows, _ = load_rows(config, tokenizer, model, None, 0, _flag(name))
    columns = query_columns(
        model.evaluated, rows, config.reduction, name=name, batch_size=batch_size, dtype=like.dtype, device=like.device
    )
    record = {
        "kind": "text", "reduction": config.reduction, "documents": [int(d[-1]) for d in rows.doc_ids],
        "targets": rows.targets, "truncated": rows.truncated,
        "skipped": {str(document): reason for document, reason in rows.skipped.items()},
    }  # fmt: skip
    return Asked(name, columns, _hash("text", rows.digest(), config.reduction), record)


def _choices(
    name: str, config: QueryConfig, model: CausalLM, tokenizer: Any, batch_size: int, like: torch.Tensor
) -> Asked:
    prove_answers(model)
    questions = _load_questions(name, config, model, tokenizer)
    # a text answer is a row of its own for each option: no more rows at once than in a step
    size = batch_size if config.form == "letter" else max(1, batch_size // int(questions.options.max()))
    batches = choice_columns(questions, config.reduction, batch_size=size, dtype=like.dtype, device=like.device)
    targets = sum(len(batch.index) for column in batches for batch in column)
    assert targets == len(questions), f"{targets} targets for {len(questions)} questions"
    template = questions.template
    record = {
        "kind": "choices", "form": config.form, "template": template.name, "prompt": template.text,
        "loss": config.loss, "normalised": config.normalise, "reduction": config.reduction,
        "questions": len(questions), "targets": targets, "cut": questions.cut,
        "subjects": dict(Counter(subject for subject in questions.subjects if subject)),
        "prompts": _hash(*questions.hashes),
    }  # fmt: skip

    def measure(params: Params) -> dict[str, Any]:
        return _measured(score_questions(model, params, questions, size), questions)

    columns = batch_columns(choice_objective(model, config.loss, normalise=config.normalise), name, batches)
    written = (template.name, template.text, template.option)
    digest = _hash("choices", questions.digest(), config.loss, str(config.normalise), config.reduction, *written)
    return Asked(name, columns, digest, record, measure)


def _load_questions(name: str, config: QueryConfig, model: CausalLM, tokenizer: Any) -> Questions:
    assert config.dataset is not None
    documents = load_documents(config.dataset, split=config.split, subset=config.subset, limit=config.limit)
    settings, longest = context_length(model, config.max_length, _flag(name))
    try:
        return build_questions(
            documents, tokenizer, form=config.form, template=config.template, max_length=longest,
            vocab_size=settings.vocab_size,
        )  # fmt: skip
    except ValueError as error:
        raise ValueError(f"--{_flag(name)}.dataset {config.dataset}: {error}") from error


def _measured(scored: Scored, questions: Questions) -> dict[str, Any]:
    """How well the questions are answered, and each answer: paired comparisons need them."""
    letter = {} if scored.mass is None else {"mean_letter_mass": float(scored.mass.mean())}
    answers = [
        {"prompt": prompt, "right": int(gold), "chosen": int(chosen), "logprobs": logprobs[:options].tolist()}
        for prompt, gold, chosen, logprobs, options in zip(
            questions.hashes, questions.gold, scored.chosen, scored.logprobs, questions.options, strict=True
        )
    ]
    return {"accuracy": scored.accuracy, "accuracy_norm": scored.accuracy_norm, **letter, "answers": answers}


def _function(name: str, path: str, model: CausalLM, tokenizer: Any, like: torch.Tensor) -> Asked:
    function = load_function(path)
    source = _source(function) or path
    column = function_column(name, function, bound_model(model.module), tokenizer, like)
    Queries([column])(model.params)  # what is no query says so now, not after training
    return Asked(name, [column], _hash("function", path, source), {"kind": "function", "function": path})


def _source(function: Callable[..., Any]) -> str:
    """The whole file of a function, since what it calls counts too; "" for what has none, such as a partial."""
    try:
        file = inspect.getsourcefile(inspect.unwrap(function))
    except TypeError:
        return ""
    return Path(file).read_text(encoding="utf8") if file else ""


def _flag(name: str) -> str:
    return "query" if name == "query" else f"queries.{name}"


def _hash(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def load_rows(
    source: Any, tokenizer: Any, model: CausalLM, chunk_length: int | None, min_chars: int, name: str
) -> tuple[Rows, list[str]]:
    """Token rows of a data or query source, and an excerpt of each document."""
    documents = load_documents(source.dataset, split=source.split, subset=source.subset, limit=source.limit)
    settings, longest = context_length(model, source.max_length or chunk_length, name)
    longest = None if chunk_length else longest
    try:
        rows = build_rows(
            documents, tokenizer, text_column=source.text_column, max_length=longest, chunk_length=chunk_length,
            min_chars=min_chars, vocab_size=settings.vocab_size,
        )  # fmt: skip
    except ValueError as error:
        raise ValueError(f"--{name}.dataset {source.dataset}: {error}") from error
    return rows, _excerpts(documents, source.text_column, tokenizer)


def context_length(model: CausalLM, asked: int | None, name: str) -> tuple[Any, int | None]:
    """The language model's settings, and how many tokens a row may have: as asked for, else what the model can read.

    Raises:
        ValueError: If more was asked for than the model can read.
    """
    settings = text_config(model.module)
    context = getattr(settings, "max_position_embeddings", None)
    if context and (asked or 0) > context:
        raise ValueError(f"--{name}: rows of {asked} tokens exceed the model's context of {context}")
    return settings, asked or context


def _excerpts(documents: Any, column: str | None, tokenizer: Any) -> list[str]:
    names = documents.column_names
    for columns in ([column], ["messages"], ["prompt", "completion"], ["text"], ["input_ids"]):
        if all(name in names for name in columns):
            found = zip(*(documents[name] for name in columns))
            return [_excerpt(values, tokenizer) for values in found]
    raise AssertionError("build_rows has chosen a column")


def _excerpt(values: tuple[Any, ...], tokenizer: Any) -> str:
    parts = []
    for value in values:
        if isinstance(value, list) and value and isinstance(value[0], dict):
            parts.append(" ".join(f"{turn.get('role')}: {turn.get('content')}" for turn in value))
        elif isinstance(value, list):
            parts.append(tokenizer.decode(value[:EXCERPT]))
        else:
            parts.append(str(value or ""))
    text = " ".join(" ".join(parts).split())
    return text if len(text) <= EXCERPT else text[: EXCERPT - 1] + "…"
