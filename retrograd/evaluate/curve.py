"""What was found on the way of a trajectory, for people: a table, the best step, and what is missing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from retrograd.settings.on_the_way import Rule, best_of, value_of

__all__ = ["BEST", "show_evaluations"]

BEST = "best.json"
COLUMNS = 7  # steps in the table at most: the first, the last, the best, and others between
WIDTH = 10  # characters of a column

Evaluations = Mapping[int, Mapping[str, Any]]
"""Lines of metrics.jsonl by step."""


def show_evaluations(
    run: Path, evaluations: Evaluations, console: Console, rule: Rule | None = None, wanted: Sequence[int] = ()
) -> None:
    """Print values by task and step, which step is kept as the best, and every value that is missing, with its reason.

    Args:
        evaluations: Lines of metrics.jsonl by step.
        rule: That the best step was kept by, if any.
        wanted: Steps that were to be evaluated.
    """
    kept = _kept(run)
    names = dict.fromkeys(name for step in sorted(evaluations) for name in evaluations[step]["tasks"])
    room = (console.width - max(map(len, names), default=0)) // WIDTH
    steps = _shown(sorted(evaluations), kept, max(3, min(COLUMNS, room)))
    title = f"On the way: accuracy in %, texts: nats per token. {len(steps)} of {len(evaluations)} evaluated steps"
    table = Table(
        Column("task", overflow="fold"), *(f"{'best: ' if kept == step else ''}{step}" for step in steps), title=title
    )
    for name in names:
        entries = [evaluations[step]["tasks"].get(name, {}) for step in steps]
        if not any("samples" in entry for entry in entries):
            table.add_row(name, *(_cell(entry) for entry in entries))
    seconds = sum(entry["seconds"] for entry in evaluations.values())
    console.print(table)
    console.print(Text(f"It took {seconds:.1f} seconds. Every step: {run / 'metrics.jsonl'}"))
    _tell_best(run, evaluations, rule, console)
    for line in _missing(evaluations, wanted):
        console.print(Text(f"MISSING {line}"), style="bold red")


def _kept(run: Path) -> int | None:
    """The step whose model is in RUN/best."""
    path = run / "best" / BEST
    return int(json.loads(path.read_text(encoding="utf8"))["step"]) if path.exists() else None


def _shown(steps: Sequence[int], kept: int | None, most: int) -> list[int]:
    """At most so many of the steps, 3 or more: the first, the last and the kept one, the others evenly."""
    if len(steps) <= most:
        return list(steps)
    places = {round(k * (len(steps) - 1) / (most - 2)) for k in range(most - 1)}
    return [step for place, step in enumerate(steps) if place in places or step == kept]


def _cell(entry: Mapping[str, Any]) -> str:
    value = value_of(entry)
    if value is None:
        return "missing" if entry else ""
    return f"{100 * value:.1f}" if "accuracy" in entry else f"{value:.4f}"


def _tell_best(run: Path, evaluations: Evaluations, rule: Rule | None, console: Console) -> None:
    path, chosen = run / "best" / BEST, None
    if rule is not None:
        chosen = best_of({step: entry["tasks"] for step, entry in evaluations.items()}, rule)
    if path.exists():
        kept = json.loads(path.read_text(encoding="utf8"))
        line = f"Best by {kept['rule']}: step {kept['step']} with {kept['value']:.4g}; its model is {run / 'best'}"
        console.print(Text(line))  # a string would have max:a: read as an emoji
        if chosen is not None and chosen[0] != kept["step"]:
            lost = f"MISSING the model of step {chosen[0]}, which is the best by the lines in metrics.jsonl"
            console.print(Text(lost), style="bold red")
    elif chosen is not None:
        console.print(Text(f"MISSING {run / 'best'}, the model of step {chosen[0]}"), style="bold red")
    elif rule is not None:
        console.print(Text(f"No evaluated step meets {rule.text}: no model was kept."), style="bold red")


def _missing(evaluations: Evaluations, wanted: Sequence[int]) -> list[str]:
    missing = [
        f"step {step} {name}: {entry['missing']}"
        for step in sorted(evaluations)
        for name, entry in evaluations[step]["tasks"].items()
        if "missing" in entry
    ]
    passed = [step for step in wanted if step not in evaluations]
    if passed:
        listed = ", ".join(map(str, passed[:8])) + (" …" if len(passed) > 8 else "")
        missing.append(f"step {listed}: the trajectory did not come by it while evaluation was on")
    return missing
