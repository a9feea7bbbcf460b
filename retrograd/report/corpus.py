"""Tokens of runs on the same rows as one table of the page, which its panels share: texts, places, 16 bit scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from retrograd.report.mask import BLOT, Mask
from retrograd.report.pack import quantise
from retrograd.report.panel import Content, View
from retrograd.report.scores import Tokens
from retrograd.report.subjects import Attribution

__all__ = ["Corpus", "build_tables", "corpus_of"]

MOST = 12  # score columns of a table


@dataclass(frozen=True)
class Corpus:
    """Where a run's tokens are on the page.

    name: Of the table; offset: of the run's first column in it, `columns` in number.
    token [n]: place in `vocabulary`, the texts as they are shown.
    """

    name: str
    offset: int
    columns: int
    token: np.ndarray
    vocabulary: list[str]


def corpus_of(run: Attribution, view: View) -> Corpus | None:
    """A run's table; None for a run without scores of tokens."""
    return view.corpora.get(str(run.folder))


def build_tables(runs: Sequence[Attribution], view: View) -> None:
    """Fill the view's tables, one for all runs on the same rows."""
    groups: dict[str, list[Attribution]] = {}
    for run in runs:
        if run.tokens is not None:
            groups.setdefault(run.manifest.get("hashes", {}).get("rows", str(run.folder)), []).append(run)
    for number, group in enumerate(groups.values()):
        _build(f"tokens-{number}", group, view)


def _build(name: str, runs: list[Attribution], view: View) -> None:
    first = runs[0].tokens
    assert first is not None
    token, vocabulary = shown_tokens(first, view.mask, _hidden_documents(runs[0], view.mask))
    starts = np.flatnonzero((np.diff(first.row, prepend=-1) != 0) | (np.diff(first.document, prepend=-1) != 0))
    arrays = {
        "token": token.astype(np.uint16 if len(vocabulary) <= 1 << 16 else np.uint32),
        "start": starts.astype(np.uint32), "row": first.row[starts].astype(np.uint32),
        "document": first.document[starts].astype(np.uint32), "first": first.position[starts].astype(np.uint32),
        "target": np.packbits(first.target, bitorder="little"),
    }  # fmt: skip
    labels: list[str] = []
    largest: list[float] = []
    sources: list[str] = []
    for run in runs:
        assert run.tokens is not None
        kept = run.columns[: max(0, MOST - len(labels))]
        view.corpora[str(run.folder)] = Corpus(name, len(labels), len(kept), token, vocabulary)
        for column, title in enumerate(kept):
            numbers, top = quantise(run.tokens.scores[column])
            arrays[f"score-{len(labels)}"] = numbers
            labels.append(f"{run.name}: {title}" if len(runs) > 1 else title)
            sources.append(f"{run.folder}:{title}")
            largest.append(top)
    data = {
        "vocabulary": vocabulary, "labels": labels, "largest": largest, "sources": sources, "tokens": len(first),
        "rows": runs[0].manifest.get("hashes", {}).get("rows"), "length": int(runs[0].manifest["rows"]["longest"]),
        "targets": int(first.target.sum()),
    }  # fmt: skip
    view.tables[name] = Content(data, [], arrays)


def shown_tokens(tokens: Tokens, mask: Mask, documents: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Tokens as they may be shown: hidden ones are blots, and no other entry of the vocabulary is left for them.

    Args:
        documents: That are hidden whole.
    """
    if not mask:
        return tokens.token, tokens.vocabulary
    hidden = np.isin(tokens.document, documents)
    hidden |= _hidden(tokens, mask, hidden)
    kept, index = np.unique(tokens.token[~hidden], return_inverse=True)
    shown = np.zeros(len(tokens), np.int32)
    shown[~hidden] = index + 1
    return shown, [BLOT, *(tokens.vocabulary[k] for k in kept)]


def _hidden_documents(run: Attribution, mask: Mask) -> np.ndarray:
    """Ids of the documents of data sets that are hidden."""
    return np.array([k for k in run.documents.ids.tolist() if mask.hides_all_of(run.data_set(k))], dtype=np.int64)


def _hidden(tokens: Tokens, mask: Mask, already: np.ndarray) -> np.ndarray:
    """Tokens that have a character of a hidden word, [n]; words may go over several tokens."""
    hidden = np.zeros(len(tokens), bool)
    cuts = np.flatnonzero((np.diff(tokens.row, prepend=-1) != 0) | (np.diff(tokens.document, prepend=-1) != 0))
    for start, stop in zip(cuts, [*cuts[1:], len(tokens)]):
        if already[start]:
            continue
        texts = [tokens.vocabulary[k] for k in tokens.token[start:stop]]
        if mask.hides(text := "".join(texts)):
            hidden[start:stop] = True
            continue
        ends = np.cumsum([len(text) for text in texts])
        for first, last in mask.spans(text, cut=True):
            hidden[start + np.searchsorted(ends, first, "right") : start + np.searchsorted(ends, last, "left") + 1] = (
                True
            )
    return hidden
