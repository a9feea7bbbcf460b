"""What the scores predict against what retraining measures, for sets S of left-out examples or tokens.

    predicted(S) = −Σ_{j∈S} τ_j          measured(S) = φ(w, 0 on S) − φ(w)          nats

LDS is the Spearman correlation of the two over random sets (Park et al., TRAK, arXiv:2303.14186).
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import numpy as np
import torch
from scipy import stats
from torch import Tensor

__all__ = ["Agreement", "agreement", "lds_draws", "mean_lds", "predicted", "random_subset", "reweighted", "without"]

_DRAWS, _BLOCK = 2000, 100


class Agreement(NamedTuple):
    """How prediction and measurement go together over n sets.

    lds: Spearman correlation; NaN where either does not vary.
    pearson: Pearson correlation.
    slope: Of the least-squares line, measured nats per predicted nat; 1 where the derivative has the right size.
    """

    sets: int
    lds: float
    pearson: float
    slope: float


def random_subset(members: np.ndarray, fraction: float, seed: int, number: int) -> np.ndarray:
    """Set `number` of a seed: a share of the members, ascending, at least one unless the fraction is 0.

    A function of its arguments alone, so that any machine draws the same sets.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"a subset of fraction {fraction} cannot be left out; it has to be at least 0 and below 1")
    size = max(1, round(fraction * len(members))) if fraction else 0
    draw = np.random.default_rng([seed, number, round(fraction * 1e9)])
    return np.sort(draw.choice(members, size, replace=False))


def without(weights: Tensor, left_out: np.ndarray) -> Tensor:
    """The data weights with zeros at these flat places."""
    return reweighted(weights, left_out, 0.0)


def reweighted(weights: Tensor, chosen: np.ndarray, factor: float) -> Tensor:
    """The data weights, multiplied by a factor at these flat places; 0 leaves them out."""
    changed = weights.flatten().clone()
    places = torch.from_numpy(chosen).to(changed.device)
    changed[places] = changed[places] * factor if factor else 0.0
    return changed.view_as(weights)


def predicted(scores: Tensor, weights: Tensor, left_out: np.ndarray, factor: float = 0.0) -> Tensor:
    """Σ_S (factor − 1)·w·τ [K], float64, for scores [K, *weights.shape]: −Σ_S w·τ where S is left out."""
    places = torch.from_numpy(left_out)
    change = weights.flatten().cpu()[places].double() * (1 - factor)
    return -(scores.flatten(1).cpu()[:, places].double() * change).sum(1)


def agreement(prediction: np.ndarray, measurement: np.ndarray) -> Agreement:
    """Of predictions [n] with measurements [n]."""
    n = len(prediction)
    if n < 3 or np.ptp(prediction) == 0 or np.ptp(measurement) == 0:
        return Agreement(n, np.nan, np.nan, np.nan)
    lds = float(stats.spearmanr(prediction, measurement).statistic)
    line = stats.linregress(prediction, measurement)
    return Agreement(n, lds, float(line.rvalue), float(line.slope))


def mean_lds(prediction: np.ndarray, measurement: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """Mean LDS over K queries, [n, K] each, with its 95 % interval from a bootstrap over the n sets.

    Sets are drawn again with replacement, the same ones for every query, for they share their retrainings.
    """
    n, queries = prediction.shape
    each = [agreement(prediction[:, k], measurement[:, k]).lds for k in range(queries)]
    if n < 3 or not np.isfinite(each).all():
        return float(np.mean(each)) if each else np.nan, np.nan, np.nan
    low, high = np.nanpercentile(lds_draws(prediction, measurement, seed), [2.5, 97.5])
    return float(np.mean(each)), float(low), float(high)


def lds_draws(prediction: np.ndarray, measurement: np.ndarray, seed: int = 0) -> np.ndarray:
    """The mean LDS over K queries in each draw of a bootstrap over the n sets, [draws]; NaN where nothing varies.

    The draws are a function of n and the seed, so those of two methods over the same sets are paired.

    Args:
        prediction, measurement: [n, K].
    """
    n = len(prediction)
    draw, blocks = np.random.default_rng(seed), []
    for _ in range(_DRAWS // _BLOCK):
        chosen = draw.integers(0, n, (_BLOCK, n))
        blocks.append(_correlations(_ranks(prediction[chosen]), _ranks(measurement[chosen])))
    with np.errstate(invalid="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a draw in which no query varies has no mean
        return np.nanmean(np.concatenate(blocks), axis=1)


def _ranks(values: np.ndarray) -> np.ndarray:
    return stats.rankdata(values, axis=1)


def _correlations(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Pearson correlation along axis 1 of [draws, n, K] → [draws, K]; NaN where a draw does not vary."""
    a, b = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (a * b).sum(1) / np.sqrt((a * a).sum(1) * (b * b).sum(1))
