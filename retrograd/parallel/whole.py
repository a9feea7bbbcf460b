"""A function of whole parameters that lie in pieces: each process computes it for one of them at a time.

    process q:  f(θ_q) whole,  q = 0 … N − 1        pieces of θ_q from all to q, and of f(θ_q) from q to all

Two exchanges of a parameter and one computation, in each replica. Were it gathered on every process instead, that would
be N − 1 copies of it, and N computations of the same. Either way a process has no more than one parameter whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from retrograd.core.memory import Owned

if TYPE_CHECKING:
    from retrograd.parallel.pieces import Pieces

__all__ = ["of_whole"]

_Function = Callable[..., tuple[Tensor, ...]]
_Given = Callable[[str], tuple[Tensor, ...]]


def of_whole(
    lying: Pieces, function: _Function, names: Sequence[str], given: _Given
) -> Iterator[tuple[str, tuple[Tensor, ...]]]:
    """As `tree.of_whole`, of parameters named in their order; every process has pieces of each."""
    # those of about one size go together: what is exchanged is padded to the largest
    ordered = sorted(names, key=lambda name: -lying.shapes[name].numel())
    for start in range(0, len(ordered), lying.mesh.size):
        yield from _one_each(lying, function, ordered[start : start + lying.mesh.size], given)


class _Parcel(NamedTuple):
    """What each process sends of a parameter: the shapes of slabs, one after another, and which of them have K."""

    name: str
    shapes: list[torch.Size]
    wide: list[bool]

    @property
    def sizes(self) -> list[int]:
        return [shape.numel() for shape in self.shapes]

    def opened(self, row: Tensor) -> Sequence[Tensor]:
        """The slabs in [n, …] of n numbers or more, flat."""
        return row[: sum(self.sizes)].split(self.sizes)


def _one_each(
    lying: Pieces, function: _Function, some: list[str], given: _Given
) -> Iterator[tuple[str, tuple[Tensor, ...]]]:
    """Of one parameter for each process; there may be none for the last ones."""
    mesh, rows, parcels = lying.mesh, list[Tensor](), list[_Parcel]()
    for name in some:
        parcel, row = _packed(lying, name, given)
        parcels.append(parcel)
        rows.append(row)
    assert len({row.dtype for row in rows}) == 1, "the parameters of a model are of one dtype"
    width = max(map(len, rows))
    rows = [F.pad(row, (0, width - len(row))) for row in rows]
    there = Owned(mesh.exchanged(torch.stack(rows + [torch.zeros_like(rows[0])] * (mesh.size - len(rows)))))
    del rows, row
    results = _computed(lying, function, parcels[mesh.place], there) if mesh.place < len(some) else there.take()
    results = mesh.exchanged(F.pad(results, (0, width - results.shape[1])))
    for parcel, row in zip(parcels, results):
        yield from _pieces(lying, parcel, row)


def _packed(lying: Pieces, name: str, given: _Given) -> tuple[_Parcel, Tensor]:
    """What this process sends of a parameter, [n]."""
    pieces = {label: given(label) for label in lying.names(name)}
    trees = [dict(zip(pieces, each, strict=True)) for each in zip(*pieces.values(), strict=True)]
    slabs = [lying.slab(name, own) for own in trees]
    parcel = _Parcel(name, [x.shape for x in slabs], [lying.wide(name, own) for own in trees])
    return parcel, torch.cat([x.flatten() for x in slabs])


def _computed(lying: Pieces, function: _Function, parcel: _Parcel, there: Owned[Tensor]) -> Tensor:
    """What every process has sent of a parameter, [N, n] → what each gets of the function, [N, n]."""
    results = function(*_joined(lying, parcel, there.take()))
    return torch.cat([lying.dealt(parcel.name, x) for x in results], 1)


def _joined(lying: Pieces, parcel: _Parcel, there: Tensor) -> Iterator[Tensor]:
    slabs = zip(*map(parcel.opened, there), strict=True)
    for every, shape, wide in zip(slabs, parcel.shapes, parcel.wide, strict=True):
        yield lying.joined(parcel.name, [x.view(shape) for x in every], wide)


def _pieces(lying: Pieces, parcel: _Parcel, row: Tensor) -> Iterator[tuple[str, tuple[Tensor, ...]]]:
    slabs = zip(parcel.opened(row), parcel.wide, strict=True)
    trees = [dict(lying.taken(parcel.name, slab, wide)) for slab, wide in slabs]
    for label in lying.names(parcel.name):
        yield label, tuple(own[label] for own in trees)
