"""Unlearned models held against each other under the same attacks.

    after       forget accuracy at the attack's step that is the worst for the model while general ability holds; chosen
                on half of the questions, told on the other half
    pair        two models under the same attack: the paired difference of `after`, on the same questions
    front       models that no other one beats in forget accuracy (lower) and general ability (higher) at once, before
                attacks and after the worst of them
    rank        1 for the lowest `after` under an attack; its mean over attacks, with an interval over attacks and
                their seeds, of the models that no attack has cost their general ability

Attacks that take the model before unlearning, and those that do not bring back a model known to be shallow, do not
count.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from retrograd.attack.course import Course, read_course
from retrograd.attack.findings import findings
from retrograd.attack.folder import Attacked, read_folder
from retrograd.attack.recovery import means, selected
from retrograd.evaluate.intervals import compare, wilson
from retrograd.runs.manifest import Manifest
from retrograd.settings.tasks import tasks_from

__all__ = ["Faced", "compared", "front", "read_faced"]

RESAMPLES = 2000


class Faced(NamedTuple):
    """A model under an attack. least: the general accuracy to be kept; method: of unlearning, if its run tells it."""

    model: str
    method: str | None
    role: str
    attack: str
    course: Course
    least: float
    latent: dict[str, Any] | None
    valid: bool | None
    probe: bool


class _After(NamedTuple):
    """The worst step for a model, the other half's answers there, [n/2], and which questions they are, [n]."""

    step: int
    right: np.ndarray
    reported: np.ndarray
    retain: float


def read_faced(folders: Sequence[Path], utility: float) -> list[Faced]:
    """Every meeting of a model and an attack in some folders, each once.

    Raises:
        ValueError: If one is no folder of attacks, they were asked different questions, or an attack of one name was
            of different rows.
    """
    found: dict[tuple[str, str], Faced] = {}
    asked: set[str] = set()
    trained: dict[str, tuple[Path, list[str | None]]] = {}
    for path in folders:
        folder = read_folder(path)
        tasks = tasks_from(folder.tasks)
        told = findings(folder, (utility,))
        of = {(one["model"], one["configuration"]): one for one in told["meetings"]}
        base = folder.of_role("base")
        for name, one in folder.configurations.items():
            reference = read_course(folder, base, name, tasks) if base is not None else None
            if base is not None and reference is not None:
                _check_rows(trained, name, path, folder.place(base, name))
            for target in folder.targets if reference is not None else ():
                course = read_course(folder, target, name, tasks)
                if course is None or reference is None:
                    continue
                asked.add(_questions(path))
                meeting = of[target.name, name]
                found.setdefault((target.name, name), Faced(
                    target.name, _method(target), target.role, name, course, means(reference.retain)[0] - utility,
                    meeting.get("latent"), meeting["valid"]["valid"], one.probe,
                ))  # fmt: skip
    if len(asked) > 1:
        raise ValueError("these folders were asked different questions: attack all models in one folder")
    if not any(one.role == "model" for one in found.values()):
        raise ValueError(f"{', '.join(map(str, folders))}: no model has met an attack yet; run `retrograd attack`")
    return list(found.values())


def _check_rows(trained: dict[str, tuple[Path, list[str | None]]], name: str, path: Path, place: Path) -> None:
    """Refuse an attack that trained on other rows in another folder: a name tells its settings alone."""
    manifests = [Manifest(place / phase / "manifest.json").values for phase in ("before", "attack")]
    rows = [one.get("hashes", {}).get("rows") for one in manifests]
    first, others = trained.setdefault(name, (path, rows))
    if rows != others:
        raise ValueError(f"attack {name} trained on other rows in {path} than in {first}: attack all models in one "
                         "folder")  # fmt: skip


def compared(faced: Sequence[Faced]) -> dict[str, Any]:
    """The comparison, as plain values."""
    after = {(one.model, one.attack): _after(one) for one in faced}
    models = {one.model: one for one in faced}
    counted = [one for one in faced if not one.probe and one.valid is not False]
    return {
        "models": {name: {"method": one.method, "role": one.role} for name, one in models.items()},
        "table": [_cell(one, after[one.model, one.attack]) for one in faced],
        "pairs": list(_pairs(counted, after)),
        "fronts": _fronts(counted, after),
        "ranks": _ranks([one for one in counted if one.role == "model"], after),
    }


def front(points: dict[str, tuple[float, float]]) -> list[str]:
    """Names of the points (forget, retain) that no other beats: none has less or equal forget and more or equal retain.

    >>> front({"a": (0.3, 0.9), "b": (0.4, 0.8), "c": (0.5, 0.95)})
    ['a', 'c']
    """

    def beaten(one: tuple[float, float]) -> bool:
        return any(other != one and other[0] <= one[0] and other[1] >= one[1] for other in points.values())

    return [name for name, one in points.items() if not beaten(one)]


def _questions(path: Path) -> str:
    return str(json.loads((path / "attack.json").read_text(encoding="utf8"))["questions"]["content"])


def _method(target: Attacked) -> str | None:
    """The method that an unlearning run's manifest names."""
    path = Path(target.source).parent / "manifest.json"
    if not path.exists():
        return None
    found: str | None = json.loads(path.read_text(encoding="utf8")).get("method")
    return found


def _after(one: Faced) -> _After | None:
    course = one.course
    kept = [place for place, value in enumerate(means(course.retain)) if value >= one.least - 1e-9]
    chosen = selected([course.forget[place] for place in kept], course.clusters)
    if chosen is None:
        return None
    place, reported = kept[chosen[0]], chosen[1]
    return _After(course.steps[place], course.forget[place][reported], reported, float(course.retain[place].mean()))


def _cell(one: Faced, after: _After | None) -> dict[str, Any]:
    start = one.course.forget[0]
    found: dict[str, Any] = {
        "model": one.model, "method": one.method, "role": one.role, "attack": one.attack, "valid": one.valid,
        "probe": one.probe, "before": float(start.mean()), "retain_before": float(one.course.retain[0].mean()),
        "after": None, "interval": None, "step": None, "retain_after": None, "latent": None, "latent_interval": None,
    }  # fmt: skip
    if after is not None:
        found |= {"after": float(after.right.mean()), "step": after.step, "retain_after": after.retain,
                  "interval": list(wilson(int(after.right.sum()), len(after.right)))}  # fmt: skip
    if one.latent and "last" in one.latent:
        found |= {"latent": one.latent["last"]["value"], "latent_interval": one.latent["last"]["interval"]}
    return found


def _pairs(faced: Sequence[Faced], after: dict[tuple[str, str], _After | None]) -> Any:
    """Every two models under every attack that both met: the second minus the first."""
    attacks = dict.fromkeys(one.attack for one in faced)
    for attack in attacks:
        models = [one.model for one in faced if one.attack == attack and one.role in ("model", "filtered")]
        for first, second in itertools.combinations(dict.fromkeys(models), 2):
            a, b = after[first, attack], after[second, attack]
            if a is None or b is None:
                continue
            assert (a.reported == b.reported).all(), "the halves are drawn alike"
            found = compare(a.right, b.right)
            yield {"attack": attack, "first": first, "second": second, "difference": found.difference,
                   "interval": list(found.interval), "p": found.p}  # fmt: skip


def _fronts(faced: Sequence[Faced], after: dict[tuple[str, str], _After | None]) -> dict[str, Any]:
    """(forget, retain) of every model before attacks and after its worst one, and which models are on the front."""
    before: dict[str, tuple[float, float]] = {}
    worst: dict[str, tuple[float, float]] = {}
    for one in faced:
        before[one.model] = (float(one.course.forget[0].mean()), float(one.course.retain[0].mean()))
        end = after[one.model, one.attack]
        if end is not None and (one.model not in worst or end.right.mean() > worst[one.model][0]):
            worst[one.model] = (float(end.right.mean()), end.retain)
    return {name: {"points": {model: list(point) for model, point in points.items()}, "front": front(points)}
            for name, points in (("before", before), ("after", worst))}  # fmt: skip


def _ranks(faced: Sequence[Faced], after: dict[tuple[str, str], _After | None]) -> dict[str, Any]:
    """Mean rank by method (of models without one, by model) over the attacks that all of them met."""
    lost = {one.model for one in faced if after[one.model, one.attack] is None}
    models = [model for model in dict.fromkeys(one.model for one in faced) if model not in lost]
    method = {one.model: one.method or one.model for one in faced if one.model in models}
    ranked = []
    for attack in dict.fromkeys(one.attack for one in faced):
        ends = [after.get((model, attack)) for model in models]
        values = [float(end.right.mean()) for end in ends if end is not None]
        if len(values) == len(models):
            ranked.append([1 + sum(other < x for other in values) + (values.count(x) - 1) / 2 for x in values])
    if not ranked:
        return {}
    table = np.array(ranked)  # [attacks, models]
    drawn = np.random.default_rng(0).integers(len(table), size=(RESAMPLES, len(table)))
    found = {}
    for name in dict.fromkeys(method.values()):
        own = [place for place, model in enumerate(models) if method[model] == name]
        of_attack = table[:, own].mean(axis=1)
        low, high = np.quantile(of_attack[drawn].mean(axis=1), [0.025, 0.975])
        found[name] = {"rank": float(of_attack.mean()), "interval": [float(low), float(high)], "models": len(own),
                       "attacks": len(table)}  # fmt: skip
    return found
