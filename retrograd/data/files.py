"""Files as bytes and as text: decompressed, without a byte order mark, in UTF-8 or refused with the line that is not.

.gz    gzip, of one or several members
.zst   Zstandard, of one or several frames
"""

from __future__ import annotations

import codecs
import gzip
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TextIO, cast

__all__ = ["PACKED", "format_of", "not_utf8", "opened", "opened_text"]

PACKED = (".gz", ".zst")
_WIDE = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def format_of(path: Path) -> str:
    """The suffix that says what a file holds, whether it is compressed or not.

    >>> format_of(Path("rows.jsonl.gz"))
    '.jsonl'
    """
    name = path.with_suffix("") if path.suffix.lower() in PACKED else path
    return name.suffix.lower()


@contextmanager
def opened(file: Path) -> Iterator[BinaryIO]:
    """A file's bytes behind its byte order mark.

    Raises:
        ValueError: If it is in UTF-16, or its compression is damaged.
    """
    try:
        with _unpacked(file) as stream:
            head = stream.peek(3)[:3]
            if head[:2] in _WIDE:
                raise ValueError(f"{file.name} is in UTF-16, and files are read as UTF-8: save it again as UTF-8")
            stream.read(len(codecs.BOM_UTF8) if head == codecs.BOM_UTF8 else 0)
            yield cast(BinaryIO, stream)
    except (EOFError, gzip.BadGzipFile, OSError) as error:
        if file.suffix.lower() not in PACKED:
            raise
        raise ValueError(f"{file.name} cannot be decompressed, it is damaged or cut short: {error}") from error


@contextmanager
def opened_text(file: Path, newline: str | None = None) -> Iterator[TextIO]:
    """A file's text; `newline` as in `open`.

    Raises:
        ValueError: As `opened`, and if a line is not UTF-8.
    """
    try:
        with opened(file) as stream, io.TextIOWrapper(stream, "utf-8", newline=newline) as text:
            yield text
    except UnicodeDecodeError:
        with opened(file) as stream:
            for number, line in enumerate(stream, start=1):
                try:
                    line.decode()
                except UnicodeDecodeError as error:
                    raise not_utf8(error, file, number) from error
        raise


def not_utf8(error: UnicodeDecodeError, file: Path, number: int) -> ValueError:
    """What to tell of a line that is not UTF-8."""
    near = error.object[max(0, error.start - 10) : error.end + 10].decode("latin-1")
    return ValueError(
        f"{file.name}, line {number} is not UTF-8: byte 0x{error.object[error.start]:02x} at {error.start} of the line "
        f"(read as latin-1: {near!r}). Convert the file, such as by `iconv -f latin1 -t utf8`"
    )


def _unpacked(file: Path) -> io.BufferedReader:
    if file.suffix.lower() == ".gz":
        return io.BufferedReader(gzip.open(file, "rb"))
    if file.suffix.lower() == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(file), compression="zstd"))
    return file.open("rb")
