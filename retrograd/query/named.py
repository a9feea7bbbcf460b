"""Queries by name: their columns, what is recorded of them, and what of a model they measure."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from retrograd.core.optim import Params
from retrograd.data.rows import Rows
from retrograd.lm.model import CausalLM, bound_model
from retrograd.query.columns import Column, Queries, contrast, function_column, load_function
from retrograd.query.prepare import Answers, Prepared, prepare
from retrograd.query.questions import Questions
from retrograd.settings.run import QueryConfig

__all__ = ["Asked", "contrasted", "hashed", "load_queries"]


class Asked(NamedTuple):
    """A named query, loaded.

    record: what query.json says of it; measure: further numbers at given parameters; release: lets go of what is kept
    from one column to the next, when all are asked.
    """

    name: str
    columns: list[Column]
    digest: str
    record: dict[str, Any]
    measure: Callable[[Params], dict[str, Any]] = lambda params: {}
    release: Callable[[], None] = lambda: None


def load_queries(
    configs: dict[str, QueryConfig], model: CausalLM, tokenizer: Any, *, batch_size: int, like: torch.Tensor
) -> list[Asked]:
    """Load and check named queries; contrasts after what they contrast.

    Args:
        like: A tensor of the dtype and device of the coefficients.
    Raises:
        ValueError: If a query's data set or function cannot be loaded, or does not fit the model.
    """
    known: dict[str, Asked] = {}
    for name, config in configs.items():
        if config.function:
            known[name] = _function(name, config.function, model, tokenizer, like)
        elif not config.contrast:
            known[name] = _question(name, config, model, tokenizer, batch_size, like)
    for name, config in configs.items():
        if config.contrast:
            known[name] = contrasted(name, *(known[other] for other in config.contrast))
    return [known[name] for name in configs]


def contrasted(name: str, first: Asked, second: Asked) -> Asked:
    """The first query minus the second."""
    columns = contrast(name, first.columns, second.columns)
    record = {"kind": "contrast", "of": [first.name, second.name]}

    def release() -> None:
        first.release()
        second.release()

    return Asked(name, columns, hashed("contrast", first.digest, second.digest), record, release=release)


def _question(
    name: str, config: QueryConfig, model: CausalLM, tokenizer: Any, batch_size: int, like: torch.Tensor
) -> Asked:
    ready = prepare(config, model, tokenizer, batch_size, "query" if name == "query" else f"queries.{name}")
    if isinstance(ready.content, Rows):
        columns = ready.columns(name, config.reduction, config.loss, like)
        return Asked(
            name, columns, hashed("text", ready.content.digest(), config.reduction), _text(config, ready.content)
        )
    questions = ready.content
    if config.form == "cloze":
        # a text answer is a row of its own for each option: no more rows at once than in a step
        ready = dataclasses.replace(ready, batch_size=max(1, batch_size // int(questions.options.max())))
    columns, template = ready.columns(name, config.reduction, config.loss, like), questions.template
    written = (template.name, template.text, template.option)
    digest = hashed("choices", questions.digest(), config.loss, str(config.normalise), config.reduction, *written)
    return Asked(name, columns, digest, _choices(config, questions), lambda params: _measured(ready, params, questions))


def _text(config: QueryConfig, rows: Rows) -> dict[str, Any]:
    return {
        "kind": "text", "reduction": config.reduction, "documents": [int(d[-1]) for d in rows.doc_ids],
        "targets": rows.targets, "truncated": rows.truncated,
        "skipped": {str(document): reason for document, reason in rows.skipped.items()},
    }  # fmt: skip


def _choices(config: QueryConfig, questions: Questions) -> dict[str, Any]:
    return {
        "kind": "choices", "form": config.form, "template": questions.template.name, "prompt": questions.template.text,
        "loss": config.loss, "normalised": config.normalise, "reduction": config.reduction,
        "questions": len(questions), "targets": len(questions), "cut": questions.cut,
        "subjects": dict(Counter(subject for subject in questions.subjects if subject)),
        "prompts": hashed(*questions.hashes),
    }  # fmt: skip


def _measured(ready: Prepared, params: Params, questions: Questions) -> dict[str, Any]:
    """How well the questions are answered, and each answer: paired comparisons need them."""
    measured = ready.measure(params, failures="raise")
    assert isinstance(measured, Answers)
    scored = measured.scored
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
    return Asked(name, [column], hashed("function", path, source), {"kind": "function", "function": path})


def _source(function: Callable[..., Any]) -> str:
    """The whole file of a function, since what it calls counts too; "" for what has none, such as a partial."""
    try:
        file = inspect.getsourcefile(inspect.unwrap(function))
    except TypeError:
        return ""
    return Path(file).read_text(encoding="utf8") if file else ""


def hashed(*parts: str) -> str:
    """A query's digest from those of its parts."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
