"""A plan as text, and as plain values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table

from retrograd.plan.cost import Forecast
from retrograd.plan.machine import Machine
from retrograd.plan.many import PlannedMany
from retrograd.plan.run import Planned
from retrograd.runs.run_folder import describe

__all__ = ["duration", "show", "show_many", "size", "values_of", "values_of_many"]


def size(count: float) -> str:
    """Bytes for people, in decimal units, as disks and GPUs are sold.

    >>> size(27_429_208_064), size(1234)
    ('27.4 GB', '1.23 kB')
    """
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count:.0f} B"


def duration(seconds: float) -> str:
    """Seconds for people.

    >>> duration(42), duration(600), duration(7200)
    ('42 s', '10 min', '2 h')
    """
    if seconds < 90:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 5400 else f"{seconds / 3600:.3g} h"


def show(planned: Planned, console: Console) -> None:
    """Print a run's plan: what it is, what it takes, and what to change where it does not fit."""
    forecast = planned.forecast
    work, machine = forecast.work, forecast.machine
    steps, model, table = work.steps, work.model, Table.grid(padding=(0, 2))
    line: Callable[[str, str], None] = lambda name, text: table.add_row(f"[bold]{name}", text)  # noqa: E731
    line("data", f"{steps.rows:,} rows; {steps.steps:,} steps of {steps.batch} rows, {steps.tokens:,} tokens, "
         f"{100 * steps.padding:.3g} % padding where rows are padded")  # fmt: skip
    line("model", f"{model.trained:,} parameters train, {size(model.trained_bytes)}"
         + (f"; {model.frozen:,} are frozen, {size(model.frozen_bytes)}" if model.frozen else ""))  # fmt: skip
    line("state", f"{size(work.matter.state)}, a gradient {size(work.matter.params)}")
    if work.queries:
        line("queries", f"{work.queries} columns that read {work.asks.tokens:,} tokens")
    line("kept", planned.why or _kept(forecast))
    line("engine", f"{forecast.engine}, {forecast.rows} rows of {steps.largest[1]} tokens at once on a rank")
    for place, parts in (("device", forecast.device), ("host", forecast.host), ("disk", forecast.disk)):
        if parts:
            line(f"{place} a rank", _parts(parts, forecast.peak if place == "host" else 0))
    if not forecast.known:
        line("", "activations are not known and not counted")
    line("time", _time(forecast))
    console.print(f"[bold]{machine.name}[/bold], {_ranks(machine)}")
    console.print(table)
    _verdict(planned, console)


def _ranks(machine: Machine) -> str:
    divided = ", parameters and states divided among them" if machine.shards > 1 else ""
    several = f" in {machine.replicas} replicas of {machine.shards}" if machine.replicas > 1 else ""
    return f"{machine.ranks} rank{'s' * (machine.ranks > 1)}{divided}{several}"


def _verdict(planned: Planned, console: Console) -> None:
    missing, remedy = planned.forecast.missing, planned.remedy
    if not missing and not planned.why:
        console.print("[green]It fits.")
        return
    lacking = " and ".join(f"{size(count)} of {name}" for name, count in missing.items())
    console.print(f"[red]It does not fit: {lacking} too little." if missing else "[red]It does not fit.")
    if remedy is None:
        console.print("Nothing that was tried (engine, micro-batches, replay plan, up to 64 ranks) makes it fit.")
    else:
        after = f": {duration(remedy.total)}, {remedy.device_hours:.3g} device hours" if remedy.seconds else ""
        console.print(f"It would with {', '.join(remedy.changes) or 'what is free given to it'}{after}.")


def show_many(planned: PlannedMany, console: Console) -> None:
    """Print the plan of a command that is many trainings."""
    table = Table(box=None, padding=(0, 1))
    for name in ("", "number", "done", "each", "left", "of a worker", "on disk", "by"):
        table.add_column(name, justify="left" if name in ("", "by") else "right", no_wrap=name != "by")
    for part in planned.parts:
        each, left = ("?", "?") if part.seconds is None else (duration(part.seconds), duration(part.left))
        sizes = (size(part.memory) if part.memory else "", size(part.disk) if part.disk else "")
        table.add_row(part.what, str(part.number), str(part.done), each, left, *sizes, part.source)
    console.print(table)
    if planned.more:
        console.print(f"At most {planned.more} tasks more are not known before some of these are done; not counted.")
    unknown = [part.what for part in planned.parts if part.seconds is None and part.number > part.done]
    console.print(
        f"{planned.workers} worker{'s' * (planned.workers > 1)}: {duration(planned.seconds)} if none waits for another"
        + (f", without {', '.join(unknown)}" if unknown else "")
        + f"; {size(planned.memory)} of memory, {size(planned.disk)} of disk."
    )
    if planned.memory > planned.host:
        console.print(f"[red]It does not fit: {size(planned.memory - planned.host)} of memory too little. "
                      "Start fewer workers, or those of another machine.")  # fmt: skip


def values_of_many(planned: PlannedMany) -> dict[str, Any]:
    """All numbers, as JSON has them."""
    return {
        "parts": [{**part._asdict(), "left": part.left} for part in planned.parts], "workers": planned.workers,
        "more": planned.more, "seconds": planned.seconds, "memory": planned.memory, "disk": planned.disk,
        "fits": planned.memory <= planned.host,
    }  # fmt: skip


def values_of(planned: Planned) -> dict[str, Any]:
    """All numbers, as JSON has them."""
    forecast = planned.forecast
    work = forecast.work
    values = {
        "machine": forecast.machine._asdict(), "steps": work.steps._asdict(), "model": work.model._asdict(),
        "state_bytes": work.matter.state, "gradient_bytes": work.matter.params, "queries": work.queries,
        "asked_tokens": work.asks.tokens, "engine": forecast.engine, "rows_at_once": forecast.rows,
        "replay": None if forecast.layout is None else describe(forecast.layout), "seconds": forecast.seconds,
        "total_seconds": forecast.total, "device_hours": forecast.device_hours, "floor_seconds": forecast.floor,
        "device_bytes": forecast.device, "host_bytes": forecast.host, "host_peak_bytes": forecast.host_peak,
        "disk_bytes": forecast.disk, "activations_known": forecast.known, "missing_bytes": forecast.missing,
        "fits": not forecast.missing and not planned.why, "changes": forecast.changes,
    }  # fmt: skip
    if planned.why:
        values["refused"] = planned.why
    if planned.remedy is not None:
        values["remedy"] = values_of(Planned(planned.remedy, None))
    return values


def _kept(forecast: Forecast) -> str:
    layout = forecast.layout
    if layout is None:
        return "a resume point: there is no way back"
    gradients = "" if layout.gradients_on_disk is None else f" and {forecast.work.steps.steps} gradients"
    again = "remade by the update alone" if layout.gradients_on_disk is not None else "taken again"
    files = f", {layout.on_disk} of them on disk" if layout.on_disk else ""
    return (
        f"plan {layout.kind}: {layout.cost.slots} states{files}{gradients}, {size(layout.held_bytes)}; "
        f"{layout.cost.replays:,} steps {again}"
    )


def _parts(parts: dict[str, int], peak: int) -> str:
    total = sum(parts.values())
    listed = ", ".join(f"{name} {size(count)}" for name, count in parts.items() if count)
    before = f"; {size(peak)} at the peak, before the first step" if peak > total else ""
    return f"{size(total)}: {listed}{before}"


def _time(forecast: Forecast) -> str:
    if not forecast.seconds:
        return "not predicted: give --rate, --hardware, or let three steps be timed"
    phases = ", ".join(f"{name} {duration(seconds)}" for name, seconds in forecast.seconds.items())
    floor = f"; the arithmetic alone is {duration(forecast.floor)} at {_rate(forecast)}" if forecast.floor else ""
    return f"{duration(forecast.total)} ({phases}), {forecast.device_hours:.3g} device hours{floor}"


def _rate(forecast: Forecast) -> str:
    rate = forecast.machine.peak or forecast.machine.rate or 0.0
    return f"{rate / 1e12:.3g}·10¹² operations a second{' a rank' if forecast.machine.ranks > 1 else ''}"
