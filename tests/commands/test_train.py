"""`retrograd train`: the bits of the training that `magic` does, a model that loads, resume after a kill."""

from __future__ import annotations

import gzip
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import quiz
import tiny
import torch
from killing import kill_after

from retrograd.cli import main
from retrograd.core.step import Training
from retrograd.core.sweep import Event, Reversed
from retrograd.lm.model import load_causal_lm, load_tokenizer
from retrograd.proofs import first_step
from retrograd.runs.files import read_tensors
from retrograd.runs.journal import Journal

RECIPE = ["--train.lr", "1e-2", "--train.epochs", "2", "--train.batch_size", "4", "--train.eps_root", "1e-6"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    quiz.save(folder / "model", positions=128)
    tiny.save_jsonl(folder / "train.jsonl", tiny.sentences(20))
    tiny.save_jsonl(folder / "query.jsonl", tiny.sentences(2, seed=1))
    (folder / "tasks.yaml").write_text(f"prose: {{dataset: {folder}/query.jsonl, form: text}}\n")
    return folder


def command(world: Path, run: Path, *more: str) -> list[str]:
    data = str(world / "train.jsonl")
    return ["train", str(run), "--model", str(world / "model"), "--data.dataset", data, *RECIPE, *more]


@pytest.fixture(scope="module")
def done(world: Path) -> Path:
    assert main(command(world, world / "done")) == 0
    return world / "done"


def final(run: Path) -> dict[str, torch.Tensor]:
    return read_tensors(run / "checkpoints/final.safetensors")[0]


@pytest.mark.parametrize("name", ["train", "magic"])
def test_a_wish_to_end_during_the_first_steps_proof_is_obeyed_there(
    name: str, world: Path, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proof = first_step.prove_pure

    def asked(training: Training, *given: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return proof(training, *given)

    more = ["--query.dataset", str(world / "query.jsonl")] if name == "magic" else []
    arguments = [name, *command(world, tmp_path / "run", *more)[1:]]
    monkeypatch.setattr(first_step, "prove_pure", asked)
    assert main(arguments) == 143
    assert not list((tmp_path / "run").rglob("*.safetensors"))  # no step was made
    monkeypatch.setattr(first_step, "prove_pure", proof)
    assert main(arguments) == 0
    assert all(torch.equal(x, final(done)[name]) for name, x in final(tmp_path / "run").items())


@pytest.mark.parametrize("name", ["train", "magic"])
def test_a_wish_to_end_is_obeyed_at_the_next_step_forward_and_back(
    name: str, world: Path, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No heartbeat passes: all that there is to go on from is what the wish made durable."""
    heartbeat = "--replay.heartbeat" if name == "magic" else "--heartbeat"
    more = ["--query.dataset", str(world / "query.jsonl")] if name == "magic" else []
    arguments = [name, *command(world, tmp_path / "run", *more, heartbeat, "3600")[1:]]
    write = Journal.__call__

    def asked(journal: Journal, event: Event) -> None:
        write(journal, event)
        if isinstance(event, Reversed) == (name == "magic") and event.step == 4:
            os.kill(os.getpid(), signal.SIGUSR1)

    with monkeypatch.context() as patched:
        patched.setattr(Journal, "__call__", asked)
        assert main(arguments) == 143
    assert main(arguments) == 0
    assert all(torch.equal(x, final(done)[name]) for name, x in final(tmp_path / "run").items())
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    phases = ("train", "reverse") if name == "magic" else ("train",)
    assert sorted((line["phase"], line["step"]) for line in lines) == sorted((p, t) for p in phases for t in range(10))
    if name == "magic":
        assert main(["magic", *command(world, tmp_path / "whole", *more)[1:]]) == 0
        assert (tmp_path / "run/scores.pt").read_bytes() == (tmp_path / "whole/scores.pt").read_bytes()


def test_it_is_the_training_of_magic(done: Path, world: Path, tmp_path: Path) -> None:
    magic = ["magic", *command(world, tmp_path / "run")[1:], "--query.dataset", str(world / "query.jsonl")]
    assert main(magic) == 0
    ours, theirs = final(done), final(tmp_path / "run")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert main(["train", str(tmp_path / "again"), "--config", str(tmp_path / "run/run_config.yaml")]) == 0
    assert all(torch.equal(x, ours[name]) for name, x in final(tmp_path / "again").items())


def test_the_model_is_the_final_state(done: Path) -> None:
    lm = load_causal_lm(str(done / "model"))
    params = {name.removeprefix("params."): x for name, x in final(done).items() if name.startswith("params.")}
    assert params.keys() == lm.params.keys()
    assert all(torch.equal(x, lm.params[name]) for name, x in params.items())
    assert set(json.loads((done / "manifest.json").read_text())["phases"]) == {"train", "model"}


def test_a_finished_one_says_so(done: Path, world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(world, done)) == 0
    assert "is done" in capsys.readouterr().out
    assert main(command(world, done, "--train.lr", "1e-3")) == 2
    assert "train.lr: 0.01 → 0.001" in capsys.readouterr().err


def test_other_commands_refuse_its_folder(done: Path, world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    magic = ["magic", *command(world, done)[1:], "--query.dataset", str(world / "query.jsonl")]
    assert main(magic) == 2
    assert "holds a run of `retrograd train`" in capsys.readouterr().err
    assert main(["verify", str(done)]) == 2
    assert "which has no scores" in capsys.readouterr().err


def test_evaluation_on_the_way_leaves_the_bits(done: Path, world: Path, tmp_path: Path) -> None:
    asked = [
        "--evaluate.tasks",
        str(world / "tasks.yaml"),
        "--evaluate.every",
        "4",
        "--evaluate.keep_best",
        "min:prose",
    ]
    assert main(command(world, tmp_path / "run", "--export", "false", *asked)) == 0
    assert not (tmp_path / "run/model").exists()
    assert (tmp_path / "run/best/best.json").exists()
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["phase"] == "evaluate"] == [0, 4, 8, 10]
    ours = final(tmp_path / "run")
    assert all(torch.equal(x, ours[name]) for name, x in final(done).items())


def test_a_killed_one_goes_on_to_the_same_bits(done: Path, world: Path, tmp_path: Path) -> None:
    arguments = command(world, tmp_path / "run", "--heartbeat", "0")
    kill_after(arguments, tmp_path / "run", "train", 5)
    assert main(arguments) == 0
    ours = final(tmp_path / "run")
    assert all(torch.equal(x, ours[name]) for name, x in final(done).items())
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(10))


def test_documents_that_were_cut_are_told(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(world, tmp_path / "run", "--data.max_length", "4")) == 0
    tokenizer = load_tokenizer(str(world / "model"))
    cut = sum(len(tokenizer(text)["input_ids"]) > 4 for text in tiny.sentences(20))
    told = f"warning: --data.dataset {world}/train.jsonl: {cut} of 20 documents were cut to 4 tokens"
    assert told in capsys.readouterr().err
    assert json.loads((tmp_path / "run/manifest.json").read_text())["rows"]["truncated"] == cut


def test_columns_of_other_names_and_packed_files(world: Path, tmp_path: Path) -> None:
    rows = [{"body": text, "text": "a cat"} for text in tiny.sentences(20)]
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    named = ["--data.dataset", str(tmp_path / "rows.jsonl.gz"), "--data.columns", "text=body"]
    assert main(command(world, tmp_path / "run", *named)) == 0
    assert main(command(world, tmp_path / "plain")) == 0
    ours, theirs = final(tmp_path / "run"), final(tmp_path / "plain")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
