"""Retraining without sets of data: one by one, batched in one process, or side by side in several."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import torch

from retrograd.core.optim import Params
from retrograd.core.step import NonFiniteError, left_finite
from retrograd.runs.errors import RunError
from retrograd.runs.manifest import Manifest
from retrograd.runs.run_folder import Opened, open_run
from retrograd.runs.states.budget import free_memory
from retrograd.trust.bank import BASELINE, Failed, LeftOut, Retrained
from retrograd.trust.ensemble import train_many
from retrograd.trust.left_out import reweighted
from retrograd.trust.models import Models, answers

__all__ = ["NOTHING", "Conditions", "conditions_of", "retrain_all"]

SMALL, STACK = 100_000, 16  # parameters up to which a stack of models is faster than a loop; models in it
LIGHT = 5_000_000  # parameters up to which several processes of one thread beat one of several
QUICK = 60.0  # seconds of work that are not worth starting processes for
NOTHING = LeftOut(BASELINE, 0.0, torch.zeros(0, dtype=torch.int64).numpy())


class Trained(NamedTuple):
    """Query values [K] in nats, or why there are none; the name under which the model was kept, "" if it was not."""

    values: list[float] | Failed
    model: str = ""


class Conditions(NamedTuple):
    """How to retrain: threads of each process, processes, and models in a stack (1: no stack)."""

    threads: int
    workers: int
    together: int

    @property
    def bits(self) -> dict[str, int]:
        """What the bits of a retraining depend on."""
        return {"threads": self.threads, "together": self.together}

    @property
    def alone(self) -> Conditions:
        """The same without a stack."""
        return self._replace(together=1)


def conditions_of(manifest: Manifest, sets: int, workers: int, together: int) -> Conditions:
    """Choose what is left to choose (0), by the model's size and what the machine has."""
    recorded = manifest.values
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parameters, threads = recorded["parameters"], recorded["arithmetic"]["threads"]
    on_cpu = recorded["arithmetic"]["device"] == "cpu"
    together = together or (STACK if parameters <= SMALL and sets > 1 else 1)
    seconds = recorded["phases"].get("train", {}).get("seconds", 0.0) * sets / together
    if workers == 0 and "RANK" in os.environ:
        workers = 1
    if workers == 0:
        per_process = 1 if parameters <= LIGHT else threads
        fit = free_memory() // ((1 << 30) + 32 * parameters * together)
        workers = min(cores // per_process, fit, -(-sets // together)) if on_cpu and seconds > QUICK else 1
    workers = max(1, workers)
    return Conditions(max(1, min(threads, cores // workers)), workers, together)


def retrain_all(
    run: Opened, sets: Sequence[LeftOut], conditions: Conditions, baseline: Retrained | None, *, keep: bool = False
) -> Iterator[list[tuple[LeftOut, Retrained | Failed]]]:
    """Retrain without each set, yielding groups as they are done; the baseline first where it is not known yet.

    One that diverges fails alone.

    Args:
        baseline: With everything, trained alone with as many threads, if known. A stack has its own.
        keep: Keep every model, those of the baselines too.
    Raises:
        RunError: If retraining with everything diverges.
    """
    if baseline is None or (keep and not baseline.model):
        values, model = _sound(_values(run, [NOTHING], 1, Models(run) if keep else None)[0], "alone")
        baseline = Retrained(values, values, model, model)
        yield [(NOTHING, baseline)]
    size = max(1, conditions.together - 1)  # the baseline is in every stack
    groups = [list(sets[start : start + size]) for start in range(0, len(sets), size)]
    for group, trained in _carried_out(run, groups, conditions, keep):
        stacked = conditions.together > 1
        here = _sound(trained.pop(0), "in a stack") if stacked else (baseline.values, baseline.model)
        yield [
            (left_out, values if isinstance(values, Failed) else Retrained(values, here[0], model, here[1]))
            for left_out, (values, model) in zip(group, trained, strict=True)
        ]


def _sound(baseline: Trained, how: str) -> tuple[list[float], str]:
    if isinstance(baseline.values, Failed):
        raise RunError(
            f"retraining with everything, {how}, diverged, so nothing can be compared with it: "
            f"{baseline.values.reason} --together 1 retrains one by one, as the run was trained."
        )
    return baseline.values, baseline.model


def _carried_out(
    run: Opened, groups: Sequence[list[LeftOut]], conditions: Conditions, keep: bool
) -> Iterator[tuple[list[LeftOut], list[Trained]]]:
    workers = min(conditions.workers, len(groups))
    if workers <= 1:
        models = Models(run) if keep else None
        for group in groups:
            yield group, _values(run, group, conditions.together, models)
        return
    given = (run.folder, conditions.threads, os.getpid())
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _begin, given)
    try:
        started = {pool.submit(_in_worker, group, conditions.together, keep): group for group in groups}
        for future in as_completed(started):
            yield started[future], future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _values(run: Opened, group: Sequence[LeftOut], together: int, models: Models | None = None) -> list[Trained]:
    """Query values [K] after training without each set; in a stack, after those with everything."""
    loaded = run.loaded
    weights = [reweighted(loaded.training.weights, left_out.places, left_out.weight) for left_out in group]
    params = loaded.initial.params
    if together == 1:
        return [_alone(run, w, models) for w in weights]
    stack, faults = torch.stack([loaded.training.weights, *weights]), dict[int, str]()

    def watch(step: int, losses: torch.Tensor, norms: torch.Tensor) -> None:
        for member, numbers in enumerate(zip(losses.tolist(), norms.tolist(), strict=True)):
            if fault := left_finite(step, *numbers):
                faults.setdefault(member, fault)

    many = train_many(loaded.training, params, stack, objective=loaded.objective, observe=watch)
    return [
        Trained(Failed(faults[s]))
        if s in faults  # a copy, for sums over a vector may depend on where it begins
        else _asked(run, {name: leaf[s].clone() for name, leaf in many.items()}, models)
        for s in range(len(stack))
    ]


def _alone(run: Opened, weights: torch.Tensor, models: Models | None) -> Trained:
    try:
        return _asked(run, run.loaded.final(weights).params, models)
    except NonFiniteError as error:
        return Trained(Failed(str(error)))


def _asked(run: Opened, final: Params, models: Models | None) -> Trained:
    values = answers(run, final)
    return Trained(values, models.keep(final) if models is not None else "")


_WORKER: dict[str, Opened] = {}  # of a worker process: the run, opened once


def _begin(folder: Path, threads: int, parent: int) -> None:
    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)  # the parent was killed

    threading.Thread(target=watch, daemon=True).start()
    _WORKER["run"] = open_run(folder, threads=threads, trust_code=True)  # whoever began has been asked


def _in_worker(group: list[LeftOut], together: int, keep: bool) -> list[Trained]:
    run = _WORKER["run"]
    return _values(run, group, together, Models(run) if keep else None)
