"""Joined rows, or rows cut to the states that count, against the same rows padded."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from test_blocks import FAMILIES, build, error, results, stream
from torch import Tensor

from retrograd.core.engine import Double
from retrograd.core.step import micro_batches
from retrograd.lm.layout import Form, Layout, twice_differentiable
from retrograd.lm.model import causal_objective, objective_of, trainable
from retrograd.lm.proof import form_of
from retrograd.lm.spans import inner

pytestmark = pytest.mark.usefixtures("proved_anew")

JOINED, PADDED = Form(True, True, True), Form(True, False, True)

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def inputs(*targets: list[int], length: int = 8) -> dict[str, Tensor]:
    """A row for each list of the tokens that are targets."""
    draw = torch.Generator().manual_seed(3)
    mask = torch.zeros(len(targets), length, dtype=torch.bool)
    for row, places in enumerate(targets):
        mask[row, places] = True
    ids = torch.randint(0, tiny.VOCABULARY, mask.shape, generator=draw)
    return {"input_ids": ids, "target_mask": mask}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_these_families_join(family: str, dtype: torch.dtype) -> None:
    module = build(family, dtype)
    implementation = module.config._attn_implementation
    assert form_of(module).joins
    assert module.config._attn_implementation == implementation


@pytest.mark.parametrize("even", [False, True], ids=["uneven", "even"])
@pytest.mark.parametrize("family", FAMILIES)
def test_joined_equals_padded(family: str, even: bool) -> None:
    """Gradient, H ḡ and scores of the whole model; rows of 4 to 9 tokens, with a prompt that is no target."""
    module, data = build(family, **({"sliding_window": 20} if family == "mistral" else {})), stream()
    batches = [
        batch._replace(scale=batch.scale.index_fill(1, torch.tensor([1, 2]), 0)) for batch in micro_batches(data[0], 3)
    ]
    for batch in batches:
        batch.inputs["target_mask"][:, 1:3] = False
        if even:
            batch.inputs["target_mask"][:, 4:] = False
        called = Layout(module, JOINED).arguments(batch.inputs)
        assert called["input_ids"].shape[0] == (len(batch.scale) if even else 1)
    params, found = trainable(module)[0], []
    for form in (JOINED, PADDED):
        found.append(results(Double(objective_of(Layout(module, form))), params, batches, data.weights, 2))
    assert error(found[0], found[1]) < 1e-10
    assert error({n: x * 1.001 for n, x in found[0].items()}, found[1]) > 1e-4


def test_what_is_called() -> None:
    """Only states that a target follows, each at its own position."""
    given = inputs([1, 2, 3], [5], [1, 7])
    arguments = Layout(build("gpt-neox"), JOINED).arguments(given)
    assert arguments["position_ids"].tolist() == [[0, 1, 2, *range(5), *range(7)]]
    ids = given["input_ids"]
    assert torch.equal(arguments["input_ids"], torch.cat([ids[0, :3], ids[1, :5], ids[2, :7]])[None])
    place = arguments["attention_mask"]
    assert place.tolist() == [[[[0, 1, 2, 15, 15, 15, 15], [*range(3, 8), 15, 15], [*range(8, 15)]]]]
    states, coefficients, targets = Layout(build("gpt-neox"), JOINED).predicting(given)
    assert states[1].tolist() == [0, 1, 2, 7, 8, 14]
    assert [x.tolist() for x in coefficients] == [[0, 0, 0, 1, 2, 2], [1, 2, 3, 5, 1, 7]]
    assert torch.equal(targets, ids[given["target_mask"]])


def test_rows_of_one_length_enter_as_they_are() -> None:
    """Without what no target follows."""
    given, layout = inputs([1, 5], [3, 4, 5], [5]), Layout(build("gpt-neox"), JOINED)
    arguments = layout.arguments(given)
    assert arguments.keys() == {"input_ids", "use_cache"}
    assert torch.equal(arguments["input_ids"], given["input_ids"][:, :5])
    (rows, columns), coefficients, _ = layout.predicting(given)
    assert (rows.tolist(), columns.tolist()) == ([0, 0, 1, 1, 1, 2], [0, 4, 2, 3, 4, 4])
    assert [x.tolist() for x in coefficients] == [rows.tolist(), (columns + 1).tolist()]


def test_a_row_without_a_target_is_not_called() -> None:
    arguments = Layout(build("gpt-neox"), JOINED).arguments(inputs([2], []))
    assert arguments["input_ids"].shape == (1, 2)
    assert arguments["attention_mask"].tolist() == [[[[0, 1], [2, 2]]]]
    assert "attention_mask" not in Layout(build("gpt-neox"), JOINED).arguments(inputs([], []))


def test_rows_longer_than_a_window_are_padded() -> None:
    given = Layout(build("mistral", sliding_window=6), JOINED)
    assert given.arguments(inputs([1, 5], length=6))["input_ids"].shape == (1, 5)
    assert "attention_mask" not in given.arguments(inputs([1, 5], length=7))
    module = build("mistral", sliding_window=6)
    with torch.no_grad(), twice_differentiable(torch.float64):
        padded = module(input_ids=inputs([1, 7])["input_ids"]).logits
    with torch.no_grad(), Layout(module, form_of(module)).scope(torch.float64):
        assert torch.equal(module(input_ids=inputs([1, 7])["input_ids"]).logits, padded)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_dropout_is_the_models(dropout: float) -> None:
    module = build("gpt-neox", attention_dropout=dropout, hidden_dropout=0.0).train()
    objective, (params, _) = causal_objective(module)[0], trainable(module)
    given = inputs([1, 2, 3], [5])
    values = {float(objective(params, given, given["target_mask"].double())) for _ in range(3)}
    assert len(values) == (1 if dropout == 0 else 3)


class TestModelsThatDoNotJoin:
    """They are called with padded rows, and give what they gave."""

    def check(self, module: Any) -> None:
        assert not form_of(module).joins
        given = inputs([1, 2, 3], [5], [1, 7])
        loss = causal_objective(module)[0](trainable(module)[0], given, given["target_mask"].to(module.dtype))
        logits = module(input_ids=given["input_ids"]).logits
        ce = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), given["input_ids"][:, 1:].flatten(),
                                               reduction="none").view(3, -1)  # fmt: skip
        assert torch.allclose(loss, (ce * given["target_mask"][:, 1:]).sum(), rtol=1e-5)

    def test_positions_that_follow_the_mask(self) -> None:
        from transformers import BloomConfig, BloomForCausalLM

        torch.manual_seed(0)
        self.check(
            BloomForCausalLM(BloomConfig(vocab_size=tiny.VOCABULARY, hidden_size=16, n_layer=2, n_head=2))
            .double()
            .eval()
        )

    def test_attention_with_a_sink(self) -> None:
        from transformers import GptOssConfig, GptOssForCausalLM

        torch.manual_seed(0)
        config = GptOssConfig(
            vocab_size=tiny.VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8, num_local_experts=2, num_experts_per_tok=1, sliding_window=8,
            max_position_embeddings=64, pad_token_id=0, rope_scaling=None,
        )  # fmt: skip
        self.check(GptOssForCausalLM._from_config(config, attn_implementation="eager").eval())

    def test_tokens_that_are_mixed_outside_attention(self) -> None:
        module = build("llama-gqa")
        plain = module.model.forward

        def forward(*arguments: Any, **options: Any) -> Any:
            out = plain(*arguments, **options)
            out.last_hidden_state = out.last_hidden_state.cumsum(1)
            return out

        module.model.forward = forward
        assert not form_of(module).joins

    def test_another_attention(self, monkeypatch: pytest.MonkeyPatch) -> None:
        module = build("gpt-neox")
        attention = inner(module).gpt_neox.layers[0].attention
        monkeypatch.setattr(attention, "scaling", 2 * attention.scaling)
        assert form_of(module).joins
        module = build("gpt-neox")
        monkeypatch.setattr(type(attention), "forward", _own_attention(type(attention).forward))
        assert not form_of(module).joins


def _own_attention(plain: Any) -> Any:
    """Attention that looks at its mask and takes rows for a batch."""

    def forward(self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Any:
        assert attention_mask is None, "this attention makes its own mask"
        return plain(self, hidden_states, attention_mask=attention_mask, **options)

    return forward
