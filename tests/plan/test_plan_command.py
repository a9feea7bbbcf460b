"""`retrograd plan`: it says what the run then does, by the run's own code, writes nothing, and refuses what the run would."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from retrograd.cli import main
from retrograd.core import plan as plans
from retrograd.core import tree
from retrograd.plan.described import _Declared, described, loaded
from retrograd.plan.probe import probe
from retrograd.runs.run_folder import describe
from retrograd.settings.plan import PlanConfig
from retrograd.settings.run import DataConfig, MagicConfig, QueryConfig


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    for family in ("gpt-neox", "llama-gqa", "gpt2-tied"):
        tiny.save_model(folder / family, family)
    texts = tiny.sentences(20)
    texts[3] = ""  # no row
    tiny.save_jsonl(folder / "train.jsonl", texts)
    tiny.save_jsonl(folder / "retain.jsonl", tiny.sentences(11, seed=4))
    tiny.save_jsonl(folder / "query.jsonl", tiny.sentences(3, seed=1))
    return folder


def magic(world: Path, run: Path, *more: str) -> list[str]:
    return [
        "magic", str(run), "--model", str(world / "gpt-neox"), "--data.dataset", str(world / "train.jsonl"),
        "--query.dataset", str(world / "query.jsonl"), "--train.lr", "1e-2", "--train.epochs", "2",
        "--train.batch_size", "4", "--replay.memory", "1GiB", *more,
    ]  # fmt: skip


def unlearn(world: Path, run: Path, *more: str) -> list[str]:
    return [
        "unlearn", "npo", str(run), "--model", str(world / "gpt-neox"), "--forget", str(world / "train.jsonl"),
        "--retain", str(world / "retain.jsonl"), "--train.batch_size", "3", *more,
    ]  # fmt: skip


def planned(arguments: list[str], out: Path, *more: str) -> dict[str, Any]:
    assert main(["plan", *more, *arguments, "--json", str(out)]) == 0
    found: dict[str, Any] = json.loads(out.read_text())
    return found


WAYS: dict[str, list[str]] = {
    "auto": [],
    "binomial": ["--replay.plan", "binomial", "--replay.slots", "3", "--engine", "blocks"],
    "disk": ["--replay.plan", "all", "--replay.memory", "0", "--replay.disk", "1GB"],
    "gradients": ["--replay.plan", "gradients", "--replay.slots", "2", "--train.max_grad_norm", "1"],
    "log": ["--replay.plan", "log", "--train.optimizer", "sgd", "--train.micro_batch_size", "2"],
    "unlearn": ["--attribute", "tokens", "--query.dataset", "QUERY", "--replay.plan", "sqrt"],
}


QUICK = ("binomial", "unlearn")
EVERY = [pytest.param(way, marks=() if way in QUICK else pytest.mark.slow) for way in WAYS]


@pytest.mark.parametrize("way", EVERY)
def test_a_plan_says_what_the_run_then_does(way: str, world: Path, tmp_path: Path) -> None:
    make, run = unlearn if way == "unlearn" else magic, tmp_path / "run"
    arguments = make(world, run, *(word.replace("QUERY", str(world / "query.jsonl")) for word in WAYS[way]))
    timed = planned(arguments, tmp_path / "timed.json")
    told = planned(arguments, tmp_path / "told.json", "--model_only")
    assert not run.exists(), "a plan writes nothing where the run would be"
    assert list(tmp_path.iterdir()) == [tmp_path / "timed.json", tmp_path / "told.json"] or way == "disk"
    assert main(arguments) == 0
    manifest = json.loads((run / "manifest.json").read_text())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for found in (timed, told):
        assert found["replay"] == manifest["replay"]
        assert found["state_bytes"] == manifest["replay"]["state_bytes"]
        assert found["steps"]["rows"] == manifest["rows"]["rows"]
        assert found["steps"]["steps"] == manifest["steps"] == sum(line["phase"] == "train" for line in lines)
        assert found["model"]["trained"] == manifest["parameters"]
        assert found["fits"]
    assert timed["engine"] == manifest["arithmetic"]["engine"]
    assert set(timed["seconds"]) == {"before", "train", "query", "reverse"}
    assert all(seconds > 0 for seconds in timed["seconds"].values())
    assert told["seconds"] == {}


def test_a_training_without_a_way_back_is_planned_too(world: Path, tmp_path: Path) -> None:
    found = planned(unlearn(world, tmp_path / "run"), tmp_path / "plan.json")
    assert found["replay"] is None
    assert set(found["seconds"]) == {"before", "train"}
    assert found["disk_bytes"]["model"] == 4 * found["model"]["trained"]
    assert main(unlearn(world, tmp_path / "run")) == 0
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    assert (found["steps"]["steps"], found["model"]["trained"]) == (manifest["steps"], manifest["parameters"])


def config(world: Path, family: str, **more: Any) -> MagicConfig:
    return MagicConfig(
        run=world / "run", model=str(world / family), data=DataConfig(str(world / "train.jsonl")),
        query=QueryConfig(str(world / "query.jsonl")), device="cpu", **more,
    )  # fmt: skip


@pytest.mark.parametrize("family", ["gpt-neox", "llama-gqa", "gpt2-tied"])
def test_a_model_without_weights_has_the_numbers_of_the_loaded_one(
    family: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = loaded(config(world, family)).work
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in (world / family).iterdir():
        if path.suffix == ".json":
            (bare / path.name).write_bytes(path.read_bytes())
    assert not list(bare.glob("*.safetensors"))
    settings = config(world, family)
    told = described(MagicConfig(**{**vars(settings), "model": str(bare)}), PlanConfig()).work
    assert told.steps == whole.steps
    assert told.matter == whole.matter
    assert told.model[:9] == whole.model[:9]
    assert told.asks.columns == whole.asks.columns
    rows, length = whole.steps.largest
    for engine in ("double", "blocks"):  # of a small model of two heads, scaled
        ours, theirs = (work.activations(engine, rows, twice=True) for work in (told, whole))
        assert ours is not None
        assert theirs is not None
        assert abs(ours / theirs - 1) < 0.25, (engine, ours, theirs, length)


def test_the_probe_leaves_the_run_as_it_was(world: Path) -> None:
    found = loaded(config(world, "gpt-neox"))
    assert found.setup is not None
    before = tree.digest(found.initial.params), torch.get_rng_state()
    pace = probe(found.setup, found.work, found.asked, None)
    assert pace.reverse == 0.0  # there is no way back
    assert tree.digest(found.initial.params) == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


def test_the_clock_is_read_once_an_event_and_the_first_of_a_kind_does_not_count(world: Path) -> None:
    """By a clock that ticks once a reading every step takes one tick, whatever it computes."""
    found, ticks = loaded(config(world, "gpt-neox")), itertools.count(1.0)
    assert found.setup is not None
    pace = probe(found.setup, found.work, found.asked, None, lambda: next(ticks))
    tokens = found.work.steps.tokens / found.work.steps.steps
    stream = found.setup.stream
    sizes = [int(stream.rows.lengths[stream.rows_at(step)].sum()) for step in range(len(stream))]
    nearest = min(sizes, key=lambda count: abs(count - tokens))
    assert pace.step == pytest.approx(tokens / nearest)


REFUSED = {
    "retrograd plan takes a command, one of train, magic, .* this one is 'select'": ["select", "out"],
    "retrograd plan takes a command, .* there is none": ["--ranks", "2"],
    "--ranks is 0; it has to be at least 1": ["--ranks", "0", "RUN"],
    "--ranks is 3 and the run's --replicas 2": ["--ranks", "3", "RUN", "--parallel", "shard", "--replicas", "2"],
    "--rate is -1.0; it is operations a second": ["--rate", "-1", "RUN"],
    "--efficiency is 1.5; it is a share": ["--efficiency", "1.5", "RUN"],
    "--disk_rate is 0.0; it is bytes a second": ["--disk_rate", "0", "RUN"],
    "size 'much' is not understood": ["--memory", "much", "RUN"],
    "--rows is 5 and --row_tokens None: give both": ["--rows", "5", "RUN"],
    "--row_tokens is 1; a row without a token": ["--rows", "5", "--row_tokens", "1", "RUN"],
    "--rows reads no data set: say with --questions": ["--rows", "5", "--row_tokens", "9", "RUN"],
    "this run is in float64: give --rate": ["--hardware", "h100", "RUN", "--dtype", "float64"],
    "no query: give --query.dataset": ["magic", "x", "--model", "m", "--data.dataset", "d"],
    "cannot load a tokenizer from 'nowhere'": ["--model_only", "RUN", "--model", "nowhere"],
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_planned_is_refused(
    message: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        word for given in REFUSED[message] for word in (magic(world, tmp_path / "run") if given == "RUN" else [given])
    ]
    assert main(["plan", *arguments]) == 2
    assert re.search(message, " ".join(capsys.readouterr().err.split()))
    assert not (tmp_path / "run").exists()


def test_what_the_run_would_refuse_is_told_with_what_would_do(world: Path, tmp_path: Path) -> None:
    """All states in no memory: the run says so, and so does the plan, which finds another plan."""
    arguments = magic(world, tmp_path / "run", "--replay.plan", "all", "--replay.memory", "0", "--replay.disk", "0")
    found = planned(arguments, tmp_path / "plan.json", "--model_only")
    assert not found["fits"]
    assert "plan 'all' holds 10 states" in found["refused"]
    assert found["remedy"]["fits"]
    assert main(arguments) == 2


def test_what_is_described_of_a_layout_is_what_its_plan_does() -> None:
    """The manifest's numbers are counted on the plan's actions, independently of what planned them."""
    from retrograd.runs.states.budget import Replay, layout

    for kind in ("all", "log", "binomial"):
        found = layout(Replay(kind, slots=3 if kind == "binomial" else None), 17, 300, 100, elementwise=True)
        held, most, advances = set[int](), 0, 0
        for action in found.plan:
            match action:
                case plans.Snapshot(step):
                    held.add(step)
                    most = max(most, len(held))
                case plans.Drop(step):
                    held.remove(step)
                case plans.Advance(start, stop):
                    advances += stop - start
        told = describe(found)
        assert (told["slots"], told["replays"]) == (most, advances - 16)


def test_what_stands_for_an_objective_is_a_function_that_is_not_called() -> None:
    declared = _Declared(linear=True)
    assert callable(declared)  # as the kernel's annotation says, which `make test-all` checks
    with pytest.raises(AssertionError, match="a plan without weights computes no loss"):
        declared({}, {}, None)
