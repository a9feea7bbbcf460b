"""What a search for a prompt is: a start, and a step from one state to the next, as functions of what is given.

    loss(p)    mean over questions of −log softmax_o(s)[right option], in nats, with p in each question

A state is all that a later step needs: a search that goes on from one ends as it would have. Random numbers are a
function of seed and step.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from retrograd.attack.prompted.insert import inserted, some
from retrograd.lm.model import CausalLM
from retrograd.lm.virtual import embedding_rows, virtual_tokens
from retrograd.query.choices import choice_columns, choice_objective
from retrograd.query.questions import Questions
from retrograd.settings.prompted import Prompted

__all__ = ["Given", "Part", "Search", "State"]


class Part(NamedTuple):
    """The questions of half A in one task. normalise: as the task counts; longest: tokens that the model can read."""

    questions: Questions
    normalise: bool
    longest: int | None


class State(NamedTuple):
    """After `step` steps. loss: of its prompt, as far as the search knows it, nats; read, back: tokens
    read, and gone back through, so far."""

    step: int
    loss: float
    read: int
    back: int
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class Given:
    """What an attacker has: the model, frozen, and half A's questions with their answers.

    first: the special token that a text may begin with; allowed: tokens that a suffix may have, [V] bool;
    batch_size: questions read at once.
    """

    one: Prompted
    lm: CausalLM
    parts: Sequence[Part]
    first: int | None
    allowed: Tensor
    batch_size: int

    def generator(self, *purpose: Any) -> torch.Generator:
        """Random numbers of one purpose, the same on every device."""
        digest = hashlib.sha256(repr((self.one.seed, *purpose)).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))

    def drawn(self, step: int) -> list[Part]:
        """The questions of a step: so many of all, each once."""
        places = [(k, q) for k, part in enumerate(self.parts) for q in range(len(part.questions))]
        order = torch.randperm(len(places), generator=self.generator("questions", step)).tolist()
        taken = sorted(places[k] for k in order[: self.one.batch_size])
        numbers = [[q for k, q in taken if k == part] for part in range(len(self.parts))]
        return [part._replace(questions=some(part.questions, mine)) for part, mine in zip(self.parts, numbers) if mine]

    def put(self, part: Part, ids: np.ndarray) -> Questions:
        """A part's questions with tokens in them."""
        return inserted(part.questions, ids, self.one.place, first=self.first, longest=part.longest)

    def virtual(self) -> np.ndarray:
        """The ids of the prompt's virtual tokens."""
        return embedding_rows(self.lm) + np.arange(self.one.tokens)

    def descent(self, parts: Sequence[Part], vectors: Tensor) -> tuple[float, Tensor, int]:
        """Loss of vectors in place of a prompt's embeddings, its gradient [m, width], and the tokens that were read."""
        leaf = vectors.detach().requires_grad_()
        total, gradient, read = 0.0, torch.zeros_like(leaf), 0
        n = sum(len(part.questions) for part in parts)
        params = self.lm.params
        first = next(iter(params.values()))
        for part in parts:
            questions = self.put(part, self.virtual())
            objective = choice_objective(self.lm, "four_way", normalise=part.normalise)
            dtype = torch.promote_types(first.dtype, torch.float32)
            columns = choice_columns(questions, batch_size=self.batch_size, dtype=dtype, device=first.device)
            for batch in columns[0]:
                with virtual_tokens(self.lm, leaf):
                    value = objective(params, batch.inputs, batch.scale) * (len(questions) / n)
                gradient += torch.autograd.grad(value, leaf)[0]
                total += float(value.detach())
            read += tokens_of(questions)
        return total, gradient, read


def tokens_of(questions: Questions) -> int:
    """Tokens that are read to ask questions, padding left out."""
    return sum(len(row) for rows in questions.rows for row in rows)


@dataclass(frozen=True)
class Search:
    """A search for a prompt.

    name: In suites and files; formula: what it does, in a line.
    start, advance: The first state, and the next one.
    ids: The tokens of a state's prompt, [m]; virtual ones where it has vectors.
    vectors: Those, [m, width]; None of real tokens.
    """

    name: str
    formula: str
    start: Callable[[Given], State]
    advance: Callable[[Given, State], State]
    ids: Callable[[Given, State], np.ndarray]
    vectors: Callable[[State], Tensor | None]
