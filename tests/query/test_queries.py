"""Every kind of query through the command: one sweep for several, more of them later, records, refusals, warnings."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import quiz
import tiny
import torch
import yaml

from retrograd.cli import main
from retrograd.core import check
from retrograd.core.sweep import Event, Reversed, metagradient
from retrograd.runs.assemble import assemble
from retrograd.runs.journal import Journal
from retrograd.settings.run import from_yaml

FUNCTION = """
def sharp(model, tokenizer):
    ids = tokenizer("the cat sat", return_tensors="pt")["input_ids"]
    return model(input_ids=ids).logits[0, -1].log_softmax(-1).square().mean()

def fixed(model, tokenizer):
    return model(input_ids=tokenizer("cat", return_tensors="pt")["input_ids"]).logits.detach().sum()

def pair(model, tokenizer):
    return model(input_ids=tokenizer("cat", return_tensors="pt")["input_ids"]).logits[0, 0, :2]

def greedy(model):
    return 0
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("queries")
    quiz.save(folder / "model")
    tiny.save_jsonl(folder / "train.jsonl", tiny.sentences(10))
    tiny.save_jsonl(folder / "query.jsonl", tiny.sentences(3, seed=1))
    save_quiz(folder / "quiz.jsonl", [*quiz.questions(4), *quiz.questions(1, seed=1, options=2)])
    (folder / "mine.py").write_text(FUNCTION)
    return folder


def save_quiz(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


TRUST = "--trust_code"  # for queries that come from a file and name a function


def command(world: Path, run: Path, *more: str) -> list[str]:
    return [
        "magic", str(run), "--model", str(world / "model"), "--data.dataset", str(world / "train.jsonl"),
        "--train.lr", "1e-2", "--train.epochs", "2", "--train.batch_size", "5", "--train.eps_root", "1e-6",
        "--dtype", "float64", *more,
    ]  # fmt: skip


def settings(world: Path) -> dict[str, dict[str, Any]]:
    """One query of each kind; the contrast names what comes after it."""
    questions = str(world / "quiz.jsonl")
    return {
        "gap": {"contrast": ["letters", "words"]},
        "words": {"dataset": str(world / "query.jsonl")},
        "each": {"dataset": str(world / "query.jsonl"), "reduction": "none"},
        "letters": {"dataset": questions, "form": "letter"},
        "facts": {"dataset": questions, "form": "cloze", "loss": "full", "normalise": True, "limit": 2,
                  "reduction": "none"},
        "mine": {"function": f"{world / 'mine.py'}:sharp"},
    }  # fmt: skip


def flags(query: dict[str, Any]) -> list[str]:
    found = []
    for name, value in query.items():
        found += [f"--query.{name}", *(value if isinstance(value, list) else [str(value)])]
    return found


def save_queries(path: Path, queries: dict[str, dict[str, Any]]) -> str:
    path.write_text(yaml.safe_dump(queries, sort_keys=False))
    return str(path)


def scores(folder: Path) -> torch.Tensor:
    return torch.load(folder / "scores.pt", weights_only=True)


def record(run: Path, name: str) -> dict[str, Any]:
    return json.loads((run / "queries" / name / "query.json").read_text())


def contents(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def together(world: Path) -> Path:
    """All queries of `settings` in one sweep."""
    assert (
        main(command(world, world / "all", "--query_file", save_queries(world / "q.yaml", settings(world)), TRUST)) == 0
    )
    return world / "all"


@pytest.fixture(scope="module")
def plain(world: Path) -> Path:
    """A run with one query about text, its states not kept."""
    assert main(command(world, world / "plain", *flags(settings(world)["words"]))) == 0
    return world / "plain"


@pytest.fixture(scope="module")
def alone(world: Path) -> Callable[[str], Path]:
    """The run of one query, which is not changed."""

    @cache
    def run(name: str) -> Path:
        assert main(command(world, world / f"alone-{name}", *flags(settings(world)[name]))) == 0
        return world / f"alone-{name}"

    return run


COLUMNS = ["gap", "words", "each/0", "each/1", "each/2", "letters", "facts/0", "facts/1", "mine"]


def test_one_sweep_answers_every_kind_of_query(together: Path) -> None:
    found = scores(together)
    assert found.shape == (10, len(COLUMNS))
    assert found.isfinite().all()
    assert (found.abs().max(0).values > 0).all()
    by_name = dict(zip(COLUMNS, found.T))
    torch.testing.assert_close(by_name["gap"], by_name["letters"] - by_name["words"], rtol=1e-9, atol=1e-15)
    table = pq.read_table(together / "scores.parquet").to_pydict()
    assert [name for name in table if name.startswith("score")] == [f"score_{name}" for name in COLUMNS]
    for name in COLUMNS:
        assert table[f"score_{name}"] == by_name[name].tolist()
    examples = json.loads((together / "all_scores.json").read_text())["examples"]
    assert [one["scores"] for one in examples] == [dict(zip(COLUMNS, row)) for row in found.tolist()]
    assert [one["score"] for one in examples] == by_name["gap"].tolist(), "the first query ranks"


@pytest.mark.parametrize("name", ["words", "each", "letters", "facts", "mine"])
def test_each_column_is_that_of_a_run_of_its_own(together: Path, alone: Callable[[str], Path], name: str) -> None:
    own, part = scores(alone(name)), scores(together / "queries" / name)
    at = [k for k, column in enumerate(COLUMNS) if column.split("/")[0] == name]
    assert torch.equal(part, scores(together)[:, at[0] if len(at) == 1 else at])
    torch.testing.assert_close(part, own, rtol=1e-9, atol=1e-15)
    assert record(together, name)["values_nats"] == record(alone(name), "query")["values_nats"]


def test_scores_are_the_central_differences_of_retraining(together: Path, world: Path) -> None:
    loaded = assemble(from_yaml(together / "run_config.yaml"))
    weights = loaded.training.weights
    direction = torch.randn(weights.shape, generator=torch.Generator().manual_seed(3), dtype=weights.dtype)
    expected = check.central_difference(loaded.training, loaded.initial.params, loaded.queries, direction)
    found = direction @ scores(together)
    for k, name in enumerate(COLUMNS):
        assert check.relative_error(found[k], expected[k]) < 1e-6, name
        assert check.relative_error(1.001 * found[k], expected[k]) > 1e-6, name
    values = metagradient(loaded.training, loaded.initial.params, loaded.queries)[0]
    assert values.tolist() == [v for name in settings(world) for v in record(together, name)["values_nats"]]


def test_what_is_recorded_of_questions(together: Path) -> None:
    letters, facts = record(together, "letters"), record(together, "facts")
    assert letters["template"] == "mmlu"
    assert facts["template"] == "plain_cloze"
    for found, form, loss, normalised in ((letters, "letter", "four_way", False), (facts, "cloze", "full", True)):
        assert (found["kind"], found["form"], found["loss"], found["normalised"]) == ("choices", form, loss, normalised)
        assert found["questions"] == found["targets"] == len(found["answers"])
        assert found["cut"] == 0
        assert len(found["prompts"]) == 16
        right = [one["right"] == one["chosen"] for one in found["answers"]]
        assert found["accuracy"] == sum(right) / len(right)
        assert 0 <= found["accuracy_norm"] <= 1
    assert letters["subjects"] == {"river_lore": 3, "old_towns": 2}
    assert 0 < letters["mean_letter_mass"] < 1
    assert "mean_letter_mass" not in facts
    # metric and loss are one code path
    losses = [-torch.tensor(one["logprobs"]).log_softmax(0)[one["right"]] for one in letters["answers"]]
    assert letters["values_nats"] == pytest.approx([float(sum(losses) / len(losses))], rel=1e-6)
    choices = quiz.questions(4)
    expected = [
        -one["logprobs"][one["right"]] / len(row["choices"][one["right"]])
        for one, row in zip(facts["answers"], choices)
    ]
    assert facts["values_nats"] == pytest.approx(expected, rel=1e-12)
    assert record(together, "gap")["of"] == ["letters", "words"]
    assert record(together, "mine")["function"].endswith("mine.py:sharp")


def test_long_prompts_are_cut_from_the_left_and_counted(world: Path, tmp_path: Path) -> None:
    quiz.save(tmp_path / "model", positions=64)
    more = ("--model", str(tmp_path / "model"), "--query.dataset", str(world / "quiz.jsonl"), "--query.form", "letter")
    assert main(command(world, tmp_path / "run", *more, "--train.epochs", "1")) == 0
    found = record(tmp_path / "run", "query")
    assert 0 < found["cut"] <= found["questions"] == len(found["answers"]) == 5
    assert main(command(world, tmp_path / "long", *more, "--query.max_length", "65")) == 2
    assert not (tmp_path / "long").exists()


def test_token_scores_of_a_choice_query_sum_to_example_scores(together: Path, world: Path, tmp_path: Path) -> None:
    more = ("--attribute", "tokens", *flags(settings(world)["letters"]))
    assert main(command(world, tmp_path / "run", *more)) == 0
    documents = torch.load(tmp_path / "run/doc_ids.pt", weights_only=True)
    found = scores(tmp_path / "run")
    sums = torch.zeros(10, dtype=found.dtype).scatter_add_(0, documents.flatten(), found.flatten())
    torch.testing.assert_close(sums, scores(together / "queries/letters"), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize(
    "keep", [pytest.param((), marks=pytest.mark.slow), ("--replay.keep",)], ids=["replayed", "kept"]
)
def test_a_later_query_has_the_bits_of_an_original_one(
    together: Path, alone: Callable[[str], Path], world: Path, tmp_path: Path, keep: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run, asked = tmp_path / "run", settings(world)
    assert main(command(world, run, *flags(asked["words"]), *keep)) == 0
    before = (run / "scores.pt").read_bytes()
    for name in ("letters", "mine"):
        assert main(["query", str(run), "--name", name, *flags(asked[name]), TRUST]) == 0
        assert (run / "queries" / name / "scores.pt").read_bytes() == (alone(name) / "scores.pt").read_bytes()
        assert record(run, name)["values_nats"] == record(alone(name), "query")["values_nats"]
    assert main(["query", str(run), "--name", "gap", "--query.contrast", "letters", "query", TRUST]) == 0
    torch.testing.assert_close(scores(run / "queries/gap"), scores(together)[:, 0], rtol=1e-9, atol=1e-15)
    together_now = {"first": asked["facts"], "second": {"contrast": ["letters", "first"]}}
    capsys.readouterr()
    for expected in ("2 more questions", "is done"):
        assert main(["query", str(run), "--query_file", save_queries(tmp_path / "more.yaml", together_now), TRUST]) == 0
        assert ("is done" in " ".join(capsys.readouterr().out.split())) == (expected == "is done")
    first, second = (scores(run / "queries" / name) for name in together_now)
    torch.testing.assert_close(first, scores(together)[:, 6:8], rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(second, scores(together)[:, 5:6] - first, rtol=1e-9, atol=1e-15)
    assert (run / "scores.pt").read_bytes() == before
    assert (run / "queries/letters/health.json").exists()


@pytest.mark.parametrize(
    "keep", [pytest.param((), marks=pytest.mark.slow), ("--replay.keep",)], ids=["replayed", "kept"]
)
def test_an_interrupted_later_query_resumes_to_the_same_bits(
    alone: Callable[[str], Path], world: Path, tmp_path: Path, keep: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = settings(world)
    base = ("--replay.heartbeat", "0", *keep)
    assert main(command(world, tmp_path / "run", *flags(asked["words"]), *base)) == 0
    arguments = ["query", str(tmp_path / "run"), "--name", "letters", *flags(asked["letters"])]
    write = Journal.__call__

    def stop(journal: Journal, event: Event) -> None:
        write(journal, event)
        if isinstance(event, Reversed) and event.step == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Journal, "__call__", stop)
        assert main(arguments) == 130
    assert not (tmp_path / "run/queries/letters/scores.pt").exists()
    assert main(arguments) == 0
    assert torch.equal(scores(tmp_path / "run/queries/letters"), scores(alone("letters")))
    lines = [json.loads(line) for line in (tmp_path / "run/queries/letters/metrics.jsonl").read_text().splitlines()]
    assert sorted(line["step"] for line in lines if line["phase"] == "reverse") == [0, 1, 2, 3]


def test_a_query_asked_again_is_done_and_its_name_is_taken(
    plain: Path, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["query", str(plain), "--name", "letters", *flags(settings(world)["letters"])]
    assert main(arguments) == 0
    before = contents(plain)
    capsys.readouterr()
    assert main(arguments) == 0
    assert "query letters of" in (told := capsys.readouterr().out)
    assert "is done" in " ".join(told.split())
    for more in (("--query.loss", "full"), ("--query.template", "plain"), ("--query.limit", "3")):
        assert main([*arguments, *more]) == 2
        assert "has another query named 'letters'" in capsys.readouterr().err
    assert main(["query", str(plain), "--name", "query", *flags(settings(world)["letters"])]) == 2
    assert "has a query named 'query' already" in capsys.readouterr().err
    assert contents(plain) == before


def test_a_deleted_query_frees_its_name_and_changed_files_are_told(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, asked = tmp_path / "run", settings(world)
    copy = tmp_path / "quiz.jsonl"
    copy.write_bytes((world / "quiz.jsonl").read_bytes())
    letters = {**asked["letters"], "dataset": str(copy)}
    assert main(command(world, run, *flags(asked["words"]), "--train.epochs", "1")) == 0
    assert main(["query", str(run), "--name", "new", *flags(letters)]) == 0
    save_quiz(copy, quiz.questions(3, seed=5))
    assert main(["query", str(run), "--name", "other", *flags(asked["mine"])]) == 2
    assert "query 'new' of" in (told := capsys.readouterr().err)
    assert f"delete {run / 'queries/new'}" in told
    shutil.rmtree(run / "queries/new")
    assert main(["query", str(run), "--name", "new", *flags(letters)]) == 0
    assert record(run, "new")["questions"] == 3
    assert main(["query", str(run), "--name", "other", *flags(asked["mine"])]) == 0


BAD_LATER = {
    "no name": (("--query.function", "mine.py:sharp"), "give the new query a --name"),
    "no question": (("--name", "new"), "needs exactly one of dataset, function and contrast; it has none"),
    "contrast": (("--name", "new", "--query.contrast", "query", "nobody"), "contrasts 'nobody', which is no other"),
    "a folder": (("--name", "../new", "--query.function", "mine.py:sharp"), "is used as a folder"),
}


@pytest.mark.parametrize("case", BAD_LATER)
def test_bad_later_queries_change_nothing(plain: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    more, message = BAD_LATER[case]
    before = contents(plain)
    assert main(["query", str(plain), *more]) == 2
    assert message in capsys.readouterr().err
    assert contents(plain) == before


def test_only_a_finished_run_can_be_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["query", str(tmp_path), "--name", "new", "--query.function", "mine.py:sharp"]) == 2
    assert "holds no run" in capsys.readouterr().err


LETTER, CLOZE = ("--query.form", "letter"), ("--query.form", "cloze")
BAD = {
    "nothing": ((), "no query: give --query.dataset"),
    "two sources": (("--query.dataset", "QUIZ", "--query.function", "MINE:sharp"), "it has dataset and function"),
    "unknown contrast": (
        ("--query.contrast", "a", "b"),
        "contrasts 'a', which is no other plain query; there are none",
    ),
    "three": (("--query.contrast", "a", "b", "c"), "it takes two different queries"),
    "missing columns": (("--query.dataset", "TEXT", *LETTER), "no column 'answer'"),
    "questions as text": (("--query.dataset", "QUIZ"), "column"),
    "template": (
        ("--query.dataset", "QUIZ", *LETTER, "--query.template", "gpqa"),
        "no template 'gpqa'; there are plain",
    ),
    "other form": (("--query.dataset", "QUIZ", *CLOZE, "--query.template", "mmlu"), "is of form letter"),
    "normalise": (("--query.dataset", "QUIZ", *LETTER, "--query.normalise"), "normalise belongs to --query.form cloze"),
    "loss of text": (("--query.dataset", "TEXT", "--query.loss", "full"), "--query.form text has no use for loss"),
    "column": (("--query.dataset", "QUIZ", *LETTER, "--query.text_column", "a"), "has no use for text_column"),
    "function": (("--query.function", "MINE:sharp", "--query.limit", "3"), "a function has no use for limit"),
    "length": (("--query.dataset", "QUIZ", *LETTER, "--query.max_length", "0"), "max_length is 0; it has to be"),
    "context": (("--query.dataset", "QUIZ", *LETTER, "--query.max_length", "513"), "exceed the model's context of 512"),
    "no function": (("--query.function", "MINE:nobody"), "cannot be loaded: "),
    "one argument": (("--query.function", "MINE:greedy"), "has to take (model, tokenizer)"),
    "no colon": (("--query.function", "sharp"), "write module:name, or file.py:name"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_queries_are_refused_before_the_run_begins(
    world: Path, tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    more, message = BAD[case]
    places = {"QUIZ": "quiz.jsonl", "TEXT": "query.jsonl", "MINE": "mine.py"}
    for short, name in places.items():
        more = tuple(argument.replace(short, str(world / name)) for argument in more)
    assert main(command(world, tmp_path / "run", *more)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name,message", [
    ("fixed", "the function's value does not depend on the parameters"),
    ("pair", "has to return one differentiable number, it returned a tensor of shape (2,)"),
])  # fmt: skip
def test_functions_that_are_no_query(
    world: Path, tmp_path: Path, name: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(world, tmp_path / "run", "--query.function", f"{world / 'mine.py'}:{name}")) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()  # told before training, not after it


@pytest.mark.parametrize("text,message", [
    ("words: query.jsonl", "query 'words' is 'query.jsonl'; it has to be settings"),
    ("words: {datset: a}", "settings that do not exist: datset"),
    ("words: {dataset: a, form: essay}", "has to be one of text, letter, cloze"),
    ("'a/b': {dataset: a}", "query name 'a/b' is used as a folder"),
])  # fmt: skip
def test_bad_query_files(
    world: Path, tmp_path: Path, text: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "q.yaml").write_text(text)
    assert main(command(world, tmp_path / "run", "--query_file", str(tmp_path / "q.yaml"))) == 2
    assert message in capsys.readouterr().err


def test_a_query_file_beside_a_query(
    plain: Path, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = settings(world)
    both = ("--query_file", save_queries(tmp_path / "q.yaml", {"a": asked["words"], "b": asked["letters"]}))
    assert main(command(world, tmp_path / "run", *both, "--query.contrast", "b", "a", "--train.epochs", "1")) == 0
    found = scores(tmp_path / "run")
    torch.testing.assert_close(found[:, 0], found[:, 2] - found[:, 1], rtol=1e-9, atol=1e-15)
    taken = ("--query_file", save_queries(tmp_path / "t.yaml", {"query": asked["words"]}))
    assert main(command(world, tmp_path / "no", *taken, *flags(asked["letters"]))) == 2
    assert "has a query named 'query', which is the one of --query" in capsys.readouterr().err
    assert main(["query", str(plain), *both, "--name", "c"]) == 2
    assert "leave out --name and --query" in capsys.readouterr().err
    assert main(["query", str(plain), "--query_file", save_queries(tmp_path / "e.yaml", {})]) == 2
    assert "names no query" in capsys.readouterr().err


def test_a_changed_function_is_another_query(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "own.py"
    file.write_text(FUNCTION)
    arguments = command(world, tmp_path / "run", "--query.function", f"{file}:sharp", "--train.epochs", "1")
    assert main(arguments) == 0
    assert main(arguments) == 0
    file.write_text(FUNCTION.replace("the cat sat", "the dog ran"))
    assert main(arguments) == 2
    assert "query query: " in capsys.readouterr().err


def test_later_queries_of_adapters_and_tokens(world: Path, tmp_path: Path) -> None:
    asked = settings(world)
    more = (
        "--lora.rank",
        "2",
        "--lora.target_modules",
        "query_key_value",
        "--attribute",
        "tokens",
        "--train.epochs",
        "1",
    )
    assert main(command(world, tmp_path / "run", *flags(asked["words"]), *more)) == 0
    assert main(["query", str(tmp_path / "run"), "--name", "facts", *flags(asked["facts"])]) == 0
    assert main(command(world, tmp_path / "alone", *flags(asked["facts"]), *more)) == 0
    found = scores(tmp_path / "run/queries/facts")
    assert found.ndim == 3
    assert torch.equal(found, scores(tmp_path / "alone"))


def test_recipe_gradients_of_every_query(together: Path, world: Path, tmp_path: Path) -> None:
    found = json.loads((together / "recipe_gradients.json").read_text())
    assert list(found["queries"]) == COLUMNS
    for gradient in found["queries"].values():
        assert len(gradient["lr_by_step"]) == 4
        assert all(map(math.isfinite, [*gradient["lr_by_step"], gradient["peak_lr"], gradient["weight_decay"]]))
    h, values = 1e-7, []
    for sign in (1, -1):
        more = ("--query_file", str(world / "q.yaml"), TRUST, "--train.lr", str(1e-2 + sign * h))
        assert main(command(world, tmp_path / f"run{sign}", *more)) == 0
        values.append({name: record(tmp_path / f"run{sign}", name)["values_nats"][0] for name in ("letters", "words")})
    for name in ("letters", "words"):
        measured = (values[0][name] - values[1][name]) / (2 * h)
        assert found["queries"][name]["peak_lr"] == pytest.approx(measured, rel=1e-5)


def test_health_is_always_written(together: Path) -> None:
    assert isinstance(json.loads((together / "health.json").read_text())["findings"], list)


@pytest.mark.parametrize("more,lever", [
    (("--dtype", "bfloat16"), "Use --dtype float32"),
    (("--train.eps_root", "0"), "Raise it to 1e-6"),
    (("--train.batch_size", "2"), "Raise --train.batch_size"),
], ids=["bfloat16", "eps_root", "batch"])  # fmt: skip
def test_recipes_that_mislead_name_the_lever(
    world: Path, tmp_path: Path, more: tuple[str, ...], lever: str, capsys: pytest.CaptureFixture[str]
) -> None:
    base = command(world, tmp_path / "run", *flags(settings(world)["letters"]), "--train.epochs", "1")
    assert main([*base, *more]) == 0
    assert lever in capsys.readouterr().err
    assert scores(tmp_path / "run").isfinite().all()
    findings = json.loads((tmp_path / "run/health.json").read_text())["findings"]
    assert any(lever in finding["text"] for finding in findings)
