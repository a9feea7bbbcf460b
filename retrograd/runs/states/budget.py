"""What is kept of a training for the way back, and where: chosen before the first step, on integers.

A state of AdamW is three times its parameters and a gradient is one, so with an elementwise update the gradients of all
steps and a few states take little more than a third of the memory that all states take: a state is made again from the
one before it by the update alone, at most twice each.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from retrograd.core import plan as plans
from retrograd.core import tree
from retrograd.core.optim import ELEMENTWISE
from retrograd.core.step import Recipe, State

__all__ = ["TRAINED_ONLY", "Layout", "Replay", "free_memory", "free_on", "layout", "layout_of"]

_REMADE = 0.25  # of a step's time, for a state made again; 0.28 by bench/overhead.py, 0.09 since there is accel.pool
_WORTH = 2 / 3  # of the bytes that all states take: what else is kept has to be as small, for the time it takes


@dataclass(frozen=True)
class Replay:
    """What is kept.

    Args:
        plan: "auto", "gradients" (of every step, with few states) or a kind of `plans.make`. auto takes what is
            predicted to be fastest of those that fit; on a CPU not all states where gradients take two thirds or less.
        memory, disk: Bytes that held states and gradients may take. With disk, memory takes up to two of each more: one
            on its way to disk, one read ahead. What a step has done with is used again, which takes up to a state
            more where states are on disk; with memory at 0 no more than the parameters do.
        interval: Distance between held states of the "interval" plan.
        slots: States held by the "binomial" and "gradients" plans. When None as many as fit; with gradients as many as
            it takes to make none more than twice, if they fit.
        keep: Leave what the forward run holds on disk.
        heartbeat: Seconds between durable resume points; 0 makes one at every step.
    """

    plan: str = "auto"
    memory: int = 1 << 62
    disk: int = 0
    interval: int | None = None
    slots: int | None = None
    keep: bool = False
    heartbeat: float = 60.0


TRAINED_ONLY = Replay(plan="binomial", slots=1)  # of a training without a way back: a resume point is all that is kept


@dataclass(frozen=True)
class Layout:
    """A plan with where its slots are.

    on_disk: Of the states, how many of the stack's lowest positions are on disk.
    gradients_on_disk: The same of gradients; None where they are not kept.
    held_bytes: Of all states and gradients that are held at once, at most.
    """

    kind: str
    plan: plans.Plan
    cost: plans.Cost
    on_disk: int
    state_bytes: int
    gradients_on_disk: int | None = None
    held_bytes: int = 0

    @property
    def extra(self) -> float:
        """What is taken again, in training steps."""
        return self.cost.replays * (1.0 if self.gradients_on_disk is None else _REMADE)


def layout(
    replay: Replay, steps: int, state_bytes: int, gradient_bytes: int, *, elementwise: bool, on_host: bool = True
) -> Layout:
    """Choose what is kept of a run and check that it fits.

    Args:
        elementwise: Whether the optimizer's update is: auto keeps gradients only where making a state again is cheap.
        on_host: Whether steps are taken where states are held. A GPU copies a state made again to the host and back,
            which is more than all states take; there gradients are for where those do not fit.
    Raises:
        ValueError: If it does not fit, with what would.

    >>> layout(Replay(), 64, 300, 100, elementwise=True).kind, layout(Replay(), 64, 300, 100, elementwise=False).kind
    ('gradients', 'all')
    """
    room = _Room(replay, steps, max(1, state_bytes), max(1, gradient_bytes))
    if replay.plan != "auto":
        return room.laid(replay.plan)
    gradients = room.tried("gradients") if elementwise else None
    if gradients and gradients.on_disk and not replay.keep:
        gradients = None  # states made again would be written and read again
    small = gradients is not None and gradients.held_bytes <= _WORTH * steps * state_bytes
    if gradients and small and on_host and gradients.cost.replays <= steps:
        return gradients
    fit = [way for way in (room.tried("all"), gradients, room.tried("binomial")) if way is not None]
    return min(fit, key=lambda way: way.extra) if fit else room.laid("binomial")  # which says what is missing


def layout_of(
    replay: Replay, recipe: Recipe, initial: State, steps: int, *, on_host: bool = True, share: int = 1
) -> Layout:
    """What is kept of a run that begins with this state; as `layout`.

    Args:
        share: Ranks that divide each state and gradient among them; the budgets are of one rank.
    """
    sizes = (-(-tree.nbytes(initial) // share), -(-tree.nbytes(initial.params) // share))
    return layout(replay, steps, *sizes, elementwise=isinstance(recipe.optimizer, ELEMENTWISE), on_host=on_host)


def free_memory() -> int:
    """Bytes of host memory that processes can still take; a guess of 4 GiB where the system does not tell."""
    for line in Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []:
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) * 1024
    return 4 << 30


def free_on(device: torch.device) -> int:
    """Bytes that are free where a device's tensors lie."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()


@dataclass(frozen=True)
class _Room:
    """The budgets, and what has to fit into them."""

    replay: Replay
    steps: int
    state: int
    gradient: int

    def laid(self, kind: str) -> Layout:
        tried = self.tried(kind)
        if tried is not None:
            return tried
        given = self.replay
        budget = f"--replay.disk {given.disk:,}" if given.keep else f"memory {given.memory:,} and disk {given.disk:,}"
        least = 1 if kind == "gradients" and not given.slots else self._slots(kind)
        count = self._plan(kind, least)[1].slots
        states = f"{count} state{'s' * (count > 1)} of {self.state:,} bytes"
        also = f" and {self.steps} gradients of {self.gradient:,} bytes" if kind == "gradients" else ""
        raise ValueError(
            f"plan {kind!r} holds {states}{also}, and {budget} bytes do not hold them. Raise --replay.memory or "
            "--replay.disk, or use --replay.plan auto."
        )

    def tried(self, kind: str) -> Layout | None:
        """None if it does not fit."""
        slots = self._slots(kind)
        if kind == "gradients" and not self.replay.slots:  # fewer states, for more of them made again
            slots = next((fewer for fewer in range(slots, 0, -1) if self._places(kind, fewer, fewer - 1)), 1)
        plan, cost = self._plan(kind, slots)
        forward = plan[: next(i for i, action in enumerate(plan) if isinstance(action, plans.Turn))]
        kept = sum(isinstance(action, plans.Snapshot) for action in forward) - 1
        places = self._places(kind, cost.slots, kept)
        if places is None:
            return None
        gradients = self.steps if kind == "gradients" else 0
        held = cost.slots * self.state + gradients * self.gradient
        return Layout(kind, plan, cost, places[0], self.state, places[1] if gradients else None, held)

    def _plan(self, kind: str, slots: int) -> tuple[plans.Plan, plans.Cost]:
        kind = "binomial" if kind == "gradients" else kind
        plan = plans.make(kind, self.steps, slots=slots, every=self.replay.interval)
        return plan, plans.check(plan, self.steps)

    def _slots(self, kind: str) -> int:
        """To try first."""
        memory, disk = self.replay.memory // self.state, self.replay.disk // self.state
        fit = min(disk, memory) + 1 if self.replay.keep else memory + disk
        most = plans.enough(self.steps, repeats=2) if kind == "gradients" else self.steps
        return self.replay.slots or max(1, min(fit, most))

    def _places(self, kind: str, slots: int, kept: int) -> tuple[int, int] | None:
        """How many states and gradients are on disk, or None if they do not fit.

        Memory takes states first, for they are held and restored on the way back too.

        Args:
            kept: States, besides the initial one, that the forward run holds.
        """
        memory, disk = self.replay.memory, self.replay.disk
        gradients = self.steps if kind == "gradients" else 0
        if self.replay.keep:
            places, needed = (self.steps, gradients), kept * self.state + gradients * self.gradient
        else:
            states = max(0, slots - memory // self.state)
            left = memory - (slots - states) * self.state
            places = (states, max(0, gradients - left // self.gradient))
            needed = places[0] * self.state + places[1] * self.gradient
        return places if needed <= disk else None
