"""A small run that several files of tests hold a bank of: two query columns, 20 documents."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny

from retrograd.cli import main


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model, data, further queries, and a finished `run`. Copy the run before anything is added to it."""
    folder = tmp_path_factory.mktemp("small")
    tiny.save_model(folder / "model")
    tiny.save_jsonl(folder / "train.jsonl", tiny.sentences(20))
    for name, seed in (("query", 1), ("first", 2), ("second", 3)):
        tiny.save_jsonl(folder / f"{name}.jsonl", tiny.sentences(2, seed=seed))
    queries = {name: {"dataset": str(folder / f"{name}.jsonl"), "reduction": "none"} for name in ("first", "second")}
    (folder / "more.yaml").write_text(json.dumps(queries))
    attribute(folder, "run")
    return folder


@pytest.fixture(scope="session")
def by_token(small: Path) -> Path:
    """A run by token on the same data."""
    return attribute(small, "by-token", "--attribute", "tokens")


def attribute(folder: Path, name: str, *more: str) -> Path:
    command = [
        "magic", str(folder / name), "--model", str(folder / "model"), "--data.dataset", str(folder / "train.jsonl"),
        "--query.dataset", str(folder / "query.jsonl"), "--query.reduction", "none", "--train.batch_size", "8",
        "--train.lr", "1e-3", "--train.eps_root", "1e-6", *more,
    ]  # fmt: skip
    assert main(command) == 0
    return folder / name
