"""Sums over logical shards, in their order, whatever processes hold the terms.

    Σ_s x_s = (((x_0 + x_1) + x_2) + …)

A sum of floating-point numbers depends on its order. With W processes and S shards, rank r has the terms r, W + r,
2W + r, …; in round j the terms jW … jW + W − 1 are exchanged, and each process adds its part of the entries to what it
has, in the order of ranks. So every entry is summed in the order of shards for every W that divides S, and nobody holds
more than one term and a part of the sum.

Of ranks in several replicas (`mesh`) those of one exchange their terms, and the sum so far goes from replica to replica
in the order of the terms: each part of it has a single copy, at the replica that has added last, until all are told.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from retrograd.core.optim import Params
from retrograd.parallel.group import Group
from retrograd.parallel.mesh import Mesh

__all__ = ["OrderedSum", "buckets"]

_BUCKET = 1 << 24  # entries that are exchanged at once


class OrderedSum:
    """Σ_s x_s of tensors by name. Each process adds its terms, one a round, and all of them in every round.

    Several sums of tensors of the same shapes may go on at once, told apart by a number.

    >>> total = OrderedSum(Group()); total.add({"x": torch.ones(2)}); total.add({"x": torch.ones(2)}); total.result()
    {'x': tensor([2., 2.])}
    """

    def __init__(self, group: Group, mesh: Mesh | None = None) -> None:
        self.group, self.mesh = group, mesh or Mesh(group)
        self.shapes: list[list[tuple[str, torch.Size]]] = []  # by bucket
        self.likes: list[Tensor] = []  # of this process's part [⌈n/N⌉] of each bucket, without memory
        self.parts: dict[tuple[int, int], Tensor] = {}  # by sum and bucket
        self.at: dict[int, int] = {}  # the replica that has a sum

    def add(self, term: Params, into: Sequence[int | None] | None = None) -> None:
        """The next of this process's terms.

        Args:
            into: The sum that each process's term belongs to, None for none; all to sum 0 if not given.
        """
        sums = [0] * self.group.world if into is None else into
        groups, known = list(buckets(term)), dict(self.at)
        self.shapes = self.shapes or [[(name, term[name].shape) for name in names] for names in groups]
        for bucket, names in enumerate(groups):
            rows = self.mesh.exchanged(self.dealt(names, term))
            if len(self.likes) == bucket:
                self.likes.append(rows.new_empty(1).expand(rows.shape[1]))
            self.at = dict(known)
            for replica in range(self.mesh.replicas):
                self._add_of(replica, bucket, rows, self.mesh.of_replica(list(sums), replica))

    def _add_of(self, replica: int, bucket: int, rows: Tensor, sums: Sequence[int | None]) -> None:
        """What the ranks of a replica add to sums, which come to it first."""
        for number in dict.fromkeys(n for n in sums if n is not None):
            source, self.at[number] = self.at.get(number, replica), replica
            if source != replica and self.mesh.replica == replica:
                self.parts[number, bucket] = self.mesh.received(self.likes[bucket], source)
            elif source != replica and self.mesh.replica == source:
                self.mesh.sent(self.parts.pop((number, bucket)), replica)
        if replica != self.mesh.replica:
            return
        for into, row in zip(sums, rows, strict=True):
            if into is not None and (into, bucket) in self.parts:
                self.parts[into, bucket] += row
            elif into is not None:
                self.parts[into, bucket] = row.clone()

    def dealt(self, names: list[str], term: Params) -> Tensor:
        """[N, n]: what each process of a replica adds up of these tensors."""
        tensors, world = [term[name].reshape(-1) for name in names], self.mesh.size
        flat = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        width = -(-len(flat) // world)
        return F.pad(flat, (0, world * width - len(flat))).view(world, width)

    def result(self, number: int = 0) -> Params:
        """A sum; of rank 0's use only, the others get nothing."""
        leaves: Params = {}
        for bucket, shapes in enumerate(self.shapes):
            part = self.parts[number, bucket]
            rows = self.group.gathered(part)
            flat = torch.cat(rows) if len(rows) > 1 else part
            start = 0
            for name, shape in shapes if rows else ():
                x = flat[start : start + shape.numel()].view(shape)
                leaves[name] = x if len(shapes) == 1 else x.clone()  # aligned, as a kept gradient is
                start += shape.numel()
        return leaves


def buckets(tensors: Params) -> Iterator[list[str]]:
    """Names of neighbours of one dtype, exchanged together; a large one by itself."""
    bucket, size, kind = list[str](), 0, None
    for name, x in tensors.items():
        if bucket and (size + x.numel() > _BUCKET or x.dtype != kind):
            yield bucket
            bucket, size = [], 0
        bucket.append(name)
        size, kind = size + x.numel(), x.dtype
    if bucket:
        yield bucket
