"""The ends of a ranking are called proponents and detractors only as far as their signs say so."""

from __future__ import annotations

import io
import json
from pathlib import Path

import datasets
import pytest
import torch
from rich.console import Console

from retrograd.data.rows import build_rows
from retrograd.runs.attribute import show_ends
from retrograd.runs.scores import detractors, proponents, ranked, write_scores

CASES = {
    "both": ([-2.0, 3.0, 0.0, -1.0], [0, 3], [1], "only the first 2 are negative: the strongest proponents",
             "only the first 1 are positive: the strongest detractors"),
    "positive": ([2.0, 3.0, 1.0, 4.0], [], [3, 1, 0, 2], "none is negative, so none of these is a proponent",
                 "The 4 highest scores, all positive: the strongest detractors"),
    "negative": ([-2.0, -3.0, -1.0, -4.0], [3, 1, 0, 2], [], "The 4 lowest scores, all negative: the strongest",
                 "none is positive, so none of these is a detractor"),
    "nothing": ([0.0, 0.0, 0.0, 0.0], [], [], "none is negative", "none is positive"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_files_and_summary_call_things_by_their_sign(tmp_path: Path, case: str) -> None:
    values, low, high, lowest, highest = CASES[case]
    rows = build_rows(datasets.Dataset.from_dict({"input_ids": [[1, 2, 3]] * 4}), None)
    scores, steps = torch.tensor([values]), [[k] for k in range(4)]
    order = ranked(scores, rows, steps, [f"text {k}" for k in range(4)])
    assert [one.doc_id for one in proponents(order, 50)] == low
    assert [one.doc_id for one in detractors(order, 50)] == high
    write_scores(tmp_path, scores, rows, steps, order, None, ["query"])
    for end, words in (("lowest", lowest), ("highest", highest)):
        assert words in json.loads((tmp_path / f"{end}_attribution.json").read_text())["meaning"]
    console = Console(file=io.StringIO(), width=120)
    show_ends(order, console)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    for kind, sign, found in (("proponents", "negative", low), ("detractors", "positive", high)):
        assert (f"Strongest {kind} (most {sign})" in printed) == bool(found)
        assert (f"No {kind}: no document has a {sign} score." in printed) == (not found)
    assert {k for k in range(4) if f"text {k}" in printed} == {*low, *high}
