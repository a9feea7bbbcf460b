"""Parameters cut along their first dimension: S logical pieces of each, S/N neighbours on every process of a replica.

    piece s of θ [n, …]  =  rows s·p … (s + 1)·p − 1,  p = ⌈n/S⌉          named "θ@s"

The last pieces are shorter, or empty, where S does not divide n; a scalar is one row. A piece is a leaf of its own in
every tree of a process, so that whatever is computed leaf by leaf (an update, a norm before it is added up, a digest)
does not depend on how many processes there are; and where the pieces are cut from whole leaves for those numbers alone
(`Recipe.pieces`), it has the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from retrograd.core import tree
from retrograd.core.optim import Params
from retrograd.core.slots import Ledger, joined_digest
from retrograd.core.step import Recipe, State
from retrograd.parallel.group import Group, RankError
from retrograd.parallel.mesh import Mesh
from retrograd.parallel.sums import OrderedSum, buckets
from retrograd.parallel.whole import of_whole

__all__ = ["PieceLedger", "PieceSum", "Pieces", "name_of", "parameter_of"]


class Pieces:
    """How the parameters of one model lie over the processes of a group. Every method is called by all of them.

    Tensors [K, *shape] of K queries are cut along the parameter's own first dimension.

    Args:
        like: The whole parameters.
        shards: Logical pieces of each.
        group: The processes; their number divides `shards`.
        replicas: How many copies of the pieces they have (`mesh`).
    """

    def __init__(self, like: Params, shards: int, group: Group, replicas: int = 1) -> None:
        self.shapes = {name: x.shape for name, x in like.items()}
        self.shards, self.group, self.mesh = shards, group, Mesh(group, replicas)
        self.each = shards // self.mesh.size

    def names(self, name: str) -> list[str]:
        """Names of this process's pieces of a parameter, in order."""
        return [name_of(name, s) for s in range(self.mesh.place * self.each, (self.mesh.place + 1) * self.each)]

    def own(self, whole: Params) -> Params:
        """Copies of this process's pieces of tensors that it has whole."""
        pieces: Params = {}
        for name, x in whole.items():
            rows = self._rows(name, x)
            start, stop = self._bounds(name, self.mesh.place)
            pieces.update(self._pieces(name, rows[:, start:stop], x.ndim > len(self.shapes[name])))
        return pieces

    def whole(self, own: Params) -> Params:
        """The whole tensors of the pieces that every process has, on all of them."""
        return self.some(own, self.shapes)

    def some(self, own: Params, names: Iterable[str]) -> Params:
        """As `whole`, of some parameters; small ones are sent together."""
        slabs = {name: self.slab(name, own) for name in names}
        gathered: Params = {}
        for bucket in buckets(slabs):
            gathered |= self._coming(own, {name: slabs[name] for name in bucket})()
        return gathered

    def coming(self, own: Params, names: Iterable[str]) -> Callable[[], Params]:
        """As `some`, all of them begun: what this returns waits for the other processes, and may be called later."""
        slabs = {name: self.slab(name, own) for name in names}
        begun = [self._coming(own, {name: slabs[name] for name in bucket}) for bucket in buckets(slabs)]
        return lambda: {name: x for arrived in begun for name, x in arrived().items()}

    def _coming(self, own: Params, slabs: Params) -> Callable[[], Params]:
        flats = [slab.flatten() for slab in slabs.values()]
        sharing = self.mesh.sharing(flats[0] if len(flats) == 1 else torch.cat(flats))
        shapes = {name: (slab.shape, self.wide(name, own)) for name, slab in slabs.items()}
        sizes = [len(flat) for flat in flats]

        def arrived() -> Params:
            parts = [flat.split(sizes) for flat in sharing()]
            leaves = zip(shapes.items(), zip(*parts, strict=True), strict=True)
            return {
                name: self.joined(name, [x.view(shape) for x in each], wide) for (name, (shape, wide)), each in leaves
            }

        return arrived

    def zeros(self, name: str, own: Params) -> Tensor:
        """A whole tensor of zeros like one whose pieces are here."""
        piece = own[self.names(name)[0]]
        return piece.new_zeros((*piece.shape[:1], *self.shapes[name]) if self.wide(name, own) else self.shapes[name])

    def dealt(self, name: str, whole: Tensor) -> Tensor:
        """[N, K·rows·columns]: for every process of a replica its rows, padded to one number."""
        rows, world, height = self._rows(name, whole), self.mesh.size, self._height(name) * self.each
        if world * height == self._count(name):
            return rows.reshape(len(rows), world, -1).transpose(0, 1).reshape(world, -1)
        padded = rows.new_zeros((world, len(rows), height, self._columns(name)))
        for rank in range(world):
            start, stop = self._bounds(name, rank)
            padded[rank, :, : stop - start] = rows[:, start:stop]
        return padded.view(world, -1)

    def taken(self, name: str, dealt: Tensor, wide: bool) -> Iterator[tuple[str, Tensor]]:
        """The pieces in this process's row of `dealt`; `wide` says whether there are K."""
        height, (start, stop) = self._height(name) * self.each, self._bounds(name, self.mesh.place)
        rows = dealt.view(len(dealt) // (height * self._columns(name)), height, self._columns(name))
        yield from self._pieces(name, rows[:, : stop - start], wide)

    def width(self, name: str, shape: torch.Size) -> int:
        """Entries of a row of `dealt`, of a tensor of this shape."""
        queries = shape[0] if len(shape) > len(self.shapes[name]) else 1
        return queries * self._height(name) * self.each * self._columns(name)

    def _pieces(self, name: str, slab: Tensor, wide: bool) -> Iterator[tuple[str, Tensor]]:
        height, shape = self._height(name), self.shapes[name][1:]
        for place, label in enumerate(self.names(name)):
            piece = slab[:, place * height : (place + 1) * height]
            shaped = piece.reshape(len(piece), piece.shape[1], *shape)
            yield label, (shaped if wide else shaped[0]).clone(memory_format=torch.contiguous_format)

    def _count(self, name: str) -> int:
        return self.shapes[name][0] if self.shapes[name] else 1

    def _columns(self, name: str) -> int:
        return math.prod(self.shapes[name][1:])

    def _height(self, name: str) -> int:
        """Rows of a piece that is not among the last."""
        return -(-self._count(name) // self.shards)

    def _bounds(self, name: str, rank: int) -> tuple[int, int]:
        """The rows of a process."""
        count, height = self._count(name), self._height(name) * self.each
        return min(count, rank * height), min(count, (rank + 1) * height)

    def _rows(self, name: str, x: Tensor) -> Tensor:
        """[K or 1, rows, columns]."""
        return x.reshape(len(x) if x.ndim > len(self.shapes[name]) else 1, self._count(name), self._columns(name))

    def wide(self, name: str, own: Params) -> bool:
        """Whether there are K of a parameter."""
        return own[self.names(name)[0]].ndim > max(1, len(self.shapes[name]))

    def slab(self, name: str, own: Params) -> Tensor:
        """[K or 1, rows, columns] of this process, padded to what the first has."""
        wide, height = self.wide(name, own), self._height(name) * self.each
        pieces = [own[label] for label in self.names(name)]
        flat = [x.reshape(len(x) if wide else 1, x.shape[1 if wide else 0], self._columns(name)) for x in pieces]
        mine = flat[0] if len(flat) == 1 else torch.cat(flat, 1)
        return F.pad(mine, (0, 0, 0, height - mine.shape[1])) if mine.shape[1] < height else mine

    def joined(self, name: str, slabs: list[Tensor], wide: bool) -> Tensor:
        """The whole tensor of every process's slab, in storage of its own size."""
        bounds = [self._bounds(name, rank) for rank in range(len(slabs))]
        rows = torch.cat([slab[:, : stop - start] for slab, (start, stop) in zip(slabs, bounds, strict=True)], 1)
        return rows.reshape(len(rows), *self.shapes[name]) if wide else rows.reshape(self.shapes[name])

    # How leaves lie, for `tree.lying`: every parameter's pieces are neighbours among a process's leaves.

    def across(self, parts: Tensor) -> Tensor:
        """As `tree.across`: parameter by parameter, its pieces in order."""
        rows = parts.reshape(-1, self.each, *parts.shape[1:])
        return torch.cat(self.mesh.shared(rows), 1).reshape(-1, *parts.shape[1:])

    def total(self, part: Tensor) -> Tensor:
        """As `tree.total`, in the order of processes."""
        first, *others = self.mesh.shared(part)
        return sum(others, start=first)

    def of_whole(
        self,
        function: Callable[..., tuple[Tensor, ...]],
        names: Sequence[str],
        given: Callable[[str], tuple[Tensor, ...]],
    ) -> Iterator[tuple[str, tuple[Tensor, ...]]]:
        """As `tree.of_whole`."""
        return of_whole(self, function, [parameter_of(label) for label in names[:: self.each]], given)

    def recipe_of(self, recipe: Recipe) -> Recipe:
        """The recipe by the names of this process's pieces."""
        optimizer: Any = recipe.optimizer
        lists = {kind: getattr(optimizer, kind) for kind in ("spared", "exclude") if hasattr(optimizer, kind)}
        own = {kind: tuple(label for name in names for label in self.names(name)) for kind, names in lists.items()}
        return replace(recipe, optimizer=replace(optimizer, **own), pieces=1)


class PieceSum(OrderedSum):
    """Σ_s x_s of whole tensors by name, of which every process keeps its own pieces."""

    def __init__(self, pieces: Pieces, like: Params) -> None:
        super().__init__(pieces.group, pieces.mesh)
        self.pieces, self.wide = pieces, {name: x.ndim > len(pieces.shapes[name]) for name, x in like.items()}

    def dealt(self, names: list[str], term: Params) -> Tensor:
        dealt = [self.pieces.dealt(name, term[name]) for name in names]
        return dealt[0] if len(dealt) == 1 else torch.cat(dealt, 1)

    def result(self, number: int = 0) -> Params:
        """The pieces of a sum that are this process's."""
        pieces: Params = {}
        for bucket, shapes in enumerate(self.shapes):
            part, start = self._told(number, bucket), 0
            for name, shape in shapes:
                width = self.pieces.width(name, shape)
                pieces.update(self.pieces.taken(name, part[start : start + width], self.wide[name]))
                start += width
        return pieces

    def _told(self, number: int, bucket: int) -> Tensor:
        """This process's part of a bucket, from the replica that has it."""
        part = self.parts.get((number, bucket))
        part = torch.empty_like(self.likes[bucket]).contiguous() if part is None else part
        self.mesh.told(part, self.at[number])
        return part


class PieceLedger(Ledger):
    """Digests of states that lie in pieces, those of the whole states; all replicas have to have one."""

    def __init__(self, digests: dict[int, str], lying: Pieces) -> None:
        super().__init__(digests, lying.shards)
        self.lying = lying

    def digest(self, state: State) -> str:
        """As `Ledger.digest`.

        Raises:
            RankError: If a replica has other bits than the first.
        """
        leaves, each, mesh = tree.leaves((state.params, state.moments)), self.lying.each, self.lying.mesh
        own = [tree.digest(leaves[place::each]) for place in range(each)]
        every = self.lying.group.everywhere(own)
        digests = [joined_digest(x for rank in mesh.of_replica(every, k) for x in rank) for k in range(mesh.replicas)]
        for replica, digest in enumerate(digests):
            if digest != digests[0]:
                ranks = mesh.of_replica(list(range(len(every))), replica)
                raise RankError(
                    f"at step {state.step} replica {replica} ({_ranks(ranks)}) has a state of digest {digest[-12:]}, "
                    f"replica 0 of {digests[0][-12:]}: one of them computes otherwise, or its memory fails. The same "
                    "command resumes from the last durable state; if it happens again, leave those machines out."
                )
        return digests[0]


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"


def name_of(name: str, piece: int) -> str:
    """What a piece of a parameter is called."""
    return f"{name}@{piece}"


def parameter_of(label: str) -> str:
    """Whose piece it is."""
    return label.rpartition("@")[0]
