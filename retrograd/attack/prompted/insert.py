"""A prompt put into questions as token ids, which are not written out as text and read again.

    before    p, then the question; after the first special token, where there is one
    after     the question, then p, then the answer

A row that is too long then loses its beginning, or, with a prompt before, what follows that prompt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from retrograd.query.questions import Questions

__all__ = ["inserted", "joined", "some"]


def inserted(questions: Questions, ids: np.ndarray, place: str, *, first: int | None, longest: int | None) -> Questions:
    """The same questions with tokens in each.

    Args:
        ids: Of the prompt, [m].
        place: "before" or "after".
        first: The special token that a text may begin with.
        longest: Tokens that the model can read.
    Raises:
        ValueError: If a prompt and an answer are more than that.
    """
    rows = []
    for number, (options, targets) in enumerate(zip(questions.rows, questions.targets)):
        answers = [0 if questions.form == "letter" else len(target) - 1 for target in targets]
        if longest is not None and len(ids) + max(answers) + 1 > longest:
            raise ValueError(
                f"a prompt of {len(ids)} tokens and the answers to question {number} do not fit into the {longest} "
                "that the model can read; give fewer tokens"
            )
        rows.append([_row(row, ids, answer, place, first, longest) for row, answer in zip(options, answers)])
    return dataclasses.replace(questions, rows=rows)


def _row(
    row: np.ndarray, ids: np.ndarray, answer: int, place: str, first: int | None, longest: int | None
) -> np.ndarray:
    if place == "after":
        end = len(row) - answer
        whole = np.concatenate([row[:end], ids, row[end:]])
        return whole if longest is None else whole[-longest:]
    start = 1 if len(row) and row[0] == first else 0
    rest = row[start:]
    if longest is not None:
        rest = rest[max(0, len(rest) + start + len(ids) - longest) :]
    return np.concatenate([row[:start], ids, rest])


def some(questions: Questions, numbers: Sequence[int]) -> Questions:
    """The questions of these numbers, in this order."""
    return dataclasses.replace(
        questions, rows=[questions.rows[k] for k in numbers], targets=[questions.targets[k] for k in numbers],
        gold=questions.gold[list(numbers)], widths=[questions.widths[k] for k in numbers],
        hashes=[questions.hashes[k] for k in numbers],
        subjects=[questions.subjects[k] for k in numbers] if questions.subjects else [],
    )  # fmt: skip


def joined(parts: Sequence[Questions]) -> Questions:
    """Questions of one form, one after the other."""
    return dataclasses.replace(
        parts[0], rows=[row for part in parts for row in part.rows],
        targets=[target for part in parts for target in part.targets],
        gold=np.concatenate([part.gold for part in parts]), widths=[width for part in parts for width in part.widths],
        hashes=[text for part in parts for text in part.hashes],
        subjects=[subject for part in parts for subject in part.subjects],
    )  # fmt: skip
