"""recipes/published: every file is read as its command reads it and, with its names changed to a small world's, runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml

from retrograd.cli import _parse, main
from retrograd.experiment.grid import GridMaker
from retrograd.runs.scores import read_scores
from retrograd.settings.grid import read_grid
from retrograd.settings.run import MagicConfig, check

FOLDER = Path(__file__).parents[2] / "recipes/published"
RUNS = sorted(path.stem for path in FOLDER.glob("*.yaml") if "grid" not in path.stem)
FAMILY = {"magic_gemma_lora": "gemma", "token_weighting_7b": "gpt-neox"}
ROWS = 6


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    for family in ("gpt2-tied", "gemma", "gpt-neox"):
        tiny.save_model(folder / family, family)
    chat = "{% for m in messages %}{{ m.role }} {% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %} {% endfor %}"
    (folder / "gemma" / "chat_template.jinja").write_text(chat)
    for name, count, seed in (("train", ROWS, 0), ("long", 60, 0), ("query", 2, 1)):
        texts = tiny.sentences(count, seed)
        tiny.save_jsonl(folder / f"{name}.jsonl", texts)
        (folder / f"{name}_questions.jsonl").write_text(
            "".join(json.dumps({"question": text}) + "\n" for text in texts)
        )
        turns = [[{"role": "user", "content": text}, {"role": "assistant", "content": text}] for text in texts]
        (folder / f"{name}_chats.jsonl").write_text("".join(json.dumps({"messages": one}) + "\n" for one in turns))
    return folder


def renamed(name: str, world: Path) -> list[str]:
    """Flags that change the names of a file, and where a warmup needs more steps than so few rows give, the batch."""
    kind = {"magic_gemma_lora": "_chats"}.get(name, "")
    query = {"token_weighting_7b": "_questions"}.get(name, kind)
    small = ["--train.batch_size", "2", "--train.micro_batch_size", "2"]
    more = {"magic_gemma_lora": ["--data.max_length", "32", "--query.max_length", "32", *small],
            "token_weighting_7b": ["--data.chunk_length", "8", "--query.subset", "None", "--query.split", "train", *small]}  # fmt: skip
    splits = ["--query.split", "train"] if "gpt2" in name else []
    return [
        "--model", str(world / FAMILY.get(name, "gpt2-tied")), "--data.dataset", str(world / f"{'long' if name == 'token_weighting_7b' else 'train'}{kind}.jsonl"),
        "--query.dataset", str(world / f"query{query}.jsonl"), *splits, *more.get(name, []),
    ]  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_a_recipe_is_read_and_says_of_every_number_whether_it_is_published(name: str, tmp_path: Path) -> None:
    text = (FOLDER / f"{name}.yaml").read_text()
    config = _parse("magic", [str(tmp_path / "run"), "--config", str(FOLDER / f"{name}.yaml")])
    assert isinstance(config, MagicConfig)
    check(config)
    head = text[: text.index("\nmodel:")]
    assert "EleutherAI/" in head or "arXiv:" in head
    values: dict[str, Any] = yaml.safe_load(text)
    if name == "magic_gemma_lora":
        for setting in ("rank", "alpha", "lr", "batch_size", "epochs", "eps_root"):
            line = next(line for line in text.splitlines() if line.strip().startswith(f"{setting}:"))
            assert line.endswith("# not published")
    if name == "token_weighting_7b":
        assert (values["lora"]["rank"], values["data"]["chunk_length"], values["train"]["batch_size"]) == (
            32,
            1024,
            128,
        )


@pytest.mark.parametrize("name", RUNS)
def test_a_recipe_runs_under_the_names_of_a_small_model(name: str, world: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = ["magic", str(run), "--config", str(FOLDER / f"{name}.yaml"), *renamed(name, world)]
    assert main(command) == 0
    per_token = name == "token_weighting_7b"
    scores = read_scores(run / "scores.pt", per_token)
    assert torch.isfinite(scores).all()
    assert scores.abs().max() > 0
    assert scores.shape[0] == (2 if "gpt2" in name else 1)  # a column for each query, where the recipe has them
    kept = yaml.safe_load((run / "run_config.yaml").read_text())
    published = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())["train"]
    changed = {"batch_size", "micro_batch_size"} if "gpt2" not in name else set()
    assert {key: kept["train"][key] for key in published if key not in changed} == {
        key: value for key, value in published.items() if key not in changed
    }


def test_the_grid_is_every_combination_and_runs_under_other_names(world: Path, tmp_path: Path) -> None:
    spec = read_grid(FOLDER / "smoothness_grid.yaml")
    assert len(GridMaker(spec).cells) == 12
    names = [f"model={world / 'gpt2-tied'}", f"data={world / 'train.jsonl'}", "data_split=train",
             f"query={world / 'query.jsonl'}", "query_split=train", "epochs=1", "subsets=3", "fraction=0.2"]  # fmt: skip
    small = GridMaker(read_grid(FOLDER / "smoothness_grid.yaml", tuple(names)))
    settings = [task.what["settings"]["train"] for task in small.cells.values()]
    assert [(one["lr"], one["batch_size"], one["eps_root"]) for one in settings] == list(small.cells)
