"""A session of training: THE caller of the loop, with all that is told of it on the way.

    with open_session(setup, run, manifest, replay, log=…, watch=…) as session:
        final = session.train()
        …                                               # for an attributed run: its query, then session.reversing()

A session owns bars, journal, loggers and the manifest's phases. Whoever else looks on, such as evaluation on the way,
is handed in as a watcher: it stands above this room.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Protocol, runtime_checkable

from rich.console import Console
from torch import Tensor

from retrograd.core.step import State
from retrograd.core.sweep import Event
from retrograd.parallel.split import Noting
from retrograd.runs.journal import Journal
from retrograd.runs.loggers import Logger, open_loggers
from retrograd.runs.manifest import Manifest
from retrograd.runs.progress import Bars
from retrograd.runs.run_folder import describe
from retrograd.runs.setup import Setup
from retrograd.runs.states.budget import Replay
from retrograd.runs.trajectory import Trajectory

__all__ = ["Session", "Watcher", "open_session", "train"]


@runtime_checkable
class Watcher(Protocol):
    """What looks on while a session trains; entered for the training alone, not for the way back.

    wanted: The steps whose states it looks at.
    """

    @property
    def wanted(self) -> Collection[int]: ...

    def __call__(self, event: Event) -> None:
        """See an event, before the journal has its line."""

    def at(self, state: State) -> None:
        """See the first state and the final one, which no event shows where training had begun or was done."""

    def show(self, console: Console) -> None:
        """Print what was found."""

    def __enter__(self) -> object: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Session:
    """A trajectory in a run's folder, with bars, journal and manifest. See `open_session`."""

    def __init__(
        self,
        setup: Setup,
        run: Path,
        manifest: Manifest,
        replay: Replay,
        bars: Bars,
        loggers: Sequence[Logger] = (),
        journal: Path | None = None,
        watch: Callable[[Session], Watcher] | None = None,
    ) -> None:
        self.setup, self.run, self.manifest, self.bars = setup, run, manifest, bars
        engine = setup.training.engine
        noting = engine if isinstance(engine, Noting) else getattr(engine, "objective", None)
        noted = noting.noted if isinstance(noting, Noting) else dict
        self.journal = Journal(journal or run / "metrics.jsonl", setup.training.recipe.optimizer, loggers, noted)
        self.watcher = watch(self) if watch is not None else None
        shown = () if self.watcher is None else self.watcher.wanted
        logs = [self.journal.path]
        self.trajectory = setup.trajectory(replay, run / "checkpoints", self._observe, logs, shown=shown)

    @property
    def steps(self) -> int:
        return len(self.setup.stream)

    def train(self) -> State:
        """The final state: trained from the start or from where a kill left it, or read if that is done."""
        self.journal.begin(self.trajectory.durable)
        self.manifest.update(replay=describe(self.trajectory.layout))
        with self.manifest.phase("train"):
            if self.watcher is None:
                return self.trajectory.train()
            with self.watcher:
                self.watcher.at(self.trajectory.first())
                final = self.trajectory.train()
                self.watcher.at(final)
            return final

    @contextmanager
    def reversing(self, key: str = "", label: str = "reverse") -> Iterator[Trajectory]:
        """The trajectory, to be reversed in a phase of this label, with its journal resumed.

        The gradient goes to the trajectory itself, so that only the sweep holds it, and for its first step only.
        """
        with self.manifest.phase(label):
            self.journal.resume(self.trajectory.durable, key)
            yield self.trajectory

    def show(self, console: Console) -> None:
        """Print what the watcher found."""
        if self.watcher is not None:
            self.watcher.show(console)

    def _observe(self, event: Event) -> None:
        self.bars(event)
        if self.watcher is not None:  # first: a step is evaluated before its line can be durable
            self.watcher(event)
        self.journal(event)


@contextmanager
def open_session(
    setup: Setup,
    run: Path,
    manifest: Manifest,
    replay: Replay,
    *,
    log: Sequence[str] = (),
    journal: Path | None = None,
    watch: Callable[[Session], Watcher] | None = None,
) -> Iterator[Session]:
    """A session in a run's folder, which is locked by whoever opens it.

    Args:
        setup: What is trained.
        run: The folder.
        manifest: Of the run; gets the phases.
        replay: Which states are kept for the way back.
        log: Viewers of experiments that also get the journal's numbers.
        journal: metrics.jsonl; the run's own when None.
        watch: Makes who looks on, once journal and bars are there.
    Raises:
        ValueError: If the watcher refuses what it finds in the journal.
        RunError: If the folder holds another run, or the machine fails.
    """
    with _settled(), open_loggers(log, run) as loggers, Bars(len(setup.stream)) as bars:
        yield Session(setup, run, manifest, replay, bars, loggers, journal, watch)


def train(
    setup: Setup,
    folder: Path,
    replay: Replay,
    observe: Callable[[Event], None] = lambda event: None,
    *,
    weights: Tensor | None = None,
    identity: str | None = None,
) -> State:
    """The final state of a training that is part of something larger: without journal, manifest and bars of its own.

    Arguments as for `Setup.trajectory`.
    """
    return setup.trajectory(replay, folder, observe, weights=weights, identity=identity).train()


@contextmanager
def _settled() -> Iterator[None]:
    """Collections of garbage leave out what is there already: libraries and a model are some 100,000 objects."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
