"""Workers that are killed, stopped and asked to end: every task done, results identical, nothing lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import arms
import pytest

from retrograd.cli import main

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return arms.save_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def undisturbed(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert main(["experiment", str(file_of(folder)), str(folder / "out"), "--names", f"world={world}"]) == 0
    return folder / "out"


def file_of(folder: Path) -> Path:
    return arms.write(folder / "one.yaml", methods={"npo": {"train": {"epochs": 20}}}, heartbeat=0, seeds=3)


class Workers:
    """Real processes of the command."""

    def __init__(self, world: Path, folder: Path, lease: float) -> None:
        self.out, self.started = folder / "out", list[subprocess.Popen]()
        file = file_of(folder)
        self.command = [sys.executable, "-m", "retrograd", "experiment", str(file), str(self.out), "--names",
                        f"world={world}", "--lease", str(lease)]  # fmt: skip

    def start(self, count: int) -> list[subprocess.Popen]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        quiet: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        new = [subprocess.Popen(self.command, env=environment, **quiet) for _ in range(count)]
        self.started += new
        return new

    def training(self, process: subprocess.Popen) -> bool:
        """Whether it is in the middle of a training."""
        assert process.poll() is None, f"it ended with {process.returncode}"
        for path in (self.out / "tasks").glob("train.*/lease-*.json"):
            number = path.stem.rpartition("-")[2]
            journal = path.parent / number / "run" / "metrics.jsonl"
            mine = f'"pid": {process.pid},' in path.read_text()
            if mine and not (path.parent / "done.json").exists() and journal.exists() and journal.stat().st_size > 400:
                return True
        return False

    def end(self) -> None:
        for process in self.started:
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.kill()
                process.wait()


def until(holds: Callable[[], bool], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def same(ours: Path, other: Path) -> None:
    """The same tasks with the same models, answers and scores, and the same table but for seconds."""
    one, two = arms.outcomes(ours), arms.outcomes(other)
    assert one.keys() == two.keys()
    for name in one:
        assert one[name].get("digest") == two[name].get("digest"), name
        assert one[name].get("kl") == two[name].get("kl"), name
        files = [sorted(Path(o["place"]).rglob("*.safetensors")) for o in (one[name], two[name])]
        if name.startswith(("train", "select")):
            for a, b in zip(*files, strict=True):
                if a.name in ("model.safetensors", "weights.safetensors"):
                    assert a.read_bytes() == b.read_bytes(), a
        if name.startswith("scores"):
            a, b = (Path(outcome["place"]) / "run" / "scores.pt" for outcome in (one[name], two[name]))
            assert a.read_bytes() == b.read_bytes(), a


def test_four_workers_two_killed_and_one_stopped(world: Path, undisturbed: Path, tmp_path: Path) -> None:
    workers = Workers(world, tmp_path, lease=8)
    try:
        first, second, third, _ = workers.start(4)
        for process, how in ((first, signal.SIGKILL), (second, signal.SIGKILL), (third, signal.SIGSTOP)):
            until(lambda process=process: workers.training(process))
            process.send_signal(how)
        tasks = {path.parent.name for path in workers.out.glob("tasks/*/lease-1.json") if
                 f'"pid": {third.pid},' in path.read_text()}  # fmt: skip
        workers.start(2)
        for process in workers.started[3:]:
            assert process.wait(600) == 0
        third.send_signal(signal.SIGCONT)
        assert third.wait(120) == 0
        stopped = [name for name in tasks if (workers.out / "tasks" / name / "lease-2.json").exists()]
        assert stopped  # what the stopped one had was taken over
        for name in stopped:
            assert arms.outcomes(workers.out)[name]["owner"] > 1
    finally:
        workers.end()
    same(workers.out, undisturbed)


def test_one_that_is_asked_to_end_gives_its_task_back_at_a_durable_point(
    world: Path, undisturbed: Path, tmp_path: Path
) -> None:
    workers = Workers(world, tmp_path, lease=600)
    try:
        (first,) = workers.start(1)
        until(lambda: workers.training(first))
        first.send_signal(signal.SIGTERM)
        assert first.wait(60) == 143
        freed = [path for path in workers.out.glob("tasks/train.*/freed-1") if path.exists()]
        assert len(freed) == 1
        task = freed[0].parent
        assert list((task / "1/run/checkpoints").glob("*.safetensors"))
        told = (task / "1/run/metrics.jsonl").read_text().count('"phase": "train"')
        assert told > 0
        (second,) = workers.start(1)
        assert second.wait(600) == 0
        assert arms.outcomes(workers.out)[task.name]["owner"] == 2
        log = (task / "2/log.txt").read_text()
        assert "steps" in log
    finally:
        workers.end()
    same(workers.out, undisturbed)


def test_a_call_starts_its_workers_and_killed_three_times_ends_the_same(
    world: Path, undisturbed: Path, tmp_path: Path
) -> None:
    workers = Workers(world, tmp_path, lease=600)
    workers.command += ["--workers", "2"]
    try:
        for how in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
            (parent,) = workers.start(1)
            until(lambda parent=parent: workers.training(parent))
            parent.send_signal(how)
            assert parent.wait(120) == (143 if how == signal.SIGTERM else -9)
        (parent,) = workers.start(1)
        assert parent.wait(600) == 0
    finally:
        workers.end()
    same(workers.out, undisturbed)
