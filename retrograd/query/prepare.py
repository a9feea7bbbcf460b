"""One question and one model: read and tokenised once, then a query with its columns, or measured at any parameters.

Metric and derivative come from the same content and the same scorer: `Prepared.columns` is what a sweep pulls back,
`Prepared.measure` what an evaluation, a lab and a query's record tell.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from retrograd.core.optim import Params
from retrograd.data.rows import Rows
from retrograd.lm.generate import continuations
from retrograd.lm.model import CausalLM
from retrograd.query.choices import Scored, choice_columns, choice_objective, score_questions
from retrograd.query.columns import Column, Queries, batch_columns, query_columns
from retrograd.query.load import context_length, load_choices, load_rows
from retrograd.query.proof import prove_answers
from retrograd.query.questions import Questions
from retrograd.settings.question import Question
from retrograd.settings.tasks import Task

__all__ = ["Answers", "Measured", "Prepared", "Samples", "Texts", "prepare"]


class Answers(NamedTuple):
    """To multiple-choice questions, and the questions' subjects."""

    scored: Scored
    subjects: list[str | None]

    def rights(self, question: Question) -> torch.Tensor:
        """1, 0 or NaN (failed) for each, as the question counts, [n]."""
        return self.scored.correct_norm if question.normalise else self.scored.correct


class Texts(NamedTuple):
    """Mean loss of each document in nats, [n]; its targets, [n]; its place in the data set, [n]."""

    nats: list[float]
    targets: list[int]
    documents: list[int]

    @property
    def loss(self) -> float:
        """Mean over all targets, nats; not finite if any document's is not."""
        return float(np.dot(self.nats, self.targets) / sum(self.targets))

    @property
    def perplexity(self) -> float:
        """exp of the loss; ∞ where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.nan if math.isnan(self.loss) else math.inf


class Samples(NamedTuple):
    """Prompts and their greedy continuations; None where the model gave no finite logits."""

    prompts: list[str]
    texts: list[str | None]
    documents: list[int]


Measured = Answers | Texts | Samples


@dataclass(frozen=True, eq=False)
class Prepared:
    """A question as its model reads it.

    Args:
        content: Questions of the forms letter and cloze, rows of the others.
        batch_size: Questions read at once; by text, each with all its answers. Documents are measured one by one.
    """

    question: Question
    lm: CausalLM
    tokenizer: Any
    content: Rows | Questions
    batch_size: int

    @property
    def asked(self) -> dict[str, Any]:
        """How it is asked, with a digest of its content."""
        content = self.content
        if isinstance(content, Rows):
            return {"rows": content.digest(), "truncated": content.truncated, "skipped": len(content.skipped)}
        return {
            "questions": content.digest(), "template": content.template.name, "prompt": content.template.text,
            "cut": content.cut, "few_shot": 0,
        }  # fmt: skip

    def columns(self, name: str, reduction: str, loss: str, like: torch.Tensor) -> list[Column]:
        """Its loss as query columns, in nats.

        Args:
            reduction: "mean": one column; "none": one for each document or question.
            loss: Of multiple choice: "four_way" or "full".
            like: A tensor of the dtype and device of the coefficients.
        """
        kind: dict[str, Any] = {"batch_size": self.batch_size, "dtype": like.dtype, "device": like.device}
        if isinstance(self.content, Rows):
            return query_columns(self.lm.evaluated, self.content, reduction, name=name, **kind)
        batches = choice_columns(self.content, reduction, **kind)
        targets = sum(len(batch.index) for column in batches for batch in column)
        assert targets == len(self.content), f"{targets} targets for {len(self.content)} questions"
        return batch_columns(choice_objective(self.lm, loss, normalise=self.question.normalise), name, batches)

    def measure(self, params: Params, failures: str = "mark") -> Measured:
        """What the model gives at some parameters.

        Args:
            failures: Of multiple choice, as in `score_questions`.
        """
        if isinstance(self.content, Questions):
            scored = score_questions(self.lm, params, self.content, self.batch_size, failures=failures)
            return Answers(scored, self.content.subjects)
        if isinstance(self.question, Task) and self.question.form == "generate":
            return self._samples(self.question, params, self.content)
        first = next(iter(params.values()))
        dtype = torch.promote_types(first.dtype, torch.float32)
        columns = query_columns(self.lm.evaluated, self.content, "none", dtype=dtype, device=first.device)
        targets = [int(mask.sum()) for mask in self.content.target_mask]
        return Texts(Queries(columns).values(params).double().tolist(), targets, _documents(self.content))

    def _samples(self, task: Task, params: Params, rows: Rows) -> Samples:
        prompts = [ids[: task.prompt_tokens] for ids in rows.input_ids]
        longest = context_length(self.lm, task.max_length, "max_length")[1]
        end = self.tokenizer.eos_token_id
        written = continuations(self.lm, params, prompts, task.new_tokens, end=end, longest=longest)
        texts = [None if tokens is None else self.tokenizer.decode(tokens) for tokens in written]
        return Samples([self.tokenizer.decode(ids) for ids in prompts], texts, _documents(rows))


def prepare(question: Question, lm: CausalLM, tokenizer: Any, batch_size: int, flag: str | None = None) -> Prepared:
    """Read a question's data set and write it as the model reads it.

    Args:
        flag: What precedes the settings' names on the command line, for messages: "query"; None for a task.
    Raises:
        ValueError: If the data set cannot be loaded, or does not fit the question, the tokenizer or the model.
    """
    if question.form != "text":
        prove_answers(lm)
    if not question.choices:
        return Prepared(question, lm, tokenizer, load_rows(question, tokenizer, lm, flag)[0], batch_size)
    questions = load_choices(question, tokenizer, lm, flag)
    expected = question.expect if isinstance(question, Task) and question.limit is None else None
    if expected is not None and len(questions) != expected:
        raise ValueError(
            f"{question.dataset} has {len(questions)} questions, and this task {expected}: it is another set. Give the "
            "task its own name and data set"
        )
    return Prepared(question, lm, tokenizer, questions, batch_size)


def _documents(rows: Rows) -> list[int]:
    return [int(row[-1]) for row in rows.doc_ids]
