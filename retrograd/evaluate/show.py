"""The summary of an evaluation, for people."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

__all__ = ["of_unlearning", "show"]

_STYLES = {"destroyed": "bold red", "damaged": "yellow", "healthy": "green", "untouched": "cyan"}


def show(summary: dict[str, Any], folder: Path, console: Console) -> None:
    """Print accuracies, differences from the reference, positions, verdicts and what is missing."""
    models = list(summary["models"])
    cells: dict[str, dict[str, str]] = {}
    questions: dict[str, Any] = {}
    for entry in summary["results"]:
        for label, cell in _cells(entry).items():
            cells.setdefault(label, {})[entry["model"]] = cell
            questions[label] = entry.get("questions", entry.get("tokens")) or questions.get(label)
    table = Table("task", "n", *models, title=f"Accuracy in % with its 95 % interval, or {_other(summary)}: {folder}")
    for label, by_model in cells.items():
        table.add_row(label, str(questions[label] or ""), *(by_model.get(model, "missing") for model in models))
    console.print(table)
    _of_unlearning(summary, models, console)
    _differences(summary, models, console)
    for name, diagnosis in summary["models"].items():
        verdict = diagnosis["verdict"] or "no verdict"
        console.print(f"{name}: {verdict}", style=_STYLES.get(verdict), markup=False)
        for reason in diagnosis["reasons"]:
            console.print(f"  {reason}", markup=False)
    lost: dict[tuple[str, str], list[str]] = {}
    for entry in summary["missing"]:
        lost.setdefault((entry["model"], entry["reason"]), []).append(entry["task"])
    for (model, reason), tasks in lost.items():
        console.print(f"MISSING {model} {', '.join(tasks)}: {reason}", style="bold red", markup=False)


def _of_unlearning(summary: dict[str, Any], models: list[str], console: Console) -> None:
    """The metrics of docs/metrics.md, and why one is missing."""
    rows: dict[tuple[str, str], dict[str, str]] = {}
    gone: dict[str, None] = {}
    for entry in summary["results"]:
        for name, metric in entry.get("of_unlearning", {}).items():
            rows.setdefault((name, entry["task"]), {})[entry["model"]] = of_unlearning(metric)
            if metric["value"] is None:
                gone[f"{name} of {entry['task']}, {entry['model']}: {metric['missing']}"] = None
    if not rows:
        return
    table = Table("metric", "task", *models, title="Metrics of unlearning with their 95 % intervals")
    for (name, task), by_model in rows.items():
        table.add_row(name, task, *(by_model.get(model, "missing") for model in models))
    console.print(table)
    for line in gone:
        console.print(f"  {line}", markup=False)


def of_unlearning(metric: dict[str, Any]) -> str:
    """A metric of `metrics.metrics_of`: value and interval."""
    if metric["value"] is None:
        return "missing"
    low, high = metric["interval"]
    return f"{metric['value']:.3g} ({low:.2g} to {high:.2g})"


def _differences(summary: dict[str, Any], models: list[str], console: Console) -> None:
    others = [model for model in models if model != summary["reference"]]
    if not others or not summary["comparisons"]:
        return
    table = Table("task", *others, title=f"Points above {summary['reference']}, paired: 95 % interval, McNemar's p")
    rows: dict[str, dict[str, str]] = {}
    for entry in summary["comparisons"]:
        rows.setdefault(_label(summary, entry), {})[entry["model"]] = _difference(entry)
    for label, by_model in rows.items():
        table.add_row(label, *(by_model.get(model, "missing") for model in others))
    console.print(table)
    for entry in summary["positions"]:
        if entry["position"] is not None:
            low, high = entry["interval"]
            console.print(
                f"{entry['model']}, {_label(summary, entry)}: at {entry['position']:.2f} ({low:.2f} to {high:.2f}) "
                f"between {summary['never']} (0) and {summary['knows']} (1)", markup=False,
            )  # fmt: skip


def _other(summary: dict[str, Any]) -> str:
    return "a metric of lm-eval ± its standard error" if summary.get("backend") == "lm-eval" else "perplexity"


def _label(summary: dict[str, Any], entry: dict[str, Any]) -> str:
    """Tasks of lm-eval have several metrics."""
    return f"{entry['task']} {entry['metric']}" if summary.get("backend") == "lm-eval" else entry["task"]


def _cells(entry: dict[str, Any]) -> dict[str, str]:
    """What the table says of an entry, by row."""
    if entry["form"] in ("generate", "memory", "kl", "depth"):
        return {}
    if "asked" not in entry:  # asked by this package: a task has one metric
        return {entry["task"]: _cell(entry)}
    metrics = entry["metrics"] or {}
    return {f"{entry['task']} {label}": _metric(metric) for label, metric in metrics.items()}


def _metric(metric: dict[str, Any]) -> str:
    if metric["value"] is None:
        return "missing"
    if "interval" in metric:
        return _share(metric["value"], metric["interval"])
    return f"{metric['value']:.4g}" + (f" ± {metric['stderr']:.2g}" if metric["stderr"] is not None else "")


def _share(value: float, interval: list[float]) -> str:
    low, high = interval
    return f"{100 * value:.1f} ({100 * low:.0f}–{100 * high:.0f})"


def _cell(entry: dict[str, Any]) -> str:
    if entry["form"] == "text":
        return "missing" if entry["perplexity"] is None else f"{entry['perplexity']:.4g}"
    return "missing" if entry["accuracy"] is None else _share(entry["accuracy"], entry["interval"])


def _difference(entry: dict[str, Any]) -> str:
    if entry["difference"] is None:
        return "missing"
    low, high = entry["interval"]
    return f"{100 * entry['difference']:+.1f} ({100 * low:+.0f} to {100 * high:+.0f}) p={entry['p']:.2g}"
