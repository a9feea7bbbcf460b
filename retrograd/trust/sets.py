"""The sets of documents or tokens that a validation leaves out: random, the ends of the ranking, those of a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from retrograd.runs.run_folder import Opened
from retrograd.runs.scores import doc_ids, per_document
from retrograd.settings.commands import ValidateConfig
from retrograd.trust.bank import LeftOut
from retrograd.trust.left_out import random_subset

__all__ = ["is_mine", "units_of", "wanted_sets"]


def wanted_sets(config: ValidateConfig, run: Opened, scores: torch.Tensor) -> list[LeftOut]:
    """Every set of the call, whoever retrains it: random ones, then the ends of the ranking, then those of a file.

    Raises:
        ValueError: If a set cannot be made of this run's documents or tokens.
    """
    units = units_of(run, tokens=config.tokens)
    members = np.array(sorted(units))
    sets = []
    for fraction in config.fraction:
        for number in range(config.subsets):
            chosen = random_subset(members, fraction, config.seed, number)
            sets.append(_set(str(number), chosen, units, fraction))
    sets += [*_ends(config, run, scores, units), *(_from_file(config.sets, units) if config.sets else ())]
    return [left_out._replace(weight=weight) for weight in config.weight for left_out in sets]


def is_mine(left_out: LeftOut, config: ValidateConfig) -> bool:
    """Whether a set belongs to this slice of the bank; the named sets go with the first slice."""
    if not left_out.random:
        return config.start == 0
    return config.start <= int(left_out.name) < (config.subsets if config.stop is None else config.stop)


def _set(name: str, chosen: np.ndarray, units: dict[int, np.ndarray], fraction: float | None = None) -> LeftOut:
    places = np.sort(np.concatenate([units[int(unit)] for unit in chosen])) if len(chosen) else np.zeros(0, np.int64)
    return LeftOut(name, len(chosen) / len(units) if fraction is None else fraction, places)


def units_of(run: Opened, *, tokens: bool) -> dict[int, np.ndarray]:
    """What sets are drawn from, by number: flat places in the data weights of each document, or of each target."""
    return _tokens(run) if tokens else _documents(run)


def _documents(run: Opened) -> dict[int, np.ndarray]:
    """Flat places in the data weights of each document that has a row."""
    rows, stream = run.loaded.rows, run.loaded.stream
    present = sorted({int(document) for row in rows.doc_ids for document in np.unique(row)})
    if not stream.per_token:
        return {document: np.array([document]) for document in present}
    targets = _tokens(run)
    places = np.array(sorted(targets))
    owner = doc_ids(rows).flatten().numpy()[places]
    return {document: places[owner == document] for document in present}


def _tokens(run: Opened) -> dict[int, np.ndarray]:
    """Flat places of target tokens, each a set of its own."""
    if not run.loaded.stream.per_token:
        raise ValueError("--tokens leaves out single tokens, and this run has one weight for each document: give a "
                         "run with --attribute tokens")  # fmt: skip
    width = run.loaded.stream.weights.shape[1]
    places = [row * width + np.flatnonzero(mask) for row, mask in enumerate(run.loaded.rows.target_mask)]
    return {int(place): np.array([place]) for place in np.concatenate(places)}


def _ends(config: ValidateConfig, run: Opened, scores: torch.Tensor, units: dict[int, np.ndarray]) -> list[LeftOut]:
    """The lowest scores (top) and the highest (bottom) of the first query."""
    leading = scores[: len(run.loaded.asked[0].columns)]
    unit_scores = leading.flatten(1) if config.tokens else per_document(leading, run.loaded.rows)
    members = np.array(sorted(units))
    order = members[np.argsort(unit_scores.mean(0).numpy()[members], kind="stable")]
    most = max(config.ends, default=0)
    if most >= len(order):
        raise ValueError(f"--ends {most} would leave out all of {len(order)}; give a smaller number")
    pairs = [((f"top-{n}", order[:n]), (f"bottom-{n}", order[-n:])) for n in config.ends]
    return [_set(name, chosen, units) for pair in pairs for name, chosen in pair]


def _from_file(path: Path, units: dict[int, np.ndarray]) -> list[LeftOut]:
    try:
        lines = path.read_text(encoding="utf8").splitlines()
        sets = [np.unique(np.array(line.split(), dtype=np.int64)) for line in lines if line.strip()]
    except (OSError, ValueError) as error:
        raise ValueError(f"--sets {path}: {error}; write one set a line, its numbers separated by spaces") from error
    for number, chosen in enumerate(sets):
        unknown = [int(unit) for unit in chosen if int(unit) not in units]
        if unknown:
            raise ValueError(
                f"--sets {path}: set {number} names {unknown[0]}, and the run trains on none such ({len(units)} from "
                f"{min(units)} to {max(units)}); correct the file"
            )
    return [_set(f"set-{number}", chosen, units) for number, chosen in enumerate(sets)]
