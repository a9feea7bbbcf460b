"""Trees of tensors in one flat buffer of host memory.

Kept leaf by leaf, states would lie scattered among the steps' temporaries, and a run of 10 GiB of states was seen to
take 18.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from retrograd.core import tree

__all__ = ["Copy", "as_bytes", "copy_alone", "leave_empty", "packed", "pinned"]

T = TypeVar("T")

Copy = Callable[[Tensor, Tensor], Any]
"""(destination, source) → anything; fills a tensor."""

_ALIGNED = 64  # bytes; sums over a vector may depend on where it begins, so every leaf begins as a fresh tensor does


def packed(values: T, copy: Copy, room: Callable[[int], Tensor]) -> T:
    """A copy of a tree in host memory whose tensors are views of one buffer.

    Args:
        room: Bytes → uint8 memory, aligned: `pinned`, or `core.memory.held`.
    """
    leaves = tree.leaves(values)
    sizes = [-(-leaf.numel() * leaf.element_size() // _ALIGNED) * _ALIGNED for leaf in leaves]
    parts = iter(room(sum(sizes)).split(sizes))

    def place(leaf: Tensor) -> Tensor:
        part = next(parts)[: leaf.numel() * leaf.element_size()].view(leaf.dtype).view(leaf.shape)
        copy(part, leaf)
        return part

    return tree.map(place, values)


def pinned(size: int) -> Tensor:
    """Page-locked memory, which a GPU copies to and from without the processor."""
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)


def copy_alone(destination: Tensor, source: Tensor) -> None:
    """Copy contiguous host memory by the calling thread alone: torch would start a team of threads for it."""
    np.copyto(as_bytes(destination), as_bytes(source))


def leave_empty(destination: Tensor, source: Tensor) -> None:
    """A `Copy` for room that is filled later."""


def as_bytes(tensor: Tensor) -> np.ndarray:
    """The memory of a contiguous tensor on the host."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy()
