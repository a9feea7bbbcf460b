"""Greedy continuations, for people to read."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from retrograd.core.optim import Params
from retrograd.lm.model import CausalLM, causal_logits

__all__ = ["continuations"]


@torch.no_grad()
def continuations(
    lm: CausalLM,
    params: Params,
    prompts: Sequence[np.ndarray],
    new_tokens: int,
    *,
    end: int | None,
    longest: int | None,
) -> list[np.ndarray | None]:
    """The likeliest next token, again and again; the first of equals.

    Args:
        prompts: Tokens of each prompt, [T_i] int64, at least one.
        new_tokens: At most so many, fewer at the end token.
        end: Token that ends a text; it is not part of the continuation.
        longest: Tokens that the model can read; a text ends there.
    Returns:
        For each prompt its new tokens, int64, or None if a logit was not finite.
    """
    logits = causal_logits(lm)
    device = next(iter(params.values())).device
    texts: list[list[int]] = [prompt.tolist() for prompt in prompts]
    failed, done = [False] * len(texts), [False] * len(texts)
    for _ in range(new_tokens):
        left = [i for i, text in enumerate(texts) if not done[i] and (longest is None or len(text) < longest)]
        if not left:
            break
        ids = torch.zeros(len(left), max(len(texts[i]) for i in left), dtype=torch.int64)
        for row, i in enumerate(left):
            ids[row, : len(texts[i])] = torch.tensor(texts[i])
        last = torch.tensor([len(texts[i]) - 1 for i in left])
        predicted = logits(params, ids.to(device), torch.arange(len(left), device=device), last.to(device)).cpu()
        for i, row_logits in zip(left, predicted):
            failed[i] = not bool(torch.isfinite(row_logits).all())
            token = int(row_logits.argmax())
            done[i] = failed[i] or token == end
            if not done[i]:
                texts[i].append(token)
    new = [np.array(text[len(prompt) :], dtype=np.int64) for text, prompt in zip(texts, prompts)]
    return [None if bad else tokens for tokens, bad in zip(new, failed)]
