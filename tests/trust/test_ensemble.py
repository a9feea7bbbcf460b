"""Many data weights at once: a stack of models is the loop over them, to rounding."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import tiny
import torch
import worlds
from torch.nn import functional as F

from retrograd.core.check import train
from retrograd.core.engine import Double
from retrograd.core.optim import SGD, AdamW, Muon
from retrograd.core.step import Batch, NonFiniteError, Recipe, Training
from retrograd.data.stream import DataStream
from retrograd.lm.model import load_causal_lm
from retrograd.trust.ensemble import train_many

RECIPES = {
    "sgd": Recipe(SGD(0.1, 0.9, True, 0.01)),
    "adamw-clip": Recipe(AdamW(0.01, eps_root=1e-6, weight_decay=0.1), max_grad_norm=0.3),
    "muon": Recipe(Muon(0.02)),
    "micro": Recipe(AdamW(0.01), micro_batch_size=2),
}


def weights(training: Training, members: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(3)
    kept = torch.rand(members, *training.weights.shape, generator=draw) > 0.2
    stack = kept.to(training.weights)
    stack[0] = 1
    return stack


def assert_like_the_loop(training: Training, params, objective, members: int = 5, tolerance: float = 1e-11) -> None:
    stack = weights(training, members)
    many = train_many(training, params, stack, objective=objective)
    for s in range(members):
        for name, leaf in train(training, params, stack[s]).params.items():
            torch.testing.assert_close(many[name][s], leaf, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("per_token", [False, True])
def test_a_stack_is_the_loop(name: str, per_token: bool) -> None:
    stream = worlds.Tokens(per_token=per_token)
    training = worlds.training(RECIPES[name], stream)
    assert_like_the_loop(training, worlds.params(tied=True), worlds.objective)


@pytest.mark.parametrize("place", ["mask", "parameter"])
def test_dropout_draws_are_the_same_for_every_member(place: str) -> None:
    def objective(p, inputs, c):
        if place == "parameter":
            return worlds.objective({**p, "embed": F.dropout(p["embed"], 0.3)}, inputs, c)
        mask = F.dropout(torch.ones(6, dtype=torch.float64), 0.3)
        return worlds.objective({**p, "embed": p["embed"] * mask}, inputs, c)

    training = worlds.training(Recipe(SGD(0.1), stochastic=True, seed=4), worlds.Tokens())
    training = training._replace(engine=Double(objective))
    assert_like_the_loop(training, worlds.params(), objective)


def test_draws_that_a_stack_would_make_otherwise_are_refused() -> None:
    def objective(p, inputs, c):
        return worlds.objective(p, inputs, c) * random.random()

    training = worlds.training(Recipe(SGD(0.1)), worlds.Tokens())._replace(engine=Double(objective))
    with pytest.raises(ValueError, match="stack have losses"):
        train_many(training, worlds.params(), weights(training, 3), objective=objective)


def test_equal_members_have_equal_bits() -> None:
    training = worlds.training(RECIPES["sgd"], worlds.Tokens())
    stack = weights(training, 4)
    stack[3] = stack[0]
    many = train_many(training, worlds.params(), stack, objective=worlds.objective)
    for leaf in many.values():
        assert torch.equal(leaf[0], leaf[3])
        assert not torch.equal(leaf[0], leaf[1])


def test_a_wrong_shape_and_a_loss_that_cannot_be_stacked_are_refused() -> None:
    training = worlds.training(RECIPES["sgd"], worlds.Tokens())
    with pytest.raises(ValueError, match="do not fit"):
        train_many(training, worlds.params(), torch.ones(2, 3), objective=worlds.objective)

    def branching(p, inputs, c):
        return worlds.objective(p, inputs, c) if float(p["bias"].sum()) > -1e9 else c.sum()

    with pytest.raises(ValueError, match="does not run under"):
        train_many(training, worlds.params(), weights(training, 2), objective=branching)


def test_a_member_that_diverges_is_seen_at_its_step_and_stops_no_other() -> None:
    """Four squares and one that takes their curvature away; without it the learning rate is far too large."""

    def objective(p, inputs, c):
        return torch.sum(c * inputs["a"] * (p["theta"] - 1) ** 2)

    batch = Batch({"a": torch.tensor([1.0, 1.0, 1.0, 1.0, -4.0])}, torch.arange(5), torch.ones(5))
    training = Training(Recipe(SGD(1e5)), Double(objective), [batch] * 12, torch.ones(5))
    stack, params = torch.ones(3, 5), {"theta": torch.zeros(())}
    stack[1, 4] = 0
    first: dict[int, int] = {}

    def watch(step: int, losses: torch.Tensor, norms: torch.Tensor) -> None:
        for member in torch.nonzero(~(losses.isfinite() & norms.isfinite())).flatten().tolist():
            first.setdefault(member, step)

    many = train_many(training, params, stack, objective=objective, observe=watch)
    assert first.keys() == {1}
    assert many["theta"][0] == many["theta"][2] == train(training, params).params["theta"]
    with pytest.raises(NonFiniteError, match=f"left the finite numbers at step {first[1]}: loss"):
        train(training, params, stack[1])


@pytest.mark.parametrize("family", ["gpt-neox", "gpt2-tied", "llama-gqa", "qwen2-tied", "gemma"])
def test_language_models_can_be_stacked(tmp_path: Path, family: str) -> None:
    lm = load_causal_lm(str(tiny.save_model(tmp_path / family, family)), dtype="float64")
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randint(2, tiny.VOCABULARY, (n,), generator=draw).tolist() for n in (7, 9, 5, 8, 6, 9)]
    stream = DataStream(rows, 3, epochs=2, dtype=torch.float64)
    training = Training(Recipe(AdamW(0.01, eps_root=1e-6)), Double(lm.objective), stream, stream.weights)
    assert_like_the_loop(training, lm.params, lm.objective, members=3, tolerance=1e-9)
