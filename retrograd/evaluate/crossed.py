"""Means over seeds and questions, with intervals that draw both again: questions and seeds are crossed.

    value      Σ_s Σ_q v_q x_sq / Σ …          v: targets of a document, ones for questions
    interval   the middle 95 % of that under counts c_s of seeds and c_q of questions, each drawn with replacement

Every seed answers the same questions, so neither seeds nor questions alone are the independent draws. Drawing both is
the pigeonhole bootstrap: Owen, Annals of Applied Statistics 1 (2007) 386; it errs on the wide side. So it is with
several kinds of seeds, of an unlearning and of an attack, say. With one seed of a kind nothing of that kind is drawn,
and the interval says nothing of other ones; with two or three it is too narrow in what they contribute. Questions that
belong together are drawn together (`clustered`). Two arms are compared by their differences, seed by seed and question
by question.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from retrograd.evaluate.intervals import Estimate

__all__ = ["clustered", "crossed", "crossed_difference", "crossed_position", "drawn_counts"]

_ENTRIES = 1 << 22  # counts that are held at once


def crossed(
    values: np.ndarray, weights: np.ndarray | None = None, *, resamples: int = 4000, level: float = 0.95, seed: int = 0
) -> Estimate:
    """The mean of values over seeds and questions.

    Args:
        values: [seeds, questions], or an axis more for each further kind of seed before the questions.
        weights: v, [questions]; ones if not given.
    Raises:
        ValueError: If there is no value, or one is not finite.

    >>> crossed(np.array([[1.0, 1.0], [1.0, 1.0]]))
    Estimate(value=1.0, low=1.0, high=1.0)
    """
    _checked(values)
    estimate = _interval(values.shape, _mean(values, weights), resamples, level, seed)
    assert estimate is not None
    return estimate


def crossed_difference(
    first: np.ndarray, second: np.ndarray, weights: np.ndarray | None = None, *, resamples: int = 4000,
    level: float = 0.95, seed: int = 0,
) -> Estimate:  # fmt: skip
    """The mean of the second minus that of the first, whose first axes are drawn apart and all others together.

    Args:
        first, second: [models, …, questions], models of two kinds that have no seed in common; the rest is the same.
        weights: v, [questions]; ones if not given.
    Raises:
        ValueError: If there is no value, or one is not finite.
    """
    for values in (first, second):
        _checked(values)
    first_mean, second_mean = _mean(first, weights), _mean(second, weights)

    def difference(of_first: np.ndarray, of_second: np.ndarray, *others: np.ndarray) -> np.ndarray:
        gap: np.ndarray = second_mean(of_second, *others) - first_mean(of_first, *others)
        return gap

    estimate = _interval((len(first), *second.shape), difference, resamples, level, seed)
    assert estimate is not None
    return estimate


def clustered(values: np.ndarray, clusters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means by cluster, [..., clusters], and how many questions each has, [clusters]: values and weights of `crossed`.

    Args:
        values: [..., questions].
        clusters: Of each question, [questions].

    >>> clustered(np.array([[1.0, 0.0, 1.0]]), np.array(["a", "a", "b"]))
    (array([[0.5, 1. ]]), array([2., 1.]))
    """
    names, cluster_of = np.unique(clusters, return_inverse=True)
    member = (cluster_of[:, None] == np.arange(len(names))).astype(np.float64)
    sizes = member.sum(0)
    return np.asarray(values, np.float64) @ member / sizes, sizes


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


def drawn_counts(draw: np.random.Generator, resamples: int, n: int) -> np.ndarray:
    """How often each of n is drawn in n draws, [resamples, n]."""
    drawn = draw.integers(0, n, (resamples, n)) + n * np.arange(resamples)[:, None]
    return np.bincount(drawn.ravel(), minlength=resamples * n).reshape(resamples, n).astype(np.float64)


def _mean(values: np.ndarray, weights: np.ndarray | None) -> Callable[..., np.ndarray]:
    """The mean as a function of counts by axis, [resamples, n] each."""
    v = np.ones(values.shape[-1]) if weights is None else np.asarray(weights, dtype=np.float64)

    def mean(*counts: np.ndarray) -> np.ndarray:
        drawn, total = counts[-1] * v, np.tensordot(counts[0], values, 1)  # [resamples, …, questions]
        for axis in counts[1:-1]:
            total = np.einsum("ra,ra...->r...", axis, total)
        seeds = math.prod(axis.sum(1) for axis in counts[:-1])
        return (total * drawn).sum(1) / (seeds * drawn.sum(1))

    return mean


def _interval(
    shape: tuple[int, ...], measure: Callable[..., np.ndarray], resamples: int, level: float, seed: int
) -> Estimate | None:
    draw, at_once = np.random.default_rng(seed), max(1, _ENTRIES // math.prod(shape[1:]))
    value = float(measure(*(np.ones((1, n)) for n in shape))[0])
    sizes = [min(at_once, resamples - start) for start in range(0, resamples, at_once)]
    drawn = np.concatenate([measure(*(drawn_counts(draw, size, n) for n in shape)) for size in sizes])
    low, high = np.nanquantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(value, float(low), float(high))


def _checked(values: np.ndarray) -> None:
    if values.ndim < 2 or not values.size:
        raise ValueError(f"values of shape {values.shape}; they have to be [seeds, questions], at least one of each")
    if bad := int((~np.isfinite(values)).sum()):
        raise ValueError(f"{bad} of {values.size} values are not finite: what failed is missing, and has no mean")
