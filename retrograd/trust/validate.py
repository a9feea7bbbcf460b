"""`retrograd validate`: retrain without sets of documents or tokens, and compare with what the scores predict."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console

from retrograd.durable import LOCK
from retrograd.runs.errors import RunError
from retrograd.runs.files import read_tensors
from retrograd.runs.lock import locked
from retrograd.runs.manifest import Manifest
from retrograd.runs.progress import counting
from retrograd.runs.run_folder import Opened, holding, open_run
from retrograd.runs.scores import doc_ids, per_document
from retrograd.settings.commands import ValidateConfig
from retrograd.trust.agreement import Compared, Validation, show, validation, write_validation
from retrograd.trust.bank import Bank, LeftOut, Retrained
from retrograd.trust.ensemble import check_objective
from retrograd.trust.evidence import stored_scores
from retrograd.trust.left_out import predicted, random_subset
from retrograd.trust.retrain import NOTHING, Conditions, conditions_of, retrain_all

__all__ = ["Retraining", "check_validate", "prepared", "validate"]


def validate(config: ValidateConfig, console: Console | None = None) -> Validation | None:
    """Validate a finished run; running again reuses every retraining that is in the bank.

    Returns:
        What was found; None on ranks that leave the report to rank 0.
    Raises:
        ValueError: For anything the user can mend.
        RunError: If retraining with everything does not reproduce the run, or every retraining diverges.
    """
    console = console or Console()
    check_validate(config)
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", torch.cuda.current_device())))
    part = _part(config, rank, ranks)
    with holding(config.run, shared=True) as run, locked(config.run / "validation", f"{LOCK}{part}", tidy=False):
        return _validate(config, run[1], rank, ranks, console)


class Retraining(NamedTuple):
    """What a call of `validate` is made of: every set, those of this call, and how they are retrained without."""

    run: Opened
    conditions: Conditions
    scores: torch.Tensor
    wanted: list[LeftOut]
    mine: list[LeftOut]
    bank: Bank

    @property
    def missing(self) -> list[LeftOut]:
        """Sets of this call that are not in the bank, each once."""
        return _missing(self.mine, self.bank)


def prepared(config: ValidateConfig, manifest: Manifest, part: str, console: Console) -> Retraining:
    """Load a run and what is to be retrained without, and read its bank.

    Args:
        part: Ends the name of this process's own file of the bank.
    Raises:
        ValueError: For anything the user can mend.
    """
    number = config.subsets * len(config.fraction)
    conditions = conditions_of(manifest, number, config.workers, config.together)
    run = open_run(config.run, threads=conditions.threads, trust_code=config.trust_code)
    conditions, scores = _stackable(run, conditions, config, console), stored_scores(run)
    wanted = _wanted(config, run, scores)
    mine = [one for one in wanted if _is_mine(one, config)]
    return Retraining(run, conditions, scores, wanted, mine, _bank(config, run, part))


def _validate(config: ValidateConfig, manifest: Manifest, rank: int, ranks: int, console: Console) -> Validation | None:
    made = prepared(config, manifest, _part(config, rank, ranks), console)
    run, conditions, bank, wanted = made.run, made.conditions, made.bank, made.wanted
    _carry_out(run, made.mine[rank::ranks], bank, conditions, console)
    if rank:
        return None
    _await(made.mine, bank, ranks)
    scores, weights = made.scores, run.loaded.training.weights
    found = [
        Compared(one, predicted(scores, weights, one.places).numpy(), np.subtract(*bank.known[one.key]))
        for one in wanted
        if one.key in bank.known
    ]
    failed = [(one, bank.failed[one.key]) for one in wanted if one.key in bank.failed and one.key not in bank.known]
    if failed and not found:
        raise RunError(
            f"all {len(failed)} retrainings diverged, so nothing can be compared; without set {failed[0][0].name}, "
            f"{failed[0][1]}"
        )
    result = validation(found, run.loaded.queries.names, _unchanged(run, bank, conditions), failed)
    write_validation(config.run, result)
    return show(result, len(wanted), config.run, console)


def check_validate(config: ValidateConfig) -> None:
    """Refuse, before anything is loaded, what cannot work.

    Raises:
        ValueError: With the setting, its value and what it has to be.
    """
    for name, number in (("subsets", config.subsets), ("start", config.start), ("workers", config.workers),
                         ("together", config.together), ("stop", config.stop or 0)):  # fmt: skip
        if number < 0:
            raise ValueError(f"--{name} is {number}; it has to be 0 or more")
    for fraction in config.fraction:
        if not 0 <= fraction < 1:
            raise ValueError(f"--fraction is {fraction}; give shares from 0 up to below 1, such as 0.01 for 1 %")
    if any(number < 1 for number in config.ends):
        raise ValueError(f"--ends is {min(config.ends)}; it has to be at least 1")
    if config.stop is not None and config.stop <= config.start:
        raise ValueError(f"--start {config.start} --stop {config.stop} has no subset; stop has to be above start")


def _wanted(config: ValidateConfig, run: Opened, scores: torch.Tensor) -> list[LeftOut]:
    """Every set of the call, whoever retrains it: random ones, then the ends of the ranking, then those of a file."""
    units = _tokens(run) if config.tokens else _documents(run)
    members = np.array(sorted(units))
    found = []
    for fraction in config.fraction:
        for number in range(config.subsets):
            chosen = random_subset(members, fraction, config.seed, number)
            found.append(_set(str(number), chosen, units, fraction))
    return [*found, *_ends(config, run, scores, units), *(_from_file(config.sets, units) if config.sets else ())]


def _is_mine(one: LeftOut, config: ValidateConfig) -> bool:
    """Whether a set belongs to this slice of the bank; the named sets go with the first slice."""
    if not one.name.isdecimal():
        return config.start == 0
    return config.start <= int(one.name) < (config.subsets if config.stop is None else config.stop)


def _set(name: str, chosen: np.ndarray, units: dict[int, np.ndarray], fraction: float | None = None) -> LeftOut:
    places = np.sort(np.concatenate([units[int(unit)] for unit in chosen])) if len(chosen) else np.zeros(0, np.int64)
    return LeftOut(name, len(chosen) / len(units) if fraction is None else fraction, places)


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
    found = [row * width + np.flatnonzero(mask) for row, mask in enumerate(run.loaded.rows.target_mask)]
    return {int(place): np.array([place]) for place in np.concatenate(found)}


def _ends(config: ValidateConfig, run: Opened, scores: torch.Tensor, units: dict[int, np.ndarray]) -> list[LeftOut]:
    """The lowest scores (top) and the highest (bottom) of the first query."""
    leading = scores[: len(run.loaded.asked[0].columns)]
    values = leading.flatten(1) if config.tokens else per_document(leading, run.loaded.rows)
    members = np.array(sorted(units))
    order = members[np.argsort(values.mean(0).numpy()[members], kind="stable")]
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


def _part(config: ValidateConfig, rank: int, ranks: int) -> str:
    """What ends the name of this process's own file of the bank, and of its lock: no two may append to one file."""
    sliced = config.start or config.stop is not None
    part = f"-{config.start}-{config.stop if config.stop is not None else config.subsets}" if sliced else ""
    return f"{part}-rank{rank}" if ranks > 1 else part


def _bank(config: ValidateConfig, run: Opened, part: str) -> Bank:
    queries = {one.name: one.digest for one in run.loaded.asked}
    return Bank(config.run / "validation", run.loaded.identity, queries, run.loaded.queries.names, part)


def _stackable(run: Opened, conditions: Conditions, config: ValidateConfig, console: Console) -> Conditions:
    """Without a stack where the model cannot be stacked, unless stacks were asked for."""
    if conditions.together == 1:
        return conditions
    try:
        check_objective(run.loaded.training, run.loaded.initial.params, run.loaded.objective)
    except ValueError as error:
        if config.together:
            raise
        console.print(f"Retraining one by one: {error}")
        return conditions._replace(together=1)
    return conditions


def _carry_out(run: Opened, sets: list[LeftOut], bank: Bank, conditions: Conditions, console: Console) -> None:
    missing = _missing(sets, bank)
    if not missing:
        return
    console.print(
        f"{len(missing)} retrainings ({len(sets) - len(missing)} more are done or equal); {conditions.workers} "
        f"processes of {conditions.threads} threads, {conditions.together} models at a time in each."
    )
    with counting("retrain", len(missing)) as tick:
        for group in retrain_all(run, missing, conditions, bank.baseline(conditions.alone.bits)):
            first, found = group[0]
            if first is NOTHING and isinstance(found, Retrained):
                _reproduced(run, conditions, found.values)
                bank.add(group, conditions.alone.bits)
            else:
                bank.add(group, conditions.bits)
                tick(len(group))


def _missing(sets: list[LeftOut], bank: Bank) -> list[LeftOut]:
    return list({one.key: one for one in sets if not bank.done(one.key)}.values())


def _reproduced(run: Opened, conditions: Conditions, baseline: list[float]) -> None:
    """Under the run's own conditions, retraining with everything gives the run's own bits, or nothing is measured.

    Raises:
        RunError: If it does not.
    """
    if conditions.threads == run.loaded.arithmetic.threads:
        stored = _stored_values(run)
        worst = float(np.abs(np.subtract(baseline, stored)).max())
        if worst:
            raise RunError(
                f"retraining with everything does not give back this run: a query differs by {worst:.3g} nats, and it "
                "has to be exactly 0. Another machine or library computes otherwise; run it again here."
            )


def _unchanged(run: Opened, bank: Bank, conditions: Conditions) -> float | None:
    """max |φ retrained with everything − φ of the run|, nats; None if other threads have done all of the bank."""
    baseline = bank.baseline(conditions.alone.bits)
    return float(np.abs(np.subtract(baseline, _stored_values(run))).max()) if baseline else None


def _stored_values(run: Opened) -> list[float]:
    folders = [run.folder / "queries" / one.name for one in run.loaded.asked]
    return [x for folder in folders for x in read_tensors(folder / "gradient.safetensors")[0]["values"].tolist()]


def _await(sets: list[LeftOut], bank: Bank, ranks: int) -> None:
    """Rank 0 waits until the others' retrainings are in the bank."""
    while ranks > 1 and not all(bank.done(one.key) for one in sets):
        time.sleep(1)
        bank.read()
