"""A worker in this process, with runs made up: what a lost lease, a wish to end and a full disk do."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import arms
import pytest

from retrograd.experiment import work as worker
from retrograd.experiment.carry import Runners
from retrograd.experiment.lease import Lease, Queue
from retrograd.experiment.owner import Owner
from retrograd.experiment.plan import Plan
from retrograd.experiment.tasks import Maker
from retrograd.runs.errors import STARTED_BY, RunError, Stop, StoppedError
from retrograd.runs.progress import counting
from retrograd.settings.experiment import read_experiment

ELSEWHERE = Owner(1, "another machine", "another start", 1)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return arms.save_world(tmp_path_factory.mktemp("world"))


def worked(world: Path, folder: Path, queue: Queue, magic: Callable[..., Any], stop: Stop) -> Plan:
    """An analysis, whose scores are a made-up run."""
    more: dict[str, Any] = {"methods": {}, "weightings": {},
                            "analyses": {"both": {"scores": "asked:go", "against": "asked:stay"}}}  # fmt: skip
    maker = Maker(read_experiment(arms.write(folder / "one.yaml", **more), (f"world={world}",)))
    return worker.work(maker, queue, Runners(magic, magic, magic), lambda plan, text: None, stop)


def task_of(queue: Queue) -> str:
    return next(path.name for path in queue.folder.glob("scores.*"))


def goes_on() -> None:
    time.sleep(0.02)
    with counting("steps", 1) as tick:
        tick()


def test_one_that_lost_its_lease_leaves_the_task_at_its_next_step(world: Path, tmp_path: Path) -> None:
    ours, other = Queue(tmp_path / "tasks", 0.2), Queue(tmp_path / "tasks", 0.0, ELSEWHERE)
    reached: list[str] = []

    def magic(config: Any, console: Any) -> None:
        goes_on()
        lease = other.take(task_of(ours))
        assert lease == Lease(task_of(ours), 2)
        other.fail(lease, "elsewhere")
        goes_on()
        reached.append("the end")

    plan = worked(world, tmp_path, ours, magic, Stop())
    assert not reached
    assert Queue(tmp_path / "tasks", 60).failure(task_of(ours)) == "elsewhere"
    assert set(plan.lost(ours)) == set(plan.tasks)


def test_one_that_is_asked_to_end_gives_its_task_back(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "_GRACE", 0.0)
    queue, stop = Queue(tmp_path / "tasks", 60), Stop()

    def magic(config: Any, console: Any) -> None:
        stop.since = time.time() - 1
        goes_on()
        raise AssertionError("it went on")

    with pytest.raises(StoppedError):
        worked(world, tmp_path, queue, magic, stop)
    assert Queue(tmp_path / "tasks", 60, ELSEWHERE).take(task_of(queue)) == Lease(task_of(queue), 2)


def test_a_training_that_is_asked_to_end_comes_to_its_durable_point_first(world: Path, tmp_path: Path) -> None:
    queue, stop = Queue(tmp_path / "tasks", 60), Stop()
    steps: list[int] = []

    def magic(config: Any, console: Any) -> None:
        stop.since = time.time()
        for step in range(9):
            steps.append(step)
            if step == 4:
                time.sleep(0.05)
                (config.run / "checkpoints").mkdir(parents=True)
                (config.run / "checkpoints/4.safetensors").write_text("state")
            goes_on()

    with pytest.raises(StoppedError):
        worked(world, tmp_path, queue, magic, stop)
    assert steps == [0, 1, 2, 3, 4]


def test_a_full_disk_ends_the_worker_and_is_no_failure_of_the_task(world: Path, tmp_path: Path) -> None:
    queue = Queue(tmp_path / "tasks", 60)

    def magic(config: Any, console: Any) -> None:
        raise RunError("the disk is full while writing x")

    with pytest.raises(RunError, match="the disk is full"):
        worked(world, tmp_path, queue, magic, Stop())
    assert queue.failure(task_of(queue)) is None
    assert Queue(tmp_path / "tasks", 60, ELSEWHERE).take(task_of(queue)) == Lease(task_of(queue), 2)


def test_a_worker_ends_with_whoever_started_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Stop().asked is None
    monkeypatch.setenv(STARTED_BY, "1234567")
    assert Stop().asked is not None
