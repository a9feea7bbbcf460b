"""What LDS to expect of a run, from six retrainings: its scores against random removals of a tenth of the documents.

    r = mean over query columns of Pearson's correlation of −Σ_s τ with φ(w, 0 on s) − φ(w), over the six sets s

What r is worth was found on a grid of small recipes whose LDS is known from other sets (`bench/forecast.py`, and
docs/validation.md). Of the candidates there, curvature along half and whole removals among them, none was surely
better. The expected LDS is a mean over the grid's recipes, weighted by how near their r is, both in Fisher's
z = artanh r, which tells apart what is near 1. Its range holds nine tenths of the weights, and the nearest three.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console

from retrograd.runs.files import write_json
from retrograd.runs.run_folder import Opened
from retrograd.settings.commands import ValidateConfig
from retrograd.trust.evidence import stored_scores
from retrograd.trust.left_out import agreement, predicted
from retrograd.trust.retrain import conditions_of
from retrograd.trust.sets import wanted_sets
from retrograd.trust.validate import bank_of, carry_out, stackable

__all__ = ["Forecast", "correlation", "expectation", "expected", "forecast", "read_forecast"]

SETS, SHARE, SEED = 6, 0.1, 1
WIDTH = 0.25  # of the weights, in z: the grid's own LDS came out nearest with it, each recipe left out in turn
SURE = 0.5  # a rank correlation whose interval does not lie above this is no ground for an expectation
FILE = "forecast.json"

# r and LDS of the grid's recipes, and how r ranked LDS: Spearman's correlation with its 95 % interval, over the grid
# and over recipes that were held out. Printed by bench/forecast.py.
GRID: tuple[tuple[float, float], ...] = (
    (0.971, 0.968), (0.992, 0.979), (0.91, 0.905), (0.948, 0.782), (0.642, 0.259), (0.877, 0.872),
    (0.945, 0.853), (0.984, 0.982), (0.983, 0.97), (0.966, 0.944), (0.927, 0.896), (0.972, 0.977),
    (0.409, 0.58), (0.95, 0.975), (0.971, 0.968), (0.952, 0.966), (0.5, 0.727), (0.98, 0.986),
    (0.991, 0.969), (0.999, 0.999), (0.989, 0.982), (0.173, 0.15), (0.309, -0.243), (0.175, -0.089),
    (-0.081, -0.24), (0.999, 0.997), (-0.625, -0.606), (0.493, 0.666), (0.546, 0.094), (0.985, 0.935),
    (0.917, 0.532),
)  # fmt: skip
RANKED = (0.924, 0.817, 0.963)
HELD_OUT = (0.829, 0.0, 1.0)


class Forecast(NamedTuple):
    """Of a run: r, and the LDS to expect with its range, None where nothing can be expected. told: in words."""

    correlation: float | None
    expected: float | None
    low: float | None
    high: float | None
    told: str


def forecast(run: Opened, console: Console) -> Forecast:
    """Retrain without six sets, and say what LDS to expect; from the file if it is there.

    The retrainings join the run's bank. The run is of its own queries alone, and its folder is held.

    Raises:
        RunError: If retraining with everything does not reproduce the run.
    """
    known = read_forecast(run.folder, run.loaded.identity)
    if known is not None:
        return known
    measured = _measured(run, console)
    about = {"sets": SETS, "fraction": SHARE, "grid": {"recipes": len(GRID), "ranked": RANKED, "held_out": HELD_OUT}}
    write_json(run.folder / FILE, {"identity": run.loaded.identity, **measured._asdict(), **about})
    return measured


def read_forecast(folder: Path, identity: str) -> Forecast | None:
    """The forecast of a run of this identity, if one was made; what the grid says is said anew."""
    path = folder / FILE
    if not path.exists():
        return None
    stored = json.loads(path.read_text(encoding="utf8"))
    if stored["identity"] != identity or not stored.keys() >= set(Forecast._fields):
        return None
    known = Forecast(**{name: stored[name] for name in Forecast._fields})
    return known if known.correlation is None else expected(known.correlation)


def correlation(prediction: np.ndarray, measurement: np.ndarray) -> float:
    """r of predicted and measured changes, [sets, K] each; NaN where a column does not vary."""
    columns = range(prediction.shape[1])
    return float(np.mean([agreement(prediction[:, k], measurement[:, k]).pearson for k in columns]))


def expected(r: float) -> Forecast:
    """What the grid says of r."""
    on_grid = (
        f"over {len(GRID)} recipes that ranked LDS with {_interval(RANKED)}, held-out ones with {_interval(HELD_OUT)}"
    )
    seen = f"{SETS} removals of a tenth of the documents correlate with the scores at {r:.3f}"
    if RANKED[1] <= SURE:
        words = f"no forecast: {seen}, and {on_grid}, which is no ground for one. `retrograd validate` tells."
        return Forecast(r, None, None, None, words)
    middle, low, high = expectation(r, GRID)
    words = (
        f"expect LDS about {middle:.2f} ({low:.2f} to {high:.2f} in a grid's recipes like it): {seen}; {on_grid}. "
        "`retrograd validate` tells."
    )
    return Forecast(r, middle, low, high, words)


def expectation(r: float, grid: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
    """(expected, low, high) LDS of a run with r, from recipes' r and LDS: Nadaraya and Watson's estimate in z."""
    known, lds = np.array(sorted(grid, key=lambda pair: pair[1])).T
    apart = np.abs(_z(known) - _z(r))
    weights = np.exp(-((apart / WIDTH) ** 2) / 2)
    weights /= weights.sum()
    middle = math.tanh(weights @ _z(lds))
    near = [*lds[np.searchsorted(weights.cumsum(), (0.05, 0.95))], *lds[np.argsort(apart)[:3]], middle]
    return middle, float(min(near)), float(max(near))


def _measured(run: Opened, console: Console) -> Forecast:
    scores, threads = stored_scores(run), torch.get_num_threads()
    config = ValidateConfig(run.folder, subsets=SETS, fraction=(SHARE,), seed=SEED)
    sets = wanted_sets(config, run, scores)
    if len({left_out.key for left_out in sets}) < SETS:
        words = f"no forecast: there are no {SETS} different sets of a tenth of so few documents."
        return Forecast(None, None, None, None, words)
    conditions = stackable(run, conditions_of(run.manifest, SETS, 1, 0), config, console)
    bank = bank_of(run, "-forecast")
    try:
        torch.set_num_threads(conditions.threads)
        carry_out(run, sets, bank, conditions, False, console)
    finally:
        torch.set_num_threads(threads)
    failed = sum(left_out.key not in bank.known for left_out in sets)
    if failed:
        words = f"do not act on these scores: {failed} of {SETS} retrainings without a tenth of the documents diverged."
        return Forecast(None, None, None, None, words)
    weights = run.loaded.training.weights
    prediction = np.array([predicted(scores, weights, left_out.places).numpy() for left_out in sets])
    r = correlation(prediction, np.array([np.subtract(*bank.known[left_out.key][:2]) for left_out in sets]))
    if math.isnan(r):
        return Forecast(None, None, None, None, "no forecast: a query does not change, or is predicted not to.")
    return expected(r)


def _z(r: Any) -> Any:
    """Fisher's z, of at most |r| = 0.9995: a grid's figures have three digits."""
    return np.arctanh(np.clip(r, -0.9995, 0.9995))


def _interval(ranked: tuple[float, float, float]) -> str:
    return f"{ranked[0]:.2f} [{ranked[1]:.2f}, {ranked[2]:.2f}]"
