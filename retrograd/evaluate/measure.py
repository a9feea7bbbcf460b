"""One model, one task: what it answers, how well it predicts, how it goes on.

A task is prepared once, its data set read and tokenised, and can then be measured at any parameters of the model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from retrograd.core.optim import Params
from retrograd.data.documents import load_documents
from retrograd.data.rows import Rows, build_rows
from retrograd.evaluate.answers import Answers, Measured, Samples, Texts
from retrograd.lm.generate import continuations
from retrograd.lm.model import CausalLM
from retrograd.query.answers import prove_answers
from retrograd.query.choices import build_questions, score_questions
from retrograd.query.columns import Queries, query_columns
from retrograd.query.load import context_length
from retrograd.settings.tasks import Task

__all__ = ["Prepared", "measure", "prepare"]


class Prepared(NamedTuple):
    """A task ready to be measured at parameters of its model. asked: how it is asked, with a digest of its content."""

    measure: Callable[[Params], Measured]
    asked: dict[str, Any]


def measure(task: Task, lm: CausalLM, tokenizer: Any, batch_size: int) -> tuple[Measured, dict[str, Any]]:
    """What a model gives for a task, and how it was asked.

    Args:
        batch_size: Questions read at once; documents are read one by one.
    Raises:
        ValueError: If the data set cannot be loaded, or does not fit the task, the tokenizer or the model.
    """
    prepared = prepare(task, lm, tokenizer, batch_size)
    return prepared.measure(lm.params), prepared.asked


def prepare(task: Task, lm: CausalLM, tokenizer: Any, batch_size: int) -> Prepared:
    """Read a task's data set and write its questions as the model reads them; arguments and errors as `measure`."""
    if task.form != "text":
        prove_answers(lm)
    if task.choices:
        return _choices(task, lm, tokenizer, batch_size)
    rows = _rows(task, lm, tokenizer)
    told = {"rows": rows.digest(), "truncated": rows.truncated, "skipped": len(rows.skipped)}
    if task.form == "text":
        return Prepared(lambda params: _texts(lm, params, rows), told)
    return Prepared(lambda params: _samples(task, lm, params, tokenizer, rows), told)


def _choices(task: Task, lm: CausalLM, tokenizer: Any, batch_size: int) -> Prepared:
    documents = load_documents(task.dataset, split=task.split, subset=task.subset, limit=task.limit)
    if task.expect is not None and task.limit is None and len(documents) != task.expect:
        raise ValueError(
            f"{task.dataset} has {len(documents)} questions, and this task {task.expect}: it is another set. Give the "
            "task its own name and data set"
        )
    settings, longest = context_length(lm, task.max_length, "max_length")
    questions = build_questions(
        documents, tokenizer, form=task.form, template=task.template, max_length=longest,
        vocab_size=settings.vocab_size,
    )  # fmt: skip
    told = {
        "questions": questions.digest(), "template": questions.template.name, "prompt": questions.template.text,
        "cut": questions.cut, "few_shot": 0,
    }  # fmt: skip

    def measured(params: Params) -> Answers:
        return Answers(score_questions(lm, params, questions, batch_size, failures="mark"), questions.subjects)

    return Prepared(measured, told)


def _rows(task: Task, lm: CausalLM, tokenizer: Any) -> Rows:
    documents = load_documents(task.dataset, split=task.split, subset=task.subset, limit=task.limit)
    settings, longest = context_length(lm, task.max_length, "max_length")
    return build_rows(
        documents, tokenizer, text_column=task.text_column, max_length=longest, vocab_size=settings.vocab_size
    )


def _texts(lm: CausalLM, params: Params, rows: Rows) -> Texts:
    first = next(iter(params.values()))
    dtype = torch.promote_types(first.dtype, torch.float32)
    columns = query_columns(lm.evaluated, rows, "none", dtype=dtype, device=first.device)
    targets = [int(mask.sum()) for mask in rows.target_mask]
    documents = [int(row[-1]) for row in rows.doc_ids]
    return Texts(Queries(columns).values(params).double().tolist(), targets, documents)


def _samples(task: Task, lm: CausalLM, params: Params, tokenizer: Any, rows: Rows) -> Samples:
    prompts = [ids[: task.prompt_tokens] for ids in rows.input_ids]
    longest = context_length(lm, task.max_length, "max_length")[1]
    found = continuations(lm, params, prompts, task.new_tokens, end=tokenizer.eos_token_id, longest=longest)
    texts = [None if tokens is None else tokenizer.decode(tokens) for tokens in found]
    return Samples([tokenizer.decode(ids) for ids in prompts], texts, [int(row[-1]) for row in rows.doc_ids])
