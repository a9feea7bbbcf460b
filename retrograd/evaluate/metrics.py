"""What reviewers of unlearning ask of a model, each a function of what models gave for tasks, with an interval.

    truth_ratio          R = mean over wrong answers of p^(1/tokens) / that of the right one; min(R, 1/R), of retain
                         tasks max(0, 1 − R), averaged over questions
    ks, forget_quality   the largest distance between the distributions of R of the model and of one that never knew,
                         and the p-value of the two-sample Kolmogorov–Smirnov test
    extraction_strength, exact_memorisation, kl, depth         see `memory`, `divergence`, `depth`
    mia_…                AUC: the probability that a document that was trained on looks more so than one that was not
    privleak             (A − A_never)/A_never, A = 1 − AUC of Min-K %: negative where the model remembers
    probe                accuracy on a probe minus that on the same questions asked plainly

Intervals are percentiles of a bootstrap that draws each sample's items again; of ks they are bands of Dvoretzky,
Kiefer, Wolfowitz and Massart for both distributions together, since a bootstrap of a largest distance is too large.
Sources: Maini et al. 2401.06121 (truth ratio, forget quality), aggregated as open-unlearning does; Shi et al.
2407.06460 (PrivLeak).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from retrograd.evaluate.depth import Patched, depths
from retrograd.evaluate.divergence import Divergence
from retrograd.evaluate.intervals import Estimate
from retrograd.evaluate.memory import Memory
from retrograd.query.prepare import Answers
from retrograd.settings.tasks import Task

__all__ = [
    "METRICS", "Given", "Metric", "Sampled", "auc", "by_name", "check_column", "estimated", "metrics_of",
    "truth_ratios",
]  # fmt: skip

Results = Mapping[str, Any]


class Sampled(NamedTuple):
    """A number as a function of which items are drawn.

    sizes: Items of each sample; samples are drawn apart, the items of one together for all models.
    at: (indices of each sample) → the number; NaN where it is none.
    band: Models → half the width of an interval that needs no draws, where there is one.
    told: What is told instead of the number, a monotone function of it and of the ends of its interval.
    """

    sizes: tuple[int, ...]
    at: Callable[..., float]
    band: Callable[[int], float] | None = None
    told: Callable[[float], float] = float


class Given(NamedTuple):
    """A task's name, all tasks, and by task what the model gave, the one that knows, and the one that never knew."""

    name: str
    tasks: Mapping[str, Task]
    model: Results
    never: Results | None

    @property
    def task(self) -> Task:
        return self.tasks[self.name]


@dataclass(frozen=True)
class Metric:
    """A metric. sampled: the number, or why it is missing; applies: to which tasks; better: which way, for a model that
    is to have forgotten what the task asks, or, of a retain task, that is to have kept it."""

    name: str
    applies: Callable[[Task], bool]
    sampled: Callable[[Given], Sampled | str]
    better: Literal["higher", "lower", "neither"]


def metrics_of(given: Given) -> dict[str, dict[str, Any]]:
    """The metrics of a task, plain: value and interval, or null and why it is missing."""
    metrics: dict[str, dict[str, Any]] = {}
    for metric in METRICS:
        if metric.applies(given.task):
            sampled = metric.sampled(given)
            number = sampled if isinstance(sampled, str) else estimated([sampled])
            if isinstance(number, str):
                metrics[metric.name] = {"value": None, "missing": number}
            else:
                metrics[metric.name] = {"value": number.value, "interval": [number.low, number.high]}
            metrics[metric.name] |= {"better": metric.better}
    return metrics


def estimated(
    several: Sequence[Sampled], *, resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> Estimate | str:
    """The mean over models, which answered the same, with an interval that draws models and items again.

    Returns:
        Why there is no number, where it is none at the items themselves.
    """
    first, draw = several[0], np.random.default_rng(seed)
    all_of = [np.arange(size) for size in first.sizes]
    values = np.array([sampled.at(*all_of) for sampled in several])
    if not np.isfinite(values).all():
        return "it is no number for these answers"
    value = float(values.mean())
    if first.band is not None:
        half = first.band(len(several))
        ends = [first.told(max(0.0, value - half)), first.told(min(1.0, value + half))]
        return Estimate(first.told(value), min(ends), max(ends))
    means = []
    for _ in range(resamples):
        items = [draw.integers(0, size, size) for size in first.sizes]
        models = draw.integers(0, len(several), len(several))
        at = {model: several[model].at(*items) for model in set(models.tolist())}
        means.append(np.mean([at[model] for model in models.tolist()]))
    low, high = np.nanquantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(value, float(low), float(high))


def truth_ratios(answers: Answers) -> np.ndarray | None:
    """R of each question, [n]; None where tokens were not kept or a question failed.

    R = (1/wrong) Σ_wrong p^(1/tokens) / p_right^(1/tokens).
    """
    scored = answers.scored
    if scored.tokens is None or bool(scored.failed.any()):
        return None
    there = scored.widths > 0
    share = (scored.logprobs / scored.tokens.clamp(min=1)).where(there, -math.inf).exp()
    right = share.gather(1, scored.gold[:, None])[:, 0]
    wrong = (share.sum(1) - right) / (there.sum(1) - 1)
    return (wrong / right).numpy()


def auc(members: np.ndarray, others: np.ndarray) -> float:
    """The probability that a member's score is above another's, ties counting half.

    >>> auc(np.array([3.0, 1.0]), np.array([2.0, 0.0]))
    0.75
    """
    order = np.sort(others)
    below, through = (np.searchsorted(order, members, side) for side in ("left", "right"))
    return float((below + through).mean() / 2 / len(others))


def _truth_ratio(given: Given) -> Sampled | str:
    ratios = _ratios(given.model, given.name)
    if isinstance(ratios, str):
        return ratios
    with np.errstate(divide="ignore"):
        each = np.maximum(0, 1 - ratios) if given.task.role == "retain" else np.minimum(ratios, 1 / ratios)
    return _mean(each)


def _ratios(results: Results, name: str) -> np.ndarray | str:
    answers = results.get(name)
    if not isinstance(answers, Answers):
        return f"{name} is missing"
    ratios = truth_ratios(answers)
    if ratios is None:
        return f"{name} has failed questions, or was measured before the answers' tokens were counted"
    return ratios


def _ks(given: Given) -> Sampled | str:
    if given.never is None:
        return "there is no model that never knew (--never)"
    both = [_ratios(results, given.name) for results in (given.model, given.never)]
    for ratios in both:
        if isinstance(ratios, str):
            return ratios
    x, y = (np.asarray(ratios) for ratios in both)
    if len(x) != len(y):
        return f"the two models were asked {len(x)} and {len(y)} questions"

    def at(i: np.ndarray) -> float:
        from scipy.stats import ks_2samp

        return float(ks_2samp(x[i], y[i]).statistic)

    def band(models: int) -> float:
        # each of `models` + 1 distributions leaves its band with a probability of 0.05/(models + 1) at most
        return 2 * math.sqrt(math.log(2 * (models + 1) / 0.05) / (2 * len(x)))

    return Sampled((len(x),), at, band)


def _forget_quality(given: Given) -> Sampled | str:
    sampled = _ks(given)
    if isinstance(sampled, str):
        return sampled
    return sampled._replace(told=lambda distance: _p_value(distance, sampled.sizes[0]))


def _p_value(distance: float, n: int) -> float:
    """Two-sided p of the Kolmogorov–Smirnov distance of two samples of n, as scipy's ks_2samp has it."""
    from scipy.stats import ks_2samp

    # two samples at this distance: the one is the other, moved by so many places
    return float(ks_2samp(np.arange(n) - round(distance * n), np.arange(n)).pvalue)


def _of_memory(field: str) -> Callable[[Given], Sampled | str]:
    def sampled(given: Given) -> Sampled | str:
        memory = given.model.get(given.name)
        return _mean(getattr(memory, field)) if isinstance(memory, Memory) else f"{given.name} is missing"

    return sampled


def _membership(score: Callable[[Memory, Memory | None], np.ndarray], never: bool = False) -> Callable[[Given], Any]:
    """AUC of a score, larger for what was trained on; with `never`, of the model that never knew as well."""

    def sampled(given: Given) -> Sampled | str:
        both = _both(given.model, given)
        floor = _both(given.never, given) if never and given.never is not None else None
        if never and floor is None:
            return "there is no model that never knew (--never)"
        for pair in (both, floor):
            if isinstance(pair, str):
                return pair
        assert both is not None
        scores = [score(memory, floor[k] if floor else None) for k, memory in enumerate(both)]  # type: ignore[arg-type]
        return Sampled((len(scores[0]), len(scores[1])), lambda i, j: auc(scores[0][i], scores[1][j]))

    return sampled


def _both(results: Results | None, given: Given) -> tuple[Memory, Memory] | str | None:
    """What was trained on, and what was not."""
    if results is None:
        return None
    against = given.task.against
    assert against is not None, "the metric applies where there is one"
    memories = [results.get(name) for name in (given.name, against)]
    for name, memory in zip((given.name, against), memories):
        if not isinstance(memory, Memory):
            return f"{name} is missing"
    return memories[0], memories[1]  # type: ignore[return-value]


def _privleak(given: Given) -> Sampled | str:
    models = [_both(results, given) for results in (given.model, given.never)]
    if models[1] is None:
        return "there is no model that never knew (--never)"
    for pair in models:
        if isinstance(pair, str):
            return pair
    scores = [[-np.array(memory.min_k) for memory in pair] for pair in models]  # type: ignore[union-attr]

    def at(i: np.ndarray, j: np.ndarray) -> float:
        now, never = (1 - auc(members[i], others[j]) for members, others in scores)
        return (now - never) / never if never else math.nan

    return Sampled((len(scores[0][0]), len(scores[0][1])), at)


def _kl(given: Given) -> Sampled | str:
    measured = given.model.get(given.name)
    if not isinstance(measured, Divergence):
        return f"{given.name} is missing"
    nats, targets = np.array(measured.nats), np.array(measured.targets)
    return Sampled((len(nats),), lambda i: float(nats[i].sum() / targets[i].sum()))


def _depth(given: Given) -> Sampled | str:
    if given.never is None:
        return "there is no model that never knew (--never)"
    both = [results.get(given.name) for results in (given.model, given.never)]
    if not isinstance(both[0], Patched) or not isinstance(both[1], Patched):
        return f"{given.name} is missing"
    if both[0].hashes != both[1].hashes:
        return "the two models were asked different questions"
    each = depths(both[0].lost, both[1].lost)
    if np.isnan(each).all():
        return "no layer of the model that never knew lacks an answer: the two do not differ"

    def at(i: np.ndarray) -> float:
        there = each[i][~np.isnan(each[i])]
        return float(there.mean()) if len(there) else math.nan

    return Sampled((len(each),), at)


def _probe(given: Given) -> Sampled | str:
    names = (given.name, str(given.task.probe_of))
    rights = []
    for name in names:
        answers = given.model.get(name)
        if not isinstance(answers, Answers):
            return f"{name} is missing"
        rights.append(answers.rights(given.tasks[name]).numpy())
    if len(rights[0]) != len(rights[1]):
        return f"{names[0]} has {len(rights[0])} questions and {names[1]} {len(rights[1])}: they are not the same"
    return _mean(rights[0] - rights[1])


def _mean(each: Any) -> Sampled:
    values = np.asarray(each, dtype=np.float64)
    return Sampled((len(values),), lambda i: float(values[i].mean()))


def _cloze(task: Task) -> bool:
    return task.form == "cloze"


def _gone(task: Task) -> bool:
    return task.form == "cloze" and task.role == "forget"


def _form(form: str) -> Callable[[Task], bool]:
    return lambda task: task.form == form


def _paired(task: Task) -> bool:
    return task.form == "memory" and task.against is not None


METRICS: tuple[Metric, ...] = (
    Metric("truth_ratio", _cloze, _truth_ratio, "higher"),
    Metric("forget_quality", _gone, _forget_quality, "higher"),
    Metric("ks", _gone, _ks, "lower"),
    Metric("extraction_strength", _form("memory"), _of_memory("extraction"), "lower"),
    Metric("exact_memorisation", _form("memory"), _of_memory("right"), "lower"),
    Metric("mia_loss", _paired, _membership(lambda m, _: -np.array(m.nats)), "neither"),
    Metric("mia_zlib", _paired, _membership(lambda m, _: -np.array(m.nats) / np.array(m.bytes)), "neither"),
    Metric("mia_min_k", _paired, _membership(lambda m, _: -np.array(m.min_k)), "neither"),
    Metric("mia_min_k_plus", _paired, _membership(lambda m, _: -np.array(m.min_k_plus)), "neither"),
    Metric("mia_reference", _paired, _membership(lambda m, n: np.array(n.nats) - np.array(m.nats), never=True),  # type: ignore[union-attr]
           "neither"),
    Metric("privleak", _paired, _privleak, "neither"),
    Metric("kl", _form("kl"), _kl, "lower"),
    Metric("depth", _form("depth"), _depth, "higher"),
    Metric("probe", lambda task: task.probe_of is not None, _probe, "neither"),
)  # fmt: skip
"""Every metric, in the order in which they are shown."""


def by_name(name: str) -> Metric:
    """The metric of a name.

    Raises:
        ValueError: If there is none.
    """
    metrics = {metric.name: metric for metric in METRICS}
    if name not in metrics:
        raise ValueError(f"there is no metric {name!r}; there are {', '.join(metrics)}")
    return metrics[name]


def check_column(column: str, tasks: Mapping[str, Task]) -> None:
    """Refuse a METRIC:TASK that cannot be measured of these tasks.

    Raises:
        ValueError: If there is no such metric or task, or the metric is not one of the task.
    """
    name, colon, task = column.partition(":")
    metric = by_name(name)
    fitting = [candidate for candidate, its in tasks.items() if metric.applies(its)]
    if not colon or task not in fitting:
        raise ValueError(
            f"column {column!r}: write {name}:TASK, with a task that it is a metric of: {', '.join(fitting) or 'none'}"
        )
