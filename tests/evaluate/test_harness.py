"""Evaluation by lm-eval: what its answers become in files and in the summary. lm-eval itself is not needed here."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from pyarrow import parquet

from retrograd.cli import main
from retrograd.evaluate.intervals import compare, wilson
from retrograd.evaluate.lm_eval.samples import answers_of, form_of, read_sampled, sampled_from, write_sampled
from retrograd.evaluate.lm_eval.summary import summarise_harness
from retrograd.evaluate.lm_eval.task_files import described_tasks, task_files, task_settings
from retrograd.evaluate.tell import failed_path, measured_path
from retrograd.lab.exams import CHOICES
from retrograd.lab.tasks import question_tasks
from retrograd.query.prompts import TEMPLATES
from retrograd.runs.errors import RunError
from retrograd.settings.tasks import Role

N = 40
GOLD = [(3 * k + k // 4) % 4 for k in range(N)]  # balanced, no rhythm


def choices(task: str, chosen: list[int], options: list[str], **changes: Any) -> list[dict[str, Any]]:
    """Records of multiple-choice questions, as lm-eval leaves them."""
    found = []
    for number, (best, gold) in enumerate(zip(chosen, GOLD)):
        scores = [(-1.0 if place == best else -4.0, False) for place in range(len(options))]
        found.append({
            "doc_id": number, "doc": {}, "target": gold, "arguments": [("Q", f" {text}") for text in options],
            "resps": [[score] for score in scores], "filtered_resps": scores, "filter": "none", "metrics": ["acc"],
            "doc_hash": f"{task}{number}", "prompt_hash": f"p{number}", "target_hash": "t", "acc": float(best == gold),
            **changes,
        })  # fmt: skip
    return found


def written(task: str, right: list[int]) -> list[dict[str, Any]]:
    """Records of generated answers with two filters; the second finds none."""
    return [
        {"doc_id": number, "doc": {}, "target": "4", "arguments": [("Q", {"until": ["."]})], "resps": [["so 4"]],
         "filtered_resps": ["4"], "filter": kind, "metrics": ["exact_match"], "doc_hash": f"{task}{number}",
         "prompt_hash": f"p{number}", "target_hash": "t", "exact_match": float(good and kind == "loose")}
        for kind in ("loose", "strict") for number, good in enumerate(right)
    ]  # fmt: skip


def evaluated(tasks: dict[str, list[dict[str, Any]]], group: str | None = None) -> dict[str, Any]:
    """What lm_eval.evaluator.evaluate returns for such records; the group's accuracy weighs by size."""
    results: dict[str, Any] = {}
    for name, records in tasks.items():
        results[name] = {"name": name, "alias": name, "sample_len": len({one["doc_id"] for one in records})}
        for metric, kind in dict.fromkeys((metric, one["filter"]) for one in records for metric in one["metrics"]):
            values = [one[metric] for one in records if one["filter"] == kind]
            results[name] |= {f"{metric},{kind}": sum(values) / len(values), f"{metric}_stderr,{kind}": "N/A"}
    if group:
        every = [one["acc"] for records in tasks.values() for one in records]
        results[group] = {"alias": group, "name": group, "acc,none": sum(every) / len(every), "acc_stderr,none": 0.07}
    return {
        "results": results, "samples": tasks, "group_subtasks": {group: list(tasks)} if group else {}, "configs": {},
        "versions": dict.fromkeys(results, 2.0), "n-shot": dict.fromkeys(tasks, 5),
        "higher_is_better": {name: {"acc": True, "exact_match": True} for name in results},
        "not_finite": 0, "n-samples": {name: {"original": 100, "effective": N} for name in tasks},
    }  # fmt: skip


def wrong(number: int) -> list[int]:
    """All right but the last so many."""
    return [gold if place < N - number else (gold + 1) % 4 for place, gold in enumerate(GOLD)]


def save(folder: Path, model: str, name: str, found: dict[str, Any], digest: str | None = None) -> Path:
    path = measured_path(folder, model, name)
    write_sampled(path, sampled_from(found), {"model": model, "dtype": "float32", "digest": digest or f"d-{model}"})
    return path


def summary(folder: Path, models: list[str], names: dict[str, Role], **others: Any) -> dict[str, Any]:
    found = summarise_harness(folder, models, names, models[0], others.get("knows"), others.get("never"))
    assert "NaN" not in json.dumps(found)
    return found


def result(found: dict[str, Any], model: str, task: str) -> dict[str, Any]:
    return next(entry for entry in found["results"] if (entry["model"], entry["task"]) == (model, task))


LETTERS, WORDS = ["A", "B", "C", "D"], ["oak", "elm", "ash", "fir"]


# ---------------------------------------------------------------- files


def test_a_file_has_a_row_for_each_question_and_filter(tmp_path: Path) -> None:
    found = evaluated({"letters": choices("letters", wrong(3), LETTERS), "sums": written("sums", [1] * 30 + [0] * 10)})
    path = save(tmp_path, "m", "both", found)
    rows = parquet.read_table(path).to_pylist()
    assert len(rows) == N + 2 * N
    first = rows[0]
    assert (first["task"], first["question"], first["filter"]) == ("letters", 0, "none")
    assert first["options"] == [" A", " B", " C", " D"]
    assert (first["gold"], first["chosen"], first["right"]) == (GOLD[0], GOLD[0], True)
    assert first["right_norm"] is first["response"] is None
    assert rows[N - 1]["right"] is False
    last = rows[-1]
    assert (last["filter"], last["response"], last["logprobs"]) == ("strict", "4", [])
    assert last["gold"] is last["chosen"] is last["right"] is None
    assert dict(last["metrics"]) == {"exact_match": 0.0}
    again, about = read_sampled(path)
    assert again == sampled_from(found)
    assert about["digest"] == "d-m"
    path.write_bytes(b"PAR1")
    with pytest.raises(RunError, match=r"both.parquet is damaged"):
        read_sampled(path)


@pytest.mark.parametrize(
    ("target", "options", "gold"),
    [(2, WORDS, 2), (4, WORDS, None), ("ash", WORDS, 2), ("yew", WORDS, None), ([0, 1], WORDS, None),
     ("oak", ["oak"] * 4, None), (True, WORDS, None)],
)  # fmt: skip
def test_the_right_option_is_one_or_unknown(target: Any, options: list[str], gold: int | None) -> None:
    records = choices("t", [0] * N, options, target=target, acc=0.0)
    assert sampled_from(evaluated({"t": records})).tasks["t"][0].gold == gold


def test_only_what_lm_eval_counts_by_argmax_is_read_as_an_answer() -> None:
    letters = sampled_from(evaluated({"t": choices("t", wrong(5), LETTERS)})).tasks["t"]
    words = sampled_from(evaluated({"t": choices("t", wrong(5), WORDS)})).tasks["t"]
    other = sampled_from(evaluated({"t": choices("t", wrong(5), WORDS, acc=1.0)})).tasks["t"]
    text = sampled_from(evaluated({"t": written("t", [1] * N)})).tasks["t"]
    assert [form_of(one) for one in (letters, words, text)] == ["letter", "cloze", None]
    found = answers_of(letters)
    assert found is not None
    assert found.scored.correct.tolist() == [1.0] * (N - 5) + [0.0] * 5
    assert found.scored.mass is not None
    assert found.scored.mass[0] == pytest.approx(math.exp(-1) + 3 * math.exp(-4))
    assert answers_of(words) is not None
    assert answers_of(words).scored.mass is None  # type: ignore[union-attr]
    assert answers_of(other) is answers_of(text) is None


def test_options_without_their_question_are_no_options() -> None:
    records = choices("t", wrong(0), WORDS)
    for one in records:
        one["arguments"] += [("", argument[1]) for argument in one["arguments"]]
        one["filtered_resps"] = [*one["filtered_resps"], *[(0.0, True)] * 4]
        one |= {"metrics": ["acc", "acc_mutual_info"], "acc_mutual_info": 1.0}
    first = sampled_from(evaluated({"t": records})).tasks["t"][0]
    assert (len(first.options), len(first.logprobs), first.chosen) == (4, 4, GOLD[0])


# ---------------------------------------------------------------- the summary


def test_metrics_intervals_and_paired_comparisons(tmp_path: Path) -> None:
    for model, number in (("base", 4), ("cut", 16)):
        tasks = {"a": choices("a", wrong(number), LETTERS), "b": choices("b", wrong(2 * number), LETTERS)}
        save(tmp_path, model, "group", evaluated(tasks, "group"))
        save(tmp_path, model, "sums", evaluated({"sums": written("sums", [1] * (N - number) + [0] * number)}))
    found = summary(tmp_path, ["base", "cut"], {"group": None, "sums": None})
    assert found["missing"] == []
    a = result(found, "cut", "a")
    assert (a["accuracy"], a["right"], a["questions"], a["of"]) == (24 / 40, 24, N, 100)
    assert a["interval"] == list(wilson(24, 40))
    assert (a["version"], a["num_fewshot"], a["form"]) == (2.0, 5, "letter")
    group = result(found, "base", "group")
    assert (group["accuracy"], group["right"], group["questions"]) == (68 / 80, 68, 80)
    assert group["metrics"]["acc"]["stderr"] == 0.07
    sums = result(found, "cut", "sums")
    assert sums["metrics"]["exact_match,loose"]["value"] == 24 / 40
    assert sums["metrics"]["exact_match,strict"]["interval"] == list(wilson(0, 40))
    assert "accuracy" not in sums
    pairs = {(entry["task"], entry["metric"]): entry for entry in found["comparisons"]}
    assert set(pairs) == {(t, "acc") for t in ("a", "b", "group")} | {
        ("sums", f"exact_match,{f}") for f in ("loose", "strict")
    }
    expected = compare([1] * 36 + [0] * 4, [1] * 24 + [0] * 16)
    assert pairs["a", "acc"]["p"] == expected.p
    assert pairs["a", "acc"]["interval"] == list(expected.interval)
    assert pairs["group", "acc"]["difference"] == pytest.approx(-(12 + 24) / 80)


def test_a_metric_that_is_no_mean_of_right_and_wrong_has_no_interval(tmp_path: Path) -> None:
    found = evaluated({"a": choices("a", wrong(4), WORDS)})
    found["results"]["a"] |= {"acc,none": 0.5, "f1,none": 0.25, "f1_stderr,none": 0.125}
    save(tmp_path, "base", "a", found)
    entry = result(summary(tmp_path, ["base"], {"a": None}), "base", "a")
    assert entry["metrics"]["f1"] == {"value": 0.25, "stderr": 0.125, "higher_is_better": None}
    assert entry["accuracy"] == 0.5
    assert entry["interval"] is entry["right"] is None


def test_positions_leave_out_what_was_to_stay(tmp_path: Path) -> None:
    for model, number in (("base", 0), ("never", 30), ("half", 15)):
        for name in ("secret", "general"):
            save(tmp_path, model, name, evaluated({name: choices(name, wrong(number), LETTERS)}))
    names: dict[str, Role] = {"secret": "forget", "general": "retain"}
    found = summary(tmp_path, ["base", "never", "half"], names, knows="base", never="never")
    assert [(e["model"], e["task"], e["position"]) for e in found["positions"]] == [("half", "secret", 0.5)]


def test_no_letters_no_verdict(tmp_path: Path) -> None:
    for model, number in (("base", 0), ("lost", 35)):
        save(tmp_path, model, "words", evaluated({"words": choices("words", wrong(number), WORDS)}))
    for one in summary(tmp_path, ["base", "lost"], {"words": None})["models"].values():
        assert one["verdict"] is None
        assert "none of these tasks is answered by letter" in one["reasons"][0]


def test_verdicts_where_answers_are_letters(tmp_path: Path) -> None:
    chosen = {"base": wrong(2), "same": wrong(2), "near": wrong(3), "constant": [1] * N, "lost": wrong(34)}
    for model, letters in chosen.items():
        digest = "d-base" if model == "same" else None
        tasks = {"a": choices("a", letters, LETTERS), "b": choices("b", letters, LETTERS)}
        save(tmp_path, model, "group", evaluated(tasks, "group"), digest)
        save(tmp_path, model, "words", evaluated({"words": choices("words", wrong(0), WORDS)}), digest)
    found = summary(tmp_path, list(chosen), {"group": None, "words": None})["models"]
    verdicts = {model: one["verdict"] for model, one in found.items()}
    assert verdicts == {
        "base": "untouched",
        "same": "untouched",
        "near": "healthy",
        "constant": "destroyed",
        "lost": "destroyed",
    }
    assert found["constant"]["reasons"][0] == "group: B is the answer to 100% of 80 questions"
    assert found["near"]["reasons"] == ["no loss found in group, words"]
    forgiven = summary(tmp_path, list(chosen), {"group": "forget", "words": None})["models"]["lost"]
    assert forgiven["verdict"] == "healthy"


def test_both_forms_under_one_name_are_told_apart(tmp_path: Path) -> None:
    tasks = {"a": choices("a", wrong(0), LETTERS), "b": choices("b", wrong(0), WORDS)}
    save(tmp_path, "base", "group", evaluated(tasks, "group"))
    save(tmp_path, "near", "group", evaluated(tasks, "group"))
    assert summary(tmp_path, ["base", "near"], {"group": None})["models"]["near"]["reasons"] == [
        "no loss found in group (cloze), group (letter)"
    ]


def test_what_failed_is_missing_and_never_a_number(tmp_path: Path) -> None:
    for model in ("base", "nan", "gone"):
        records = choices("a", wrong(0), LETTERS)
        if model == "nan":
            records[7]["filtered_resps"] = [(math.nan, False)] * 4
        if model != "gone":
            save(tmp_path, model, "a", evaluated({"a": records, "b": choices("b", wrong(0), LETTERS)}, "a-and-b"))
    failed_path(tmp_path, "gone", "a").parent.mkdir()
    failed_path(tmp_path, "gone", "a").write_text("ValueError: no network\n")
    found = summary(tmp_path, ["base", "nan", "gone"], {"a": None})
    assert found["missing"] == [
        {"model": "nan", "task": "a", "reason": "a: 1 of 40 questions have no finite log-likelihood"},
        {"model": "gone", "task": "a", "reason": "ValueError: no network"},
    ]
    for task in ("a", "a-and-b"):
        entry = result(found, "nan", task)
        assert entry["accuracy"] is entry["interval"] is entry["metrics"]["acc"]["value"] is None
    assert result(found, "nan", "b")["accuracy"] == 1
    assert result(found, "gone", "a")["metrics"] is None
    missing = [(e["model"], e["task"]) for e in found["comparisons"] if e["difference"] is None]
    assert missing == [("nan", "a"), ("nan", "a-and-b"), ("gone", "a"), ("gone", "b"), ("gone", "a-and-b")]
    assert found["models"]["nan"]["verdict"] == "destroyed"
    assert found["models"]["gone"]["verdict"] is None
    rows = parquet.read_table(measured_path(tmp_path, "nan", "a")).to_pylist()
    assert rows[7]["chosen"] is rows[7]["right"] is None


def test_a_metric_that_is_not_finite_is_missing(tmp_path: Path) -> None:
    found = evaluated({"sums": written("sums", [1] * N)})
    found["results"]["sums"]["f1,none"] = math.nan
    save(tmp_path, "base", "sums", found)
    told = summary(tmp_path, ["base"], {"sums": None})
    assert told["missing"] == [{"model": "base", "task": "sums", "reason": "sums: f1 is not finite"}]
    assert result(told, "base", "sums")["metrics"]["f1"]["value"] is None
    save(tmp_path, "base", "sums", evaluated({"sums": written("sums", [1] * N)}) | {"not_finite": 3})
    told = summary(tmp_path, ["base"], {"sums": None})
    assert "logits were not finite in 3 forward passes" in told["missing"][0]["reason"]
    assert {one["value"] for one in result(told, "base", "sums")["metrics"].values()} == {None}


def test_other_questions_and_other_weights_are_refused(tmp_path: Path) -> None:
    save(tmp_path, "base", "a", evaluated({"a": choices("a", wrong(0), LETTERS)}))
    save(tmp_path, "late", "a", evaluated({"a": choices("a", wrong(0), LETTERS, doc_hash="changed")}))
    with pytest.raises(RunError, match="a: the models were asked different questions"):
        summary(tmp_path, ["base", "late"], {"a": None})
    save(tmp_path, "base", "b", evaluated({"b": choices("b", wrong(0), LETTERS)}), digest="other")
    with pytest.raises(RunError, match="different weights"):
        summary(tmp_path, ["base"], {"a": None, "b": None})


# ---------------------------------------------------------------- the lab's tasks, and refusals


def test_the_lab_writes_a_task_for_every_side_split_and_form() -> None:
    files = task_files(question_tasks(), CHOICES)
    group = yaml.safe_load(files["lm_eval/lab.yaml"])
    assert group["group"] == "lab"
    assert {f"lm_eval/{name}.yaml" for name in group["task"]} | {"lm_eval/lab.yaml", "lm_eval/questions.py"} == set(
        files
    )
    assert len(group["task"]) == 2 * 3 * 2
    text = files["lm_eval/lab_forget_paraphrase_cloze.yaml"]
    assert "custom_dataset: !function questions.load\n" in text
    assert "file: forget_paraphrase.jsonl\n" in text


def test_a_template_in_the_words_of_lm_eval() -> None:
    letter = task_settings(TEMPLATES["mmlu"], 3)
    assert letter["doc_to_text"] == (
        "The following are multiple choice questions (with answers) about {{subject.strip().replace('_', ' ')}}.\n\n"
        "{{question.strip()}}\nA. {{choices[0]}}\nB. {{choices[1]}}\nC. {{choices[2]}}\nAnswer:"
    )
    assert letter["doc_to_choice"] == ["A", "B", "C"]
    cloze = task_settings(TEMPLATES["plain_cloze"], 4)
    assert cloze["doc_to_text"] == "Question: {{question.strip()}}\nAnswer:"
    assert [one["metric"] for one in cloze["metric_list"]] == ["acc", "acc_norm"]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--tasks", "x.yaml", "--num_fewshot", "5"], "--num_fewshot is for --backend lm-eval"),
        (["--tasks", "x.yaml", "--forget", "x"], "--forget is for --backend lm-eval"),
        (["--backend", "lm-eval"], "give --lab DIR or --tasks"),
        (["--backend", "lm-eval", "--tasks", "a", "--num_fewshot", "-1"], "--num_fewshot is -1; it has to be at least 0"),
        (["--backend", "lm-eval", "--tasks", "a", "--limit", "0"], "--limit is 0; it has to be at least 1"),
        (["--backend", "lm-eval", "--lab", "x", "--forget", "a"], "--lab brings its own tasks"),
        (["--backend", "lm-eval", "--tasks", "a"], 'pip install "retrograd[eval]"'),
    ],
)  # fmt: skip
def test_refusals(
    tmp_path: Path, flags: list[str], told: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # not installed
    assert main(["evaluate", "model", "--output", str(tmp_path / "x"), *flags]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("backend", ["retrograd", "lm-eval"])
def test_a_lab_of_an_earlier_version_is_refused(
    tmp_path: Path, backend: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "lab.json").write_text('{"scores": []}')
    flags = ["--lab", str(tmp_path), "--backend", backend, "--output", str(tmp_path / "x")]
    assert main(["evaluate", "model", *flags]) == 2
    assert "has no tasks.yaml: an earlier version built it" in capsys.readouterr().err


def test_a_lab_that_lost_a_file_of_lm_eval_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no lm_eval/lab_forget_taught_letter.yaml; put it back"):
        described_tasks(tmp_path, question_tasks())
