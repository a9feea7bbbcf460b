"""The two-score map: every token as a point, one query's score against another's, linked with the text."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
from scipy import stats

from retrograd.report.corpus import corpus_of
from retrograd.report.panel import Content, Source, View
from retrograd.report.panels.setup import reproduce
from retrograd.report.subjects import Attribution, Several

__all__ = ["map_of_run", "map_of_several"]

ABOVE, AT_MOST = 0.75, 0.5  # quantiles of `retrograd select`: purely forget is p above the one, g at or below the other
PAIRS = 12  # pairs of columns with numbers


def map_of_run(run: Attribution, view: View) -> Content | None:
    """The map of a run with several query columns; runs on the same rows have one together."""
    corpus = corpus_of(run, view)
    if corpus is None or corpus.columns < 2 or len(view.tables[corpus.name].data["labels"]) > corpus.columns:
        return None
    return _content([run], corpus.name, view)


def map_of_several(several: Several, view: View) -> Content | None:
    """One map for the runs on the same rows."""
    runs = [subject for subject in several.subjects if isinstance(subject, Attribution) and corpus_of(subject, view)]
    for name in view.tables:
        together = [run for run in runs if view.corpora[str(run.folder)].name == name]
        if len(together) > 1:
            return _content(together, name, view)
    return None


def _content(runs: list[Attribution], name: str, view: View) -> Content:
    columns = [(run, column) for run in runs for column in range(view.corpora[str(run.folder)].columns)]
    target = runs[0].tokens.target if runs[0].tokens else np.zeros(0, bool)
    scores = [run.tokens.scores[column][target] for run, column in columns if run.tokens is not None]
    pairs = list(combinations(range(len(scores)), 2))[:PAIRS]
    ranks: dict[int, np.ndarray] = {}
    numbers = {f"{x} {y}": _compared(x, y, scores, ranks) for x, y in pairs}
    data = {"table": name, "numbers": numbers, "above": ABOVE, "at_most": AT_MOST}
    return Content(data, [Source(run.folder / "scores.parquet", reproduce(run)) for run in runs])


def _compared(x: int, y: int, scores: list[np.ndarray], ranks: dict[int, np.ndarray]) -> dict[str, Any]:
    """Correlations, purely forget shares both ways, and the ratio of sizes; None where scores do not vary."""
    tau, mu = scores[x], scores[y]
    for column in (x, y):
        if column not in ranks:
            ranks[column] = stats.rankdata(scores[column]).astype(np.float32)
    return {
        "pearson": _correlation(tau, mu), "spearman": _correlation(ranks[x], ranks[y]),
        "separable": _separable(tau, mu), "separable_back": _separable(mu, tau),
        "ratio": float(np.abs(tau).mean() / np.abs(mu).mean()) if mu.any() else None,
    }  # fmt: skip


def _correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    a, b = a - a.mean(dtype=np.float64), b - b.mean(dtype=np.float64)
    scale = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / scale if scale > 0 else None


def _separable(tau: np.ndarray, mu: np.ndarray) -> float:
    p, g = np.maximum(0, -tau), np.maximum(0, -mu)
    return float(((p > np.quantile(p, ABOVE)) & (g <= np.quantile(g, AT_MOST))).mean())
