"""Metagradients through unlearning and attack, held against retraining both in float64."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import quiz
import tiny
import torch
from torch import Tensor

from retrograd.attack import chained
from retrograd.attack.chain import check_chain, forget_queries, unlearning_of
from retrograd.attack.finetune import After, set_up_phase
from retrograd.attack.folder import read_folder
from retrograd.cli import main
from retrograd.runs.files import read_tensors, write_tensors
from retrograd.runs.kinds import read_settings
from retrograd.runs.states.budget import Replay
from retrograd.settings.attack import Finetune, PhaseConfig
from retrograd.settings.run import QueryConfig
from retrograd.settings.tasks import Task
from retrograd.settings.train import LoraConfig, TrainConfig
from retrograd.settings.unlearn import ChainConfig, UnlearnConfig, UnlearnLoraConfig
from retrograd.trust.left_out import random_subset, without
from retrograd.trust.smoothness import metasmoothness, perturbed
from retrograd.unlearn.setup import assemble

PLAN = Replay(plan="all", memory=1 << 30, disk=0)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    quiz.save(folder / "model", positions=128)
    quiz.save(folder / "other", "llama-tied", positions=128)
    for name, count, seed in (("forget", 4, 3), ("retain", 5, 4), ("benign", 4, 5), ("attack", 5, 8)):
        tiny.save_jsonl(folder / f"{name}.jsonl", tiny.sentences(count, seed=seed))
    for name, seed in (("asked", 1), ("kept", 2)):
        rows = quiz.questions(4, seed)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tasks.yaml").write_text(
        f"asked: {{dataset: {folder}/asked.jsonl, form: cloze, role: forget}}\n"
        f"kept: {{dataset: {folder}/kept.jsonl, form: cloze, role: retain}}\n"
    )
    (folder / "suite.yaml").write_text(
        "- {data: attack, before: benign, before_steps: 2, lr: 3e-3, steps: 2, batch_size: 2, dtype: float64}\n"
    )
    return folder


def unlearned(world: Path, run: Path, method: str = "npo", *more: str) -> Path:
    assert main([
        "unlearn", method, str(run), "--model", str(world / "model"), "--forget", str(world / "forget.jsonl"),
        "--retain", str(world / "retain.jsonl"), "--train.batch_size", "2", "--train.lr", "3e-3", "--dtype", "float64",
        "--train.eps_root", "1e-4", *more,
    ]) == 0  # fmt: skip
    return run


def command(world: Path, out: Path, run: Path) -> list[str]:
    data = [flag for key in ("benign", "attack") for flag in ("--data", f"{key}={world}/{key}.jsonl")]
    return ["attack", str(out), "--model", str(run / "model"), "--base", str(world / "model"), *data, "--tasks",
            str(world / "tasks.yaml"), "--suite", str(world / "suite.yaml"), "--attribute", "--subsets", "3", "--fraction", "0.2"]  # fmt: skip


@pytest.fixture(scope="module")
def attacked(world: Path) -> Path:
    """Unlearned and attacked in float64, the attack in two phases."""
    run = unlearned(world, world / "run")
    assert main(command(world, world / "out", run)) == 0
    return world / "out"


def place_of(out: Path) -> Path:
    folder = read_folder(out)
    target = next(one for one in folder.targets if one.role == "model")
    return out / "attributed" / target.name / next(iter(folder.configurations))


@cache
def loaded_of(world: Path, run: Path) -> Any:
    """What the twin trains, whatever its data weights."""
    return assemble(UnlearnConfig(
        run=run, model=str(world / "model"), method="npo", forget=(str(world / "forget.jsonl"),),
        retain=(str(world / "retain.jsonl"),), dtype="float64", attribute="tokens",
        queries=forget_queries(
            {"asked": Task(str(world / "asked.jsonl"), form="cloze", role="forget")}, None
        ),
        train=UnlearnConfig().train.__class__(batch_size=2, lr=3e-3, eps_root=1e-4),
    ))  # fmt: skip


def value(world: Path, run: Path, weights: Tensor | None = None, direct: bool = False) -> Tensor:
    """The twin: unlearning and both phases trained again at other data weights, the forget loss asked."""
    loaded = loaded_of(world, run)
    if weights is None:
        weights = loaded.stream.weights
    params = loaded.trajectory(PLAN, weights=weights, identity="w").train().params
    for key, lr in () if direct else (("benign", 3e-3), ("attack", 3e-3)):
        phase = PhaseConfig(
            run=run / key, model="", dtype="float64", sources=(str(world / f"{key}.jsonl"),), steps=2,
            train=TrainConfig(lr=lr, weight_decay=0.01, batch_size=2, warmup_ratio=0.0),
        )  # fmt: skip
        setup = set_up_phase(phase, After(loaded.model, loaded.tokenizer, params, 1))[0]
        params = setup.trajectory(PLAN).train().params
    return loaded.queries(params)[0]


def test_scores_are_what_retraining_both_measures(attacked: Path, world: Path, tmp_path: Path) -> None:
    run = place_of(attacked) / "unlearn"
    scores = torch.load(run / "scores.pt", weights_only=True).double()
    told = json.loads((place_of(attacked) / "unlearn/queries/asked/query.json").read_text())
    assert float(value(world, tmp_path / "x")) == pytest.approx(told["values_nats"][0], rel=1e-12)
    draw = torch.Generator().manual_seed(0)
    ones = torch.ones_like(scores)
    for side in (slice(0, 4), slice(4, 9)):  # forget rows, retain rows
        v = torch.zeros_like(scores)
        v[side] = torch.randn(v[side].shape, generator=draw, dtype=torch.float64)
        h = 1e-4
        up, down = (value(world, tmp_path / "x", ones + sign * h * v) for sign in (1, -1))
        measured, predicted = float((up - down) / (2 * h)), float((scores * v).sum())
        assert abs(measured) > 1e-8
        assert predicted == pytest.approx(measured, rel=1e-5)
        # the attack counts: without it the derivative is another
        a, b = (value(world, tmp_path / "x", ones + sign * h * v, direct=True) for sign in (1, -1))
        assert abs(float((a - b) / (2 * h)) / measured - 1) > 1e-3


@pytest.mark.slow
def test_sets_left_out_are_retrained_and_held_against_the_scores(attacked: Path, world: Path, tmp_path: Path) -> None:
    run = place_of(attacked) / "unlearn"
    lines = [json.loads(line) for line in (run / "validation.jsonl").read_text().splitlines()]
    assert [line["set"] for line in lines] == [0, 1, 2]
    scores = torch.load(run / "scores.pt", weights_only=True)
    forget = [place for place in range(scores.numel()) if place < 4 * scores.shape[1] and scores.flatten()[place] != 0]
    left_out = random_subset(np.array(forget), 0.2, 0, 1)
    assert lines[1]["tokens"] == len(left_out)
    assert lines[1]["predicted"][0] == pytest.approx(-float(scores.flatten()[left_out].sum()), rel=1e-9)
    weights = without(torch.ones_like(scores), left_out)
    change = float(value(world, tmp_path / "x", weights) - value(world, tmp_path / "x"))
    assert lines[1]["measured"][0] == pytest.approx(change, rel=1e-6)
    told = json.loads((run / "validation.json").read_text())
    assert told["sets"] == 3
    assert told["interval"][0] <= told["lds"] <= told["interval"][1]


@pytest.mark.slow
def test_its_folder_is_verified_validated_and_judged_like_any_other(
    attacked: Path, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(place_of(attacked) / "unlearn", run)
    assert main(["verify", str(run), "--steps", "2", "--strict"]) == 0
    told = json.loads((run / "verify.json").read_text())
    assert told["verdict"] == "certified"
    checks = {check["name"]: check for check in told["checks"]}
    for name in ("query", "adjoint", "retraining", "float64 adjoint", "float64 retraining"):
        assert checks[name]["verdict"] == "passed", name
    assert main(["validate", str(run), "--subsets", "3", "--fraction", "0.2", "--tokens", "True"]) == 0
    assert main(["metasmoothness", str(run), "--h", "0.01"]) == 0
    loaded = chained.assemble(read_settings(run))
    assert loaded.after is not None
    final = loaded.trajectory(PLAN).train().params
    finals = [loaded.after(loaded.trajectory(PLAN, weights=perturbed(loaded.training.weights, k * 0.01, 0), identity="x").train().params)
              for k in range(3)]  # fmt: skip
    (path,) = (run / "metasmoothness").glob("*.json")
    assert json.loads(path.read_text())["value"] == pytest.approx(metasmoothness(*finals), abs=1e-9)
    values, slopes = loaded.queries(final)
    assert float(values) == pytest.approx(float(value(world, tmp_path / "x")), rel=1e-9)
    direct = chained.unlearning.assemble(read_settings(run)).queries(final)
    assert abs(float(values) / float(direct[0]) - 1) > 1e-3  # the attack counts
    assert all(slopes[name].shape == direct[1][name].shape for name in slopes)
    tensors, about = read_tensors(run / "queries/asked/gradient.safetensors")
    name = next(name for name in tensors if name.startswith("gradient."))
    write_tensors(run / "queries/asked/gradient.safetensors", {**tensors, name: 1.01 * tensors[name]}, about)
    assert main(["verify", str(run), "--steps", "0", "--directions", "0"]) == 1  # a gradient that is not the chain's
    capsys.readouterr()
    text = (world / "attack.jsonl").read_text()
    (world / "attack.jsonl").write_text(text + text.splitlines()[0] + "\n")
    try:
        with pytest.raises(ValueError, match="which is gone or has changed"):
            chained.assemble(read_settings(run))
    finally:
        (world / "attack.jsonl").write_text(text)


def test_a_folder_that_does_not_tell_its_attack_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not tell its attack"):
        chained.assemble(ChainConfig(run=tmp_path))


@pytest.mark.slow
def test_it_is_done_once_and_resumes(attacked: Path, world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = place_of(attacked)
    whole = (place / "unlearn/scores.pt").read_bytes()
    assert not (place / "unlearn/cotangent.safetensors").exists()
    assert not any((place / "attack").glob("checkpoints/*"))
    capsys.readouterr()
    assert main(command(world, attacked, world / "run")) == 0
    assert "these are its scores" in " ".join(capsys.readouterr().out.split())
    manifest = json.loads((place / "unlearn/manifest.json").read_text())
    del manifest["phases"]["scores"]
    (place / "unlearn/manifest.json").write_text(json.dumps(manifest))
    (place / "unlearn/scores.pt").unlink()
    assert main(command(world, attacked, world / "run")) == 0
    assert (place / "unlearn/scores.pt").read_bytes() == whole


def test_what_derivatives_cannot_pass_through_is_refused(world: Path, tmp_path: Path) -> None:
    full = UnlearnConfig(run=tmp_path)
    check_chain(Finetune(), full, whole=True)
    own_rank = UnlearnConfig(run=tmp_path, method="circuit_breakers", lora=UnlearnLoraConfig(rank=None, alpha=None))
    for one, given, match in (
        (Finetune(rank=2), full, "trains adapters"),
        (Finetune(), UnlearnConfig(run=tmp_path, lora=LoraConfig(2)), "trains adapters"),
        (Finetune(), own_rank, "trains adapters"),
        (Finetune(), UnlearnConfig(run=tmp_path, lora=LoraConfig(adapter="continue")), "not --lora.adapter continue"),
        (Finetune(dtype="bfloat16"), full, "bfloat16 are mostly noise"),
        (Finetune(dtype="float64"), full, "one precision"),
    ):
        with pytest.raises(ValueError, match=match):
            check_chain(one, given, whole=True)
    with pytest.raises(ValueError, match="an attack trains all"):
        check_chain(Finetune(), full, whole=False)
    with pytest.raises(ValueError, match="no run of `retrograd unlearn`"):
        unlearning_of(str(world / "model"))


def test_forget_tasks_are_queries() -> None:
    tasks = {"a": Task("a.jsonl", form="cloze", role="forget", limit=3), "b": Task("b.jsonl"),
             "c": Task("c.jsonl", form="text", role="forget")}  # fmt: skip
    found = forget_queries(tasks, 5)
    assert found == {"a": QueryConfig("a.jsonl", form="cloze", limit=3)}


def test_a_run_that_trained_a_part_of_the_model_is_refused_before_the_attack(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The attack would train that part alone, which is another attack than the one that is measured."""
    run = unlearned(world, tmp_path / "run", "rmu")
    assert main(command(world, tmp_path / "out", run)) == 2
    assert "rmu trains some of the parameters" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
