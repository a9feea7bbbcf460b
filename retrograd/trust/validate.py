"""`retrograd validate`: retrain without sets of documents or tokens, and compare with what the scores predict."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from rich.console import Console

from retrograd.durable import LOCK
from retrograd.parallel.deal import Deal, dealt
from retrograd.runs.errors import RunError
from retrograd.runs.files import read_tensors
from retrograd.runs.lock import locked
from retrograd.runs.manifest import Manifest
from retrograd.runs.progress import counting
from retrograd.runs.run_folder import Opened, holding, lay_out_whole, open_run
from retrograd.settings.commands import ValidateConfig
from retrograd.trust.agreement import Compared, Validation, show, validation, write_validation
from retrograd.trust.bank import BASELINE, Bank, LeftOut, Retrained
from retrograd.trust.ensemble import check_objective
from retrograd.trust.evidence import stored_scores
from retrograd.trust.filtering import Plan, filtering, filtering_record, show_filtering, strongest_sets
from retrograd.trust.holdings import made_here, note_wanted
from retrograd.trust.left_out import predicted
from retrograd.trust.methods import OWN, Method, other_methods
from retrograd.trust.models import Models, ask_kept
from retrograd.trust.retrain import NOTHING, Conditions, conditions_of, retrain_all
from retrograd.trust.sets import is_mine, units_of, wanted_sets
from retrograd.trust.standings import record, show_standings, standings, write_standings

__all__ = ["Retraining", "bank_of", "carry_out", "check_validate", "prepared", "stackable", "validate"]


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
    with dealt() as deal:
        lock = f"{LOCK}{_suffix(config, deal.rank, deal.world)}"
        lay_out_whole(config.run, trust_code=config.trust_code)
        with holding(config.run, shared=True) as run, locked(config.run / "validation", lock, tidy=False):
            return _validate(config, run[1], deal, console)


class Retraining(NamedTuple):
    """What a call of `validate` is made of: every set, those of this call, and how they are retrained without.

    methods, plans: other scores that are compared, and the sets of the strongest.
    """

    run: Opened
    conditions: Conditions
    methods: list[Method]
    plans: list[Plan]
    wanted: list[LeftOut]
    mine: list[LeftOut]
    bank: Bank


def prepared(config: ValidateConfig, manifest: Manifest, suffix: str, console: Console) -> Retraining:
    """Load a run and what is to be retrained without, and read its bank.

    Args:
        suffix: Ends the name of this process's own file of the bank.
    Raises:
        ValueError: For anything the user can mend.
    """
    number = (config.subsets * len(config.fraction) + len(config.top) * (config.controls + 1)) * len(config.weight)
    conditions = conditions_of(manifest, number, config.workers, config.together)
    run = open_run(config.run, threads=conditions.threads, trust_code=config.trust_code)
    conditions, scores = stackable(run, conditions, config, console), stored_scores(run)
    methods = [Method(OWN, scores), *other_methods(config, run)]
    plans = _plans(config, run, methods)
    wanted = [*wanted_sets(config, run, scores), *(left_out for plan in plans for left_out in plan.sets)]
    mine = [left_out for left_out in wanted if is_mine(left_out, config)]
    return Retraining(run, conditions, methods, plans, wanted, mine, bank_of(run, suffix))


def _validate(config: ValidateConfig, manifest: Manifest, deal: Deal, console: Console) -> Validation | None:
    suffix = _suffix(config, deal.rank, deal.world)
    run, conditions, methods, plans, wanted, mine, bank = prepared(config, manifest, suffix, console)
    scores = methods[0].scores
    carry_out(run, list(deal.mine(mine)), bank, conditions, config.save_models, console)
    if deal.rank:
        return None
    note_wanted(bank.folder, suffix, wanted)
    _await(mine, bank, deal.world)
    bank.refuse_mixture(adding=False)
    weights = run.loaded.training.weights
    compared = [
        Compared(
            left_out,
            predicted(scores, weights, left_out.places, left_out.weight).numpy(),
            np.subtract(*bank.known[left_out.key][:2]),
        )
        for left_out in wanted
        if left_out.key in bank.known
    ]
    diverged = bank.failed.keys() - bank.known.keys()
    failed = [(left_out, bank.failed[left_out.key]) for left_out in wanted if left_out.key in diverged]
    if failed and not compared:
        raise RunError(
            f"all {len(failed)} retrainings diverged, so nothing can be compared; without set {failed[0][0].name}, "
            f"{failed[0][1]}"
        )
    missing = [left_out for left_out in wanted if not bank.done(left_out.key)]
    result = validation(compared, run.loaded.queries.names, _unchanged(run, bank, conditions), failed, missing)
    groups = standings(methods, compared, missing, weights) if len(methods) > 1 else []
    filtered = filtering(plans, bank)
    more = {"methods": record(groups, result.names), "filtering": filtering_record(filtered)}
    write_validation(config.run, result, more)
    show(result, len(wanted), config.run, console)
    if groups:
        write_standings(config.run, methods, compared, result.names, weights)
        show_standings(groups, console)
    show_filtering(filtered, config.tokens, console)
    return result


def check_validate(config: ValidateConfig) -> None:
    """Refuse, before anything is loaded, what cannot work.

    Raises:
        ValueError: With the setting, its value and what it has to be.
    """
    for name, number in (("subsets", config.subsets), ("start", config.start), ("workers", config.workers),
                         ("together", config.together), ("stop", config.stop or 0)):  # fmt: skip
        if number < 0:
            raise ValueError(f"--{name} is {number}; it has to be 0 or more")
    for weight in config.weight:
        if not (math.isfinite(weight) and weight >= 0) or weight == 1:
            raise ValueError(f"--weight is {weight}; give 0 to leave sets out, or a number above 0 other than 1")
    for share in config.top:
        if not 0 < share < 1:
            raise ValueError(f"--top is {share}; give a share above 0 and below 1, such as 0.01 for 1 %")
    if config.controls < 5:
        raise ValueError(f"--controls is {config.controls}; fewer than 5 random sets give no interval worth the name")
    for fraction in config.fraction:
        if not 0 <= fraction < 1:
            raise ValueError(f"--fraction is {fraction}; give shares from 0 up to below 1, such as 0.01 for 1 %")
    if any(number < 1 for number in config.ends):
        raise ValueError(f"--ends is {min(config.ends)}; it has to be at least 1")
    _refuse_nothing(config)
    if config.stop is not None and config.stop <= config.start:
        raise ValueError(f"--start {config.start} --stop {config.stop} has no subset; stop has to be above start")


def _refuse_nothing(config: ValidateConfig) -> None:
    if not (config.subsets and config.fraction) and not (config.top or config.ends or config.sets):
        raise ValueError(
            f"there is no set to leave out: --subsets is {config.subsets}, with {len(config.fraction)} of --fraction; "
            "give 1 or more of both, or the sets by --top, --ends or --sets"
        )


def _plans(config: ValidateConfig, run: Opened, methods: Sequence[Method]) -> list[Plan]:
    """The sets that --top needs, by method, share and weight."""
    if not config.top:
        return []
    units, columns = units_of(run, tokens=config.tokens), len(run.loaded.queries.names)
    width = run.loaded.training.weights.shape[-1] if config.tokens else None
    return [
        plan
        for share in config.top
        for weight in config.weight
        for plan in strongest_sets(methods, units, columns, share, weight, config.controls, width, config.seed)
    ]


def _suffix(config: ValidateConfig, rank: int, ranks: int) -> str:
    """What ends the name of this process's own file of the bank, and of its lock: no two may append to one file."""
    sliced = config.start or config.stop is not None
    name = f"-{config.start}-{config.stop if config.stop is not None else config.subsets}" if sliced else ""
    return f"{name}-rank{rank}" if ranks > 1 else name


def bank_of(run: Opened, suffix: str) -> Bank:
    """The bank of a run, written to by this process under a name that ends in `suffix`."""
    queries = {query.name: query.digest for query in run.loaded.asked}
    names, made = run.loaded.queries.names, made_here(run.loaded.arithmetic)
    return Bank(run.folder / "validation", run.loaded.identity, queries, names, suffix, made)


def stackable(run: Opened, conditions: Conditions, config: ValidateConfig, console: Console) -> Conditions:
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


def carry_out(
    run: Opened, sets: list[LeftOut], bank: Bank, conditions: Conditions, keep: bool, console: Console
) -> None:
    """Ask the kept models what is not known of them, and retrain the rest."""
    by_key = {left_out.key: left_out for left_out in sets}
    if len(by_key) == sum(bank.done(key, model=keep) for key in by_key):
        return
    bank.refuse_mixture(adding=True)
    _ask(run, [left_out for key, left_out in by_key.items() if not bank.done(key)], bank, conditions, console)
    missing = [left_out for key, left_out in by_key.items() if not bank.done(key, model=keep)]
    if not missing:
        return
    again = sum(bank.done(left_out.key) for left_out in missing)
    console.print(
        f"{len(missing)} retrainings ({len(sets) - len(missing)} more are done or equal); {conditions.workers} "
        f"processes of {conditions.threads} threads, {conditions.together} models at a time in each."
        + (f" {again} of them are in the bank without their models, which --save_models asks for." if again else "")
    )
    with counting("retrain", len(missing)) as tick:
        for group in retrain_all(run, missing, conditions, bank.baseline(conditions.alone.bits), keep=keep):
            first, retrained = group[0]
            if first is NOTHING and isinstance(retrained, Retrained):
                _reproduced(run, conditions, retrained.values)
                bank.add(group, conditions.alone.bits)
            else:
                bank.add(group, conditions.bits)
                tick(len(group))


def _ask(run: Opened, sets: list[LeftOut], bank: Bank, conditions: Conditions, console: Console) -> None:
    """Ask kept models the queries that are not in the bank yet."""
    models = Models(run)

    def there(key: str, wanted: dict[str, int]) -> bool:
        kept = bank.model(key, wanted)
        return kept is not None and models.has(kept.model) and models.has(kept.baseline_model)

    kept = [left_out for left_out in sets if there(left_out.key, conditions.bits)]
    if not kept:
        return
    if bank.baseline(conditions.alone.bits) is None and there(BASELINE, conditions.alone.bits):
        kept = [NOTHING, *kept]
    console.print(f"{len(kept)} kept models are asked instead of retraining.")
    with counting("ask", len(kept), "models") as tick:
        for left_out, answered, made in ask_kept(run, bank, kept, conditions.bits):
            bank.add([(left_out, answered)], made)
            tick()


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
    return float(np.abs(np.subtract(baseline.values, _stored_values(run))).max()) if baseline else None


def _stored_values(run: Opened) -> list[float]:
    folders = [run.folder / "queries" / query.name for query in run.loaded.asked]
    return [x for folder in folders for x in read_tensors(folder / "gradient.safetensors")[0]["values"].tolist()]


def _await(sets: list[LeftOut], bank: Bank, ranks: int) -> None:
    """Rank 0 waits until the others' retrainings are in the bank."""
    while ranks > 1 and not all(bank.done(left_out.key) for left_out in sets):
        time.sleep(1)
        bank.read()
