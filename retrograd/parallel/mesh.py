"""Ranks in R replicas of N neighbours: parameters lie in pieces over the ranks of every replica.

    rank k·N + j    is place j of replica k, and has the pieces of place j

What is gathered and dealt out stays inside a replica, which under torchrun is a node where N is its number of
processes. Between replicas goes what each holder of a piece has summed up, in the order of logical shards (`sums`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from retrograd.parallel.group import Group

__all__ = ["Mesh"]


class Mesh:
    """The place of this process. With several replicas it is made by all ranks at once.

    Args:
        group: All processes.
        replicas: How many copies of the pieces there are; it divides the number of processes.
    """

    def __init__(self, group: Group, replicas: int = 1) -> None:
        self.group, self.replicas, self.size = group, replicas, group.world // replicas
        self.replica, self.place = divmod(group.rank, self.size)
        self._inside: Any = None
        self._across: Any = None
        if replicas > 1:
            self._inside = group.parted([self._ranks(k) for k in range(replicas)])
            self._across = group.parted([range(j, group.world, self.size) for j in range(self.size)])

    @property
    def form(self) -> tuple[int, int]:
        """(R, N)."""
        return self.replicas, self.size

    def of_replica(self, every: list[Any], replica: int) -> list[Any]:
        """Of what every rank has, in the order of ranks, that of one replica."""
        return [every[rank] for rank in self._ranks(replica)]

    def exchanged(self, parts: Tensor) -> Tensor:
        """As `Group.exchanged`, inside a replica."""
        return self.group.exchanged(parts, self._inside)

    def shared(self, part: Tensor) -> list[Tensor]:
        """As `Group.shared`, inside a replica."""
        return self.group.shared(part, self._inside)

    def sharing(self, part: Tensor) -> Callable[[], list[Tensor]]:
        """As `Group.sharing`, inside a replica."""
        return self.group.sharing(part, self._inside)

    def sent(self, tensor: Tensor, replica: int) -> None:
        """Send a tensor to this place in another replica, which has to know its shape (`received`)."""
        self.group.sent(tensor, replica * self.size + self.place)

    def received(self, like: Tensor, replica: int) -> Tensor:
        """What this place in another replica has sent, of the shape and dtype of `like`."""
        return self.group.received(like, replica * self.size + self.place)

    def told(self, tensor: Tensor, replica: int) -> None:
        """The tensor of this place in one replica, into that of all others."""
        if self.replicas > 1:
            self.group.told(tensor, replica * self.size + self.place, self._across)

    def _ranks(self, replica: int) -> range:
        return range(replica * self.size, (replica + 1) * self.size)
