"""The numbers of metrics.jsonl in a viewer of experiments: TensorBoard, Weights & Biases, Trackio.

A viewer mirrors the file: at each start of a run its log is written afresh from the lines that are there, then goes on
with them, so a run that was killed shows every number once. Nothing leaves the machine: wandb runs offline, trackio
writes to its local database.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import os
import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

__all__ = ["LOGGERS", "Logger", "check_loggers", "open_loggers", "scalars"]

PROJECT = "retrograd"


@runtime_checkable
class Logger(Protocol):
    """Where scalars go."""

    def log(self, phase: str, step: int, values: Mapping[str, float]) -> None:
        """Take the values, by name, of a step in a phase (train, evaluate, reverse)."""

    def close(self) -> None:
        """Write what is still on its way."""


def check_loggers(names: Sequence[str]) -> None:
    """Refuse a viewer that is unknown, not installed, or set up to send the run elsewhere.

    Raises:
        ValueError: With what to install or change.
    """
    for name in names:
        if name not in LOGGERS:
            raise ValueError(f"--log {name} is unknown; the viewers are {', '.join(LOGGERS)}")
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"--log {name} needs the package {name}: pip install 'retrograd[{name}]'")
    elsewhere = [name for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL") if os.environ.get(name)]
    if "trackio" in names and elsewhere:
        raise ValueError(
            f"--log trackio: {elsewhere[0]} is set, and the numbers would be sent to {os.environ[elsewhere[0]]}; logs "
            "stay on this machine. Unset it, and share the finished log with trackio's own commands."
        )


@contextlib.contextmanager
def open_loggers(names: Sequence[str], run: Path) -> Iterator[list[Logger]]:
    """Empty logs of a run in the viewers named, to be filled from its metrics.jsonl; closed at the end.

    Args:
        run: Folder of the run; TensorBoard and wandb write inside it.
    """
    with contextlib.ExitStack() as stack:
        loggers: list[Logger] = []
        for name in dict.fromkeys(names):
            with _quiet():
                loggers.append(LOGGERS[name](run))
            stack.callback(_close, loggers[-1])
        yield loggers


def scalars(entry: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line of metrics.jsonl by name: TASK/accuracy for tasks, terms/NAME, NAME/k for lists of several.

    >>> scalars({"phase": "reverse", "step": 3, "cotangent_norm": [1.0, 2.0]})
    {'cotangent_norm/0': 1.0, 'cotangent_norm/1': 2.0}
    >>> scalars({"phase": "train", "step": 3, "loss": 1.5, "terms": {"forget": -0.5}})
    {'loss': 1.5, 'terms/forget': -0.5}
    """
    numbers: dict[str, float] = {}
    for name, value in entry.items():
        if name == "terms":
            numbers |= {f"terms/{term}": float(x) for term, x in value.items()}
        elif name == "tasks":
            numbers |= {f"{task}/{n}": x for task, values in value.items() for n, x in scalars(values).items()}
        elif isinstance(value, list) and name not in _NO_CURVES:
            numbers |= {name if len(value) == 1 else f"{name}/{k}": float(x) for k, x in enumerate(value)}
        elif isinstance(value, (int, float)) and name not in _NO_CURVES:
            numbers[name] = float(value)
    return numbers


_NO_CURVES = ("step", "phase", "samples", "interval", "questions", "tokens", "documents", "failed", "right")


class _TensorBoard:
    """Event files in RUN/tensorboard."""

    def __init__(self, run: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        shutil.rmtree(run / "tensorboard", ignore_errors=True)
        self.writer: Any = SummaryWriter(str(run / "tensorboard"))

    def log(self, phase: str, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(f"{phase}/{name}", value, step)

    def close(self) -> None:
        self.writer.close()


class _Wandb:
    """An offline run in RUN/wandb. Its own steps only ascend and a sweep descends, so each phase has a step metric."""

    def __init__(self, run: Path) -> None:
        import wandb

        shutil.rmtree(run / "wandb", ignore_errors=True)
        settings = wandb.Settings(
            silent=True, console="off", disable_git=True, disable_code=True, x_disable_stats=True,
            x_disable_meta=True, x_disable_machine_info=True,
        )  # fmt: skip
        self.run: Any = wandb.init(
            project=PROJECT, name=run.name, id=_place(run), dir=str(run), mode="offline", settings=settings
        )
        for phase in ("train", "evaluate", "reverse"):
            self.run.define_metric(f"{phase}/*", step_metric=f"{phase}/step")

    def log(self, phase: str, step: int, values: Mapping[str, float]) -> None:
        self.run.log({f"{phase}/step": step, **{f"{phase}/{name}": value for name, value in values.items()}})

    def close(self) -> None:
        self.run.finish()


class _Trackio:
    """A run of the project in trackio's own database, TRACKIO_DIR or its usual place."""

    def __init__(self, run: Path) -> None:
        import trackio

        name = f"{run.name}-{_place(run)}"
        for old in _trackio_runs():
            if old.name == name:
                old.delete()
        self.run: Any = trackio.init(project=PROJECT, name=name, embed=False, auto_log_gpu=False, auto_log_cpu=False)

    def log(self, phase: str, step: int, values: Mapping[str, float]) -> None:
        self.run.log({f"{phase}/{name}": value for name, value in values.items()}, step=step)

    def close(self) -> None:
        self.run.finish()


def _trackio_runs() -> list[Any]:
    import trackio

    try:
        return list(trackio.Api().runs(PROJECT))
    except ValueError:  # there is no such project yet
        return []


LOGGERS: dict[str, Any] = {"tensorboard": _TensorBoard, "wandb": _Wandb, "trackio": _Trackio}
"""By package, which is also the name of the pip extra."""


def _place(run: Path) -> str:
    """The same for the same folder: a run that goes on replaces its own log and no other's."""
    return hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:8]


def _close(logger: Logger) -> None:
    with _quiet():
        logger.close()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what viewers print, and with Python's random numbers as they were: names of runs are drawn from them."""
    state = random.getstate()
    with contextlib.redirect_stdout(io.StringIO()):
        yield
    random.setstate(state)
