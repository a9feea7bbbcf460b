"""metrics.jsonl: what happened at each step, for people and for the checks of `runs.health`.

A line per original training step (loss, lr, gradient norm, share of swallowed updates, the terms of an objective that
notes them), per evaluated step (what was
found by task), and per reversed step (cotangent norm, mean |score|, the recipe's own gradients, curvature), each once
however often the run was killed. A line that was lost all the same is written again: the run goes back to before it.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from retrograd.core.optim import Optimizer, rate
from retrograd.core.sweep import Event, Remade, Reversed
from retrograd.runs.errors import RunError
from retrograd.runs.files import append_line, read_lines, write_atomic
from retrograd.runs.loggers import Logger, scalars
from retrograd.runs.resume import Durable, first_missing

__all__ = ["Journal", "mirror", "read_evaluations", "read_journal", "recipe_gradients"]


class Journal:
    """metrics.jsonl: a line per original, evaluated and reversed step, each once however often the run was killed.

    Args:
        optimizer: Whose learning rate is told.
        loggers: Get every line that stays: those there already, then the new ones.
        noted: The terms of the loss that were computed since it was asked last, by name; asked at every event.
    """

    def __init__(
        self,
        path: Path,
        optimizer: Optimizer,
        loggers: Sequence[Logger] = (),
        noted: Callable[[], dict[str, float]] = dict,
    ) -> None:
        self.noted = noted
        self.path, self.lr, self.loggers = path, getattr(optimizer, "lr"), loggers  # noqa: B009
        entries = _entries(path)
        self.evaluated = {step: entry for (phase, step), entry in entries.items() if phase == "evaluate"}
        self.untold: set[int] = set()  # training steps that have no line and should
        self._rewrite(entries)
        mirror(path, loggers, lambda entry: entry["phase"] != "reverse")  # of those, some may be written again

    def __call__(self, event: Event) -> None:
        terms = self.noted()  # of a step that is replayed too, so that they do not count for the next one
        if isinstance(event, Reversed):
            values: dict[str, Any] = {
                "cotangent_norm": event.norm.tolist(), "nonfinite": event.nonfinite,
                "mean_abs_score": event.scores.abs().flatten(1).mean(1).tolist(),
                **{f"{name}_gradient": slopes.tolist() for name, slopes in event.recipe.items()},
            }  # fmt: skip
            if event.sharpness is not None:
                lr = rate(self.lr, event.step)
                values |= {"sharpness": event.sharpness, "lr_times_sharpness": lr * event.sharpness}
            self._write(phase="reverse", step=event.step, **values)
        elif event.step in self.untold and not isinstance(event, Remade):
            self.untold.remove(event.step)
            outcome = event.outcome
            values = {"loss": outcome.loss, "lr": rate(self.lr, event.step), "grad_norm": outcome.grad_norm}
            if outcome.swallowed is not None:
                values["swallowed"] = outcome.swallowed
            if terms:
                values["terms"] = terms
            self._write(phase="train", step=event.step, **values)

    def evaluation(self, step: int, **values: Any) -> None:
        """Write what was found at an evaluated step."""
        self.evaluated[step] = {"phase": "evaluate", "step": step, **values}
        self._write(**self.evaluated[step])

    def begin(self, durable: Durable) -> None:
        """Have every training step told; a trajectory that is beyond a missing line goes back to before it."""
        self.noted()  # of what was tried before the first step
        trained = {step for phase, step in _entries(self.path) if phase == "train"}
        self.untold = set(range(durable.steps)) - trained
        durable.back_to(first_missing(trained))

    def resume(self, durable: Durable, key: str = "") -> None:
        """Drop reverse lines that the resumed sweep will write again; one with a line missing starts over."""
        left, entries = durable.reverse_steps_left(key), _entries(self.path)
        if any(("reverse", step) not in entries for step in range(left, durable.steps)):
            durable.clean_reverse(key)
            left = durable.steps
        self._rewrite({(phase, n): entry for (phase, n), entry in entries.items() if phase != "reverse" or n >= left})
        mirror(self.path, self.loggers, lambda entry: entry["phase"] == "reverse")

    def _rewrite(self, entries: dict[tuple[str, int], dict[str, Any]]) -> None:
        text = "".join(f"{json.dumps(entry)}\n" for entry in entries.values())
        if not self.path.exists() or self.path.read_bytes() != text.encode():
            write_atomic(self.path, lambda t: t.write_text(text, encoding="utf8"))

    def _write(self, **values: Any) -> None:
        append_line(self.path, json.dumps(values))
        for logger in self.loggers:
            logger.log(values["phase"], values["step"], scalars(values))


def mirror(path: Path, loggers: Sequence[Logger], wanted: Callable[[dict], bool] = lambda entry: True) -> None:
    """Tell loggers the lines of a journal, in their order."""
    for entry in _entries(path).values() if loggers else ():
        if wanted(entry):
            for logger in loggers:
                logger.log(entry["phase"], entry["step"], scalars(entry))


def _entries(path: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """What is told by phase and step, in the order of the file; the last of several. A broken line tells nothing."""
    entries: dict[tuple[str, int], dict[str, Any]] = {}
    lines = read_lines(path)
    for line in lines:
        try:
            entry = json.loads(line)
            entries[entry["phase"], entry["step"]] = entry
        except (ValueError, KeyError, TypeError):
            warnings.warn(f"{path} has a broken line, which counts as lost: {line[:60]!r}", stacklevel=2)
    return entries


def read_journal(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The lines of training and those of the reverse sweep, each by ascending step."""
    ordered = sorted(_entries(path).values(), key=lambda entry: entry["step"])
    return [e for e in ordered if e["phase"] == "train"], [e for e in ordered if e["phase"] == "reverse"]


def read_evaluations(path: Path) -> dict[int, dict[str, Any]]:
    """The lines of evaluated steps, by step."""
    return {step: entry for (phase, step), entry in _entries(path).items() if phase == "evaluate"}


def recipe_gradients(rates: list[float], reverse: list[dict[str, Any]], names: list[str]) -> dict[str, Any] | None:
    """∂φ/∂lr_t by step and ∂φ/∂weight_decay, by query; None if the optimizer does not know its own learning rate.

    Args:
        rates: Learning rate by step.
        reverse: Journal lines of the sweep, by step.
        names: Query names, in the order of the query axis.
    Raises:
        RunError: If a step of the sweep has no line.
    """
    missing = first_missing({entry["step"] for entry in reverse})
    if missing < len(rates):
        raise RunError(
            f"metrics.jsonl tells of {len(reverse)} of {len(rates)} steps of the sweep, not of step {missing}: its "
            "line was lost while the sweep went on. Run the same command again; the sweep starts over."
        )
    if not reverse or "lr_gradient" not in reverse[0]:
        return None
    peak, gradients = max(rates), {}
    for k, name in enumerate(names):
        by_step = [entry["lr_gradient"][k] for entry in reverse]
        scaled = sum(lr / peak * slope for lr, slope in zip(rates, by_step, strict=True)) if peak else None
        decay = sum(entry["weight_decay_gradient"][k] for entry in reverse)
        gradients[name] = {"lr_by_step": by_step, "peak_lr": scaled, "weight_decay": decay}
    meaning = (
        "Derivatives of the query value after training, in nats per unit of: each step's learning rate (lr_by_step), "
        "the schedule's peak (peak_lr), the coefficient of weight decay. Negative: raising it lowers the query value."
    )
    return {"meaning": meaning, "lr": rates, "queries": gradients}
