"""Queries asked after further training: held against both trainings taken one after the other."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import quiz
import tiny
import torch
import yaml
from torch import Tensor

from retrograd.cli import main
from retrograd.core.optim import Params
from retrograd.runs.assemble import assemble
from retrograd.runs.phases import Phases
from retrograd.runs.run_folder import open_run
from retrograd.runs.setup import Setup, set_up_recipe
from retrograd.runs.states.budget import Replay
from retrograd.settings.run import MagicConfig, QueryConfig, settings_from
from retrograd.settings.train import DataConfig, LoraConfig, TrainConfig, TrainRunConfig

PLAN = Replay(plan="all", memory=1 << 30, disk=0)
RECIPE = TrainConfig(lr=3e-3, batch_size=4, eps_root=1e-4)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, what was fine-tuned from its model, and a file with another recipe."""
    folder = tmp_path_factory.mktemp("world")
    quiz.save(folder / "model", positions=64)
    for name, count, seed in (("pre", 12, 0), ("fine", 8, 7), ("last", 6, 8), ("query", 3, 1)):
        tiny.save_jsonl(folder / f"{name}.jsonl", tiny.sentences(count, seed=seed))
    rows = "".join(json.dumps(row) + "\n" for row in quiz.questions(4, 3))
    (folder / "quiz.jsonl").write_text(rows)
    flags = ["--train.batch_size", "4", "--train.lr", "3e-3", "--train.eps_root", "1e-4"]
    model, query = ["--model", str(folder / "model")], ["--query.dataset", str(folder / "query.jsonl")]
    assert main(["train", str(folder / "pre"), *model, "--data.dataset", str(folder / "pre.jsonl"), *flags]) == 0
    after = ["--model", str(folder / "pre/model"), "--data.dataset", str(folder / "fine.jsonl"), *query, *flags]
    assert main(["magic", str(folder / "fine"), *after]) == 0
    recipe = {"optimizer": "sgd", "lr": 0.05, "batch_size": 3, "momentum": 0.9}
    (folder / "last.yaml").write_text(yaml.safe_dump({"data": {"dataset": f"{folder}/last.jsonl"}, "train": recipe}))
    queries = {
        "later": {"dataset": f"{folder}/query.jsonl", "then": [f"{folder}/fine"]},
        "now": {"dataset": f"{folder}/query.jsonl"},
        "gap": {"contrast": ["later", "now"]},
    }
    (folder / "queries.yaml").write_text(yaml.safe_dump(queries, sort_keys=False))
    run = ["magic", str(folder / "scores"), "--config", str(folder / "pre/run_config.yaml")]
    assert main([*run, "--query_file", str(folder / "queries.yaml"), "--replay.keep"]) == 0
    return folder


def told(run: Path, name: str) -> dict:
    return json.loads((run / "queries" / name / "query.json").read_text())


def test_the_value_has_the_bits_of_the_run_that_follows(world: Path) -> None:
    later = told(world / "scores", "later")
    assert later["values_nats"] == told(world / "fine", "query")["values_nats"]
    assert later["then"] == [{"path": str(world / "fine"), "steps": 2, "rows": 8}]
    assert "then" not in told(world / "scores", "now")
    scores = torch.load(world / "scores/scores.pt", weights_only=True)
    assert torch.allclose(scores[:, 2], scores[:, 0] - scores[:, 1], atol=1e-7)
    assert not torch.allclose(scores[:, 0], scores[:, 1], rtol=1e-2)


def settings(world: Path, **more: Any) -> MagicConfig:
    given = {
        "model": str(world / "model"),
        "dtype": "float64",
        "data": DataConfig(str(world / "pre.jsonl")),
        "train": RECIPE,
    }
    return MagicConfig(run=world / "nowhere", **{**given, **more})


def followed(world: Path, first: Setup, weights: Tensor, model: Path | None = None) -> Params:
    """The twin: the run at some weights, then the two phases by hand, each a run of its own."""
    params = first.trajectory(PLAN, weights=weights, identity="w").train().params
    for file in (world / "fine/run_config.yaml", world / "last.yaml"):
        recipe = dataclasses.replace(
            settings_from(TrainRunConfig, file),
            model=str(model or world / "model"),
            dtype="float64",
            run=world / "nowhere",
        )
        setup = set_up_recipe(recipe)
        begun = setup.initial._replace(params=params)
        params = dataclasses.replace(setup, initial=begun).trajectory(PLAN).train().params
    return params


def test_scores_are_the_derivatives_of_all_trainings_in_a_row(world: Path) -> None:
    then = (str(world / "fine"), str(world / "last.yaml"))
    asked = {
        "text": QueryConfig(str(world / "query.jsonl"), then=then),
        "quiz": QueryConfig(str(world / "quiz.jsonl"), form="cloze", then=then),
    }
    loaded = assemble(settings(world, queries=asked))
    plain = assemble(settings(world, queries={k: dataclasses.replace(q, then=()) for k, q in asked.items()}))
    trajectory = loaded.trajectory(PLAN)
    values, gradient = loaded.queries(trajectory.train().params)
    scores = trajectory.reverse(gradient).double()
    ones = loaded.stream.weights
    assert torch.allclose(values, plain.queries.values(followed(world, plain, ones)), rtol=1e-12)
    v = torch.randn(ones.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    h = 1e-4
    up, down = (plain.queries.values(followed(world, plain, ones + sign * h * v)) for sign in (1, -1))
    assert torch.allclose(scores @ v, (up - down) / (2 * h), rtol=1e-5)
    without = plain.trajectory(PLAN)
    direct = without.reverse(plain.queries(without.train().params)[1]).double()
    assert not torch.allclose(direct @ v, (up - down) / (2 * h), rtol=1e-2)  # the phases count


def test_columns_share_what_is_trained(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = list[int]()
    pull = Phases._pulled
    monkeypatch.setattr(Phases, "_pulled", lambda own, *given: calls.append(len(own.columns)) or pull(own, *given))
    query = QueryConfig(str(world / "query.jsonl"), reduction="none", then=(str(world / "last.yaml"),))
    other = QueryConfig(str(world / "pre.jsonl"), then=query.then)
    loaded = assemble(settings(world, queries={"a": query, "b": other, "gap": QueryConfig(contrast=("a", "b"))}))
    values, _ = loaded.queries(loaded.initial.params)
    assert len(values) == 7
    assert calls == [4]
    loaded.asked[2].release()  # nothing is kept when all are asked
    assert len(loaded.queries(loaded.initial.params)[0]) == 7
    assert calls == [4, 4]
    assert loaded.asked[0].digest != assemble(
        settings(world, queries={"a": dataclasses.replace(query, then=())})
    ).asked[0].digest  # fmt: skip


def test_phases_train_as_they_do_by_themselves(world: Path, tmp_path: Path) -> None:
    """A padding token that is a word: training gives it no gradient, and a query does."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    tokenizer = quiz.tokenizer()
    torch.manual_seed(0)
    settings_of = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, pad_token_id=tokenizer(" cat")["input_ids"][0], initializer_range=0.3,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(settings_of).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    query = QueryConfig(str(world / "query.jsonl"), then=(str(world / "fine"), str(world / "last.yaml")))
    loaded = assemble(settings(world, model=str(tmp_path / "model"), query=query))
    start = dataclasses.replace(
        settings(world), model=str(tmp_path / "model"), query=dataclasses.replace(query, then=())
    )
    plain = assemble(start)
    by_hand = plain.queries.values(followed(world, plain, loaded.stream.weights, tmp_path / "model"))
    final = loaded.trajectory(PLAN).train().params
    assert torch.equal(loaded.queries.values(final), by_hand)
    assert torch.equal(loaded.queries(final)[0], by_hand)


def test_runs_of_several_shards_and_other_threads_have_them(world: Path) -> None:
    query = QueryConfig(str(world / "query.jsonl"), then=(str(world / "last.yaml"),))
    one, two = (assemble(settings(world, query=query, shards=shards)) for shards in (1, 2))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        values = two.queries.values(two.initial.params)
        assert torch.get_num_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)
    assert torch.allclose(one.queries.values(one.initial.params), values, rtol=1e-12)


def test_what_has_been_answered_is_not_pulled_back_again(world: Path, tmp_path: Path, monkeypatch: Any) -> None:
    run = Path(shutil.copytree(world / "scores", tmp_path / "run"))
    calls = list[int]()
    pull = Phases._pulled
    monkeypatch.setattr(Phases, "_pulled", lambda own, *given: calls.append(len(own.columns)) or pull(own, *given))
    asked = ["--query.dataset", str(world / "pre.jsonl"), "--query.then", str(world / "fine")]
    assert main(["query", str(run), "--name", "other", *asked]) == 0
    assert calls == [1]


def test_a_recipe_that_is_gone_is_told_with_its_query(world: Path, tmp_path: Path, capsys: Any) -> None:
    run = Path(shutil.copytree(world / "scores", tmp_path / "run"))
    config = (run / "run_config.yaml").read_text()
    (run / "run_config.yaml").write_text(config.replace(str(world / "fine"), str(tmp_path / "gone")))
    plain = ["query", str(run), "--name", "plain", "--query.dataset", str(world / "pre.jsonl")]
    assert main(plain) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "query 'later': --query.then" in error
    assert "It has scores by that: put it back" in error


def test_later_queries_verify_and_retraining_take_it(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(world / "scores", tmp_path / "run"))
    asked = ["--query.dataset", str(world / "query.jsonl"), "--query.then", str(world / "fine")]
    assert main(["query", str(run), "--name", "again", *asked]) == 0
    assert f"again is asked after 2 further steps of {world}/fine." in " ".join(capsys.readouterr().out.split())
    again, first = (torch.load(p, weights_only=True) for p in (run / "queries/again/scores.pt", run / "scores.pt"))
    assert torch.equal(again, first[:, 0])
    assert main(["verify", str(run), "--steps", "2", "--directions", "1"]) == 0
    assert (
        main(["validate", str(run), "--subsets", "2", "--fraction", "0.25", "--weight", "0.95", "--workers", "1"]) == 0
    )
    line = (run / "validation.csv").read_text().splitlines()[1].split(",")
    assert line[2] == "later"
    opened = open_run(run)
    assert abs(float(line[3]) - float(line[4])) < 0.1 * abs(float(line[4]))
    assert opened.loaded.queries.names[:3] == ["later", "now", "gap"]


def test_another_start_is_told(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ["magic", str(tmp_path / "run"), "--config", str(world / "pre/run_config.yaml"), "--train.seed", "3"]
    assert main([*run, "--query.dataset", str(world / "query.jsonl"), "--query.then", str(world / "fine")]) == 0
    assert "began with other parameters than this run ends with" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("more", "recipe", "match"),
    [
        ({}, "gone.yaml", "there is no .*gone.yaml; give the folder of a run"),
        ({}, {"train": {"lr": 1e-3}}, "names no data set"),
        ({}, {"train": {"dropout": True}}, "recipe.yaml trains with dropout"),
        ({"train": dataclasses.replace(RECIPE, dropout=True)}, {}, "a run with --query.then trains with dropout"),
        ({}, {"lora": {"rank": 2}}, "trains adapters of its own"),
        ({}, {"data": {"chunk": 3}}, "chunk"),
        ({}, {"lora": {"adapter": "continue"}}, "trains adapters of its own"),
        ({}, {"train": {"warmup_ratio": 3.0}}, "recipe.yaml: --train.warmup_ratio"),
    ],
)
def test_what_cannot_follow_is_refused(world: Path, tmp_path: Path, more: dict, recipe: object, match: str) -> None:
    file = tmp_path / "recipe.yaml"
    if isinstance(recipe, dict):
        data = {} if recipe.get("train") == {"lr": 1e-3} else {"dataset": str(world / "fine.jsonl")}
        file.write_text(yaml.safe_dump({**recipe, "data": {**data, **recipe.get("data", {})}}))
    then = (str(tmp_path / recipe if isinstance(recipe, str) else file),)
    with pytest.raises(ValueError, match=match):
        assemble(settings(world, query=QueryConfig(str(world / "query.jsonl"), then=then), **more))


def test_adapters_are_trained_on(world: Path) -> None:
    """Phases train the run's own parameters: of a run of adapters, those."""
    query = QueryConfig(str(world / "query.jsonl"), then=(str(world / "last.yaml"),))
    loaded = assemble(settings(world, query=query, lora=LoraConfig(2, 4.0, ("query_key_value",))))
    _, gradient = loaded.queries(loaded.initial.params)
    assert all("lora" in name for name in gradient)
    assert any(float(leaf.abs().max()) > 0 for leaf in gradient.values())


def test_runs_of_other_commands_and_contrasts_are_refused(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "run_config.yaml").write_text("{}")
    (other / "manifest.json").write_text(json.dumps({"command": "unlearn"}))
    query = QueryConfig(str(world / "query.jsonl"), then=(str(other),))
    with pytest.raises(ValueError, match="a run of `retrograd unlearn`, which trains on more than rows"):
        assemble(settings(world, query=query))
    run = ["--config", str(world / "pre/run_config.yaml"), "--query.dataset", str(world / "query.jsonl")]
    assert main(["plan", "magic", str(tmp_path / "x"), *run, "--query.then", str(world / "fine")]) == 2
    assert "whose training a plan does not count" in " ".join(capsys.readouterr().err.split())
    assert (
        main(["query", str(world / "scores"), "--name", "c", "--query.contrast", "later", "now", "--query.then", "x"])
        == 2
    )
    assert "a contrast has no use for then" in " ".join(capsys.readouterr().err.split())
