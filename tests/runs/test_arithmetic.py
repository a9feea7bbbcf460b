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
from retrograd.runs import arithmetic, setup
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


def test_tf32_is_chosen_recorded_hashed_and_compared(
    tmp_path: Path, settings: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A processor has no TF32, so here the one function that asks the device is told that it has."""
    tiny.save_model(tmp_path / "model", "gpt-neox")
    tiny.save_jsonl(tmp_path / "train.jsonl", tiny.sentences(8))

    def magic(name: str, *more: str) -> list[str]:
        return ["magic", str(tmp_path / name), "--model", str(tmp_path / "model"), "--data.dataset",
                str(tmp_path / "train.jsonl"), "--query.dataset", str(tmp_path / "train.jsonl"), "--train.batch_size", "4",
                "--device", "cpu", *more]  # fmt: skip

    assert main(magic("run", "--tf32")) == 2
    assert "--tf32 needs an NVIDIA GPU of 2020 or later, and this run is on cpu" in capsys.readouterr().err
    assert main(magic("run", "--tf32", "--dtype", "bfloat16")) == 2
    assert "--dtype is bfloat16: it would change nothing" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    whole = manifest_of(magic("whole"), tmp_path / "whole")
    assert not whole["arithmetic"]["tf32"]
    precise = setup.precise
    monkeypatch.setattr(
        setup, "precise", lambda device, *, tf32: torch.set_float32_matmul_precision("high" if tf32 else "highest")
    )
    rounded = manifest_of(magic("rounded", "--tf32"), tmp_path / "rounded")
    assert rounded["arithmetic"]["tf32"]
    assert rounded["identity"] != whole["identity"]
    assert {name: rounded["hashes"][name] for name in whole["hashes"]} == whole["hashes"]
    told = json.loads((tmp_path / "rounded/health.json").read_text())["findings"]
    assert "tf32" in {finding["kind"] for finding in told}
    assert main(magic("rounded")) == 2
    assert "tf32: True → False" in " ".join(capsys.readouterr().err.split())
    assert main(magic("rounded", "--tf32")) == 0  # it is done
    monkeypatch.setattr(setup, "precise", precise)
    precise(CPU, tf32=False)
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_gpu_without_tf32_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an older one")
    with pytest.raises(ValueError, match=r"capability 8.0 or more, and an older one has 7.5"):
        arithmetic.precise(torch.device("cuda"), tf32=True)


def manifest_of(arguments: list[str], run: Path) -> dict:
    assert main(arguments) == 0
    return json.loads((run / "manifest.json").read_text())
