"""A grid of recipes: each attributed, its metasmoothness measured and its scores held against retraining; one table.

A cell is one task: a run of `magic`, of `metasmoothness` and of `validate` in one folder, which is left without its
states. What the cells have in common is not shared: another learning rate is another training.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from scipy.stats import spearmanr

from retrograd.durable import remove
from retrograd.evaluate.answers import write_table
from retrograd.evaluate.folder import content
from retrograd.experiment.lease import Queue
from retrograd.experiment.tasks import Task, merged, named, nested
from retrograd.runs.files import write_atomic
from retrograd.settings.commands import MetasmoothnessConfig, ValidateConfig
from retrograd.settings.grid import GridSpec
from retrograd.settings.parse import build
from retrograd.settings.run import MagicConfig, check, queries_of, to_dict
from retrograd.trust.metasmoothness import metasmoothness
from retrograd.trust.validate import validate

__all__ = ["GridMaker", "attribute", "write_grid"]

NUMBERS = ("smoothness", "lds", "low", "high", "pearson", "query", "failed", "seconds")
"""Of a cell: metasmoothness; mean LDS over the queries with its 95 % interval; mean Pearson; mean query loss in nats;
retrainings that diverged; seconds."""


class GridMaker:
    """Makes the tasks of a grid, one for each combination of its axes' values."""

    def __init__(self, spec: GridSpec) -> None:
        self.spec = spec
        known: dict[str, str | None] = {}
        points = itertools.product(*spec.grid.values())
        self.cells = {point: self._cell(dict(zip(spec.grid, point)), known) for point in points}

    def _cell(self, point: Mapping[str, Any], known: dict[str, str | None]) -> Task:
        where = ", ".join(f"{name} {value}" for name, value in point.items())
        settings = merged(self.spec.settings, *(nested(name, value) for name, value in point.items()))
        config: MagicConfig = build(MagicConfig, settings, where)
        check(config)
        if any(query.function for query in queries_of(config).values()):
            raise ValueError(f"{where}: a query names a function, which no file may run; run `retrograd magic` by hand")
        read = [config.model, str(config.data.dataset), *(str(q.dataset) for q in queries_of(config).values())]
        for source in read:
            known.setdefault(source, content(source))
        what = {"settings": to_dict(config), "subsets": self.spec.subsets, "fraction": self.spec.fraction,
                "h": self.spec.h}  # fmt: skip
        label = "_".join(f"{name.rpartition('.')[2]}-{value}" for name, value in point.items())
        contents = {source: known[source] for source in sorted(set(read))}
        return named("attribute", label.replace("/", "-"), (), what, contents, self.spec.threads)


def attribute(task: Task, run: Path, magic: Callable[[MagicConfig, Console], Any], console: Console) -> dict[str, Any]:
    """Carry out a cell, or go on with it; returns its numbers, None where one could not be had."""
    what = task.what
    config = dataclasses.replace(build(MagicConfig, what["settings"], task.name), run=run)
    outcome = magic(config, console)
    given = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    smooth = metasmoothness(MetasmoothnessConfig(**given, h=what["h"]), console)
    validated = validate(
        ValidateConfig(run=run, subsets=what["subsets"], fraction=(what["fraction"],), workers=1), console
    )
    assert validated is not None, "this is the only rank"
    agreed = validated.fractions[0]
    numbers = {
        "smoothness": smooth.value, "lds": agreed.mean, "low": agreed.low, "high": agreed.high,
        "pearson": float(np.mean([query.pearson for query in agreed.queries])), "query": float(outcome.values.mean()),
        "failed": agreed.failed,
    }  # fmt: skip
    remove(run / "checkpoints")
    return {name: value if math.isfinite(value) else None for name, value in numbers.items()}


def write_grid(maker: GridMaker, queue: Queue, lost: Mapping[str, str], out: Path, title: str) -> str:
    """Write results.parquet and results.md, of what is there; returns the Markdown."""
    axes = list(maker.spec.grid)
    rows = [{**dict(zip(axes, point)), **_numbers(queue, task, lost)} for point, task in maker.cells.items()]
    text = "\n".join(_markdown(maker.spec, rows, title)) + "\n"
    write_atomic(out / "results.md", lambda temporary: temporary.write_text(text, encoding="utf8"))
    columns = {name: [row[name] for row in rows] for name in (*NUMBERS, "missing")}
    places = [json.dumps({name: row[name] for name in axes}) for row in rows]
    write_table(out / "results.parquet", {"cell": places, **columns}, _types(), {"kind": "Grid", "title": title})
    return text


def _numbers(queue: Queue, task: Task, lost: Mapping[str, str]) -> dict[str, Any]:
    done = queue.result(task.name) or {}
    missing = None if done else lost.get(task.name, "not done yet")
    return {**{name: done.get(name) for name in NUMBERS}, "missing": missing}


def _types() -> dict[str, Any]:
    import pyarrow

    return {**dict.fromkeys(NUMBERS, pyarrow.float64()), "missing": pyarrow.string()}


def _markdown(spec: GridSpec, rows: list[dict[str, Any]], title: str) -> list[str]:
    axes = list(spec.grid)
    about = (
        f"LDS over {spec.subsets} retrainings without {spec.fraction:.3g} of the documents, 95 % interval in brackets."
    )
    lines = [f"# {title}", "", f"{len(rows)} recipes; {about}", ""]
    pairs = [(row["smoothness"], row["lds"]) for row in rows if None not in (row["smoothness"], row["lds"])]
    if len(pairs) >= 4:
        ranked = float(spearmanr(*zip(*pairs)).statistic)
        lines += [f"* Metasmoothness ranks the LDS of these recipes with a Spearman correlation of {ranked:.2f}.", ""]
    lines += [f"| {' | '.join(axes)} | metasmoothness | LDS | Pearson | query loss, nats |",
              "|" + "---|" * (len(axes) + 4)]  # fmt: skip
    for row in rows:
        recipe = " | ".join(str(row[name]) for name in axes)
        lines.append(f"| {recipe} | {row['missing']} | | | |" if row["missing"] else f"| {recipe} | {_figures(row)} |")
    return lines


def _figures(row: Mapping[str, Any]) -> str:
    def number(name: str, digits: int) -> str:
        return "none" if row[name] is None else f"{row[name]:.{digits}f}"

    diverged = f" ({row['failed']:.0f} diverged)" if row["failed"] else ""
    interval = f" [{number('low', 2)}, {number('high', 2)}]"
    parts = (number("smoothness", 3), number("lds", 3) + interval + diverged, number("pearson", 3), number("query", 4))
    return " | ".join(parts)
