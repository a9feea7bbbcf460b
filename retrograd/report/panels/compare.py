"""Groups of models under the same attacks: heat map with the answers behind it, fronts, latent recovery and ranks."""

from __future__ import annotations

from typing import Any

from retrograd.report.panel import Content, Source, View
from retrograd.report.panels.behind import answers_behind
from retrograd.report.subjects import Attack

__all__ = ["compare"]


def compare(subject: Attack, view: View) -> Content | None:
    """What `retrograd compare` found of the folder; None where it was not asked."""
    found = subject.compared
    if found is None:
        return None
    before, after = found["fronts"]["before"], found["fronts"]["after"]
    by = {(cell["group"], cell["attack"]): cell for cell in found["cells"]}
    behind = answers_behind(subject, found, view.mask)
    groups = [
        {"name": one["label"], "role": one["role"], "models": len(one["models"]),
         "before": before["points"].get(group), "after": _after(after["points"].get(group), found["attacks"]),
         "front": [when for when, told in (("before", before), ("after", after)) if group in told["front"]],
         "latent": found["latent"].get(group), "rank": found["ranks"].get(group),
         "cells": [_cell(by.get((group, attack)), behind.runs.get((group, attack))) for attack in found["attacks"]]}
        for group, one in found["groups"].items()
    ]  # fmt: skip
    attacks = [{"name": one["readable"], "note": _note(one), "unseen": one.get("unseen")}
               for one in found["attacks"].values()]  # fmt: skip
    data: dict[str, Any] = {"groups": groups, "attacks": attacks, "utility": found["utility"],
                            "unranked": [found["groups"][group]["label"] for group in found["unranked"]],
                            "questions": behind.questions, "tasks": behind.tasks, "why": behind.why}  # fmt: skip
    source = Source(subject.folder / "compare.json", f"retrograd compare {subject.folder}")
    return Content(data, [source], behind.arrays)


def _note(attack: dict[str, Any]) -> str:
    return "probe" if attack["probe"] else "invalid" if attack["valid"] is False else ""


def _after(point: dict[str, Any] | None, attacks: dict[str, Any]) -> dict[str, Any] | None:
    return None if point is None else {**point, "attack": attacks[point["attack"]]["readable"]}


def _cell(cell: dict[str, Any] | None, runs: list[dict[str, Any]] | None) -> dict[str, Any] | None:
    if cell is None:
        return None
    return {**{name: cell[name] for name in ("after", "latent", "lost", "models", "seeds")}, "runs": runs or []}
