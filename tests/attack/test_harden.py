"""Weights learnt through unlearning and attack: the mathematics by hand, and the command on a tiny model."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from test_chain import unlearned
from test_chain import world as world

from retrograd.attack import harden as core
from retrograd.cli import main
from retrograd.commands.harden import harden
from retrograd.core.optim import AdamW, Schedule
from retrograd.core.step import Recipe
from retrograd.data.rows import Rows
from retrograd.query.columns import Queries
from retrograd.runs.states.budget import Replay
from retrograd.select import weights as weights_file
from retrograd.settings.attack import Finetune
from retrograd.settings.harden import HardenConfig, attacks_of, check_harden
from retrograd.settings.unlearn import UnlearnConfig, UnlearnTrainConfig
from retrograd.unlearn.setup import assemble

DOCUMENTS = core.Documents(torch.tensor([1, 2, 4, 5, 6]), torch.tensor([0, 0, 1, 2, 2]), 3, slice(3, 4))


def with_coefficients(u: torch.Tensor, *three: float) -> torch.Tensor:
    return torch.cat([u.double(), torch.tensor(three or (0.0, 0.0, 0.0), dtype=torch.float64)])


def test_weights_have_mean_one_and_no_sign() -> None:
    like = torch.ones(4, 3, dtype=torch.float64)
    assert torch.equal(core.weights_of(with_coefficients(torch.zeros(3)), DOCUMENTS, like), like)
    own = torch.tensor([0.0, 2.0, -1.0], dtype=torch.float64)
    u = with_coefficients(own)
    found = core.weights_of(u, DOCUMENTS, like).flatten()
    raised = own.exp()[DOCUMENTS.document]
    assert torch.allclose(found[DOCUMENTS.places], 5 * raised / raised.sum())
    assert found[DOCUMENTS.places].mean() == pytest.approx(1)
    assert (found > 0).all()
    assert (found[[0, 3, 7, 8]] == 1).all()
    assert torch.allclose(
        core.weights_of(with_coefficients(own + 700), DOCUMENTS, like), core.weights_of(u, DOCUMENTS, like)
    )


def test_coefficients_multiply_their_side_alone() -> None:
    like = torch.ones(4, 3, dtype=torch.float64)
    own = torch.tensor([0.0, 2.0, -1.0])
    plain = core.weights_of(with_coefficients(own), DOCUMENTS, like).flatten()
    found = core.weights_of(with_coefficients(own, 0.5, -1.0, 7.0), DOCUMENTS, like).flatten()
    ratio = found / plain
    assert torch.allclose(ratio[DOCUMENTS.places], torch.full((5,), math.exp(0.5), dtype=torch.float64))
    assert torch.allclose(ratio[9:], torch.full((3,), math.exp(-1.0), dtype=torch.float64))
    assert (ratio[[0, 3, 7, 8]] == 1).all()


def test_an_iteration_draws_its_attacks_again_when_it_goes_on() -> None:
    attacks = [Finetune(data=data, lr=1e-3) for data in ("half", "forget", "benign")]
    found = [core.drawn(attacks, number, 2, 3.0) for number in range(40)]
    assert found[7] == core.drawn(attacks, 7, 2, 3.0)
    assert len({tuple(one) for one in found}) == 40
    every = [one for some in found for one in some]
    assert all(1e-3 / 3 <= one.lr <= 3e-3 for one in every)
    assert {one.data for one in every} == {"half", "other_half", "forget", "benign"}
    assert len({one.seed for one in every}) == 80
    assert {one.lr for one in core.drawn(attacks, 0, 3, 1.0)} == {1e-3}


def test_faster_multiplies_every_rate() -> None:
    recipe = Recipe(AdamW(Schedule("linear", 1e-2, 10, 2, start=1e-3, end=1e-4)))
    two: Any = core.faster(recipe, 2.0).optimizer
    old: Any = recipe.optimizer
    assert [two.lr(step) for step in range(10)] == pytest.approx([2 * old.lr(step) for step in range(10)])


def test_the_gradient_is_that_of_the_weights() -> None:
    draw = torch.Generator().manual_seed(0)
    scores = torch.randn(4, 3, generator=draw, dtype=torch.float64)
    u = torch.randn(6, generator=draw, dtype=torch.float64)
    found = core.gradient_of(scores, u, DOCUMENTS, 2.5, ("weights", "coefficients", "lr"))
    assert found[5] == 2.5
    assert core.gradient_of(scores, u, DOCUMENTS, 2.5, ("coefficients",))[[0, 1, 2, 5]].tolist() == [0, 0, 0, 0]
    h = 1e-6
    for place in range(5):
        moved = torch.zeros(6, dtype=torch.float64)
        moved[place] = h
        up, down = (core.weights_of(u + sign * moved, DOCUMENTS, scores) for sign in (1, -1))
        assert float(((up - down) * scores).sum() / (2 * h)) == pytest.approx(float(found[place]), rel=1e-6, abs=1e-9)
    assert float(found[:3].sum()) == pytest.approx(0, abs=1e-12)  # a common factor changes nothing


def test_adam_goes_up() -> None:
    zero = torch.zeros(3, dtype=torch.float64)
    state = core.Ascent(zero, zero, zero)
    target = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    for _ in range(200):
        state = core.ascended(state, target - state.u, 0.1)
    assert torch.allclose(state.u, target, atol=0.05)
    first = core.ascended(core.Ascent(zero, zero, zero), target, 0.1)
    assert torch.allclose(first.u, 0.1 * target.sign())
    assert first.step == 1


def test_the_control_has_the_same_weights_elsewhere() -> None:
    u = torch.arange(20.0)
    found = core.shuffled(u, 0)
    assert torch.equal(found[-3:], u[-3:])
    assert not torch.equal(found, u)
    assert torch.equal(found.sort().values, u)
    assert torch.equal(found, core.shuffled(u, 0))


def test_the_retain_kl_is_zero_at_the_start_and_what_it_says(world: Path, tmp_path: Path) -> None:
    loaded = assemble(UnlearnConfig(
        run=tmp_path / "x", model=str(world / "model"), method="grad_diff", forget=(str(world / "forget.jsonl"),),
        retain=(str(world / "retain.jsonl"),), dtype="float64", train=UnlearnTrainConfig(batch_size=2),
    ))  # fmt: skip
    column = core.retain_kl(loaded, 3)
    start = loaded.initial.params
    assert float(Queries([column]).values(start)) == pytest.approx(0, abs=1e-12)
    draw = torch.Generator().manual_seed(1)
    moved = {name: leaf + 0.05 * torch.randn(leaf.shape, generator=draw, dtype=leaf.dtype)
             for name, leaf in start.items()}  # fmt: skip
    from retrograd.lm.model import bound_model

    call, rows = bound_model(loaded.model.module), loaded.rows
    total, count = 0.0, 0
    for row in (4, 5, 7):  # four forget rows come first; of five retain rows the first, second and fourth
        ids = torch.from_numpy(rows.input_ids[row])[None]
        a, b = (call(params)(input_ids=ids).logits[0, :-1].log_softmax(-1) for params in (start, moved))
        mask = torch.from_numpy(rows.target_mask[row])[1:]
        total += float((a.exp() * (a - b)).sum(-1)[mask].sum())
        count += int(mask.sum())
    assert float(Queries([column]).values(moved)) == pytest.approx(total / count, rel=1e-9)


def test_parts_are_what_was_joined(world: Path, tmp_path: Path) -> None:
    sources = tuple(str(world / f"{name}.jsonl") for name in ("forget", "benign"))
    loaded = assemble(UnlearnConfig(
        run=tmp_path / "x", model=str(world / "model"), method="grad_diff", forget=sources,
        retain=(str(world / "retain.jsonl"),), train=UnlearnTrainConfig(batch_size=2), attribute="tokens",
    ))  # fmt: skip
    second = core.part_rows(loaded.rows, loaded.parts[1])
    assert isinstance(second, Rows)
    assert second.digest()[:16] == loaded.parts[1].digest


def command(world: Path, out: Path, run: Path, *more: str) -> list[str]:
    for name, seed in (("learnt", 0), ("other", 1)):
        (world / f"{name}.yaml").write_text(
            f"- {{data: attack, lr: 3e-3, steps: 2, batch_size: 2, dtype: float64, seed: {seed}, eps_root: 1.0e-4}}\n"
        )
    return ["harden", str(out), "--run", str(run), "--data", f"attack={world}/attack.jsonl", "--tasks",
            str(world / "tasks.yaml"), "--suite", str(world / "learnt.yaml"), "--held_out", str(world / "other.yaml"),
            "--rows", "4", *more]  # fmt: skip


@pytest.mark.slow
def test_weights_are_learnt_and_read_by_the_next_unlearning(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = unlearned(world, tmp_path / "run", "grad_diff")
    arguments = command(world, tmp_path / "out", run)
    assert main([*arguments, "--iterations", "1"]) == 0
    partial = json.loads((tmp_path / "out/harden.json").read_text())
    shutil.rmtree(tmp_path / "out/iterations/001")
    # what is left of iteration 0 is enough to go on from
    state = tmp_path / "out/iterations/000/result.json"
    assert state.exists()
    state.unlink()
    assert main([*arguments, "--iterations", "2"]) == 0
    found = json.loads((tmp_path / "out/harden.json").read_text())
    assert "metasmoothness" in (tmp_path / "out/report.html").read_text()
    assert found["iterations"][:2] == partial["iterations"]
    one, two = found["iterations"][1:]
    assert one["measured_change"] == pytest.approx(one["objective"] - found["iterations"][0]["objective"])
    assert one["measured_change"] > 0
    assert one["measured_change"] == pytest.approx(one["expected_change"], rel=0.5)
    assert two["retain_kl"] > 0
    assert -1 <= two["metasmoothness"] <= 1
    text = (world / "attack.jsonl").read_text()
    (world / "attack.jsonl").write_text(text + text.splitlines()[0] + "\n")
    try:  # other data of an attack: iterations would not belong together
        assert main([*arguments, "--iterations", "3"]) == 2
    finally:
        (world / "attack.jsonl").write_text(text)
    assert "has changed" in capsys.readouterr().err
    assert main([*arguments, "--iterations", "2"]) == 0
    best = tmp_path / "out/best/0"
    info = weights_file.info(best)
    assert info["use"] == "removal"
    assert main([
        "unlearn", "grad_diff", str(tmp_path / "again"), "--model", str(world / "model"), "--forget",
        str(world / "forget.jsonl"), "--retain", str(world / "retain.jsonl"), "--train.batch_size", "2", "--weights",
        str(best), "--dtype", "float64",
    ]) == 0  # fmt: skip


@pytest.mark.slow
def test_coefficients_and_rate_are_learnt_by_the_derivatives_of_retraining(world: Path, tmp_path: Path) -> None:
    """∂J/∂u of all that is learnt, against central differences through unlearning and attack, in float64."""
    from retrograd.commands import harden as command_of

    run = unlearned(world, tmp_path / "run", "grad_diff")
    command(world, tmp_path / "out", run)  # writes the suites
    config = HardenConfig(
        tmp_path / "out", run=run, suite=(str(world / "learnt.yaml"),), held_out=(str(world / "other.yaml"),),
        data=(f"attack={world}/attack.jsonl",), tasks=world / "tasks.yaml", rows=4, mu=0.7,
        learn=("weights", "coefficients", "lr"),
    )  # fmt: skip
    there = command_of._world(config)
    u = 0.3 * torch.randn(there.documents.number + 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    one = command_of._measured(there, tmp_path / "iteration", u, there.learnt, 0)
    found = core.gradient_of(one.scores, u, there.documents, one.slope, config.learn)

    def value(u: torch.Tensor) -> float:
        loaded = command_of._at(there, u)
        start = loaded.trajectory(Replay(plan="binomial", slots=1), identity="x").train().params
        return command_of._after(loaded, there.learnt[0], start) - 0.7 * float(Queries([there.kl]).values(start))

    h = 1e-5
    for place in (0, -3, -2, -1):
        moved = torch.zeros_like(u)
        moved[place] = h
        assert (value(u + moved) - value(u - moved)) / (2 * h) == pytest.approx(float(found[place]), rel=1e-5), place
    told = command_of._settings(there, u)
    assert told["objective.forget"] == pytest.approx(0.5 * math.exp(u[-3]))
    assert told["train.lr"] == pytest.approx(there.unlearning.train.lr * math.exp(u[-1]))


@pytest.mark.slow
def test_drawn_attacks_are_compared_with_themselves(world: Path, tmp_path: Path) -> None:
    run = unlearned(world, tmp_path / "run", "grad_diff")
    more = (
        "--iterations",
        "1",
        "--sample",
        "1",
        "--jitter",
        "2",
        "--learn",
        "weights",
        "coefficients",
        "lr",
        "--lr",
        "0.05",
    )
    assert main([*command(world, tmp_path / "out", run, *more), "--h", "0"]) == 0
    zero, one = json.loads((tmp_path / "out/harden.json").read_text())["iterations"]
    assert zero["attacks"] != one["attacks"]
    assert one["measured_change"] == pytest.approx(one["expected_change"], rel=0.5)  # on the attack of iteration 0
    assert one["objective"] - zero["objective"] != pytest.approx(one["measured_change"], rel=1e-6)
    assert {"objective.forget", "objective.retain", "train.lr"} <= one.keys()


def test_a_factor_of_weights_is_a_coefficient_of_linear_methods_alone(world: Path, tmp_path: Path) -> None:
    run = unlearned(world, tmp_path / "run", "npo")
    command(world, tmp_path / "out", run)  # writes the suites
    with pytest.raises(ValueError, match="npo is not linear in its weights"):
        harden(HardenConfig(
            tmp_path / "out", run=run, suite=(str(world / "learnt.yaml"),), held_out=(str(world / "other.yaml"),),
            data=(f"attack={world}/attack.jsonl",), tasks=world / "tasks.yaml", learn=("coefficients",),
        ))  # fmt: skip


def test_what_cannot_work_is_refused(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values: dict[str, Any] = {"run": tmp_path, "suite": ("short",), "held_out": ("latent",), "lab": tmp_path}

    def config(**changes: Any) -> HardenConfig:
        return HardenConfig(tmp_path / "out", **{**values, **changes})

    check_harden(config())
    assert len(attacks_of(("latent",), config(steps=3))) == 2
    for changes, match in (
        ({"suite": ()}, "give --suite"),
        ({"held_out": ("short",)}, "attacks that are not learnt"),
        ({"suite": ("untrained",)}, "trains nothing"),
        ({"lab": None}, "either --lab DIR"),
        ({"iterations": 0}, "iterations is 0"),
        ({"mu": -1.0}, "mu is -1"),
        ({"learn": ()}, "has to be some of weights, coefficients, lr"),
        ({"learn": ("loss",)}, "has to be some of weights, coefficients, lr"),
        ({"jitter": 2.0}, "goes with --sample"),
        ({"sample": 1, "jitter": 0.5}, "a factor of 1 or more"),
    ):
        with pytest.raises(ValueError, match=match):
            check_harden(config(**changes))
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("mine")
    assert main(command(world, tmp_path / "full", tmp_path)) == 2
    assert "no folder of `retrograd harden`" in capsys.readouterr().err


def test_a_refusal_does_not_claim_the_folder(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(world, tmp_path / "out", tmp_path)) == 2  # tmp_path is no run
    assert "run" in capsys.readouterr().err
    assert not (tmp_path / "out/run_config.yaml").exists()
