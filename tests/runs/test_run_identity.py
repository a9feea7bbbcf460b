"""A run in a folder belongs to all of its model: frozen weights and configuration too, whatever command asks."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from retrograd.cli import main


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    tiny.save_model(folder / "model", "gpt-neox")
    tiny.save_jsonl(folder / "train.jsonl", tiny.sentences(8))
    tiny.save_jsonl(folder / "query.jsonl", tiny.sentences(2, seed=1))
    assert main(magic(folder)) == 0
    return folder


def magic(world: Path, *more: str) -> list[str]:
    return [
        "magic", str(world / "run"), "--model", str(world / "model"), "--data.dataset", str(world / "train.jsonl"),
        "--query.dataset", str(world / "query.jsonl"), "--train.lr", "1e-2", "--train.batch_size", "4",
        "--lora.rank", "2", "--replay.keep", "--replay.plan", "all", *more,
    ]  # fmt: skip


def query(world: Path) -> list[str]:
    return ["query", str(world / "run"), "--name", "more", "--query.dataset", str(world / "train.jsonl")]


def verify(world: Path) -> list[str]:
    return ["verify", str(world / "run"), "--directions", "0", "--steps", "0"]


def move_base(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    name = next(name for name in weights if name.endswith("query_key_value.weight"))
    save_file({**weights, name: weights[name] + 0.01}, model / "model.safetensors", {"format": "pt"})


def move_config(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "layer_norm_eps": 1e-3}))


@pytest.fixture
def kept(world: Path) -> Iterator[Path]:
    files = {file: file.read_bytes() for file in (world / "model").iterdir()}
    manifest = (world / "run" / "manifest.json").read_text()
    yield world
    (world / "run" / "manifest.json").write_text(manifest)
    for file, content in files.items():
        file.write_bytes(content)


@pytest.mark.parametrize("change, told", [
    (move_base, "frozen weights and buffers: "), (move_config, "the model's configuration and code: "),
])  # fmt: skip
def test_a_swapped_base_model_or_configuration_is_refused(
    change: Callable[[Path], None], told: str, kept: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(kept / "model")
    for arguments in (magic(kept), query(kept)):
        assert main(arguments) == 2
        words = " ".join(capsys.readouterr().err.split())
        assert told in words
        assert "Put it back" in words
    main(verify(kept))
    (inputs,) = [c for c in json.loads((kept / "run" / "verify.json").read_text())["checks"] if c["name"] == "inputs"]
    assert inputs["verdict"] == "failed"
    assert told.strip(": ") in inputs["words"]
    assert not (kept / "run" / "queries" / "more").exists()


def test_a_run_of_an_earlier_version_is_refused_with_what_to_do(kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = kept / "run" / "manifest.json"
    values = json.loads(path.read_text())
    older = {name: values["hashes"][name] for name in ("recipe", "rows")}
    path.write_text(json.dumps({**values, "identity": "0123456789abcdef", "hashes": older}))
    for arguments in (magic(kept), query(kept)):
        assert main(arguments) == 2
        words = " ".join(capsys.readouterr().err.split())
        assert "earlier version of retrograd (run 0123456789abcdef)" in words
        assert "Go on with the version it was begun with" in words
        assert "--overwrite" in words


def test_chunks_of_length_0_are_no_chunks(kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = torch.load(kept / "run" / "scores.pt")
    assert main(magic(kept, "--data.chunk_length", "0", "--data.max_length", "64")) == 2  # another run: cut documents
    assert "data.max_length: None → 64" in " ".join(capsys.readouterr().err.split())
    assert main(magic(kept, "--data.chunk_length", "0")) == 0
    assert "is done" in " ".join(capsys.readouterr().out.split())
    assert torch.equal(torch.load(kept / "run" / "scores.pt"), before)
