"""The gradient half over logical shards: equal to one engine's on the whole batch, and the same bits in every world."""

from __future__ import annotations

import random
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from ranks import on_ranks
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config

from retrograd.core import tree
from retrograd.core.engine import Double
from retrograd.core.optim import Params
from retrograd.core.step import Batch, Engine, micro_batches
from retrograd.data.stream import DataStream
from retrograd.lm.chain import decoder_chain
from retrograd.lm.engines import Blocks
from retrograd.lm.model import CausalLM, causal_objective, trainable
from retrograd.parallel import split
from retrograd.parallel.group import ALONE, Group
from retrograd.parallel.split import Split, cut

TOLERANCE = 1e-12
QUERIES = 2
SHARDS = 6  # more than a micro-batch has rows: some shards have none of the last


class World(NamedTuple):
    engine: Engine
    params: Params
    batches: list[Batch]
    weights: Tensor
    bars: Params


@cache
def lm() -> CausalLM:
    """Tied embeddings, in float64."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=40, n_embd=8, n_layer=2, n_head=2, n_positions=160)
    module = AutoModelForCausalLM.from_config(config).double().eval()
    objective, fused = causal_objective(module)
    return CausalLM(module, trainable(module)[0], objective, fused)


@cache
def world_of(engine: str) -> World:
    """15 rows of 8 to 128 tokens, in micro-batches of 7, 7 and 1, with a weight for each token."""
    model, draw = lm(), random.Random(0)
    rows = [[draw.randrange(40) for _ in range(draw.choice((8, 9, 40, 128)))] for _ in range(15)]
    weights = torch.rand((15, 128), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    stream = DataStream(rows, batch_size=15, weights=weights, dtype=torch.float64)
    seeds = torch.Generator().manual_seed(2)
    bars = {n: torch.randn((QUERIES, *x.shape), generator=seeds, dtype=x.dtype) for n, x in model.params.items()}
    half = Double(model.objective) if engine == "double" else Blocks(decoder_chain(model.module))
    return World(half, model.params, micro_batches(stream[0], 7), stream.weights, bars)


def everything(engine: Any, world: World) -> dict[str, Any]:
    """All that an engine is asked for."""
    place = (world.params, world.batches, world.weights, None)
    loss, grads, _ = engine.gradient(*place)
    falls_out, pull = engine.linearize(*place)
    found = {"loss": loss.double(), "gradient": grads, "linearize": falls_out, "pull": pull(world.bars)}
    if hasattr(world.engine, "tangent"):
        found["tangent"] = engine.tangent(world.params, world.batches, world.weights, world.weights.flip(0), None)
    return {**found, "pullback": engine.pullback(*place, world.bars)}


def apart(found: Any, expected: Any) -> float:
    """The largest relative distance of any part."""
    return max(
        float(tree.norm(tree.map(torch.sub, found[name], one)) / tree.norm(one)) for name, one in expected.items()
    )


def shared(group: Group, kind: str) -> dict[str, Any]:
    world = world_of(kind)
    engine = Split(world.engine, SHARDS, group)
    if group.rank:
        group.serve(engine.doing)
        return {}
    return everything(engine, world)


@pytest.mark.parametrize(("kind", "ranks"), [("double", 2), pytest.param("blocks", 3, marks=pytest.mark.slow)])
def test_shards_add_up_to_the_batch(kind: str, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    world = world_of(kind)
    expected = everything(world.engine, world)
    alone = everything(Split(world.engine, SHARDS, ALONE), world)
    assert apart(alone, expected) < TOLERANCE
    assert tree.digest(on_ranks(ranks, shared, kind)[0]) == tree.digest(alone), "other bits on several ranks"

    def without_a_row(batches: Any, shard: int, *more: Any) -> list[Batch]:
        parts = cut(batches, shard, *more)
        return [tree.map(lambda x: x[:-1], part) if len(part.index) > 1 else part for part in parts]

    monkeypatch.setattr(split, "cut", without_a_row)
    mutant = Split(world.engine, SHARDS, ALONE)
    assert apart({"gradient": mutant.gradient(world.params, world.batches, world.weights, None)[1]}, {
        "gradient": expected["gradient"]
    }) > TOLERANCE  # fmt: skip


def test_every_row_is_in_one_shard_and_units_stay_whole() -> None:
    for rows, shards, unit in ((13, 4, 1), (3, 4, 1), (12, 4, 3), (18, 4, 3)):
        batch = Batch({}, torch.arange(rows), torch.ones(rows))
        parts = [cut([batch], shard, shards, unit) for shard in range(shards)]
        assert torch.cat([part.index for one in parts for part in one]).tolist() == list(range(rows))
        assert all(len(part.index) % unit == 0 for one in parts for part in one)
        sizes = [sum(len(part.index) for part in one) for one in parts]
        assert max(sizes) - min(sizes) <= unit


def draws(group: Group) -> dict[str, Any]:
    """A loss that draws a random number for each row."""
    rows = torch.arange(7.0, dtype=torch.float64)

    def noisy(params: Params, inputs: Any, coefficients: Tensor) -> Tensor:
        noise = torch.rand(inputs["x"].shape, dtype=torch.float64)
        return torch.sum(coefficients * (params["p"] * inputs["x"] - noise) ** 2)

    stream = DataStream({"x": rows}, batch_size=7, dtype=torch.float64)
    engine = Split(Double(noisy), 6, group)
    if group.rank:
        group.serve(engine.doing)
        return {}
    params, batches = {"p": torch.ones((), dtype=torch.float64)}, micro_batches(stream[0], 4)
    loss, grads, _ = engine.gradient(params, batches, stream.weights, "0/5")
    again, _, _ = engine.gradient(params, batches, stream.weights, "0/5")
    other, _, _ = engine.gradient(params, batches, stream.weights, "0/6")
    assert again == loss != other
    return {"loss": loss, "grads": grads}


def test_random_draws_are_numbered_by_shard_not_by_process() -> None:
    assert tree.digest(on_ranks(2, draws)[0]) == tree.digest(draws(ALONE))
