"""What is called for between processes: a pickle, and its tensors beside it, as bytes."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["Pickler", "Unpickler", "as_bytes", "neighbours"]

_BUCKET = 32 << 20  # bytes of small tensors that are broadcast at once


class Pickler(pickle.Pickler):
    """Everything but tensors, which are set aside."""

    def __init__(self, file: Any) -> None:
        super().__init__(file)
        self.tensors: list[Tensor] = []

    def persistent_id(self, value: Any) -> int | None:
        if not isinstance(value, Tensor):
            return None
        self.tensors.append(value.detach())
        return len(self.tensors) - 1


class Unpickler(pickle.Unpickler):
    """What a `Pickler` has written, with the tensors that it had set aside."""

    def __init__(self, file: Any, tensors: Sequence[Tensor]) -> None:
        super().__init__(file)
        self.tensors = tensors

    def persistent_load(self, number: int) -> Tensor:
        return self.tensors[number]


def as_bytes(x: Tensor) -> Tensor:
    """Its bytes, [n], which are those of the tensor itself where it is contiguous."""
    return x.detach().contiguous().reshape(-1).view(torch.uint8)


def neighbours(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of one device that are broadcast together; a large one by itself."""
    group, size = list[Tensor](), 0
    for x in tensors:
        if x.numel() == 0:
            continue
        if group and (size + x.nbytes > _BUCKET or x.device.type != group[0].device.type):
            yield group
            group, size = [], 0
        group.append(x)
        size += x.nbytes
    if group:
        yield group
