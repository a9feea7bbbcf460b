"""A grid of recipes: its cells are what the three commands give, its table and picture say so, and what fails is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import pytest
import tiny
import yaml

from retrograd.cli import main
from retrograd.settings.grid import read_grid

FILE: dict[str, Any] = {
    "grid": {"train.lr": [1e-2, 1e6], "train.eps_root": [1e-6, 1e-4]}, "subsets": 4, "fraction": 0.2, "h": 0.1,
    "train": {"optimizer": "adamw", "batch_size": 4},
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    tiny.save_model(folder / "model")
    tiny.save_jsonl(folder / "train.jsonl", tiny.sentences(10))
    tiny.save_jsonl(folder / "query.jsonl", tiny.sentences(2, seed=1))
    return folder


def write(world: Path, path: Path, **more: Any) -> Path:
    named = {"model": str(world / "model"), "data": {"dataset": str(world / "train.jsonl")},
             "query": {"dataset": str(world / "query.jsonl")}}  # fmt: skip
    path.write_text(yaml.safe_dump({**FILE, **named, **more}))
    return path


def test_a_cell_is_what_the_commands_give_and_the_table_and_the_page_show_it(world: Path, tmp_path: Path) -> None:
    axes = {"train.lr": [1e-2], "train.eps_root": [1e-6, 1e-4]}
    file, out = write(world, tmp_path / "grid.yaml", grid=axes), tmp_path / "out"
    assert main(["experiment", str(file), str(out)]) == 0
    rows = parquet.read_table(out / "results.parquet").to_pylist()
    assert [json.loads(row["cell"]) for row in rows] == [{"train.lr": 1e-2, "train.eps_root": e} for e in (1e-6, 1e-4)]

    run = str(tmp_path / "run")
    recipe = ["--train.lr", "1e-2", "--train.eps_root", "1e-6", "--train.batch_size", "4"]
    data = ["--data.dataset", str(world / "train.jsonl"), "--query.dataset", str(world / "query.jsonl")]
    assert main(["magic", run, "--model", str(world / "model"), *data, *recipe]) == 0
    assert main(["metasmoothness", run]) == 0
    assert main(["validate", run, "--subsets", "4", "--fraction", "0.2", "--workers", "1"]) == 0
    smooth = json.loads(next((tmp_path / "run/metasmoothness").glob("*.json")).read_text())["value"]
    found = json.loads((tmp_path / "run/validation.json").read_text())["fractions"][0]
    assert rows[0]["smoothness"] == pytest.approx(smooth, abs=1e-9)
    assert rows[0]["lds"] == pytest.approx(found["mean_lds"], abs=1e-6)
    assert rows[0]["missing"] is None
    assert rows[0]["smoothness"] != rows[1]["smoothness"]

    text = (out / "results.md").read_text()
    assert f"| 1e-06 | 0.01 | {smooth:.3f} |" in text
    page = (out / "report.html").read_text()
    assert "Which recipes' scores predict retraining" in page.replace("&#39;", "'")
    assert "train.eps_root" in page
    before = [path.stat().st_mtime_ns for path in sorted((out / "tasks").glob("*/done.json"))]
    assert main(["experiment", str(file), str(out)]) == 0  # nothing is computed again
    assert [path.stat().st_mtime_ns for path in sorted((out / "tasks").glob("*/done.json"))] == before


def test_a_cell_that_fails_is_missing_with_its_reason(world: Path, tmp_path: Path) -> None:
    file = write(world, tmp_path / "grid.yaml", grid={"train.lr": [1e30]})
    assert main(["experiment", str(file), str(tmp_path / "out")]) == 1
    row = parquet.read_table(tmp_path / "out/results.parquet").to_pylist()[0]
    assert row["lds"] is None
    assert row["missing"]
    assert row["missing"] in (tmp_path / "out/results.md").read_text()


def test_numbers_that_yaml_reads_as_texts_are_numbers(world: Path, tmp_path: Path) -> None:
    file = write(world, tmp_path / "grid.yaml")
    file.write_text(file.read_text().replace("1.0e-06", "1e-6").replace("- 0.0001", "- 1e-4"))
    assert "- 1e-6" in file.read_text()
    assert read_grid(file).grid == {"train.eps_root": (1e-6, 1e-4), "train.lr": (1e-2, 1e6)}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"grid": {}}, "grid is {}; write each setting with its values"),
        ({"grid": {"train.lr": 1e-3}}, "grid is .*write each setting with its values"),
        ({"grid": {"train.lr": [1e-3, 1e-3]}}, "train.lr has a value twice"),
        ({"subsets": 2}, "subsets is 2, .*at least 3 subsets"),
        ({"fraction": 1.0}, "fraction 1.0"),
        ({"run": "x"}, "run is set by the experiment itself"),
    ],
)
def test_files_that_cannot_work(world: Path, tmp_path: Path, more: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_grid(write(world, tmp_path / "grid.yaml", **more))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"grid": {"train.speed": [1]}}, "train names settings that do not exist: speed"),
        ({"grid": {"train.lr": [-1.0]}}, "train.lr is -1.0"),
        ({"query": {"function": "a.py:f"}}, "a query names a function, which no file may run"),
    ],
)
def test_cells_that_cannot_work_are_told_before_anything_runs(
    world: Path, tmp_path: Path, more: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(world, tmp_path / "grid.yaml", **more)
    assert main(["experiment", str(file), str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
