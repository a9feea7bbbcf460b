"""The plan of one run: what it is, what it takes, and the cheapest change that would make it fit."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from retrograd.plan.cost import Forecast, Pace, device_bytes, forecast, pace_by_rate, query_units
from retrograd.plan.described import Described, described, is_attributed, loaded
from retrograd.plan.machine import Machine, machine_of, resident
from retrograd.plan.probe import disk_rate, probe
from retrograd.runs.run_folder import replay_of
from retrograd.runs.setup import find_device
from retrograd.runs.states.budget import Layout, Replay, layout_of
from retrograd.settings.plan import HARDWARE, PlanConfig, Precision
from retrograd.settings.run import AttributedConfig, queries_of
from retrograd.settings.train import RunConfig

__all__ = ["Planned", "plan_run", "precision_of"]

_MOST_RANKS = 64  # that are tried to make a run fit


class Planned(NamedTuple):
    """A run's plan, and with what changes it would fit; None where it fits, or no change tried would do."""

    forecast: Forecast
    remedy: Forecast | None
    why: str = ""  # nothing is kept that would fit, in the words of the run


def plan_run(config: RunConfig, plan: PlanConfig, clock: Callable[[], float] = time.perf_counter) -> Planned:
    """What a run of this configuration takes.

    Args:
        clock: Of the probe; another than the wall's where the machine has other work.
    Raises:
        ValueError: For what the run itself would refuse.
    """
    _refuse_further(config)
    start = clock()
    device = torch.device("cpu") if plan.by_arithmetic else find_device(config.device)
    machine = machine_of(plan, _folder(config), device, precision_of(config), config.parallel, config.replicas)
    run = described(config, plan) if plan.by_arithmetic else loaded(config)
    before = clock() - start
    peak = resident("VmHWM") if run.setup is not None and machine.memory is None else 0
    replay = _replay(config, plan, machine)
    run, engine, rows = _chosen(run, machine)
    try:
        layout = _layout(run, replay, machine) if is_attributed(config) else None
    except ValueError as error:
        return _unkept(run, machine, replay, engine, rows, str(error))
    pace: Pace | None = None
    if run.setup is not None:
        pace = probe(run.setup, run.work, run.asked, layout, clock)
        pace = _shared(pace, machine)._replace(before=before)
        if layout is not None and (layout.on_disk or layout.gradients_on_disk) and machine.disk_rate is None:
            machine = machine._replace(disk_rate=disk_rate(_folder(config), clock))
    elif machine.rate is not None:
        pace = pace_by_rate(run.work, machine, engine, rows)
    first = dataclasses.replace(forecast(run.work, machine, layout, pace, engine, rows), peak=peak)
    return Planned(first, _remedy(first, run, replay) if first.missing else None)


def _refuse_further(config: RunConfig) -> None:
    queries = queries_of(config) if isinstance(config, AttributedConfig) else {}
    for name, query in queries.items():
        if query.then:
            raise ValueError(
                f"query {name!r} is asked after {', '.join(query.then)}, whose training a plan does not count: leave "
                "--query.then out, and plan that by itself (`retrograd plan magic` of its settings, a sweep included)"
            )


def precision_of(config: RunConfig) -> Precision | None:
    """What products are computed in, for a data sheet's rate; None where it has none."""
    if config.dtype != "float32":
        return "bfloat16" if config.dtype == "bfloat16" else None
    return "tf32" if config.tf32 else "float32"


def _folder(config: RunConfig) -> Path:
    return config.run if isinstance(config.run, Path) else Path.cwd()


def _replay(config: RunConfig, plan: PlanConfig, machine: Machine) -> Replay:
    """The run's own budgets, of what the machine has."""
    if not isinstance(config, AttributedConfig):
        return Replay()
    elsewhere = plan.hardware != "here" or plan.host is not None or plan.disk is not None
    return replay_of(config, *((machine.host, machine.disk) if elsewhere else ()))


def _layout(run: Described, replay: Replay, machine: Machine) -> Layout:
    steps, on_host = run.work.steps.steps, machine.memory is None
    return layout_of(replay, run.recipe, run.initial, steps, on_host=on_host, share=machine.shards)


def _chosen(run: Described, machine: Machine) -> tuple[Described, str, int]:
    """The engine, as the run would choose it, and the rows of a micro-batch on a rank."""
    rows = -(-run.work.steps.largest[0] // machine.ranks)
    engine = run.work.engine
    if engine == "auto":
        graph = run.work.activations("double", rows, twice=True)
        free = machine.host // 2 if machine.memory is None else machine.memory - machine.base
        needs = sum(device_bytes(run.work, machine, "double", graph or 0).values())
        engine = "double" if graph is None or needs <= free else "blocks"
        run = run._replace(work=dataclasses.replace(run.work, engine=engine))
    return run, engine, rows


def _shared(pace: Pace, machine: Machine) -> Pace:
    """A measured pace on so many ranks, as if nothing were lost between them."""
    ranks = machine.ranks
    query = pace.query * query_units(machine) / 3 / ranks
    return Pace(pace.step / ranks, pace.again / machine.shards, pace.reverse / ranks, query, pace.before)


def _unkept(run: Described, machine: Machine, replay: Replay, engine: str, rows: int, why: str) -> Planned:
    """Of a run whose states fit nowhere: all but what is kept and time."""
    first = forecast(run.work, machine, None, None, engine, rows)
    return Planned(first, _remedy(first, run, dataclasses.replace(replay, plan="auto")), why)


def _remedy(first: Forecast, run: Described, replay: Replay) -> Forecast | None:
    """The change that fits with the fewest ranks; of those the one of the fewest device hours, then of fewest changes.

    Tried are the engine blocks, smaller micro-batches, plan auto with all the memory and disk there is, more ranks that
    divide parameters and states, and as many GPUs with more memory.
    """
    tries = [*_tries(first, run, replay), *_elsewhere(first, run, replay)]
    fits = [tried for tried in tries if not tried.missing]
    return min(fits, key=lambda tried: (tried.machine.ranks, tried.device_hours, len(tried.changes)), default=None)


def _tries(first: Forecast, run: Described, replay: Replay) -> Iterator[Forecast]:
    machine, work = first.machine, run.work
    ranks = machine.ranks
    while ranks <= max(_MOST_RANKS, machine.ranks):
        shards = ranks if ranks > machine.ranks else machine.shards
        for share in {shards, ranks}:
            spread = machine._replace(ranks=ranks, shards=share)
            for engine in dict.fromkeys((first.engine, "blocks") if work.queries else (first.engine,)):
                yield from _smaller(first, run, replay, spread, engine)
        ranks *= 2


def _elsewhere(first: Forecast, run: Described, replay: Replay) -> Iterator[Forecast]:
    """On other GPUs by data sheet, at the same share of their rate, as many as now."""
    machine = first.machine
    for name, other in HARDWARE.items() if machine.peak else ():
        if machine.memory is not None and other.memory > machine.memory:
            there = machine._replace(
                name=name.upper(), memory=other.memory, host=other.host, bandwidth=other.bandwidth, link=other.link
            )
            yield from _smaller(first, run, replay, there, first.engine)


def _smaller(first: Forecast, run: Described, replay: Replay, machine: Machine, engine: str) -> Iterator[Forecast]:
    """With smaller and smaller micro-batches."""
    work, least = run.work, replay
    if work.queries:
        spare = 2 * work.matter.state // machine.shards  # on their way to disk and back
        memory = max(0, machine.host - machine.base - spare)
        disk = max(0, machine.disk - (2 + work.queries) * spare)
        least = dataclasses.replace(replay, plan="auto", slots=None, memory=memory, disk=disk)
    rows = -(-work.steps.largest[0] // machine.ranks)
    while True:
        for given in (replay, least):
            try:
                layout = _layout(run, given, machine) if work.queries else None
            except ValueError:
                continue
            pace = _repaced(first, run, machine, engine, rows)
            tried = forecast(work, machine, layout, pace, engine, rows)
            yield dataclasses.replace(tried, changes=_changes(first, tried, layout))
        if rows == 1:
            return
        rows = -(-rows // 2)


def _repaced(first: Forecast, run: Described, machine: Machine, engine: str, rows: int) -> Pace | None:
    """By arithmetic; a measured pace keeps its measure, in proportion to the arithmetic's units."""
    if machine.rate is not None:
        return pace_by_rate(run.work, machine, engine, rows)
    old = first.pace
    if old is None:
        return None
    even = machine._replace(rate=1e12)
    was = pace_by_rate(run.work, first.machine._replace(rate=1e12), first.engine, first.rows)
    now = pace_by_rate(run.work, even, engine, rows)
    step, again, reverse, query = (x * b / a if a else x for x, a, b in zip(old[:4], was[:4], now[:4]))
    return Pace(step, again, reverse, query, old.before)


def _changes(first: Forecast, tried: Forecast, layout: Layout | None) -> tuple[str, ...]:
    changes = [f"--hardware {tried.machine.name.lower()}"] if tried.machine.name != first.machine.name else []
    if tried.engine != first.engine:
        changes.append(f"--engine {tried.engine}")
    if tried.rows * tried.machine.ranks < first.rows * first.machine.ranks:
        changes.append(f"--train.micro_batch_size {tried.rows * tried.machine.ranks}")
    if tried.machine.ranks != first.machine.ranks or tried.machine.shards != first.machine.shards:
        how = "shard" if tried.machine.shards > 1 else "replicate"
        several = f", {tried.machine.replicas} replicas" if tried.machine.replicas > 1 else ""
        changes.append(f"{tried.machine.ranks} ranks, {how}{several}")
    old = first.layout
    if layout is not None and (old is None or old.kind != layout.kind or old.cost != layout.cost):
        kept = sum(size for name, size in tried.host.items() if name == "states and gradients kept")
        changes.append(f"--replay.plan {layout.kind}, {layout.cost.slots} states in {kept / 1e9:.3g} GB of host memory")
    return tuple(changes)
