"""Attacks whose steps are shared by the processes of a job: the answers of one process, and folders begun in another way."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import tiny
import torch
from ranks import command
from test_job import killed
from transformers import AutoModelForCausalLM, GPT2Config

from retrograd.cli import main
from retrograd.evaluate.answers import read_measured
from retrograd.runs.manifest import Manifest

TWO_PHASES = "{data: forget, before: benign, before_steps: 2, steps: 3, lr: 1e-2, batch_size: 4, dtype: float64}"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, what attacks train on, and questions."""
    folder = tmp_path_factory.mktemp("world")
    kind = GPT2Config(vocab_size=tiny.VOCABULARY, n_embd=16, n_layer=1, n_head=2, n_positions=64, bos_token_id=0,
                      eos_token_id=0)  # fmt: skip
    for seed, name in enumerate(("base", "unlearned")):
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(kind).save_pretrained(folder / name)
        tiny.save_tokenizer(folder / name)
    for seed, name in enumerate(("forget", "benign")):
        tiny.save_jsonl(folder / f"{name}.jsonl", tiny.sentences(8, seed=seed))
    draw, tasks = random.Random(0), {}
    for role in ("forget", "retain"):
        rows = [{"question": "a cat sat on", "choices": draw.sample(tiny.WORDS, 3), "answer": k % 3} for k in range(4)]
        (folder / f"{role}-asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        tasks[role] = {"dataset": str(folder / f"{role}-asked.jsonl"), "form": "cloze", "role": role}
    (folder / "tasks.yaml").write_text(json.dumps(tasks))
    return folder


def attack(world: Path, out: Path, *more: str, model: str = "base", suite: str = TWO_PHASES) -> list[str]:
    data = [word for key in ("forget", "benign") for word in ("--data", f"{key}={world}/{key}.jsonl")]
    return ["attack", str(out), "--model", str(world / model), "--base", str(world / "base"), *data, "--tasks",
            str(world / "tasks.yaml"), "--suite", f"[{suite}]", "--heartbeat", "0", *more]  # fmt: skip


def shared(how: str, *more: str) -> list[str]:
    return ["--parallel", how, "--patience", "20", *more]


def logprobs(out: Path) -> dict[str, torch.Tensor]:
    """What every option was given, by meeting, run, step and task."""
    found = {}
    for path in sorted(out.glob("models/**/answers/*/*.parquet")):
        found[str(path.relative_to(out))] = read_measured(path)[0].scored.logprobs  # type: ignore[union-attr]
    return found


def distance(one: Path, other: Path) -> float:
    found, expected = logprobs(one), logprobs(other)
    assert found.keys() == expected.keys()
    return max(float((x - expected[name]).abs().max()) for name, x in found.items())


def shards(out: Path) -> list[int]:
    """Of every phase of every meeting."""
    return [Manifest(path).values["arithmetic"]["shards"] for path in sorted(out.glob("models/*/*/*/manifest.json"))]


@pytest.fixture(scope="module")
def alone(world: Path) -> Path:
    assert main(attack(world, world / "alone")) == 0
    return world / "alone"


def test_a_meeting_of_two_phases_in_pieces_is_that_of_one_process(world: Path, alone: Path, tmp_path: Path) -> None:
    assert command(2, attack(world, tmp_path / "two", *shared("shard"))) == [0, 0]
    assert len(logprobs(alone)) == 2 * (3 + 4), "two tasks at the steps of two phases"
    assert 0 < distance(tmp_path / "two", alone) < 1e-12
    assert shards(tmp_path / "two") == [2, 2]


def test_what_was_begun_otherwise_goes_on_its_own_way(
    world: Path, alone: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = (alone / "recovery.json").read_text()
    assert command(2, attack(world, alone, *shared("replicate"))) == [0, 0], "done is done"
    assert (alone / "recovery.json").read_text() == before
    assert main(attack(world, alone, "--shards", "4")) == 0
    assert shards(alone) == [1, 1]
    manifest = next(alone.glob("models/*/*/attack")) / "manifest.json"
    values = json.loads(manifest.read_text())
    try:
        manifest.write_text(json.dumps({**values, "finished": False}))
        assert command(2, attack(world, alone, *shared("replicate"))) == [2, 0]
        assert "begun with 1 logical shards, now 2 processes share steps" in capfd.readouterr().err
        known = (alone / "attack.json").read_text()
        assert main(attack(world, alone, "--shards", "4", suite="{data: forget, steps: 1}")) == 2
        told = capfd.readouterr().err
        assert "begun with 1 logical shards, now --shards is 4:" in told
        assert "To go on, leave --shards out. Or remove" in told
        assert (alone / "attack.json").read_text() == known, "nothing joins in a call that is refused"
    finally:
        manifest.write_text(json.dumps(values))


def test_scores_through_an_attack_are_one_process_s(world: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert command(2, attack(world, world / "scores", *shared("shard"), "--attribute")) == [2, 0]
    assert "goes back through unlearning and attack in one process, and 2 share" in capfd.readouterr().err
    assert main(attack(world, world / "none", "--patience", "0")) == 2
    assert "--patience is 0.0" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("how", "more"), [("replicate", []), ("shard", []), ("shard", ["--replicas", "2"])])
def test_models_and_attacks_without_training_meet_in_turn(
    world: Path, tmp_path: Path, how: str, more: list[str]
) -> None:
    lora = "{data: forget, steps: 2, lr: 1e-2, batch_size: 4, rank: 2, dtype: float64}"
    suite = f"{TWO_PHASES}, {lora}, {{attack: prune, strengths: [0.5]}}"
    one, two = tmp_path / "one", tmp_path / "two"
    assert main(attack(world, one, model="unlearned", suite=suite)) == 0
    assert command(2, attack(world, two, *shared(how, *more), model="unlearned", suite=suite)) == [0, 0]
    assert distance(two, one) < 1e-12
    assert shards(two) == [2] * 6, "two models, three phases"
    found, expected = (json.loads((out / "recovery.json").read_text()) for out in (two, one))
    assert [[point["forget"] for point in meeting["points"]] for meeting in found["meetings"]] == [
        [point["forget"] for point in meeting["points"]] for meeting in expected["meetings"]
    ]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["replicate", "shard"])
def test_a_rank_that_is_lost_in_a_meeting_costs_no_bit(world: Path, tmp_path: Path, how: str) -> None:
    whole, out = tmp_path / "whole", tmp_path / "killed"
    assert command(2, attack(world, whole, *shared(how))) == [0, 0]
    killed(2, 1 if how == "shard" else 0, 2, attack(world, out, *shared(how)))
    assert len(list(out.glob("models/*/*/before/manifest.json"))) == 1
    killed(2, 0, 4, attack(world, out, *shared(how)))
    assert not (out / "recovery.json").exists()
    assert main(attack(world, out)) == 0, "dealt out, which is one process here"
    assert distance(out, whole) == 0
    assert shards(out) == [2, 2]
