"""The forecast of LDS: what it measures, what it says, and where it says nothing."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from retrograd.cli import main
from retrograd.core.check import train
from retrograd.runs.run_folder import open_run
from retrograd.runs.trajectory import Ready
from retrograd.trust import forecast as forecasts
from retrograd.trust import metasmoothness
from retrograd.trust.forecast import GRID, HELD_OUT, RANKED, WIDTH, expectation, expected
from retrograd.trust.left_out import random_subset


def test_six_removals_are_held_against_the_scores(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(shutil.copytree(small / "run", tmp_path / "run"))
    assert main(["magic", "--config", str(run / "run_config.yaml"), str(run)]) == 0
    assert "Forecast: none yet. `retrograd metasmoothness" in " ".join(capsys.readouterr().out.split())
    assert main(["metasmoothness", str(run)]) == 0
    found = json.loads((run / "forecast.json").read_text())
    assert found["told"] in " ".join(capsys.readouterr().out.split())
    opened = open_run(run)
    training, start = opened.loaded.training, opened.loaded.initial.params
    scores = torch.load(run / "scores.pt", weights_only=True).double()
    sets = [random_subset(np.arange(20), 0.1, 1, number) for number in range(6)]
    prediction = np.array([-scores[chosen].sum(0).numpy() for chosen in sets])
    values = []
    for chosen in sets:
        weights = torch.ones(20)
        weights[torch.from_numpy(chosen)] = 0
        values.append(opened.loaded.queries.values(train(training, start, weights).params).double().numpy())
    naive = np.mean([stats.pearsonr(prediction[:, k], np.array(values)[:, k]).statistic for k in range(2)])
    assert found["correlation"] == pytest.approx(naive, abs=2e-3)  # stacks round otherwise
    monkeypatch.setattr(Ready, "final", lambda *given: pytest.fail("trained again"))
    assert main(["metasmoothness", str(run)]) == 0  # answered from the files
    capsys.readouterr()
    assert main(["magic", "--config", str(run / "run_config.yaml"), str(run)]) == 0
    assert found["told"] in " ".join(capsys.readouterr().out.split())
    assert "forecast: " in (run / "report.html").read_text()


def test_retrainings_that_diverge_are_the_forecast(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(shutil.copytree(small / "run", tmp_path / "run"))
    monkeypatch.setattr(forecasts, "carry_out", lambda *given: None)  # as if all had failed
    assert main(["metasmoothness", str(run)]) == 0
    found = json.loads((run / "forecast.json").read_text())
    assert found["expected"] is None
    assert found["told"].startswith("do not act on these scores: 6 of 6 retrainings")
    shutil.rmtree(run / "metasmoothness")
    assert main(["metasmoothness", str(run), "--train.lr", "2e-3"]) == 0  # another recipe's scores are not these
    assert json.loads((run / "forecast.json").read_text()) == found


def test_expectations_follow_the_grid() -> None:
    off = []
    for r, lds in GRID:
        one = expected(r)
        assert one.low is not None
        assert one.high is not None
        assert one.expected is not None
        assert one.low <= one.expected <= one.high
        off.append(abs(one.expected - lds))
        assert f"{RANKED[0]:.2f} [{RANKED[1]:.2f}, {RANKED[2]:.2f}]" in one.told
    assert np.mean(off) < 0.15 < np.mean([abs(np.median([lds for _, lds in GRID]) - lds) for _, lds in GRID])
    smooth, rough = expected(0.995), expected(0.5)
    assert smooth.expected is not None
    assert rough.expected is not None
    assert smooth.expected > 0.95 > 0.75 > rough.expected


def test_an_expectation_is_a_mean_of_near_recipes() -> None:
    """Four recipes, of which the far one has next to no weight; by hand, in z."""
    grid = [(0.9, 0.8), (0.95, 0.9), (0.93, 0.85), (-0.5, -0.3)]
    middle, low, high = expectation(0.9, grid)
    by = {r: math.exp(-(((math.atanh(r) - math.atanh(0.9)) / WIDTH) ** 2) / 2) for r, _ in grid}
    by_hand = math.tanh(sum(by[r] * math.atanh(lds) for r, lds in grid) / sum(by.values()))
    assert middle == pytest.approx(by_hand, abs=1e-6)
    assert (low, high) == (0.8, 0.9)
    assert expectation(-0.9, grid)[1:] == (-0.3, 0.85)  # one recipe alone is no range
    assert expectation(0.9, [(1.0, 1.0), (0.9, 0.8)])[0] < 0.9  # a correlation of 1 has a finite z


def test_expectations_tell_apart_what_correlates_almost_fully() -> None:
    """r and LDS of docs/validation.md's two recipes, which are not in the grid."""
    for r, lds in ((0.980, 0.939), (0.997, 0.994)):
        one = expected(r)
        assert one.low is not None
        assert one.high is not None
        assert one.low <= lds <= one.high
    adamw, sgd = expected(0.980).expected, expected(0.997).expected
    assert adamw is not None
    assert sgd is not None
    assert sgd - adamw > 0.015


def test_the_constants_are_those_of_the_grid() -> None:
    assert len(GRID) >= 24
    assert RANKED[0] == pytest.approx(stats.spearmanr(*zip(*GRID, strict=True)).statistic, abs=0.02)  # r is rounded
    assert RANKED[1] < RANKED[0] < RANKED[2]
    assert HELD_OUT[1] <= HELD_OUT[0] <= HELD_OUT[2]
    assert metasmoothness.RANKED[0] < RANKED[0]


def test_nothing_is_expected_of_a_measure_that_does_not_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecasts, "RANKED", (0.6, 0.4, 0.8))
    found = expected(0.99)
    assert found.expected is None
    assert found.told.startswith("no forecast: 6 removals")
    assert "no ground for one" in found.told


def test_few_documents_have_no_six_sets(tmp_path: Path, small: Path) -> None:
    lines = (small / "train.jsonl").read_text().splitlines()[:4]
    (tmp_path / "four.jsonl").write_text("\n".join(lines) + "\n")
    command = ["magic", str(tmp_path / "run"), "--model", str(small / "model"), "--data.dataset",
               str(tmp_path / "four.jsonl"), "--query.dataset", str(small / "query.jsonl")]  # fmt: skip
    assert main(command) == 0
    assert main(["metasmoothness", str(tmp_path / "run")]) == 0
    found = json.loads((tmp_path / "run" / "forecast.json").read_text())
    assert "no 6 different sets" in found["told"]
    assert math.isnan(forecasts.correlation(np.ones((6, 1)), np.arange(6.0)[:, None]))
