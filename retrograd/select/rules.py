"""From scores to weights: one formula a rule, over real tokens only.

    τ, μ         scores for the query that is to go, and for the one that is to stay; negative = proponent
    p, g         max(0, −τ), max(0, −μ): strengths, what training on the token gives the query

    descent      weights of the token loss, Σ w·CE is descended: w < 0 is ascent
        value           τ / mean|τ|                        sign            sign τ
        soft_sign       tanh(τ / s)                        clipped         value within [−c, c]
        rank            sign τ · rank|τ| / n               two_objective   (τ − α μ) / mean|τ − α μ|
        top_q           −s / mean|τ| on the q·n largest s > 0, s = p, or max(0, p − α g) where there is a μ
        positive_only   [τ > 0]                            negative_only   [τ < 0]
        selective       [τ > 0 and μ ≤ 0]                  compatible      [τ > 0 and μ < 0]
        documents       [the token's document is among the k largest Σ (p − α g)]
        selection       [the token was chosen by hand]
    removal      w ≥ 0 and Σ w = n: how much of the forget term a token gets
        signed rules    max(0, −w of descent), rescaled; two_objective: max(0, p − α g)
        masks           those of proponents (negative_only, documents), all_tokens and selection, rescaled

The sign of two_objective is plus for descent: it descends α·(loss to stay) − (loss to go). What is weighed are real
tokens, or documents where the scores are of documents or the rule keeps documents; then all tokens of a document have
its weight, and means and ranks above are over documents.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from retrograd.select.places import Places
from retrograd.settings.select import Rule, Use

__all__ = ["MASKS", "Weighing", "finish", "key", "potential", "rises", "weigh"]

MASKS = ("positive_only", "negative_only", "selective", "compatible", "all_tokens", "documents", "selection")
PAIRED = ("two_objective", "selective", "compatible")  # need scores of what is to stay
DETRACTORS = ("positive_only", "selective", "compatible")


class Weighing(NamedTuple):
    """A rule with its numbers.

    soft: s of soft_sign, mean|τ| if None; clip: c; q: share that top_q keeps; k: documents that are kept;
    chosen: whether a real token is in the selection, [n] bool.
    """

    rule: Rule
    use: Use = "descent"
    alpha: float = 1.0
    soft: float | None = None
    clip: float = 1.0
    q: float = 0.1
    k: int | None = None
    chosen: Tensor | None = None


def weigh(weighing: Weighing, places: Places, forget: Tensor, retain: Tensor | None) -> Tensor:
    """The weights of the real tokens, [n] float64, or of the documents, [d]; for removal not yet rescaled.

    Args:
        forget, retain: τ and μ of the real tokens, [n], or of the documents that have one, [d].
    Raises:
        ValueError: If the rule needs scores that are not there, does not fit the use, or keeps nothing.
    """
    rule = weighing.rule
    if rule in PAIRED and retain is None:
        raise ValueError(f"--rule {rule} weighs two score sets against each other; give the other one with --against")
    if weighing.use == "removal" and rule in DETRACTORS:
        raise ValueError(
            f"--rule {rule} keeps tokens with a positive score, detractors: training on them raises the loss of what "
            "is to go, so removing them would restore it. With --use removal take negative_only, top_q or another "
            "rule of proponents; or keep --use descent"
        )
    if rule == "documents":
        return _documents(weighing, places, forget, retain)
    if rule == "all_tokens":
        return torch.ones_like(forget)
    if weighing.chosen is not None:
        return weighing.chosen.to(forget.dtype)
    if rule in MASKS:
        weights = _mask(rule, forget, retain).to(forget.dtype)
    else:
        weights = _signed(weighing, forget, retain)
        if weighing.use == "removal":
            strongest = rule == "two_objective" and retain is not None
            weights = _strength(forget, retain, weighing.alpha) if strongest else (-weights).clamp_min(0)
    _refuse_empty(weighing, weights, forget, retain)
    return weights


def finish(use: Use, weights: Tensor, places: Places) -> Tensor:
    """Token weights, [n], of weights of tokens or documents; for removal rescaled to Σ w = n."""
    tokens = weights if len(weights) == len(places) else places.at_tokens(weights)
    if use == "descent":
        return tokens
    return tokens * (len(places) / math.fsum(tokens.tolist()))  # the same in any order: controls have the arm's numbers


def rises(weighing: Weighing) -> bool:
    """Whether a token with a larger score (more of a detractor) gets a larger weight."""
    return weighing.use == "descent" and weighing.rule not in ("negative_only", "documents", "selection")


def key(weighing: Weighing, places: Places, forget: Tensor, retain: Tensor | None) -> Tensor:
    """What the rule sorts tokens by, [n], or documents, [d]: negative = proponent of what is to go."""
    if weighing.rule == "documents":
        return -potential(places, forget, retain, weighing.alpha)
    combined = weighing.rule in ("two_objective", "top_q") and retain is not None
    return forget - weighing.alpha * retain if combined and retain is not None else forget


def potential(places: Places, forget: Tensor, retain: Tensor | None, alpha: float) -> Tensor:
    """Σ (p − α g) by document, [d]: what its tokens give the query to go, less what they give the one to stay."""
    strength = (-forget).clamp_min(0)
    if retain is not None:
        strength = strength - alpha * (-retain).clamp_min(0)
    return places.per_document(strength) if len(strength) == len(places) else strength


def _strength(forget: Tensor, retain: Tensor | None, alpha: float) -> Tensor:
    strength = (-forget).clamp_min(0)
    return strength if retain is None else (strength - alpha * (-retain).clamp_min(0)).clamp_min(0)


def _signed(weighing: Weighing, forget: Tensor, retain: Tensor | None) -> Tensor:
    size = _mean_size(forget, "--scores")
    match weighing.rule:
        case "value":
            return forget / size
        case "sign":
            return forget.sign()
        case "soft_sign":
            return torch.tanh(forget / (size if weighing.soft is None else weighing.soft))
        case "clipped":
            return (forget / size).clamp(-weighing.clip, weighing.clip)
        case "rank":
            ranks = torch.from_numpy(stats.rankdata(forget.abs().numpy()))
            return forget.sign() * ranks / len(forget)
        case "top_q":
            strength = _strength(forget, retain, weighing.alpha)
            count = max(1, round(weighing.q * len(strength)))
            kept = torch.from_numpy(np.argsort(-strength.numpy(), kind="stable")[:count].copy())
            signed = torch.zeros_like(strength)
            signed[kept] = -strength[kept] / size
            return signed
        case "two_objective":
            assert retain is not None
            both = forget - weighing.alpha * retain
            return both / _mean_size(both, "score − α·against")
    raise AssertionError(weighing.rule)


def _mask(rule: Rule, forget: Tensor, retain: Tensor | None) -> Tensor:
    if rule == "positive_only":
        return forget > 0
    if rule == "negative_only":
        return forget < 0
    assert retain is not None
    return (forget > 0) & (retain <= 0 if rule == "selective" else retain < 0)


def _documents(weighing: Weighing, places: Places, forget: Tensor, retain: Tensor | None) -> Tensor:
    strength = potential(places, forget, retain, weighing.alpha)
    if weighing.k is None or not 1 <= weighing.k <= len(strength):
        given = "no --k" if weighing.k is None else f"--k {weighing.k}"
        raise ValueError(f"--rule documents with {given}; it keeps from 1 to {len(strength)} documents: give --k")
    kept = np.argsort(-strength.numpy(), kind="stable")[: weighing.k]
    if not strength[kept[-1]] > 0:
        above = int((strength > 0).sum())
        raise ValueError(
            f"--k {weighing.k} documents, but only {above} of {len(strength)} have Σ (p − α g) above 0 at α = "
            f"{weighing.alpha:g}: the others give what is to stay more than what is to go. Take --k {above} or less, "
            "or a smaller --alpha"
        )
    chosen = torch.zeros(len(strength), dtype=torch.float64)
    chosen[torch.from_numpy(kept.copy())] = 1
    return chosen


def _mean_size(values: Tensor, name: str) -> float:
    size = float(values.abs().mean())
    if size == 0:
        raise ValueError(f"all {len(values)} values of {name} are 0, so nothing tells one token from another")
    return size


def _refuse_empty(weighing: Weighing, weights: Tensor, forget: Tensor, retain: Tensor | None) -> None:
    if (weights != 0).any():
        return
    signs = f"{int((forget < 0).sum())} proponents and {int((forget > 0).sum())} detractors of what is to go"
    if retain is not None:
        signs += f", {int((retain < 0).sum())} and {int((retain > 0).sum())} of what is to stay"
    raise ValueError(
        f"nothing is left: --rule {weighing.rule} for {weighing.use} gives all {len(weights)} items weight 0 "
        f"({signs}). Take another rule, or a smaller --alpha"
    )
