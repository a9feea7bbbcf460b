"""One model, one task: what it answers, how well it predicts, how it goes on."""

from __future__ import annotations

from typing import Any

import torch

from retrograd.lm.choices import build_questions, score_questions
from retrograd.lm.data import load_documents
from retrograd.lm.greedy import continuations
from retrograd.lm.model import CausalLM
from retrograd.lm.query import Queries, query_columns
from retrograd.lm.rows import Rows, build_rows
from retrograd.runs.answers import Answers, Measured, Samples, Texts
from retrograd.runs.tasks import Task
from retrograd.stages.sources import context_length

__all__ = ["measure"]


def measure(task: Task, lm: CausalLM, tokenizer: Any, batch_size: int) -> tuple[Measured, dict[str, Any]]:
    """What a model gives for a task, and how it was asked.

    Args:
        batch_size: Questions read at once; documents are read one by one.
    Raises:
        ValueError: If the data set cannot be loaded, or does not fit the task, the tokenizer or the model.
    """
    if task.choices:
        return _choices(task, lm, tokenizer, batch_size)
    rows = _rows(task, lm, tokenizer)
    told = {"rows": rows.digest(), "truncated": rows.truncated, "skipped": len(rows.skipped)}
    return (_texts(lm, rows) if task.form == "text" else _samples(task, lm, tokenizer, rows)), told


def _choices(task: Task, lm: CausalLM, tokenizer: Any, batch_size: int) -> tuple[Measured, dict[str, Any]]:
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
    scored = score_questions(lm, lm.params, questions, batch_size, failures="mark")
    told = {
        "questions": questions.digest(), "template": questions.template.name, "prompt": questions.template.text,
        "cut": questions.cut, "few_shot": 0,
    }  # fmt: skip
    return Answers(scored, questions.subjects), told


def _rows(task: Task, lm: CausalLM, tokenizer: Any) -> Rows:
    documents = load_documents(task.dataset, split=task.split, subset=task.subset, limit=task.limit)
    settings, longest = context_length(lm, task.max_length, "max_length")
    return build_rows(
        documents, tokenizer, text_column=task.text_column, max_length=longest, vocab_size=settings.vocab_size
    )


def _texts(lm: CausalLM, rows: Rows) -> Texts:
    first = next(iter(lm.params.values()))
    dtype = torch.promote_types(first.dtype, torch.float32)
    columns = query_columns(lm.evaluated, rows, "none", dtype=dtype, device=first.device)
    targets = [int(mask.sum()) for mask in rows.target_mask]
    documents = [int(row[-1]) for row in rows.doc_ids]
    return Texts(Queries(columns).values(lm.params).double().tolist(), targets, documents)


def _samples(task: Task, lm: CausalLM, tokenizer: Any, rows: Rows) -> Samples:
    prompts = [ids[: task.prompt_tokens] for ids in rows.input_ids]
    longest = context_length(lm, task.max_length, "max_length")[1]
    found = continuations(
        lm, lm.params, prompts, task.new_tokens, end=tokenizer.eos_token_id, longest=longest
    )  # fmt: skip
    texts = [None if tokens is None else tokenizer.decode(tokens) for tokens in found]
    return Samples([tokenizer.decode(ids) for ids in prompts], texts, [int(row[-1]) for row in rows.doc_ids])
