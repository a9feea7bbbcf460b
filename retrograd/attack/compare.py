"""Unlearned models held against each other under the same attacks.

    after       forget accuracy at the attack's step that is the worst for the model while general ability holds; chosen
                on half of the questions, told on the other half
    cell        a group of models, which differ by seed, under an attack: `after` and latent recovery, meaned over
                models, seeds of the attack and questions
    pair        two groups under the same attack: the difference of their cells; and meaned over all attacks
    latent      latent recovery of a group, meaned over the attacks that show half of the facts
    front       groups that no other one beats in forget accuracy (lower) and general ability (higher) at once, before
                attacks and after the worst of them, which is chosen on the first half and told on the other
    rank        1 for the lowest `after` under an attack; its mean over attacks, of the groups that no attack has cost
                their general ability

Intervals draw models, seeds of the attack and clusters of questions again, all of them (`evaluate/crossed.py`), and for
ranks the attacks too: for questions are the same under every seed, neither are independent of the other.

Attacks that take the model before unlearning, and those that do not bring back a model known to be shallow, do not
count.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from retrograd.attack.behind import half_unseen, masks, run_behind
from retrograd.attack.faced import Faced
from retrograd.attack.recovery import means, selected
from retrograd.evaluate.crossed import clustered, crossed, crossed_difference, drawn_counts
from retrograd.evaluate.intervals import Estimate

__all__ = ["compared", "front"]

RESAMPLES = 2000


class _After(NamedTuple):
    """The worst step for a model, the other half's answers there, [n/2], and which questions they are, [n]; chosen:
    accuracy there on the half that it was chosen by."""

    step: int
    right: np.ndarray
    reported: np.ndarray
    retain: float
    chosen: float


class _Cell(NamedTuple):
    """A group under an attack. models, seeds: all of which met; right: [models, seeds, clusters], with their sizes.

    lost: Models that have no step with general ability; the others are here.
    rise: [models, seeds, clusters] with sizes, of all models, where the attack leaves something unseen.
    """

    group: str
    attack: str
    models: list[str]
    seeds: list[int]
    lost: int
    ends: list[list[_After]]
    right: np.ndarray
    sizes: np.ndarray
    rise: tuple[np.ndarray, np.ndarray] | None


def compared(faced: Sequence[Faced]) -> dict[str, Any]:
    """The comparison, as plain values."""
    labels, attacks = _labels(faced), _attacks(faced)
    grouped: dict[tuple[str, str], list[Faced]] = {}
    for meeting in faced:
        if meeting.valid is not False or attacks[meeting.attack]["valid"] is False:
            for group in meeting.groups:
                grouped.setdefault((group, meeting.attack), []).append(meeting)
    ends = {(meeting.model, meeting.configuration): _after(meeting) for meeting in faced}
    cells = {key: _cell(*key, met, ends) for key, met in grouped.items()}
    counted = {key: cell for key, cell in cells.items() if attacks[key[1]]["counts"]}
    role = {group: meeting.role for meeting in faced for group in meeting.groups}
    return {
        "groups": {group: {"label": labels[group], "role": role[group],
                           "models": sorted({meeting.model for meeting in faced if group in meeting.groups})}
                   for group in labels},
        "attacks": attacks,
        "questions": masks(faced, next((end.reported for end in ends.values() if end is not None), None)),
        "table": [_row(meeting, ends[meeting.model, meeting.configuration]) for meeting in faced],
        "cells": [_entry_of(cell, grouped[key], ends) for key, cell in cells.items()],
        "pairs": list(_pairs(counted, role)),
        "fronts": _fronts(grouped, counted),
        "latent": {group: _listed(_latent(group, counted)) for group in labels if role[group] != "filtered"},
        **_ranks({key: cell for key, cell in counted.items() if role[key[0]] == "model"}),
    }  # fmt: skip


def front(points: dict[str, tuple[float, float]]) -> list[str]:
    """Names of the points (forget, retain) that no other beats: none has less or equal forget and more or equal retain.

    >>> front({"a": (0.3, 0.9), "b": (0.4, 0.8), "c": (0.5, 0.95)})
    ['a', 'c']
    """

    def beaten(point: tuple[float, float]) -> bool:
        return any(other != point and other[0] <= point[0] and other[1] >= point[1] for other in points.values())

    return [name for name, point in points.items() if not beaten(point)]


def _labels(faced: Sequence[Faced]) -> dict[str, str]:
    """A name for each group: its method where that tells it from the others."""
    method = {group: meeting.method or group for meeting in faced for group in meeting.groups}
    labels = {}
    for meeting in faced:
        for group in meeting.groups:
            alone = list(method.values()).count(method[group]) == 1 and meeting.role == "model" and " × " not in group
            labels[group] = method[group] if alone else group
    return labels


def _attacks(faced: Sequence[Faced]) -> dict[str, dict[str, Any]]:
    """Every attack with its seeds; valid: whether one of them brings back the shallow model; null where not known."""
    attacks: dict[str, dict[str, Any]] = {}
    readable = {meeting.attack: meeting.readable for meeting in faced}
    for meeting in faced:
        twice = list(readable.values()).count(meeting.readable) > 1
        known = attacks.setdefault(meeting.attack, {
            "readable": meeting.attack if twice else meeting.readable, "probe": meeting.probe,
            "unseen": half_unseen(meeting), "of_seeds": {},
        })  # fmt: skip
        known["of_seeds"][meeting.seed] = meeting.valid
    for known in attacks.values():
        by = list(known.pop("of_seeds").items())
        valid = [ok for _, ok in by]
        known |= {"seeds": sorted(seed for seed, _ in by), "invalid_seeds": sorted(s for s, ok in by if ok is False)}
        known["valid"] = False if all(ok is False for ok in valid) else True if True in valid else None
        known["counts"] = not known["probe"] and known["valid"] is not False
    return attacks


def _after(meeting: Faced) -> _After | None:
    course = meeting.course
    kept = [place for place, value in enumerate(means(course.retain)) if value >= meeting.least - 1e-9]
    chosen = selected([course.forget[place] for place in kept], course.clusters)
    if chosen is None:
        return None
    place, reported = kept[chosen[0]], chosen[1]
    right = course.forget[place]
    return _After(course.steps[place], right[reported], reported, float(course.retain[place].mean()),
                  float(right[~reported].mean()))  # fmt: skip


def _cell(group: str, attack: str, met: list[Faced], ends: dict[tuple[str, str], _After | None]) -> _Cell:
    known = [(meeting, ends[meeting.model, meeting.configuration]) for meeting in met]
    there = {(meeting.model, meeting.seed): end for meeting, end in known if end}
    lost = len({meeting.model for meeting in met} - {model for model, _ in there})
    models, seeds = _grid(list(there))
    rise = _rises(met)
    if not models:
        return _Cell(group, attack, [], [], lost, [], np.zeros((0, 0, 0)), np.zeros(0), rise)
    chosen = [[there[model, seed] for seed in seeds] for model in models]
    reported = chosen[0][0].reported
    assert all((end.reported == reported).all() for row in chosen for end in row), "the halves are drawn alike"
    right = np.array([[end.right for end in row] for row in chosen])
    means, sizes = clustered(right, met[0].course.clusters[reported])
    return _Cell(group, attack, models, seeds, lost, chosen, means, sizes, rise)


def _grid(met: list[tuple[str, int]]) -> tuple[list[str], list[int]]:
    """The models, and the seeds that all of them have met: a whole grid."""
    models = list(dict.fromkeys(model for model, _ in met))
    every = [{seed for model, seed in met if model == name} for name in models]
    seeds = sorted(set.intersection(*every)) if every else []
    return (models, seeds) if seeds else ([], [])


def _rises(met: list[Faced]) -> tuple[np.ndarray, np.ndarray] | None:
    rises = {(meeting.model, meeting.seed): meeting.rise for meeting in met if meeting.rise is not None}
    models, seeds = _grid(list(rises))
    if not models:
        return None
    values = np.array([[rises[model, seed].values for seed in seeds] for model in models])
    return clustered(values, rises[models[0], seeds[0]].clusters)


def _row(meeting: Faced, after: _After | None) -> dict[str, Any]:
    """One model under one configuration."""
    return {
        "model": meeting.model, "method": meeting.method, "role": meeting.role, "attack": meeting.readable,
        "seed": meeting.seed, "valid": meeting.valid, "probe": meeting.probe,
        "before": float(meeting.course.forget[0].mean()),
        "retain_before": float(meeting.course.retain[0].mean()), "after": after and float(after.right.mean()),
        "step": after and after.step, "retain_after": after and after.retain,
        "latent": None if meeting.rise is None else float(meeting.rise.values.mean()),
    }  # fmt: skip


def _entry_of(cell: _Cell, met: list[Faced], ends: dict[tuple[str, str], _After | None]) -> dict[str, Any]:
    every = [end for row in cell.ends for end in row]
    known = [(meeting, ends[meeting.model, meeting.configuration]) for meeting in met]
    reached = [meeting.reached for meeting in met if meeting.reached is not None and meeting.model in cell.models]
    rise = None if cell.rise is None or met[0].role == "filtered" else crossed(*cell.rise, resamples=RESAMPLES)
    return {
        "group": cell.group, "attack": cell.attack, "models": len(cell.models), "seeds": cell.seeds, "lost": cell.lost,
        "after": _listed(crossed(cell.right, cell.sizes, resamples=RESAMPLES) if every else None),
        "steps": [end.step for end in every],
        "retain_after": float(np.mean([end.retain for end in every])) if every else None,
        "latent": _listed(rise), "half_back": [recovery["step"] for recovery in reached],
        "runs": [run_behind(meeting, end and end.step) for meeting, end in known],
    }  # fmt: skip


def _pairs(cells: dict[tuple[str, str], _Cell], role: dict[str, str]) -> Any:
    """Every two groups under every attack that both met, and meaned over all (attack null): the second minus the
    first."""
    groups = [group for group in dict.fromkeys(group for group, _ in cells) if role[group] in ("model", "filtered")]
    attacks = list(dict.fromkeys(attack for _, attack in cells))
    for first, second in itertools.combinations(groups, 2):
        met = {attack: pair for attack in attacks
               if (pair := _on_same_seeds(cells.get((first, attack)), cells.get((second, attack))))}  # fmt: skip
        of_each: list[tuple[str | None, _Pair, int]] = [(attack, pair, 1) for attack, pair in met.items()]
        if whole := _over_attacks(list(met.values())):
            of_each.append((None, whole, len(met)))
        for attack, (a, b, sizes), count in of_each:
            difference = crossed_difference(a, b, sizes, resamples=RESAMPLES)
            yield {"attack": attack, "first": first, "second": second, "difference": difference.value,
                   "interval": [difference.low, difference.high], "attacks": count}  # fmt: skip


_Pair = tuple[np.ndarray, np.ndarray, np.ndarray]


def _on_same_seeds(first: _Cell | None, second: _Cell | None) -> _Pair | None:
    """Right or not of two groups under the seeds that both met, [models, seeds, clusters] each, and clusters' sizes."""
    if first is None or second is None or not (seeds := sorted(set(first.seeds) & set(second.seeds))):
        return None
    a, b = (cell.right[:, [cell.seeds.index(seed) for seed in seeds]] for cell in (first, second))
    return a, b, first.sizes


def _over_attacks(pairs: list[_Pair]) -> _Pair | None:
    """Meaned over attacks; None where their models or seeds differ, or there is only one."""
    if len(pairs) < 2 or len({(a.shape, b.shape) for a, b, _ in pairs}) > 1:
        return None
    return np.mean([a for a, _, _ in pairs], 0), np.mean([b for _, b, _ in pairs], 0), pairs[0][2]


def _latent(group: str, cells: dict[tuple[str, str], _Cell]) -> Estimate | None:
    """Over the attacks that show half of the facts: those that leave the fewest clusters unseen."""
    own = [cell.rise for (other, _), cell in cells.items() if other == group and cell.rise is not None]
    fewest = min((len(sizes) for _, sizes in own), default=0)
    half = [rise for rise, sizes in own if len(sizes) == fewest]
    half = [rise for rise in half if len(rise) == max(map(len, half))]  # while others have not met all models
    if not half or len({rise.shape for rise in half}) > 1:
        return None
    return crossed(np.mean(half, 0), next(s for _, s in own if len(s) == fewest), resamples=RESAMPLES)


def _fronts(grouped: dict[tuple[str, str], list[Faced]], cells: dict[tuple[str, str], _Cell]) -> dict[str, Any]:
    """Forget and retain of every group before attacks and after its worst one, and which groups are on the front."""
    before: dict[str, dict[str, Any]] = {}
    for group in dict.fromkeys(group for group, _ in grouped):
        own_meetings = [meeting for (other, _), met in grouped.items() if other == group for meeting in met]
        starts = list({meeting.model: meeting.course for meeting in own_meetings}.values())
        forget = clustered(np.array([course.forget[0] for course in starts]), starts[0].clusters)
        retain = np.array([course.retain[0] for course in starts])
        before[group] = {"forget": _listed(crossed(*forget, resamples=RESAMPLES)), "attack": None,
                         "retain": _listed(crossed(retain, resamples=RESAMPLES))}  # fmt: skip
    after: dict[str, dict[str, Any]] = {}
    for group in before:
        own = [cell for (other, _), cell in cells.items() if other == group and cell.models]
        if own:
            worst = max(own, key=lambda cell: float(np.mean([end.chosen for row in cell.ends for end in row])))
            retain_after = float(np.mean([end.retain for row in worst.ends for end in row]))
            after[group] = {"forget": _listed(crossed(worst.right, worst.sizes, resamples=RESAMPLES)),
                            "retain": [retain_after, None, None], "attack": worst.attack}  # fmt: skip
    return {name: {"points": points, "front": front({group: (point["forget"][0], point["retain"][0])
                                                     for group, point in points.items()})}
            for name, points in (("before", before), ("after", after))}  # fmt: skip


def _ranks(cells: dict[tuple[str, str], _Cell]) -> dict[str, Any]:
    """Mean rank by group over the attacks that all of them met."""
    every = list(dict.fromkeys(group for group, _ in cells))
    lost = {group for (group, _), cell in cells.items() if not cell.models}
    groups = [group for group in every if group not in lost]
    attacks = [attack for attack in dict.fromkeys(attack for _, attack in cells)
               if all((group, attack) in cells for group in groups)]  # fmt: skip
    if not groups or not attacks:
        return {"ranks": {}, "unranked": sorted(lost)}
    count = min(len(cells[group, attack].seeds) for group in groups for attack in attacks)
    sizes = cells[groups[0], attacks[0]].sizes
    right = {group: [cells[group, attack].right[:, :count] for attack in attacks] for group in groups}
    draw = np.random.default_rng(0)
    of_attacks, of_seeds, of_clusters = (drawn_counts(draw, RESAMPLES, n) for n in (len(attacks), count, len(sizes)))
    once, all_clusters = np.ones((1, count)), np.ones((1, len(sizes)))
    whole, drawn = [], []  # by group: of each attack's accuracies a, [models, seeds, clusters]
    for group in groups:
        of_models = [drawn_counts(draw, RESAMPLES, n) for n in {len(a) for a in right[group]}]
        by_size = {axis.shape[1]: axis for axis in of_models}
        whole.append([_meaned(a, np.ones((1, len(a))), once, all_clusters, sizes) for a in right[group]])
        drawn.append([_meaned(a, by_size[len(a)], of_seeds, of_clusters, sizes) for a in right[group]])
    value = _ranked(np.array(whole)).mean(1)[:, 0]
    ranks = (_ranked(np.array(drawn)) * of_attacks.T).sum(1) / of_attacks.sum(1)  # [groups, resamples]
    low, high = np.quantile(ranks, [0.025, 0.975], axis=1)
    return {"ranks": {group: {"rank": float(value[k]), "interval": [float(low[k]), float(high[k])],
                              "models": max(len(a) for a in right[group]), "attacks": len(attacks), "seeds": count}
                      for k, group in enumerate(groups)}, "unranked": sorted(lost)}  # fmt: skip


def _meaned(
    right: np.ndarray, models: np.ndarray, seeds: np.ndarray, clusters: np.ndarray, sizes: np.ndarray
) -> np.ndarray:
    """Means of [models, seeds, clusters] under counts of each, [resamples]."""
    drawn = clusters * sizes
    of_runs = np.einsum("rc,msc->rms", drawn, right) / drawn.sum(1)[:, None, None]
    return np.einsum("rms,rm,rs->r", of_runs, models, seeds) / (models.sum(1) * seeds.sum(1))


def _ranked(values: np.ndarray) -> np.ndarray:
    """Ranks over the first axis, 1 the lowest; equal ones share their mean rank."""
    below = (values[None] < values[:, None]).sum(1)
    equal = (values[None] == values[:, None]).sum(1)
    ranks: np.ndarray = below + (equal + 1) / 2
    return ranks


def _listed(estimate: Estimate | None) -> list[float] | None:
    return None if estimate is None else list(estimate)
