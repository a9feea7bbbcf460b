"""The `blocks` engine against `double` on real architectures: gradient and pullback, whatever a batch is made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from retrograd.core import check, tree
from retrograd.core.engine import Blocks, Double
from retrograd.core.optim import SGD, AdamW, Params
from retrograd.core.plan import make
from retrograd.core.residuals import Residuals
from retrograd.core.step import Batch, Recipe, Training, micro_batches
from retrograd.core.sweep import metagradient
from retrograd.data.rows import Rows
from retrograd.data.stream import DataStream
from retrograd.lm import head
from retrograd.lm.chain import decoder_chain
from retrograd.lm.model import causal_objective, trainable

FAMILIES = list(tiny.configurations())
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}


def build(family: str, dtype: torch.dtype = torch.float64, lora: bool = False, **changes: Any) -> Any:
    from transformers import AutoModelForCausalLM

    config = tiny.configurations()[family]
    config.update({"num_hidden_layers": 3, **changes})
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1] * 3
    torch.manual_seed(0)
    module = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(dtype).eval()
    with torch.no_grad():  # biases and norms start at 0 and 1, where some terms vanish
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    if lora:
        from peft import LoraConfig, get_peft_model

        module = get_peft_model(module, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")).to(dtype)
        module.eval()
        for parameter in module.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.3)
    return module


def stream(dtype: torch.dtype = torch.float64, per_token: bool = True, packed: bool = False) -> DataStream:
    """Five rows of 4 to 9 tokens and uneven weights, in one batch; packed: two rows of such documents."""
    draw = torch.Generator().manual_seed(4)
    documents = [torch.randint(0, tiny.VOCABULARY, (n,), generator=draw).numpy() for n in (7, 4, 9, 5, 6)]
    masks = [torch.arange(len(d)).numpy() > 0 for d in documents]
    owners = [torch.full((len(d),), i).numpy() for i, d in enumerate(documents)]
    columns = [documents, masks, owners]
    if packed:
        columns = [[torch.cat([*map(torch.from_numpy, c[:3])]).numpy(), torch.cat([*map(torch.from_numpy, c[3:])]).numpy()]
                   for c in columns]  # fmt: skip
    rows = Rows(*columns, 5, {}, packed=packed)  # type: ignore[arg-type]
    shape = (len(rows), rows.max_length) if per_token else (5,)
    weights = torch.rand(shape, generator=draw, dtype=torch.float64).to(dtype) + 0.5
    return DataStream(rows, 5, shuffle=False, weight_shape=shape, weights=weights, dtype=dtype)


def along(queries: int) -> Callable[[Params], Params]:
    """ḡ of K queries, none of them parallel to the gradient."""

    def update_half(grads: Params) -> Params:
        draw = torch.Generator().manual_seed(9)
        return {
            name: torch.randn((queries, *g.shape), generator=draw, dtype=torch.float64).to(g) * 0.1 + g
            for name, g in grads.items()
        }

    return update_half


def pulled(
    engine: Any, params: Params, batches: list[Batch], weights: Tensor, update_half: Callable[[Params], Params]
) -> tuple[Params, Tensor]:
    grads, pull = engine.linearize(params, batches, weights, None)
    return pull(update_half(grads))


def results(engine: Any, params: Params, batches: list[Batch], weights: Tensor, queries: int) -> dict[str, Tensor]:
    loss, grads, _ = engine.gradient(params, batches, weights, None)
    products, slopes = pulled(engine, params, batches, weights, along(queries))
    named = {"loss": loss, "scores": slopes}
    return named | {f"g {n}": x for n, x in grads.items()} | {f"H {n}": x for n, x in products.items()}


def error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest relative error of a tensor; one far below the others of its kind (a key's bias) against those."""
    assert found.keys() == expected.keys()
    whole = {kind: float(tree.norm([x for n, x in expected.items() if n[0] == kind])) for kind in {n[0] for n in found}}
    return max(float((found[n] - x).norm()) / max(float(x.norm()), 1e-3 * whole[n[0]]) for n, x in expected.items())


def compare(module: Any, batches: list[Batch], weights: Tensor, queries: int = 2) -> float:
    """Error of `blocks` against `double`, after seeing that a 0.1 % error in any tensor that matters would show."""
    params = trainable(module)[0]
    expected = results(Double(causal_objective(module)[0]), params, batches, weights, queries)
    found = results(Blocks(decoder_chain(module)), params, batches, weights, queries)
    assert all(found[n].shape == x.shape and found[n].dtype == x.dtype for n, x in expected.items())
    tolerance = TOLERANCE[weights.dtype]
    for name, x in expected.items():
        if float(x.norm()) > 1e-6:
            wrong = {**found, name: found[name] * 1.001}
            assert error({n: v for n, v in wrong.items() if n == name}, {name: x}) > tolerance, name
    assert any(name.startswith("H ") and float(x.norm()) > 1e-3 for name, x in expected.items())
    return error(found, expected)


@pytest.mark.parametrize(
    ("family", "dtype"),
    [pytest.param(family, torch.float64, id=f"{family}-float64") for family in FAMILIES]
    + [
        pytest.param(
            family, torch.float32, id=f"{family}-float32", marks=() if family == "gpt-neox" else pytest.mark.slow
        )
        for family in FAMILIES
    ],
)
def test_equals_double(family: str, dtype: torch.dtype) -> None:
    """Per-token weights, two queries, micro-batches of 2, 2 and 1 rows."""
    data = stream(dtype)
    assert compare(build(family, dtype), micro_batches(data[0], 2), data.weights) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in (torch.float32, torch.bfloat16))],
    ids=str,
)
def test_a_table_of_tokens_is_its_own_tangent_map_unless_one_is_for_padding(dtype: torch.dtype) -> None:
    found = {family: decoder_chain(build(family, dtype)).lookup for family in FAMILIES}
    assert found == {family: family not in ("gemma", "olmo2") for family in FAMILIES}
    assert not decoder_chain(build("gpt-neox", dtype, lora=True)).lookup  # nothing is trained there


def test_an_embedding_that_is_not_linear_is_none() -> None:
    data, module = stream(), build("gpt-neox")
    module.gpt_neox.emb_dropout = nn.LayerNorm(module.config.hidden_size, dtype=torch.float64)
    assert not decoder_chain(module).lookup
    assert compare(module, [data[0]], data.weights) < 1e-10


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_and_weights_per_document(family: str) -> None:
    data = stream(per_token=False, packed=True)
    assert "segment_ids" in data[0].inputs
    module = build(family, sliding_window=None) if family == "mistral" else build(family)
    assert compare(module, [data[0]], data.weights, queries=1) < 1e-10


@pytest.mark.parametrize("family", ["gpt-neox", "gpt2-tied", "llama-gqa", "gemma"])
def test_adapters(family: str) -> None:
    data = stream()
    module = build(family, lora=True)
    assert all("lora_" in name for name in trainable(module)[0])
    assert compare(module, [data[0]], data.weights) < 1e-10


@pytest.mark.parametrize("kept", ["layers.1.", "embed", "norm", "lm_head", "layers.2.mlp"])
def test_frozen_parts(kept: str) -> None:
    """Only one part trained: the others carry cotangents and tangents, or nothing, and have no gradient."""
    data, module = stream(), build("llama-gqa")
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(kept in name)
    assert compare(module, [data[0]], data.weights) < 1e-10


@pytest.mark.parametrize("family", ["gpt2-tied", "qwen2-tied", pytest.param("gemma", marks=pytest.mark.slow)])
def test_tied_embeddings_get_both_parts_of_their_gradient(family: str) -> None:
    data, module = stream(), build(family)
    chain, params = decoder_chain(module), trainable(module)[0]
    assert set(chain.embed.names.values()) & set(chain.head.names.values()), "one leaf at both ends"
    whole = results(Blocks(chain), params, [data[0]], data.weights, 1)
    leaf = chain.head.names["weight"]
    for part in ("embed", "head"):
        cut = _without_leaf(chain, part, leaf)
        assert error(results(Blocks(cut), params, [data[0]], data.weights, 1), whole) > 0.01, part


def _without_leaf(chain: Any, part: str, leaf: str) -> Any:
    from dataclasses import replace

    names = {n: x for n, x in getattr(chain, part).names.items() if x != leaf}
    if part == "head":
        return replace(chain, head=replace(chain.head, names=names))
    return replace(chain, embed=chain.embed._replace(names=names))


@pytest.mark.parametrize("queries", [3, pytest.param(9, marks=pytest.mark.slow)])
def test_many_queries_are_each_alone(queries: int) -> None:
    data, module = stream(), build("gpt-neox")
    params, engine = trainable(module)[0], Blocks(decoder_chain(module))
    together, slopes = pulled(engine, params, [data[0]], data.weights, along(queries))
    for k in range(queries):
        one = pulled(engine, params, [data[0]], data.weights, lambda g, k=k: _query(along(queries)(g), k))
        expected = {"scores": slopes[k : k + 1], **{f"H {n}": x[k : k + 1] for n, x in together.items()}}
        assert error({"scores": one[1], **{f"H {n}": x for n, x in one[0].items()}}, expected) < 1e-12


def _query(bars: Params, k: int) -> Params:
    return {name: bar[k : k + 1] for name, bar in bars.items()}


@pytest.mark.slow
def test_leaves_that_are_views_of_one_buffer_cost_no_more() -> None:
    """Kept states are such views; forward AD gives a view's tangent storage of the whole buffer's size."""
    from torch.profiler import ProfilerActivity, profile

    data, module = stream(), build("gpt-neox")
    params, engine = trainable(module)[0], Blocks(decoder_chain(module))
    buffer = torch.cat([x.flatten() for x in params.values()])
    parts = buffer.split([x.numel() for x in params.values()])
    views = {name: part.view(x.shape) for (name, x), part in zip(params.items(), parts)}
    largest = []
    for leaves in (params, views):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            pulled(engine, leaves, [data[0]], data.weights, along(1))
        largest.append(max(event.self_cpu_memory_usage for event in seen.events()))
    assert 0 < largest[1] <= largest[0] < buffer.nbytes


def test_logits_that_are_scaled_take_the_plain_head() -> None:
    from transformers import CohereConfig, CohereForCausalLM

    torch.manual_seed(0)
    module = CohereForCausalLM(CohereConfig(
        vocab_size=tiny.VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, logit_scale=0.25, bos_token_id=0, eos_token_id=0,
    )).double().eval()  # fmt: skip
    data = stream()
    assert not causal_objective(module)[1]
    assert compare(module, micro_batches(data[0], 3), data.weights) < 1e-10


def noisy(family: str) -> Any:
    rates = {"resid_pdrop": 0.2, "embd_pdrop": 0.2, "attn_pdrop": 0.2} if family == "gpt2-tied" else {}
    return build(family, **rates).train()


@pytest.mark.parametrize("family", ["gpt-neox", pytest.param("gpt2-tied", marks=pytest.mark.slow)])
def test_dropout_has_the_same_draws_in_every_pass(family: str) -> None:
    """The pullback is the derivative of the gradient that training took, draws and all, for one query and for three."""
    data, module = stream(), noisy(family)
    params, engine, batches = trainable(module)[0], Blocks(decoder_chain(module)), micro_batches(data[0], 3)

    def gradient(params: Params, seed: str = "0/7") -> Params:
        return engine.gradient(params, batches, data.weights, seed)[1]

    before = gradient(params)
    torch.rand(5)  # what others draw does not matter
    assert all(torch.equal(before[n], g) for n, g in gradient(params).items())
    assert any(not torch.equal(before[n], g) for n, g in gradient(params, "0/8").items())
    h, bars = 1e-6, along(3)(before)
    for bar in (bars, _query(bars, 2)):
        products = engine.pullback(params, batches, data.weights, "0/7", bar)[0]
        ahead, behind = (gradient({n: x + s * bar[n][-1] for n, x in params.items()}) for s in (h, -h))
        measured = {f"H {n}": (ahead[n] - behind[n]) / (2 * h) for n in params}
        assert error({f"H {n}": x[-1] for n, x in products.items()}, measured) < 1e-5
    module.eval()
    assert error({f"g {n}": g for n, g in before.items()}, {f"g {n}": g for n, g in gradient(params).items()}) > 1e-3


@pytest.mark.parametrize("family", ["gpt2-tied", pytest.param("gpt-neox", marks=pytest.mark.slow)])
def test_scores_equal_retraining_and_every_plan_gives_the_same_bits(family: str) -> None:
    module, data = build(family), stream()
    data = DataStream(data.rows, 2, epochs=2, weight_shape=tuple(data.weights.shape), dtype=torch.float64)
    engine = Blocks(decoder_chain(module))
    run = Training(Recipe(AdamW(3e-3, eps_root=1e-6), 0.5), engine, data, data.weights)

    def query(params: Params) -> tuple[Tensor, Params]:
        value, grads, _ = engine.gradient(params, [stream()[0]], stream().weights, None)
        return value[None], {n: g[None] for n, g in grads.items()}

    params = trainable(module)[0]
    _, scores = metagradient(run, params, query)
    _, again = metagradient(run, params, query, make("binomial", len(data), slots=2))
    assert torch.equal(scores, again)
    v = torch.randn(data.weights.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    measured = check.central_difference(run, params, query, v)
    slope = torch.tensordot(scores, v, dims=2)
    assert check.relative_error(slope, measured) < 1e-6
    assert check.relative_error(1.001 * slope, measured) > 1e-6


@pytest.mark.parametrize("kind", ["blocks", pytest.param("double", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("dtype", "vocabulary"), [(torch.float64, 22), pytest.param(torch.float32, 2003, marks=pytest.mark.slow)]
)
def test_what_gradients_leave_saves_products_and_changes_no_bit(
    dtype: torch.dtype, vocabulary: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores with and without it, in chunks of 16 tokens; and wrong values in its place show, so it is used."""
    module, data = build("gpt-neox", dtype, vocab_size=vocabulary), stream(dtype)
    data = DataStream(data.rows, 4, epochs=3, weight_shape=tuple(data.weights.shape), dtype=dtype)
    monkeypatch.setattr(head, "_CHUNK_BYTES", {"cpu": 0})
    engine = Blocks(decoder_chain(module)) if kind == "blocks" else Double(causal_objective(module)[0])
    run = Training(Recipe(AdamW(3e-3, eps_root=1e-6), micro_batch_size=3), engine, data, data.weights)
    params = trainable(module)[0]

    def query(params: Params) -> tuple[Tensor, Params]:
        value, grads, _ = run.engine.gradient(params, [stream(dtype)[0]], stream(dtype).weights, None)
        return value[None], {n: g[None] for n, g in grads.items()}

    def scores(spoilt: float = 0.0, limit: int | None = None) -> Tensor:
        class Some(Residuals):
            def put(self, step: int, left: Any) -> None:
                self.limit = self.limit if limit is None else limit
                wrong = [one._replace(found=one.found * (1 + spoilt)) for one in left]
                super().put(step, wrong if spoilt else left)

        monkeypatch.setattr("retrograd.core.sweep.Residuals", Some)
        return metagradient(run, params, query)[1]

    without = scores(limit=0)
    assert torch.equal(scores(), without)
    assert torch.equal(scores(limit=4000), without)
    assert not torch.equal(scores(0.001), without)


def test_a_run_trained_by_double_has_the_same_scores() -> None:
    module, data = build("llama-gqa"), stream()
    data = DataStream(data.rows, 2, weight_shape=tuple(data.weights.shape), dtype=torch.float64)
    found = []
    for engine in (Double(causal_objective(module)[0]), Blocks(decoder_chain(module))):
        run = Training(Recipe(SGD(0.1, 0.9), micro_batch_size=1), engine, data, data.weights)

        def query(params: Params, engine: Any = engine) -> tuple[Tensor, Params]:
            value, grads, _ = engine.gradient(params, [stream()[0]], stream().weights, None)
            return value[None], {n: g[None] for n, g in grads.items()}

        found.append(metagradient(run, trainable(module)[0], query)[1])
    assert check.relative_error(found[1], found[0]) < 1e-10


def test_a_skip_past_the_layers_is_part_of_what_follows_them() -> None:
    data, module = stream(), build("llama-gqa")
    plain = module.model.forward

    def forward(*arguments: Any, **options: Any) -> Any:
        out = plain(*arguments, **options)
        out.last_hidden_state = out.last_hidden_state + 0.1 * module.model.embed_tokens(options["input_ids"])
        return out

    module.model.forward = forward
    assert compare(module, [data[0]], data.weights) < 1e-10


class TestModelsThatAreNoChain:
    """Layers of several kinds or used twice, and ways around the chain: refused, with the reason and the way out."""

    def test_layers_of_several_kinds(self) -> None:
        module = build("llama-gqa")
        module.model.layers.append(module.model.norm)  # ends the list of one type
        with pytest.raises(ValueError, match=r"has no ModuleList of layers of one type. Use the engine 'double'"):
            decoder_chain(module)

    def test_a_layer_that_is_used_twice(self) -> None:
        module = build("llama-gqa")
        module.model.layers[2] = module.model.layers[0]
        with pytest.raises(ValueError, match=r"cannot be cut into a chain of its layers: layers: .*order"):
            decoder_chain(module)

    def test_a_hidden_way_from_layer_to_layer(self) -> None:
        module, seen = build("llama-gqa"), []
        first, last = module.model.layers[0], module.model.layers[2]
        first.register_forward_hook(lambda layer, arguments, y: seen.append(y))
        last.self_attn.register_forward_hook(lambda part, arguments, y: (y[0] + 0.1 * seen[-1], *y[1:]))
        with pytest.raises(ValueError, match=r"the chain's gradient differs from the model's own by .* of"):
            decoder_chain(module)

    @pytest.mark.parametrize("what", ["data weights", "a leaf"])
    def test_another_pullback(self, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """The gradient is the model's own, and what is pulled back is not."""
        own = Blocks.second

        def second(engine: Blocks, read: Any, bars: Any, k: int, parts: Any, sums: Any, kept: Any) -> Any:
            class Wrong:
                def add(self, part: int, found: Any) -> None:
                    sums.add(part, {name: 1.01 * x if what == "a leaf" else x for name, x in found.items()})

                done = sums.done

            return [
                (1.01 if what == "data weights" else 1) * x for x in own(engine, read, bars, k, parts, Wrong(), kept)
            ]

        monkeypatch.setattr(Blocks, "second", second)
        with pytest.raises(ValueError, match=r"the chain's pullback differs from the model's own by .* of"):
            decoder_chain(build("llama-gqa"))

    def test_something_computed_between(self) -> None:
        module = build("llama-gqa")

        def doubled(layer: Any, arguments: Any, options: Any) -> Any:
            return ((arguments[0] * 2, *arguments[1:]), options)

        module.model.layers[1].register_forward_pre_hook(doubled, with_kwargs=True)
        with pytest.raises(ValueError, match="something is computed between its layers"):
            decoder_chain(module)
