"""Scores in JSON files, in every form they are written in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from selecting import ROWS, TAU, double

from retrograd.select.files import Stated, file_scores
from retrograd.select.json_scores import json_columns
from retrograd.select.places import places_of

PLACES = places_of(ROWS)
RECORDS = [{"doc_id": d, "score": s, "scores": {"a": s, "b": 10 * s}} for d, s in enumerate((1.0, 2.0, 3.0))]
PLAIN = [{"doc_id": one["doc_id"], "score": one["score"]} for one in RECORDS]


def scores(folder: Path, content: Any, part: str | None = None, sign: str = "negative") -> tuple[torch.Tensor, bool]:
    path = folder / "scores.json"
    path.write_text(json.dumps(content))
    return file_scores(path, part, PLACES, Stated(sign, "target"))[:2]  # type: ignore[arg-type]


@pytest.mark.parametrize(("content", "part"), [
    ([1, 2, 3], None), ({"0": 1, "2": 3, "1": 2}, None), (PLAIN[::-1], None), ({"examples": PLAIN}, None),
    ({"meaning": "", "examples": RECORDS}, "a"), ({"a": [1, 2, 3], "b": [0, 0, 0]}, "a"),
    ({"a": {"0": 1, "1": 2, "2": 3}, "b": [0, 0, 0]}, "a"),
])  # fmt: skip
def test_scores_of_documents(tmp_path: Path, content: Any, part: str | None) -> None:
    values, per_token = scores(tmp_path, content, part)
    assert not per_token
    assert torch.equal(values, double(1, 2, 3))
    assert torch.equal(scores(tmp_path, content, part, "positive")[0], -double(1, 2, 3))


def test_scores_of_tokens(tmp_path: Path) -> None:
    rows = [row[: len(ids)].tolist() for row, ids in zip(PLACES.scatter(TAU), ROWS.input_ids)]
    values, per_token = scores(tmp_path, rows)
    assert per_token
    assert torch.equal(values, TAU)


def test_columns_have_names() -> None:
    assert json_columns({"a": [1], "b": [2]}) == ["a", "b"]
    assert json_columns({"examples": RECORDS}) == ["a", "b"]
    assert json_columns({"0": 1}) == json_columns([1, 2]) == []


@pytest.mark.parametrize(("content", "part", "told"), [
    ({"a": [1, 2, 3], "b": [1, 2, 3]}, None, "has 2 columns; name one"), ([1, 2, 3], "a", "has no column 'a'"),
    ({"0": 1, "1": 2}, None, "no score for 1 of 3 documents"), ({"0": 1, "1": 2, "7": 3}, None, "document 7 is not"),
    ([*PLAIN, PLAIN[0]], None, "4 scores for 3 different documents"), (["x", "y", "z"], None, "could not convert"),
    ("nothing", None, "holds no scores that can be read"),
])  # fmt: skip
def test_what_cannot_be_read(tmp_path: Path, content: Any, part: str | None, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        scores(tmp_path, content, part)
