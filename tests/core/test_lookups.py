"""Embeddings whose training gradient is not their function's: padding tokens of tied models, shares by frequency."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from retrograd import DataStream, Trainer
from retrograd.core import check, lookups, tree
from retrograd.core.engine import Blocks, Double
from retrograd.core.optim import SGD, AdamW
from retrograd.core.step import Recipe, Training
from retrograd.core.sweep import metagradient
from retrograd.data.stream import token_rows
from retrograd.lm.chain import decoder_chain
from retrograd.lm.model import causal_objective, trainable
from retrograd.query.columns import Queries, query_columns
from retrograd.trust import ensemble

PAD = 5
ROWS = [[2, 5, 7, 3, 5, 9], [4, 4, 9, 5, 6], [8, 5, 2, 6, 5, 3], [7, 5, 1]]
QUERY = [[2, 5, 7, 5, 3, 8]]


def model(tied: bool = True, pad: int | None = PAD) -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tiny.VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32, tie_word_embeddings=tied, pad_token_id=pad,
    )  # fmt: skip
    module = AutoModelForCausalLM.from_config(config).double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(3 if parameter.ndim == 2 else 1)
    return module


def run(module: Any, optimizer: Any = None, clip: float | None = None) -> tuple[Training, Any, Queries, Any]:
    """A run of four steps, its initial parameters, its query and its objective."""
    objective = causal_objective(module)[0]
    stream = DataStream(ROWS, 2, epochs=2, dtype=torch.float64)
    training = Training(Recipe(optimizer or SGD(0.3), clip, 1), Double(objective), stream, stream.weights)
    queries = Queries(query_columns(objective, token_rows(QUERY), dtype=torch.float64))
    return training, trainable(module)[0], queries, objective


DIRECTION = torch.tensor([1.0, -0.5, 0.7, 0.4], dtype=torch.float64)


@pytest.mark.parametrize("engine", ["double", "blocks"])
@pytest.mark.parametrize(
    ("tied", "recipe"),
    [(True, (SGD(0.2, 0.9), 0.5)), (True, (AdamW(5e-3, eps_root=1e-6, weight_decay=0.1), None)),
     (False, (SGD(0.3), None))],
    ids=["momentum-clipped", "adamw", "two-tables"],
)  # fmt: skip
def test_scores_equal_retraining(tied: bool, recipe: tuple[Any, float | None], engine: str) -> None:
    module = model(tied)
    training, params, queries, _ = run(module, *recipe)
    if engine == "blocks":
        training = training._replace(engine=Blocks(decoder_chain(module)))
    _, scores = metagradient(training, params, queries)
    measured = check.central_difference(training, params, queries, DIRECTION, 1e-5)
    assert check.relative_error(scores.flatten(1) @ DIRECTION, measured) < 1e-6


def test_a_second_backward_that_stops_at_the_padding_token_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    training, params, queries, _ = run(model())
    monkeypatch.setattr(lookups.Passing, "turn", lambda self: None)
    _, scores = metagradient(training, params, queries)
    measured = check.central_difference(training, params, queries, DIRECTION, 1e-5)
    assert check.relative_error(scores.flatten(1) @ DIRECTION, measured) > 1e-3


def test_the_gradient_of_a_query_is_its_own() -> None:
    """The padding token's row has the part that training leaves out; training still leaves it out."""
    training, params, queries, _ = run(model())
    draw = torch.Generator().manual_seed(1)
    along = {name: torch.randn(x.shape, generator=draw, dtype=x.dtype) for name, x in params.items()}

    def phi(h: float) -> Tensor:
        return queries.values({name: x + h * along[name] for name, x in params.items()})

    slope = tree.dot({name: g[0] for name, g in queries(params)[1].items()}, along)
    assert float(slope) == pytest.approx(float((phi(1e-7) - phi(-1e-7)) / 2e-7), rel=1e-6)
    trainer, state = Trainer.initialize(model(), SGD(0.3))
    asked = trainer.evaluate(state, DataStream(QUERY, 1, dtype=torch.float64))
    torch.testing.assert_close(asked.gradient, queries(params)[1])
    batch = training.stream[0]
    name = next(n for n in params if "embed" in n)
    stepped = training.engine.gradient(params, [batch], training.weights, None)[1][name][PAD]
    with lookups.whole():
        own = training.engine.gradient(params, [batch], training.weights, None)[1][name][PAD]
    assert float((own - stepped).norm()) > 0.1 * float(stepped.norm())


@pytest.mark.parametrize("engine", ["double", "blocks"])
def test_two_more_ways_to_the_same_scores(engine: str) -> None:
    """A tangent by J v, and one unrolled graph."""
    module = model()
    training, params, queries, objective = run(module, AdamW(5e-3, eps_root=1e-6))
    if engine == "blocks":
        training = training._replace(engine=Blocks(decoder_chain(module)))
    _, scores = metagradient(training, params, queries)
    final, pushed = check.forward_tangent(training, params, DIRECTION[None])
    gradient = queries(final.params)[1]
    slope = sum(torch.sum(g[0] * pushed[name][0]) for name, g in gradient.items())
    expected = float(scores[0] @ DIRECTION)
    assert float(slope) == pytest.approx(expected, rel=1e-9)
    unrolled = check.unrolled(training, params, objective, queries)[1]
    assert check.relative_error(scores, unrolled) < 1e-9


def test_a_stack_of_retrainings_leaves_out_the_same() -> None:
    training, params, _, objective = run(model())
    weights = torch.stack([torch.ones(4, dtype=torch.float64), 1 + DIRECTION])
    stacked = ensemble.train_many(training, params, weights, objective=objective)
    for member, one in enumerate(weights):
        final = check.train(training, params, one).params
        torch.testing.assert_close({name: x[member] for name, x in stacked.items()}, final, rtol=1e-9, atol=1e-11)


class Tied(nn.Module):
    """A bag of two lookups and a head, all of one table."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(9, 6, **options, dtype=torch.float64)

    def forward(self, ids: Tensor) -> Tensor:
        return torch.tanh(self.table(ids).mean(1)) @ self.table.weight.T


@pytest.mark.parametrize(
    "options",
    [{"scale_grad_by_freq": True}, {"padding_idx": 2, "scale_grad_by_freq": True}, {"padding_idx": -1}],
    ids=str,
)
def test_shares_of_an_embedding_in_a_module_of_ones_own(options: dict[str, Any]) -> None:
    module, draw = Tied(**options), torch.Generator().manual_seed(2)
    ids, targets = torch.randint(0, 9, (12, 5), generator=draw), torch.randint(0, 9, (12,), generator=draw)

    def loss(params: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(functional_call(module, params, (batch["x"],)), batch["y"], reduction="none")

    def streams(weights: Tensor | None = None) -> DataStream:
        return DataStream({"x": ids, "y": targets}, 4, epochs=2, weights=weights, dtype=torch.float64)

    trainer, state = Trainer.initialize(module, SGD(0.5), loss)
    query = DataStream({"x": ids[:3].flip(0), "y": targets[:3]}, 3, dtype=torch.float64)
    scores = trainer.backward(None, streams(), trainer.evaluate(trainer.train(state, streams()), query)).weight_grads
    v = torch.randn(12, generator=draw, dtype=torch.float64)
    ahead, behind = (
        float(trainer.evaluate(trainer.train(state, streams(1 + h * v)), query).value) for h in (1e-5, -1e-5)
    )
    assert float(scores @ v) == pytest.approx((ahead - behind) / 2e-5, rel=1e-7)
