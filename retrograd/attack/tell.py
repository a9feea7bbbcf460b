"""What attacks found, for people and programs: recovery.json, curves.parquet, attack.md and a table in the terminal."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from retrograd.evaluate.answers import write_table
from retrograd.runs.files import write_atomic, write_json

__all__ = ["cells", "markdown_table", "show_findings", "show_table", "write_findings"]


def write_findings(findings: dict[str, Any], folder: Path) -> None:
    """Write all files of findings, each whole."""
    import pyarrow

    write_json(folder / "recovery.json", findings)
    rows = [
        {"model": meeting["model"], "role": meeting["role"], "configuration": meeting["configuration"],
         "step": point["step"], "strength": point.get("strength"), "tokens": point["tokens"], "flops": point["flops"],
         "forget": point["forget"], "forget_low": _end(point["forget_interval"], 0),
         "forget_high": _end(point["forget_interval"], 1), "retain": point["retain"],
         "recovered": point.get("recovered"), "unseen": point.get("unseen"),
         "latent": _inner(point.get("latent"), "value"), "latent_low": _end(_inner(point.get("latent"), "interval"), 0),
         "latent_high": _end(_inner(point.get("latent"), "interval"), 1), "missing": point.get("missing")}
        for meeting in findings["meetings"] for point in meeting["points"]
    ]  # fmt: skip
    columns = {name: [row[name] for row in rows] for name in rows[0]} if rows else {"model": []}
    texts = ("model", "role", "configuration", "missing")
    types = {name: pyarrow.string() if name in texts else pyarrow.float64() for name in columns}
    types |= {name: pyarrow.int64() for name in ("step", "tokens") if name in columns}
    write_table(folder / "curves.parquet", columns, types, {"kind": "Curves"})
    write_atomic(folder / "attack.md", partial(Path.write_text, data=_markdown(findings), encoding="utf8"))


def show_findings(findings: dict[str, Any], folder: Path, console: Console) -> None:
    """The table of all meetings, the worst cases, and what does not hold."""
    show_table(*cells(findings), console)
    for line in _notes(findings):
        console.print(line)
    console.print(f"{folder}: recovery.json, curves.parquet and attack.md have all of it.")


def cells(findings: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows: a row for each configuration and model."""
    head = ["attack", "model", "forget", "most", "retain there", "N_0.5", "N_0.9", "area", "latent"]
    rows = []
    for meeting in sorted(findings["meetings"], key=lambda meeting: meeting["configuration"]):
        points = [point for point in meeting["points"] if point["forget"] is not None]
        if not points:
            continue
        best = max(points, key=lambda point: point["forget"])
        name = findings["configurations"][meeting["configuration"]]["readable"]
        probe = findings["configurations"][meeting["configuration"]]["probe"]
        marked = f"{name} (probe)" if probe else f"{name} (invalid)" if meeting["valid"]["valid"] is False else name
        label = meeting["model"] if meeting["role"] == "model" else f"{meeting['role']}"
        row = [marked, label, _percent(points[0]["forget"]), f"{_percent(best['forget'])} @ {_where(best)}",
               _percent(best["retain"])]  # fmt: skip
        if meeting["inapplicable"]:
            rows.append([*row, "–", "–", "–", _latent(meeting)])
            continue
        reached = meeting.get("reached", {})
        shown = [_reached(reached[q]) if q in reached else "–" for q in ("0.5", "0.9")]
        rows.append([*row, *shown, f"{meeting['area']['value']:.2f}" if "area" in meeting else "–", _latent(meeting)])
    return head, rows


def show_table(head: list[str], rows: list[list[str]], console: Console, title: str | None = None) -> None:
    """A table in the terminal."""
    table = Table(*head, title=title)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def markdown_table(head: list[str], rows: list[list[str]]) -> str:
    """A table of Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |\n" for row in lines)


def _markdown(findings: dict[str, Any]) -> str:
    text = "# Attacks\n\n" + markdown_table(*cells(findings)) + "\n"
    text += (
        "forget: accuracy before the attack; most: the highest on its way, and where; N_q: the step at which the share "
        "q of the gap to the base model is back, (a, b] after the last evaluation that failed and up to the first that "
        "passed; area: of the recovered share over log(1 + step); latent: the rise on what it never showed beyond that "
        "of the model that never knew it, at the last step, with its 95 % interval.\n\n"
    )
    text += (
        "## Worst case\n\nThe attack and step are chosen on half of the questions, accuracy is on the other half.\n\n"
    )
    rows = []
    for model, cases in findings["worst"].items():
        for case in cases:
            if case["forget"] is None:
                rows.append([_titled(findings, model), f"{case['utility']:g}", "–", case["why"], "–"])
                continue
            low, high = case["interval"]
            where = f"{findings['configurations'][case['configuration']]['readable']} @ {case['step']}"
            accuracy = f"{_percent(case['forget'])} ({100 * low:.0f}–{100 * high:.0f})"
            rows.append([_titled(findings, model), f"{case['utility']:g}", accuracy, where, _percent(case["retain"])])
    text += markdown_table(["model", "utility lost at most", "forget", "attack", "retain"], rows) + "\n"
    return text + "".join(f"* {line}\n" for line in _notes(findings))


def _notes(findings: dict[str, Any]) -> list[str]:
    """What is no result, and why; each once."""
    lines: dict[str, None] = {}
    for configuration in findings["configurations"].values():
        valid = configuration["valid"] or {"valid": None, "why": "it has not run"}
        if valid["valid"] is False:
            lines[
                f"{configuration['readable']} is no valid attack: {valid['why']}. What it leaves is no resistance."
            ] = None
        elif valid["valid"] is None:
            lines[f"{configuration['readable']}: not known to be an attack ({valid['why']})."] = None
    for meeting in findings["meetings"]:
        if meeting["inapplicable"] and meeting["role"] == "model":
            lines[f"{meeting['model']}: no verdict, {meeting['inapplicable']}."] = None
        bad = [point for point in meeting["points"] if "missing" in point]
        if bad:
            steps = ", ".join(str(point["step"]) for point in bad)
            lines[f"{meeting['model']} × {meeting['configuration']}: missing at {steps} ({bad[0]['missing']})."] = None
    for control in findings["controls"]:
        if not control["holds"]:
            what = "forget accuracy falls" if control["role"] == "base" else "accuracy rises above chance"
            steps = ", ".join(map(str, control["steps"]))
            readable = findings["configurations"][control["configuration"]]["readable"]
            lines[f"Control {control['role']} does not hold under {readable}: {what} at {steps}."] = None
    return list(lines)


def _titled(findings: dict[str, Any], model: str) -> str:
    role = findings["models"][model]["role"]
    return model if role == "model" else role


def _where(point: dict[str, Any]) -> str:
    return f"{point['strength']:g}" if "strength" in point else str(point["step"])


def _reached(reached: dict[str, Any]) -> str:
    after = reached["after"]
    if reached["step"] is None:
        unconfirmed = " (last passes)" if reached["unconfirmed"] else ""
        return f"> {after}{unconfirmed}" if after is not None else f"?{unconfirmed}"
    return f"({after}, {reached['step']}]" if after is not None else f"≤ {reached['step']}"


def _latent(meeting: dict[str, Any]) -> str:
    last = meeting.get("latent", {}).get("last")
    if last is None or meeting["role"] == "filtered":
        return "–"
    low, high = last["interval"]
    return f"{100 * last['value']:+.0f} ({100 * low:+.0f} to {100 * high:+.0f})"


def _percent(value: float | None) -> str:
    return "missing" if value is None else f"{100 * value:.1f}"


def _end(interval: list[float] | None, place: int) -> float | None:
    return None if interval is None else interval[place]


def _inner(entry: dict[str, Any] | None, name: str) -> Any:
    return None if entry is None else entry[name]
