"""The attacks without training, by name: the tests' laws run over this list."""

from __future__ import annotations

from retrograd.attack.untrained import (
    ablate_delta,
    ablate_junk,
    few_shot,
    interpolate,
    jailbreak,
    noise,
    prune,
    quantise,
)
from retrograd.attack.untrained.contract import Untraining
from retrograd.settings.attack import Untrained

__all__ = ["UNTRAININGS", "find_untraining", "strengths_of"]

UNTRAININGS: dict[str, Untraining] = {
    one.UNTRAINING.name: one.UNTRAINING
    for one in (interpolate, ablate_delta, ablate_junk, quantise, prune, noise, few_shot, jailbreak)
}


def find_untraining(one: Untrained) -> Untraining:
    """The attack of a configuration.

    Raises:
        ValueError: If there is none of this name, or not with these strengths.
    """
    if one.attack not in UNTRAININGS:
        raise ValueError(f"there is no attack {one.attack!r} without training; there are {', '.join(UNTRAININGS)}")
    found = UNTRAININGS[one.attack]
    for strength in one.strengths:
        if strength > found.most or (found.whole and strength != int(strength)):
            kind = "whole numbers" if found.whole else "strengths"
            raise ValueError(f"{found.name} has no strength {strength:g}; it has {kind} from 0 to {found.most:g}")
    return found


def strengths_of(one: Untrained) -> list[float]:
    """The strengths that are asked at, ascending from 0."""
    return sorted({0.0, *(one.strengths or find_untraining(one).strengths)})
