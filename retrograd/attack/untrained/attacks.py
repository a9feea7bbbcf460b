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
    module.UNTRAINING.name: module.UNTRAINING
    for module in (interpolate, ablate_delta, ablate_junk, quantise, prune, noise, few_shot, jailbreak)
}


def find_untraining(attack: Untrained) -> Untraining:
    """The attack of a configuration.

    Raises:
        ValueError: If there is none of this name, or not with these strengths.
    """
    if attack.attack not in UNTRAININGS:
        raise ValueError(f"there is no attack {attack.attack!r} without training; there are {', '.join(UNTRAININGS)}")
    untraining = UNTRAININGS[attack.attack]
    for strength in attack.strengths:
        if strength > untraining.most or (untraining.whole and strength != int(strength)):
            kind = "whole numbers" if untraining.whole else "strengths"
            raise ValueError(
                f"{untraining.name} has no strength {strength:g}; it has {kind} from 0 to {untraining.most:g}"
            )
    return untraining


def strengths_of(attack: Untrained) -> list[float]:
    """The strengths that are asked at, ascending from 0."""
    return sorted({0.0, *(attack.strengths or find_untraining(attack).strengths)})
