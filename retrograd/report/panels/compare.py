"""Groups of models under the same attacks: heat map with the answers behind it, fronts, latent recovery and ranks."""

from __future__ import annotations

from typing import Any

from retrograd.report.panel import Content, Source, View
from retrograd.report.panels.behind import answers_behind
from retrograd.report.subjects import Attack

__all__ = ["compare"]


def compare(subject: Attack, view: View) -> Content | None:
    """What `retrograd compare` found of the folder; None where it was not asked."""
    comparison = subject.compared
    if comparison is None:
        return None
    before, after = comparison["fronts"]["before"], comparison["fronts"]["after"]
    by = {(cell["group"], cell["attack"]): cell for cell in comparison["cells"]}
    behind = answers_behind(subject, comparison, view.mask)
    groups = [
        {"name": entry["label"], "role": entry["role"], "models": len(entry["models"]),
         "before": before["points"].get(group), "after": _after(after["points"].get(group), comparison["attacks"]),
         "front": [when for when, front in (("before", before), ("after", after)) if group in front["front"]],
         "latent": comparison["latent"].get(group), "rank": comparison["ranks"].get(group),
         "cells": [_cell(by.get((group, attack)), behind.runs.get((group, attack)))
                   for attack in comparison["attacks"]]}
        for group, entry in comparison["groups"].items()
    ]  # fmt: skip
    attacks = [{"name": attack["readable"], "note": _note(attack), "unseen": attack.get("unseen")}
               for attack in comparison["attacks"].values()]  # fmt: skip
    data: dict[str, Any] = {"groups": groups, "attacks": attacks, "utility": comparison["utility"],
                            "unranked": [comparison["groups"][group]["label"] for group in comparison["unranked"]],
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
