"""Validation by retraining: what is predicted, what is measured, the bank, its slices, processes and stacks."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from scipy import stats

from retrograd.cli import main
from retrograd.core.check import train
from retrograd.core.optim import Params
from retrograd.core.step import NonFiniteError, State, left_finite
from retrograd.query.columns import Queries
from retrograd.runs.files import read_tensors, write_tensors
from retrograd.runs.run_folder import open_run
from retrograd.runs.trajectory import Ready
from retrograd.trust import left_out as counterfactual
from retrograd.trust import retrain
from retrograd.trust.bank import Failed


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    tiny.save_model(folder / "model")
    texts = tiny.sentences(24)
    texts[3] = ""  # no row
    tiny.save_jsonl(folder / "train.jsonl", texts)
    tiny.save_jsonl(folder / "query.jsonl", tiny.sentences(2, seed=1))
    return folder


def magic(world: Path, run: Path, *more: str) -> Path:
    command = [
        "magic", str(run), "--model", str(world / "model"), "--data.dataset", str(world / "train.jsonl"),
        "--query.dataset", str(world / "query.jsonl"), "--query.reduction", "none", "--train.lr", "1e-3",
        "--train.batch_size", "8", "--train.eps_root", "1e-6", *more,
    ]  # fmt: skip
    assert main(command) == 0
    return run


@pytest.fixture(scope="module")
def done(world: Path) -> Path:
    return magic(world, world / "done")


@pytest.fixture
def run(done: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(done, tmp_path / "run"))


def validate(run: Path, *more: str) -> list[dict[str, str]]:
    assert main(["validate", str(run), *more]) == 0
    with (run / "validation.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def bank(run: Path) -> list[dict]:
    lines = [line for path in (run / "validation").glob("*.jsonl") for line in path.read_text().splitlines()]
    return [json.loads(line) for line in lines]


def test_every_set_is_predicted_and_measured(run: Path) -> None:
    rows = validate(run, "--subsets", "3", "--fraction", "0.1", "0.25", "--together", "1", "--ends", "2")
    assert list(rows[0]) == ["subset", "fraction", "query", "predicted", "measured", "weight"]
    assert len(rows) == (6 + 2) * 2
    opened = open_run(run)
    scores = torch.load(run / "scores.pt", weights_only=True).double()
    members = np.array([document for document in range(24) if document != 3])
    chosen = counterfactual.random_subset(members, 0.25, 0, 2)
    assert len(chosen) == round(0.25 * 23)
    weights = torch.ones(24)
    weights[torch.from_numpy(chosen)] = 0
    training, start = opened.loaded.training, opened.loaded.initial.params
    there, here = (opened.loaded.queries.values(train(training, start, w).params) for w in (weights, torch.ones(24)))
    found = [row for row in rows if (row["subset"], row["fraction"]) == ("2", "0.25")]
    assert [row["query"] for row in found] == ["query/0", "query/1"]
    np.testing.assert_allclose([float(row["predicted"]) for row in found], -scores[chosen].sum(0), rtol=1e-6)
    assert [float(row["measured"]) for row in found] == (there.double() - here.double()).tolist()
    top = next(row for row in rows if row["subset"] == "top-2")
    lowest = scores.mean(1)[members].sort().values[:2]
    assert float(top["fraction"]) == pytest.approx(2 / 23, rel=1e-4)
    pair = [float(row["predicted"]) for row in rows if row["subset"] == "top-2"]
    assert np.mean(pair) == pytest.approx(-float(lowest.sum()), rel=1e-6)


@pytest.mark.parametrize("more", [
    (), ("--lora.rank", "2"), pytest.param(("--train.dropout",), marks=pytest.mark.slow), ("--attribute", "tokens", "--train.micro_batch_size", "3"),
], ids=["full", "lora", "dropout", "tokens"])  # fmt: skip
def test_with_nothing_left_out_the_difference_is_exactly_0(world: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    run = magic(world, tmp_path / "run", *more)
    rows = validate(run, "--subsets", "1", "--fraction", "0", "0.1", "--together", "1")
    assert [float(row["measured"]) for row in rows if row["fraction"] == "0"] == [0.0, 0.0]
    assert all(float(row["measured"]) != 0 for row in rows if row["fraction"] != "0")
    assert json.loads((run / "validation.json").read_text())["unchanged_nats"] == 0


def test_a_run_that_is_not_reproduced_is_refused(run: Path, capsys: pytest.CaptureFixture) -> None:
    path = run / "queries" / "query" / "gradient.safetensors"
    tensors, metadata = read_tensors(path)
    write_tensors(path, {**tensors, "values": tensors["values"] + 1e-6}, metadata)
    assert main(["validate", str(run), "--subsets", "2", "--fraction", "0.1"]) == 1
    assert "does not give back this run" in capsys.readouterr().err


def test_finished_retrainings_are_reused(run: Path) -> None:
    few = validate(run, "--subsets", "3", "--fraction", "0.1", "--together", "1")
    lines = bank(run)
    assert len(lines) == 4  # and the baseline
    file = run / "validation" / "retrains.jsonl"
    file.write_text(file.read_text()[:-40])  # a kill while the last line was written
    assert validate(run, "--subsets", "3", "--fraction", "0.1", "--together", "1") == few
    many = validate(run, "--subsets", "6", "--fraction", "0.1", "--together", "1")
    assert many[:6] == few
    assert len(bank(run)) == 7
    before = file.read_bytes()
    assert validate(run, "--subsets", "6", "--fraction", "0.1", "--together", "1") == many
    assert file.read_bytes() == before


def test_slices_add_up_to_the_whole(done: Path, tmp_path: Path) -> None:
    whole, first, second = (Path(shutil.copytree(done, tmp_path / name)) for name in ("whole", "first", "second"))
    options = ("--subsets", "5", "--fraction", "0.1", "0.3", "--together", "1")
    expected = validate(whole, *options)
    part = validate(first, *options, "--stop", "2")
    assert {row["subset"] for row in part} == {"0", "1"}
    validate(second, *options, "--start", "2")
    for path in (second / "validation").iterdir():
        shutil.copy(path, first / "validation")
    lines = len(bank(first))
    assert validate(first, *options) == expected
    assert len(bank(first)) == lines


@pytest.mark.slow
def test_processes_give_the_same_bits(done: Path, tmp_path: Path) -> None:
    one, two = (Path(shutil.copytree(done, tmp_path / name)) for name in ("one", "two"))
    options = ("--subsets", "4", "--fraction", "0.2", "--together", "1")
    assert validate(one, *options, "--workers", "1") == validate(two, *options, "--workers", "2")


@pytest.mark.slow  # slices, of which ranks are two, are above
def test_ranks_share_the_work(run: Path) -> None:
    code = "import sys, retrograd.cli; sys.exit(retrograd.cli.main(sys.argv[1:]))"
    command = [
        sys.executable,
        "-c",
        code,
        "validate",
        str(run),
        "--subsets",
        "4",
        "--fraction",
        "0.2",
        "--together",
        "1",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(command, env={**environment, "RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert "mean LDS" in outputs[0]
    assert "mean LDS" not in outputs[1]
    files = {path.name for path in (run / "validation").glob("retrains*")}
    assert files == {"retrains-rank0.jsonl", "retrains-rank1.jsonl"}
    with (run / "validation.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 8


def test_stacks_measure_what_the_loop_measures(done: Path, tmp_path: Path) -> None:
    one, many = (Path(shutil.copytree(done, tmp_path / name)) for name in ("one", "many"))
    options = ("--subsets", "7", "--fraction", "0.2")
    alone, stacked = validate(one, *options, "--together", "1"), validate(many, *options, "--together", "4")
    for a, b in zip(alone, stacked, strict=True):
        assert float(a["measured"]) == pytest.approx(float(b["measured"]), abs=2e-6)
    assert {line["conditions"]["together"] for line in bank(many)} == {1, 4}


def test_a_smooth_run_is_validated(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = magic(world, tmp_path / "run", "--train.optimizer", "sgd", "--train.lr", "0.1")
    rows = validate(run, "--subsets", "20", "--fraction", "0.1")
    for query in ("query/0", "query/1"):
        pairs = [(float(row["predicted"]), float(row["measured"])) for row in rows if row["query"] == query]
        assert stats.spearmanr(*zip(*pairs)).statistic > 0.95
    assert "validated" in capsys.readouterr().out
    record = json.loads((run / "validation.json").read_text())["fractions"][0]
    assert record["interval"][0] > 0.8
    assert 0.8 < record["queries"]["query/0"]["slope"] < 1.2
    assert '"set":"0"' in (run / "report.html").read_text()


def test_token_sets(world: Path, tmp_path: Path) -> None:
    run = magic(world, tmp_path / "run", "--attribute", "tokens", "--data.chunk_length", "16")
    rows = validate(run, "--tokens", "--subsets", "12", "--fraction", "0.1", "--ends", "3")
    scores = torch.load(run / "scores.pt", weights_only=True)
    pair = [float(row["predicted"]) for row in rows if row["subset"] == "top-3"]
    assert np.mean(pair) == pytest.approx(-float(scores.mean(-1).flatten().sort().values[:3].sum()), rel=1e-4)
    documents = validate(run, "--subsets", "2", "--fraction", "0.1", "--together", "1")
    owner = torch.load(run / "doc_ids.pt", weights_only=True)
    members = np.array([document for document in range(24) if document != 3])
    chosen = counterfactual.random_subset(members, 0.1, 0, 1)
    total = -scores[np.isin(owner, chosen)].double().sum(0)
    np.testing.assert_allclose([float(row["predicted"]) for row in documents[2:]], total, rtol=1e-4)


def test_sets_of_a_file(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "sets.txt").write_text("0 5 9\n\n2\n")
    rows = validate(run, "--subsets", "0", "--sets", str(tmp_path / "sets.txt"))
    assert [row["subset"] for row in rows] == ["set-0", "set-0", "set-1", "set-1"]
    (tmp_path / "sets.txt").write_text("0 3\n")
    assert main(["validate", str(run), "--sets", str(tmp_path / "sets.txt")]) == 2
    assert "names 3" in capsys.readouterr().err


def test_added_queries_are_validated_too(world: Path, run: Path) -> None:
    validate(run, "--subsets", "3", "--fraction", "0.1", "--together", "1")
    assert main(["query", str(run), "--name", "other", "--query.dataset", str(world / "train.jsonl")]) == 0
    rows = validate(run, "--subsets", "3", "--fraction", "0.1", "--together", "1")
    assert {row["query"] for row in rows} == {"query/0", "query/1", "other"}
    assert len(bank(run)) == 8  # the new query needs its own retrainings


@pytest.mark.parametrize("options,told", [
    (("--fraction", "1"), "below 1"), (("--fraction", "-0.1"), "from 0"), (("--subsets", "-1"), "0 or more"),
    (("--tokens",), "--attribute tokens"), (("--ends", "40"), "would leave out all"),
    (("--start", "3", "--stop", "3"), "no subset"), (("--sets", "nowhere.txt"), "nowhere.txt"),
])  # fmt: skip
def test_what_cannot_work_is_refused(done: Path, options: tuple[str, ...], told: str, capsys) -> None:
    before = sorted(done.rglob("*"))
    assert main(["validate", str(done), *options]) == 2
    assert told in capsys.readouterr().err
    assert sorted(done.rglob("*")) == before


def test_agreement_is_that_of_scipy_and_its_interval_covers() -> None:
    draw = np.random.default_rng(0)
    x = draw.normal(size=(40, 2))
    y = 2 * x + draw.normal(size=(40, 2))
    found = counterfactual.agreement(x[:, 0], y[:, 0])
    assert found.lds == stats.spearmanr(x[:, 0], y[:, 0]).statistic
    assert found.slope == pytest.approx(np.polyfit(x[:, 0], y[:, 0], 1)[0])
    mean, low, high = counterfactual.mean_lds(x, y)
    assert mean == pytest.approx(np.mean([stats.spearmanr(x[:, k], y[:, k]).statistic for k in range(2)]))
    assert 0 < low < mean < high < 1
    noise = counterfactual.mean_lds(x, draw.normal(size=(40, 2)))
    assert noise[1] < 0 < noise[2]
    assert np.isnan(counterfactual.agreement(x[:, 0], np.zeros(40)).lds)
    slow = []
    for _ in range(400):
        chosen = draw.integers(0, 40, 40)
        slow.append(np.mean([stats.spearmanr(x[chosen, k], y[chosen, k]).statistic for k in range(2)]))
    assert low == pytest.approx(np.percentile(slow, 2.5), abs=0.05)


def test_random_sets_do_not_depend_on_the_call() -> None:
    members = np.arange(10, 110)
    a = counterfactual.random_subset(members, 0.05, 0, 7)
    assert len(a) == 5
    assert (a == counterfactual.random_subset(members, 0.05, 0, 7)).all()
    assert set(a) <= set(members)
    assert set(a) != set(counterfactual.random_subset(members, 0.05, 0, 8))
    assert set(a) != set(counterfactual.random_subset(members, 0.05, 1, 7))
    assert len(counterfactual.random_subset(members, 0.001, 0, 0)) == 1


def _diverging(monkeypatch: pytest.MonkeyPatch, fails: Callable[[torch.Tensor], bool]) -> None:
    """Retrainings at such weights reach a loss that is NaN at step 1."""

    whole = Ready.final

    def final(self: Ready, weights: torch.Tensor) -> State:
        if fails(weights):
            raise NonFiniteError(left_finite(1, math.nan, 1.0))
        return whole(self, weights)

    monkeypatch.setattr(Ready, "final", final)


def test_retrainings_that_diverge_are_told_and_never_banked_as_numbers(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    call = ("--subsets", "6", "--fraction", "0.1", "--together", "1", "--workers", "1")
    whole = validate(run, *call)
    shutil.rmtree(run / "validation")
    sets = [frozenset(np.flatnonzero(w == 0)) for w in _left_out(6)]
    _diverging(monkeypatch, lambda weights: frozenset(np.flatnonzero(weights == 0)) in sets[1:3])
    rows = validate(run, *call)
    assert rows == [row for row in whole if row["subset"] not in ("1", "2")]
    printed = " ".join(capsys.readouterr().out.split())
    assert "FAILED: 2 of 6 retrainings diverged:" in printed
    assert "without set 1 (0.1): training left the finite numbers at step 1: loss nan" in printed
    assert "not validated: 2 more retrainings diverged" in printed
    found = json.loads((run / "validation.json").read_text())
    assert [one["subset"] for one in found["failed"]] == ["1", "2"]
    assert found["fractions"][0]["failed"] == 2
    assert found["fractions"][0]["queries"]["query/0"]["sets"] == 4
    lines = bank(run)
    assert sum("failed" in line for line in lines) == 2
    assert all("values" not in line for line in lines if "failed" in line)
    _diverging(monkeypatch, lambda weights: pytest.fail("a failed retraining is not repeated"))
    assert validate(run, *call) == rows


def test_a_validation_without_any_number_is_refused(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    call = ["validate", str(run), "--subsets", "2", "--fraction", "0.1", "--together", "1", "--workers", "1"]
    _diverging(monkeypatch, lambda weights: bool((weights == 0).any()))
    assert main(call) == 1
    assert "all 2 retrainings diverged, so nothing can be compared; without set 0" in capsys.readouterr().err
    shutil.rmtree(run / "validation")
    _diverging(monkeypatch, lambda weights: True)
    assert main(call) == 1
    assert "retraining with everything, alone, diverged" in capsys.readouterr().err
    assert not (run / "validation").exists()


@pytest.mark.parametrize("together", [1, 3])
def test_a_query_that_is_not_finite_fails_its_retraining(
    run: Path, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_run(run)
    values = Queries.values
    monkeypatch.setattr(Queries, "values", lambda self, params: values(self, params) * torch.tensor([1.0, torch.inf]))
    found = retrain._values(opened, [retrain.NOTHING], together)
    told = "after step 2, the last, query 'query/1' is NaN or infinite."
    assert [one.values for one in found] == [Failed(told, "query")] * len(found)


@pytest.mark.parametrize("together", [1, 3])
def test_a_phase_before_a_query_that_diverges_fails_its_retraining(
    run: Path, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_run(run)

    def values(queries: Queries, params: Params) -> torch.Tensor:
        raise NonFiniteError("in the attack's step 1 the loss is nan")

    monkeypatch.setattr(Queries, "values", values)
    found = retrain._values(opened, [retrain.NOTHING], together)
    assert [one.values for one in found] == [Failed("in the attack's step 1 the loss is nan")] * len(found)


def test_numbers_of_an_older_bank_that_are_none_are_measured_again(run: Path) -> None:
    rows = validate(run, "--subsets", "2", "--fraction", "0.1", "--together", "1")
    path = run / "validation" / "retrains.jsonl"
    lines = path.read_text().splitlines()
    broken = json.loads(lines[-1])
    broken["values"]["query/0"] = math.nan
    path.write_text("\n".join([*lines[:-1], json.dumps(broken)]) + "\n")
    assert validate(run, "--subsets", "2", "--fraction", "0.1", "--together", "1") == rows


def _left_out(subsets: int) -> list[np.ndarray]:
    """Data weights without each random set of a tenth."""
    members = np.array([document for document in range(24) if document != 3])
    found = []
    for number in range(subsets):
        weights = np.ones(24)
        weights[counterfactual.random_subset(members, 0.1, 0, number)] = 0
        found.append(weights)
    return found
