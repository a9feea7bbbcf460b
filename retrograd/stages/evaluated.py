"""The summary of an evaluation, for people."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

__all__ = ["show"]

_STYLES = {"destroyed": "bold red", "damaged": "yellow", "healthy": "green", "untouched": "cyan"}


def show(summary: dict[str, Any], folder: Path, console: Console) -> None:
    """Print accuracies, differences from the reference, positions, verdicts and what is missing."""
    models = list(summary["models"])
    cells: dict[str, dict[str, str]] = {}
    shown = [entry for entry in summary["results"] if entry["form"] != "generate"]
    for entry in shown:
        cells.setdefault(entry["task"], {})[entry["model"]] = _cell(entry)
    questions = {entry["task"]: entry.get("questions", entry.get("tokens")) for entry in shown}
    table = Table("task", "n", *models, title=f"Accuracy in % with its 95 % interval, or perplexity: {folder}")
    for task, by_model in cells.items():
        table.add_row(task, str(questions[task] or ""), *(by_model[model] for model in models))
    console.print(table)
    _differences(summary, models, console)
    for name, one in summary["models"].items():
        verdict = one["verdict"] or "no verdict"
        console.print(f"{name}: {verdict}", style=_STYLES.get(verdict), markup=False)
        for reason in one["reasons"]:
            console.print(f"  {reason}", markup=False)
    for entry in summary["missing"]:
        console.print(f"MISSING {entry['model']} {entry['task']}: {entry['reason']}", style="bold red", markup=False)


def _differences(summary: dict[str, Any], models: list[str], console: Console) -> None:
    others = [model for model in models if model != summary["reference"]]
    if not others or not summary["comparisons"]:
        return
    table = Table("task", *others, title=f"Points above {summary['reference']}, paired: 95 % interval, McNemar's p")
    rows: dict[str, dict[str, str]] = {}
    for entry in summary["comparisons"]:
        rows.setdefault(entry["task"], {})[entry["model"]] = _difference(entry)
    for task, by_model in rows.items():
        table.add_row(task, *(by_model[model] for model in others))
    console.print(table)
    for entry in summary["positions"]:
        if entry["position"] is not None:
            low, high = entry["interval"]
            console.print(
                f"{entry['model']}, {entry['task']}: at {entry['position']:.2f} ({low:.2f} to {high:.2f}) between "
                f"{summary['never']} (0) and {summary['knows']} (1)", markup=False,
            )  # fmt: skip


def _cell(entry: dict[str, Any]) -> str:
    if entry["form"] == "text":
        return "missing" if entry["perplexity"] is None else f"{entry['perplexity']:.4g}"
    if entry["accuracy"] is None:
        return "missing"
    low, high = entry["interval"]
    return f"{100 * entry['accuracy']:.1f} ({100 * low:.0f}–{100 * high:.0f})"


def _difference(entry: dict[str, Any]) -> str:
    if entry["difference"] is None:
        return "missing"
    low, high = entry["interval"]
    return f"{100 * entry['difference']:+.1f} ({100 * low:+.0f} to {100 * high:+.0f}) p={entry['p']:.2g}"
