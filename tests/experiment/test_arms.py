"""What an experiment comes to, with results made up by formula: tuning, order, names, what is lost."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import arms
import pytest

from retrograd.experiment import measure as measuring
from retrograd.experiment.plan import Plan, planned
from retrograd.experiment.seen import tuning_value
from retrograd.experiment.tasks import Maker, Task
from retrograd.runs.errors import RunError
from retrograd.settings.experiment import read_experiment


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return arms.save_world(tmp_path_factory.mktemp("world"))


class Made:
    """Results of tasks, by a formula of the step size; some fail."""

    def __init__(self, kl: Callable[[float], float | None], fails: str = "never") -> None:
        self.kl, self.fails = kl, fails
        self.done: dict[str, dict[str, Any]] = {}
        self.failed: dict[str, str] = {}

    def result(self, name: str) -> dict | None:
        return self.done.get(name)

    def failure(self, name: str) -> str | None:
        return self.failed.get(name)

    def settle(self, task: Task, tasks: dict[str, Task]) -> None:
        if self.fails in task.name:
            self.failed[task.name] = "made to fail"
            return
        outcome: dict[str, Any] = {}
        if task.kind == "measure":
            lr = 0.0
            if "task" in task.what["model"]:
                lr = tasks[task.what["model"]["task"]].what["settings"]["train"]["lr"]
            kl = self.kl(lr)
            outcome = {"split": task.what["split"], "kl": kl, "finite": kl is not None,
                       "accuracy": {"forget": math.exp(-100 * lr), "retain": 1 - 2 * lr}}  # fmt: skip
        self.done[task.name] = outcome


def carried_out(maker: Maker, results: Made) -> tuple[Plan, list[str]]:
    """The final plan, and the order in which one worker does the tasks."""
    order: list[str] = []
    while True:
        plan = planned(maker, results)
        lost = plan.lost(results)
        open_tasks = [task for name, task in plan.tasks.items() if name not in lost and results.result(name) is None]
        if not open_tasks:
            return plan, order
        task = next(task for task in open_tasks if all(results.result(need) is not None for need in task.needs))
        results.settle(task, plan.tasks)
        order.append(task.name)
        assert len(order) < 200


def maker_of(world: Path, folder: Path, **more: Any) -> Maker:
    return Maker(read_experiment(arms.write(folder / "one.yaml", **more), (f"world={world}",)))


def test_each_arm_is_tuned_on_the_first_seed_and_all_seeds_run_at_its_setting(world: Path, tmp_path: Path) -> None:
    maker = maker_of(world, tmp_path, match="utility", seeds=3, tune=arms.tuning(steps=9, tolerance=0.1))
    plan, order = carried_out(maker, Made(lambda lr: 10 * lr))  # the budget 0.05 is at 0.005
    for arm in plan.arms:
        assert arm.chosen is not None
        assert 0.0045 <= arm.chosen.setting <= 0.005
        assert arm.chosen.close
        assert list(arm.trains) == [0, 1, 2]
        lrs = {plan.tasks[name].what["settings"]["train"]["lr"] for name in arm.trains.values()}
        assert lrs == {arm.chosen.setting}
        seeds = [plan.tasks[name].what["settings"]["train"]["seed"] for name in arm.trains.values()]
        assert seeds == [0, 1, 2]
        assert len(arm.tries) <= 9
    tuned = [name for name in order if name.startswith("measure.tune")]
    assert all("-s0-" in name for name in tuned)
    assert len(order) == len(set(order))  # the first seed at the chosen setting was trained by the tuning
    trained = [name for name in order if name.startswith("train")]
    assert len(trained) == len(tuned) + 3 * 2


def test_by_accuracy_the_base_is_asked_the_tuning_s_questions_first(world: Path, tmp_path: Path) -> None:
    tune = arms.tuning(measure="accuracy", budget=0.02, steps=9, tolerance=0.1)
    plan, order = carried_out(maker_of(world, tmp_path, match="utility", tune=tune), Made(lambda lr: None))
    assert order[0].startswith("measure.report-base")
    for arm in plan.arms:  # drop 2·lr ≤ 0.02
        assert arm.chosen is not None
        assert 0.009 <= arm.chosen.setting <= 0.01


def test_at_equal_forgetting_the_least_setting_is_taken(world: Path, tmp_path: Path) -> None:
    tune = arms.tuning(target=0.5, steps=9, tolerance=0.05)
    plan, _ = carried_out(maker_of(world, tmp_path, match="forgetting", tune=tune), Made(lambda lr: lr))
    for arm in plan.arms:
        assert arm.chosen is not None
        assert math.exp(-100 * arm.chosen.setting) <= 0.5 < math.exp(-94 * arm.chosen.setting)


def test_what_is_not_finite_lies_above_the_budget_and_what_is_missing_ends_the_tuning(
    world: Path, tmp_path: Path
) -> None:
    maker = maker_of(world, tmp_path, match="utility", tune=arms.tuning(steps=9))
    plan, _ = carried_out(maker, Made(lambda lr: 10 * lr if lr < 0.01 else None))
    assert all(arm.chosen is not None and arm.chosen.setting <= 0.005 for arm in plan.arms)
    outcome = {"split": "tune", "kl": None, "finite": True, "accuracy": {"forget": None, "retain": None}}
    assert tuning_value("utility", "kl", outcome, None) is None
    assert tuning_value("forgetting", "kl", outcome, None) is None
    assert tuning_value("forgetting", "kl", {**outcome, "finite": False}, None) == math.inf


def test_tuning_is_refused_whatever_was_measured_on_the_report() -> None:
    outcome = {"split": "report", "kl": 0.1, "finite": True, "accuracy": {"forget": 1.0, "retain": 1.0}}
    with pytest.raises(ValueError, match="measured on the split 'report'"):
        tuning_value("utility", "kl", outcome, None)
    with pytest.raises(ValueError, match="measured on the split 'report'"):
        tuning_value("utility", "accuracy", {**outcome, "split": "tune"}, outcome)


def test_a_failed_tuning_loses_its_arm_alone_and_a_failed_selection_all_that_need_it(
    world: Path, tmp_path: Path
) -> None:
    maker = maker_of(world, tmp_path, match="utility", tune=arms.tuning(steps=9))
    plan, _ = carried_out(maker, results := Made(lambda lr: 10 * lr, fails="train.npo-value-s0"))
    found = {arm.arm.weighting: arm for arm in plan.arms}
    assert "made to fail" in str(found["value"].reason)
    assert found["uniform"].chosen is not None
    assert found["random"].chosen is not None
    plan, _ = carried_out(maker, results := Made(lambda lr: 10 * lr, fails="scores.asked"))
    lost = plan.lost(results)
    assert {name.split(".")[0] for name in lost} == {"scores", "select", "train", "measure"}
    assert next(arm for arm in plan.arms if arm.arm.weighting == "uniform").chosen is not None


def test_names_tell_apart_all_that_tasks_are_made_of_and_nothing_else(world: Path, tmp_path: Path) -> None:
    def names(**more: Any) -> set[str]:
        return set(planned(maker_of(world, tmp_path, **more), Made(lambda lr: lr)).tasks)

    first = names()
    assert names() == first
    assert names(seeds=1) < first
    assert not {name for name in names(train={"lr": 2e-2, "batch_size": 4}) & first if name.startswith("train")}
    changed = names(threads=2)
    assert not changed & first
    text = (world / "retain.jsonl").read_text()
    (world / "retain.jsonl").write_text(text + text.splitlines()[0] + "\n")
    try:
        assert not {name for name in names() & first if name.startswith("train")}
        assert {name for name in names() & first if name.startswith("scores")}
    finally:
        (world / "retain.jsonl").write_text(text)


def test_a_teacher_that_changed_makes_another_task(world: Path, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    (teacher / "config.json").write_text("{}")
    more = {"methods": {"checkpoint_transfer": {"objective": {"teacher": str(teacher)}}}, "weightings": {"uniform": {}}}

    def trained() -> set[str]:
        found = planned(maker_of(world, tmp_path, **more), Made(lambda lr: lr)).tasks
        return {name for name in found if name.startswith("train")}

    first = trained()
    assert first == trained()
    (teacher / "config.json").write_text("{} ")
    assert not first & trained()


def test_what_lies_about_makes_no_other_task(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A teacher that is not given is the text "", which as a path is the folder where the command was started."""
    monkeypatch.chdir(tmp_path)
    more = {"methods": {"checkpoint_transfer": {}}, "weightings": {"uniform": {}}}

    def trained() -> set[str]:
        found = planned(maker_of(world, tmp_path, **more), Made(lambda lr: lr)).tasks
        return {name for name in found if name.startswith("train")}

    first = trained()
    (tmp_path / "notes.txt").write_text("of something else")
    assert first == trained()


def test_a_full_disk_is_no_missing_answer(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would stay missing: the task would be done."""
    asked = maker_of(world, tmp_path).measure(str(world / "base"), "report")

    def full(*given: Any) -> None:
        raise RunError("the disk is full while writing x")

    for write in ("write_measured", "write_table"):
        with monkeypatch.context() as patched:
            patched.setattr(measuring, write, full)
            with pytest.raises(RunError, match="the disk is full"):
                measuring.measure(asked.what, str(world / "base"), tmp_path / "answers")
    assert not measuring.measure(asked.what, str(world / "base"), tmp_path / "answers")["missing"]
