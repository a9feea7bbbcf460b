"""Evaluation on the way: the training's bits stay, no step is lost or told twice, and the best step is the right one."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import quiz
import tiny
import torch
from killing import kill_after
from rich.console import Console

from retrograd.cli import main
from retrograd.core import tree
from retrograd.core.optim import SGD
from retrograd.core.step import State
from retrograd.evaluate import on_the_way as stage
from retrograd.evaluate.curve import show_evaluations
from retrograd.lm import save
from retrograd.lm.model import load_causal_lm, load_tokenizer
from retrograd.lm.save import save_causal_lm
from retrograd.query.prepare import prepare
from retrograd.runs import loggers
from retrograd.runs.files import read_tensors
from retrograd.runs.journal import Journal, read_evaluations
from retrograd.runs.manifest import Manifest
from retrograd.runs.progress import Bars
from retrograd.settings.on_the_way import OnTheWayConfig, best_of, check_on_the_way, evaluated_steps, parse_rule
from retrograd.settings.tasks import tasks_from

RULE = "min:prose while letters >= start - 1"
TASKS = """
letters: {{dataset: {0}/a.jsonl, role: retain, limit: 6}}
one: {{dataset: {0}/a.jsonl, form: cloze, limit: 3, group: both}}
two: {{dataset: {0}/b.jsonl, form: cloze, limit: 2, group: both}}
prose: {{dataset: {0}/query.jsonl, form: text}}
said: {{dataset: {0}/query.jsonl, form: generate, limit: 1, new_tokens: 3}}
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("during")
    quiz.save(folder / "model", positions=128)
    tiny.save_jsonl(folder / "train.jsonl", tiny.sentences(20))
    tiny.save_jsonl(folder / "query.jsonl", tiny.sentences(3, seed=1))
    for name, seed in (("a", 1), ("b", 2)):
        rows = quiz.questions(9, seed)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tasks.yaml").write_text(TASKS.format(folder))
    return folder


def command(world: Path, run: Path, *more: str) -> list[str]:
    return [
        "magic", str(run), "--model", str(world / "model"), "--data.dataset", str(world / "train.jsonl"),
        "--query.dataset", str(world / "query.jsonl"), "--train.lr", "1e-2", "--train.epochs", "2",
        "--train.batch_size", "4", "--train.eps_root", "1e-6", *more,
    ]  # fmt: skip


def asking(world: Path, *more: str) -> list[str]:
    return ["--evaluate.tasks", str(world / "tasks.yaml"), "--evaluate.every", "4", "--evaluate.geometric",
            "--evaluate.keep_best", RULE, *more]  # fmt: skip


def lines(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what the clock says."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in found]


def same_bits(one: Path, other: Path) -> None:
    for name in ("scores.pt", "checkpoints/digests.txt"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    (first, about), (second, also) = (read_tensors(run / "checkpoints/final.safetensors") for run in (one, other))
    assert about == also
    assert tree.digest(first) == tree.digest(second)


@pytest.fixture(scope="module")
def plain(world: Path) -> Path:
    assert main(command(world, world / "plain")) == 0
    return world / "plain"


@pytest.fixture(scope="module")
def done(world: Path) -> Path:
    assert main(command(world, world / "done", *asking(world))) == 0
    return world / "done"


# The steps and the rule


@pytest.mark.parametrize("last,every,geometric,steps", [
    (10, 3, False, [0, 3, 6, 9, 10]), (10, None, True, [0, 1, 2, 4, 8, 10]), (10, 5, True, [0, 1, 2, 4, 5, 8, 10]),
    (10, None, False, [0, 10]), (8, None, True, [0, 1, 2, 4, 8]), (1, 4, True, [0, 1]), (0, 3, True, [0]),
])  # fmt: skip
def test_steps(last: int, every: int | None, geometric: bool, steps: list[int]) -> None:
    assert evaluated_steps(last, every, geometric=geometric) == steps


def test_chosen_steps_join_the_others() -> None:
    assert evaluated_steps(10, 4, at=(1, 2, 5, 50)) == [0, 1, 2, 4, 5, 8, 10]
    with pytest.raises(ValueError, match=r"evaluate\.at names step -1"):
        check_on_the_way(OnTheWayConfig(tasks=Path("tasks.yaml"), at=(3, -1)))


def by_step(**values: list[float | None]) -> dict[int, dict[str, Any]]:
    """Accuracies by step; of a task called prose, losses."""
    steps = range(len(next(iter(values.values()))))
    key = {name: "nats_per_token" if name == "prose" else "accuracy" for name in values}
    return {step: {name: {key[name]: found[step]} for name, found in values.items()} for step in steps}


@pytest.mark.parametrize("rule,best", [
    ("max:a", (1, 0.75)),  # ties: the earlier
    ("min:a", (3, 0.25)),
    ("min:a while b >= 0.88", (0, 0.5)),
    ("min:a while b >= start - 0.05", (2, 0.5 - 0.25 / 2)),  # 0.9 - 0.05 is above 0.85 in floating point
    ("min:a while b >= start-0.05 and prose <= 2.5", (0, 0.5)),
    ("max:prose while prose <= start + 1", (2, 3.0)),
    ("min:b", (3, 0.1)),
    ("min:a while b >= 0.95", None),
    ("max:a  while\tgone >= start", None),
])  # fmt: skip
def test_the_best_step(rule: str, best: tuple[int, float] | None) -> None:
    found = by_step(
        a=[0.5, 0.75, 0.375, 0.25, 0.75, None],
        b=[0.9, None, 0.85, 0.1, 0.2, 0.9],
        prose=[2.0, 2.5, 3.0, 3.5, None, 1.0],
    )
    assert best_of(found, parse_rule(rule)) == best


def test_without_a_start_nothing_is_relative_to_it() -> None:
    found = {step: values for step, values in by_step(a=[0.5, 0.25]).items() if step}
    assert best_of(found, parse_rule("min:a")) == (1, 0.25)
    assert best_of(found, parse_rule("min:a while a <= start")) is None


@pytest.mark.parametrize(
    "text", ["best:a", "max a", "max:", "min:a while", "min:a while b > 1", "min:a while b >= c", "min:a and b >= 1",
             "min:a while b >= 1 while c >= 1", "min:a while b >= start + x", ""],
)  # fmt: skip
def test_a_rule_that_is_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"rule .* is not understood; write max:TASK or min:TASK"):
        parse_rule(text)


@pytest.mark.parametrize("settings,message", [
    ({"tasks": Path("a"), "lab": Path("b")}, "--evaluate.tasks and --evaluate.lab exclude each other"),
    ({"every": 3}, "--evaluate has settings but nothing to ask; give --evaluate.tasks FILE.yaml"),
    ({"tasks": Path("a"), "every": 0}, "--evaluate.every is 0; it has to be at least 1"),
    ({"tasks": Path("a"), "limit": -1}, "--evaluate.limit is -1"),
    ({"lab": Path("a"), "batch_size": 0}, "--evaluate.batch_size is 0"),
    ({"lab": Path("a"), "keep_best": "most:a"}, "rule 'most:a' is not understood"),
])  # fmt: skip
def test_settings_that_cannot_work(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_on_the_way(OnTheWayConfig(**settings))


# What a run leaves


def test_a_run_with_evaluation_has_the_bits_of_one_without(plain: Path, done: Path) -> None:
    same_bits(plain, done)
    assert [line for line in lines(done) if line["phase"] != "evaluate"] == lines(plain)
    assert (
        json.loads((plain / "manifest.json").read_text())["identity"]
        == json.loads((done / "manifest.json").read_text())["identity"]
    )


@pytest.mark.parametrize("more", [
    pytest.param(("--train.dropout",), id="dropout"),
    pytest.param(("--engine", "blocks", "--replay.plan", "binomial", "--replay.slots", "2"), id="blocks",
                 marks=pytest.mark.slow),
])  # fmt: skip
def test_dropout_and_the_other_engine_keep_their_bits_too(world: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    assert main(command(world, tmp_path / "plain", *more)) == 0
    assert main(command(world, tmp_path / "asked", *more, *asking(world))) == 0
    same_bits(tmp_path / "plain", tmp_path / "asked")


def test_the_lines_say_what_the_exams_say(world: Path, done: Path) -> None:
    found = read_evaluations(done / "metrics.jsonl")
    assert list(found) == [0, 1, 2, 4, 8, 10]  # in order, and once
    assert len([line for line in lines(done) if line["phase"] == "evaluate"]) == 6
    tasks, last = tasks_from(world / "tasks.yaml"), found[10]["tasks"]
    start = load_causal_lm(str(world / "model"))
    tokenizer = load_tokenizer(str(world / "model"))
    answers = prepare(tasks["letters"], start, tokenizer, 16).measure(start.params)
    assert found[0]["tasks"]["letters"]["accuracy"] == answers.scored.accuracy
    assert found[0]["tasks"]["letters"]["questions"] == 6
    assert (
        found[0]["tasks"]["prose"]["nats_per_token"]
        == prepare(tasks["prose"], start, tokenizer, 16).measure(start.params).loss
    )
    assert last["prose"]["nats_per_token"] < found[0]["tasks"]["prose"]["nats_per_token"] - 0.3
    assert last["both"]["right"] == last["one"]["right"] + last["two"]["right"]
    assert last["both"]["questions"] == 5
    assert len(last["said"]["samples"]) == 1


def test_the_best_model_is_a_folder_that_loads_with_its_numbers(world: Path, done: Path) -> None:
    about = json.loads((done / "best/best.json").read_text())
    found = {
        step: line["tasks"]["prose"]["nats_per_token"]
        for step, line in read_evaluations(done / "metrics.jsonl").items()
    }
    assert about["step"] == min(found, key=found.__getitem__) == 10
    assert about["value"] == found[10]
    assert about["rule"] == RULE
    best = load_causal_lm(str(done / "best"))
    assert tree.digest(dict(sorted(best.params.items()))) == about["digest"]
    tokenizer, prose = load_tokenizer(str(done / "best")), tasks_from(world / "tasks.yaml")["prose"]
    assert prepare(prose, best, tokenizer, 16).measure(best.params).loss == about["value"]
    assert not list(done.glob(".best*"))


def test_the_summary_and_the_picture(world: Path, done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(world, done)) == 0  # without the flags: the settings are not what makes the run
    told = capsys.readouterr().out
    assert "is done" in told
    assert "best: 10" in told
    assert f"Best by {RULE}: step 10" in told.replace("\n", " ")
    assert "MISSING" not in told
    page = (done / "report.html").read_text()
    assert told.rstrip().endswith(f"Report: {done / 'report.html'}")
    assert '"best":{' in page
    assert '"name":"letters"' in page


def test_a_finished_run_is_not_evaluated_later(world: Path, plain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (plain / "metrics.jsonl").read_bytes()
    assert main(command(world, plain, *asking(world))) == 0
    assert "It was not evaluated on its way" in capsys.readouterr().out
    assert (plain / "metrics.jsonl").read_bytes() == before


def test_adapters_are_merged_into_the_best_model(world: Path, tmp_path: Path) -> None:
    more = ["--lora.rank", "2", "--lora.target_modules", "query_key_value"]
    assert main(command(world, tmp_path / "run", *more, *asking(world))) == 0
    about = json.loads((tmp_path / "run/best/best.json").read_text())
    best = load_causal_lm(str(tmp_path / "run/best"))
    tokenizer, prose = load_tokenizer(str(tmp_path / "run/best")), tasks_from(world / "tasks.yaml")["prose"]
    found = prepare(prose, best, tokenizer, 16).measure(best.params)
    start = read_evaluations(tmp_path / "run/metrics.jsonl")[0]["tasks"]["prose"]["nats_per_token"]
    assert found.loss == pytest.approx(about["value"], abs=1e-5)
    assert abs(start - about["value"]) > 1e-3


@pytest.mark.parametrize("family", ["gpt2-tied", "llama-gqa"])
def test_saving_other_parameters_leaves_the_module_alone(tmp_path: Path, family: str) -> None:
    lm = load_causal_lm(str(tiny.save_model(tmp_path / "model", family)))
    tokenizer, before = load_tokenizer(str(tmp_path / "model")), tree.digest(lm.params)
    other = {name: leaf + 0.5 for name, leaf in lm.params.items()}
    for _ in range(2):  # the second replaces the first
        save_causal_lm(tmp_path / "saved", lm.module, tokenizer, other)
    found = load_causal_lm(str(tmp_path / "saved")).params
    assert tree.digest(dict(sorted(found.items()))) == tree.digest(dict(sorted(other.items())))
    assert tree.digest(lm.params) == before


# Kills


class Interrupted:
    """Raises KeyboardInterrupt, which the command hands through, at one call of a function."""

    def __init__(self, function: Callable, when: Callable[..., bool], *, after: bool = False) -> None:
        self.function, self.when, self.after = function, when, after

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        stop = self.when(*arguments, **options)
        if stop and not self.after:
            raise KeyboardInterrupt
        found = self.function(*arguments, **options)
        if stop:
            raise KeyboardInterrupt
        return found


def interrupt(patch: pytest.MonkeyPatch, place: str) -> None:
    evaluation = Journal.evaluation
    if place == "between the renames":
        renames: list[int] = []
        ends_in_best = Interrupted(
            save.rename, lambda new, to: to.name == "best" and not renames.append(1) and len(renames) == 4
        )
        patch.setattr(save, "rename", ends_in_best)
    elif place == "while measuring":
        measured = stage.OnTheWay._measured
        stops = Interrupted(measured, lambda self, state: state.step == 4)
        patch.setattr(stage.OnTheWay, "_measured", lambda self, state: stops(self, state))
    else:
        stops = Interrupted(evaluation, lambda self, step, **values: step == 4, after=place == "after the line")
        patch.setattr(Journal, "evaluation", lambda self, step, **values: stops(self, step, **values))


@pytest.mark.parametrize("place,heartbeat", [
    pytest.param("while measuring", "0", marks=pytest.mark.slow), ("between the renames", "1000"), ("before the line", "0"), ("after the line", "1000"),
])  # fmt: skip
def test_a_run_that_was_cut_off_has_each_step_once_and_the_same_best(
    world: Path, done: Path, tmp_path: Path, place: str, heartbeat: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = command(world, tmp_path / "run", *asking(world), "--replay.heartbeat", heartbeat, "--replay.disk", "0")
    with monkeypatch.context() as patch:
        interrupt(patch, place)
        assert main(arguments) == 130
    assert max(read_evaluations(tmp_path / "run/metrics.jsonl")) == (4 if place == "after the line" else 2)
    counted: list[int] = []
    measured = stage.OnTheWay._measured
    monkeypatch.setattr(
        stage.OnTheWay, "_measured", lambda self, state: (counted.append(state.step), measured(self, state))[1]
    )
    assert main(arguments) == 0
    assert counted == ([8, 10] if place == "after the line" else [4, 8, 10])  # nor in the sweep's replays
    _is(tmp_path / "run", done)


def _is(run: Path, done: Path) -> None:
    same_bits(done, run)
    assert lines(run) == lines(done)
    for name in ("best.json", "model.safetensors"):
        assert (run / "best" / name).read_bytes() == (done / "best" / name).read_bytes()


@pytest.mark.slow  # every place of a cut is above, within one process
def test_a_run_killed_for_real(world: Path, done: Path, tmp_path: Path) -> None:
    arguments = command(world, tmp_path / "run", *asking(world), "--replay.heartbeat", "0")
    kill_after(arguments, tmp_path / "run", "evaluate", 4)
    assert 10 not in read_evaluations(tmp_path / "run/metrics.jsonl")
    assert main(arguments) == 0
    _is(tmp_path / "run", done)


def test_steps_passed_before_evaluation_was_asked_for_are_told(
    world: Path, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = command(world, tmp_path / "run", "--replay.heartbeat", "0")
    with monkeypatch.context() as patch:
        stops = Interrupted(Journal.__call__, lambda self, event: event.step == 5)
        patch.setattr(Journal, "__call__", lambda self, event: stops(self, event))
        assert main(arguments) == 130
    assert main([*arguments, *asking(world)]) == 0
    assert list(read_evaluations(tmp_path / "run/metrics.jsonl")) == [0, 8, 10]
    assert [line for line in lines(tmp_path / "run") if line["phase"] != "evaluate"] == lines(plain)
    told = " ".join(capsys.readouterr().out.split())
    assert "MISSING step 1, 2, 4: the trajectory did not come by it while evaluation was on" in told
    same_bits(plain, tmp_path / "run")


@pytest.mark.slow
def test_other_tasks_or_another_rule_do_not_join_the_lines_of_a_run(
    world: Path, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        interrupt(patch, "after the line")
        assert main(command(world, tmp_path / "run", *asking(world))) == 130
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    for more in (["--evaluate.keep_best", "max:both"], ["--evaluate.limit", "2"]):
        assert main(command(world, tmp_path / "run", *asking(world), *more)) == 2
        assert "evaluated steps with other tasks or another rule" in capsys.readouterr().err
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before
    moved = tmp_path / "moved.yaml"  # the same questions elsewhere are the same tasks
    moved.write_text((world / "tasks.yaml").read_text())
    assert main(command(world, tmp_path / "run", *asking(world), "--evaluate.tasks", str(moved))) == 0
    _is(tmp_path / "run", done)


# Failures


def test_a_model_that_has_left_the_numbers_is_missing_and_never_the_best(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--train.optimizer", "sgd", "--train.lr", "1e30", "--evaluate.keep_best", "max:prose"]
    assert main(command(world, tmp_path / "run", *asking(world), *more)) == 1
    error = " ".join(capsys.readouterr().err.split())
    assert "left the finite numbers at step 1" in error  # the trajectory itself decides, after its evaluation
    assert "MISSING step 1 letters: 6 of 6 questions have no finite log-probability" in error
    found = read_evaluations(tmp_path / "run/metrics.jsonl")
    assert list(found) == [0, 1]
    assert found[1]["tasks"]["letters"]["accuracy"] is None
    assert found[1]["tasks"]["prose"]["nats_per_token"] is None
    both = found[1]["tasks"]["both"]
    assert (both["accuracy"], both["missing"]) == (None, "missing: one, two")
    assert json.loads((tmp_path / "run/best/best.json").read_text())["step"] == 0
    assert "MISSING" in error
    assert loggers.scalars(found[1]) == {"seconds": found[1]["seconds"]}


def test_an_exam_that_fails_is_missing_with_its_reason_and_training_goes_on(
    world: Path, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare = stage.prepare_on_the_way

    def failing(*arguments: Any) -> Any:
        found = prepare(*arguments)

        def out_of_memory(params: Any) -> Any:
            raise RuntimeError("12 GiB are not there")

        object.__setattr__(found.ready["one"], "measure", out_of_memory)
        return found

    monkeypatch.setattr("retrograd.commands.training.prepare_on_the_way", failing)
    assert main(command(world, tmp_path / "run", *asking(world), "--evaluate.keep_best", "max:both")) == 0
    same_bits(plain, tmp_path / "run")
    told = " ".join(capsys.readouterr().out.split())
    assert "MISSING step 0 one: RuntimeError: 12 GiB are not there" in told
    assert "MISSING step 10 both: missing: one" in told
    assert "No evaluated step meets max:both: no model was kept." in told
    last = read_evaluations(tmp_path / "run/metrics.jsonl")[10]["tasks"]
    assert last["both"] == {"accuracy": None, "missing": "missing: one"}
    assert last["two"]["accuracy"] is not None
    assert not (tmp_path / "run/best").exists()


def test_a_lost_best_model_is_told(tmp_path: Path) -> None:
    found = {step: {"tasks": tasks, "seconds": 0.5} for step, tasks in by_step(a=[0.5, 0.75, 0.25]).items()}
    (tmp_path / "best").mkdir()
    rule = parse_rule("max:a")
    for step, lost in ((1, False), (0, True)):
        about = {"step": step, "rule": rule.text, "value": 0.5}
        (tmp_path / "best/best.json").write_text(json.dumps(about))
        with (console := Console(width=200)).capture() as shown:
            show_evaluations(tmp_path, found, console, rule)
        assert ("MISSING the model of step 1, which is the best by the lines" in shown.get()) == lost
    shutil.rmtree(tmp_path / "best")
    with console.capture() as shown:
        show_evaluations(tmp_path, found, console, rule)
    assert f"MISSING {tmp_path / 'best'}, the model of step 1" in shown.get()
    assert "It took 1.5 seconds" in shown.get()


def test_the_table_of_many_steps_has_the_ends_the_best_and_some_between(tmp_path: Path) -> None:
    values = [0.01 * step for step in range(100)]
    found = {step: {"tasks": tasks, "seconds": 0.0} for step, tasks in by_step(a=values).items()}
    (tmp_path / "best").mkdir()
    (tmp_path / "best/best.json").write_text(json.dumps({"step": 37, "rule": "max:a", "value": 0.37}))
    with (console := Console(width=200)).capture() as shown:
        show_evaluations(tmp_path, found, console)
    text = shown.get()
    assert re.search(r"task\W+0\W+20\W+best: 37\W+40\W+59\W+79\W+99\W", text), text
    assert re.search(r"a\W+0\.0\W+20\.0\W+37\.0\W", text), text
    with (narrow := Console(width=44)).capture() as shown:
        show_evaluations(tmp_path, found, narrow)
    assert re.search(r"task\W+0\W+best: 37\W+50\W+99\W", shown.get()), shown.get()
    assert "7 of 100 evaluated steps" in " ".join(text.split())
    assert "Best by max:a: step 37 with 0.37; its model is" in text  # and no emoji


@pytest.mark.parametrize("more,message", [
    (["--evaluate.keep_best", "max:nothing"], "--evaluate.keep_best names 'nothing'; the tasks with a number are: letters,"),
    (["--evaluate.keep_best", "max:said"], "--evaluate.keep_best names 'said'"),
    (["--evaluate.keep_best", "max:one while maths >= 1"], "names 'maths'"),
    (["--evaluate.tasks", "nowhere.yaml"], "cannot read the configuration nowhere.yaml"),
    (["--evaluate.lab", "nowhere"], "exclude each other"),
])  # fmt: skip
def test_refusals_come_before_anything_is_written(
    world: Path, tmp_path: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(world, tmp_path / "run", *asking(world), *more)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_evaluating_disturbs_nothing(world: Path, tmp_path: Path) -> None:
    """Random numbers, threads, mode, gradients and parameters, in a model whose dropout is active."""
    lm = load_causal_lm(str(world / "model"), dropout=True)
    config = OnTheWayConfig(tasks=world / "tasks.yaml", keep_best="max:both")
    prepared = stage.prepare_on_the_way(config, lm, load_tokenizer(str(world / "model")))
    before = torch.get_rng_state(), torch.get_num_threads(), tree.digest(lm.params), torch.is_grad_enabled()
    modes = [part.training for part in lm.module.modules()]
    with (
        Bars(0) as bars,
        stage.OnTheWay(
            prepared,
            0,
            tmp_path,
            Journal(tmp_path / "metrics.jsonl", SGD(0.1)),
            Manifest(tmp_path / "manifest.json"),
            bars,
        ) as found,
    ):
        found.at(State(0, lm.params, {}))
        found.at(State(0, lm.params, {}))
    assert list(read_evaluations(tmp_path / "metrics.jsonl")) == [0]
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (torch.get_num_threads(), tree.digest(lm.params), torch.is_grad_enabled()) == before[1:]
    assert [part.training for part in lm.module.modules()] == modes
    assert any(modes)
    assert all(parameter.grad is None for parameter in lm.module.parameters())


# Viewers


def test_viewers_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="--log mlflow is unknown; the viewers are tensorboard, wandb, trackio"):
        loggers.check_loggers(["mlflow"])
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"--log wandb needs the package wandb: pip install 'retrograd\[wandb\]'"):
        loggers.check_loggers(["wandb"])
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setenv("TRACKIO_SPACE_ID", "someone/space")
    with pytest.raises(ValueError, match="TRACKIO_SPACE_ID is set, and the numbers would be sent to someone/space"):
        loggers.check_loggers(["trackio"])
    loggers.check_loggers(["tensorboard", "wandb"])


def test_a_missing_viewer_is_refused_before_anything_is_written(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: None if name == "trackio" else found(name))
    monkeypatch.delenv("TRACKIO_SPACE_ID", raising=False)
    assert main(command(world, tmp_path / "run", "--log", "trackio")) == 2
    assert "pip install 'retrograd[trackio]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


class _Recorder:
    """A viewer in memory."""

    opened: list[_Recorder] = []

    def __init__(self, run: Path) -> None:
        self.values: dict[tuple[str, int], list[float]] = {}
        self.closed = False
        _Recorder.opened.append(self)

    def log(self, phase: str, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.values.setdefault((f"{phase}/{name}", step), []).append(value)

    def close(self) -> None:
        self.closed = True


def told(run: Path) -> dict[tuple[str, int], float]:
    """Every scalar of metrics.jsonl by name and step."""
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        (f"{entry['phase']}/{name}", entry["step"]): value
        for entry in entries
        for name, value in loggers.scalars(entry).items()
    }


@pytest.mark.parametrize("phase", [pytest.param("train", marks=pytest.mark.slow), "reverse"])
def test_a_viewer_has_every_number_of_a_cut_off_run_once(
    world: Path, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    monkeypatch.setitem(loggers.LOGGERS, "tensorboard", _Recorder)
    monkeypatch.setattr(loggers, "check_loggers", lambda names: None)
    monkeypatch.setattr("retrograd.commands.training.check_loggers", lambda names: None)
    arguments = command(world, tmp_path / "run", *asking(world), "--log", "tensorboard", "--replay.heartbeat", "0")
    with monkeypatch.context() as patch:
        stops = Interrupted(Journal._write, lambda self, **v: (v["phase"], v["step"]) == (phase, 5), after=True)
        patch.setattr(Journal, "_write", lambda self, **values: stops(self, **values))
        assert main(arguments) == 130
    assert main(arguments) == 0
    _is(tmp_path / "run", done)
    first, second = _Recorder.opened[-2:]
    assert first.closed
    assert second.closed
    assert all(len(values) == 1 for values in second.values.values())
    assert {key: values[0] for key, values in second.values.items()} == told(tmp_path / "run")
    names = {name for name, _ in second.values}
    assert {"train/loss", "train/lr", "train/grad_norm", "evaluate/letters/accuracy", "evaluate/prose/nats_per_token",
            "reverse/cotangent_norm"} <= names  # fmt: skip


def _tensorboard(run: Path, data: Path) -> dict[tuple[str, int], list[float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), {"scalars": 0})
    events.Reload()
    found: dict[tuple[str, int], list[float]] = {}
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            found.setdefault((name, event.step), []).append(event.value)
    return found


def _wandb(run: Path, data: Path) -> dict[tuple[str, int], list[float]]:
    """History rows of the offline file: LevelDB's log format, a 7-byte header first, of protocol buffers."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = run.glob("wandb/offline-run-*/run-*.wandb")
    raw, place, record, found = file.read_bytes(), 7, b"", dict[tuple[str, int], list[float]]()
    while place + 7 <= len(raw):
        if (1 << 15) - place % (1 << 15) < 7:
            place += (1 << 15) - place % (1 << 15)
            continue
        _, length, kind = struct.unpack("<IHB", raw[place : place + 7])
        record += raw[place + 7 : place + 7 + length]
        place += 7 + length
        if kind not in (1, 4):  # whole, or the last part
            continue
        message, record = Record.FromString(record), b""
        if not message.HasField("history"):
            continue
        row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in message.history.item}
        for name, value in row.items():
            phase = name.split("/")[0]
            if phase in ("train", "evaluate", "reverse") and name != f"{phase}/step":
                found.setdefault((name, row[f"{phase}/step"]), []).append(value)
    return found


def _trackio(run: Path, data: Path) -> dict[tuple[str, int], list[float]]:
    from trackio.sqlite_storage import SQLiteStorage

    records = [r for r in SQLiteStorage.get_run_records("retrograd") if r["name"].startswith(f"{run.name}-")]
    (record,) = [r for r in records if r["name"].endswith(loggers._place(run))]
    found: dict[tuple[str, int], list[float]] = {}
    for row in SQLiteStorage.get_logs("retrograd", record["name"], run_id=record["id"]):
        for name, value in row.items():
            if "/" in name:
                found.setdefault((name, row["step"]), []).append(value)
    return found


READERS = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio}


@pytest.mark.parametrize("viewer", READERS)
def test_what_a_viewer_shows_is_what_the_file_says(
    world: Path, plain: Path, tmp_path: Path, viewer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(viewer)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    run = tmp_path / "run"
    arguments = command(world, run, *asking(world), "--log", viewer, "--replay.heartbeat", "0")
    kill_after(arguments, run, "train", 5)
    assert 9 not in {line["step"] for line in lines(run)}
    assert main(arguments) == 0
    same_bits(plain, run)
    found, expected = READERS[viewer](run, tmp_path), told(run)
    assert found.keys() == expected.keys()
    for key, values in found.items():
        assert values == [pytest.approx(expected[key], rel=1e-6, nan_ok=True)], key
