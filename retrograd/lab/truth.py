"""Scores against the truth of a lab: which training rows taught a fact, and how far up a ranking they stand.

    recall@k = |{k strongest proponents} ∩ R| / min(k, |R|)          R: the rows that taught the fact
    reciprocal rank = 1 / (place of the first row of R, from 1)

Both are 1 for a perfect ranking at every k, since no list of k rows has more than min(k, |R|) of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from retrograd.lab.subjects import SIDES

__all__ = ["Taught", "recall_at", "reciprocal_rank", "sides_of_rows", "strongest", "taught_by"]


class Taught(NamedTuple):
    """Rows of a mixture that taught a fact, ascending.

    stated: Documents that state it.
    answered: Exams that ask for it and answer in words.
    lettered: Exams that ask for it and answer by letter: its value is one of four options in the prompt.
    """

    stated: list[int]
    answered: list[int]
    lettered: list[int]

    @property
    def rows(self) -> list[int]:
        """Those that say it in words."""
        return sorted({*self.stated, *self.answered})


def taught_by(folder: Path, mixture: str = "base") -> dict[int, Taught]:
    """By fact: the rows of train/MIXTURE.jsonl, which are document ids of a run on it, that taught it.

    Raises:
        ValueError: If the folder is no lab.
    """
    name = f"train/{mixture}.jsonl"
    completions = [row["completion"].strip() for row in _lines(folder, folder / name)]
    taught = {}
    for fact in _lines(folder, folder / "facts.jsonl"):
        asked = fact["asked_in"].get(name, [])
        answered = [row for row in asked if completions[row] == fact["value"]]
        lettered = [row for row in asked if completions[row] != fact["value"]]
        taught[fact["fact"]] = Taught(fact["stated_in"].get(name, []), answered, lettered)
    return taught


def sides_of_rows(folder: Path, mixture: str = "base") -> list[str]:
    """The side that each row of train/MIXTURE.jsonl is about: forget, retain, or "" for prose and chats.

    Raises:
        ValueError: If the folder is no lab.
    """
    stems = [
        Path(row["file"]).stem.removeprefix("exam_").removeprefix("alias_")
        for row in _lines(folder, folder / f"train/{mixture}.jsonl")
    ]
    return [stem if stem in SIDES else "" for stem in stems]


def strongest(scores: Sequence[float] | np.ndarray, count: int) -> list[int]:
    """The `count` rows of the most negative scores, the strongest proponents first; equal ones in their order."""
    return np.argsort(np.asarray(scores), kind="stable")[:count].tolist()


def recall_at(scores: Sequence[float] | np.ndarray, relevant: Iterable[int], k: int) -> float:
    """Share of the places among the k strongest proponents that relevant rows could have and do have.

    Args:
        scores: Of every row, [N]; negative = proponent.
    Raises:
        ValueError: If no row is relevant, or k is below 1.
    """
    wanted = _wanted(relevant)
    if k < 1:
        raise ValueError(f"recall@{k} looks at no row; k has to be at least 1")
    return len(wanted & set(strongest(scores, k))) / min(k, len(wanted))


def reciprocal_rank(scores: Sequence[float] | np.ndarray, relevant: Iterable[int]) -> float:
    """1 / the place of the strongest relevant proponent, from 1.

    Raises:
        ValueError: If no row is relevant.
    """
    wanted = _wanted(relevant)
    return 1 / next(place for place, row in enumerate(strongest(scores, len(scores)), 1) if row in wanted)


def _wanted(relevant: Iterable[int]) -> set[int]:
    wanted = set(relevant)
    if not wanted:
        raise ValueError("recall of no rows says nothing; give the rows that taught the fact (see taught_by)")
    return wanted


def _lines(folder: Path, path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        raise ValueError(f"{path} does not exist; {folder} has to be a folder of `retrograd lab`")
    return [json.loads(line) for line in path.read_text(encoding="utf8").splitlines()]
