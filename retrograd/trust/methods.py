"""Scores of other methods, to be held against the same bank: files of any tool, other runs, and built-in rivals.

A method has a score for each query column, or one for all of them if its column is named. Scores of documents in a run
by token are spread evenly over the document's targets, which changes no sum over whole documents.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from retrograd.runs.run_folder import Opened
from retrograd.select.files import Stated, file_scores, read_array
from retrograd.select.json_scores import json_columns
from retrograd.select.places import Places, places_of
from retrograd.select.sources import DataSet, find_native, is_run, load_scores, query_columns, split_name
from retrograd.settings.commands import ValidateConfig
from retrograd.settings.run import MagicConfig
from retrograd.trust.rivals import RIVALS

__all__ = ["OWN", "Method", "as_weights", "other_methods"]

OWN = "retrograd"


class Method(NamedTuple):
    """A method's scores for each query column, [K, *weights.shape] float64, negative = proponent.

    scores: One row for all columns where the method does not tell queries apart.
    """

    name: str
    scores: Tensor


def other_methods(config: ValidateConfig, run: Opened) -> list[Method]:
    """The methods that a call of `validate` names.

    Raises:
        ValueError: If a file is missing, does not fit the run's documents, rows or queries, does not say its sign, or
            a rival cannot be computed for a query.
    """
    places = places_of(run.loaded.rows)
    sign = {None: None, "proponent": "positive", "detractor": "negative"}[config.higher_is]
    stated = Stated(cast(Any, sign), config.alignment, by_end=True)
    methods = [_of_source(source, run, places, stated, config.tokens) for source in config.scores]
    for name in config.rivals:
        rival_scores = RIVALS[name](run, places, not config.tokens, config.seed)
        methods.append(
            Method(name, torch.stack([as_weights(scores, config.tokens, run, places) for scores in rival_scores]))
        )
    names = [OWN, *(method.name for method in methods)]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(
            f"two methods are called {twice[0]!r}; give a rival once, and files names of their own, as in --scores "
            "other=FILE"
        )
    return methods


def as_weights(scores: Tensor, per_token: bool, run: Opened, places: Places) -> Tensor:
    """Scores of real tokens, [n], or of the documents that have one, [d], laid out like the run's data weights."""
    loaded = run.loaded
    if not loaded.stream.per_token:
        summed = torch.zeros(loaded.training.weights.shape, dtype=torch.float64)
        summed[places.present()] = places.per_document(scores) if per_token else scores
        return summed
    if per_token:
        return places.scatter(scores)
    targets = places.per_document(torch.ones(len(places), dtype=torch.float64))
    return places.scatter(places.at_tokens(scores / targets))


def _of_source(source: str, run: Opened, places: Places, stated: Stated, tokens: bool) -> Method:
    name, path, chosen = _named(source)
    if is_run(path):
        columns = _columns_of_run(path, chosen)
        _refuse_few(source, len(columns), chosen, run)
        data = DataSet(cast(MagicConfig, run.config), run.loaded.rows, places, None)
        scored = [load_scores([f"{path}:{column}"], data, Stated()) for column in columns]
        scores, per_token = [column.values for column in scored], scored[0].per_token
    else:
        columns = [chosen] if chosen is not None else _columns(path, places, run.loaded.queries.names)
        _refuse_few(source, len(columns), chosen, run)
        loaded = [file_scores(path, column, places, stated) for column in columns]
        scores, per_token = [values for values, *_ in loaded], loaded[0][1]
    if tokens and not per_token:
        raise ValueError(
            f"--tokens leaves out single tokens, and {source} has scores of documents, which say nothing about them; "
            "leave --tokens out, or give scores of tokens"
        )
    bad = sum(int((~torch.isfinite(values)).sum()) for values in scores)
    if bad:
        of = sum(values.numel() for values in scores)
        raise ValueError(
            f"{bad} of {of} scores of {source} are NaN or infinite; a validation needs all, for a set is predicted by "
            "a sum over its documents. Mend the tool that wrote them"
        )
    return Method(name, torch.stack([as_weights(values, per_token, run, places) for values in scores]))


def _named(source: str) -> tuple[str, Path, str | None]:
    """NAME=PATH:COLUMN, where the name and the column may be missing."""
    name, equals, rest = source.partition("=")
    given = bool(equals) and not Path(source.rpartition(":")[0] or source).exists() and not Path(source).exists()
    path, chosen = split_name(rest if given else source)
    if not path.exists():
        raise ValueError(f"--scores {source}: there is no {path}")
    return (name if given else path.stem + (f":{chosen}" if chosen else "")), path, chosen


def _refuse_few(source: str, columns: int, chosen: str | None, run: Opened) -> None:
    names = run.loaded.queries.names
    if columns != len(names) and (chosen is None or columns > 1):
        raise ValueError(
            f"--scores {source} has {columns} column{'s' * (columns != 1)} of scores, and the run {len(names)} query "
            f"columns: {', '.join(names[:6])}{' …' if len(names) > 6 else ''}. Give a column for each, in their order "
            "or by these names, or name one column as FILE:COLUMN, which then counts for all of them"
        )


def _columns_of_run(path: Path, chosen: str | None) -> list[str | None]:
    """The columns of another run's query, each as RUN:COLUMN takes it."""
    native = find_native(str(path) + (f":{chosen}" if chosen else ""))
    return list(query_columns(path, native.query)[native.columns])


def _columns(path: Path, places: Places, names: Sequence[str]) -> list[str | None]:
    """The columns of a file, as `file_scores` takes them, in the order of the run's query columns."""
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        there = pq.read_schema(path).names
        return [f"score_{name}" for name in names] if f"score_{names[0]}" in there else [None]
    if path.suffix == ".json":
        try:
            there = json_columns(json.loads(path.read_text(encoding="utf8")))
        except ValueError as error:
            raise ValueError(f"--scores {path} is not JSON: {error}") from error
        return [name for name in names if name in there] if set(names) & set(there) else [*there] or [None]
    shape: tuple[int, ...] = getattr(read_array(path), "shape", ()) if path.suffix in (".npy", ".pt") else ()
    documents = (places.documents, len(places.present()))
    if len(shape) == 3 or (len(shape) == 2 and shape[0] in documents and shape[1] < places.shape[1]):
        return [str(k) for k in range(shape[-1])]
    return [None]
