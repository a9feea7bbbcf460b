"""Plans of `validate` and of `experiment`: what is missing is counted by their own code, and one of each is timed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import arms
import pytest
import tiny

from retrograd.cli import main


def planned(out: Path, *arguments: str) -> dict[str, Any]:
    assert main(["plan", *arguments, "--json", str(out)]) == 0
    found: dict[str, Any] = json.loads(out.read_text())
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    tiny.save_model(folder / "model")
    tiny.save_jsonl(folder / "train.jsonl", tiny.sentences(12))
    tiny.save_jsonl(folder / "query.jsonl", tiny.sentences(2, seed=1))
    assert main([
        "magic", str(folder / "run"), "--model", str(folder / "model"), "--data.dataset", str(folder / "train.jsonl"),
        "--query.dataset", str(folder / "query.jsonl"), "--train.batch_size", "4",
    ]) == 0  # fmt: skip
    return folder / "run"


def test_retrainings_that_are_in_the_bank_are_not_planned_again(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("validate", str(run), "--subsets", "5", "--fraction", "0.3", "--workers", "1", "--together", "1")
    own, whole = planned(tmp_path / "a.json", *asked)["parts"]
    assert (own["number"], own["done"], whole["done"]) == (5, 0, 0)
    assert own["seconds"] > 0
    assert own["left"] == pytest.approx(5 * own["seconds"])
    assert not (run / "validation").exists(), "a plan writes nothing"
    assert main(["validate", str(run), "--subsets", "3", "--fraction", "0.3", "--workers", "1", "--together", "1"]) == 0
    own, whole = planned(tmp_path / "b.json", *asked)["parts"]
    assert (own["number"], own["done"], whole["done"]) == (5, 3, 1)
    stacked = planned(tmp_path / "c.json", *asked[:-1], "4")["parts"][0]
    assert "a stack of 4" in stacked["source"]
    assert stacked["seconds"] > 0
    assert main(["plan", *asked, "--rate", "1e12"]) == 2
    assert "its plan is timed here: leave --rate" in capsys.readouterr().err


def test_what_rivals_take_is_counted_and_not_done(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retrograd.trust.methods.RIVALS", {})  # none is computed
    asked = ("validate", str(run), "--subsets", "0", "--top", "0.2", "--workers", "1", "--together", "1")
    alone = {part["what"]: part for part in planned(tmp_path / "a.json", *asked)["parts"]}
    assert alone["retrainings"]["number"] == 1 + 5
    rivals = ("--rivals", "bm25", "gradient_cosine", "tracin")
    both = {part["what"]: part for part in planned(tmp_path / "b.json", *asked, *rivals)["parts"]}
    assert both["retrainings"]["number"] == 1 + 5
    assert both["rivals' strongest, at most"]["number"] == 3
    cosine, tracin = (both[f"scores of {name}"]["seconds"] for name in rivals[2:])
    assert tracin > 5 * cosine > 0
    assert "scores of bm25" not in both


@pytest.mark.slow
def test_an_experiment_is_planned_by_kind_and_what_is_done_is_counted(tmp_path: Path) -> None:
    world, out = arms.save_world(tmp_path), tmp_path / "out"
    file = arms.write(tmp_path / "one.yaml")
    asked = ("experiment", str(file), str(out), "--names", f"world={world}")
    before = {part["what"]: part for part in planned(tmp_path / "a.json", *asked)["parts"]}
    assert not out.exists(), "a plan writes nothing"
    assert main(list(asked)) == 0
    after = {part["what"]: part for part in planned(tmp_path / "b.json", *asked)["parts"]}
    names = [name.split(".")[0] for name in arms.outcomes(out)]
    for kind in ("scores", "select", "train", "measure"):
        first, then = ([p for what, p in parts.items() if what.split()[0] == kind] for parts in (before, after))
        assert sum(part["number"] for part in first) == sum(part["number"] for part in then) == names.count(kind)
        assert sum(part["done"] for part in first) == 0
        assert all(part["done"] == part["number"] for part in then)
    for kind in ("scores", "train", "measure"):
        assert all(part["seconds"] > 0 for what, part in before.items() if what.startswith(kind))
    assert all(part["source"].startswith("mean of") for part in after.values())
