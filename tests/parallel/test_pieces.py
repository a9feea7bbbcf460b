"""Parameters in pieces: the bits of whole ones, for every number of processes and shapes that do not divide."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import on_ranks
from test_split import SHARDS, World, apart, everything, world_of

from retrograd.core import tree
from retrograd.core.optim import AdamW, Params, clip, clip_pullback
from retrograd.core.slots import digest_of
from retrograd.core.step import Recipe, State, initial_state
from retrograd.parallel.group import ALONE, Group
from retrograd.parallel.pieces import PieceLedger, Pieces
from retrograd.parallel.shard import Sharded, release
from retrograd.parallel.split import Split

SHAPES = {"matrix": (7, 3), "few": (2, 5), "vector": (11,), "scalar": (), "cube": (13, 2, 2)}


def tensors(seed: int, *lead: int) -> Params:
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randn((*lead, *shape), generator=draw) for name, shape in SHAPES.items()}


def there_and_back(group: Group) -> list[Any]:
    """All that is computed over leaves, from pieces."""
    lying = Pieces(tensors(0), SHARDS, group)
    params, bars, grads = lying.own(tensors(0)), lying.own(tensors(1, 2)), lying.own(tensors(2))
    recipe = lying.recipe_of(Recipe(AdamW(0.1, spared=("vector",), weight_decay=0.5), pieces=SHARDS))
    state = initial_state(recipe, params)
    with tree.lying(lying):
        clipped, pulled = clip(grads, 0.1), clip_pullback(grads, 0.1, bars)
        after = State(1, *recipe.optimizer.update(params, state.moments, clipped, 0))
        numbers = [tree.norm(params), tree.norm(bars, 1), tree.dot(params, grads), torch.tensor(tree.nonfinite(params))]
        digest = PieceLedger({}, lying).digest(after)
    return [lying.whole(params), lying.whole(bars), lying.whole(clipped), lying.whole(pulled), numbers, digest]


@pytest.mark.parametrize("ranks", [2, 3])
def test_pieces_have_the_bits_of_whole_leaves(ranks: int) -> None:
    params, bars, grads = tensors(0), tensors(1, 2), tensors(2)
    clipped, pulled = clip(grads, 0.1, SHARDS), clip_pullback(grads, 0.1, bars, SHARDS)
    optimizer = AdamW(0.1, spared=("vector",), weight_decay=0.5)
    after = State(1, *optimizer.update(params, optimizer.init(params), clipped, 0))
    for found in on_ranks(ranks, there_and_back):
        assert tree.digest(found[:4]) == tree.digest([params, bars, clipped, pulled])
        assert found[-1] == digest_of(after, SHARDS)
        norm, norms, dot, bad = found[4]
        assert float(norm) == pytest.approx(float(tree.norm(params)))
        assert norms.tolist() == pytest.approx(tree.norm(bars, 1).tolist())
        assert float(dot) == pytest.approx(float(tree.dot(params, grads)))
        assert bad == 0
    moved = {**after.params, "few": after.params["few"].flip(0)}
    assert digest_of(after._replace(params=moved), SHARDS) != digest_of(after, SHARDS)


def gathered(group: Group, kind: str) -> dict[str, Any]:
    world = world_of(kind)
    lying = Pieces(world.params, SHARDS, group)
    own = World(world.engine, lying.own(world.params), world.batches, world.weights, lying.own(world.bars))
    found = everything(Sharded(world.engine, SHARDS, group, lying=lying, first=own.params), own)
    for name, value in found.items():
        if isinstance(value, dict):
            found[name] = lying.whole(value)
        elif isinstance(value, tuple):
            found[name] = (lying.whole(value[0]), value[1])
    return found


@pytest.mark.parametrize(("kind", "ranks"), [("double", 3), pytest.param("blocks", 2, marks=pytest.mark.slow)])
def test_an_engine_over_pieces_has_the_bits_of_one_over_whole_parameters(kind: str, ranks: int) -> None:
    world = world_of(kind)
    alone = everything(Split(world.engine, SHARDS, ALONE), world)
    assert apart(alone, everything(world.engine, world)) < 1e-12
    for found in on_ranks(ranks, gathered, kind):
        assert tree.digest(found) == tree.digest(alone)


def test_what_is_let_go_of_takes_no_memory_and_keeps_its_ties() -> None:
    whole = torch.randn(100, 10)
    tied, other = whole.view(100, 10), torch.nn.Parameter(torch.randn(3))
    release(whole, tied, other)
    assert whole.untyped_storage().data_ptr() == tied.untyped_storage().data_ptr() != other.untyped_storage().data_ptr()
    assert (whole.shape, whole.untyped_storage().nbytes(), other.shape) == ((100, 10), 4, (3,))
