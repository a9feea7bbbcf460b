"""Matched controls: the arm's own weights, to the number, given to other tokens.

So every control has the arm's count of tokens and its magnitudes; what differs is which token has which.

    random_count        any order
    random_position     any order among the tokens at the same position in their rows
    random_class        any order among those, and of the same frequency: ⌊log2(how often the token occurs)⌋
    permuted_in_row     any order within a row
    sign_flipped        the order of −score: the strongest detractor has what the strongest proponent had
    retain_only         the order of the scores of what is to stay alone
    gradient_cosine     the order of −cos(∇ loss of the token, ∇ query), at the trained model
    gradient_norm       the largest weights by magnitude on the tokens of the largest ‖∇ loss‖
    bm25, keyword       the same by what a token gives to BM25 of the query; on tokens that are part of a keyword
    uniform             ones: not the arm's weights, but none

Ties are broken at random, by the seed; where none decides anything there is one draw. For a selection of documents all
of this holds for documents; what has to do with positions in a row then makes no sense and is refused.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from retrograd.select.places import Places
from retrograd.settings.select import Control

__all__ = ["ORDERED", "RANDOM", "drawn", "groups", "matched", "reassigned", "shuffled"]

RANDOM: tuple[Control, ...] = ("random_count", "random_position", "random_class", "permuted_in_row")
ORDERED: tuple[Control, ...] = ("sign_flipped", "retain_only", "gradient_cosine")
SIZED: tuple[Control, ...] = ("gradient_norm", "bm25", "keyword")


def matched(
    control: Control, weights: Tensor, places: Places, *, order: Tensor | None, rising: bool, seed: int
) -> Tensor:
    """The control's weights, like `weights`: of the real tokens, [n], or 0 or 1 of the documents, [d].

    Args:
        order: For controls with an order of their own: a score like τ (ORDERED: negative = proponent), or a strength
            (the others: larger = more), as long as `weights`.
        rising: Whether the arm gives larger weights to larger scores.
        seed: Of the draws.
    """
    if control == "uniform":
        return torch.ones_like(weights)
    if control in RANDOM:
        return shuffled(weights, groups(control, len(weights), places), seed)
    assert order is not None, control
    if control in ORDERED:
        return reassigned(weights, order if rising else -order, weights, seed)
    return reassigned(weights, order, weights.abs(), seed)


def drawn(control: Control, weights: Tensor, order: Tensor | None) -> bool:
    """Whether another seed can give other weights: by a draw, or by ties between unequal weights."""
    if order is None:
        return control in RANDOM
    size = weights if control in ORDERED else weights.abs()
    for ranking in (order, -order):  # falling and rising, whichever the arm takes
        places = np.sort(ranking.numpy())
        largest = np.lexsort((weights.numpy(), size.numpy()))
        ordered, sizes = weights.numpy()[largest], size.numpy()[largest]
        apart = np.diff(ordered) != 0
        if (apart & ((np.diff(places) == 0) | (np.diff(sizes) == 0))).any():
            return True
    return False


def shuffled(weights: Tensor, groups: np.ndarray, seed: int) -> Tensor:
    """The weights in a random order within each group, [n]."""
    drawn = np.random.default_rng(seed).random(len(weights))
    return _moved(weights, np.lexsort((drawn, groups)), np.argsort(groups, kind="stable"))


def reassigned(weights: Tensor, order: Tensor, size: Tensor, seed: int) -> Tensor:
    """The weights by ascending `size` on the places by ascending `order`, equal ones in a random order, [n]."""
    draw = np.random.default_rng(seed)
    there = np.lexsort((draw.random(len(weights)), order.numpy()))
    here = np.lexsort((draw.random(len(weights)), size.numpy()))
    return _moved(weights, here, there)


def _moved(weights: Tensor, here: np.ndarray, there: np.ndarray) -> Tensor:
    moved = torch.empty_like(weights)
    moved[torch.from_numpy(there)] = weights[torch.from_numpy(here)]
    return moved


def groups(control: Control, count: int, places: Places) -> np.ndarray:
    """Within which tokens, or documents, `count` in number, a random control moves weights, [count].

    Raises:
        ValueError: If a control of positions is asked for documents.
    """
    if control == "random_count":
        return np.zeros(count, dtype=np.int64)
    if count != len(places):
        raise ValueError(
            f"control {control} moves tokens within a row or position, and here whole documents are weighed; "
            "take random_count, or an order: sign_flipped, retain_only, gradient_norm, gradient_cosine, bm25, keyword"
        )
    if control == "permuted_in_row":
        return places.row.numpy()
    if control == "random_position":
        return places.column.numpy()
    _, kind, counts = np.unique(places.token.numpy(), return_inverse=True, return_counts=True)
    frequency = np.floor(np.log2(counts)).astype(np.int64)[kind]
    return places.column.numpy() * 64 + frequency
