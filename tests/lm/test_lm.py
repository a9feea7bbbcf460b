"""Hugging Face models as differentiable objectives: exactness on real architectures, in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor, nn

from retrograd.core import check
from retrograd.core.engine import Double
from retrograd.core.optim import SGD, AdamW, Muon
from retrograd.core.step import Recipe, Training, coefficients
from retrograd.core.sweep import metagradient
from retrograd.data.rows import Rows, build_rows
from retrograd.data.stream import DataStream
from retrograd.lm.loss import weighted_causal_lm_ce
from retrograd.lm.model import CausalLM, load_causal_lm, trainable
from retrograd.query.columns import Queries, query_columns


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def model(folder: Path, family: str, **options: object) -> CausalLM:
    place = folder / family
    if not place.exists():
        tiny.save_model(place, family)
    return load_causal_lm(str(place), dtype="float64", **options)  # type: ignore[arg-type]


def rows(seed: int = 0, chunk_length: int | None = None, folder: Path | None = None) -> Rows:
    import datasets
    from transformers import AutoTokenizer

    documents = datasets.Dataset.from_dict({"text": tiny.sentences(7, seed)})
    return build_rows(documents, AutoTokenizer.from_pretrained(folder / "gpt-neox"), chunk_length=chunk_length)


def run(lm: CausalLM, data: Rows, recipe: Recipe, per_token: bool = False) -> tuple[Training, object]:
    shape = (len(data), data.max_length) if per_token else None
    stream = DataStream(data, 3, epochs=2, weight_shape=shape, dtype=torch.float64)
    engine = Double(lm.objective)
    return Training(recipe, engine, stream, stream.weights), engine


@pytest.fixture(scope="module", autouse=True)
def _tokenizer(folder: Path) -> None:
    tiny.save_model(folder / "gpt-neox")


CASES = {
    "gpt-neox": ("gpt-neox", {}),
    "tied_embeddings": ("gpt2-tied", {}),
    "tied_embeddings-gqa": ("qwen2-tied", {}),
    "llama-gqa": ("llama-gqa", {}),
    "gemma": ("gemma", {}),
    "lora": ("gpt-neox", {"lora": 2}),
    "packing": ("gpt-neox", {"chunk": 8}),
    "packing-llama": ("llama-gqa", {"chunk": 8}),
}


OPTIMIZERS = {"adamw": AdamW(3e-3, eps_root=1e-6), "sgd": SGD(0.1, 0.9), "muon": Muon(0.01, eps_root=1e-6)}
GRID = [(case, "adamw") for case in CASES] + [("tied_embeddings", "sgd"), ("tied_embeddings", "muon"), ("lora", "muon")]


@pytest.mark.parametrize("case,name", GRID)
def test_scores_of_real_architectures_equal_retraining(folder: Path, case: str, name: str) -> None:
    family, options = CASES[case]
    adapters = None
    if "lora" in options:
        from peft import LoraConfig

        adapters = LoraConfig(r=2, lora_alpha=8, target_modules=["query_key_value"], task_type="CAUSAL_LM")
    lm = model(folder, family, lora=adapters)
    training, engine = run(lm, rows(folder=folder, chunk_length=options.get("chunk")), Recipe(OPTIMIZERS[name]))
    query = Queries(query_columns(engine.objective, rows(1, folder=folder), "none", dtype=torch.float64))
    _, scores = metagradient(training, lm.params, query)
    v = torch.randn(training.weights.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    measured = check.central_difference(training, lm.params, query, v, h=1e-5)
    assert check.relative_error(scores @ v, measured) < 1e-5
    assert check.relative_error(1.001 * scores @ v, measured) > 1e-5


@pytest.mark.parametrize("chunk", [None, 8], ids=["unpacked", "packed"])
def test_token_scores_sum_to_document_scores(folder: Path, chunk: int | None) -> None:
    lm, data = model(folder, "gpt-neox"), rows(folder=folder, chunk_length=chunk)
    found = []
    for per_token in (True, False):
        training, engine = run(lm, data, Recipe(AdamW(3e-3, eps_root=1e-6)), per_token)
        query = Queries(query_columns(engine.objective, rows(1, folder=folder), dtype=torch.float64))
        found.append(metagradient(training, lm.params, query)[1])
    from retrograd.runs.scores import doc_ids

    tokens, documents = found
    sums = torch.zeros(data.documents, dtype=torch.float64)
    sums.scatter_add_(0, doc_ids(data).flatten(), tokens[0].flatten())
    assert check.relative_error(sums, documents[0]) < 1e-12
    assert (tokens[0][:, 0] == 0).all()  # column 0 predicts nothing
    padding = torch.tensor([[k >= n for k in range(data.max_length)] for n in data.lengths])
    assert (tokens[0][padding] == 0).all()


def test_objective_is_the_plain_loss(folder: Path) -> None:
    """The fused head, the MATH attention and right padding against the model's own logits."""
    for family in tiny.configurations():
        lm = model(folder, family)
        assert lm.fused, family
        stream = DataStream(rows(folder=folder), 4, dtype=torch.float64)
        batch = stream[0]
        value = lm.objective(lm.params, batch.inputs, coefficients(batch, stream.weights))
        logits = lm.module(input_ids=batch.inputs["input_ids"]).logits
        expected = weighted_causal_lm_ce(logits, batch.inputs["input_ids"], mask=batch.inputs["target_mask"])
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)


def test_a_head_that_is_not_plain_is_not_fused(folder: Path) -> None:
    """Soft-capped or scaled logits are found out by trying, and take the plain path."""
    from transformers import CohereConfig, CohereForCausalLM

    from retrograd.lm.model import causal_objective

    torch.manual_seed(0)
    module = CohereForCausalLM(CohereConfig(
        vocab_size=tiny.VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, logit_scale=0.25,
    )).double().eval()  # fmt: skip
    objective, fused = causal_objective(module)
    assert not fused
    stream = DataStream(rows(folder=folder), 4, dtype=torch.float64)
    batch = stream[0]
    value = objective(trainable(module)[0], batch.inputs, coefficients(batch, stream.weights))
    logits = module(input_ids=batch.inputs["input_ids"]).logits
    expected = weighted_causal_lm_ce(logits, batch.inputs["input_ids"], mask=batch.inputs["target_mask"])
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", ["gpt-neox", "gpt2-tied", "llama-gqa"])
def test_packed_documents_do_not_attend_to_each_other(folder: Path, family: str) -> None:
    """A packed chunk that holds whole documents has the loss of those documents alone."""
    lm, alone = model(folder, family), rows(folder=folder)
    packed = Rows(
        [np.concatenate(alone.input_ids)], [np.concatenate(alone.target_mask)], [np.concatenate(alone.doc_ids)],
        alone.documents, {}, packed=True,
    )  # fmt: skip

    def loss(data: Rows) -> Tensor:
        stream = DataStream(data, 10, shuffle=False, dtype=torch.float64)
        return lm.objective(lm.params, stream[0].inputs, coefficients(stream[0], stream.weights))

    if packed.max_length > 32:
        packed = Rows(*([x[0][: 32 - 32 % 1]] for x in (packed.input_ids, packed.target_mask, packed.doc_ids)),
                      alone.documents, {}, packed=True)  # fmt: skip
        kept, last = np.unique(packed.doc_ids[0], return_counts=True)
        whole = [d for d, n in zip(kept, last) if n == len(alone.input_ids[d])]
        end = sum(len(alone.input_ids[d]) for d in whole)
        packed = Rows(*([x[0][:end]] for x in (packed.input_ids, packed.target_mask, packed.doc_ids)),
                      alone.documents, {}, packed=True)  # fmt: skip
        alone = Rows(*([x[d] for d in whole] for x in (alone.input_ids, alone.target_mask, alone.doc_ids)),
                     alone.documents, {})  # fmt: skip
    assert len(alone) > 1
    torch.testing.assert_close(loss(packed), loss(alone), rtol=1e-6, atol=1e-6)


def test_padding_does_not_change_the_loss(folder: Path) -> None:
    lm, data = model(folder, "llama-gqa"), rows(folder=folder)
    batch = DataStream(data, 7, shuffle=False, dtype=torch.float64)[0]
    singles = DataStream(data, 1, shuffle=False, dtype=torch.float64)
    whole = lm.objective(lm.params, batch.inputs, batch.scale)
    parts = [
        lm.objective(lm.params, singles[t].inputs, (singles[t].scale > 0).double() / data.targets) for t in range(7)
    ]
    torch.testing.assert_close(whole, sum(parts), rtol=1e-12, atol=1e-12)


def test_one_leaf_per_storage() -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.ones(3, 2))
            self.b = nn.Parameter(self.a.data)  # another Parameter over the same memory
            self.c = nn.Parameter(torch.zeros(2), requires_grad=False)

    leaves, readers = trainable(Views())
    assert list(leaves) == ["a"]
    assert readers == {"a": "a", "b": "a"}

    class Overlap(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            flat = torch.zeros(6)
            self.a, self.b = nn.Parameter(flat[:4]), nn.Parameter(flat[2:])

    with pytest.raises(ValueError, match="a and b overlap in memory"):
        trainable(Overlap())
    with pytest.raises(ValueError, match="no trainable parameter"):
        trainable(nn.Linear(2, 2).requires_grad_(False))


def test_only_adapters_are_leaves(folder: Path) -> None:
    from peft import LoraConfig

    lm = model(folder, "gpt-neox", lora=LoraConfig(r=2, target_modules=["query_key_value"], task_type="CAUSAL_LM"))
    assert len(lm.params) == 4
    assert all("lora_" in name for name in lm.params)
    with pytest.raises(ValueError, match=r"LoRA cannot be added.*Linear layers of this model: .*query_key_value"):
        model(folder, "gpt-neox", lora=LoraConfig(r=2, target_modules=["nothing"], task_type="CAUSAL_LM"))


def test_adapters_start_alike_for_one_seed(folder: Path) -> None:
    from peft import LoraConfig

    config = LoraConfig(r=2, target_modules=["query_key_value"], task_type="CAUSAL_LM")
    torch.manual_seed(5)
    first = model(folder, "gpt-neox", lora=config, seed=1)
    torch.manual_seed(6)
    again = model(folder, "gpt-neox", lora=config, seed=1)
    other = model(folder, "gpt-neox", lora=config, seed=2)
    assert all(torch.equal(first.params[n], again.params[n]) for n in first.params)
    assert any(not torch.equal(first.params[n], other.params[n]) for n in first.params)


def test_dropout_is_off_unless_asked_for(folder: Path) -> None:
    lm = model(folder, "gpt-neox")
    batch = DataStream(rows(folder=folder), 4, dtype=torch.float64)[0]
    assert torch.equal(*(lm.objective(lm.params, batch.inputs, batch.scale) for _ in range(2)))
    noisy = model(folder, "gpt-neox", dropout=True)
    assert not torch.equal(*(noisy.objective(noisy.params, batch.inputs, batch.scale) for _ in range(2)))


def test_stream_order_is_that_of_datasets_shuffle() -> None:
    import datasets

    stream = DataStream([[1, 2]] * 10, 4, epochs=2, seed=3)
    for epoch in range(2):
        visited = np.concatenate([stream.rows_at(t) for t in range(epoch * 3, epoch * 3 + 3)])
        expected = datasets.Dataset.from_dict({"n": list(range(10))}).shuffle(seed=3 + epoch)["n"]
        assert visited.tolist() == list(expected)
    assert DataStream([[1, 2]] * 5, 2, shuffle=False).rows_at(1).tolist() == [2, 3]
    steps = stream.steps_of_rows()
    assert all(r in stream.rows_at(steps[r][e]) for e in range(2) for r in range(10))


@pytest.mark.parametrize("options,message", [
    ({"batch_size": 0}, "batch_size is 0"),
    ({"batch_size": 2, "epochs": 0}, "epochs is 0"),
    ({"batch_size": 2, "weight_shape": (4,)}, r"weights of shape \(4,\) do not fit: one per example is \(3,\)"),
    ({"batch_size": 2, "weight_shape": (3, 1)}, r"one per token \(3, L\) with L at least 2"),
    ({"batch_size": 2, "weights": torch.tensor([1.0, float("nan"), 1.0])}, r"1 of 3 data weights are NaN.*\[1\]"),
])  # fmt: skip
def test_streams_that_do_not_fit(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataStream([[1, 2]] * 3, **options)


def test_rows_without_a_target_are_refused_by_the_stream() -> None:
    with pytest.raises(ValueError, match="row 1 has 1 tokens and so no target"):
        DataStream([[1, 2], [3]], 1)
    with pytest.raises(ValueError, match="one common length"):
        DataStream({"x": torch.zeros(3), "y": torch.zeros(2)}, 1)
    with pytest.raises(IndexError, match="step 2 is outside"):
        DataStream([[1, 2]], 1, epochs=2)[2]


def test_models_that_are_not_causal_or_not_there(folder: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

    BertForMaskedLM(BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
                               intermediate_size=8)).save_pretrained(folder / "bert")  # fmt: skip
    T5ForConditionalGeneration(T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
                               ).save_pretrained(folder / "t5")  # fmt: skip
    for name in ("bert", "t5"):
        with pytest.raises(ValueError, match="is not a causal language model"):
            load_causal_lm(str(folder / name))
    with pytest.raises(ValueError, match="cannot load model 'nobody/nothing'"):
        load_causal_lm("nobody/nothing")


def test_query_reductions(folder: Path) -> None:
    lm, data = model(folder, "gpt-neox"), rows(folder=folder)
    engine = Double(lm.objective)
    each, _ = Queries(query_columns(engine.objective, data, "none", dtype=torch.float64))(lm.params)
    mean, grads = Queries(query_columns(engine.objective, data, "mean", batch_size=3, dtype=torch.float64))(lm.params)
    sizes = torch.tensor([int(mask.sum()) for mask in data.target_mask], dtype=torch.float64)
    torch.testing.assert_close(mean[0], (each * sizes).sum() / sizes.sum(), rtol=1e-12, atol=1e-12)
    assert all(g.shape == (1, *lm.params[n].shape) for n, g in grads.items())
    with pytest.raises(ValueError, match="unknown query reduction 'sum'"):
        query_columns(engine.objective, data, "sum")
