"""JSON files as a data set in which every value is what was written.

Readers that guess a column's type from its first block turn "1945-05-08" into a timestamp, and refuse a file whose
millionth row has a key of another type that nobody asked for. Here a column has a type where all its values share one:
text, whole numbers, numbers, truth values, or lists of them. Any other column (objects, mixed types) holds each value
as it was written, and whoever reads it says what does not fit, and in which row.
"""

from __future__ import annotations

import codecs
import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset, Features

__all__ = ["read_json"]

_ROWS, _BYTES = 1000, 64 << 20  # of a batch, whichever comes first
_MIXED = "mixed"
_KINDS = {bool: "bool", int: "int64", float: "float64", str: "string", type(None): "null"}
_INTEGERS = range(-(1 << 63), 1 << 63)

_Kind = str | tuple[str]  # of a value, or (of items,) of a list


def read_json(files: Sequence[Path], cache: Path) -> Dataset:
    """Rows of JSON files: an object on each line, a list of objects or of texts, or an object of columns.

    Blank lines are no rows. A key that a row lacks is None there.

    Args:
        cache: A folder for these bytes alone; the rows stay on disk there.
    Raises:
        ValueError: If a file is none of these, with file and line.
    """
    import datasets

    file = cache / "rows.arrow"
    if not file.exists():
        cache.mkdir(parents=True, exist_ok=True)
        temporary = cache / f"rows.{os.getpid()}.tmp"
        _write(files, temporary, _features(files))
        temporary.replace(file)
    return datasets.Dataset.from_file(str(file))


def _features(files: Sequence[Path]) -> Features:
    """The type of each column, of all rows."""
    import datasets

    kinds: dict[str, _Kind] = {}
    for batch in _batches(files):
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
    for part in value:
        item = _common(item, _kind(part))
    return _MIXED if item == _MIXED or isinstance(item, tuple) else (item,)


def _common(one: _Kind, other: _Kind) -> _Kind:
    if one == other or other == "null":
        return one
    if one == "null":
        return other
    if isinstance(one, tuple) and isinstance(other, tuple):
        item = _common(one[0], other[0])
        return _MIXED if item == _MIXED else (str(item),)
    return _MIXED


def _write(files: Sequence[Path], path: Path, features: Features) -> None:
    import datasets
    import pyarrow

    schema = features.arrow_schema
    mixed = {name for name, feature in features.items() if isinstance(feature, datasets.Json)}
    with pyarrow.OSFile(str(path), "wb") as opened, pyarrow.ipc.new_stream(opened, schema) as writer:
        for batch in _batches(files):
            columns: dict[str, list[Any]] = {name: [row.get(name) for row in batch] for name in features}
            for name in mixed:
                columns[name] = [None if value is None else json.dumps(value) for value in columns[name]]
            writer.write_table(pyarrow.Table.from_pydict(columns, schema=schema))


def _batches(files: Sequence[Path]) -> Iterator[list[dict[str, Any]]]:
    batch: list[dict[str, Any]] = []
    held = 0
    for file in files:
        for row, size in _rows(file):
            batch.append(row)
            held += size
            if len(batch) == _ROWS or held >= _BYTES:
                yield batch
                batch, held = [], 0
    if batch:
        yield batch


def _rows(file: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Each row and its bytes."""
    with file.open("rb") as opened:
        start = len(codecs.BOM_UTF8) if opened.read(3) == codecs.BOM_UTF8 else 0
        opened.seek(start)
        if _is_one_value(file, next((line for line in opened if line.strip()), b"{}")):
            yield from _whole(file)
            return
        opened.seek(start)
        for number, line in enumerate(opened, start=1):
            if line.strip():
                yield _object(line, file, number), len(line)


def _is_one_value(file: Path, first: bytes) -> bool:
    """Whether a file is one value of several lines or a list, by its first line if that will do."""
    with contextlib.suppress(ValueError):
        return isinstance(json.loads(first), list)
    if first.lstrip().startswith(b"["):
        return True
    with contextlib.suppress(ValueError):
        json.loads(file.read_bytes())
        return True
    return False


def _object(line: bytes, file: Path, number: int) -> dict[str, Any]:
    try:
        row = _parsed(line)
    except ValueError as error:
        raise ValueError(f"{file.name}, line {number} is not valid JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(
            f"{file.name}, line {number} is {type(row).__name__} {str(row)[:60]!r}, not an object such as "
            '{"text": "…"}, and the file is no list'
        )
    return row


def _parsed(data: bytes) -> Any:
    value = json.loads(data)
    if b"\\ud" in data.lower():  # half of a surrogate pair, which JSON can spell, is no text
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _whole(file: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """The rows of a file that is one value."""
    data = file.read_bytes()
    try:
        value = _parsed(data)
    except ValueError as error:
        line = getattr(error, "lineno", 1)
        raise ValueError(f"{file.name}, line {line} is not valid JSON: {error}") from error
    if isinstance(value, dict) and len({len(x) if isinstance(x, list) else -1 for x in value.values()} - {-1}) == 1:
        columns = {name: x for name, x in value.items() if isinstance(x, list)}
        if len(columns) == len(value):
            value = [dict(zip(columns, row)) for row in zip(*columns.values())]
    rows = [{"text": row} if isinstance(row, str) else row for row in value] if isinstance(value, list) else [value]
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(
                f"{file.name}: item {number} is {type(row).__name__} {str(row)[:60]!r}, not an object or a text"
            )
        yield row, len(data) // len(rows)
