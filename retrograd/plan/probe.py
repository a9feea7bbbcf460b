"""Three steps of a run and their pullbacks, timed: by the run's own loop, in memory, with nothing written."""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from retrograd.core import tree
from retrograd.core.optim import Params
from retrograd.core.step import Batch, State
from retrograd.core.sweep import Advanced, Event, Remade, Reversed, Turned
from retrograd.data.pairs import PairStream
from retrograd.data.stream import DataStream
from retrograd.plan.cost import Pace
from retrograd.plan.work import Work
from retrograd.query.columns import Queries
from retrograd.query.named import Asked
from retrograd.runs.files import write_tensors
from retrograd.runs.setup import Setup
from retrograd.runs.states.budget import TRAINED_ONLY, Layout, Replay
from retrograd.runs.trajectory import Ready
from retrograd.trust.ensemble import train_many

__all__ = ["disk_rate", "probe", "stack_seconds"]

STEPS = 3  # the first of each kind is a warm-up and is not counted
_ASKED = 2  # batches of a query that are timed
_FILE = 64 << 20  # bytes of a file that is timed

Clock = Callable[[], float]


@dataclass(frozen=True)
class _Typical:
    """One batch again and again: the one whose tokens are nearest to the mean."""

    stream: DataStream | PairStream
    steps: int
    at: int

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Batch:
        return self.stream[self.at]


def probe(
    setup: Setup, work: Work, asked: Sequence[Asked], layout: Layout | None, clock: Clock = time.perf_counter
) -> Pace:
    """Seconds of a step, a replayed one, a pullback, and the queries.

    Args:
        asked: The queries; their gradients are timed on their first batches.
        layout: What the run would keep: where gradients are kept, a replayed step is an update alone.
        clock: Of seconds.
    Raises:
        NonFiniteError: If a step leaves the finite numbers, as the run would.
    """
    steps = min(STEPS, work.steps.steps)
    stream = _typical(setup.stream, steps)
    ready = Ready(setup.training._replace(stream=stream), setup.initial, setup.identity)
    gradients = layout is not None and layout.gradients_on_disk is not None
    replay = TRAINED_ONLY if layout is None else Replay("gradients", slots=1) if gradients else Replay("all")
    times: dict[str, list[float]] = {}
    mark = clock()

    def observe(event: Event) -> None:
        nonlocal mark
        _settle(setup.initial)
        now = clock()
        times.setdefault(_kind(event), []).append(now - mark)
        mark = now

    trajectory = ready.trajectory(replay, observe=observe)
    final = trajectory.train()
    query = _query_seconds(final.params, asked, clock)
    if layout is not None:
        cotangent = _directions(final.params, work.queries)
        mark = clock()
        trajectory.reverse(cotangent)
    scale = work.steps.tokens / max(1, work.steps.steps) / max(1, _tokens(setup.stream, stream.at))
    step = scale * _median(times["step"])
    again = _median(times["again"]) if times.get("again") else step
    return Pace(step, again, scale * _median(times.get("reverse", [0.0])), query)


def stack_seconds(setup: Setup, work: Work, members: int, clock: Clock = time.perf_counter) -> float:
    """Of a step of so many models batched in one process, as `validate` retrains small ones."""
    stream = _typical(setup.stream, STEPS)
    weights = torch.stack([setup.training.weights] * members)
    marks = [clock()]
    training = setup.training._replace(stream=stream)
    train_many(
        training, setup.initial.params, weights, objective=setup.objective,
        observe=lambda step, losses, norms: marks.append(clock()),
    )  # fmt: skip
    return _median([b - a for a, b in itertools.pairwise(marks)])


def disk_rate(folder: Path, clock: Clock = time.perf_counter) -> float:
    """Bytes a second that a state is written with where this folder is or would be, as states are."""
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    with tempfile.TemporaryDirectory(prefix=".retrograd-plan-", dir=there) as place:
        start = clock()
        write_tensors(Path(place) / "state.safetensors", {"x": torch.zeros(_FILE // 4)}, {})
        return _FILE / max(1e-9, clock() - start)


def _typical(stream: DataStream | PairStream, steps: int) -> _Typical:
    sizes = [_tokens(stream, step) for step in range(len(stream))]
    mean = sum(sizes) / len(sizes)
    return _Typical(stream, steps, min(range(len(sizes)), key=lambda step: abs(sizes[step] - mean)))


def _tokens(stream: DataStream | PairStream, step: int) -> int:
    return int(stream.rows.lengths[stream.rows_at(step)].sum())


def _kind(event: Event) -> str:
    match event:
        case Advanced() | Turned():
            return "step"
        case Remade():
            return "again"
        case Reversed():
            return "reverse"
    raise AssertionError(event)


def _median(seconds: list[float]) -> float:
    return statistics.median(seconds[1:] or seconds)


def _directions(params: Params, queries: int) -> Params:
    """Cotangents of the size of a gradient: no query has to be asked to time its pullback."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return {name: torch.randn((queries, *x.shape), dtype=x.dtype).to(x.device) * 1e-3 for name, x in params.items()}


def _query_seconds(params: Params, asked: Sequence[Asked], clock: Clock) -> float:
    """Of all queries' values and gradients, by some batches of each."""
    total = 0.0
    for query in asked:
        parts = [part for column in query.columns for part in column.parts]
        tried = parts[: _ASKED + 1]
        seconds = []
        for part in tried:
            start = clock()
            Queries([query.columns[0]._replace(parts=[part])])(params)
            _settle(params)
            seconds.append(clock() - start)
        measured = 4 / 3 if query.record.get("kind") == "choices" else 1.0  # answers are read once more, without slopes
        total += measured * _median(seconds) * len(parts)
    return total


def _settle(value: State | Params) -> None:
    """Wait until a GPU has nothing left to do."""
    first = tree.leaves(value)[0]
    if first.device.type == "cuda":
        torch.cuda.synchronize(first.device)
