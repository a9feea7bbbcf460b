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
from retrograd.trust.agreement import Compared, group_name
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
        return float(np.mean([one.pearson for one in self.queries]))

    @property
    def slope(self) -> float:
        return float(np.mean([one.slope for one in self.queries]))


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
    random = [one for one in compared if one.left_out.name.isdecimal() and one.left_out.fraction]
    absent = {(one.fraction, one.weight) for one in missing if one.name.isdecimal()}
    found = []
    for fraction, weight in sorted({(one.left_out.fraction, one.left_out.weight) for one in random} - absent):
        these = [one for one in random if (one.left_out.fraction, one.left_out.weight) == (fraction, weight)]
        measured = np.array([one.measured for one in these])
        each = [_standing(method, these, measured, weights) for method in methods]
        order = sorted(each, key=lambda pair: -pair[0].mean if math.isfinite(pair[0].mean) else math.inf)
        pairs = [_difference(first, second) for first, second in combinations(order, 2)]
        found.append(Group(fraction, weight, len(these), [one for one, _ in order], pairs))
    return found


def predictions(method: Method, sets: Sequence[LeftOut], weights: Tensor, queries: int) -> np.ndarray:
    """What a method predicts for each set and query column, [n, K]."""
    found = np.array([predicted(method.scores, weights, one.places, one.weight).numpy() for one in sets])
    return np.broadcast_to(found, (len(sets), queries))


def _standing(
    method: Method, compared: Sequence[Compared], measured: np.ndarray, weights: Tensor
) -> tuple[Standing, np.ndarray]:
    """Its numbers, and the bootstrap's draws of its mean LDS."""
    prediction = predictions(method, [one.left_out for one in compared], weights, measured.shape[1])
    each = [agreement(prediction[:, k], measured[:, k]) for k in range(measured.shape[1])]
    draws = lds_draws(prediction, measured)
    low, high = _interval(draws)
    return Standing(method.name, each, float(np.mean([one.lds for one in each])), low, high), draws


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
        apart = {one.first: one for one in group.differences if one.second == OWN}
        apart |= {one.second: _turned(one) for one in group.differences if one.first == OWN}
        for one in group.standings:
            other = apart.get(one.method)
            less = "" if other is None else _with_interval(other, "+.3f")
            table.add_row(
                one.method, _with_interval(one, ".3f"), _told(one.pearson, ".3f"), _told(one.slope, ".3g"), less
            )
        console.print(table)
        for one in group.standings:
            if flat := sum(math.isnan(query.lds) for query in one.queries):
                console.print(
                    f"[yellow]{one.method} has no LDS: for {flat} of {len(one.queries)} query columns it predicts the "
                    "same of every set, or nothing changed. Are these the right scores?"
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
    sets = [one.left_out for one in compared]
    for method in methods:
        values = predictions(method, sets, weights, len(names))
        for one, row in zip(compared, values, strict=True):
            for name, expected, measured in zip(names, row, one.measured, strict=True):
                share = f"{one.left_out.fraction:.6g}"
                writer.writerow((one.left_out.name, share, f"{one.left_out.weight:g}", name, method.name,
                                 repr(float(expected)), repr(float(measured))))  # fmt: skip
    write_atomic(run / "methods.csv", lambda t: t.write_text(table.getvalue(), encoding="utf8"))


def record(groups: Sequence[Group], names: Sequence[str]) -> list[dict[str, Any]]:
    """The groups for validation.json."""
    return [
        {
            "fraction": group.fraction, "weight": group.weight, "sets": group.sets,
            "methods": {
                one.method: {
                    "mean_lds": _number(one.mean), "interval": [_number(one.low), _number(one.high)],
                    "pearson": _number(one.pearson), "slope": _number(one.slope),
                    "queries": {
                        name: {key: _number(value) for key, value in found._asdict().items()}
                        for name, found in zip(names, one.queries, strict=True)
                    },
                }
                for one in group.standings
            },
            "differences": [
                {"first": one.first, "second": one.second, "mean": _number(one.mean),
                 "interval": [_number(one.low), _number(one.high)]}
                for one in group.differences
            ],
        }
        for group in groups
    ]  # fmt: skip


def _with_interval(one: Standing | Difference, form: str) -> str:
    if math.isnan(one.mean):
        return "–"
    return f"{one.mean:{form}} [{_told(one.low, form)}, {_told(one.high, form)}]"


def _told(value: float, form: str) -> str:
    return "–" if math.isnan(value) else f"{value:{form}}"


def _turned(one: Difference) -> Difference:
    return Difference(one.second, one.first, -one.mean, -one.high, -one.low)


def _number(value: float | int) -> float | int | None:
    return None if isinstance(value, float) and math.isnan(value) else value
