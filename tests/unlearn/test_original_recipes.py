"""recipes/original and recipes/best: every file is read as the command reads it and, with its names changed to a small world's, runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import datasets
import pytest
import quiz
import tiny
import torch
import yaml

from retrograd.cli import _parse, main
from retrograd.data.rows import build_rows
from retrograd.lm.model import load_tokenizer
from retrograd.runs.files import read_tensors
from retrograd.select.places import places_of
from retrograd.settings.run import MagicConfig, check, queries_of
from retrograd.settings.tasks import tasks_from
from retrograd.settings.unlearn import check_unlearn

FOLDER = Path(__file__).parents[2] / "recipes/original"
FILES = sorted(path.stem for path in FOLDER.glob("*.yaml") if re.match(r"\d_|attribution_", path.stem))
ATTRIBUTIONS = [name for name in FILES if name.startswith("attribution")]
RUNS = [name for name in FILES if not name.startswith("attribution")]
PAIRED = ("selective", "compatible")
QUICK = ("1_value_as_run", "3_positive_only_corrected", "7_all_tokens_as_run", "attribution_wikitext_as_run")
DATA = ("wt1k", "retain1k", "chat1k", "forget1k", "forget10k", "lie1k", "lie10k", "remove", "remove4k", "retain_pairs")
MODEL = "EleutherAI/deep-ignorance-unfiltered"
BEST = sorted(path.stem for path in (FOLDER.parent / "best").glob("*.yaml"))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, 100 documents, questions, and a selection by each rule of scores drawn at random."""
    folder = tmp_path_factory.mktemp("world")
    quiz.save(folder / "model", positions=1024)
    tiny.save_jsonl(folder / "train.jsonl", tiny.sentences(100))
    (folder / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in quiz.questions(3)))
    tokenizer = load_tokenizer(str(folder / "model"))
    documents = datasets.Dataset.from_list([{"text": text} for text in tiny.sentences(100)])
    places = places_of(build_rows(documents, tokenizer, max_length=1024, vocab_size=len(tokenizer)))
    draw = torch.Generator().manual_seed(0)
    for name in ("wmdp", "mmlu"):
        torch.save(places.scatter(torch.randn(len(places), generator=draw)), folder / f"{name}.pt")
    settings = {"model": str(folder / "model"), "data": {"dataset": str(folder / "train.jsonl"), "max_length": 1024}}
    (folder / "rows.yaml").write_text(yaml.safe_dump(settings))
    said = ["--rows", str(folder / "rows.yaml"), "--sign", "negative", "--alignment", "target", "--controls"]
    for rule in ("value", "sign", "positive_only", "negative_only", *PAIRED):
        against = ["--against", str(folder / "mmlu.pt"), "--against_sign", "negative", "--against_alignment", "target"]
        more = against if rule in PAIRED else []
        scores = ["--scores", str(folder / "wmdp.pt"), "--rule", rule]
        assert main(["select", str(folder / rule), *scores, *more, *said]) == 0
    return folder


def renamed(name: str, world: Path, folder: Path = FOLDER) -> dict[str, Any]:
    """The settings of a file, its names changed and nothing else."""
    names = {"cais/mmlu": "asked.jsonl", "data/wmdp_robust.jsonl": "asked.jsonl", MODEL: "model"}
    names |= {f"data/{one}.jsonl": "train.jsonl" for one in DATA}

    def changed(value: Any) -> Any:
        if isinstance(value, dict):
            kept = {
                k: v for k, v in value.items() if not (value.get("dataset") == "cais/mmlu" and k in ("subset", "split"))
            }
            return {k: changed(v) for k, v in kept.items()}
        if isinstance(value, list):
            return [changed(v) for v in value]
        if isinstance(value, str) and value.startswith("selections/"):
            return str(world / value.split("/")[-1])
        if isinstance(value, str) and value.partition(",")[0] in names:
            source, comma, read = value.partition(",")
            return str(world / names[source]) + comma + read
        return value

    return changed(yaml.safe_load((folder / f"{name}.yaml").read_text(encoding="utf8")))


def written(name: str, world: Path, folder: Path) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(renamed(name, world)))
    return path


@pytest.mark.parametrize("name", FILES)
def test_every_file_is_read_and_says_how_it_is_called(name: str) -> None:
    text, path = (FOLDER / f"{name}.yaml").read_text(encoding="utf8"), f"recipes/original/{name}.yaml"
    verb = "magic" if name in ATTRIBUTIONS else "unlearn"
    call = next(line for line in text.splitlines() if line.startswith(f"# retrograd {verb}")).split()[3:]
    assert call[-2:] == ["--config", path]
    config = _parse(verb, [*call[:-1], str(FOLDER / f"{name}.yaml")])
    assert config.model == MODEL
    assert config.dtype == ("float32" if "corrected" in name else "bfloat16")
    if isinstance(config, MagicConfig):
        check(config)
        assert set(queries_of(config)) == {"wmdp", "mmlu"}
        assert config.attribute == ("examples" if "documents" in name else "tokens")
    else:
        check_unlearn(config)
        assert config.method == "weighted_sft"
        assert config.objective.retain == 0
        rule = name.split("_", 1)[1].rsplit("_as_run", 1)[0].rsplit("_corrected", 1)[0].split("_batch")[0]
        where = "corrected" if "corrected" in name else "original"
        assert config.weights == (() if rule == "all_tokens" else (f"selections/{where}/{rule}",))


def test_there_is_a_file_for_every_experiment() -> None:
    assert len(RUNS) == 2 * 7 + 2 * 2
    assert {name.split("_")[0] for name in RUNS} == set("1234567")
    assert set(tasks_from(FOLDER / "tasks.yaml")) >= {"mmlu", "wmdp_bio_robust_viral_vector_research"}
    table = (FOLDER / "README.md").read_text(encoding="utf8")
    for rule in ("value", "sign", "positive_only", "negative_only", *PAIRED):
        assert f"`{rule}`" in table


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in RUNS])
def test_every_run_runs(name: str, world: Path, tmp_path: Path) -> None:
    assert main(["unlearn", "weighted_sft", str(tmp_path / "run"), "--config", str(written(name, world, tmp_path)),
                 "--export", "False", *short(name)]) == 0  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    given = renamed(name, world)["train"]
    passes, batch = given.get("epochs", 1), given["batch_size"]
    assert len(lines) == -(-100 * passes // batch)
    peak = max(line["lr"] for line in lines)
    assert peak == pytest.approx(1e-5, rel=0.3 if batch == 150 else 1e-6)
    final = read_tensors(tmp_path / "run/checkpoints/final.safetensors")[0]
    dtype = torch.float32 if "corrected" in name else torch.bfloat16
    assert {x.dtype for key, x in final.items() if key.startswith("params.")} == {dtype}


def short(name: str) -> list[str]:
    """A warmup in steps is longer than a run of 100 documents."""
    return ["--train.warmup_steps", "2"] if name.endswith("as_run") and name[0] in "34567" else []


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in ATTRIBUTIONS])
def test_every_attribution_runs_and_gives_selections(name: str, world: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main(["magic", str(run), "--config", str(written(name, world, tmp_path))]) == 0
    scores = torch.load(run / "scores.pt", weights_only=True)
    assert scores.shape[-1] == 2
    assert scores.isfinite().all()
    selection = ["select", str(tmp_path / "selection"), "--rule", "value", "--controls"]
    assert main([*selection, "--scores", f"{run}:wmdp", "--against", f"{run}:mmlu"]) == 0


def test_there_are_files_for_all_ten_attribution_runs() -> None:
    runs = {"wikitext_documents", "wikitext", "retain", "chat", "forget1k", "lie1k", "forget", "lie"}  # two asked twice
    assert set(ATTRIBUTIONS) == {f"attribution_{run}_{how}" for run in runs for how in ("as_run", "corrected")}
    text = (FOLDER / "README.md").read_text(encoding="utf8")
    assert [name for name in DATA[:7] if f'save("{name}"' not in text] == []


@pytest.mark.parametrize("name", BEST)
def test_every_row_of_the_best_results_is_read_and_called_as_it_says(name: str) -> None:
    path = FOLDER.parent / f"best/{name}.yaml"
    text = path.read_text(encoding="utf8")
    call = next(line for line in text.splitlines() if line.startswith("# retrograd unlearn")).split()[3:]
    assert call[-2:] == ["--config", f"recipes/best/{name}.yaml"]
    config = _parse("unlearn", [*call[:-1], str(path)])
    check_unlearn(config)
    assert config.model == MODEL
    assert config.objective.as_run == name.endswith("as_run")
    shown = (path.parent / "README.md").read_text(encoding="utf8")
    assert f"{name}.yaml" in shown or name.endswith("corrected")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n == BEST[-1] else pytest.mark.slow) for n in BEST])
def test_every_row_of_the_best_results_runs(name: str, world: Path, tmp_path: Path) -> None:
    given = renamed(name, world, FOLDER.parent / "best")
    if given.get("weights"):
        given["weights"] = [str(tmp_path / "keywords")]
        (tmp_path / "words.txt").write_text(f"{tiny.sentences(1)[0].split()[1]}\n")
        assert main(["mask", str(tmp_path / "keywords"), "--model", str(world / "model"), "--data.dataset",
                     str(world / "train.jsonl"), "--data.max_length", "1024",
                     "--keywords", str(tmp_path / "words.txt")]) == 0  # fmt: skip
    given["max_length"] = 1024  # the small model reads no more
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(given))
    text = (FOLDER.parent / f"best/{name}.yaml").read_text(encoding="utf8")
    method = next(line for line in text.splitlines() if line.startswith("# retrograd unlearn")).split()[3]
    command = ["unlearn", method, str(tmp_path / "run"), "--config", str(tmp_path / "recipe.yaml"), "--export", "False"]
    assert main(command) == 0
    flags = json.loads((tmp_path / "run/manifest.json").read_text())["flags"]
    assert bool(flags) == name.endswith("as_run")
