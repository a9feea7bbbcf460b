"""Health of a sweep: every finding appears where its cause is, and not elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny

from retrograd.cli import main
from retrograd.core.optim import SGD, AdamW, Muon
from retrograd.core.step import Recipe
from retrograd.runs.health import curvature_limit, recipe_findings, sweep_findings


def kinds(findings) -> list[str]:
    return [finding.kind for finding in findings]


def reverse(norms=None, sizes=None, **more) -> list[dict]:
    norms, sizes = norms or [1.0] * 20, sizes or [1e-3] * 20
    pairs = enumerate(zip(norms, sizes))
    return [{"step": t, "cotangent_norm": [n], "mean_abs_score": [s], **more} for t, (n, s) in pairs]


SMOOTH = Recipe(SGD(0.1))


def test_a_smooth_sweep_has_no_findings() -> None:
    train = [{"step": t, "lr": 0.1, "swallowed": 0.001} for t in range(20)]
    assert sweep_findings(train, reverse(), SMOOTH) == []


def test_a_cotangent_that_grows_is_found_with_its_step() -> None:
    norms = [10.0 ** (2 - t / 10) for t in range(20)]
    found = sweep_findings([], reverse(norms), SMOOTH)
    assert kinds(found) == ["growth"]
    assert found[0].step == 0
    assert "--train.eps_root" in str(found[0])
    assert sweep_findings([], reverse(norms[::-1]), SMOOTH) == []  # shrinking on its way back


def test_scores_that_rank_steps_are_found() -> None:
    sizes = [1e-3 * 10 ** (t / 8) for t in range(20)]
    found = sweep_findings([], reverse(sizes=sizes), SMOOTH)
    assert kinds(found) == ["drift"]
    assert found[0].step == 18


def test_updates_that_round_to_nothing_are_found() -> None:
    train = [{"step": t, "lr": 0.1, "swallowed": 0.4 if t == 4 else 0.0} for t in range(8)]
    train[0] |= {"lr": 0.0, "swallowed": 1.0}  # nothing moves at a learning rate of 0, and nothing is lost
    found = sweep_findings(train, reverse(), SMOOTH)
    assert [(f.kind, f.step) for f in found] == [("swallowed", 4)]


def journal(*losses: float) -> list[dict]:
    return [{"step": t, "lr": 0.1, "loss": loss} for t, loss in enumerate(losses)]


FALLING = [3.0 - 0.05 * t + (0.05, -0.02, 0.03, -0.04)[t % 4] for t in range(40)]


def test_a_spike_of_the_loss_is_found_with_its_step_and_lever() -> None:
    spiked = [loss + 1.2 * (t == 20) + 0.7 * (t == 21) for t, loss in enumerate(FALLING)]
    (found,) = sweep_findings(journal(*spiked), reverse(), SMOOTH)
    assert (found.kind, found.step) == ("spike", 20)
    assert "--train.max_grad_norm" in str(found)
    assert f"{spiked[20]:.3g}" in str(found)


@pytest.mark.parametrize("losses", [
    FALLING, FALLING[:5], [0.5 + 0.1 * t for t in range(40)], [1.0] * 20 + [2.0] * 20,
    [(1.0, 2.0, 3.0)[t * t % 3] for t in range(40)], [loss + 0.1 * (t == 20) for t, loss in enumerate(FALLING)],
], ids=["falling", "short", "rising", "a step up", "noisy", "small"])  # fmt: skip
def test_other_losses_are_no_spikes(losses: list[float]) -> None:
    assert sweep_findings(journal(*losses), reverse(), SMOOTH) == []


@pytest.mark.parametrize("optimizer,limit", [(SGD(0.1), 2), (SGD(0.1, momentum=0.9), 3.8), (AdamW(1e-3), 38)])
def test_a_learning_rate_beyond_stability_is_found(optimizer, limit: float) -> None:
    recipe = Recipe(optimizer)
    assert curvature_limit(recipe) == pytest.approx(limit)
    assert kinds(sweep_findings([], reverse(lr_times_sharpness=1.01 * limit), recipe)) == ["curvature"]
    assert sweep_findings([], reverse(lr_times_sharpness=0.99 * limit), recipe) == []


def test_muon_has_no_such_limit() -> None:
    assert curvature_limit(Recipe(Muon(0.1))) is None


@pytest.mark.parametrize("recipe,batch,dtype,expected", [
    (SMOOTH, 8, "float32", []), (SMOOTH, 8, "bfloat16", ["bfloat16"]), (SMOOTH, 7, "float32", ["batch"]),
    (Recipe(AdamW(1e-3, eps_root=0.0)), 8, "float32", ["eps_root"]), (Recipe(AdamW(1e-3)), 8, "float32", []),
    (Recipe(SGD(0.1), stochastic=True), 8, "float32", ["dropout"]),
])  # fmt: skip
def test_what_a_recipe_gives_away(recipe: Recipe, batch: int, dtype: str, expected: list[str]) -> None:
    assert kinds(recipe_findings(recipe, batch, 100, dtype)) == expected


def test_a_real_run_that_blows_up_says_so(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tiny.save_model(tmp_path / "model")
    tiny.save_jsonl(tmp_path / "train.jsonl", tiny.sentences(64))
    command = [
        "magic", str(tmp_path / "run"), "--model", str(tmp_path / "model"), "--data.dataset",
        str(tmp_path / "train.jsonl"), "--query.dataset", str(tmp_path / "train.jsonl"), "--query.limit", "4",
        "--train.optimizer", "sgd", "--train.lr", "2", "--train.epochs", "3", "--sharpness",
    ]  # fmt: skip
    assert main(command) == 0
    found = json.loads((tmp_path / "run" / "health.json").read_text())["findings"]
    assert "growth" in {finding["kind"] for finding in found}
    told = " ".join(capsys.readouterr().out.split())
    assert "Beware: the cotangent grew" in told
    assert "Lower the learning rate" in told
