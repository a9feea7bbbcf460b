"""The scores themselves: their distribution, where they lie, every document with its text, the strongest tokens."""

from __future__ import annotations

from typing import Any

import numpy as np

from retrograd.report.corpus import corpus_of
from retrograd.report.panel import Content, Source, View
from retrograd.report.panels.setup import reproduce
from retrograd.report.scores import Documents
from retrograd.report.subjects import Attribution

__all__ = ["carriers", "distribution", "order", "rows"]

BINS = 60  # an even number: 0 is an edge
CURVE = 400  # points of a rank curve
PLACES = 64  # groups of positions or lengths
MOST_DOCUMENTS = 50_000  # that are listed
TYPES = 40  # token types that are listed


def distribution(run: Attribution, view: View) -> Content:
    """Histogram and rank curve of the documents' scores, and of the tokens'."""
    distributions = {"documents": [_distribution(scores) for scores in run.documents.scores]}
    if run.tokens is not None:
        distributions["tokens"] = [_distribution(scores[run.tokens.target]) for scores in run.tokens.scores]
    return Content({"columns": run.columns, **distributions}, [_source(run)])


def _distribution(scores: np.ndarray) -> dict[str, Any]:
    """Counts between edges that are symmetric about 0, the outermost two open; and scores by rank."""
    sizes = np.sort(np.abs(scores))
    most = float(sizes[-1])
    reach = float(np.quantile(sizes, 0.995)) if len(sizes) > 200 else most
    reach = reach or most or 1.0
    edges = np.linspace(-reach, reach, BINS + 1)
    counts, _ = np.histogram(np.clip(scores, -reach, reach), edges)
    ranks = np.unique(np.linspace(0, len(scores) - 1, min(CURVE, len(scores))).round().astype(int))
    curve = np.sort(scores)[ranks]
    return {
        "edges": _rounded(edges), "counts": counts.tolist(), "beyond": int((np.abs(scores) > reach).sum()),
        "ranks": (ranks + 1).tolist(), "curve": _rounded(curve), "count": len(scores),
    }  # fmt: skip


def order(run: Attribution, view: View) -> Content:
    """Scores by training step, by position in the row and by length of the document."""
    documents, tokens = run.documents, run.tokens
    lengths = documents.targets
    once = all(len(steps) == 1 for steps in documents.steps)
    data: dict[str, Any] = {"columns": run.columns, "once": once}
    if once:
        steps = np.array([step for (step,) in documents.steps])
        data["step"] = [_grouped(steps, scores) for scores in documents.scores]
    reverse = run.journal[1]
    if reverse:
        own = len(reverse[0]["mean_abs_score"])
        data["sweep"] = {
            "step": [entry["step"] for entry in reverse],
            "size": [[entry["mean_abs_score"][k] for entry in reverse] for k in range(own)],
        }
    data["length"] = [_grouped(lengths, scores) for scores in documents.scores]
    if tokens is not None:
        at = tokens.position[tokens.target]
        data["position"] = [_grouped(at, scores[tokens.target]) for scores in tokens.scores]
    return Content(data, [_source(run), Source(run.folder / "metrics.jsonl", reproduce(run))])


def _grouped(keys: np.ndarray, values: np.ndarray) -> dict[str, list[Any]]:
    """Mean and mean size of the values by key, in at most PLACES groups of neighbouring keys."""
    low, high = int(keys.min()), int(keys.max())
    width = max(1, -(-(high - low + 1) // PLACES))
    group = (keys - low) // width
    count = np.bincount(group)
    some = count > 0
    total, size = np.bincount(group, weights=values), np.bincount(group, weights=np.abs(values))
    at = low + width * np.flatnonzero(some) + (width - 1) / 2
    return {
        "at": at.tolist(), "count": count[some].tolist(), "mean": _rounded(total[some] / count[some]),
        "size": _rounded(size[some] / count[some]),
    }  # fmt: skip


def rows(run: Attribution, view: View) -> Content:
    """Every document with its scores and its text; for token runs the tokens are in a table that panels share."""
    documents, corpus = _strongest(run.documents), corpus_of(run, view)
    data: dict[str, Any] = {
        "columns": run.columns, "ids": documents.ids.tolist(), "targets": documents.targets.tolist(),
        "scores": [_rounded(scores, 9) for scores in documents.scores],
        "steps": [_steps(steps) for steps in documents.steps],
        "texts": [], "of": len(run.documents.ids),
        "table": corpus.name if corpus else None, "offset": corpus.offset if corpus else 0,
    }  # fmt: skip
    if corpus is None or view.mask:  # the tokens have the text; hidden documents have hash and length instead
        pairs = [(text, run.data_set(k)) for k, text in zip(documents.ids.tolist(), documents.texts)]
        data["texts"] = [
            view.mask.document(*pair) if corpus is None or view.mask.hides_document(*pair) else None for pair in pairs
        ]
    return Content(data, [Source(run.folder / "all_scores.json", reproduce(run)), _source(run)])


def _strongest(documents: Documents) -> Documents:
    """All documents, or of very many those whose scores for the first query are largest, by id."""
    if len(documents.ids) <= MOST_DOCUMENTS:
        return documents
    kept = np.sort(np.argpartition(-np.abs(documents.scores[0]), MOST_DOCUMENTS)[:MOST_DOCUMENTS])
    return Documents(
        documents.ids[kept], documents.scores[:, kept], documents.targets[kept],
        [documents.texts[k] for k in kept], [documents.steps[k] for k in kept],
    )  # fmt: skip


def carriers(run: Attribution, view: View) -> Content | None:
    """The single tokens and the token types that carry most of the scores, either way."""
    tokens = run.tokens
    if tokens is None:
        return None
    corpus = corpus_of(run, view)
    assert corpus is not None
    shown, words = corpus.token, corpus.vocabulary
    lists = []
    for scores in tokens.scores:
        total = np.bincount(shown[tokens.target], weights=scores[tokens.target], minlength=len(words))
        count = np.bincount(shown[tokens.target], minlength=len(words))
        lists.append({
            "types": [
                [[words[k], int(count[k]), _round(total[k]), _round(total[k] / count[k])] for k in end]
                for end in _ends(total)
            ],
            "single": [[_single(corpus, tokens, scores, k) for k in end] for end in _ends(scores)],
            "gini": _gini(np.abs(scores[tokens.target])),
        })  # fmt: skip
    return Content({"columns": run.columns, "lists": lists}, [_source(run)])


def _ends(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places of the lowest values that are negative, and of the highest that are positive, strongest first."""
    count = min(TYPES, len(values))
    sides = [np.sort(np.argpartition(side, count - 1)[:count]) for side in (values, -values)]  # by place where equal
    lowest, highest = (k[np.argsort(sign * values[k], kind="stable")] for k, sign in zip(sides, (1, -1)))
    return lowest[values[lowest] < 0], highest[values[highest] > 0]


def _single(corpus: Any, tokens: Any, scores: np.ndarray, index: int) -> list[Any]:
    return [corpus.vocabulary[corpus.token[index]], int(tokens.document[index]), int(tokens.position[index]),
            _round(scores[index])]  # fmt: skip


def _gini(sizes: np.ndarray) -> float | None:
    """How unequal sizes are: 0 all alike, 1 one has all."""
    ordered, n = np.sort(sizes.astype(np.float64)), len(sizes)
    total = float(ordered.sum())
    return float(2 * (np.arange(1, n + 1) @ ordered) / (n * total) - (n + 1) / n) if total else None


def _steps(steps: list[int]) -> str:
    """All of a few steps; of many the first four and the last."""
    shown = steps if len(steps) <= 5 else [*steps[:4], "…", steps[-1]]
    return " ".join(map(str, shown))


def _rounded(values: np.ndarray, digits: int = 6) -> list[float]:
    return [_round(value, digits) for value in values]


def _round(value: float, digits: int = 6) -> float:
    return float(f"{value:.{digits}g}")


def _source(run: Attribution) -> Source:
    return Source(run.folder / "scores.parquet", reproduce(run))
