"""Interventions other than leaving random sets out: weights, and the strongest share as one number."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from retrograd.cli import main
from retrograd.core.check import train
from retrograd.runs.run_folder import open_run
from retrograd.trust.filtering import matched_positions
from retrograd.trust.left_out import predicted, random_subset, reweighted


@pytest.fixture
def run(small: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small / "run", tmp_path / "run"))


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "validation.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_sets_are_weighed_down_and_up(run: Path, capsys: pytest.CaptureFixture) -> None:
    call = ["validate", str(run), "--subsets", "4", "--fraction", "0.2", "--together", "1"]
    assert main([*call, "--weight", "0.2", "1.8"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "0.2 at weight 0.2: mean LDS" in told
    assert "0.2 at weight 1.8: mean LDS" in told
    found, opened = rows(run), open_run(run)
    training, start = opened.loaded.training, opened.loaded.initial.params
    scores = torch.load(run / "scores.pt", weights_only=True).double()
    chosen = random_subset(np.arange(20), 0.2, 0, 3)
    here = opened.loaded.queries.values(train(training, start).params).double()
    for weight in (0.2, 1.8):
        weights = torch.ones(20)
        weights[torch.from_numpy(chosen)] = weight
        there = opened.loaded.queries.values(train(training, start, weights).params).double()
        these = [row for row in found if (row["subset"], row["weight"]) == ("3", f"{weight:g}")]
        assert [float(row["measured"]) for row in these] == (there - here).tolist()
        np.testing.assert_allclose(
            [float(row["predicted"]) for row in these], (weight - 1) * scores[chosen].sum(0), rtol=1e-5
        )
    assert main(call) == 0  # left out: other retrainings of the same sets
    assert {row["weight"] for row in rows(run)} == {"0"}
    parts = json.loads((run / "validation.json").read_text())["fractions"]
    assert [part["weight"] for part in parts] == [0]


def test_a_weight_multiplies() -> None:
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0])
    changed = reweighted(weights, np.array([1, 3]), 0.5)
    assert changed.tolist() == [1, 1, 3, 2]
    scores = torch.tensor([[1.0, 10.0, 100.0, 1000.0]])
    assert predicted(scores, weights, np.array([1, 3]), 0.5).tolist() == [-(10 + 2000)]
    assert torch.equal(reweighted(torch.tensor([torch.inf, 1.0]), np.array([0]), 0.0), torch.tensor([0.0, 1.0]))


def test_the_strongest_documents_against_random_ones(run: Path, capsys: pytest.CaptureFixture) -> None:
    call = ["validate", str(run), "--subsets", "0", "--top", "0.1", "--rivals", "random", "--together", "1"]
    assert main([*call, "--stop", "3"]) == 0  # named sets go with the first slice
    first = rows(run)
    assert main(call) == 0
    assert rows(run) == first
    assert "The strongest documents (QLD)" in " ".join(capsys.readouterr().out.split())
    own, other = json.loads((run / "validation.json").read_text())["filtering"]
    assert (own["method"], other["method"]) == ("retrograd", "random")
    assert own["left_out"] == 2
    scores = torch.load(run / "scores.pt", weights_only=True).double()
    measured = {(row["subset"], row["query"]): float(row["measured"]) for row in first}
    each = []
    for k in range(2):
        name = f"top-0.1-retrograd-{k}"
        strongest = scores[:, k].sort().values[:2].sum()
        row = next(row for row in first if (row["subset"], row["query"]) == (name, f"query/{k}"))
        assert float(row["predicted"]) == pytest.approx(-float(strongest), rel=1e-5)
        each.append([measured[name, f"query/{k}"] - measured[f"random-0.1-{r}", f"query/{k}"] for r in range(5)])
    extra = np.mean(each, 0)
    assert own["random"]["more"] == pytest.approx(extra.mean())
    expected = stats.t.interval(0.95, 4, loc=extra.mean(), scale=stats.sem(extra))
    assert own["random"]["interval"] == pytest.approx(expected)
    assert own["random"]["below"] == (extra > 0).sum()
    assert own["random"]["more"] > other["random"]["more"]
    assert (
        f'<td class="n">{own["without_the_strongest"]:.3g}</td><td class="n">{own["random"]["more"]:.3g} <'
        in (run / "report.html").read_text()
    )
    assert "matched" not in own


def test_the_strongest_tokens_against_the_same_positions(by_token: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(by_token, tmp_path / "run"))
    assert main(["validate", str(run), "--subsets", "0", "--top", "0.05", "--tokens", "--together", "8"]) == 0
    (own,) = json.loads((run / "validation.json").read_text())["filtering"]
    assert own["random"]["sets"] == own["matched"]["sets"] == 5
    low, high = own["matched"]["interval"]
    assert low < own["matched"]["more"] < high
    assert own["without_the_strongest"] == pytest.approx(own["matched"]["mean"] + own["matched"]["more"])
    names = {row["subset"] for row in rows(run)}
    assert {f"top-0.05-retrograd-{k}-matched-{r}" for k in range(2) for r in range(5)} < names


def test_matched_positions() -> None:
    width, rows_ = 6, 40
    members = np.array([row * width + column for row in range(rows_) for column in range(1, 1 + row % 5 + 1)])
    draw = np.random.default_rng(0)
    chosen = np.sort(draw.choice(members, 12, replace=False))
    seen = set()
    for seed in range(5):
        found, exact = matched_positions(chosen, members, width, np.random.default_rng(seed))
        assert exact == 1
        assert len(set(found)) == 12
        assert not set(found) & set(chosen)
        assert set(found) <= set(members)
        assert sorted(found % width) == sorted(chosen % width)
        seen.add(tuple(found))
    assert len(seen) == 5
    last = members[members % width == 5]  # all of one position: its neighbours stand in
    found, exact = matched_positions(last, members, width, draw)
    assert exact == 0
    assert set(found % width) == {4}
    with pytest.raises(ValueError, match="no other 6 can match"):
        matched_positions(members[:6], members[:8], width, draw)


@pytest.mark.parametrize(("more", "told"), [
    ([], "there is no set to leave out: --subsets is 0, with 1 of --fraction; give 1 or more of both, or the sets by"),
    (["--weight", "1"], "--weight is 1"), (["--weight", "-0.5"], "--weight is -0.5"), (["--top", "0"], "--top is 0"),
    (["--top", "0.99"], "would leave out all of 20"), (["--top", "0.1", "--controls", "4"], "fewer than 5"),
])  # fmt: skip
def test_what_cannot_work_is_refused(small: Path, more: list[str], told: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["validate", str(small / "run"), "--subsets", "0", *more]) == 2
    assert told in capsys.readouterr().err
    assert not (small / "run" / "validation").exists()
