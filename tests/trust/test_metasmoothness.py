"""Metasmoothness: the formula, the command, its resume, and that it tells smooth from rough."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch

from retrograd.cli import main
from retrograd.runs.run_folder import open_run
from retrograd.runs.states.relay import relay
from retrograd.trust.smoothness import metasmoothness, perturbed


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    tiny.save_model(folder / "model")
    tiny.save_jsonl(folder / "train.jsonl", tiny.sentences(24))
    tiny.save_jsonl(folder / "query.jsonl", tiny.sentences(2, seed=1))
    return folder


REWRITTEN = ("report.html", "final.safetensors")  # its tensors lie in another order when they were in pieces


def recipe(world: Path, *more: str) -> list[str]:
    return [
        "--model", str(world / "model"), "--data.dataset", str(world / "train.jsonl"),
        "--query.dataset", str(world / "query.jsonl"), "--train.batch_size", "8", "--train.optimizer", "sgd",
        "--train.epochs", "2", *more,
    ]  # fmt: skip


def values(run: Path) -> list[float]:
    return [json.loads(path.read_text())["value"] for path in (run / "metasmoothness").glob("*.json")]


def test_the_formula() -> None:
    draw = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(50, generator=draw, dtype=torch.float64) for _ in range(3))
    d = (c - a).abs()
    naive = sum(
        float(d[j] / d.sum() * torch.sign(b[j] - a[j]) * torch.sign(c[j] - b[j])) for j in range(50)
    )  # fmt: skip
    parts = [{"x": v[:20], "y": v[20:]} for v in (a, b, c)]
    assert metasmoothness(*parts) == pytest.approx(naive, rel=1e-12)
    line = [{"x": a + k * b} for k in range(3)]
    assert metasmoothness(*line) == pytest.approx(1)
    assert metasmoothness({"x": a}, {"x": a + 3 * b}, {"x": a + b}) == pytest.approx(-1)
    with pytest.raises(ValueError, match="differ by 0"):
        metasmoothness({"x": a}, {"x": a}, {"x": a})


def test_noise_is_a_function_of_the_seed() -> None:
    weights = torch.ones(4, 5)
    assert torch.equal(perturbed(weights, 0.0, 3), weights)
    near, far = perturbed(weights, 0.1, 3), perturbed(weights, 0.2, 3)
    torch.testing.assert_close(far - 1, 2 * (near - 1))
    assert not torch.equal(near, perturbed(weights, 0.1, 4))


def test_smooth_and_rough_recipes_are_told_apart(world: Path, tmp_path: Path, capsys) -> None:
    assert main(["metasmoothness", str(tmp_path / "smooth"), *recipe(world, "--train.lr", "0.05")]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "smooth at nearby data weights. That is no forecast" in told
    assert "Forecast: no forecast without scores" in told
    assert "can predict" not in told
    assert main(["metasmoothness", str(tmp_path / "rough"), *recipe(world, "--train.lr", "20")]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "rough at nearby data weights" in told
    assert "Lower --train.lr (now 20)" in told
    assert values(tmp_path / "smooth")[0] > 0.98
    assert values(tmp_path / "rough")[0] < 0.9


def test_before_and_after_a_run(world: Path, tmp_path: Path, capsys) -> None:
    run, more = tmp_path / "run", recipe(world, "--train.lr", "0.05")
    assert main(["metasmoothness", str(run), *more]) == 0
    first = values(run)
    assert main(["magic", str(run), *more]) == 0
    assert main(["metasmoothness", str(run)]) == 0  # the run's own settings; answered from the file
    assert values(run) == first
    shutil.rmtree(run / "metasmoothness")
    files = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name not in REWRITTEN}
    loaded = open_run(run).loaded  # a query by two processes is stopped
    relay(run / "checkpoints", loaded.initial, loaded.training.recipe, (2, 1), loaded.identity)
    assert main(["metasmoothness", str(run)]) == 0  # two trainings: the run itself is the first
    assert values(run) == first
    assert {path: path.read_bytes() for path in files} == files
    assert main(["metasmoothness", str(run), "--train.lr", "0.1", "--h", "0.2"]) == 0
    assert len(values(run)) == 2


def test_a_killed_one_resumes_to_the_same_number(world: Path, tmp_path: Path, monkeypatch) -> None:
    from retrograd.runs import resume

    more = recipe(world, "--train.lr", "0.05", "--replay.heartbeat", "0")
    assert main(["metasmoothness", str(tmp_path / "whole"), *more]) == 0
    calls, original = [], resume.Durable.forward_heartbeat

    def dying(self, state):
        original(self, state)
        calls.append(state.step)
        if len(calls) == 8:  # in the second training
            raise KeyboardInterrupt

    monkeypatch.setattr(resume.Durable, "forward_heartbeat", dying)
    assert main(["metasmoothness", str(tmp_path / "killed"), *more]) == 130
    assert main(["metasmoothness", str(tmp_path / "killed"), *more]) == 0
    assert values(tmp_path / "killed") == values(tmp_path / "whole")
    assert [path.suffix for path in (tmp_path / "killed" / "metasmoothness").iterdir()] == [".json"]


@pytest.mark.parametrize("more,told", [(("--h", "0"), "above 0"), (("--train.lr", "nan"), "finite")])
def test_what_cannot_work_is_refused(world: Path, tmp_path: Path, more, told, capsys) -> None:
    assert main(["metasmoothness", str(tmp_path / "run"), *recipe(world), *more]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
