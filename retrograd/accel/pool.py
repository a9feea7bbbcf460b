"""Large blocks of host memory, used again instead of given back: an allocator behind `core.memory`.

The kernel clears every page at its first touch, and a virtual machine's host may have to find it first: 2 to 3 s for a
GiB were measured where memory already there costs 0.07. A state that a step makes takes the place of one that is gone.
"""

from __future__ import annotations

import math
import mmap
import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from threading import RLock
from typing import TypeVar

import torch
from torch import Tensor

__all__ = ["block", "empty", "held", "reusing"]

T = TypeVar("T")

_LARGE = 4 << 20


class _Idle:
    """Blocks that nobody uses, by size; none where nobody asks to keep any."""

    def __init__(self) -> None:
        self.limits: list[int] = []
        self._size = 0
        self._blocks: dict[int, list[mmap.mmap]] = defaultdict(list)
        self._lock = RLock()  # a block may come back at any time, in any thread

    @property
    def limit(self) -> int:
        return max(self.limits, default=0)

    def give(self, block: mmap.mmap) -> None:
        with self._lock:
            if self._size + len(block) <= self.limit:
                self._size += len(block)
                self._blocks[len(block)].append(block)

    def take(self, size: int) -> mmap.mmap | None:
        with self._lock:
            if not self._blocks[size]:
                return None
            self._size -= size
            return self._blocks[size].pop()

    def drop(self) -> None:
        with self._lock:
            self._size = 0
            self._blocks.clear()


_idle = _Idle()


def reusing(given: Iterable[T], limit: int) -> Iterator[T]:
    """Its items; while they are made, large blocks that nobody uses any more are kept for the next ones of their size.

    Args:
        limit: Bytes kept at most. They are never more than were in use at once; with 0 all is as elsewhere.
    """
    _idle.limits.append(limit)
    try:
        yield from given
    finally:
        _idle.limits.remove(limit)
        if not _idle.limit:
            _idle.drop()


def block(size: int) -> Tensor:
    """[size] uint8 of host memory, not filled; used before if there is such a one."""
    if not (_large(size) and _idle.limit):
        return held(size)
    memory = _idle.take(size) or _fresh(size)
    view = memoryview(memory)  # lives as long as any tensor that sees it
    weakref.finalize(view, _idle.give, memory).atexit = False
    return torch.frombuffer(view, dtype=torch.uint8)


def held(size: int) -> Tensor:
    """As `block`, for what is held long: never one used before, and given back to the machine."""
    return torch.frombuffer(_fresh(size), dtype=torch.uint8) if _large(size) else torch.empty(size, dtype=torch.uint8)


def _fresh(size: int) -> mmap.mmap:
    """In huge pages: with pages of 4 KiB the first touch costs five times the copy."""
    block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    block.madvise(mmap.MADV_HUGEPAGE)
    return block


def empty(shape: Sequence[int], like: Tensor) -> Tensor:
    """A contiguous tensor of the dtype and device of `like`, not filled; on the host a `block` where it is large."""
    size = math.prod(shape) * like.element_size()
    if like.device.type != "cpu" or not (_large(size) and _idle.limit):
        return torch.empty(shape, dtype=like.dtype, device=like.device)
    return block(size).view(like.dtype).view(shape)


def _large(size: int) -> bool:
    return size >= _LARGE and hasattr(mmap, "MADV_HUGEPAGE")
