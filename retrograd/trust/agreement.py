"""What a validation says: agreement by fraction and query, its files, its verdict."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from retrograd.runs.files import write_atomic, write_json
from retrograd.trust.bank import LeftOut
from retrograd.trust.left_out import Agreement, agreement, mean_lds

__all__ = ["Compared", "Fraction", "Validation", "group_name", "show", "validation", "write_validation"]

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
    random = [one for one in compared if one.left_out.name.isdecimal()]
    wanted = [one for one in missing if one.name.isdecimal()]
    found = []
    for group in sorted({_group(one.left_out) for one in random} | {_group(one) for one in wanted}):
        absent = sum(_group(one) == group for one in wanted)
        if absent:
            nothing = [Agreement(0, math.nan, math.nan, math.nan)] * len(names)
            found.append(Fraction(group[0], 0, nothing, math.nan, math.nan, math.nan, 0, absent, group[1]))
            continue
        these = [one for one in random if _group(one.left_out) == group]
        different = len({one.left_out.key for one in these})
        prediction, measurement = np.array([one.predicted for one in these]), np.array([one.measured for one in these])
        each = [agreement(prediction[:, k], measurement[:, k]) for k in range(len(names))]
        bad = sum(_group(one) == group for one, _ in failed if one.name.isdecimal())
        found.append(Fraction(group[0], different, each, *mean_lds(prediction, measurement), bad, 0, group[1]))
    return Validation(list(names), list(compared), found, unchanged, list(failed), list(missing))


def group_name(fraction: float, weight: float) -> str:
    """What was done to a group of sets, in words."""
    return f"{fraction:.4g} left out" if not weight else f"{fraction:.4g} at weight {weight:g}"


def _group(one: LeftOut) -> tuple[float, float]:
    return one.fraction, one.weight


def write_validation(run: Path, result: Validation, more: dict[str, Any] | None = None) -> None:
    """validation.csv and validation.json.

    Args:
        more: Further entries of validation.json.
    """
    table = io.StringIO(newline="")
    writer = csv.writer(table)
    writer.writerow(("subset", "fraction", "query", "predicted", "measured", "weight"))
    for one in result.compared:
        for name, predicted, measured in zip(result.names, one.predicted, one.measured, strict=True):
            writer.writerow((one.left_out.name, f"{one.left_out.fraction:.6g}", name, repr(float(predicted)),
                             repr(float(measured)), f"{one.left_out.weight:g}"))  # fmt: skip
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
    empty = [one for one in result.compared if not len(one.left_out.places)]
    for nothing in empty:
        console.print(f"Set {nothing.left_out.name}, empty: measured change {np.abs(nothing.measured).max():.3g} nats.")
    fractions = [one for one in result.fractions if one.fraction]
    whole = [one for one in fractions if not one.missing]
    if whole:
        console.print(_table(result, whole))
    for one in fractions:
        if one.missing:
            console.print(f"{one.told}: {one.verdict}.", style="bold red")
            continue
        interval = "" if math.isnan(one.low) else f" [{one.low:.3f}, {one.high:.3f}]"
        sets = one.queries[0].sets
        few = f" Only {one.different} of the {sets} sets are different: take more." if one.different < sets else ""
        console.print(f"{one.told}: mean LDS {one.mean:.3f}{interval}: {one.verdict}.{few}")
    named = [one for one in result.compared if not one.left_out.name.isdecimal()]
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
    for part in fractions:
        shown = sorted(zip(part.queries, result.names, strict=True), key=lambda pair: pair[0].lds)[:SHOWN]
        for found, name in shown:
            numbers = (f"{found.lds:.3f}", f"{found.pearson:.3f}", f"{found.slope:.3f}")
            table.add_row(part.told, name, str(found.sets), *numbers)
        if len(part.queries) > SHOWN:
            table.add_row(part.told, f"… {len(part.queries) - SHOWN} better ones", "", "", "", "")
    return table


def _named(compared: Sequence[Compared]) -> Table:
    table = Table(title="Named sets, first query, nats", title_justify="left")
    for name in ("set", "predicted", "measured"):
        table.add_column(name, justify="left" if name == "set" else "right")
    for one in compared:
        name = one.left_out.name + (f" at weight {one.left_out.weight:g}" if one.left_out.weight else "")
        table.add_row(name, f"{one.predicted[0]:+.4g}", f"{one.measured[0]:+.4g}")
    return table


def _record(result: Validation) -> dict[str, Any]:
    return {
        "meaning": "Changes of the query loss in nats when a set of training data is left out: predicted −Σ score, "
        "measured by retraining. LDS: their Spearman correlation over random sets; slope: measured by predicted nats.",
        "unchanged_nats": result.unchanged,
        "failed": [
            {"subset": one.name, "fraction": one.fraction, "reason": reason} for one, reason in result.failed
        ],
        "fractions": [
            {
                "fraction": part.fraction, "weight": part.weight, "different_sets": part.different,
                "failed": part.failed, "missing": part.missing,
                "mean_lds": _number(part.mean),
                "interval": [_number(part.low), _number(part.high)], "verdict": part.verdict,
                "queries": {
                    name: {key: _number(value) for key, value in found._asdict().items()}
                    for name, found in zip(result.names, part.queries, strict=True)
                },
            }
            for part in result.fractions
        ],
    }  # fmt: skip


def _number(value: float | int) -> float | int | None:
    """JSON has no NaN."""
    return None if isinstance(value, float) and math.isnan(value) else value
