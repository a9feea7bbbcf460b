"""Rivals that need no model: what a token gives to BM25 of the query, and whether it is part of a keyword.

A word is a token's text without case and surrounding space, so that the tokens of a row and of a query are compared
however they were spelled.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retrograd.data.documents import documents_of
from retrograd.data.rows import build_rows
from retrograd.query.questions import build_questions
from retrograd.select.places import Places
from retrograd.settings.run import QueryConfig

__all__ = ["bm25", "keyword_tokens", "query_tokens", "read_keywords"]

_SATURATION, _LENGTH = 1.5, 0.75  # k1 and b, the usual ones


def query_tokens(name: str, query: QueryConfig, tokenizer: Any) -> list[list[int]]:
    """Tokens of each document of a query, or of each question with its right answer.

    Raises:
        ValueError: If the query is a function or a contrast, which has no text.
    """
    if query.dataset is None:
        raise ValueError(f"query {name!r} has no text for control bm25: it is a function or a contrast. Leave bm25 out")
    documents = documents_of(query)
    if query.form == "text":
        rows = build_rows(
            documents,
            tokenizer,
            text_column=query.text_column,
            assistant_only_loss=query.assistant_only_loss,
            max_length=query.max_length,
        )
        return [ids.tolist() for ids in rows.input_ids]
    gold = build_questions(documents, tokenizer, form="cloze").gold
    texts = [f"{row['question']} {row['choices'][right]}" for row, right in zip(documents, gold)]
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


def bm25(places: Places, queries: Sequence[Sequence[int]], tokenizer: Any) -> Tensor:
    """What each real token adds to the mean BM25 of its document for the queries, [n]; sums by document are BM25.

    Of a word w that a document of |d| real tokens has n_w times, each time adds, for each time a query has it,
    idf(w) · (k1 + 1) / (n_w + k1 (1 − b + b |d|/mean)),  idf(w) = ln(1 + (N − N_w + ½)/(N_w + ½)).
    Robertson and Zaragoza 2009; k1 = 1.5, b = 0.75.
    """
    words = _Words(tokenizer)
    asked = Counter(word for query in queries for word in map(words, query) if word)
    kinds: dict[str, int] = {}
    word = np.array([kinds.setdefault(words(token), len(kinds)) for token in places.token.tolist()])
    document = places.document.numpy()
    pairs, pair_of, times = np.unique(np.stack([document, word]), axis=1, return_inverse=True, return_counts=True)
    having = np.bincount(pairs[1], minlength=len(kinds))  # documents with the word
    lengths = np.bincount(document, minlength=places.documents)
    count = len(places.present())
    wanted = np.array([asked[kind] for kind in kinds]) / len(queries)
    idf = np.array([math.log(1 + (count - n + 0.5) / (n + 0.5)) for n in having])
    scale = _SATURATION * (1 - _LENGTH + _LENGTH * lengths[document] / lengths[lengths > 0].mean())
    return torch.from_numpy((wanted * idf)[word] * (_SATURATION + 1) / (times[pair_of.ravel()] + scale))


def read_keywords(path: Path) -> list[str]:
    """Keywords of a text file, one a line; of a lab's facts.jsonl, the names and values of the forget side.

    Raises:
        ValueError: If there is no such file or no keyword in it.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf8").splitlines() if line.strip()]
        if path.suffix == ".jsonl":
            facts = [fact for fact in map(json.loads, lines) if fact["side"] == "forget"]
            lines = [str(fact[name]) for fact in facts for name in ("entity", "value")]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"cannot read keywords from {path}: {error!r}. Give a text file with one keyword a line, or a lab's "
            "facts.jsonl"
        ) from error
    if not lines:
        raise ValueError(f"{path} has no keyword; write one a line")
    return sorted(set(lines))


def keyword_tokens(places: Places, rows: Sequence[np.ndarray], keywords: Sequence[str], tokenizer: Any) -> Tensor:
    """1 for each real token that is part of a keyword, else 0, [n].

    Raises:
        ValueError: If no keyword occurs.
    """
    words = _Words(tokenizer)
    phrases: dict[str, set[tuple[str, ...]]] = {}
    for keyword in keywords:
        for text in (keyword, f" {keyword}"):  # with and without the space that a BPE token begins with
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            phrase = tuple(word for word in map(words, ids) if word)
            if phrase:
                phrases.setdefault(phrase[0], set()).add(phrase)
    hit = torch.zeros(places.shape, dtype=torch.float64)
    for number, ids in enumerate(rows):
        row = [words(int(token)) for token in ids]
        for start, word in enumerate(row):
            for phrase in phrases.get(word, ()):
                if tuple(row[start : start + len(phrase)]) == phrase:
                    hit[number, start : start + len(phrase)] = 1
    hits = places.gather(hit)
    if not hits.any():
        raise ValueError(
            f"none of {len(keywords)} keywords, such as {keywords[0]!r}, occurs among {len(hits)} real tokens; a "
            "keyword is compared token by token without case"
        )
    return hits


class _Words:
    """A token's text without case and surrounding space, each decoded once."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.known = tokenizer, dict[int, str]()

    def __call__(self, token: int) -> str:
        if token not in self.known:
            self.known[token] = self.tokenizer.decode([token]).strip().lower()
        return self.known[token]
