"""A worker: takes tasks of an experiment until none is left that it could take, whoever else does so too.

Every piece of progress of a task renews its lease; a task without progress is another's after a while. SIGTERM and
Ctrl-C let a training come to its next durable point, then give the task back. What a task raises is written down as its
failure, but for a full disk, which ends the worker.
"""

from __future__ import annotations

import functools
import gc
import os
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch
from rich.console import Console

from retrograd.experiment.carry import Runners, carry_out
from retrograd.experiment.grid import GridMaker
from retrograd.experiment.lease import Lease, LeaseLostError, Queue
from retrograd.experiment.plan import Plan, planned
from retrograd.experiment.tasks import Maker, Task
from retrograd.runs.errors import RunError, Stop, StoppedError
from retrograd.runs.progress import progress_goes_to

__all__ = ["work"]

_GRACE = 20.0  # seconds that a training gets to come to a durable point


def work(
    maker: Maker | GridMaker, queue: Queue, runners: Runners, show: Callable[[Plan, str], None], stop: Stop
) -> Plan:
    """Do tasks until all are settled; returns the final plan.

    Args:
        show: Told the plan and what is going on, whenever something has.
        stop: From `stoppable`.
    Raises:
        StoppedError: If the process was asked to end; its task has been given back.
        RunError: If the disk is full.
    """
    torch.set_num_threads(maker.spec.threads)
    while True:
        plan = planned(maker, queue)
        lost = plan.lost(queue)
        open_tasks = [task for name, task in plan.tasks.items() if name not in lost and queue.result(name) is None]
        if not open_tasks:
            return plan
        if stop.asked is not None:
            raise StoppedError
        ready = [task for task in open_tasks if all(queue.result(need) is not None for need in task.needs)]
        taken = next(((task, lease) for task in ready if (lease := queue.take(task.name)) is not None), None)
        if taken is None:
            show(plan, "waiting for other workers")
            time.sleep(min(0.5, queue.seconds / 10))
            continue
        _carried(*taken, queue, runners, functools.partial(show, plan), stop)
        gc.collect()


def _carried(task: Task, lease: Lease, queue: Queue, runners: Runners, show: Callable[[str], None], stop: Stop) -> None:
    """Carry out one task under its lease and settle it, or leave it to whoever has it now."""
    folder, start = queue.place(lease), time.monotonic()
    tell = _Telling(task, lease, queue, show, stop)

    def done(name: str) -> Path:
        result = queue.result(name)
        assert result is not None, "needs are done before"
        return Path(result["place"])

    settled = False
    try:
        with (folder / "log.txt").open("a", encoding="utf8") as log, _warnings_to(log), progress_goes_to(tell):
            try:
                tell("begins")
                outcome = carry_out(task, folder, done, runners, Console(file=log, width=120))
                queue.finish(lease, {**outcome, "seconds": round(time.monotonic() - start, 3), "host": queue.me.host})
                settled = True
            except Exception as error:  # whatever it is, the others go on
                if isinstance(error, RunError) and "disk is full" in str(error):
                    raise
                log.write(traceback.format_exc())
                queue.fail(lease, " ".join(f"{type(error).__name__}: {error}".split()))
                settled = True
    except LeaseLostError:
        settled = True  # by another
        show(f"{task.name} was taken over by another worker")
    finally:
        if not settled:
            queue.give_back(lease)


@contextmanager
def _warnings_to(log: TextIO) -> Iterator[None]:
    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        log.write(f"warning: {message}\n")

    before, warnings.showwarning = warnings.showwarning, show
    try:
        yield
    finally:
        warnings.showwarning = before


class _Telling:
    """What renews a lease: every piece of progress, though not more often than is of use."""

    def __init__(self, task: Task, lease: Lease, queue: Queue, show: Callable[[str], None], stop: Stop) -> None:
        self.task, self.lease, self.queue, self.show, self.stop = task, lease, queue, show, stop
        self.beaten = -float("inf")

    def __call__(self, text: str) -> None:
        now = time.monotonic()
        if now - self.beaten >= min(1.0, self.queue.seconds / 20):
            self.queue.beat(self.lease)
            self.beaten = now
            self.show(f"{self.task.kind} {self.task.label}: {text}")
        asked = self.stop.asked
        if asked is not None and (self._durable(asked) or time.time() - asked > _GRACE):
            raise StoppedError

    def _durable(self, asked: float) -> bool:
        """Whether something durable is younger than the wish to end; what is no training has no such points."""
        if self.task.kind not in ("scores", "train"):
            return True
        points = (self.queue.place(self.lease) / "run" / "checkpoints").glob("*.safetensors")
        for path in points:
            try:
                if os.stat(path).st_mtime >= asked:
                    return True
            except FileNotFoundError:
                continue
        return False
