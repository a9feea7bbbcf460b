"""Two attributions of the same tokens: are there tokens and documents to select at all?

    separated     Pearson and Spearman correlation of τ (to go) and μ (to stay) over real tokens
    purely forget share of tokens with p above its quantile and g at or below its quantile; p, g: strengths
    documents     the same of their sums Σp, Σg among documents; net: Στ < 0 and Σμ ≥ 0
    magnitude     mean|τ| / mean|μ|

Intervals of the token statistics come from a bootstrap over rows (a row's tokens are no independent draws); of shares
of documents, Wilson's. Quantiles stay those of the data in every resample; ranks are taken anew. Where scores are of
documents, documents take the place of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from scipy import stats
from torch import Tensor

from retrograd.evaluate.intervals import wilson
from retrograd.runs.progress import counting
from retrograd.select.places import Places
from retrograd.settings.select import FeasibleConfig

__all__ = ["Answer", "analyse", "spearman_of", "verdict"]


FEWEST = 10  # rows from which an interval by drawing them again is one


class Answer(NamedTuple):
    """A number with its 95 % interval, the threshold it is held against, and what that says.

    holds: True or False where the whole interval is on one side; None where it is on both.
    """

    value: float
    low: float
    high: float
    threshold: float | None = None
    holds: bool | None = None

    @property
    def told(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


def analyse(
    forget: Tensor, retain: Tensor, places: Places, settings: FeasibleConfig, *, alpha: float = 1.0, seed: int = 0
) -> dict[str, Any]:
    """The four questions with their answers, and whether a selection is feasible.

    Args:
        forget, retain: τ and μ of the real tokens, [n], or of the documents that have one, [d].
    Raises:
        ValueError: If a setting is out of range, or scores do not vary.
    """
    _check(settings)
    tau, mu = forget.numpy(), retain.numpy()
    by_token = len(tau) == len(places)
    for name, scores in (("--scores", tau), ("--against", mu)):
        if len(scores) < 3 or np.ptp(scores) == 0:
            raise ValueError(f"the {len(scores)} scores of {name} do not vary; there is nothing to compare")
    rows = places.row.numpy() if by_token else np.arange(len(tau))
    p, g = np.maximum(0, -tau), np.maximum(0, -mu)
    thresholds = (float(np.quantile(p, settings.forget_quantile)), float(np.quantile(g, settings.retain_quantile)))
    pure = (p > thresholds[0]) & (g <= thresholds[1])
    bootstrapped = _bootstrap(tau, mu, pure, rows, settings.resamples, seed)
    pearson, spearman, share, ratio = (Answer(*three) for three in bootstrapped)
    documents = _documents(places, tau, mu, settings, alpha)
    answers: dict[str, Answer] = {
        "pearson": pearson,
        "spearman": _held(spearman, settings.correlation, below=True),
        "purely_forget": _held(share, settings.share, below=False),
        "magnitude_ratio": ratio._replace(threshold=settings.ratio, holds=_within(ratio, settings.ratio)),
    }
    few = len(np.unique(rows)) < FEWEST
    if few:
        answers = {name: answer._replace(holds=None) for name, answer in answers.items()}
    said = verdict(answers, documents)
    if few:
        said["tokens"] += f" The intervals are of {len(np.unique(rows))} rows, too few to decide anything."
    return {
        "items": "real tokens" if by_token else "documents", "count": len(tau),
        **{name: answer._asdict() for name, answer in answers.items()},
        "thresholds": {"p_above": thresholds[0], "g_at_most": thresholds[1],
                       "forget_quantile": settings.forget_quantile, "retain_quantile": settings.retain_quantile},
        "independent_share": float((p > thresholds[0]).mean() * (g <= thresholds[1]).mean()),
        "proponent_and_not": float(((tau < 0) & (mu >= 0)).mean()), "documents": documents, "verdict": said,
    }  # fmt: skip


def verdict(answers: dict[str, Answer], documents: dict[str, Any]) -> dict[str, str]:
    """Whether a selection of tokens, and of documents, is feasible, in words."""
    spearman, share, ratio = (answers[name] for name in ("spearman", "purely_forget", "magnitude_ratio"))
    said = [
        _in_words(spearman, "the two attributions are separated", "the two attributions name the same tokens",
              f"Spearman {spearman.told}, to lie below {spearman.threshold:g}"),
        _in_words(share, "enough is purely forget", "too little is purely forget",
              f"share {share.told}, to be at least {share.threshold:g}"),
    ]  # fmt: skip
    held = [answer.holds for answer in (spearman, share)]
    word = "not feasible" if False in held else "undecided" if None in held else "feasible"
    tokens = f"{word}: {'; '.join(said)}."
    if ratio.holds is not True:  # no reason against a selection: α can make up for it
        tokens += (
            f" mean|score to go| is {ratio.told} times mean|score to stay|, not surely within a factor "
            f"{ratio.threshold:g}: α = 1 weighs one far above the other, --alpha {ratio.value:.2g} weighs them alike."
        )
    if spearman.high < -0.5:
        tokens += " The attributions oppose each other strongly: is the sign of one the other way round?"
    count, of = len(documents["purely_forget"]), documents["count"]
    enough = "feasible" if count else "not feasible"
    share_of = Answer(count / of, *documents["interval"])
    whole = f"{enough}: {count} of {of} documents are entirely forget-specific, a share of {share_of.told}."
    return {"tokens": tokens, "documents": whole}


def spearman_of(tau: np.ndarray, mu: np.ndarray) -> Callable[[np.ndarray], float]:
    """Spearman's correlation as a function of how often each item occurs, [n]; equal items share their mean rank.

    Sorts once for all resamples: under multiplicities c the rank of a tie is Σ c below it + (its c + 1)/2, and the
    mean rank (Σ c + 1)/2.
    """
    ties = [np.unique(scores, return_inverse=True)[1].ravel() for scores in (tau, mu)]

    def measure(counts: np.ndarray) -> float:
        middle, ranks = (counts.sum() + 1) / 2, []
        for tie in ties:
            each = np.bincount(tie, weights=counts)
            ranks.append((np.cumsum(each) - (each - 1) / 2 - middle)[tie])
        weighted = counts * ranks[0]
        scale = math.sqrt(float(weighted @ ranks[0]) * float((counts * ranks[1]) @ ranks[1]))
        return float(weighted @ ranks[1]) / scale if scale > 0 else math.nan

    return measure


def _bootstrap(
    tau: np.ndarray, mu: np.ndarray, pure: np.ndarray, rows: np.ndarray, resamples: int, seed: int
) -> list[tuple[float, float, float]]:
    """(value, low, high) of Pearson, Spearman, the share of `pure` and the ratio of magnitudes; rows are drawn."""
    _, row_of = np.unique(rows, return_inverse=True)
    count, spearman, draw = int(row_of.max()) + 1, spearman_of(tau, mu), np.random.default_rng(seed)
    a, b = tau - tau.mean(), mu - mu.mean()  # of centred numbers no digits cancel below
    columns = (np.ones(len(a)), a, b, a * a, b * b, a * b, pure, np.abs(tau), np.abs(mu))
    sums = np.stack([np.bincount(row_of, weights=column) for column in columns])

    def measure(drawn: np.ndarray) -> tuple[float, ...]:
        n, a, b, aa, bb, ab, chosen, large, small = (sums @ drawn).tolist()
        scale = (aa - a * a / n) * (bb - b * b / n)
        pearson = (ab - a * b / n) / math.sqrt(scale) if scale > 0 else math.nan
        return pearson, spearman(drawn[row_of]), chosen / n, large / small if small > 0 else math.nan

    values, resampled = measure(np.ones(count)), []
    with counting("bootstrap", resamples, "resamples") as tick:
        for number in range(resamples):
            resampled.append(measure(np.bincount(draw.integers(0, count, count), minlength=count).astype(np.float64)))
            if number % 50 == 49:
                tick(50)
    low, high = np.nanquantile(np.array(resampled), [0.025, 0.975], axis=0)
    return list(zip(values, low.tolist(), high.tolist(), strict=True))


def _documents(
    places: Places, tau: np.ndarray, mu: np.ndarray, settings: FeasibleConfig, alpha: float
) -> dict[str, Any]:
    """Documents that are entirely forget-specific, strongest first, with the quantiles among documents."""
    ids = places.present().numpy()

    def summed(values: np.ndarray) -> np.ndarray:
        if len(values) == len(ids) != len(places):
            return values
        return np.bincount(places.document.numpy(), weights=values, minlength=places.documents)[ids]

    p, g = summed(np.maximum(0, -tau)), summed(np.maximum(0, -mu))
    above, most = float(np.quantile(p, settings.forget_quantile)), float(np.quantile(g, settings.retain_quantile))
    pure = np.flatnonzero((p > above) & (g <= most))
    order = pure[np.argsort(-(p - alpha * g)[pure], kind="stable")]
    net = (summed(tau) < 0) & (summed(mu) >= 0)
    return {
        "count": len(ids), "purely_forget": ids[order].tolist(), "interval": list(wilson(len(pure), len(ids))),
        "p_above": above, "g_at_most": most, "net_proponent_and_not": int(net.sum()),
        "pearson": float(stats.pearsonr(summed(tau), summed(mu)).statistic) if len(ids) > 2 else None,
    }  # fmt: skip


def _held(answer: Answer, threshold: float, below: bool) -> Answer:
    inside = answer.high < threshold if below else answer.low >= threshold
    outside = answer.low >= threshold if below else answer.high < threshold
    return answer._replace(threshold=threshold, holds=True if inside else False if outside else None)


def _within(answer: Answer, factor: float) -> bool | None:
    if answer.low >= 1 / factor and answer.high <= factor:
        return True
    return False if answer.high < 1 / factor or answer.low > factor else None


def _in_words(answer: Answer, yes: str, no: str, numbers: str) -> str:
    words = yes if answer.holds else no if answer.holds is False else f"it is open whether {yes}"
    return f"{words} ({numbers})"


def _check(settings: FeasibleConfig) -> None:
    for name in ("forget_quantile", "retain_quantile"):
        value = getattr(settings, name)
        if not 0 < value < 1:
            raise ValueError(f"--feasible.{name} is {value}; a quantile is between 0 and 1, such as 0.75")
    if settings.resamples < 100:
        raise ValueError(f"--feasible.resamples is {settings.resamples}; an interval needs at least 100")
    if not -1 <= settings.correlation <= 1:
        raise ValueError(f"--feasible.correlation is {settings.correlation}; a correlation is from -1 to 1")
    if not 0 < settings.share <= 1:
        raise ValueError(f"--feasible.share is {settings.share}; a share is above 0 and at most 1")
    if not settings.ratio >= 1:
        raise ValueError(f"--feasible.ratio is {settings.ratio}; a factor is 1 or more")
