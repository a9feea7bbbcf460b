"""Methods side by side on one bank: LDS, Pearson, slope, and paired differences over the same sets."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table
from torch import Tensor

from retrograd.runs.files import write_atomic
from retrograd.trust.agreement import Compared, group_name, nan_to_none, query_figures
from retrograd.trust.bank import LeftOut
from retrograd.trust.left_out import Agreement, agreement, lds_draws, predicted
from retrograd.trust.methods import OWN, Method

__all__ = ["Difference", "Group", "Standing", "record", "show_standings", "standings", "write_standings"]


class Standing(NamedTuple):
    """A method over the random sets of one group: of each query, and LDS's mean over them with its 95 % interval."""

    method: str
    queries: list[Agreement]
    mean: float
    low: float
    high: float

    @property
    def pearson(self) -> float:
        return float(np.mean([query.pearson for query in self.queries]))

    @property
    def slope(self) -> float:
        return float(np.mean([query.slope for query in self.queries]))


class Difference(NamedTuple):
    """Mean LDS of the first method minus the second's, with its 95 % interval from the same draws of sets."""

    first: str
    second: str
    mean: float
    low: float
    high: float


class Group(NamedTuple):
    """All methods over the random sets of one fraction and weight, the best first."""

    fraction: float
    weight: float
    sets: int
    standings: list[Standing]
    differences: list[Difference]


def standings(
    methods: Sequence[Method], compared: Sequence[Compared], missing: Sequence[LeftOut], weights: Tensor
) -> list[Group]:
    """Every method at every fraction and weight whose sets are all there.

    Args:
        methods: With the run's own scores among them.
        weights: The run's data weights.
    """
    by_group: dict[tuple[float, float], list[Compared]] = {}
    for comparison in compared:
        if comparison.left_out.random and comparison.left_out.fraction:
            by_group.setdefault(comparison.left_out.group, []).append(comparison)
    groups = []
    for group in sorted(by_group.keys() - {left_out.group for left_out in missing if left_out.random}):
        these = by_group[group]
        measured = np.array([comparison.measured for comparison in these])
        each = [_standing(method, these, measured, weights) for method in methods]
        order = sorted(each, key=lambda pair: -pair[0].mean if math.isfinite(pair[0].mean) else math.inf)
        pairs = [_difference(first, second) for first, second in combinations(order, 2)]
        groups.append(Group(*group, len(these), [standing for standing, _ in order], pairs))
    return groups


def predictions(method: Method, sets: Sequence[LeftOut], weights: Tensor, queries: int) -> np.ndarray:
    """What a method predicts for each set and query column, [n, K]."""
    changes = np.array(
        [predicted(method.scores, weights, left_out.places, left_out.weight).numpy() for left_out in sets]
    )
    return np.broadcast_to(changes, (len(sets), queries))


def _standing(
    method: Method, compared: Sequence[Compared], measured: np.ndarray, weights: Tensor
) -> tuple[Standing, np.ndarray]:
    """Its numbers, and the bootstrap's draws of its mean LDS."""
    prediction = predictions(method, [comparison.left_out for comparison in compared], weights, measured.shape[1])
    each = [agreement(prediction[:, k], measured[:, k]) for k in range(measured.shape[1])]
    draws = lds_draws(prediction, measured)
    low, high = _interval(draws)
    return Standing(method.name, each, float(np.mean([query.lds for query in each])), low, high), draws


def _difference(first: tuple[Standing, np.ndarray], second: tuple[Standing, np.ndarray]) -> Difference:
    (a, draws), (b, others) = first, second
    return Difference(a.method, b.method, a.mean - b.mean, *_interval(draws - others))


def _interval(draws: np.ndarray) -> tuple[float, float]:
    if not np.isfinite(draws).any():
        return math.nan, math.nan
    low, high = np.nanpercentile(draws, [2.5, 97.5])
    return float(low), float(high)


def show_standings(groups: Sequence[Group], console: Console) -> None:
    """A table for each group: every method, and how far it is from the run's own scores."""
    for group in groups:
        title = f"Methods on one bank: {group_name(group.fraction, group.weight)}, {group.sets} sets"
        table = Table(title=title, title_justify="left")
        table.add_column("method", no_wrap=True)
        for name in ("mean LDS [95 %]", "Pearson", "slope", f"minus {OWN} [95 %]"):
            table.add_column(name, justify="right")
        apart = {difference.first: difference for difference in group.differences if difference.second == OWN}
        apart |= {difference.second: _turned(difference) for difference in group.differences if difference.first == OWN}
        for standing in group.standings:
            other = apart.get(standing.method)
            less = "" if other is None else _with_interval(other, "+.3f")
            correlation, slope = _figure(standing.pearson, ".3f"), _figure(standing.slope, ".3g")
            table.add_row(standing.method, _with_interval(standing, ".3f"), correlation, slope, less)
        console.print(table)
        for standing in group.standings:
            if flat := sum(math.isnan(query.lds) for query in standing.queries):
                console.print(
                    f"[yellow]{standing.method} has no LDS: for {flat} of {len(standing.queries)} query columns it "
                    "predicts the same of every set, or nothing changed. Are these the right scores?"
                )
    if groups:
        console.print(
            "Differences are paired: both methods over the same draws of the same sets. A slope is measured nats by "
            "predicted unit of the method: 1 is right for scores in nats alone.",
            style="dim",
        )  # fmt: skip


def write_standings(
    run: Path, methods: Sequence[Method], compared: Sequence[Compared], names: Sequence[str], weights: Tensor
) -> None:
    """methods.csv: a line for each set, query and method."""
    table = io.StringIO(newline="")
    writer = csv.writer(table)
    writer.writerow(("subset", "fraction", "weight", "query", "method", "predicted", "measured"))
    sets = [comparison.left_out for comparison in compared]
    for method in methods:
        changes = predictions(method, sets, weights, len(names))
        for (left_out, _, measured), predicted_by_query in zip(compared, changes, strict=True):
            about = (left_out.name, f"{left_out.fraction:.6g}", f"{left_out.weight:g}")
            for name, *change in zip(names, predicted_by_query, measured, strict=True):
                writer.writerow((*about, name, method.name, *(repr(float(nats)) for nats in change)))
    write_atomic(run / "methods.csv", lambda t: t.write_text(table.getvalue(), encoding="utf8"))


def record(groups: Sequence[Group], names: Sequence[str]) -> list[dict[str, Any]]:
    """The groups for validation.json."""
    return [
        {
            "fraction": group.fraction, "weight": group.weight, "sets": group.sets,
            "methods": {
                standing.method: {
                    **_mean_and_interval(standing, "mean_lds"),
                    "pearson": nan_to_none(standing.pearson), "slope": nan_to_none(standing.slope),
                    "queries": query_figures(names, standing.queries),
                }
                for standing in group.standings
            },
            "differences": [
                {"first": difference.first, "second": difference.second, **_mean_and_interval(difference, "mean")}
                for difference in group.differences
            ],
        }
        for group in groups
    ]  # fmt: skip


def _with_interval(estimate: Standing | Difference, form: str) -> str:
    if math.isnan(estimate.mean):
        return "–"
    return f"{estimate.mean:{form}} [{_figure(estimate.low, form)}, {_figure(estimate.high, form)}]"


def _figure(value: float, form: str) -> str:
    return "–" if math.isnan(value) else f"{value:{form}}"


def _turned(difference: Difference) -> Difference:
    return Difference(difference.second, difference.first, -difference.mean, -difference.high, -difference.low)


def _mean_and_interval(estimate: Standing | Difference, mean: str) -> dict[str, Any]:
    return {mean: nan_to_none(estimate.mean), "interval": [nan_to_none(estimate.low), nan_to_none(estimate.high)]}
