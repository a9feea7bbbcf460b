"""Progress bars with rate and time left, fed by the events of a trajectory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from retrograd.core.sweep import Event, Reversed, first_time

__all__ = ["Bars", "counting", "overall", "progress_goes_to"]

_told: ContextVar[Callable[[str], None] | None] = ContextVar("told", default=None)


@contextmanager
def progress_goes_to(tell: Callable[[str], None]) -> Iterator[None]:
    """Within it bars are not drawn: `tell` gets each as a text, whenever something has gone on, and may raise."""
    before = _told.set(tell)
    try:
        yield
    finally:
        _told.reset(before)


def _tell(name: str, done: float, total: float | None, note: str) -> None:
    tell = _told.get()
    if tell is not None:
        tell(f"{name} {done:g}/{total or 0:g} {note}".strip())


class Bars:
    """A bar for training and one for the reverse sweep, on standard error.

    Args:
        steps: Training steps.
        console: Where to draw; standard error when None.
        within: What this is a part of, which the bars name; they are gone when it is done.
    """

    def __init__(self, steps: int, console: Console | None = None, *, within: str = "") -> None:
        self.steps, self.tasks, self.within = steps, dict[str, TaskID](), within
        self.progress = _progress(console, transient=bool(within))

    def __enter__(self) -> Bars:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def __call__(self, event: Event) -> None:
        """Move the bar that the event belongs to."""
        if isinstance(event, Reversed):
            self.move("reverse", self.steps - event.step, f"|λ| {float(event.norm.max()):.3g}")
        elif first_time(event):
            self.move("train", event.step + 1, f"loss {event.outcome.loss:.4f}")
        elif (reverse := self._named("reverse")) in self.tasks:
            self.progress.update(self.tasks[reverse], note=f"replaying step {event.step}")
            _tell("replay", event.step, self.steps, "")

    def move(self, name: str, done: int, note: str = "", total: int | None = None, unit: str = "steps") -> None:
        """Move any bar, `steps` long if no total is given; it appears when it first moves."""
        name = self._named(name)
        if name not in self.tasks:
            total = self.steps if total is None else total
            self.tasks[name] = self.progress.add_task(name, total=total, completed=done - 1, rate="", note="")
        task = next(task for task in self.progress.tasks if task.id == self.tasks[name])
        rate = f"{task.speed:.2f} {unit}/s" if task.speed else ""
        self.progress.update(self.tasks[name], completed=done, rate=rate, note=note)
        _tell(name, done, task.total, note)

    def _named(self, name: str) -> str:
        return f"{self.within} {name}".strip()


@contextmanager
def counting(name: str, total: int, unit: str = "trainings", console: Console | None = None) -> Iterator[Callable]:
    """A bar for things that are counted, with their rate a minute; yields a function of how many more are done."""
    progress = _progress(console)
    task = progress.add_task(name, total=total, rate="", note="")

    def tick(more: int = 1, note: str = "") -> None:
        speed = progress.tasks[task].speed
        rate = f"{60 * speed:.1f} {unit}/min" if speed else ""
        progress.update(task, advance=more, rate=rate, note=note)
        _tell(name, progress.tasks[task].completed, total, note)

    with progress:
        yield tick


@contextmanager
def overall(name: str, console: Console | None = None) -> Iterator[Progress]:
    """One bar, for whoever moves it itself."""
    progress = _progress(console)
    progress.add_task(name, total=None, rate="", note="")
    with progress:
        yield progress


def _progress(console: Console | None, *, transient: bool = False) -> Progress:
    return Progress(
        TextColumn("{task.description:<8}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console or Console(stderr=True, quiet=_told.get() is not None),
        transient=transient,
    )
