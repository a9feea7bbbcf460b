"""A grid of recipes: metasmoothness and LDS of each, by the settings that vary."""

from __future__ import annotations

import json
from typing import Any

from retrograd.report.panel import Content, Source, View
from retrograd.report.subjects import Experiment

__all__ = ["grid"]


def grid(subject: Experiment, view: View) -> Content | None:
    """The cells of results.parquet; None of an experiment with arms."""
    if not subject.grid:
        return None
    import pyarrow.parquet as parquet

    rows = parquet.read_table(subject.folder / "results.parquet").to_pylist()
    cells = [{**row, "place": json.loads(row.pop("cell"))} for row in rows]
    axes: dict[str, list[Any]] = {name: list(values) for name, values in subject.spec["grid"].items()}
    words = (subject.folder / "results.md").read_text(encoding="utf8").splitlines()
    bullets = [view.mask.text(line[2:]) for line in words if line.startswith("* ")]
    data = {"axes": axes, "cells": cells, "told": bullets, "subsets": subject.spec["subsets"],
            "fraction": subject.spec["fraction"]}  # fmt: skip
    return Content(data, [Source(subject.folder / "results.parquet", f"retrograd experiment FILE {subject.folder}")])
