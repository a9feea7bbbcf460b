"""Top-k filtering as one number: how much more a query's loss rises without the strongest share than a random one.

    QLD = φ(w, 0 on the strongest) − mean_r φ(w, 0 on random set r)          nats, mean over query columns

Each query column has its own strongest set. Random sets have its size; for tokens there are others besides that have
its positions in the row too, since late tokens of a row are better predicted and differ in effect whatever they say.
The interval is of the choice of the random sets: Student's t over them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy import stats

from retrograd.trust.bank import Bank, LeftOut
from retrograd.trust.methods import Method

__all__ = ["Filtered", "Plan", "filtering", "filtering_record", "matched_positions", "show_filtering", "strongest_sets"]


class Plan(NamedTuple):
    """The sets of one method at one share and weight: of each query column the strongest, and those it is held against.

    random: The same R for all columns. matched: R for each column; none where documents are left out.
    """

    method: str
    top: list[LeftOut]
    random: list[LeftOut]
    matched: list[list[LeftOut]]

    @property
    def sets(self) -> list[LeftOut]:
        return [*self.top, *self.random, *(control for controls in self.matched for control in controls)]


class Extra(NamedTuple):
    """What the strongest have over other sets, nats: the mean, its 95 % interval; how many of the sets lie below."""

    others: float
    mean: float
    low: float
    high: float
    below: int
    sets: int


class Filtered(NamedTuple):
    """One method's number. top: the rise of the query loss without the strongest, mean over the columns, nats."""

    method: str
    fraction: float
    weight: float
    left_out: int
    top: float
    random: Extra | None
    matched: Extra | None
    missing: int


def strongest_sets(
    methods: Sequence[Method], units: dict[int, np.ndarray], columns: int, share: float, weight: float, controls: int,
    width: int | None, seed: int,
) -> list[Plan]:  # fmt: skip
    """The sets that filtering at one share needs, method by method.

    Args:
        units: Flat places in the data weights of each document, or of each target token.
        columns: Query columns.
        share: Of the units to leave out.
        weight: What their data weights are multiplied by.
        controls: Random sets.
        width: Tokens in a row where units are tokens; None where they are documents.
    """
    members = np.array(sorted(units))
    size = max(1, round(share * len(members)))
    if size >= len(members):
        raise ValueError(f"--top {share} would leave out all of {len(members)}; give a smaller share")
    random = []
    for number in range(controls):
        drawn = np.sort(np.random.default_rng([seed, 2, number, size]).choice(members, size, replace=False))
        random.append(_set(f"random-{share:g}-{number}", drawn, units, share, weight))
    plans = []
    for method in methods:
        top, matched = [], []
        for k in range(columns):
            scores = method.scores[min(k, len(method.scores) - 1)].flatten().numpy()
            strength = np.array([scores[units[int(unit)]].sum() for unit in members])
            chosen = np.sort(members[np.argsort(strength, kind="stable")[:size]])
            name = f"top-{share:g}-{method.name}" + (f"-{k}" if columns > 1 else "")
            top.append(_set(name, chosen, units, share, weight))
            if width is not None:
                draws = (np.random.default_rng([seed, 3, number, k]) for number in range(controls))
                others = [matched_positions(chosen, members, width, draw)[0] for draw in draws]
                matched.append(
                    [_set(f"{name}-matched-{r}", other, units, share, weight) for r, other in enumerate(others)]
                )
        plans.append(Plan(method.name, top, random, matched))
    return plans


def matched_positions(
    chosen: np.ndarray, members: np.ndarray, width: int, draw: np.random.Generator
) -> tuple[np.ndarray, float]:
    """As many other tokens at the same positions in their rows, ascending; and the share that has the very position.

    Where a position has too few others, the nearest position that has one gives it.

    Args:
        chosen, members: Flat places in [rows, width]; members are all that may be drawn.
    """
    others = np.setdiff1d(members, chosen)
    if len(others) < len(chosen):
        raise ValueError(f"{len(chosen)} of {len(members)} tokens are chosen, so no other {len(chosen)} can match them")
    others = draw.permutation(others)
    pools: dict[int, list[int]] = {}
    for place in others.tolist():
        pools.setdefault(place % width, []).append(place)
    matched, exact, short = [], 0, list[int]()
    for column in (chosen % width).tolist():
        if pools.get(column):
            matched.append(pools[column].pop())
            exact += 1
        else:
            short.append(column)
    for column in short:
        nearest = min((c for c, pool in pools.items() if pool), key=lambda c: (abs(c - column), c))
        matched.append(pools[nearest].pop())
    return np.sort(np.array(matched)), exact / len(chosen)


def filtering(plans: Sequence[Plan], bank: Bank) -> list[Filtered]:
    """The numbers of the plans whose sets are all in the bank; of the others, how many are missing."""
    return [_filtered(plan, bank) for plan in plans]


def _filtered(plan: Plan, bank: Bank) -> Filtered:
    first = plan.top[0]
    about = (plan.method, first.fraction, first.weight, len(first.places))
    lacking = {left_out.key for left_out in plan.sets if left_out.key not in bank.known}
    if lacking:
        return Filtered(*about, math.nan, None, None, len(lacking))
    top = np.array([_change(bank, left_out)[k] for k, left_out in enumerate(plan.top)])
    random = np.array([_change(bank, left_out) for left_out in plan.random])  # [R, K]
    matched = np.array(
        [[_change(bank, left_out)[k] for left_out in controls] for k, controls in enumerate(plan.matched)]
    )  # [K, R]
    return Filtered(*about, float(top.mean()), _extra(top, random), _extra(top, matched.T) if plan.matched else None, 0)


def _change(bank: Bank, left_out: LeftOut) -> np.ndarray:
    known = bank.known[left_out.key]
    return np.subtract(known.values, known.baseline)


def _extra(top: np.ndarray, others: np.ndarray) -> Extra:
    """Of top [K] over others [R, K], columns averaged first."""
    each = (top - others).mean(1)
    reach = float(stats.t.ppf(0.975, len(each) - 1) * each.std(ddof=1) / math.sqrt(len(each)))
    mean = float(each.mean())
    return Extra(float(others.mean()), mean, mean - reach, mean + reach, int((each > 0).sum()), len(each))


def _set(name: str, chosen: np.ndarray, units: dict[int, np.ndarray], share: float, weight: float) -> LeftOut:
    return LeftOut(name, share, np.sort(np.concatenate([units[int(unit)] for unit in chosen])), weight)


def show_filtering(effects: Sequence[Filtered], tokens: bool, console: Console) -> None:
    """A line for each method."""
    if not effects:
        return
    table = Table(
        title=f"The strongest {'tokens (per-token QLD)' if tokens else 'documents (QLD)'}, nats of query loss"
    )
    table.title_justify = "left"
    table.add_column("method", no_wrap=True)
    matched = ("more than the same positions [95 %]",) if tokens else ()
    for name in ("share", "without the strongest", "more than random [95 %]", *matched):
        table.add_column(name, justify="right")
    for effect in effects:
        share = f"{effect.fraction:.3g}" + (f" at {effect.weight:g}" if effect.weight else "")
        if effect.missing:
            table.add_row(effect.method, share, f"incomplete: {effect.missing} sets are missing or diverged")
            continue
        others = [extra for extra in (effect.random, effect.matched) if extra]
        cells = [f"{extra.mean:+.4g} [{extra.low:+.4g}, {extra.high:+.4g}]" for extra in others]
        table.add_row(effect.method, share, f"{effect.top:+.4g}", *cells)
    console.print(table)


def filtering_record(effects: Sequence[Filtered]) -> list[dict[str, Any]]:
    """For validation.json."""
    return [
        {
            "method": effect.method, "fraction": effect.fraction, "weight": effect.weight, "left_out": effect.left_out,
            "missing": effect.missing, "without_the_strongest": None if effect.missing else effect.top,
            **{
                name: {"mean": extra.others, "more": extra.mean, "interval": [extra.low, extra.high],
                       "below": extra.below, "sets": extra.sets}
                for name, extra in (("random", effect.random), ("matched", effect.matched)) if extra is not None
            },
        }
        for effect in effects
    ]  # fmt: skip
