"""Rows of files as a data set in which every value is what was written.

Readers that guess a column's type from its first block turn "1945-05-08" into a timestamp, and refuse a file whose
millionth row has a key of another type that nobody asked for. Here a column has a type where all its values share one:
text, whole numbers, numbers, truth values, or lists of them. Any other column (objects, mixed types) holds each value
as it was written, and whoever reads it says what does not fit, and in which row.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset, Features

__all__ = ["RowsOf", "read_rows"]

_ROWS, _BYTES = 1000, 64 << 20  # of a batch, whichever comes first
_MIXED = "mixed"
_KINDS = {bool: "bool", int: "int64", float: "float64", str: "string", type(None): "null"}
_INTEGERS = range(-(1 << 63), 1 << 63)

_Kind = str | tuple[str]  # of a value, or (of items,) of a list

RowsOf = Callable[[Path], Iterator[tuple[dict[str, Any], int]]]
"""A file → each of its rows, and about how many bytes it takes."""


def read_rows(rows_of: RowsOf, files: Sequence[Path], cache: Path) -> Dataset:
    """The rows of files, one file after the other. A key that a row lacks is None there.

    Args:
        cache: A folder for these bytes alone; the rows stay on disk there.
    Raises:
        ValueError: If a file cannot be read, with file and line.
    """
    import datasets

    file = cache / "rows.arrow"
    if not file.exists():
        cache.mkdir(parents=True, exist_ok=True)
        temporary = cache / f"rows.{os.getpid()}.tmp"
        _write(rows_of, files, temporary, _features(rows_of, files))
        temporary.replace(file)
    return datasets.Dataset.from_file(str(file))


def _features(rows_of: RowsOf, files: Sequence[Path]) -> Features:
    """The type of each column, of all rows."""
    import datasets

    kinds: dict[str, _Kind] = {}
    for batch in _batches(rows_of, files):
        for row in batch:
            for name, value in row.items():
                kinds[name] = _common(kinds.get(name, "null"), _kind(value))

    def feature(kind: _Kind) -> Any:
        if isinstance(kind, tuple):
            return datasets.List(feature(kind[0]))
        return datasets.Json() if kind == _MIXED else datasets.Value(kind)

    return datasets.Features({name: feature(kind) for name, kind in kinds.items()})


def _kind(value: Any) -> _Kind:
    if not isinstance(value, list):
        kind = _KINDS.get(type(value), _MIXED)
        return _MIXED if kind == "int64" and value not in _INTEGERS else kind
    types = set(map(type, value))
    if types == {int} and min(value) in _INTEGERS and max(value) in _INTEGERS:
        return ("int64",)  # token ids, without a look at each
    item: _Kind = "null"
    for element in value:
        item = _common(item, _kind(element))
    return _MIXED if item == _MIXED or isinstance(item, tuple) else (item,)


def _common(first: _Kind, second: _Kind) -> _Kind:
    if first == second or second == "null":
        return first
    if first == "null":
        return second
    if isinstance(first, tuple) and isinstance(second, tuple):
        item = _common(first[0], second[0])
        return _MIXED if item == _MIXED else (str(item),)
    return _MIXED


def _write(rows_of: RowsOf, files: Sequence[Path], path: Path, features: Features) -> None:
    import datasets
    import pyarrow

    schema = features.arrow_schema
    mixed = {name for name, feature in features.items() if isinstance(feature, datasets.Json)}
    with pyarrow.OSFile(str(path), "wb") as opened, pyarrow.ipc.new_stream(opened, schema) as writer:
        for batch in _batches(rows_of, files):
            columns: dict[str, list[Any]] = {name: [row.get(name) for row in batch] for name in features}
            for name in mixed:
                columns[name] = [None if value is None else json.dumps(value) for value in columns[name]]
            writer.write_table(pyarrow.Table.from_pydict(columns, schema=schema))


def _batches(rows_of: RowsOf, files: Sequence[Path]) -> Iterator[list[dict[str, Any]]]:
    batch: list[dict[str, Any]] = []
    held = 0
    for file in files:
        for row, size in rows_of(file):
            batch.append(row)
            held += size
            if len(batch) == _ROWS or held >= _BYTES:
                yield batch
                batch, held = [], 0
    if batch:
        yield batch
