"""A run's arithmetic: in its manifest, taken up again when it goes on, and refused where a machine gives another."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import tiny
import torch

from retrograd.cli import main
from retrograd.runs.arithmetic import Arithmetic, begun_with, refuse_other_arithmetic

CPU = torch.device("cpu")


@pytest.fixture
def settings() -> Iterator[None]:
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)


def here(**changes: object) -> Arithmetic:
    return replace(Arithmetic.here(torch.float32, CPU, "double", compiled=False), **changes)  # type: ignore[arg-type]


def test_what_is_applied_is_what_this_process_has(settings: None) -> None:
    for wanted in (here(threads=2, tf32=True), here(threads=1, tf32=False)):
        wanted.apply()
        assert Arithmetic.here(torch.float32, CPU, "double", compiled=False) == wanted


@pytest.mark.parametrize("name, value, hashed", [
    ("dtype", "float64", True), ("engine", "blocks", True), ("compiled", True, True), ("tf32", True, True),
    ("shards", 2, True), ("layout", "shards", True), ("threads", 64, False), ("device", "cuda:0", False),
    ("device_name", "another", False),
])  # fmt: skip
def test_every_part_is_compared_and_what_was_chosen_is_hashed(name: str, value: object, hashed: bool) -> None:
    ours, other = here(), here(**{name: value})
    assert (ours.chosen != other.chosen) == hashed
    refuse_other_arithmetic(Path("run"), ours, ours)
    refuse_other_arithmetic(Path("run"), None, ours)
    with pytest.raises(ValueError, match=rf"run was begun with other arithmetic:\n  {name}: .* → {value}\n"):
        refuse_other_arithmetic(Path("run"), ours, other)


def test_a_run_goes_on_with_its_own_threads_and_on_its_own_machine(
    tmp_path: Path, settings: None, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.save_model(tmp_path / "model", "gpt-neox")
    tiny.save_jsonl(tmp_path / "train.jsonl", tiny.sentences(8))
    run, path = tmp_path / "run", tmp_path / "run" / "manifest.json"
    train = ["train", str(run), "--model", str(tmp_path / "model"), "--data.dataset", str(tmp_path / "train.jsonl"),
             "--train.lr", "1e-2", "--train.batch_size", "4", "--device", "cpu"]  # fmt: skip
    assert main(train) == 0
    manifest = json.loads(path.read_text())
    begun = begun_with(run)
    assert begun is not None
    assert manifest["arithmetic"] == asdict(begun) == asdict(here(engine=begun.engine))
    del manifest["finished"]
    del manifest["arithmetic"]["shards"]
    manifest["arithmetic"]["world_size"] = 1  # as earlier versions called it
    torch.set_num_threads(2)
    path.write_text(json.dumps(manifest))
    assert main(train) == 0
    assert torch.get_num_threads() == begun.threads
    manifest["arithmetic"]["device_name"] = "another processor"
    path.write_text(json.dumps(manifest))
    capsys.readouterr()
    assert main(train) == 2
    words = " ".join(capsys.readouterr().err.split())
    assert f"device_name: another processor → {begun.device_name}" in words
    assert "Go on where it was begun, use another folder, or --overwrite" in words
    assert json.loads(path.read_text()) == manifest, "nothing has been changed"
