"""A bank that keeps its models: new queries without a training step, what is missing, and no mixtures."""

from __future__ import annotations

import csv
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from retrograd.cli import main
from retrograd.runs.files import read_tensors, write_tensors
from retrograd.runs.run_folder import open_run
from retrograd.runs.states.relay import relay
from retrograd.runs.trajectory import Ready
from retrograd.trust import bank as banks
from retrograd.trust import models, retrain
from retrograd.trust.left_out import random_subset, without
from retrograd.trust.models import Models, packed_difference, restored
from retrograd.trust.sets import units_of

CALL = ("--subsets", "5", "--fraction", "0.2")


def keeping(small: Path, together: int, folder: Path) -> Path:
    run = Path(shutil.copytree(small / "run", folder))
    assert main(["validate", str(run), *CALL, "--together", str(together), "--save_models"]) == 0
    return run


@pytest.fixture(scope="module")
def kept(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return keeping(small, 1, tmp_path_factory.mktemp("kept") / "run")


@pytest.fixture
def run(kept: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(kept, tmp_path / "run"))


def lines(run: Path) -> list[str]:
    return (run / "validation" / "retrains.jsonl").read_text().splitlines()


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "validation.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ready, "final", lambda *given: pytest.fail("a model was trained"))
    monkeypatch.setattr(retrain, "train_many", lambda *given, **more: pytest.fail("a stack was trained"))


@pytest.mark.parametrize("together", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_new_queries_of_kept_models_have_the_bits_of_retraining(
    small: Path, together: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    run = keeping(small, together, tmp_path / "run")
    call = ["validate", "RUN", *CALL, "--together", str(together)]
    trained = Path(shutil.copytree(run, tmp_path / "trained"))
    for folder in (run, trained):
        assert main(["query", str(folder), "--query_file", str(small / "more.yaml")]) == 0
    shutil.rmtree(trained / "validation")
    assert main([str(trained) if part == "RUN" else part for part in call]) == 0
    capsys.readouterr()
    assert main(["bank", str(run)]) == 1
    told = " ".join(capsys.readouterr().out.split())
    assert "5 by asking kept models, 0 by retraining" in told
    assert "2 queries (first, second) lack 5 of 5 sets: 0.2 set 0, " in told
    no_training(monkeypatch)
    assert main([str(run) if part == "RUN" else part for part in call]) == 0
    assert "kept models are asked" in capsys.readouterr().out
    found = rows(run)
    assert {row["query"] for row in found} == {"query/0", "query/1", "first/0", "first/1", "second/0", "second/1"}
    assert found == rows(trained)  # measured changes by their repr: to the bit
    assert len({row["measured"] for row in found}) > 20
    size = len(lines(run))
    assert main([str(run) if part == "RUN" else part for part in call]) == 0  # and they are in the bank
    assert len(lines(run)) == size
    assert main(["bank", str(run)]) == 0
    assert "Complete: all 5 sets have values of all 3 queries" in capsys.readouterr().out


def test_a_kept_model_is_the_one_that_retraining_gives(run: Path) -> None:
    opened = open_run(run)
    store = Models(opened)
    entries = [json.loads(line) for line in lines(run)]
    entries = [one for one in entries if one["conditions"]["together"] == 1 and one["key"] != "baseline"]
    for entry in entries:
        members = np.array(sorted(units_of(opened, tokens=False)))
        chosen = banks.LeftOut(entry["name"], 0.2, random_subset(members, 0.2, 0, int(entry["name"])))
        assert chosen.key == entry["key"]
        expected = opened.loaded.final(without(opened.loaded.training.weights, chosen.places)).params
        loaded = store.load(entry["model"])
        assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    sizes = [path.stat().st_size for path in store.folder.iterdir()]
    whole = sum(leaf.numel() * leaf.element_size() for leaf in store.base.values())
    assert max(sizes) < whole + 8192  # compressed, but for the files' heads


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_differences_keep_every_bit(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    base = torch.randn(300, 7, generator=draw).to(dtype)
    near = (base.double() * (1 + 1e-3 * torch.randn(300, 7, generator=draw))).to(dtype)
    near[0, :4] = torch.tensor([math.nan, math.inf, -0.0, 0.0]).to(dtype)
    packed = packed_difference(near, base)
    assert packed is not None
    assert restored(packed, base).view(torch.uint8).equal(near.view(torch.uint8))
    assert packed_difference(base.clone(), base) is None
    scalar = torch.tensor(1.5, dtype=dtype)
    packed = packed_difference(scalar + 1, scalar)
    assert packed is not None
    assert torch.equal(restored(packed, scalar), scalar + 1)


def test_models_are_kept_of_a_run_that_lies_in_pieces(small: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(small / "run", tmp_path / "run"))
    loaded = open_run(run).loaded
    relay(run / "checkpoints", loaded.initial, loaded.training.recipe, (2, 1), loaded.identity)
    assert not (run / "checkpoints" / "final.safetensors").exists()
    assert main(["validate", str(run), "--subsets", "2", "--fraction", "0.2", "--save_models"]) == 0
    assert [path.name for path in (run / "checkpoints").glob("of-*")] == []


def test_differences_of_near_models_are_small() -> None:
    draw = torch.Generator().manual_seed(0)
    base = torch.randn(20_000, generator=draw)
    packed = packed_difference(base * (1 + 1e-4 * torch.randn(20_000, generator=draw)), base)
    assert packed is not None
    assert len(packed) < 0.7 * 4 * len(base)


def test_broken_and_foreign_models_are_refused(run: Path) -> None:
    store = Models(open_run(run))
    name = next(path for path in store.folder.iterdir() if read_tensors(path)[0]).stem  # the run's own has none
    tensors, metadata = read_tensors(store._path(name))
    write_tensors(store._path(name), tensors, {**metadata, "base": "other"})
    with pytest.raises(models.RunError, match="a difference from final parameters with digest other"):
        store.load(name)
    dropped = dict(list(tensors.items())[1:])
    write_tensors(store._path(name), dropped, metadata)
    with pytest.raises(models.RunError, match="does not give back the bits"):
        store.load(name)
    with pytest.raises(models.RunError, match="is broken"):
        restored(torch.zeros(5, dtype=torch.uint8), torch.zeros(3))
    (run / "checkpoints" / "final.safetensors").unlink()
    with pytest.raises(ValueError, match="which is not there"):
        Models(open_run(run)).base  # noqa: B018


def test_a_lost_model_is_retrained_and_models_can_join_a_bank(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = Path(shutil.copytree(small / "run", tmp_path / "run"))
    call = ["validate", str(run), *CALL, "--together", "1"]
    assert main(call) == 0
    before = rows(run)
    assert not (run / "validation" / "models").exists()
    assert main([*call, "--save_models"]) == 0
    assert "are in the bank without their models" in " ".join(capsys.readouterr().out.split())
    assert rows(run) == before
    assert len(list((run / "validation" / "models").iterdir())) == 6
    lost = json.loads(lines(run)[-1])["model"]
    (run / "validation" / "models" / f"{lost}.safetensors").unlink()
    query = ["--name", "other", "--query.dataset", str(small / "first.jsonl")]
    assert main(["query", str(run), *query]) == 0
    capsys.readouterr()
    assert main(call) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "5 kept models are asked" in told  # four and the one with everything
    assert "1 retrainings" in told


def test_a_bank_with_sets_missing_gives_no_number(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = Path(shutil.copytree(small / "run", tmp_path / "run"))
    call = ["validate", str(run), *CALL, "--together", "1"]
    assert main([*call, "--stop", "4"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "0.2 left out: incomplete: 1 sets are not in the bank yet" in told
    assert "mean LDS" not in told
    part = json.loads((run / "validation.json").read_text())["fractions"][0]
    assert part["missing"] == 1
    assert part["mean_lds"] is None
    assert part["interval"] == [None, None]
    assert "not all sets are in the bank" in (run / "report.html").read_text()
    assert main(["bank", str(run)]) == 1
    told = " ".join(capsys.readouterr().out.split())
    assert "INCOMPLETE: 1 sets" in told
    assert "0 by asking kept models, 1 by retraining" in told
    assert "Query 'query' lacks 1 of 5 sets: 0.2 set 4." in told
    assert main(call) == 0
    assert "mean LDS" in capsys.readouterr().out
    assert main(["bank", str(run)]) == 0


def test_mixtures_are_refused(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = Path(shutil.copytree(small / "run", tmp_path / "run"))
    call = ["validate", str(run), *CALL, "--together", "1"]
    assert main([*call, "--stop", "2"]) == 0
    path = next((run / "validation").glob("retrains*.jsonl"))
    other = [{**json.loads(line), "made": {"device": "cuda", "hardware": "Other", "torch": "9"}} for line in
             path.read_text().splitlines()]  # fmt: skip
    path.write_text("".join(json.dumps(entry) + "\n" for entry in other))
    assert main(call) == 1
    told = capsys.readouterr().err
    assert "would mix retrainings of 2 kinds" in told
    assert "cuda, Other, torch 9" in told
    assert "0 lines: this machine" in told
    older = [{name: value for name, value in entry.items() if name != "made"} for entry in other]
    (run / "validation" / "retrains-old.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in older))
    assert main(["bank", str(run)]) == 1
    told = " ".join(capsys.readouterr().out.split())
    assert "MIXED: 2 kinds" in told
    assert "not recorded" in told


def test_a_run_without_a_bank_is_told(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = Path(shutil.copytree(small / "run", tmp_path / "run"))
    assert main(["bank", str(run)]) == 2
    assert "has no bank of retrainings" in capsys.readouterr().err
    (run / "validation").mkdir()
    (run / "validation" / "retrains.jsonl").write_text("no json\n")
    assert main(["bank", str(run)]) == 1
    assert "line 1, is no retraining" in capsys.readouterr().err
