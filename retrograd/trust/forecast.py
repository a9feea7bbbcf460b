"""What LDS to expect of a run, from at most six retrainings: candidates, from removals of a few sets, half and whole.

    p_s = −τ·v_s      h_s = φ(w − v_s/2) − φ(w)      m_s = φ(w − v_s) − φ(w)          S sets s, nats

v_s are the data weights of a set that is left out. If φ were linear, p = 2h = m. A part of m that all sets share moves
no rank, so spreads are taken over the sets, of each query: c(x) = x − mean_s x.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

__all__ = ["CANDIDATES"]

Measure = Callable[[np.ndarray, np.ndarray, np.ndarray], float]


def few_sets(predicted: np.ndarray, half: np.ndarray, whole: np.ndarray) -> float:
    """Pearson's correlation of p with m over the sets, mean over the queries."""
    return float(np.mean([_pearson(predicted[:, k], whole[:, k]) for k in range(whole.shape[1])]))


def few_halves(predicted: np.ndarray, half: np.ndarray, whole: np.ndarray) -> float:
    """Pearson's correlation of p with h over the sets, mean over the queries."""
    return few_sets(predicted, half, half)


def pooled(predicted: np.ndarray, half: np.ndarray, whole: np.ndarray) -> float:
    """Correlation of c(p) with c(m) over sets and queries at once, each query scaled to its own spread of m."""
    scale = _spread(whole).std(0)
    return _pearson((_spread(predicted) / scale).ravel(), (_spread(whole) / scale).ravel())


def residual(predicted: np.ndarray, half: np.ndarray, whole: np.ndarray) -> float:
    """1 − ‖c(m − p)‖/‖c(m)‖."""
    return 1 - _share(whole - predicted, whole, _spread)


def curvature(predicted: np.ndarray, half: np.ndarray, whole: np.ndarray) -> float:
    """1 − ‖m − 2h‖/‖m‖ over three sets: needs no scores."""
    return 1 - _share(whole[:3] - 2 * half[:3], whole[:3], lambda x: x)


def curvature_spread(predicted: np.ndarray, half: np.ndarray, whole: np.ndarray) -> float:
    """1 − ‖c(m − 2h)‖/‖c(m)‖ over three sets: needs no scores."""
    return 1 - _share(whole[:3] - 2 * half[:3], whole[:3], _spread)


def extrapolated(predicted: np.ndarray, half: np.ndarray, whole: np.ndarray) -> float:
    """Correlation of c(4h − m), which is p if φ is quadratic along v, with c(m), over three sets: needs no scores."""
    return pooled(4 * half[:3] - whole[:3], half[:3], whole[:3])


def half_and_whole(predicted: np.ndarray, half: np.ndarray, whole: np.ndarray) -> float:
    """Correlation of c(p) with c(m) and c(2h) at once, over three sets."""
    scale = _spread(whole[:3]).std(0)
    both = np.concatenate([_spread(whole[:3]), _spread(2 * half[:3])]) / scale
    return _pearson(np.concatenate([_spread(predicted[:3])] * 2).ravel() / np.tile(scale, 6), both.ravel())


CANDIDATES: dict[str, Measure] = {
    "few_sets": few_sets, "few_halves": few_halves, "pooled": pooled, "residual": residual, "curvature": curvature,
    "curvature_spread": curvature_spread, "extrapolated": extrapolated, "half_and_whole": half_and_whole,
}  # fmt: skip
"""Each takes p, h and m, [S, K], S = 6, and uses at most six retrainings of them."""


def _spread(x: np.ndarray) -> np.ndarray:
    return x - x.mean(0)


def _share(part: np.ndarray, whole: np.ndarray, of: Callable[[np.ndarray], np.ndarray]) -> float:
    """‖of(part)‖/‖of(whole)‖, mean over the queries."""
    return float(np.mean(np.linalg.norm(of(part), axis=0) / np.linalg.norm(of(whole), axis=0)))


def _pearson(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a, b)[0, 1])
