"""How a run ends before its end: the machine's failure, or somebody's wish."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

__all__ = ["STARTED_BY", "RunError", "Stop", "StoppedError", "asked_to_stop", "stoppable"]

STARTED_BY = "RETROGRAD_STARTED_BY"  # in a worker's environment: the process that it ends with


class RunError(RuntimeError):
    """The machine's fault, not the user's: a full disk, a broken file. The run folder stays intact; exit code 1.

    What a user can mend by another argument is a ValueError; exit code 2.
    """


class StoppedError(BaseException):
    """Somebody asked the process to end: exit code 143. No `except` of a task may take it for the task's failure."""


class Stop:
    """When the process was asked to end, by a signal or by the end of whoever started it; None so far."""

    def __init__(self) -> None:
        self.since: float | None = None
        self.parent = os.environ.get(STARTED_BY)

    @property
    def asked(self) -> float | None:
        """In the file system's seconds."""
        if self.since is None and self.parent is not None and os.getppid() != int(self.parent):
            self.since = time.time()
        return self.since


_current: ContextVar[Stop | None] = ContextVar("stop", default=None)


def asked_to_stop() -> bool:
    """Whether a training is to make its next state durable and end."""
    stop = _current.get()
    return stop is not None and stop.asked is not None


@contextmanager
def stoppable(*signals: signal.Signals) -> Iterator[Stop]:
    """SIGTERM and SIGUSR1, and further signals, ask to end instead of ending; a second one ends at once."""
    stop = Stop()

    def ask(number: int, frame: Any) -> None:
        if stop.since is not None:
            raise StoppedError
        stop.since = time.time()

    wanted = (signal.SIGTERM, *((signal.SIGUSR1,) if hasattr(signal, "SIGUSR1") else ()), *signals)
    before = {number: signal.signal(number, ask) for number in wanted}
    token = _current.set(stop)
    try:
        yield stop
    finally:
        _current.reset(token)
        for number, handler in before.items():
            signal.signal(number, handler)
