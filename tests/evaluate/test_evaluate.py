"""Evaluation: what the files hold is what the models answer, work is never repeated, and broken models are called so."""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import quiz
import tiny
import torch
from breaking import broken, changed, choosy, constant, noise
from pyarrow import parquet
from rich.console import Console

from retrograd.cli import main
from retrograd.evaluate.answers import read_measured
from retrograd.evaluate.evaluate import evaluate
from retrograd.evaluate.intervals import position
from retrograd.evaluate.letter_habits import letter_habits
from retrograd.evaluate.show import show
from retrograd.evaluate.verdict import Evaluated, diagnose
from retrograd.lm.model import load_causal_lm, load_tokenizer
from retrograd.query.choices import Scored, build_questions, score_questions
from retrograd.query.prepare import Answers, Samples, Texts
from retrograd.runs.errors import RunError
from retrograd.settings.commands import EvaluateConfig
from retrograd.settings.tasks import READY, Task, tasks_from

MARK = 7.0  # in the embedding of a token that no text has: the model of the fixed cycle


def run(output: Path, models: list[Path], **settings: Any) -> tuple[int, dict[str, Any]]:
    code = evaluate(EvaluateConfig(tuple(map(str, models)), output, **settings), Console(quiet=True))
    return code, json.loads((output / "summary.json").read_text())


def ask(path: Path, model: Path, form: str, number: int, seed: int, known: float = 0.9) -> Path:
    """Questions of which the model has a share right: the right answers are what it answers."""
    rows = quiz.questions(number, seed)
    lm = load_causal_lm(str(model))
    asked = build_questions(quiz.dataset(rows), load_tokenizer(str(model)), form=form, template="auto")
    found = score_questions(lm, lm.params, asked)
    for place, (row, chosen) in enumerate(zip(rows, found.chosen.tolist())):
        row["answer"] = chosen if place < known * number else (chosen + 1) % 4
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def mark(weights: dict[str, torch.Tensor]) -> None:
    weights["gpt_neox.embed_in.weight"][0, 0] = MARK


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its questions, and the ways to break it."""
    folder = tmp_path_factory.mktemp("evaluate")
    base = choosy(quiz.save(folder / "base"))
    letter = load_tokenizer(str(base))(" C")["input_ids"][-1]
    shutil.copytree(base, folder / "copy")
    changed(base, "nudged", lambda weights: noise(weights, 1e-5))
    changed(base, "damaged", lambda weights: noise(weights, 0.004))
    changed(base, "constant", lambda weights: constant(weights, letter))
    changed(base, "nan", broken)
    changed(base, "cycle", mark)
    changed(base, "other", lambda weights: noise(weights, 1.0))
    ask(folder / "general.jsonl", base, "letter", 120, 1)
    ask(folder / "told.jsonl", base, "cloze", 40, 2)
    ask(folder / "secret.jsonl", base, "letter", 32, 3, known=1.0)
    tiny.save_jsonl(folder / "prose.jsonl", tiny.sentences(12, 4))
    (folder / "tasks.yaml").write_text(
        f"general: {{dataset: {folder}/general.jsonl, role: retain}}\n"
        f"told: {{dataset: {folder}/told.jsonl, form: cloze, normalise: true}}\n"
        f"first: {{dataset: {folder}/secret.jsonl, split: 'train[:20]', role: forget, group: secret}}\n"
        f"second: {{dataset: {folder}/secret.jsonl, split: 'train[20:]', role: forget, group: secret}}\n"
        f"prose: {{dataset: {folder}/prose.jsonl, form: text}}\n"
        f"samples: {{dataset: {folder}/prose.jsonl, form: generate, limit: 2, new_tokens: 5}}\n"
    )
    return folder


NAMES = ["base", "copy", "nudged", "damaged", "constant", "nan", "cycle", "other"]


@pytest.fixture(scope="module")
def done(world: Path) -> tuple[int, dict[str, Any]]:
    """All models on all tasks; the marked one answers A B C D A B … whatever it is asked by letter."""
    import retrograd.query.prepare as stage

    def cycling(lm: Any, params: Any, questions: Any, *arguments: Any, **options: Any) -> Scored:
        found = score_questions(lm, params, questions, *arguments, **options)
        if questions.form == "letter" and params["gpt_neox.embed_in.weight"][0, 0] == MARK:
            best = torch.arange(len(questions)) % 4
            found.logprobs.scatter_(1, best[:, None], -0.01)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "score_questions", cycling)
        sources = [world / name for name in NAMES]
        return run(
            world / "out", sources, tasks=world / "tasks.yaml", knows=str(world / "base"), never=str(world / "other")
        )


def result(summary: dict[str, Any], model: str, task: str) -> dict[str, Any]:
    return next(entry for entry in summary["results"] if (entry["model"], entry["task"]) == (model, task))


# ---------------------------------------------------------------- the five diagnoses, and two more


@pytest.mark.parametrize(
    ("model", "verdict", "reason"),
    [
        ("base", "untouched", "it is the reference"),
        ("copy", "untouched", "the same weights"),
        ("nudged", "healthy", "no loss found"),
        ("damaged", "damaged", "right, the reference"),
        ("constant", "destroyed", "C is the answer to 100%"),
        ("nan", "destroyed", "120 of 120 questions have no finite log-probability"),
        ("cycle", "destroyed", "100% of the answers repeat the one 4 questions before"),
        ("other", "destroyed", "of its lead over chance is left"),
    ],
)
def test_the_diagnosis(done: tuple[int, dict[str, Any]], model: str, verdict: str, reason: str) -> None:
    found = done[1]["models"][model]
    assert found["verdict"] == verdict, found["reasons"]
    assert any(reason in told for told in found["reasons"]), found["reasons"]


def test_what_the_verdicts_rest_on(done: tuple[int, dict[str, Any]], world: Path) -> None:
    models = done[1]["models"]
    letters = models["constant"]["numbers"]["letters"]["general"]
    golds = [json.loads(line)["answer"] for line in (world / "general.jsonl").read_text().splitlines()]
    assert letters["constant"] == pytest.approx([golds.count(k) / 120 for k in range(4)])
    assert letters["shares"] == [0, 0, 1, 0]
    assert letters["entropy"] == 0
    assert result(done[1], "constant", "general")["accuracy"] == pytest.approx(letters["constant"][2])
    assert models["cycle"]["numbers"]["letters"]["general"]["entropy"] == pytest.approx(math.log(4))
    assert models["cycle"]["numbers"]["perplexity_ratio"]["prose"] == 1
    assert models["nudged"]["numbers"]["ability"]["general"]["lead_left"] == pytest.approx(1, abs=0.1)
    assert models["copy"]["digest"] == models["base"]["digest"] != models["nudged"]["digest"]


def test_a_failure_is_missing_and_never_a_number(done: tuple[int, dict[str, Any]]) -> None:
    code, summary = done
    assert code == 1
    assert {entry["model"] for entry in summary["missing"]} == {"nan"}
    assert {entry["task"] for entry in summary["missing"]} == {"general", "told", "first", "second", "prose", "samples"}
    for task in ("general", "told", "secret"):
        entry = result(summary, "nan", task)
        assert entry["accuracy"] is entry["interval"] is None
    assert result(summary, "nan", "prose")["perplexity"] is None
    assert [s["text"] for s in result(summary, "nan", "samples")["samples"]] == [None, None]
    assert all(e["difference"] is None for e in summary["comparisons"] if e["model"] == "nan")
    assert all(e["position"] is None for e in summary["positions"] if e["model"] == "nan")
    assert "NaN" not in json.dumps(summary)


N = 200
GOLD = [(3 * k + k // 4) % 4 for k in range(N)]  # balanced, no rhythm


def answers(chosen: list[int], mass: float | None = 0.9) -> Answers:
    """By letter, or by text without a mass: the chosen options are the likeliest."""
    s = torch.full((len(chosen), 4), -9.0, dtype=torch.float64)
    s[torch.arange(len(chosen)), chosen] = -1.0
    of_letters = None if mass is None else torch.full((len(chosen),), mass, dtype=torch.float64)
    return Answers(Scored(s, torch.ones_like(s), torch.tensor(GOLD), of_letters, ["x"] * N), [None] * N)


def wrong(number: int) -> list[int]:
    """All right but the last so many."""
    return [gold if place < N - number else (gold + 1) % 4 for place, gold in enumerate(GOLD)]


def texts(loss: float) -> Texts:
    return Texts([loss] * 3, [10] * 3, [0, 1, 2])


LETTER, TEXT, SECRET = Task("x"), Task("x", form="text"), Task("x", role="forget")


@pytest.mark.parametrize(
    ("task", "here", "there", "verdict", "reason"),
    [
        (LETTER, answers(wrong(3)), answers(wrong(0)), "healthy", "no loss found"),
        (LETTER, answers(wrong(30)), answers(wrong(0)), "damaged", "85.0% right, the reference 100.0%"),
        (LETTER, answers(wrong(130)), answers(wrong(0)), "destroyed", "13% of its lead over chance is left"),
        (LETTER, answers(wrong(0), 0.3), answers(wrong(0)), "damaged", "30.0% of the probability on letters"),
        (LETTER, answers([2] * 185 + [0, 1, 3] * 5), answers(wrong(0)), "destroyed", "C is the answer to 92% of 200"),
        (LETTER, answers([2] * 185 + [0, 1, 3] * 5), answers([2] * 190 + [0] * 10), None, "nothing here measures"),
        (LETTER, answers(([0, 1] * N)[:N]), answers(wrong(0)), "destroyed", "repeat the one 2 questions before"),
        (LETTER, None, answers(wrong(0)), None, "missing: task"),
        (LETTER, answers(wrong(0)), None, None, "missing: task"),
        (SECRET, answers(wrong(130)), answers(wrong(0)), None, "nothing here measures general ability"),
        (TEXT, texts(1.05), texts(1.0), "healthy", "no loss found in task"),
        (TEXT, texts(1.2), texts(1.0), "damaged", "1.22 times the reference's"),
        (TEXT, texts(1.8), texts(1.0), "destroyed", "2.23 times the reference's"),
        (TEXT, texts(math.nan), texts(1.0), "destroyed", "not finite"),
        (TEXT, texts(800.0), texts(1.0), "destroyed", "not finite"),
    ],
)
def test_each_reason_by_itself(task: Task, here: Any, there: Any, verdict: str | None, reason: str) -> None:
    found = diagnose(Evaluated("a", "1", {"task": here}), Evaluated("b", "2", {"task": there}), {"task": task})
    assert found.verdict == verdict, found.reasons
    assert any(reason in told for told in found.reasons), found.reasons


def test_a_broken_model_is_no_better_for_being_its_own_reference() -> None:
    model = Evaluated("a", "1", {"task": answers([1] * N)})
    found = diagnose(model, model, {"task": LETTER})
    assert found.verdict == "destroyed"
    assert found.reasons == ["task: B is the answer to 100% of 200 questions", "it is the reference"]


# ---------------------------------------------------------------- the files and the summary


def test_files_hold_what_score_questions_says(done: tuple[int, dict[str, Any]], world: Path) -> None:
    lm, tokenizer = load_causal_lm(str(world / "damaged")), load_tokenizer(str(world / "damaged"))
    for task, form, template, file in (("general", "letter", "mmlu", "general"), ("told", "cloze", None, "told")):
        rows = quiz.dataset([json.loads(line) for line in (world / f"{file}.jsonl").read_text().splitlines()])
        expected = score_questions(lm, lm.params, build_questions(rows, tokenizer, form=form, template=template), 16)
        path = world / f"out/damaged/{task}.parquet"
        table = parquet.read_table(path).to_pydict()
        assert table["logprobs"] == expected.logprobs.tolist()
        assert table["prompt_hash"] == expected.hashes
        assert table["chosen"] == expected.chosen.tolist()
        assert table["right"] == [bool(x) for x in expected.correct.tolist()]
        assert table["right_norm"] == [bool(x) for x in expected.correct_norm.tolist()]
        assert table["letter_mass"] == ([None] * 40 if expected.mass is None else expected.mass.tolist())
        assert table["question"] == list(range(len(rows)))
        assert set(table["dtype"] + table["model"] + table["task"]) == {"float32", "damaged", task}
        answers, about = read_measured(path)
        assert isinstance(answers, Answers)
        assert answers.scored.logprobs.equal(expected.logprobs)
        assert about["template"] == (template or "plain_cloze")
        accuracy = expected.accuracy_norm if task == "told" else expected.accuracy
        assert result(done[1], "damaged", task)["accuracy"] == accuracy
    subjects = result(done[1], "damaged", "general")["subjects"]
    assert {name: entry["questions"] for name, entry in subjects.items()} == dict.fromkeys(quiz.SUBJECTS, 60)


def test_a_failed_question_is_null_in_its_file(done: tuple[int, dict[str, Any]], world: Path) -> None:
    table = parquet.read_table(world / "out/nan/general.parquet").to_pydict()
    assert set(table["chosen"] + table["right"]) == {None}
    assert all(math.isnan(value) for row in table["logprobs"] for value in row)


def test_perplexity_and_samples_are_the_models_own(done: tuple[int, dict[str, Any]], world: Path) -> None:
    lm, tokenizer = load_causal_lm(str(world / "base")), load_tokenizer(str(world / "base"))
    texts = [json.loads(line)["text"] for line in (world / "prose.jsonl").read_text().splitlines()]
    nats, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        nats += float(lm.module(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    entry = result(done[1], "base", "prose")
    assert entry["tokens"] == count
    assert entry["perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-5)
    measured = [read_measured(world / f"out/base/{task}.parquet")[0] for task in ("prose", "samples")]
    assert isinstance(measured[0], Texts)
    assert isinstance(measured[1], Samples)
    prompt = torch.tensor([tokenizer(texts[0])["input_ids"][:8]])
    made = lm.module.generate(prompt, max_new_tokens=5, do_sample=False, pad_token_id=0)[0, prompt.shape[1] :].tolist()
    made = made[: made.index(0)] if 0 in made else made
    assert measured[1].texts[0] == tokenizer.decode(made)


def test_groups_weigh_every_question_the_same(done: tuple[int, dict[str, Any]]) -> None:
    first, second, both = (result(done[1], "damaged", task) for task in ("first", "second", "secret"))
    assert (first["questions"], second["questions"], both["questions"]) == (20, 12, 32)
    assert both["right"] == first["right"] + second["right"]
    assert both["accuracy"] == both["right"] / 32


def test_results_have_metrics_as_those_of_lm_eval(done: tuple[int, dict[str, Any]]) -> None:
    for entry in done[1]["results"]:
        metrics = {name: one["value"] for name, one in (entry["metrics"] or {}).items()}
        if entry["form"] == "text":
            assert metrics == {"perplexity": entry["perplexity"]}
        elif entry["form"] == "generate":
            assert metrics == {}
        else:
            assert metrics == {"acc_norm" if entry["normalised"] else "acc": entry["accuracy"]}
    assert {entry["metric"] for entry in done[1]["comparisons"]} == {"acc", "acc_norm"}


def test_comparisons_and_positions(done: tuple[int, dict[str, Any]]) -> None:
    there = {(entry["model"], entry["task"]): entry for entry in done[1]["comparisons"]}
    assert there["copy", "general"]["difference"] == 0
    one = there["damaged", "general"]
    assert one["difference"] == pytest.approx((one["only_model"] - one["only_reference"]) / 120)
    assert one["interval"][0] <= one["difference"] <= one["interval"][1]
    where = {(entry["model"], entry["task"]): entry["position"] for entry in done[1]["positions"]}
    assert where["copy", "secret"] == 1
    assert 0 < where["damaged", "secret"] < 1
    assert ("copy", "general") not in where


def test_the_position_is_that_of_drawing_questions() -> None:
    draw = torch.Generator().manual_seed(0)
    model, knows, never = ((torch.rand(300, generator=draw) < p).double() for p in (0.6, 0.9, 0.3))
    found = position(model, knows, never)
    assert found is not None
    assert found.position == pytest.approx(float((model.mean() - never.mean()) / (knows.mean() - never.mean())))
    places = torch.randint(0, 300, (5000, 300), generator=draw)
    a, b, c = (values[places].mean(1) for values in (model, knows, never))
    expected = torch.quantile((a - c) / (b - c), torch.tensor([0.025, 0.975], dtype=torch.float64))
    assert found.interval == pytest.approx(expected.tolist(), abs=0.02)
    assert position(model, never, never) is None
    with pytest.raises(ValueError, match="neither right"):
        position(model * torch.nan, knows, never)


def test_calibration_removes_a_letters_bias() -> None:
    draw = torch.Generator().manual_seed(0)
    gold = torch.arange(200) % 4
    s = torch.randn(200, 4, generator=draw, dtype=torch.float64) - 8
    s[torch.arange(200), gold] += 6
    ones = torch.ones_like(s)
    fair = Scored(s, ones, gold, s.exp().sum(1), ["x"] * 200)
    biased = Scored(s + torch.tensor([0.0, 0.0, 20.0, 0.0]), ones, gold, s.exp().sum(1), ["x"] * 200)
    habits, unbiased = letter_habits(biased), letter_habits(fair)
    assert habits is not None
    assert unbiased is not None
    assert biased.accuracy == 0.25
    assert habits.calibrated == pytest.approx(unbiased.calibrated)
    assert habits.calibrated > 0.95
    assert unbiased.gold_rhythm == 1  # these right answers are themselves a cycle: no evidence against the model


# ---------------------------------------------------------------- resuming, sharing, refusing


@pytest.fixture
def small(world: Path, tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "tasks.yaml").write_text(
        f"general: {{dataset: {world}/general.jsonl, limit: 24}}\nprose: {{dataset: {world}/prose.jsonl, form: text}}\n"
    )
    return {"output": tmp_path / "out", "models": [world / "base", world / "damaged"], "tasks": tmp_path / "tasks.yaml"}


def times(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*.parquet")}


def test_what_is_done_is_not_repeated(small: dict[str, Any], world: Path) -> None:
    output = small["output"]
    code, summary = run(**small)
    assert code == 0
    before = times(output)
    assert len(before) == 4
    kept = parquet.read_table(output / "damaged/general.parquet")
    (output / "damaged/general.parquet").unlink()
    assert run(**small) == (0, summary)
    after = times(output)
    assert [name for name in before if after[name] != before[name]] == ["damaged/general.parquet"]
    assert parquet.read_table(output / "damaged/general.parquet").equals(kept)
    run(**{**small, "models": [world / "base", world / "nudged"]})  # another model joins
    assert {name: time for name, time in times(output).items() if "nudged" not in name} == after


def test_the_rest_goes_on_when_something_fails(small: dict[str, Any], world: Path, tmp_path: Path) -> None:
    small["tasks"].write_text(small["tasks"].read_text() + f"late: {{dataset: {tmp_path}/late.jsonl}}\n")
    code, summary = run(**small)
    assert code == 1
    assert [(e["model"], e["task"]) for e in summary["missing"]] == [("base", "late"), ("damaged", "late")]
    assert "nothing exists there" in summary["missing"][0]["reason"]
    assert result(summary, "base", "late")["accuracy"] is None
    assert summary["models"]["damaged"]["verdict"] in (None, "damaged")
    shutil.copy(world / "told.jsonl", tmp_path / "late.jsonl")
    assert run(**small)[0] == 0
    assert not list(small["output"].rglob("*.failed.txt"))
    code, summary = run(**{**small, "models": [world / "base", tmp_path / "nowhere"]})
    assert code == 1
    assert summary["models"]["nowhere"]["verdict"] is None


def test_another_evaluation_is_refused(small: dict[str, Any], world: Path, tmp_path: Path) -> None:
    output, base = small["output"], tmp_path / "base"
    shutil.copytree(world / "base", base)
    small["models"] = [base]
    run(**small)
    with pytest.raises(ValueError, match="another evaluation:\n  dtype: 'float32' → 'float64'"):
        run(**small, dtype="float64")
    text = small["tasks"].read_text()
    small["tasks"].write_text(text.replace("limit: 24", "limit: 23"))
    with pytest.raises(ValueError, match=r"general.limit: 24 → 23"):
        run(**small)
    small["tasks"].write_text(text)
    (base / "model.safetensors").write_bytes((world / "damaged/model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"base.content: "):
        run(**small)
    shutil.copy(world / "base/model.safetensors", base)
    assert run(**small)[0] == 0
    shutil.copy(output / "base/general.parquet", tmp_path / "kept")
    (output / "base/general.parquet").write_bytes(b"PAR1")
    with pytest.raises(RunError, match=r"general.parquet is damaged"):
        run(**small)
    with pytest.raises(ValueError, match="is no evaluation"):
        run(**{**small, "output": tmp_path})


@pytest.mark.slow  # two processes that load everything
def test_two_ranks_share_the_work(small: dict[str, Any], tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    models = [str(model) for model in small["models"]]
    flags = ["--tasks", str(small["tasks"]), "--output", str(small["output"])]
    command = [sys.executable, "-m", "retrograd", "evaluate", *models, *flags]
    shared = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "COLUMNS": "200",
    }
    ranks = [
        subprocess.Popen(command, env={**shared, "RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    told = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert "damaged: " in told[0]
    assert told[1] == ""
    assert len(times(small["output"])) == 4
    alone = run(**{**small, "output": tmp_path / "alone"})[1]
    assert json.loads((small["output"] / "summary.json").read_text()) == alone


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{}", "has no task"),
        ("a: 3", "a is 3; it has to be settings"),
        ("a: {form: cloze}", "a has no dataset.*wmdp_bio_robust"),
        ("a: {dataset: x, shots: 5}", "settings that do not exist: shots"),
        ("a: {dataset: x, form: essay}", "letter, cloze, text, generate"),
        ("a: {dataset: x, normalise: true}", "form letter has no use for normalise"),
        ("a: {dataset: x, form: text, template: plain}", "form text has no use for template"),
        ("a: {dataset: x, limit: 0}", "limit is 0"),
        ("a/b: {dataset: x}", "names a file"),
        ("{a: {dataset: x, group: g}, b: {dataset: x, form: cloze, group: g}}", "group 'g' has tasks of several forms"),
        ("{a: {dataset: x, group: b}, b: {dataset: x}}", "group 'b' is a task"),
    ],
)
def test_tasks_that_cannot_work_are_refused(tmp_path: Path, text: str, match: str) -> None:
    (tmp_path / "tasks.yaml").write_text(text)
    with pytest.raises(ValueError, match=match):
        tasks_from(tmp_path / "tasks.yaml")


def test_ready_tasks_are_those_of_the_literature(tmp_path: Path, world: Path) -> None:
    (tmp_path / "tasks.yaml").write_text("wmdp_bio_robust:\nwmdp_bio_cloze:\nmmlu: {limit: 5}\n")
    tasks = tasks_from(tmp_path / "tasks.yaml")
    assert sum(task.expect or 0 for task in READY["wmdp_bio_robust"].values()) == 868
    assert len(tasks) == 8
    assert tasks["mmlu"].limit == 5
    assert tasks["wmdp_bio_robust_dual_use_virology"].split == "robust"
    (tmp_path / "tasks.yaml").write_text(f"wmdp_bio_cloze: {{dataset: {world}/told.jsonl, split: train, expect: 41}}\n")
    code, summary = run(tmp_path / "out", [world / "base"], tasks=tmp_path / "tasks.yaml")
    assert code == 1
    assert "40 questions, and this task 41: it is another set" in summary["missing"][0]["reason"]


def test_the_tasks_of_the_page_are_tasks(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs/evaluation.md").read_text(encoding="utf8")
    (tmp_path / "tasks.yaml").write_text(page.split("```yaml\n")[1].split("```")[0])
    assert len(tasks_from(tmp_path / "tasks.yaml")) == 12


def test_data_sets_beside_the_file_of_tasks_are_taken_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for name in ("a/both.txt", "b/both.txt", "b/here.txt"):
        (tmp_path / name).write_text("x\n")
    datasets = {"one": "both.txt", "two": "here.txt", "hub": "some/set", "full": str(tmp_path / "b/both.txt")}
    lines = [f"{name}: {{dataset: {dataset}, form: text}}\n" for name, dataset in datasets.items()]
    (tmp_path / "a/tasks.yaml").write_text("".join(lines))
    monkeypatch.chdir(tmp_path / "b")
    found = {name: task.dataset for name, task in tasks_from(tmp_path / "a/tasks.yaml").items()}
    assert found == {**datasets, "one": str(tmp_path / "a/both.txt")}


def test_command_line_refusals(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, output = str(world / "base"), ["--output", str(tmp_path / "x")]
    tasks = ["--tasks", str(world / "tasks.yaml")]
    for flags, told in [
        ([], "give --lab DIR or --tasks"), (["--lab", str(world)], "is no finished lab"),
        ([*tasks, "--knows", base], "belong together"), ([*tasks, "--batch_size", "0"], "--batch_size is 0"),
    ]:  # fmt: skip
        assert main(["evaluate", base, *output, *flags]) == 2
        assert told in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_the_lab_is_a_set_of_tasks(tmp_path: Path) -> None:
    from retrograd.lab.build import lab
    from retrograd.settings.commands import LabConfig

    found = lab(
        LabConfig(tmp_path / "lab", facts=24, width=32, layers=2, epochs=2, batch_size=32, workers=1),
        Console(quiet=True),
    )
    code, summary = run(tmp_path / "out", [tmp_path / "lab/models/random"], lab=tmp_path / "lab", batch_size=64)
    assert code == 0
    assert (tmp_path / "lab/tasks.yaml").exists()
    assert (summary["reference"], summary["knows"], summary["never"]) == ("base", "base", "filtered")
    for entry in found["scores"]:
        here = result(summary, entry["model"], f"{entry['side']}_{entry['split']}_{entry['form']}")
        assert here["accuracy"] == entry["accuracy"]
    assert (
        result(summary, "random", "prose_heldout")["perplexity"]
        > result(summary, "base", "prose_heldout")["perplexity"]
    )
    assert summary["models"]["random"]["verdict"] == "destroyed"


def test_tasks_that_are_missing_for_one_reason_are_one_line(tmp_path: Path) -> None:
    missing = [{"model": "a", "task": task, "reason": "no disk" if task == "kl" else "other tokens"} for task in
               ("one", "kl", "two")]  # fmt: skip
    summary = {"models": {}, "results": [], "comparisons": [], "positions": [], "reference": "a", "missing": missing}
    console = Console(width=100, force_terminal=False)
    with console.capture() as shown:
        show(summary, tmp_path, console)
    assert [line for line in shown.get().splitlines() if line.startswith("MISSING")] == [
        "MISSING a one, two: other tokens", "MISSING a kl: no disk",
    ]  # fmt: skip
