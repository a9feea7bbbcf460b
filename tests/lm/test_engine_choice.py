"""Which engine a run takes: asked for, or picked by what fits; recorded, and the same when the run goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import nn

from retrograd import DataStream, Trainer
from retrograd.cli import main
from retrograd.core import check
from retrograd.core.engine import Blocks, Double
from retrograd.lm.engines import Load, choose_engine, graph_bytes
from retrograd.lm.model import causal_objective, load_causal_lm
from retrograd.optim import adamw, sgd

MIB = 1 << 20


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    tiny.save_model(folder / "model")
    tiny.save_jsonl(folder / "train.jsonl", tiny.sentences(12))
    tiny.save_jsonl(folder / "query.jsonl", tiny.sentences(3, seed=1))
    return folder


def magic(world: Path, run: str, *more: str) -> int:
    return main([
        "magic", str(world / run), "--model", str(world / "model"), "--data.dataset", str(world / "train.jsonl"),
        "--query.dataset", str(world / "query.jsonl"), "--train.lr", "1e-2", "--train.eps_root", "1e-6", *more,
    ])  # fmt: skip


def scores(world: Path, run: str) -> torch.Tensor:
    return torch.load(world / run / "scores.pt", weights_only=True)


def recorded(world: Path, run: str) -> tuple[str, str]:
    """The engine of a run, and why it was chosen."""
    manifest = json.loads((world / run / "manifest.json").read_text())
    return manifest["arithmetic"]["engine"], manifest["engine_why"]


@pytest.mark.slow
def test_both_engines_give_a_run_the_same_scores(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for engine in ("auto", "double", "blocks"):
        assert magic(world, engine, "--engine", engine) == 0
    assert check.relative_error(scores(world, "blocks"), scores(world, "double")) < 1e-4
    assert torch.equal(scores(world, "auto"), scores(world, "double"))
    assert recorded(world, "blocks") == ("blocks", "asked for")
    used, why = recorded(world, "auto")
    assert used == "double"
    assert "double takes about" in why
    assert "engine: blocks (asked for)" in capsys.readouterr().out


def test_a_run_goes_on_with_the_engine_it_was_begun_with(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert magic(world, "run", "--engine", "blocks") == 0
    assert magic(world, "run") == 0, "auto: the run's own"
    assert recorded(world, "run")[0] == "blocks"
    capsys.readouterr()
    assert magic(world, "run", "--engine", "double") != 0
    assert "was begun with --engine blocks, now it is double" in " ".join(capsys.readouterr().err.split())
    assert magic(world, "run", "--engine", "double", "--overwrite") == 0
    assert recorded(world, "run")[0] == "double"


def test_blocks_and_dropout_are_refused_together(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert magic(world, "noisy", "--engine", "blocks", "--train.dropout") != 0
    assert "draws dropout layer by layer" in " ".join(capsys.readouterr().err.split())


def model(folder: Path) -> Any:
    return load_causal_lm(str(folder / "model"))


def test_auto_takes_double_where_it_fits_and_blocks_where_it_does_not(world: Path) -> None:
    lm = model(world)
    small, large = (
        choose_engine("auto", lm.module, lm.objective, Load(4, 30, 1, budget)) for budget in (100 * MIB, 1000)
    )
    assert (type(small.engine), small.name) == (Double, "double")
    assert (type(large.engine), large.name) == (Blocks, "blocks")
    assert "0 MiB may be used; blocks takes about" in large.why


def test_auto_weighs_what_the_proofs_hold_whole(world: Path) -> None:
    lm = model(world)
    fits, lacks = (
        choose_engine("auto", lm.module, lm.objective, Load(4, 30, 1, 100 * MIB, 10 * MIB, free))
        for free in (10 * MIB, 9 * MIB)
    )
    assert (fits.name, lacks.name) == ("double", "blocks")
    assert "the proofs before the first step hold about 10 MiB more than the model on every rank" in lacks.why
    assert "9 MiB may be used; blocks takes about" in lacks.why


def test_auto_says_why_it_stays_with_double(world: Path) -> None:
    lm = model(world)
    lm.module.gpt_neox.layers[1] = lm.module.gpt_neox.layers[0]
    chosen = choose_engine("auto", lm.module, causal_objective(lm.module)[0], Load(4, 30, 1, 0))
    assert chosen.name == "double"
    assert "but GPTNeoXForCausalLM cannot be cut into a chain of its layers" in chosen.why
    with pytest.raises(ValueError, match="cannot be cut into a chain"):
        choose_engine("blocks", lm.module, lm.objective)
    with pytest.raises(ValueError, match="unknown engine 'triple'; the engines are auto, double, blocks"):
        choose_engine("triple", lm.module, lm.objective)


def test_the_graph_is_predicted_from_short_rows(world: Path) -> None:
    """What autograd holds for 3 rows of 28 tokens, counted, against the prediction from rows of 4, 8 and 12."""
    from retrograd.lm import engines

    lm = model(world)
    predicted = graph_bytes(lm.module, lm.objective, 1, 28) / engines._PENDING
    assert predicted == pytest.approx(engines._saved_bytes(lm.module, lm.objective, 28), rel=0.02)
    assert graph_bytes(lm.module, lm.objective, 3, 28) == pytest.approx(3 * predicted * engines._PENDING, rel=1e-3)


def test_the_trainer_takes_either_engine(world: Path, tmp_path: Path) -> None:
    found = []
    for engine in ("double", "blocks"):
        trainer, state = Trainer.initialize(model(world).module, adamw(1e-2, eps_root=1e-6), engine=engine)
        stream = DataStream([[5, 3, 4, 2], [7, 8, 9], [4, 4, 6, 10, 3]], 2)
        final = trainer.train(state, stream, tmp_path / engine)
        query = trainer.evaluate(final, DataStream([[3, 5, 7]], 1))
        found.append(trainer.backward(tmp_path / engine, stream, query).weight_grads)
    assert check.relative_error(found[1], found[0]) < 1e-4
    other = Trainer.initialize(model(world).module, adamw(1e-2, eps_root=1e-6), engine="double")[0]
    with pytest.raises(Exception, match="was written by another run"):
        other.backward(tmp_path / "blocks", stream, query)


def test_a_loss_of_ones_own_takes_double() -> None:
    with pytest.raises(ValueError, match="engine 'blocks' needs a Hugging Face language model"):
        Trainer.initialize(nn.Linear(2, 1), sgd(0.1), lambda p, x: x, engine="blocks")
