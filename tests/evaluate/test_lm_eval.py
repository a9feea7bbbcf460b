"""Parity with lm-evaluation-harness: the same answer to every question, offline, on tasks of our own.

Needs `pip install retrograd[eval]`; skipped without it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Literal

import pytest
import quiz
import torch
import yaml
from pyarrow import parquet
from rich.console import Console

from retrograd.data.documents import load_documents
from retrograd.evaluate.evaluate import evaluate
from retrograd.lab.build import lab
from retrograd.lm.model import load_causal_lm, load_tokenizer
from retrograd.query.choices import Scored, score_questions
from retrograd.query.questions import build_questions
from retrograd.settings.commands import EvaluateConfig, LabConfig

pytest.importorskip("lm_eval")

QUESTIONS = 60
INTRO = "The following are multiple choice questions (with answers) about {}.\n\n"
LETTERED = "{{question.strip()}}\nA. {{choices[0]}}\nB. {{choices[1]}}\nC. {{choices[2]}}\nD. {{choices[3]}}\nAnswer:"
OLD = "Question: {{question.strip()}}\nA) {{choices[0]}}\nB) {{choices[1]}}\nC) {{choices[2]}}\nD) {{choices[3]}}\nAnswer:"
LETTER = {"doc_to_text": LETTERED, "doc_to_choice": ["A", "B", "C", "D"], "metric_list": [{"metric": "acc"}]}
CLOZE = {"doc_to_text": "Question: {{question.strip()}}\nAnswer:", "doc_to_choice": "{{choices}}",
         "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]}  # fmt: skip
TASKS: dict[str, dict[str, Any]] = {
    "plain": LETTER,
    "legacy": {**LETTER, "doc_to_text": OLD},
    "wmdp": {**LETTER, "description": INTRO.format("biology")},
    "mmlu": {**LETTER, "description": INTRO.format("{{subject.replace('_', ' ')}}")},
    "plain_cloze": CLOZE,
    "wmdp_cloze": {**CLOZE, "description": "Complete the following biology questions with the correct answer.\n\n"},
}


def harness(folder: Path, model: Any, tokenizer: Any, name: str, max_length: int | None) -> tuple[dict, list[dict]]:
    """lm-eval's results and per-question records; our own task files only, everything local."""
    from lm_eval.evaluator import evaluate as harness_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    (folder / "tasks").mkdir(exist_ok=True)
    task = {
        "task": f"local_{name}", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "quiz.jsonl")}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_target": "answer", "num_fewshot": 0, **TASKS[name],
    }  # fmt: skip
    (folder / "tasks" / f"{name}.yaml").write_text(yaml.safe_dump(task))
    manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=7, max_length=max_length)
    found = harness_evaluate(lm, manager.load([f"local_{name}"]), bootstrap_iters=10, log_samples=True)
    return found["results"][f"local_{name}"], sorted(found["samples"][f"local_{name}"], key=lambda one: one["doc_id"])


def compare(folder: Path, name: str, family: str, bos: bool, positions: int, max_length: int | None) -> Scored:
    rows = quiz.questions(QUESTIONS, seed=7)
    (folder / "quiz.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    saved = str(quiz.save(folder / "model", family, positions, bos))
    ours, tokenizer = load_causal_lm(saved), load_tokenizer(saved)
    form = "cloze" if "cloze" in name else "letter"
    questions = build_questions(
        load_documents(str(folder / "quiz.jsonl")), tokenizer, form=form, template=name,
        max_length=max_length or positions,
    )  # fmt: skip
    assert (questions.cut > 0) == (min(max_length or positions, positions) < 100)
    scored = score_questions(ours, ours.params, questions, 8)
    results, samples = harness(folder, ours.module, tokenizer, name, max_length)
    theirs = torch.tensor([[float(one[0]) for one in sample["filtered_resps"]] for sample in samples]).double()
    torch.testing.assert_close(scored.logprobs, theirs, rtol=1e-5, atol=1e-5)
    assert torch.equal(scored.chosen, theirs.argmax(1))
    assert scored.correct.tolist() == [sample["acc"] for sample in samples]
    assert scored.accuracy == results["acc,none"]
    assert len(scored.gold) == QUESTIONS
    assert scored.logprobs.std(0).min() > 0.01, "log-likelihoods that do not depend on the question agree too easily"
    if form == "cloze":
        assert scored.correct_norm.tolist() == [sample["acc_norm"] for sample in samples]
        assert scored.accuracy_norm == results["acc_norm,none"]
        assert scored.correct_norm.tolist() != scored.correct.tolist()
    return scored


@pytest.mark.parametrize("positions,max_length", [(512, None), (512, 48), (48, None)], ids=["whole", "cut", "context"])
@pytest.mark.parametrize("bos", [False, True], ids=["no-bos", "bos"])
@pytest.mark.parametrize("name", ["wmdp", "mmlu", "wmdp_cloze"])
def test_answers_are_those_of_lm_eval(
    tmp_path: Path, name: str, bos: bool, positions: int, max_length: int | None
) -> None:
    scored = compare(tmp_path, name, "llama-tied", bos, positions, max_length)
    assert 0.05 < scored.accuracy < 0.95
    assert len(set(scored.chosen.tolist())) >= 3, "a model that always gives one letter agrees too easily"


@pytest.mark.parametrize("family", ["gpt-neox", "cohere"])
@pytest.mark.parametrize("name", ["plain", "legacy", "plain_cloze"])
def test_answers_of_other_families_and_prompts(tmp_path: Path, name: str, family: str) -> None:
    compare(tmp_path, name, family, False, 512, None)


# ---------------------------------------------------------------- the lab, through both backends


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small lab whose models know some of it."""
    folder = tmp_path_factory.mktemp("lab") / "lab"
    lab(LabConfig(folder, facts=24, width=64, layers=2, epochs=6, batch_size=16, workers=1), Console(quiet=True))
    return folder


def answers(
    world: Path, output: Path, backend: Literal["retrograd", "lm-eval"]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The summary, and the table of each model and lab task by what it is called in `retrograd.lab.tasks`."""
    config = EvaluateConfig((str(world / "models" / "random"),), output, lab=world, backend=backend)
    assert evaluate(config, Console(quiet=True)) == 0
    tables = {}
    for path in output.glob("*/*.parquet"):
        table = parquet.read_table(path).to_pydict()
        if "logprobs" in table:
            tables[path.parent.name, path.stem.removeprefix("lab_")] = table
    return json.loads((output / "summary.json").read_text()), tables


def test_the_lab_has_the_same_answers_here_and_there(world: Path, tmp_path: Path) -> None:
    """Every model, side, split and form: log-likelihoods, chosen answers, plain and normalised accuracies, intervals."""
    (ours, here), (theirs, there) = (answers(world, tmp_path / one, one) for one in ("retrograd", "lm-eval"))
    assert set(here) == set(there)
    assert len(here) == 3 * 2 * 3 * 2
    for pair, mine in here.items():
        other = there[pair]
        torch.testing.assert_close(
            torch.tensor(mine["logprobs"]), torch.tensor(other["logprobs"]), rtol=1e-5, atol=1e-4
        )
        for column in ("question", "gold", "chosen", "right"):
            assert mine[column] == other[column], (pair, column)
        letter = pair[1].endswith("letter")
        assert other["right_norm"] == ([None] * len(mine["gold"]) if letter else mine["right_norm"])
    results = {(e["model"], e["task"].removeprefix("lab_")): e for e in theirs["results"]}
    accuracies = set()
    for entry in ours["results"]:
        if entry["form"] not in ("letter", "cloze"):
            continue
        other = results[entry["model"], entry["task"]]
        for key in ("accuracy", "interval", "right", "questions", "form", "role"):
            assert other[key] == entry[key], (entry["task"], key)
        if entry["form"] == "cloze":
            assert other["metrics"]["acc"]["value"] == entry["accuracy_plain"]
            assert other["metrics"]["acc_norm"]["value"] == entry["accuracy_norm"]
        accuracies.add(entry["accuracy"])
    assert len(accuracies) > 6, "accuracies that are all alike agree too easily"
    compared = {(e["model"], e["task"].removeprefix("lab_")): e for e in theirs["comparisons"] if e["metric"] == "acc"}
    assert all(compared[e["model"], e["task"]]["p"] == e["p"] for e in ours["comparisons"])
    assert len(compared) == len(ours["comparisons"]) == 2 * 12


def test_lm_eval_finds_the_tasks_of_a_lab_that_was_moved(world: Path, tmp_path: Path) -> None:
    """By lm-eval's own way in, with its own loader."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    moved = Path(shutil.copytree(world, tmp_path / "elsewhere"))
    (moved / "questions/retain_heldout.jsonl").write_text((world / "questions/forget_heldout.jsonl").read_text())
    manager = TaskManager(include_path=str(moved / "lm_eval"), include_defaults=False)
    assert manager.all_groups == ["lab"]
    names = [name for name in manager.all_subtasks if "heldout" in name or "forget_paraphrase" in name]
    arguments = {"pretrained": str(moved / "models/base"), "dtype": "float32", "device": "cpu"}
    found = simple_evaluate("hf", arguments, names, task_manager=manager, batch_size=8, bootstrap_iters=0)
    scores = {(e["side"], e["split"], e["form"]): e for e in json.loads((world / "lab.json").read_text())["scores"]
              if e["model"] == "base"}  # fmt: skip
    for side, split, form in (name.removeprefix("lab_").split("_") for name in names):
        asked = "forget" if split == "heldout" else side  # as overwritten above
        entry = found["results"][f"lab_{side}_{split}_{form}"]
        assert entry["acc,none"] == scores[asked, split, form]["accuracy"]
