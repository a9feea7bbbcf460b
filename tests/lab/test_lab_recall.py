"""The benchmark of rankings on the lab: BM25, and how left-out sets are joined with their questions, by hand."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
import lab_recall as bench


def test_bm25_by_hand() -> None:
    texts = ["red gem, red cave", "blue gem", "old bird of the sea"]
    found = bench.bm25(["Red gem?", "bird"], texts, k1=1.5, b=0.75)
    once, twice = math.log(1 + 2.5 / 1.5), math.log(1 + 1.5 / 2.5)  # idf of a word that one, or two of three texts have
    longest, short, long = (1.5 * (0.25 + 0.75 * length / (11 / 3)) for length in (4, 2, 5))
    red = once * 2 * 2.5 / (2 + longest)
    expected = [[red + twice * 2.5 / (1 + longest), twice * 2.5 / (1 + short), 0], [0, 0, once * 2.5 / (1 + long)]]
    np.testing.assert_allclose(found, expected)


def test_left_out_sets_go_with_their_questions(tmp_path: Path) -> None:
    rankings = {
        "one": np.array([[-2.0, -1.0, 0, 0], [0, 0, -1, -2]]),
        "other": np.array([[0, 0, 0, -1.0], [-1, 0, 0, 0]]),
    }
    names = bench.removals(tmp_path, rankings, (1, 2))
    assert names[:4] == [("one", 1, 0), ("one", 1, 1), ("one", 2, 0), ("one", 2, 1)]
    lines = (tmp_path / "removed.txt").read_text().splitlines()
    assert lines == ["0", "3", "0 1", "3 2", "3", "0", "3 0", "0 1"]
    rows = ["subset,fraction,query,predicted,measured"]
    rows += [f"set-{n},0.25,each/{q},{n}.{q},{10 * n}.{q}" for n in range(8) for q in range(2)]
    (tmp_path / "validation.csv").write_text("\n".join(rows))
    predicted, measured = bench.changes(tmp_path, 2)
    found = bench.removal(names, predicted, measured)
    assert found["sets"]["one, 2"] == {"predicted": 2.55, "measured": 25.05, "each": [(2.0, 20.0), (3.1, 30.1)]}
    assert found["foreseen"]["sets"] == 8
    assert found["foreseen"]["lds"] == pytest.approx(1)


def test_lds_is_of_the_sets_that_were_left_out() -> None:
    from retrograd.trust.left_out import random_subset

    draw = np.random.default_rng(0)
    scores = draw.normal(size=(2, 40))
    predicted, measured = {}, {}
    for fraction in bench.FRACTIONS:
        for k in range(6):
            said = -scores[:, random_subset(np.arange(40), fraction, 0, k)].sum(1)
            predicted[str(k), fraction], measured[str(k), fraction] = said, np.exp(said)
    for one in bench.lds(scores, predicted, measured, 6, "metagradient").values():
        assert one["mean"] == one["lowest"] == pytest.approx(1)
    with pytest.raises(AssertionError, match="Not equal"):
        bench.lds(scores + 1, predicted, measured, 6, "metagradient")


def test_each_kind_of_truth_has_its_own_questions() -> None:
    asked = [bench.Asked("a", "paraphrase", [0], [1]), bench.Asked("b", "heldout", [2], [])]
    assert list(bench.kinds(asked).values()) == [[(0, [1])], [(0, [1, 0])], [(1, [2])]]
    found = bench.recall(asked, np.array([[0.0, -1, 0], [-2, -1, 0]]))
    assert [one["recall@1"] for one in found.values()] == [1, 1, 0]
    assert [one["MRR"] for one in found.values()] == [1, 1, pytest.approx(1 / 3)]
