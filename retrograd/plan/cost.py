"""Time, memory and disk of a run, on integers and rates. The arithmetic is docs/plan.md's, section by section.

In units of a forward pass F a gradient is 3, and with h multiplications of a token in the vocabulary head, b in the
layers and K queries a pullback is

    double  7K·h + (3 + 6K)·b          blocks  (1 + 6K)·h + (5 + 8K)·b

where the moments give the gradient back, and 3 more where it is computed again and does not fall out of the graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from retrograd.core import plan as plans
from retrograd.plan.machine import Machine
from retrograd.plan.work import Model, Work
from retrograd.proofs.memory import Sizes, held_in_pieces, held_whole
from retrograd.runs.states.budget import Layout

__all__ = [
    "Forecast",
    "Kept",
    "Pace",
    "apart_bytes",
    "device_bytes",
    "floor_of",
    "forecast",
    "pace_by_rate",
    "pullback_units",
    "query_units",
    "step_bytes",
]

STREAM = 0.8  # share of a memory's bandwidth that elementwise work reaches: a guess


class Pace(NamedTuple):
    """Seconds of a step, of one taken again, of a pullback, of all queries, and before the first step."""

    step: float
    again: float
    reverse: float
    query: float
    before: float = 0.0


class Kept(NamedTuple):
    """Bytes of states and gradients that are held in host memory and on disk, at most at once.

    moved, written: bytes that go to the host and back, and to disk and back, in the whole run.
    """

    memory: int
    disk: int
    moved: int
    written: int


@dataclass(frozen=True)
class Forecast:
    """What a run takes, a rank.

    Args:
        work, machine: Of what, on what.
        engine, rows: What differentiates a step, and the rows of a micro-batch on each rank.
        layout: What is kept of the run; None where it has no way back.
        seconds: By phase; empty where no time is known.
        floor: Seconds of the arithmetic alone at the data sheet's rate, or at the rate given.
        device, host, disk: Bytes by what they are of. On a CPU all memory is the host's.
        changes: What was changed to make it fit.
        known: Whether the bytes of activations are; where not, none are counted.
        pace: Seconds by step, if known.
        peak: Bytes that the process has taken at most before the first step, where that was done here.
    """

    work: Work
    machine: Machine
    engine: str
    rows: int
    layout: Layout | None
    seconds: dict[str, float]
    floor: float | None
    device: dict[str, int]
    host: dict[str, int]
    disk: dict[str, int]
    changes: tuple[str, ...] = ()
    known: bool = True
    pace: Pace | None = None
    peak: int = 0

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    @property
    def device_hours(self) -> float:
        return self.total * self.machine.ranks / 3600

    @property
    def host_peak(self) -> int:
        """Bytes of host memory at the peak."""
        return max(self.peak, sum(self.host.values()))

    @property
    def missing(self) -> dict[str, int]:
        """Bytes that are lacking, of device, host and disk; empty where it fits."""
        there = {"device": self.machine.memory, "host": self.machine.host, "disk": self.machine.disk}
        needed = {"device": sum(self.device.values()), "host": self.host_peak, "disk": sum(self.disk.values())}
        lacking = {name: needed[name] - size for name, size in there.items() if size is not None}
        return {name: size for name, size in lacking.items() if size > 0}


def pullback_units(work: Work, engine: str, *, parts: int) -> float:
    """Of a pullback, in forward passes."""
    k, head, body = work.queries, work.model.head, work.model.body
    double, blocks = 7 * k * head + (3 + 6 * k) * body, (1 + 6 * k) * head + (5 + 8 * k) * body
    again = 3.0 if work.matter.again and not (engine == "double" and parts == 1) else 0.0
    return (double if engine == "double" else blocks) / max(1, head + body) + again


def floor_of(work: Work) -> float:
    """Operations of the method at the least: 3 units to train, 3 + 6K to pull back, 3 for the queries."""
    back = 3 + 6 * work.queries if work.queries else 0
    return (3 + back) * work.products + 3 * work.asked


def pace_by_rate(work: Work, machine: Machine, engine: str, rows: int) -> Pace:
    """Seconds by arithmetic: matrix work at the rate, and elementwise work at the memory's bandwidth, if known."""
    assert machine.rate is not None, "a rate is given, or a GPU that has one"
    steps, k, matter = max(1, work.steps.steps), work.queries, work.matter
    unit = work.products / steps / machine.ranks / machine.rate
    state, params = matter.state / machine.shards, matter.params / machine.shards
    slow = (machine.bandwidth or float("inf")) * STREAM
    references = work.references * unit
    update = (3 * state + 2 * params) / slow  # state and gradient read, the next written and digested
    pulled = (state + k * (2 * state + 6 * params)) / slow
    parts = -(-work.steps.batch // (rows * machine.ranks))
    reverse = unit * pullback_units(work, engine, parts=parts) + pulled + references
    step = 3 * unit + update + references
    asked = query_units(machine) * work.asked / machine.ranks / machine.rate
    return Pace(step, step, reverse if k else 0.0, asked)


def query_units(machine: Machine) -> float:
    """Of a query, in forward passes: where parameters are divided, it goes back by parts of the leaves."""
    return 3.0 if machine.shards == 1 else 6.0


def forecast(
    work: Work, machine: Machine, layout: Layout | None, pace: Pace | None, engine: str, rows: int
) -> Forecast:
    """What a run takes with this engine and so many rows at once on each rank.

    Args:
        pace: None where nothing is to be said of time.
    """
    kept = kept_of(layout, work.matter.params // machine.shards)
    together = -(-work.steps.batch // (rows * machine.ranks)) if machine.shards > 1 else 1
    activations = work.activations(engine, rows, twice=work.queries > 0, together=together)
    on_host = machine.memory is None
    device = device_bytes(work, machine, engine, activations or 0)
    host = {"process": machine.base, "states and gradients kept": kept.memory}
    if on_host:  # what a step has done with, such as the state before it, is used again
        host = {**host, **device, "memory used again": work.matter.state // machine.shards}
    seconds = _seconds(work, machine, layout, pace, kept)
    rate = machine.peak or machine.rate
    floor = floor_of(work) / rate / machine.ranks if rate else None
    return Forecast(
        work, machine, engine, rows, layout, seconds, floor, {} if on_host else {"CUDA": machine.base, **device}, host,
        _disk(work, machine, layout, kept, sum(seconds.values())), known=activations is not None, pace=pace,
    )  # fmt: skip


def kept_of(layout: Layout | None, gradient: int) -> Kept:
    """Of a layout's slots; on their way to disk and back are one of each more."""
    if layout is None:
        return Kept(0, 0, 0, 0)
    states, state = layout.cost.slots, layout.state_bytes
    files = min(layout.on_disk, states)
    steps = sum(isinstance(action, plans.Reverse) for action in layout.plan)
    gradients = 0 if layout.gradients_on_disk is None else steps
    written = min(layout.gradients_on_disk or 0, gradients)
    memory = (states - files) * state + (gradients - written) * gradient
    memory += 2 * state * (files > 0) + 2 * gradient * (written > 0)
    moved = (layout.cost.snapshots + layout.cost.restores) * state + 2 * gradients * gradient
    on_disk = max(0, files - 1) * state + written * gradient  # the first state is never written
    return Kept(memory, on_disk, moved, int(moved * on_disk / max(1, states * state + gradients * gradient)))


def step_bytes(work: Work, shards: int) -> dict[str, int]:
    """Bytes beside state and activations at the peak of a step, or of its pullback.

    A step holds the state after it and a gradient. A pullback holds, of each query, what is pulled through the update
    so far (a state), ḡ and H ḡ; the moments after the step; and the gradient, where ḡ is a function of it.
    """
    state, params, k = work.matter.state // shards, work.matter.params // shards, work.queries
    forward = {"next state": state, "gradient": params}
    if not k:
        return forward
    gradient = params if work.matter.needed else 0
    back = {"moments after": state - params, "cotangents": k * state, "ḡ and H ḡ": 2 * k * params, "gradient": gradient}
    return back if sum(back.values()) > sum(forward.values()) else forward


def device_bytes(work: Work, machine: Machine, engine: str, activations: int) -> dict[str, int]:
    """Bytes where steps are taken, by what they are of, besides what a process takes anyway."""
    model, shards = work.model, machine.shards
    sizes = {"model": model.trained_bytes // (1 if work.paired else shards) + model.frozen_bytes}
    if work.references:
        sizes["reference"] = model.trained_bytes + model.frozen_bytes
    sizes["state"] = work.matter.state // shards
    sizes |= step_bytes(work, shards)
    if shards > 1 and engine == "blocks" and model.block is not None:
        # of one block parameters, and ḡ and H ḡ or the gradient, whole; the sum once more while it is exchanged; and
        # of the next one parameters and ḡ, which are on their way
        sizes["gathered"] = model.block * (2 + (4 * work.queries or 2))
    elif shards > 1:  # the same of the model while a rank passes over its rows
        sizes["gathered"] = model.trained_bytes * (1 + (2 * work.queries or 1))
    sizes["activations"] = activations
    if shards > 1:
        sizes["more before the first step, or in the query"] = max(
            0, apart_bytes(work, shards, engine) - sum(sizes.values())
        )
    return sizes


def apart_bytes(work: Work, shards: int, engine: str) -> int:
    """Bytes at the peak of what passes no rows of a step, where parameters are divided.

    The proofs have the model whole and besides, with `blocks`, an eighth of it or its largest block three times and
    then pieces and a block (`held_in_pieces`), else trees of its size (`held_whole`). The query has the parameters
    whole beside two states and its gradient in pieces and, of a part's, an eighth or a block twice.
    """
    model, k = work.model, work.queries
    state, params, whole = work.matter.state // shards, work.matter.params // shards, model.trained_bytes
    if engine == "blocks" and model.block is not None:
        part = max(whole // 8, model.block)
        proofs = max(whole + 3 * part, whole // shards + held_in_pieces(sizes_of(model), shards, model.block))
    else:
        part, proofs = whole // 8, whole + held_whole(sizes_of(model))
    query = whole + whole // shards + 2 * state + k * params + 2 * part if k else 0
    return model.frozen_bytes + max(proofs if k else whole, query)


def sizes_of(model: Model) -> Sizes:
    """For what its proofs hold."""
    return Sizes(model.trained_bytes, model.frozen_bytes, model.itemsize, model.trained + model.frozen)


def _seconds(work: Work, machine: Machine, layout: Layout | None, pace: Pace | None, kept: Kept) -> dict[str, float]:
    if pace is None:
        return {}
    steps = work.steps.steps
    seconds = {"before": pace.before, "train": steps * pace.step}
    if layout is None:
        return seconds
    back = layout.cost.replays * pace.again + steps * pace.reverse
    # copies run beside the computation, and are waited for where they take longer: half of them on each way
    copies = (kept.moved / 2 / machine.link if machine.link else 0.0,
              kept.written / 2 / machine.disk_rate if machine.disk_rate else 0.0)  # fmt: skip
    seconds["train"], back = max(seconds["train"], *copies), max(back, *copies)
    return {**seconds, "query": pace.query, "reverse": back}


def _disk(work: Work, machine: Machine, layout: Layout | None, kept: Kept, seconds: float) -> dict[str, int]:
    """Final state, query gradients and scores stay; resume points are there meanwhile, if a heartbeat passes."""
    state, params, k = work.matter.state // machine.shards, work.matter.params // machine.shards, work.queries
    sizes = {"final state": state, "states and gradients kept": kept.disk}
    beats = 2.0 if not seconds else seconds / max(1e-9, work.heartbeat)
    if beats >= 1:  # on the way forward the last and those that became slots; on the way back the last two
        slots = 0 if layout is None else int(min(1.0, beats / work.steps.steps) * (layout.cost.slots - 1))
        sizes["resume points"] = max(1 + slots, 1 + k * min(2, int(beats))) * state
    if k:
        sizes |= {"query gradients": k * params, "scores": 12 * work.scores}
    if work.exported:
        sizes["model"] = work.model.trained_bytes + work.model.frozen_bytes
    return sizes
