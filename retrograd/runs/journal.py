"""metrics.jsonl: what happened at each step, for people and for the checks of `runs.health`.

A line per original training step (loss, lr, gradient norm, share of swallowed updates), per evaluated step (what was
found by task), and per reversed step (cotangent norm, mean |score|, the recipe's own gradients, curvature), each once
however often the run was killed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from retrograd.core.optim import Optimizer, rate
from retrograd.core.sweep import Event, Reversed, first_time
from retrograd.runs.files import append_line, read_lines, write_atomic
from retrograd.runs.loggers import Logger, scalars
from retrograd.runs.trajectory import Trajectory

__all__ = ["Journal", "mirror", "read_evaluations", "read_journal", "recipe_gradients"]


class Journal:
    """metrics.jsonl: a line per original, evaluated and reversed step, each once however often the run was killed.

    Args:
        optimizer: Whose learning rate is told.
        loggers: Get every line that stays: those there already, then the new ones.
    """

    def __init__(self, path: Path, optimizer: Optimizer, loggers: Sequence[Logger] = ()) -> None:
        self.path, self.lr, self.loggers = path, getattr(optimizer, "lr"), loggers  # noqa: B009
        lines = read_lines(path)
        self.trained = {entry["step"] for entry in map(json.loads, lines) if entry["phase"] == "train"}
        self.evaluated = read_evaluations(path)
        self._rewrite(lines)
        mirror(path, loggers, lambda entry: entry["phase"] != "reverse")  # of those, some may be written again

    def __call__(self, event: Event) -> None:
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
        elif event.step not in self.trained and first_time(event):
            self.trained.add(event.step)
            outcome = event.outcome
            values = {"loss": outcome.loss, "lr": rate(self.lr, event.step), "grad_norm": outcome.grad_norm}
            if outcome.swallowed is not None:
                values["swallowed"] = outcome.swallowed
            self._write(phase="train", step=event.step, **values)

    def evaluation(self, step: int, **values: Any) -> None:
        """Write what was found at an evaluated step."""
        self.evaluated[step] = {"phase": "evaluate", "step": step, **values}
        self._write(**self.evaluated[step])

    def resume(self, trajectory: Trajectory, key: str = "") -> None:
        """Drop reverse lines that the resumed sweep will write again."""
        left = trajectory.reverse_steps_left(key)
        lines = [line for line in read_lines(self.path) if not _again(json.loads(line), left)]
        self._rewrite(lines)
        mirror(self.path, self.loggers, lambda entry: entry["phase"] == "reverse")

    def _rewrite(self, lines: list[str]) -> None:
        write_atomic(self.path, lambda t: t.write_text("".join(f"{line}\n" for line in lines), encoding="utf8"))

    def _write(self, **values: Any) -> None:
        append_line(self.path, json.dumps(values))
        for logger in self.loggers:
            logger.log(values["phase"], values["step"], scalars(values))


def mirror(path: Path, loggers: Sequence[Logger], wanted: Callable[[dict], bool] = lambda entry: True) -> None:
    """Tell loggers the lines of a journal, in their order."""
    for entry in map(json.loads, read_lines(path)) if loggers else ():
        if wanted(entry):
            for logger in loggers:
                logger.log(entry["phase"], entry["step"], scalars(entry))


def _again(entry: dict[str, Any], left: int) -> bool:
    return entry["phase"] == "reverse" and entry["step"] < left


def read_journal(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The lines of training and those of the reverse sweep, each by ascending step."""
    entries = [json.loads(line) for line in read_lines(path)]
    ordered = sorted(entries, key=lambda entry: entry["step"])
    return [e for e in ordered if e["phase"] == "train"], [e for e in ordered if e["phase"] == "reverse"]


def read_evaluations(path: Path) -> dict[int, dict[str, Any]]:
    """The lines of evaluated steps, by step."""
    entries = map(json.loads, read_lines(path))
    return {entry["step"]: entry for entry in entries if entry["phase"] == "evaluate"}


def recipe_gradients(rates: list[float], reverse: list[dict[str, Any]], names: list[str]) -> dict[str, Any] | None:
    """∂φ/∂lr_t by step and ∂φ/∂weight_decay, by query; None if the optimizer does not know its own learning rate.

    Args:
        rates: Learning rate by step.
        reverse: Journal lines of the sweep, by step.
        names: Query names, in the order of the query axis.
    """
    if not reverse or "lr_gradient" not in reverse[0]:
        return None
    peak, found = max(rates), {}
    for k, name in enumerate(names):
        by_step = [entry["lr_gradient"][k] for entry in reverse]
        scaled = sum(lr / peak * slope for lr, slope in zip(rates, by_step, strict=True)) if peak else None
        decay = sum(entry["weight_decay_gradient"][k] for entry in reverse)
        found[name] = {"lr_by_step": by_step, "peak_lr": scaled, "weight_decay": decay}
    meaning = (
        "Derivatives of the query value after training, in nats per unit of: each step's learning rate (lr_by_step), "
        "the schedule's peak (peak_lr), the coefficient of weight decay. Negative: raising it lowers the query value."
    )
    return {"meaning": meaning, "lr": rates, "queries": found}
