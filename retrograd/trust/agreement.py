"""What a validation says: agreement by fraction and query, its files, its verdict."""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from retrograd.runs.files import write_atomic, write_json
from retrograd.trust.bank import LeftOut
from retrograd.trust.left_out import Agreement, agreement, mean_lds

__all__ = [
    "Compared",
    "Fraction",
    "Validation",
    "group_name",
    "nan_to_none",
    "query_figures",
    "show",
    "validation",
    "write_validation",
]

GRADE = 0.95  # LDS that MAGIC reaches where training is smooth
SHOWN = 12


class Compared(NamedTuple):
    """A set with the changes of the query values, [K] nats: as predicted, as measured."""

    left_out: LeftOut
    predicted: np.ndarray
    measured: np.ndarray


class Fraction(NamedTuple):
    """Agreement over the random sets of one fraction: for each query, and the mean LDS with its 95 % interval.

    different: how many of the sets are, for a few documents have few subsets.
    failed: retrainings of the fraction that diverged; the numbers are of the rest.
    missing: sets of the fraction that are not in the bank yet; there are no numbers then.
    weight: what the sets' data weights were multiplied by.
    """

    fraction: float
    different: int
    queries: list[Agreement]
    mean: float
    low: float
    high: float
    failed: int = 0
    missing: int = 0
    weight: float = 0.0

    @property
    def told(self) -> str:
        """The group in words."""
        return group_name(self.fraction, self.weight)

    @property
    def verdict(self) -> str:
        """In plain words."""
        if self.missing:
            return f"incomplete: {self.missing} sets are not in the bank yet, and until they are there is no number"
        if self.failed:
            return f"not validated: {self.failed} more retrainings diverged, and the numbers are of the rest"
        if math.isnan(self.low):
            return "too few sets, or no change at all: nothing can be said"
        if self.low <= 0:
            return "not validated: the interval is not above 0"
        return "validated" if self.mean >= GRADE else f"validated, below the {GRADE} of a smooth training"


class Validation(NamedTuple):
    """A whole validation. unchanged: max difference of query values in nats when retrained with everything.

    failed: the sets without which training diverged, and why.
    missing: the sets that are not in the bank.
    """

    names: list[str]
    compared: list[Compared]
    fractions: list[Fraction]
    unchanged: float | None
    failed: list[tuple[LeftOut, str]]
    missing: Sequence[LeftOut] = ()


def validation(
    compared: Sequence[Compared],
    names: Sequence[str],
    unchanged: float | None,
    failed: Sequence[tuple[LeftOut, str]] = (),
    missing: Sequence[LeftOut] = (),
) -> Validation:
    """Agreement by fraction, over the random sets that could be measured; no number where some are missing."""
    by_group: dict[tuple[float, float], list[Compared]] = {}
    for comparison in compared:
        if comparison.left_out.random:
            by_group.setdefault(comparison.left_out.group, []).append(comparison)
    lacking = Counter(left_out.group for left_out in missing if left_out.random)
    diverged = Counter(left_out.group for left_out, _ in failed if left_out.random)
    fractions = []
    for group in sorted(by_group.keys() | lacking.keys()):
        absent = lacking[group]
        if absent:
            nothing = [Agreement(0, math.nan, math.nan, math.nan)] * len(names)
            fractions.append(Fraction(group[0], 0, nothing, math.nan, math.nan, math.nan, 0, absent, group[1]))
            continue
        sets, predicted, measured = zip(*by_group[group], strict=True)
        different = len({left_out.key for left_out in sets})
        prediction, measurement = np.array(predicted), np.array(measured)
        each = [agreement(prediction[:, k], measurement[:, k]) for k in range(len(names))]
        mean = mean_lds(prediction, measurement)
        fractions.append(Fraction(group[0], different, each, *mean, diverged[group], 0, group[1]))
    return Validation(list(names), list(compared), fractions, unchanged, list(failed), list(missing))


def group_name(fraction: float, weight: float) -> str:
    """What was done to a group of sets, in words."""
    return f"{fraction:.4g} left out" if not weight else f"{fraction:.4g} at weight {weight:g}"


def write_validation(run: Path, result: Validation, more: dict[str, Any] | None = None) -> None:
    """validation.csv and validation.json.

    Args:
        more: Further entries of validation.json.
    """
    table = io.StringIO(newline="")
    writer = csv.writer(table)
    writer.writerow(("subset", "fraction", "query", "predicted", "measured", "weight"))
    for left_out, *changes in result.compared:
        for name, predicted, measured in zip(result.names, *changes, strict=True):
            writer.writerow((left_out.name, f"{left_out.fraction:.6g}", name, repr(float(predicted)),
                             repr(float(measured)), f"{left_out.weight:g}"))  # fmt: skip
    write_atomic(run / "validation.csv", lambda t: t.write_text(table.getvalue(), encoding="utf8"))
    write_json(run / "validation.json", {**_record(result), **(more or {})})


def show(result: Validation, wanted: int, run: Path, console: Console) -> Validation:
    """Print the agreement and the verdicts."""
    done, bad = len(result.compared), result.failed
    left = wanted - done - len(bad)
    rest = f"; {left} of {wanted} are still to do" if left else ""
    console.print(f"Retrained without {done} sets{rest}.")
    if bad:
        console.print(f"FAILED: {len(bad)} of {done + len(bad)} retrainings diverged:", style="bold red")
    for left_out, reason in bad[:SHOWN]:
        console.print(f"  without set {left_out.name} ({left_out.fraction:.4g}): {reason}", markup=False)
    if result.unchanged is not None:
        same = "exactly 0" if result.unchanged == 0 else f"{result.unchanged:.2g} nats (other threads round otherwise)"
        console.print(f"With nothing left out, retraining differs from the run by {same}.")
    empty = [comparison for comparison in result.compared if not len(comparison.left_out.places)]
    for nothing in empty:
        console.print(f"Set {nothing.left_out.name}, empty: measured change {np.abs(nothing.measured).max():.3g} nats.")
    fractions = [fraction for fraction in result.fractions if fraction.fraction]
    whole = [fraction for fraction in fractions if not fraction.missing]
    if whole:
        console.print(_table(result, whole))
    for fraction in fractions:
        if fraction.missing:
            console.print(f"{fraction.told}: {fraction.verdict}.", style="bold red")
            continue
        interval = "" if math.isnan(fraction.low) else f" [{fraction.low:.3f}, {fraction.high:.3f}]"
        sets = fraction.queries[0].sets
        few = (
            f" Only {fraction.different} of the {sets} sets are different: take more."
            if fraction.different < sets
            else ""
        )
        console.print(f"{fraction.told}: mean LDS {fraction.mean:.3f}{interval}: {fraction.verdict}.{few}")
    named = [comparison for comparison in result.compared if not comparison.left_out.random]
    if named:
        console.print(_named(named))
    console.print(
        "Predicted: Σ (weight − 1)·score, which is −Σ score for a set left out. Positive: the query loss is higher.",
        style="dim",
    )
    console.print(f"Every set: {run / 'validation.csv'}", highlight=False)
    return result


def _table(result: Validation, fractions: Sequence[Fraction]) -> Table:
    table = Table(title="Predicted against measured, over random sets", title_justify="left")
    for name in ("share", "query", "sets", "LDS", "Pearson", "slope"):
        table.add_column(name, justify="left" if name == "query" else "right")
    for fraction in fractions:
        shown = sorted(zip(fraction.queries, result.names, strict=True), key=lambda pair: pair[0].lds)[:SHOWN]
        for query, name in shown:
            numbers = (f"{query.lds:.3f}", f"{query.pearson:.3f}", f"{query.slope:.3f}")
            table.add_row(fraction.told, name, str(query.sets), *numbers)
        if len(fraction.queries) > SHOWN:
            table.add_row(fraction.told, f"… {len(fraction.queries) - SHOWN} better ones", "", "", "", "")
    return table


def _named(compared: Sequence[Compared]) -> Table:
    table = Table(title="Named sets, first query, nats", title_justify="left")
    for name in ("set", "predicted", "measured"):
        table.add_column(name, justify="left" if name == "set" else "right")
    for left_out, predicted, measured in compared:
        name = left_out.name + (f" at weight {left_out.weight:g}" if left_out.weight else "")
        table.add_row(name, f"{predicted[0]:+.4g}", f"{measured[0]:+.4g}")
    return table


def _record(result: Validation) -> dict[str, Any]:
    return {
        "meaning": "Changes of the query loss in nats when a set of training data is left out: predicted −Σ score, "
        "measured by retraining. LDS: their Spearman correlation over random sets; slope: measured by predicted nats.",
        "unchanged_nats": result.unchanged,
        "failed": [
            {"subset": left_out.name, "fraction": left_out.fraction, "reason": reason}
            for left_out, reason in result.failed
        ],
        "fractions": [
            {
                "fraction": fraction.fraction, "weight": fraction.weight, "different_sets": fraction.different,
                "failed": fraction.failed, "missing": fraction.missing,
                "mean_lds": nan_to_none(fraction.mean),
                "interval": [nan_to_none(fraction.low), nan_to_none(fraction.high)], "verdict": fraction.verdict,
                "queries": query_figures(result.names, fraction.queries),
            }
            for fraction in result.fractions
        ],
    }  # fmt: skip


def query_figures(names: Sequence[str], queries: Sequence[Agreement]) -> dict[str, dict[str, float | None]]:
    """Each query's agreement, for a JSON file."""
    return {
        name: {key: nan_to_none(figure) for key, figure in query._asdict().items()}
        for name, query in zip(names, queries, strict=True)
    }


def nan_to_none(figure: float) -> float | None:
    """JSON has no NaN."""
    return None if isinstance(figure, float) and math.isnan(figure) else figure
