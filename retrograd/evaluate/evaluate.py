"""`retrograd evaluate`: ask models the same questions and say which are broken. Running again does what is missing.

One file for each model and task, shared among the ranks of torchrun; rank 0 waits for the others and reports.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console

from retrograd.core import tree
from retrograd.durable import LOCK
from retrograd.evaluate.ask import Others
from retrograd.evaluate.backends import Backend, find_backend
from retrograd.evaluate.folder import begin_evaluation, content, plain
from retrograd.evaluate.show import show
from retrograd.evaluate.tell import failed_path, measured_path
from retrograd.lm.model import load_causal_lm, load_tokenizer
from retrograd.parallel.deal import Deal, dealt
from retrograd.runs.errors import RunError
from retrograd.runs.files import write_atomic, write_json
from retrograd.runs.lock import locked
from retrograd.runs.setup import find_device
from retrograd.settings.commands import EvaluateConfig

__all__ = ["evaluate"]


class _Plan(NamedTuple):
    """Sources of the models by name, who asks what, and who is compared with whom."""

    models: dict[str, str]
    backend: Backend
    reference: str
    knows: str | None
    never: str | None


def evaluate(config: EvaluateConfig, console: Console | None = None) -> int:
    """Measure what is not measured yet, then write and show the summary.

    Returns:
        0 if everything is there, 1 if something is missing. On ranks other than 0, always 0.
    Raises:
        ValueError: For anything the user can mend before anything is measured.
        RunError: For a failure of the machine; the same call resumes.
    """
    console = console or Console()
    plan = _planned(config)
    with dealt() as deal:
        name = f"{LOCK}-rank{deal.rank}" if deal.rank else LOCK  # rank 0 keeps other calls out, for all
        with locked(config.output, name, tidy=deal.world == 1):
            return _evaluate(config, plan, deal, console)


def _evaluate(config: EvaluateConfig, plan: _Plan, deal: Deal, console: Console) -> int:
    models = {name: {"source": source, "content": content(source)} for name, source in plan.models.items()}
    settings = {"dtype": config.dtype, "tokenizer": config.tokenizer, **plan.backend.settings(), "models": models}
    begin_evaluation(config.output, settings, write=deal.rank == 0)
    pairs = [(model, task) for model in plan.models for task in plan.backend.names]
    mine = deal.neighbours(pairs)  # which share a model
    _carry_out(config, plan, [pair for pair in mine if not measured_path(config.output, *pair).exists()])
    deal.meet()
    if deal.rank:
        return 0
    summary = plan.backend.summarise(config.output, list(plan.models), plan.reference, plan.knows, plan.never)
    write_json(config.output / "summary.json", {"dtype": config.dtype, "sources": plan.models, **summary})
    show(summary, config.output, console)
    return 1 if summary["missing"] else 0


def _planned(config: EvaluateConfig) -> _Plan:
    backend = find_backend(config)
    if not config.models:
        raise ValueError("no model; give at least one")
    knows, never, reference = config.knows, config.never, config.reference
    if config.lab is not None:
        models = config.lab / "models"
        knows, never = knows or str(models / "base"), never or str(models / "filtered")
        reference = reference or str(models / "base")
    if (knows is None) != (never is None):
        raise ValueError("--knows and --never belong together: a position lies between two models")
    reference = reference or config.models[0]
    names = _names([*config.models, *(source for source in (reference, knows, never) if source)])
    sources = {name: source for source, name in names.items()}

    def name(source: str | None) -> str | None:
        return None if source is None else names[plain(source)]

    others = Others(plain(reference), knows and plain(knows), config.dtype, config.device)
    return _Plan(sources, backend.beside(others), names[plain(reference)], name(knows), name(never))


def _names(sources: Sequence[str]) -> dict[str, str]:
    """A name for each different source: the end of its path, as many parts as it takes to tell them apart.

    The model that a run has left, RUN/model, is named after the run.
    """
    different = list(dict.fromkeys(map(plain, sources)))
    parts = {source: _path(source) for source in different}
    names = {}
    for source in different:
        count = 1
        others = [parts[other] for other in different if other != source]
        while count < len(parts[source]) and any(other[-count:] == parts[source][-count:] for other in others):
            count += 1
        names[source] = re.sub(r"[^\w.-]", "-", "-".join(parts[source][-count:])).lstrip(".-") or "model"
    if len(set(names.values())) < len(names):
        raise ValueError(f"two models have the same name: {', '.join(names)}; rename a folder")
    return names


def _path(source: str) -> tuple[str, ...]:
    """The parts of a source's path, without a run's own word for its model."""
    *before, last = source.split("/")
    left = last == "model" and before and (Path(source) / "trained.json").exists()
    return tuple(before) if left else (*before, last)


def _carry_out(config: EvaluateConfig, plan: _Plan, pairs: list[tuple[str, str]]) -> None:
    """Measure pairs of model and task, each model loaded once; a failure is written down and the rest goes on."""
    if not pairs:
        return
    device = find_device(config.device)
    with plan.backend.progress(len(pairs)) as tick:
        for model, group in groupby(pairs, key=lambda pair: pair[0]):
            tasks = [task for _, task in group]
            for task in tasks:
                failed_path(config.output, model, task).unlink(missing_ok=True)
            _one_model(config, plan, model, tasks, device, tick)
            gc.collect()  # before the next model


def _one_model(
    config: EvaluateConfig, plan: _Plan, name: str, tasks: list[str], device: torch.device, tick: Callable
) -> None:
    source = plan.models[name]
    try:
        lm = load_causal_lm(source, dtype=config.dtype, device=device)
        tokenizer = load_tokenizer(config.tokenizer or source)
        digest = tree.digest(dict(sorted(lm.params.items())))
    except _FAILURES as error:
        for task in tasks:
            _write_failure(failed_path(config.output, name, task), error)
        tick(len(tasks), f"{name} failed")
        return
    about = {"model": name, "source": source, "digest": digest, "dtype": config.dtype, "torch": torch.__version__}
    for task in tasks:
        try:
            path = measured_path(config.output, name, task)
            plan.backend.measure(task, lm, tokenizer, path, {"task": task, **about})
        except RunError:
            raise  # no disk: nothing more can be kept
        except _FAILURES as error:
            _write_failure(failed_path(config.output, name, task), error)
        tick(1, f"{name} {task}")


_FAILURES = (ValueError, OSError, RuntimeError, MemoryError, ArithmeticError)  # the data, the network, the memory


def _write_failure(path: Path, error: BaseException) -> None:
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    write_atomic(path, lambda temporary: temporary.write_text(reason + "\n", encoding="utf8"))
