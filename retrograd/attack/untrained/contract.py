"""What an attack without training is: a function of the attacked model and a strength.

    alter(given, strength) → parameters, and what precedes every question

Strength 0 is the model as it is, for every attack. Nothing of what is given is changed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from retrograd.core.optim import Params
from retrograd.data.rows import Rows
from retrograd.lm.model import CausalLM

__all__ = ["Altered", "Given", "Untraining", "delta", "generator", "matrices"]


class Given(NamedTuple):
    """What an attacker has.

    lm: The attacked model; its parameters are the start.
    base: Parameters of the model before unlearning, by the same names; None where there is none.
    rows: Of texts by key of data, as the model reads them: those that the attack names.
    shots: Questions with their answers as texts, of the key shots.
    seed: Of what is drawn.
    """

    lm: CausalLM
    base: Params | None
    rows: dict[str, Rows]
    shots: Sequence[str]
    seed: int


class Altered(NamedTuple):
    """What is asked then: parameters by the names of the model's own, and a text before every question."""

    params: Params
    prefix: str = ""


@dataclass(frozen=True)
class Untraining:
    """An attack without training.

    name: On the command line and in files.
    formula: What it does, in a line.
    strengths: Its usual ones, ascending, without 0.
    alter: (given, strength) → what is asked then.
    needs_base: Whether it takes the model before unlearning.
    reads: Keys of the data that it reads.
    most: The largest strength that it has.
    whole: Whether strengths are whole numbers.
    """

    name: str
    formula: str
    strengths: tuple[float, ...]
    alter: Callable[[Given, float], Altered]
    needs_base: bool = False
    reads: tuple[str, ...] = ()
    most: float = float("inf")
    whole: bool = False


def matrices(params: Params) -> list[str]:
    """Names of the parameters of two dimensions: what is quantised, pruned or has singular directions."""
    return [name for name, leaf in params.items() if leaf.ndim == 2]


def delta(given: Given, name: str) -> Tensor:
    """θ − θ_base of one parameter, in float64."""
    assert given.base is not None, "checked before"
    return given.lm.params[name].double() - given.base[name].double()


def generator(given: Given, *parts: Any) -> torch.Generator:
    """Random numbers of one purpose, the same on every device."""
    digest = hashlib.sha256(repr((given.seed, *parts)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
