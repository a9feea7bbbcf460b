"""Parts that methods share: retain terms, bounded ascent, entropies, log-ratios, cosines and norms with an ε.

No term differentiates through a `detach`: the gradient would be right for training and its derivative would not, so
that metagradients through it would be silently wrong. Terms are potentials, whose gradient is the published one.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from retrograd.unlearn.settings import Settings
from retrograd.unlearn.view import Side, View

__all__ = [
    "Term",
    "Terms",
    "ascent",
    "cosine",
    "distance",
    "divergence",
    "flat",
    "forget_term",
    "log_ratio",
    "ramped",
    "retain_value",
    "top",
    "unit",
]

_EPS = 1e-6  # under every root of a norm: far below the norms of hidden states, which are near √D
_NEAR = 1e-3  # of the reference's norm: within it the distance is a parabola, so that it has a slope at 0


class Term(NamedTuple):
    """coefficient·value of an objective; the value alone is what is logged."""

    coefficient: Tensor | float
    value: Tensor


Terms = dict[str, Term]


def forget_term(settings: Settings, view: View, value: Tensor) -> Terms:
    """One term F with the forget coefficient."""
    return {"forget": Term(ramped(settings.forget, settings.forget_ramp, view.progress), value)}


def ramped(coefficient: float, ramp: tuple[float, float], progress: Tensor) -> Tensor | float:
    """coefficient·(a + (b − a)·p)."""
    first, last = ramp
    return coefficient * first if first == last else coefficient * (first + (last - first) * progress)


def ascent(side: Side, cap: float | None) -> Tensor:
    """−Σ c·min(CE, cap·log V), []; without a cap it has no lower bound.

    log V is the loss of a uniform guess. A token beyond the cap has no gradient any more.
    """
    if cap is None:
        return -torch.sum(side.c * side.ce)
    return -torch.sum(side.c * side.ce.clamp(max=cap * math.log(side.logits.shape[-1])))


def flat(logits: Tensor) -> Tensor:
    """(logsumexp z − mean z)/log V, [m]: cross-entropy to a uniform guess, at least 1, and 1 where z is uniform."""
    return (logits.logsumexp(-1) - logits.mean(-1)) / math.log(logits.shape[-1])


def top(logits: Tensor, k: int | None) -> Tensor:
    """The k largest logits, [m, k]; for None 100, or half of a smaller vocabulary.

    Raises:
        ValueError: If there are fewer, or k is below 2.
    """
    vocabulary = logits.shape[-1]
    size = min(100, vocabulary // 2) if k is None else k
    if not 2 <= size <= vocabulary:
        raise ValueError(f"top_k is {size}; it has to be from 2 to the vocabulary, {vocabulary}")
    return logits.topk(size, dim=-1).values


def log_ratio(side: Side) -> Tensor:
    """log p − log p_ref of each target, [m]."""
    return side.reference_ce - side.ce


def cosine(x: Tensor, y: Tensor) -> Tensor:
    """⟨x, y⟩/(‖x‖‖y‖) along the last dimension, norms as in `unit`."""
    return torch.sum(unit(x, _EPS) * unit(y, _EPS), -1)


def unit(x: Tensor, eps: Tensor | float) -> Tensor:
    """x/√(‖x‖² + ε²) along the last dimension; 0 for a vector of zeros, with a slope of 1/ε there."""
    return x / (x.square().sum(-1, keepdim=True) + eps**2).sqrt()


def distance(x: Tensor, fixed: Tensor) -> Tensor:
    """√(‖x − fixed‖² + ε²) − ε with ε = 0.001·‖fixed‖, along the last dimension: smooth at 0, and 0 there."""
    eps = _NEAR * fixed.square().sum(-1).sqrt() + _EPS
    return ((x - fixed).square().sum(-1) + eps.square()).sqrt() - eps


def retain_value(settings: Settings, side: Side) -> Tensor:
    """R, [], a weighted token mean over the retain rows of the whole batch.

    ce: Σ c·CE.   kl: Σ c·KL(p_ref ‖ p).   l2: Σ c·mean_l ‖h_l − h0_l‖.   mse: Σ c·mean_l ‖h_l − h0_l‖²/D.
    """
    match settings.retain_term:
        case "ce":
            return torch.sum(side.c * side.ce)
        case "kl":
            return torch.sum(_batch_mean(side) * _divergence(side) if settings.as_run else side.c * _divergence(side))
        case "l2":
            then = side.reference.states
            each = [distance(h, then[block]) for block, h in side.now.states.items()]
            return torch.sum(side.c * torch.stack(each).mean(0))
        case "mse":
            then = side.reference.states
            each = [(h - then[block]).square().mean(-1) for block, h in side.now.states.items()]
            return torch.sum(side.c * torch.stack(each).mean(0))
    raise ValueError(f"unknown retain_term {settings.retain_term!r}; there are ce, kl, l2 and mse")


@torch.no_grad()
def divergence(side: Side) -> Tensor:
    """KL(p_ref ‖ p) over the side's targets, whatever they weigh, nats per token, []."""
    return _divergence(side).mean()


def _divergence(side: Side) -> Tensor:
    """KL(p_ref ‖ p) at each target, [m] nats."""
    logits = side.reference.logits
    assert logits is not None, "a method that looks at logits says so"
    then, now = logits.log_softmax(-1), side.logits.log_softmax(-1)
    return torch.sum(then.exp() * (then - now), -1)


def _batch_mean(side: Side) -> Tensor:
    """w/(sequences): the historical normaliser, under which the term grows with the length of the rows."""
    return side.w * side.share[side.sequence]
