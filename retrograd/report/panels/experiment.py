"""An experiment: every arm over its seeds with intervals, its controls beside it, and the claims that hold."""

from __future__ import annotations

from typing import Any

from retrograd.evaluate.verdict import counted
from retrograd.report.panel import Content, Source, View
from retrograd.report.subjects import Experiment

__all__ = ["experiment"]

_QUANTITIES = ("forget", "position", "retain", "kl")


def experiment(subject: Experiment, view: View) -> Content | None:
    """The table's arms, from results.parquet, and its words, from results.md; None of a grid, which has none."""
    if subject.grid:
        return None
    import pyarrow.parquet as parquet

    columns = list(subject.spec.get("columns") or [])
    rows = parquet.read_table(subject.folder / "results.parquet").to_pylist()
    arms: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        if row["match"] is None:
            continue  # a model that arms are compared with
        key = (row["match"], row["method"], row["weighting"])
        arm = arms.setdefault(key, {"match": key[0], "method": key[1], "weighting": key[2], "seeds": [], "missing": [],
                                    "metrics": {}, "verdicts": [], "setting": row["setting"],
                                    "chosen": row["chosen"]})  # fmt: skip
        _add(arm, row, columns)
    for arm in arms.values():
        arm["verdicts"] = counted(arm["verdicts"])
    path = subject.folder / "results.md"
    words = path.read_text(encoding="utf8").splitlines() if path.exists() else []
    bullets = [line[2:].replace("**", "") for line in words if line.startswith("* ")]
    claims = [line for line in bullets if "claim:" in line or "better" in line]
    data = {"arms": list(arms.values()), "models": _models(rows), "claims": [view.mask.text(claim) for claim in claims],
            "table": view.mask.text("\n".join(words)), "seeds": subject.spec.get("seeds"),
            "columns": columns}  # fmt: skip
    return Content(data, [Source(subject.folder / "results.parquet", f"retrograd experiment FILE {subject.folder}")])


def _add(arm: dict[str, Any], row: dict[str, Any], columns: list[str]) -> None:
    """A line of the table: of an arm over all seeds, or of one of them."""
    if row["quantity"] in columns:
        estimate = {"value": row["value"], "low": row["low"], "high": row["high"]}
        arm["metrics"][row["quantity"]] = None if row["value"] is None else estimate
        return
    if row["missing"]:
        arm["missing"].append(row["missing"])
    if row["seed"] is None:
        if row["quantity"] in _QUANTITIES and row["value"] is not None:
            arm[row["quantity"]] = {"value": row["value"], "low": row["low"], "high": row["high"]}
    elif row["quantity"] == "seconds":
        arm["seeds"].append(row["seed"])
        arm["verdicts"].append(row["verdict"])


def _models(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What arms are compared with: mean accuracies of the two models."""
    accuracies: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        quantity = row["quantity"] or ""
        if row["match"] is None and quantity.startswith("accuracy ") and row["value"] is not None:
            side = next((side for side in ("forget", "retain") if side in quantity), None)
            if side:
                accuracies.setdefault(row["method"], {}).setdefault(side, []).append(row["value"])
    return [
        {"name": name, **{side: sum(shares) / len(shares) for side, shares in sides.items()}}
        for name, sides in accuracies.items()
    ]
