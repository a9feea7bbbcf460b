"""Where large results lie: a door to host memory, behind which an accelerator may stand (`use`).

Without one, memory comes from torch. No bit depends on where a result lies.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Generic, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

__all__ = ["Allocator", "Owned", "empty", "empty_like", "held", "reusing", "use"]

T = TypeVar("T")


class Owned(Generic[T]):
    """A value that one place holds and hands over: in `f(x.take())` nobody but `f` holds it, and `f` may let go of it.

    >>> Owned(1).take()
    1
    """

    def __init__(self, *value: T) -> None:
        self._held = list(value)

    def put(self, value: T) -> None:
        """Hold this one from now on."""
        self._held = [value]

    def take(self) -> T:
        """Hand it over."""
        assert self._held, "there is something to be taken, and nobody has taken it"
        return self._held.pop()


@runtime_checkable
class Allocator(Protocol):
    """Whoever gives memory."""

    def empty(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """As `memory.empty`."""

    def held(self, size: int) -> Tensor:
        """As `memory.held`."""

    def reusing(self, given: Iterable[T], limit: int) -> Iterator[T]:
        """As `memory.reusing`."""


class _Torch:
    def empty(self, shape: Sequence[int], like: Tensor) -> Tensor:
        return torch.empty(tuple(shape), dtype=like.dtype, device=like.device)

    def held(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8)

    def reusing(self, given: Iterable[T], limit: int) -> Iterator[T]:
        yield from given


_allocator: Allocator = _Torch()


def use(allocator: Allocator) -> None:
    """From now on memory comes from this one."""
    global _allocator
    _allocator = allocator


def empty(shape: Sequence[int], like: Tensor) -> Tensor:
    """A contiguous tensor of the dtype and device of `like`, not filled."""
    return _allocator.empty(shape, like)


def empty_like(like: Tensor) -> Tensor:
    """`empty` of its shape."""
    return _allocator.empty(like.shape, like)


def held(size: int) -> Tensor:
    """[size] uint8 of host memory, not filled, for what is held long."""
    return _allocator.held(size)


def reusing(given: Iterable[T], limit: int) -> Iterator[T]:
    """Its items; while they are made, memory that nobody uses any more may be kept for the next results of its size.

    Args:
        limit: Bytes kept at most; with 0 all is as elsewhere.
    """
    return _allocator.reusing(given, limit)
