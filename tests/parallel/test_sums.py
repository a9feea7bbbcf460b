"""Sums over logical shards: the bits of a left fold, whatever processes hold the terms."""

from __future__ import annotations

from functools import reduce

import pytest
import torch
from ranks import on_ranks

from retrograd.core import tree
from retrograd.core.optim import Params
from retrograd.parallel.group import ALONE, Group
from retrograd.parallel.sums import OrderedSum

SHARDS = 12


def term(shard: int) -> Params:
    """Leaves of one number, of fewer than there are ranks, of two dtypes, and an empty one."""
    draw = torch.Generator().manual_seed(shard)
    shapes = {"a": (3, 5), "one": (1,), "none": (0, 2), "scalar": (), "b": (64, 7)}
    found = {name: torch.randn(shape, generator=draw) * 10 ** (shard % 5) for name, shape in shapes.items()}
    return {**found, "double": torch.randn(5, generator=draw, dtype=torch.float64)}


def summed(group: Group) -> Params:
    total = OrderedSum(group)
    for shard in range(group.rank, SHARDS, group.world):
        total.add(term(shard))
    return total.result()


def folded(order: list[int]) -> Params:
    """The naive twin."""
    return reduce(lambda one, other: tree.map(torch.add, one, other), map(term, order))


def test_one_process_folds_in_the_order_of_shards() -> None:
    assert tree.digest(summed(ALONE)) == tree.digest(folded(list(range(SHARDS))))
    assert tree.digest(summed(ALONE)) != tree.digest(folded(list(range(SHARDS))[::-1])), "the order is in the bits"


@pytest.mark.parametrize("world", [2, 3, 4])
def test_every_world_has_the_bits_of_one_process(world: int) -> None:
    first, *others = on_ranks(world, summed)
    assert tree.digest(first) == tree.digest(folded(list(range(SHARDS))))
    assert first["none"].shape == (0, 2)
    assert not any(others), "the sum is rank 0's"
