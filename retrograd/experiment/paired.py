"""Means over seeds and questions, with intervals that draw both again: questions and seeds are crossed.

    value      Σ_s Σ_q v_q x_sq / Σ …          v: targets of a document, ones for questions
    interval   the middle 95 % of that under counts c_s of seeds and c_q of questions, each drawn with replacement

Every seed answers the same questions, so neither seeds nor questions alone are the independent draws. Drawing both is
the pigeonhole bootstrap: Owen, Annals of Applied Statistics 1 (2007) 386; it errs on the wide side. With one seed only
questions are drawn, and the interval says nothing of other seeds. Two arms are compared by their differences, seed by
seed and question by question.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from retrograd.evaluate.intervals import Estimate

__all__ = ["crossed", "crossed_position"]

_ENTRIES = 1 << 22  # counts that are held at once


def crossed(
    values: np.ndarray, weights: np.ndarray | None = None, *, resamples: int = 4000, level: float = 0.95, seed: int = 0
) -> Estimate:
    """The mean of values over seeds and questions.

    Args:
        values: [seeds, questions].
        weights: v, [questions]; ones if not given.
    Raises:
        ValueError: If there is no value, or one is not finite.

    >>> crossed(np.array([[1.0, 1.0], [1.0, 1.0]]))
    Estimate(value=1.0, low=1.0, high=1.0)
    """
    _checked(values)
    v = np.ones(values.shape[1]) if weights is None else np.asarray(weights, dtype=np.float64)

    def mean(seeds: np.ndarray, questions: np.ndarray) -> np.ndarray:
        drawn = questions * v
        return ((seeds @ values) * drawn).sum(1) / (seeds.sum(1) * drawn.sum(1))

    found = _interval(values.shape, mean, resamples, level, seed)
    assert found is not None
    return found


def crossed_position(
    model: np.ndarray, knows: np.ndarray, never: np.ndarray, *, resamples: int = 4000, level: float = 0.95,
    seed: int = 0,
) -> Estimate | None:  # fmt: skip
    """Where the mean over seeds stands between a model that never knew (0) and one that knows (1).

    Args:
        model: Right or not, [seeds, questions]; knows, never: [questions].
    Returns:
        None if the gap between the two is not positive in all but (1 − level)/2 of the resamples.
    """
    _checked(model)
    gap = crossed((knows - never)[None], resamples=resamples, level=level, seed=seed)
    if gap.low <= 0:
        return None

    def place(seeds: np.ndarray, questions: np.ndarray) -> np.ndarray:
        count = questions.sum(1)
        floor, top = questions @ never / count, questions @ knows / count
        mean = ((seeds @ model) * questions).sum(1) / (seeds.sum(1) * count)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(top > floor, (mean - floor) / (top - floor), np.nan)

    return _interval(model.shape, place, resamples, level, seed)


def _interval(
    shape: tuple[int, ...], measure: Callable[[np.ndarray, np.ndarray], np.ndarray], resamples: int, level: float,
    seed: int,
) -> Estimate | None:  # fmt: skip
    draw, at_once = np.random.default_rng(seed), max(1, _ENTRIES // shape[1])
    value = float(measure(np.ones((1, shape[0])), np.ones((1, shape[1])))[0])
    sizes = [min(at_once, resamples - start) for start in range(0, resamples, at_once)]
    found = np.concatenate([measure(*(_counts(draw, size, n) for n in shape)) for size in sizes])
    low, high = np.nanquantile(found, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(value, float(low), float(high))


def _counts(draw: np.random.Generator, resamples: int, n: int) -> np.ndarray:
    """How often each of n is drawn in n draws, [resamples, n]."""
    drawn = draw.integers(0, n, (resamples, n)) + n * np.arange(resamples)[:, None]
    return np.bincount(drawn.ravel(), minlength=resamples * n).reshape(resamples, n).astype(np.float64)


def _checked(values: np.ndarray) -> None:
    if values.ndim != 2 or not values.size:
        raise ValueError(f"values of shape {values.shape}; they have to be [seeds, questions], at least one of each")
    if bad := int((~np.isfinite(values)).sum()):
        raise ValueError(f"{bad} of {values.size} values are not finite: what failed is missing, and has no mean")
