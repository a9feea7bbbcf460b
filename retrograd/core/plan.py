"""Replay plans: which states to hold and which steps to take again, as data.

A sweep back through T training steps needs state t (the state before step t) for t = T-1 … 0, and training makes
them in the other order. A plan is the list of actions that bridges this with few slots, checked on integers before
any tensor moves. There is one working state and a stack of held slots; every plan here is `_sweep` with another
rule for the next state to hold.

The binomial plan is optimal: with s slots (the initial state among them) and r the least with C(s+r, s) ≥ T it takes
r·T − C(s+r, r−1) advances, the T−1 of the training run included and the Turn's own step not.

Sources: Griewank & Walther, "Algorithm 799: revolve", ACM TOMS 26(1), 2000, doi 10.1145/347837.347846.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from retrograd.core import rules

__all__ = [
    "Action",
    "Advance",
    "Cost",
    "Drop",
    "Plan",
    "Restore",
    "Reverse",
    "Snapshot",
    "Turn",
    "binomial",
    "binomial_advances",
    "check",
    "enough",
    "interval",
    "log",
    "make",
    "resumed",
    "save_all",
    "shifted",
    "sqrt",
]

# Actions are told apart by their type alone: as tuples Snapshot(3) == Drop(3), and Turn() is falsy.


class Advance(NamedTuple):
    """Take training steps start … stop-1: the working state `start` becomes `stop`."""

    start: int
    stop: int


class Snapshot(NamedTuple):
    """Hold the working state, which is `step`, in a slot."""

    step: int


class Restore(NamedTuple):
    """Make the held state `step` the working state; it stays held."""

    step: int


class Drop(NamedTuple):
    """Give up the slot that holds state `step`."""

    step: int


class Turn(NamedTuple):
    """Take the last step, evaluate the query there, and leave the working state before that step."""


class Reverse(NamedTuple):
    """Pull the cotangent back through training step `step`, whose state is the working state."""

    step: int


Action = Advance | Snapshot | Restore | Drop | Turn | Reverse
Plan = tuple[Action, ...]


class Cost(NamedTuple):
    """What a plan takes, in steps, slots and actions."""

    advances: int  # training steps of all Advance actions; the Turn's own step is not among them
    replays: int  # advances beyond the T-1 of the training run; all of them if this plan does not contain that run
    slots: int  # most states held at once
    snapshots: int  # Snapshot actions
    restores: int  # Restore actions


def check(
    plan: Iterable[Action], steps: int, *, held: Iterable[int] = (), turn: bool = True, keep: bool = False
) -> Cost:
    """Walk a plan on integers and count what it costs.

    Args:
        plan: The actions, in order.
        steps: Number of training steps T, at least 1.
        held: States already in slots. If any, the plan is a resumed one and starts with no working state. Those
            at or beyond `steps` are none of its business: it may not touch them, and they are not counted.
        turn: Whether the plan takes the query's cotangent itself; False where a cotangent exists already.
        keep: Whether slots may still be held at the end.
    Raises:
        ValueError: If an action is illegal where it stands, or steps or slots are left over at the end.

    >>> check(binomial(10, 3), 10)
    Cost(advances=15, replays=6, slots=3, snapshots=6, restores=9)
    """
    _need_positive(steps=steps)
    given = set(held)
    fresh, below = not given, {t for t in given if t < steps}
    walk = _Walk(steps, left=steps, here=0 if fresh else None, held=below, turned=not turn, slots=len(below))
    length = 0
    for length, action in enumerate(plan, 1):
        if fault := _act(walk, action):
            raise ValueError(f"illegal plan for {steps} steps: action {length - 1}, {action}: {fault}")
    if walk.left:
        unturned = "" if walk.turned else " and the Turn never came"
        raise ValueError(
            f"illegal plan: it ends after {length} actions with {walk.left} of {steps} steps not reversed{unturned}"
        )
    if walk.held and not keep:
        raise ValueError(f"illegal plan: it ends after {length} actions still holding {_some(walk.held)}")
    replays = walk.advances - (steps - 1) if fresh and turn else walk.advances
    return Cost(walk.advances, replays, walk.slots, walk.snapshots, walk.restores)


def make(kind: str, steps: int, *, slots: int | None = None, every: int | None = None) -> Plan:
    """A plan for `steps` training steps by its name.

    Args:
        kind: "all", "interval", "sqrt", "log" or "binomial".
        slots: States that may be held at once; needed by "binomial", read by no other.
        every: Distance between the states held in training; needed by "interval", read by no other.
    Raises:
        ValueError: If the kind is unknown, what it needs is missing, or a number is below 1.

    >>> make("interval", 4, every=2) == interval(4, 2)
    True
    """
    if slots is not None:
        _need_positive(slots=slots)
    if every is not None:
        _need_positive(every=every)
    match kind:
        case "all":
            return save_all(steps)
        case "sqrt":
            return sqrt(steps)
        case "log":
            return log(steps)
        case "interval":
            if every is None:
                raise ValueError("an interval plan needs `every`, the distance between held states, and got None")
            return interval(steps, every)
        case "binomial":
            if slots is None:
                raise ValueError("a binomial plan needs `slots`, how many states may be held at once, and got None")
            return binomial(steps, slots)
    raise ValueError(f"unknown kind of plan {kind!r}; the kinds are all, interval, sqrt, log, binomial")


def save_all(steps: int) -> Plan:
    """Hold every state 0 … T-1: T slots and no replay.

    >>> check(save_all(100), 100)[:3]
    (99, 0, 100)
    """
    return _fresh(steps, rules.hold_all)


def interval(steps: int, every: int) -> Plan:
    """Hold states 0, k, 2k, … in training; replay each segment once, from its base, holding all its states.

    The last segment's states are held in training already. About T/k + k slots and fewer than T replays.

    >>> check(interval(100, 10), 100)[:3]
    (180, 81, 19)
    """
    _need_positive(every=every)
    return _fresh(steps, partial(rules.hold_segment, every))


def sqrt(steps: int) -> Plan:
    """The interval plan with k = ⌈√T⌉: about 2√T slots and nearly one replay of the whole run.

    >>> check(sqrt(10_000), 10_000)[1:3]
    (9801, 199)
    """
    _need_positive(steps=steps)
    return interval(steps, math.isqrt(steps - 1) + 1)


def log(steps: int) -> Plan:
    """Recursive bisection: hold the midpoint, reverse the right half, drop it, replay into the left half.

    ⌈log₂T⌉ slots and about T·(½ log₂T − 1) replays. A binomial plan of as many slots replays less.

    >>> check(log(1024), 1024)[1:3]
    (4097, 10)
    """
    return _fresh(steps, rules.hold_middle)


def binomial(steps: int, slots: int) -> Plan:
    """The plan of fewest advances for so many slots, the initial state's among them.

    Slots beyond T-1 are of no use and are left empty. Griewank & Walther 2000.

    >>> check(binomial(250, 10), 250).advances == binomial_advances(250, 10)
    True
    """
    _need_positive(slots=slots)
    return _fresh(steps, partial(rules.hold_binomial, slots))


def binomial_advances(steps: int, slots: int) -> int:
    """Advances of the binomial plan: r·T − C(s+r, r−1), r the least with C(s+r, s) ≥ T.

    >>> binomial_advances(10, 3), binomial_advances(10, 1), binomial_advances(10, 9)
    (15, 45, 9)
    """
    _need_positive(steps=steps, slots=slots)
    repeats = rules.repeats(steps, slots)
    return repeats * steps - math.comb(slots + repeats, repeats - 1) if repeats else 0


def enough(steps: int, repeats: int) -> int:
    """The fewest slots with which a binomial plan takes no step more than `repeats` times, its first included.

    >>> enough(64, 2), enough(65, 1)
    (10, 64)
    """
    slots = 1
    while rules.repeats(steps, slots) > repeats:
        slots += 1
    return slots


def shifted(plan: Plan, by: int) -> Plan:
    """The same plan for a run whose first state is state `by` instead of state 0.

    >>> shifted((Advance(0, 2), Turn(), Reverse(2)), 10)
    (Advance(start=10, stop=12), Turn(), Reverse(step=12))
    """
    return plan if by == 0 else tuple(type(action)(*(step + by for step in action)) for action in plan)


def resumed(steps: int, held: Iterable[int], slots: int, *, turn: bool) -> Plan:
    """A plan that reverses steps 0 … T-1 from the states that outlived a crash.

    Goes down through the held states: restore one, reverse the steps above it by a binomial plan, drop it. A dropped
    base is not assumed to make room for another snapshot, since bases may lie on disk and snapshots in memory.

    Args:
        steps: Steps still to reverse, T: all of them, or those below the cotangent that outlived the crash.
        held: States in durable slots, 0 among them. Those at or beyond `steps` are not touched.
        slots: Slots free besides the held ones; may be 0.
        turn: Whether training is still to be ended and the query evaluated (True), or a cotangent exists (False).
    Raises:
        ValueError: If state 0 is not held, `steps` is below 1 or `slots` below 0.

    >>> check(resumed(100, [0, 40, 80], 4, turn=False), 100, held=[0, 40, 80], turn=False).slots
    7
    """
    _need_positive(steps=steps)
    if slots < 0:
        raise ValueError(f"slots is {slots}; it counts the free slots besides the held ones and is at least 0")
    bases = sorted({t for t in held if t < steps}, reverse=True)
    if not bases or bases[-1] != 0:
        raise ValueError(
            f"cannot resume: the states held below step {steps} are {_some(bases)}, and the lowest has to be state 0, "
            "or nothing can be replayed up to the first steps. Train again from the start."
        )
    rule = partial(rules.hold_binomial, slots + 1)
    actions: list[Action] = []
    for base, stop in zip(bases, [steps, *bases]):
        actions.append(Restore(base))
        actions.extend(_sweep(base, stop, rule, turn=turn and stop == steps))
    return tuple(actions)


def _fresh(steps: int, rule: rules.Rule) -> Plan:
    """A whole run from the working state 0."""
    _need_positive(steps=steps)
    return (Snapshot(0), *_sweep(0, steps, rule, turn=True))


def _sweep(base: int, stop: int, rule: rules.Rule, *, turn: bool) -> Iterator[Action]:
    """Reverse steps stop-1 … base from the working state `base`, which is held, and drop it at the end."""
    held, here = [base], base  # the slots are a stack: the topmost is the latest state, and the first to go
    for last in reversed(range(base, stop)):
        while here < last:
            hold = rule(here, last, len(held))
            yield Advance(here, last if hold is None else hold)
            here = last if hold is None else hold
            if hold is not None:
                held.append(hold)
                yield Snapshot(hold)
        if turn and last == stop - 1:
            yield Turn()
        yield Reverse(last)
        if held[-1] == last:
            yield Drop(held.pop())
        if held:
            here = held[-1]
            yield Restore(here)


@dataclass(slots=True)
class _Walk:
    """Where a plan being checked stands, and what it has cost so far."""

    steps: int
    left: int  # steps not reversed yet; left - 1 is the next
    here: int | None  # the working state
    held: set[int]
    turned: bool
    slots: int
    advances: int = 0
    snapshots: int = 0
    restores: int = 0


def _act(walk: _Walk, action: Action) -> str:
    """Do a legal action to the numbers and return ""; do nothing about an illegal one but say why."""
    match action:
        case Restore(step) | Drop(step) if step not in walk.held:
            return f"state {step} is not held; held are {_some(walk.held)}"
        case Restore(step):
            walk.here = step
            walk.restores += 1
        case Reverse(step):
            if not walk.turned:
                return "there is no cotangent before the Turn"
            if step != walk.left - 1:
                return f"the next step to reverse is {walk.left - 1}" if walk.left else "all steps are reversed"
            if step != walk.here:
                return _elsewhere(walk, step)
            walk.left = step
        case Advance(start, stop):
            if not 0 <= start < stop < walk.steps:
                return f"an advance goes up, within states 0 to {walk.steps - 1}"
            if start != walk.here:
                return _elsewhere(walk, start)
            walk.here = stop
            walk.advances += stop - start
        case Snapshot(step) if step in walk.held:
            return f"state {step} is held already"
        case Snapshot(step):
            if step != walk.here:
                return _elsewhere(walk, step)
            walk.held.add(step)
            walk.snapshots += 1
            walk.slots = max(walk.slots, len(walk.held))
        case Drop(step):
            walk.held.remove(step)
        case Turn():
            if walk.turned:
                return "the cotangent exists already; there is one Turn at most, and before any Reverse"
            if walk.here != walk.steps - 1:
                return _elsewhere(walk, walk.steps - 1)
            walk.turned = True
    return ""


def _elsewhere(walk: _Walk, step: int) -> str:
    return (
        f"there is no working state, {step} is needed"
        if walk.here is None
        else f"the working state is {walk.here}, not {step}"
    )


def _need_positive(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name} is {number}; it has to be at least 1")


def _some(states: Collection[int]) -> str:
    """States for an error message: the lowest few, and how many there are."""
    shown = ", ".join(map(str, sorted(states)[:8]))
    return f"{shown}, … ({len(states)} states)" if len(states) > 8 else shown or "none"
