"""CSV, TSV and plain text as rows of texts, each value as it is written.

Nothing is guessed: "007" stays text, and "NA" is no gap. In a table of one column a blank line is an empty document, as
programs write an empty cell there; in one of several it is no row. In plain text every line is a document.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from retrograd.data.files import opened_text

__all__ = ["csv_rows", "text_rows", "tsv_rows"]


def text_rows(file: Path) -> Iterator[tuple[dict[str, str], int]]:
    """Each line, and its size."""
    with opened_text(file) as text:
        for line in text:
            yield {"text": line.removesuffix("\n")}, len(line)


def csv_rows(file: Path) -> Iterator[tuple[dict[str, str], int]]:
    """Each row by its column, and its size."""
    return _table(file, ",")


def tsv_rows(file: Path) -> Iterator[tuple[dict[str, str], int]]:
    """As `csv_rows`, between tabs."""
    return _table(file, "\t")


def _table(file: Path, separator: str) -> Iterator[tuple[dict[str, str], int]]:
    with opened_text(file, newline="") as text:
        lines = _records(file, text, separator)
        names = next((fields for _, fields in lines if fields), [])
        header = [name or f"Unnamed: {place}" for place, name in enumerate(names)]
        if twice := sorted({name for name in header if header.count(name) > 1}):
            raise ValueError(f"{file.name}: the header has column {twice[0]!r} twice; give each its own name")
        for line, fields in lines:
            if len(header) > 1 and not "".join(fields).strip() and len(fields) < 2:
                continue
            fields = fields or [""]
            if len(fields) != len(header):
                few = "fewer" if len(fields) < len(header) else "more"
                raise ValueError(
                    f"{file.name}, line {line} has {few} fields than the header: {len(fields)}, not {len(header)} "
                    f"({', '.join(header)}). Quote fields that hold {separator!r} or a line break"
                )
            yield dict(zip(header, fields)), sum(map(len, fields))


def _records(file: Path, text: TextIO, separator: str) -> Iterator[tuple[int, list[str]]]:
    """Each record with the line that it ends on; its fields may be longer than the module's own limit."""
    reader = csv.reader(text, delimiter=separator, strict=True)
    while True:
        before = csv.field_size_limit(sys.maxsize)
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise ValueError(
                f"{file.name}, line {reader.line_num} cannot be read: {error}. A quote inside a quoted field is doubled"
            ) from error
        finally:
            csv.field_size_limit(before)
        if fields is None:
            return
        yield reader.line_num, fields
