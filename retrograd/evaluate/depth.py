"""Unlearning depth: in which layers does a model still have what another one reads the right answer from?

For each question, the hidden states of the model at the output of block l, at the places that predict the right
answer's tokens, are put into a model that knows it. With s that one's mean log-probability of the answer's tokens, and
s_l the same with the states put in,

    Δ_l = s − s_l                             what is missing in the model's layer l, nats per token
    depth of a question = Σ_l Δ_l(never)·clip(Δ_l(model)/Δ_l(never), 0, 1) / Σ_l Δ_l(never)     of l: Δ_l(never) > 0.05

Δ(never) is that of a model that never knew. 0: all is there; 1: as much is missing as where it never was. The score
is the mean over the questions that have such a layer. Source: unlearning depth score, 2605.24614.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from retrograd.lm.model import CausalLM, causal_logits
from retrograd.lm.outputs import decoder_blocks, recorded, replaced
from retrograd.lm.spans import text_config
from retrograd.query.questions import Questions

__all__ = ["Patched", "depths", "patched"]

LEAST = 0.05  # nats per token: below it a layer does not encode the answer


class Patched(NamedTuple):
    """Δ_l of each question and block, nats per token, [n][blocks]; and which questions they are."""

    lost: list[list[float]]
    hashes: list[str]


@torch.no_grad()
def patched(lm: CausalLM, knows: CausalLM, questions: Questions) -> Patched:
    """What is missing in a model's layers for one that knows to read the right answers from, question by question.

    Args:
        lm, knows: Of one architecture.
        questions: By their answers' texts.
    Raises:
        ValueError: If the two differ in the number of blocks, the vocabulary, or the blocks in the states' shape.
    """
    own, other = decoder_blocks(lm.module), decoder_blocks(knows.module)
    if len(own) != len(other):
        raise ValueError(
            f"the model has {len(own)} blocks and the one that knows {len(other)}: depth puts the states of one into "
            "the other, so that both have to be of one architecture"
        )
    sizes = [text_config(model.module).vocab_size for model in (lm, knows)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the model has a vocabulary of {sizes[0]} tokens and the one that knows one of {sizes[1]}: depth asks "
            "both the same tokens"
        )
    device = next(iter(knows.params.values())).device
    here, there = causal_logits(lm), causal_logits(knows)
    lost = []
    for rows, targets, gold in zip(questions.rows, questions.targets, questions.gold):
        ids, answer = (torch.from_numpy(by_option[gold])[None].to(device) for by_option in (rows, targets))
        columns = torch.arange(ids.shape[1] - answer.shape[1], ids.shape[1], device=device)
        where = (ids, torch.zeros_like(columns), columns)
        with recorded(dict(enumerate(own))) as states:
            here(lm.params, *where)
        whole = _mean(there(knows.params, *where), answer)
        parts = []
        for block, seen in states.items():
            with replaced(other[block], _at(seen, columns)):
                parts.append(whole - _mean(there(knows.params, *where), answer))
        lost.append(parts)
    return Patched(lost, questions.hashes)


def depths(model: Any, never: Any) -> np.ndarray:
    """The depth of each question, NaN where the model that never knew lacks nothing, [n].

    Args:
        model, never: Δ, [n, blocks] each.

    >>> depths([[0.5, 1.0]], [[1.0, 1.0]]).tolist()
    [0.75]
    """
    lost, known = np.asarray(model, dtype=np.float64), np.asarray(never, dtype=np.float64)
    counted = np.where(known > LEAST, known, 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        kept = np.clip(np.where(counted > 0, lost / counted, 0.0), 0.0, 1.0)
        return np.where(counted.sum(1) > 0, (counted * kept).sum(1) / counted.sum(1), np.nan)


def _mean(logits: Tensor, answer: Tensor) -> float:
    return float(logits.double().log_softmax(-1).gather(1, answer.T).mean())


def _at(seen: list[Tensor], columns: Tensor) -> Any:
    """A hook's change: the states at some columns are those that were seen."""
    assert len(seen) == 1, "one row is read at once"

    def change(states: Tensor) -> Tensor:
        if states.shape != seen[0].shape:
            raise ValueError(
                f"the model's states are {tuple(seen[0].shape)} and those of the one that knows {tuple(states.shape)}: "
                "depth needs two models of one architecture"
            )
        new = states.clone()
        new[:, columns] = seen[0][:, columns].to(states)
        return new

    return change
