"""How a model uses its answer letters, whatever it knows: what a broken model does instead of answering.

    shares          how often each letter is chosen
    entropy         −Σ share·log share, nats; log(options) for a model without preference, 0 for a single letter
    constant        accuracy of always answering one letter: how often each is right in these very questions
    calibrated      accuracy after subtracting each letter's mean log-probability over the questions
    rhythm          the largest share of questions answered like the one p places before, over periods p

A constant letter has rhythm 1 at p = 1, and a cycle A B C D A B … at p = 4.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from retrograd.query.choices import Scored

__all__ = ["LetterHabits", "letter_habits"]

PERIODS = 8


class LetterHabits(NamedTuple):
    """Of the answers to questions asked by letter, failed ones left out; see above.

    shares, constant: [most options].
    gold_rhythm: How rhythmic the right answers themselves are, at the same period.
    period: Of the rhythm; 0 if there are too few questions for one.
    mass: Mean probability of all letters together.
    """

    questions: int
    shares: list[float]
    entropy: float
    constant: list[float]
    calibrated: float
    rhythm: float
    gold_rhythm: float
    period: int
    mass: float


def letter_habits(scored: Scored) -> LetterHabits | None:
    """Letter habits of answers in the order of the questions; None if no question was answered.

    Raises:
        ValueError: If the questions were not asked by letter.
    """
    if scored.mass is None:
        raise ValueError("these questions were not asked by letter; letter habits need form='letter'")
    kept = ~scored.failed
    n, options = int(kept.sum()), scored.logprobs.shape[1]
    if not n:
        return None
    chosen, gold, there = scored.chosen[kept], scored.gold[kept], scored.widths[kept] > 0
    shares = torch.bincount(chosen, minlength=options).double() / n
    constant = torch.bincount(gold, minlength=options).double() / n
    s = scored.logprobs[kept].masked_fill(~there, 0.0)
    centred = s - s.sum(0) / there.sum(0).clamp(min=1)
    calibrated = (centred.masked_fill(~there, -torch.inf).argmax(1) == gold).double().mean()
    periods = range(1, min(PERIODS, n // 4) + 1)
    rhythm, period = max(((_alike(chosen, p), p) for p in periods), key=lambda pair: pair[0], default=(0.0, 0))
    return LetterHabits(
        n, shares.tolist(), abs(float(torch.special.xlogy(shares, shares).sum())), constant.tolist(), float(calibrated),
        rhythm, _alike(gold, period) if period else 0.0, period, float(scored.mass[kept].mean()),
    )  # fmt: skip


def _alike(answers: torch.Tensor, period: int) -> float:
    return float((answers[period:] == answers[:-period]).double().mean())
