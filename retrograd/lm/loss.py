"""Next-token cross-entropy in nats, target-aligned.

Column k always belongs to the loss of predicting token k from the tokens before it, so column 0 is exactly 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "refuse_other_loss",
    "token_ce",
    "weighted_causal_lm_ce",
]


def token_ce(logits: Tensor, input_ids: Tensor) -> Tensor:
    """Cross-entropy of each token given those before it, [B, L] nats; column 0 is 0.

    Args:
        logits: [B, L, V]; column k−1 predicts token k. Half precision is raised to float32.
        input_ids: [B, L].
    """
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    ce = F.cross_entropy(logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten(), reduction="none")
    return F.pad(ce.view(len(input_ids), -1), (1, 0))


def weighted_causal_lm_ce(
    logits: Tensor,
    labels: Tensor,
    example_weight: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    vocab_size: int | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """(1/Z) Σ w·ce over the valid targets, [] nats; Z is their number and does not depend on the weights.

    With `model.loss_function = weighted_causal_lm_ce` a Hugging Face model takes data weights:
    `model(input_ids=ids, labels=ids, example_weight=w).loss`.

    Args:
        logits: [B, L, V].
        labels: [B, L]: the tokens, or `ignore_index` where a token is no target.
        example_weight: Data weights, [B] or [B, L]; ones if not given.
        mask: Valid targets, [B, L] bool; all but column 0 if not given. Column 0 never counts.
        vocab_size: V, as transformers gives it.
    Raises:
        ValueError: If the shape of weights or logits does not fit, or no target is valid.

    >>> weighted_causal_lm_ce(torch.zeros(1, 3, 8), torch.tensor([[1, 2, 3]]))  # log 8
    tensor(2.0794)
    """
    shape = tuple(labels.shape)
    if vocab_size not in (None, logits.shape[-1]):
        raise ValueError(f"the logits are of {logits.shape[-1]} tokens, the vocabulary has {vocab_size}")
    mask = labels != ignore_index if mask is None else mask & (labels != ignore_index)
    mask[:, 0] = False
    if not mask.any():
        raise ValueError(f"no valid target among {shape[0]} rows of {shape[1]} tokens; a row needs two tokens at least")
    ce = token_ce(logits, labels.masked_fill(~mask, 0))
    weights = torch.ones(shape[:1], dtype=ce.dtype, device=ce.device) if example_weight is None else example_weight
    if tuple(weights.shape) not in (shape[:1], shape):
        raise ValueError(f"weights of shape {tuple(weights.shape)} do not fit rows of shape {shape}: [B] or [B, L]")
    weights = weights if weights.ndim == 2 else weights[:, None]
    return torch.sum(weights * ce * mask) / mask.sum()


def refuse_other_loss(function: Callable[..., Any]) -> None:
    """Refuse a model's `loss_function` unless it is the objective that is trained: `weighted_causal_lm_ce`.

    It is called as transformers calls it, on random logits [3, 7, 5] with ignored labels, with weights and without.

    Raises:
        ValueError: With what it gave and what it should give, or why it could not be called.
    """
    if function is weighted_causal_lm_ce:
        return
    name = getattr(function, "__qualname__", type(function).__qualname__)
    advice = (
        "Set model.loss_function = retrograd.weighted_causal_lm_ce, or give Trainer.initialize a loss of yours that "
        "returns one loss for each item."
    )
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 7, 5, generator=draw)
    labels = torch.randint(0, 5, (3, 7), generator=draw)
    labels[0, 4:], labels[1, :3] = -100, -100
    for weights in (torch.rand(3, generator=draw) + 0.5, None):
        expected = weighted_causal_lm_ce(logits, labels, weights)
        given = {} if weights is None else {"example_weight": weights}
        try:
            returned = torch.as_tensor(function(logits=logits, labels=labels, vocab_size=5, **given))
        except Exception as error:  # a foreign function raises what it likes
            raise ValueError(
                f"model.loss_function ({name}) cannot be called with logits, labels, vocab_size and the data weights "
                f"as example_weight: {type(error).__name__}: {error}. {advice}"
            ) from error
        if returned.shape != expected.shape or not torch.allclose(returned.to(expected), expected, rtol=1e-5):
            raise ValueError(
                f"model.loss_function ({name}) is not the objective that is trained: with{'out' * (not given)} weights "
                f"it gave {returned.tolist()} where the sum of w·ce, divided by the number of valid targets, is "
                f"{float(expected):.6g}. {advice}"
            )
