"""`retrograd evaluate --backend lm-eval` on tasks of our own, offline: its numbers are those of lm-eval itself.

Needs `pip install retrograd[eval]`; skipped without it.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import quiz
import tiny
import torch
import yaml
from breaking import broken, changed, choosy, constant
from pyarrow import parquet
from rich.console import Console

from retrograd.cli import main
from retrograd.data.documents import load_documents
from retrograd.evaluate.evaluate import evaluate
from retrograd.evaluate.intervals import wilson
from retrograd.evaluate.lm_eval.model import _as_begun, ask_harness, find_harness
from retrograd.evaluate.lm_eval.task_files import task_settings
from retrograd.lm.model import load_causal_lm, load_tokenizer
from retrograd.query.choices import build_questions, score_questions
from retrograd.query.prompts import TEMPLATES
from retrograd.settings.commands import EvaluateConfig

pytest.importorskip("lm_eval")

QUESTIONS = 40


def write(folder: Path, name: str, data: Path, **settings: Any) -> None:
    task = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test", "metadata": {"version": 3.0}, **settings}  # fmt: skip
    (folder / f"{name}.yaml").write_text(
        yaml.safe_dump({key: value for key, value in task.items() if value is not None})
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, ways to break it, and tasks of every kind of output."""
    folder = tmp_path_factory.mktemp("harness")
    base = choosy(quiz.save(folder / "base"))
    letter = load_tokenizer(str(base))(" C")["input_ids"][-1]
    changed(base, "constant", lambda weights: constant(weights, letter))
    changed(base, "nan", broken)
    tasks = folder / "tasks"
    tasks.mkdir()
    for name, seed in (("one", 1), ("two", 2)):
        rows = quiz.questions(QUESTIONS if name == "one" else QUESTIONS // 2, seed)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        letters = {**task_settings(TEMPLATES["mmlu"], 4), "num_fewshot": None, "metadata": {"version": 3.0}}
        write(tasks, f"letters_{name}", folder / f"{name}.jsonl", tag="letters", **letters)
    write(tasks, "texts", folder / "one.jsonl", **task_settings(TEMPLATES["plain_cloze"], 4))
    group = {"group": "both", "task": ["letters_one", "letters_two"], "metadata": {"version": 1.0},
             "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}]}  # fmt: skip
    (tasks / "both.yaml").write_text(yaml.safe_dump(group))
    tiny.save_jsonl(folder / "prose.jsonl", tiny.sentences(6, 4))
    rolling = [{"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False}]
    write(tasks, "prose", folder / "prose.jsonl", output_type="loglikelihood_rolling", doc_to_text="",
          doc_to_target="{{text}}", metric_list=rolling)  # fmt: skip
    exact = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]
    write(tasks, "written", folder / "two.jsonl", output_type="generate_until", doc_to_text="Q: {{question}}",
          doc_to_target="{{choices[answer]}}", metric_list=exact,
          generation_kwargs={"until": ["\n"], "max_gen_toks": 4, "do_sample": False})  # fmt: skip
    write(tasks, "absent", folder / "absent.jsonl", **task_settings(TEMPLATES["plain"], 4))
    return folder


def run(output: Path, models: list[Path], **settings: Any) -> tuple[int, dict[str, Any]]:
    config = EvaluateConfig(tuple(map(str, models)), output, backend="lm-eval", **settings)
    code = evaluate(config, Console(quiet=True))
    return code, json.loads((output / "summary.json").read_text())


def result(summary: dict[str, Any], model: str, task: str) -> dict[str, Any]:
    return next(entry for entry in summary["results"] if (entry["model"], entry["task"]) == (model, task))


@pytest.fixture(scope="module")
def done(world: Path) -> tuple[int, dict[str, Any]]:
    models = [world / name for name in ("base", "constant", "nan")]
    asked = "both,texts,prose,written,absent"
    return run(world / "out", models, tasks=asked, include_path=world / "tasks", num_fewshot=2)


def test_numbers_are_those_of_lm_evals_own_way_in(done: tuple[int, dict[str, Any]], world: Path) -> None:
    """Few-shot examples, versions, standard errors and groups included; another loader, and all tasks at once."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(world / "tasks"), include_defaults=False)
    arguments = {"pretrained": str(world / "base"), "dtype": "float32", "device": "cpu"}
    names = ["both", "texts", "prose", "written"]
    found = simple_evaluate("hf", arguments, names, num_fewshot=2, task_manager=manager, batch_size=4)
    for task in ("letters_one", "letters_two", "both", "texts", "prose", "written"):
        entry, theirs = result(done[1], "base", task), found["results"][task]
        metrics = [key.removesuffix(",none") for key in theirs if key.endswith(",none") and "_stderr" not in key]
        assert set(entry["metrics"]) == set(metrics)
        for metric in metrics:
            assert entry["metrics"][metric]["value"] == pytest.approx(theirs[f"{metric},none"], rel=1e-5)
            error = theirs[f"{metric}_stderr,none"]
            assert entry["metrics"][metric]["stderr"] == (None if error == "N/A" else pytest.approx(error, rel=1e-5))
        assert entry["version"] == found["versions"][task]
        assert entry["num_fewshot"] == found["n-shot"].get(task)
    assert result(done[1], "base", "letters_one")["num_fewshot"] == 2
    assert result(done[1], "base", "texts")["num_fewshot"] == 0  # the task says so
    for task, records in found["samples"].items():
        name = "both" if task.startswith("letters") else task
        rows = [
            row for row in parquet.read_table(world / f"out/base/{name}.parquet").to_pylist() if row["task"] == task
        ]
        records = sorted(records, key=lambda one: one["doc_id"])
        assert [row["prompt_hash"] for row in rows] == [one["prompt_hash"] for one in records]
        if task not in ("written", "prose"):
            scores = [[one[0] for one in record["filtered_resps"]] for record in records]
            torch.testing.assert_close([row["logprobs"] for row in rows], scores, rtol=1e-5, atol=1e-5)
            assert [row["right"] for row in rows] == [bool(one["acc"]) for one in records]
    letters = result(done[1], "base", "both")
    assert letters["interval"] == list(wilson(letters["right"], QUESTIONS + QUESTIONS // 2))
    assert result(done[1], "base", "prose")["metrics"]["word_perplexity"]["higher_is_better"] is False


def test_broken_models_and_absent_data(done: tuple[int, dict[str, Any]], world: Path) -> None:
    code, summary = done
    assert code == 1
    missing = {(entry["model"], entry["task"]) for entry in summary["missing"]}
    assert missing == {(model, "absent") for model in ("base", "constant", "nan")} | {
        ("nan", task) for task in ("both", "texts", "prose", "written")
    }
    assert "absent.jsonl" in (world / "out/base/absent.failed.txt").read_text()
    for task in ("both", "letters_one", "texts"):
        assert result(summary, "nan", task)["accuracy"] is None
    assert summary["models"]["nan"]["verdict"] == summary["models"]["constant"]["verdict"] == "destroyed"
    assert summary["models"]["constant"]["reasons"][0].startswith(
        f"both: C is the answer to 100% of {QUESTIONS + QUESTIONS // 2}"
    )
    assert summary["models"]["base"]["verdict"] == "untouched"
    assert {e["task"] for e in summary["comparisons"] if e["difference"] is not None and e["model"] == "constant"} == {
        "letters_one", "letters_two", "both", "texts", "written"
    }  # fmt: skip


@pytest.fixture
def small(world: Path, tmp_path: Path) -> dict[str, Any]:
    return {"output": tmp_path / "out", "models": [world / "base"], "include_path": world / "tasks", "limit": 12}


def test_what_is_done_is_not_repeated_and_comes_out_the_same(
    small: dict[str, Any], world: Path, tmp_path: Path
) -> None:
    code, summary = run(**small, tasks="letters,texts", num_fewshot=3)
    assert code == 0
    first = small["output"] / "base"
    before = {path.name: path.stat().st_mtime_ns for path in first.glob("*.parquet")}
    assert set(before) == {"letters.parquet", "texts.parquet"}
    kept = parquet.read_table(first / "letters.parquet")
    assert kept.num_rows == 2 * 12
    (first / "letters.parquet").unlink()
    random.seed(5)
    assert run(**small, tasks="letters,texts", num_fewshot=3) == (0, summary)
    assert (first / "texts.parquet").stat().st_mtime_ns == before["texts.parquet"]
    again = parquet.read_table(first / "letters.parquet")
    assert again.equals(kept)
    assert again.schema.metadata == kept.schema.metadata
    alone = run(**{**small, "output": tmp_path / "alone"}, tasks="letters", num_fewshot=3)[1]
    assert result(alone, "base", "letters_two") == result(summary, "base", "letters_two")


def test_random_numbers_are_put_back() -> None:
    def state() -> list[Any]:
        return [random.getstate(), np.random.get_state()[1].tolist(), torch.random.get_rng_state().tolist()]

    before = state()
    with _as_begun():
        drawn = random.random(), float(np.random.rand()), float(torch.rand(()))
    assert state() == before
    assert drawn[0] == random.Random(0).random()
    assert drawn[1] == np.random.RandomState(1234).rand()
    assert drawn[2] == float(torch.rand((), generator=torch.Generator().manual_seed(1234)))


def test_another_evaluation_is_refused(small: dict[str, Any], world: Path, tmp_path: Path) -> None:
    tasks = Path(shutil.copytree(world / "tasks", tmp_path / "tasks"))
    small["include_path"] = tasks
    run(**small, tasks="texts")
    with pytest.raises(ValueError, match="num_fewshot: nothing → 2"):
        run(**small, tasks="texts", num_fewshot=2)
    with pytest.raises(ValueError, match="limit: 12 → 9"):
        run(**{**small, "limit": 9}, tasks="texts")
    with pytest.raises(ValueError, match="letters: nothing → a task"):
        run(**small, tasks="texts,letters")
    (tasks / "texts.yaml").write_text((tasks / "texts.yaml").read_text().replace("Answer:", "It is"))
    with pytest.raises(ValueError, match=r"include_path.content: [\s\S]*texts.content: "):
        run(**small, tasks="texts")


def test_a_yaml_file_is_a_task_and_forgetting_is_no_damage(small: dict[str, Any], world: Path) -> None:
    files = {name: f"{world}/tasks/{name}.yaml" for name in ("letters_one", "texts")}
    small |= {"include_path": None, "models": [world / "base", world / "constant"]}
    code, summary = run(**small, tasks=",".join(files.values()), forget=files["letters_one"])
    assert code == 0
    assert {entry["task"]: entry["role"] for entry in summary["results"]} == {"letters_one": "forget", "texts": None}
    assert summary["models"]["constant"]["verdict"] is None  # 12 questions show no habit, and texts no ability


@pytest.mark.parametrize(
    ("tasks", "told"),
    [
        (",", "--tasks names no task"),
        ("leters_one", r"no task, tag or group 'leters_one'. Near it: letters_one"),
        ("{world}/nowhere.yaml", "cannot read .*nowhere.yaml"),
        ("{world}/list.yaml", "list.yaml is no task of lm-eval"),
        ("texts,{world}/tasks/texts.yaml", "would have the same file 'texts'"),
    ],
)
def test_tasks_that_are_not_there_are_refused(world: Path, tasks: str, told: str) -> None:
    (world / "list.yaml").write_text("- task: x\n")
    with pytest.raises(ValueError, match=told):
        find_harness([one for one in tasks.format(world=world).split(",") if one], world / "tasks")


def test_other_refusals(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--backend", "lm-eval", "--output", str(tmp_path / "x"), "--tasks", "texts"]
    assert main(["evaluate", "model", *flags, "--include_path", str(tmp_path / "nowhere")]) == 2
    assert "is no folder; give one with YAML files" in capsys.readouterr().err
    assert main(["evaluate", "model", *flags, "--include_path", str(world / "tasks"), "--forget", "prose"]) == 2
    assert "--forget names 'prose', which is not among --tasks: texts" in capsys.readouterr().err
    source = str(world / "base")
    harness = find_harness(["absent"], world / "tasks")
    with pytest.raises(ValueError, match="lm-eval cannot do absent: FileNotFoundError"):
        ask_harness(
            harness, "absent", load_causal_lm(source), load_tokenizer(source), shots=None, limit=None, batch_size=1
        )


def test_float64_is_float64(world: Path, tmp_path: Path) -> None:
    """Whatever the model's own code casts to float32: to float64's rounding the log-likelihoods of our own scorer."""
    source = str(quiz.save(tmp_path / "llama", "llama-tied"))
    lm, tokenizer = load_causal_lm(source, dtype="float64"), load_tokenizer(source)
    harness = find_harness(["texts"], world / "tasks")
    told = ask_harness(harness, "texts", lm, tokenizer, shots=None, limit=5, batch_size=4)
    records = sorted(told["samples"]["texts"], key=lambda one: one["doc_id"])
    theirs = torch.tensor([[one[0] for one in record["filtered_resps"]] for record in records], dtype=torch.float64)
    asked = build_questions(load_documents(str(world / "one.jsonl")), tokenizer, form="cloze", limit=5)
    torch.testing.assert_close(score_questions(lm, lm.params, asked).logprobs, theirs, rtol=1e-12, atol=1e-12)
