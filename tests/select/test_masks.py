"""`retrograd mask`: weights by keywords and by states like theirs, and what unlearning does with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import quiz
import tiny
import torch

from retrograd.cli import main
from retrograd.lm.model import load_causal_lm, load_tokenizer
from retrograd.query.load import load_rows
from retrograd.runs.files import read_tensors
from retrograd.select.places import places_of
from retrograd.select.words import keyword_tokens
from retrograd.settings.select import MaskedSource


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("masks")
    quiz.save(folder / "model", positions=64)
    tiny.save_jsonl(folder / "forget.jsonl", tiny.sentences(5, seed=3))
    tiny.save_jsonl(folder / "retain.jsonl", tiny.sentences(5, seed=4))
    word = json.loads((folder / "forget.jsonl").read_text().splitlines()[0])["text"].split()[1]
    (folder / "words.txt").write_text(f"{word}\n")
    return folder


def masked(world: Path, out: Path, *more: str) -> int:
    return main(["mask", str(out), "--model", str(world / "model"), "--data.dataset", str(world / "forget.jsonl"),
                 "--keywords", str(world / "words.txt"), *more])  # fmt: skip


def weights(out: Path) -> torch.Tensor:
    return read_tensors(out / "weights.safetensors")[0]["weights"]


def rows_and_places(world: Path) -> Any:
    lm, tokenizer = load_causal_lm(str(world / "model")), load_tokenizer(str(world / "model"))
    rows = load_rows(MaskedSource(str(world / "forget.jsonl")), tokenizer, lm, "data")[0]
    return lm, tokenizer, rows, places_of(rows)


def test_keywords_get_all_the_weight_there_is(world: Path, tmp_path: Path) -> None:
    assert masked(world, tmp_path / "w") == 0
    _, tokenizer, rows, places = rows_and_places(world)
    hits = keyword_tokens(places, rows.input_ids, [(world / "words.txt").read_text().strip()], tokenizer)
    found = places.gather(weights(tmp_path / "w").double())
    assert 0 < hits.sum() < len(hits)
    assert torch.allclose(found, hits * len(hits) / hits.sum())
    info = json.loads((tmp_path / "w/info.json").read_text())
    assert (info["rule"], info["use"], info["kept"]) == ("keywords", "removal", int(hits.sum()))
    assert masked(world, tmp_path / "w") == 0  # done


def test_activation_takes_the_tokens_whose_state_is_like_the_keywords(world: Path, tmp_path: Path) -> None:
    assert masked(world, tmp_path / "w", "--depth", "0", "--threshold", "0.5") == 0
    lm, tokenizer, rows, places = rows_and_places(world)
    hits = keyword_tokens(places, rows.input_ids, [(world / "words.txt").read_text().strip()], tokenizer)
    states = []
    for ids in rows.input_ids:
        with torch.no_grad():
            whole = lm.module(torch.tensor(ids)[None], output_hidden_states=True).hidden_states[1][0]
        states += list(whole[1:])
    h = torch.stack(states)
    mean = h[hits > 0].mean(0)
    expected = h @ mean / (h.norm(dim=1) * mean.norm()) >= 0.5
    found = places.gather(weights(tmp_path / "w")) > 0
    assert 0 < expected.sum() < len(expected)
    assert torch.equal(found, expected)


def test_any_method_takes_them(world: Path, tmp_path: Path) -> None:
    assert masked(world, tmp_path / "w") == 0
    arguments = ["unlearn", "sequential", str(tmp_path / "run"), "--model", str(world / "model"), "--lora.rank", "0",
                 "--forget", str(world / "forget.jsonl"), "--retain", str(world / "retain.jsonl"), "--weights",
                 str(tmp_path / "w"), "--objective.l2_sp", "0.01", "--train.batch_size", "4"]  # fmt: skip
    assert main(arguments) == 0
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert "l2_sp" in next(line for line in lines if line["phase"] == "train")["terms"]


def test_bad_input_is_refused_in_words(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*arguments: str) -> str:
        assert masked(world, *arguments) == 2  # type: ignore[arg-type]
        return " ".join(capsys.readouterr().err.split())

    assert "it is a share of the depth" in refused(tmp_path / "a", "--depth", "2")  # type: ignore[arg-type]
    assert "lower the threshold" in refused(tmp_path / "b", "--depth", "1", "--threshold", "2")  # type: ignore[arg-type]
    assert not (tmp_path / "b").exists()
    (tmp_path / "c").mkdir()
    (tmp_path / "c/mine").touch()
    assert "no folder of weights" in refused(tmp_path / "c")  # type: ignore[arg-type]
    assert masked(world, tmp_path / "d") == 0
    assert "holds other weights" in refused(tmp_path / "d", "--depth", "0")  # type: ignore[arg-type]
    assert main(["mask", str(tmp_path / "e"), "--model", "x", "--keywords", str(world / "words.txt")]) == 2
    assert "nothing to weigh" in capsys.readouterr().err
