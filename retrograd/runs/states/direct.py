"""Large files written and read past the operating system's file cache.

A state on disk is written once and read once. In the cache it would take memory that no budget counts, and filling
fresh pages of it costs a processor more than the disk takes: 6.2 s against 0.16 s for 2 GiB on a virtual machine.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

__all__ = ["read_direct", "write_direct"]

_PAGE = 4096  # addresses, sizes and places in the file are multiples of it
_BLOCK = 4 << 20
_DIRECT = getattr(os, "O_DIRECT", 0)  # 0 where the system has none: files then go through the cache

_own = threading.local()


def write_direct(path: Path, parts: Iterable[np.ndarray]) -> None:
    """Write arrays of bytes to a new file, one after the other."""
    block, filled, total = _block(), 0, 0
    with _opened(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as file:
        for part in parts:
            start = 0
            while start < len(part):
                count = min(len(part) - start, _BLOCK - filled)
                np.copyto(block[filled : filled + count], part[start : start + count])
                start, filled, total = start + count, filled + count, total + count
                if filled == _BLOCK:
                    _put(file, block)
                    filled = 0
        _put(file, block[: -(-filled // _PAGE) * _PAGE])  # what is behind the end is cut off
        os.ftruncate(file, total)


def read_direct(path: Path, start: int, parts: Iterable[np.ndarray]) -> None:
    """Fill arrays of bytes, one after the other, from byte `start` of a file on.

    Raises:
        OSError: If the file ends before they are full.
    """
    with _opened(path, os.O_RDONLY) as file:
        os.lseek(file, start - start % _PAGE, os.SEEK_SET)
        block = _get(file)[start % _PAGE :]
        for part in parts:
            filled = 0
            while filled < len(part):
                if not len(block) and not len(block := _get(file)):
                    raise OSError(f"it ends {len(part) - filled:,} bytes early")
                count = min(len(part) - filled, len(block))
                np.copyto(part[filled : filled + count], block[:count])
                filled, block = filled + count, block[count:]


def _block() -> np.ndarray:
    """The calling thread's memory between arrays and files: page-aligned, and warm."""
    if not hasattr(_own, "block"):
        _own.block = np.frombuffer(mmap.mmap(-1, _BLOCK), np.uint8)
    return _own.block


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    try:
        file = os.open(path, flags | _DIRECT, 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        file = os.open(path, flags, 0o666)  # a file system that does not know it, such as a RAM disk
    try:
        yield file
    finally:
        os.close(file)


def _put(file: int, data: np.ndarray) -> None:
    while len(data):
        try:
            data = data[os.write(file, data.data) :]
        except OSError as error:
            _through_the_cache(file, error)


def _get(file: int) -> np.ndarray:
    """The next bytes; none at the end."""
    block = _block()
    while True:
        try:
            return block[: os.readv(file, [block.data])]
        except OSError as error:
            _through_the_cache(file, error)


def _through_the_cache(file: int, error: OSError) -> None:
    """Go on through the cache where the file system takes other sizes, or wrote a part of a page; else raise."""
    flags = fcntl.fcntl(file, fcntl.F_GETFL)
    if error.errno != errno.EINVAL or not flags & _DIRECT:
        raise error
    fcntl.fcntl(file, fcntl.F_SETFL, flags & ~_DIRECT)
