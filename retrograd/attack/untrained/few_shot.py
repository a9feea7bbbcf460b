"""A few solved questions before each one: relearning in context, of half A alone where the data say so."""

from __future__ import annotations

from retrograd.attack.untrained.contract import Altered, Given, Untraining

__all__ = ["UNTRAINING"]


def _alter(given: Given, strength: float) -> Altered:
    return Altered(given.lm.params, "".join(f"{text}\n\n" for text in given.shots[: int(strength)]))


UNTRAINING = Untraining(
    name="few_shot",
    formula="the first s solved questions before every question; a prompt that is too long loses its beginning",
    strengths=(1, 2, 4, 8, 16),
    alter=_alter,
    reads=("shots",),
    whole=True,
)
