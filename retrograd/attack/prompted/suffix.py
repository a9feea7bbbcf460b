"""A universal suffix by greedy coordinate gradient: one run of tokens for all questions, found on half A's.

At each step the gradient with respect to the prompt's embeddings says which tokens would lower the loss most at each
place; exchanges drawn among these are tried on the step's questions, and the best one is kept if the loss on all of
half A falls. So that loss never rises. Source: Zou et al., Universal and transferable adversarial attacks (2307.15043),
algorithm 2, whose test on a batch is on the whole half here.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from retrograd.attack.prompted.contract import Given, Part, Search, State, tokens_of
from retrograd.attack.prompted.insert import joined
from retrograd.lm.virtual import embedded
from retrograd.query.choices import Scored, score_questions

__all__ = ["SEARCH"]


def _start(given: Given) -> State:
    """Drawn tokens."""
    allowed = given.allowed.nonzero()[:, 0]
    drawn = torch.randint(len(allowed), (given.one.tokens,), generator=given.generator("start"))
    ids = allowed[drawn]
    losses, read = _losses(given, given.parts, ids[None])
    return State(0, float(losses[0]), read, 0, {"ids": ids})


def _advance(given: Given, state: State) -> State:
    """One exchange, or none."""
    ids, questions = state.tensors["ids"], given.drawn(state.step)
    _, gradient, back = given.descent(questions, embedded(given.lm, ids))
    tried = _exchanges(given, ids, gradient, state.step)
    losses, read = _losses(given, questions, tried)
    best = tried[int(losses.argmin())]
    whole, more = _losses(given, given.parts, best[None])
    better = float(whole[0]) < state.loss
    kept, loss = (best, float(whole[0])) if better else (ids, state.loss)
    return State(state.step + 1, loss, state.read + back + read + more, state.back + back, {"ids": kept})


def _exchanges(given: Given, ids: Tensor, gradient: Tensor, step: int) -> Tensor:
    """Prompts with one other token each, [candidates, m]."""
    settings = given.one
    table = embedded(given.lm, torch.arange(len(given.allowed)))
    change = (gradient.double() @ table.double().T).cpu()  # [m, V], the loss's change but for a constant of each place
    change = change.masked_fill(~given.allowed, torch.inf)
    best = change.topk(min(settings.best, int(given.allowed.sum())), largest=False).indices
    draw = given.generator("exchanges", step)
    places = torch.randint(len(ids), (settings.candidates,), generator=draw)
    ranks = torch.randint(best.shape[1], (settings.candidates,), generator=draw)
    tried = ids.repeat(settings.candidates, 1)
    tried[torch.arange(settings.candidates), places] = best[places, ranks]
    return tried


def _losses(given: Given, parts: Sequence[Part], prompts: Tensor) -> tuple[Tensor, int]:
    """Loss with each of some prompts, [C], and the tokens that were read."""
    total, read = torch.zeros(len(prompts), dtype=torch.float64), 0
    for part in parts:
        questions = joined([given.put(part, ids.numpy()) for ids in prompts])
        scored = score_questions(given.lm, given.lm.params, questions, given.batch_size, failures="mark")
        total += _four_way(scored, normalise=part.normalise).reshape(len(prompts), -1).sum(1)
        read += tokens_of(questions)
    loss = total / sum(len(part.questions) for part in parts)
    return loss.nan_to_num(nan=torch.inf), read


def _four_way(scored: Scored, *, normalise: bool) -> Tensor:
    """−log softmax over a question's options at the right one, [n]."""
    values = scored.logprobs / scored.widths.clamp(min=1) if normalise else scored.logprobs
    return -values.log_softmax(1).gather(1, scored.gold[:, None])[:, 0]


def _ids(given: Given, state: State) -> np.ndarray:
    ids: np.ndarray = state.tensors["ids"].numpy()
    return ids


SEARCH = Search(
    name="suffix",
    formula="one token exchanged: of those that the gradient names, what lowers the loss on half A most, or none",
    start=_start,
    advance=_advance,
    ids=_ids,
    vectors=lambda state: None,
)
