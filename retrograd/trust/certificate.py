"""The certificate of a run: what was checked, how large the error was, and what could not be checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor

from retrograd.runs.errors import RunError

__all__ = ["REQUIRED", "Check", "attempt", "certified", "compare", "missing", "record", "table", "told"]

REQUIRED = (
    "scores file", "inputs", "objective", "states", "replay", "query", "adjoint", "retraining",
    "float64 adjoint", "float64 retraining",
)  # fmt: skip
"""What has to have passed before a run is certified; what did not run is missing by its name."""

Verdict = Literal["passed", "failed", "not checked"]
_COLOURS = {"passed": "green", "failed": "bold red", "not checked": "yellow"}


@dataclass(frozen=True)
class Check:
    """One line of a certificate. error and tolerance are relative; None where a check has no number."""

    name: str
    verdict: Verdict
    words: str
    error: float | None = None
    tolerance: float | None = None


def missing(checks: Sequence[Check]) -> list[str]:
    """The required checks that have no line that passed, or have one that could not be checked."""
    seen = {verdict: {check.name for check in checks if check.verdict == verdict} for verdict in get_args(Verdict)}
    settled = seen["failed"] | (seen["passed"] - seen["not checked"])
    return [name for name in REQUIRED if name not in settled]


def certified(checks: Sequence[Check]) -> Literal["certified", "partly certified", "failed"]:
    """The verdict on a run."""
    if any(check.verdict == "failed" for check in checks):
        return "failed"
    return "partly certified" if missing(checks) else "certified"


def compare(
    name: str, what: str, predicted: Tensor, measured: Tensor, noise: Tensor, scale: Tensor, tolerance: float
) -> list[Check]:
    """Compare slopes of K query columns along D directions, all arguments [D, K].

    A column passes if along some direction its error is within the tolerance and the noise small enough to tell. An
    error beyond both the tolerance and eight times the noise fails. Columns that noise hides are listed as not checked.

    Args:
        what: The two sides, in words.
        noise: Error that `measured` may have by itself.
        scale: What errors are relative to; where it is 0, the measured slope.
    """
    scale = torch.where(scale > 0, scale, measured.abs().clamp_min(torch.finfo(scale.dtype).tiny))
    error, noise = (predicted - measured).abs() / scale, noise / scale
    bad = ~(error <= torch.clamp(8 * noise, min=tolerance)) & torch.isfinite(noise)
    sure = (error <= tolerance) & (noise <= tolerance / 2)
    columns = f"{predicted.shape[1]} query column{'s' if predicted.shape[1] > 1 else ''}"
    if bad.any():
        worst = float(torch.where(bad, error, 0).nan_to_num(torch.inf).max())
        words = f"{what}: they differ for {int(bad.any(0).sum())} of {columns}; noise explains {_number(noise, bad)}"
        return [Check(name, "failed", words, worst, tolerance)]
    checks, decided = [], sure.any(0)
    if decided.any():
        worst = float(error[sure].max())
        which = columns if decided.all() else f"{int(decided.sum())} of {columns}"
        seen = torch.where(sure, tolerance * scale / predicted.abs(), torch.inf).min(0).values[decided].max()
        words = (
            f"{what}: equal for {which}, noise {_number(noise, sure)}; a factor of 1 ± {float(seen):.1e} would be seen"
        )
        checks.append(Check(name, "passed", words, worst, tolerance))
    if not decided.all():
        hidden = noise[:, ~decided].min(0).values.max()
        words = f"{what}: for {int((~decided).sum())} of {columns} "
        if torch.isinf(hidden):
            words += "training is too rough, or its rounding too large, at every size of step that was tried"
        else:
            words += f"noise of {float(hidden):.1e} is above half the tolerance, or explains the difference"
        checks.append(Check(name, "not checked", words))
    return checks


def attempt(name: str, make: Callable[[], Iterable[Check]]) -> list[Check]:
    """The checks that `make` makes; an error inside becomes a line of its own, so that the others go on.

    A file that cannot be read fails; anything else could not be checked.
    """
    try:
        return list(make())
    except (RunError, OSError) as error:
        return [Check(name, "failed", told(error))]
    except Exception as error:  # a certificate has to say what it could not see
        return [Check(name, "not checked", f"stopped by {told(error)}")]


def told(error: BaseException) -> str:
    """An error in one line."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else 'no reason given'}"


def table(checks: Sequence[Check], title: str) -> Table:
    """The certificate, for people."""
    shown = Table(title=title, title_justify="left", expand=True)
    shown.add_column("check", no_wrap=True)
    shown.add_column("verdict", no_wrap=True)
    shown.add_column("error", justify="right", no_wrap=True)
    shown.add_column("tolerance", justify="right", no_wrap=True)
    shown.add_column("what", ratio=1)
    for check in checks:
        numbers = ["" if x is None else f"{x:.1e}" for x in (check.error, check.tolerance)]
        shown.add_row(check.name, Text(check.verdict, _COLOURS[check.verdict]), *numbers, Text(check.words))
    return shown


def record(checks: Sequence[Check]) -> list[dict[str, Any]]:
    """The certificate, for programs."""
    return [dataclasses.asdict(check) for check in checks]


def _number(noise: Tensor, where: Tensor) -> str:
    return f"{float(noise[where].max()):.1e}"
