"""JSON files as rows: an object on each line, a list of objects or of texts, or an object of columns.

Blank lines are no rows.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from retrograd.data.files import not_utf8, opened

__all__ = ["json_rows"]


def json_rows(file: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Each row and its bytes.

    Raises:
        ValueError: If the file holds no rows, with the line.
    """
    with opened(file) as lines:
        first = next((line for line in lines if line.strip()), b"{}")
    if _is_one_value(file, first):
        yield from _whole(file)
        return
    with opened(file) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _object(line, file, number), len(line)


def _is_one_value(file: Path, first: bytes) -> bool:
    """Whether a file is one value of several lines or a list, by its first line if that will do."""
    with contextlib.suppress(ValueError):
        return isinstance(json.loads(first), list)
    if first.lstrip().startswith(b"["):
        return True
    with contextlib.suppress(ValueError):
        json.loads(_bytes(file))
        return True
    return False


def _bytes(file: Path) -> bytes:
    with opened(file) as stream:
        return stream.read()


def _object(line: bytes, file: Path, number: int) -> dict[str, Any]:
    try:
        row = _parsed(line)
    except UnicodeDecodeError as error:
        raise not_utf8(error, file, number) from error
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
    data = _bytes(file)
    try:
        value = _parsed(data)
    except UnicodeDecodeError as error:
        raise _not_utf8_whole(error, file) from error
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


def _not_utf8_whole(error: UnicodeDecodeError, file: Path) -> ValueError:
    """As `not_utf8`, by the line that the byte is in."""
    before = error.object[: error.start]
    start = before.rfind(b"\n") + 1
    line = UnicodeDecodeError("utf-8", error.object[start:], error.start - start, error.end - start, error.reason)
    return not_utf8(line, file, before.count(b"\n") + 1)
