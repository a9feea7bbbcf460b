"""DataStream and Trainer as users of MAGIC write them: data sets, tokenizers, torchopt, a model's loss_function."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import tiny
import torch
from torch import Tensor
from torch.nn import functional as F

from retrograd import BackwardState, DataStream, Trainer, TrainerState, weighted_causal_lm_ce
from retrograd.data.rows import build_rows
from retrograd.optim import adamw
from retrograd.settings.run import DataConfig

TEXTS = ["the cat sat", "red bird", "a small dog ran on the hill", "fish swims sea"]


def model(dtype: torch.dtype = torch.float64) -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny.configurations()["gpt-neox"]).to(dtype)


def of(**columns: list[Any]) -> datasets.Dataset:
    return datasets.Dataset.from_dict(columns)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.save_model(folder, "gpt-neox")
    return AutoTokenizer.from_pretrained(folder)


def test_a_data_set_of_texts_is_tokenised_as_the_command_does(tokenizer: Any) -> None:
    stream = DataStream(of(text=TEXTS), tokenizer, batch_size=2, device="cpu")
    assert stream.rows.digest() == build_rows(of(text=TEXTS), tokenizer).digest()
    assert (stream.weights.shape, len(stream)) == ((4,), 2)
    named = DataStream(of(body=TEXTS), tokenizer, batch_size=2, text_column="body", max_length=2)
    assert named.rows.truncated == 3
    assert named.rows.max_length == 2


def test_a_data_set_of_token_ids_needs_no_tokenizer() -> None:
    ids = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
    labels = [[-100, 6, 7], [8, 9], [-100, -100, 12, 13]]
    for stream in (DataStream(of(input_ids=ids), batch_size=2), DataStream(of(input_ids=ids).with_format("torch"), 2)):
        assert [row.tolist() for row in stream.rows.input_ids] == ids
    assert DataStream(of(input_ids=ids, labels=labels), batch_size=3).rows.targets == 5


@pytest.mark.parametrize("texts", [TEXTS, ["the cat sat", "", "a blue bird sings"]], ids=["all", "one skipped"])
def test_one_weight_a_token_of_every_document(texts: list[str], tokenizer: Any) -> None:
    stream = DataStream(of(text=texts), tokenizer, batch_size=2, weight_shape=(len(texts), 4), shuffle=False)
    assert stream.weights.shape == (len(texts), 4)
    assert stream.rows.max_length <= 4  # cut to the weights
    lines = torch.cat([stream[t].index.flatten()[stream[t].scale.flatten() > 0] // 4 for t in range(len(stream))])
    found = [
        document for ids, document in zip(stream.rows.target_mask, stream.rows.doc_ids) for document in document[ids]
    ]
    assert lines.tolist() == np.array(found).tolist()


@pytest.mark.parametrize("make, told", [
    (lambda t: DataStream(of(text=TEXTS), batch_size=2), "column 'text' needs a tokenizer"),
    (lambda t: DataStream(of(text=TEXTS), t), "give batch_size"),
    (lambda t: DataStream(of(text=TEXTS), 3, 4), "3 stands where the tokenizer does, and batch_size is 4"),
    (lambda t: DataStream(TEXTS, batch_size=2), "the rows are texts; give token ids, or a data set with its tokenizer"),
    (lambda t: DataStream([[1, 2]], t, batch_size=2), "tokenizer: for a Hugging Face data set; list is not one"),
    (lambda t: DataStream([[1, 2]], 2, max_length=2), "max_length: for a Hugging Face data set"),
    (lambda t: DataStream(datasets.DatasetDict(a=of(text=TEXTS)), t, 2), r"the splits a; give one, such as .*\['a'\]"),
    (lambda t: DataStream(of(text=TEXTS).to_iterable_dataset(), t, 2), "has no length, and a step's rows have to be"),
    (lambda t: DataStream([[1, 2, 3]], 1, weight_shape=(1, 2)), r"\(1, L\) with L at least 3, the longest row"),
    (lambda t: DataStream([[1, 2, 3]], 1, weight_shape=(2, 3)), r"weights of shape \(2, 3\) do not fit"),
    (lambda t: DataStream([[1, 2, 3]], 1, device="cuda:99"), "device cuda:99 cannot be used here"),
])  # fmt: skip
def test_what_is_no_stream_is_refused(make: Any, told: str, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=told):
        make(tokenizer)


def test_weights_take_the_precision_of_the_model() -> None:
    rows = [[5, 3, 4, 2], [7, 8, 9], [4, 4, 6, 10, 3]]
    found = {}
    for dtype in (torch.float64, torch.float32):
        trainer, start = Trainer.initialize(model(dtype), adamw(1e-2, eps_root=1e-6))
        stream, query = DataStream(rows, 2), DataStream([[3, 5, 7]], 1)
        final = trainer.train(start, stream)
        found[dtype] = trainer.backward(None, stream, trainer.evaluate(final, query))
        assert found[dtype].weight_grads.dtype == found[dtype].value.dtype == dtype
    trainer, start = Trainer.initialize(model(), adamw(1e-2, eps_root=1e-6))
    stream, query = (DataStream(r, 2, dtype=torch.float64) for r in (rows, [[3, 5, 7]]))
    asked = trainer.backward(None, stream, trainer.evaluate(trainer.train(start, stream), query))
    assert torch.equal(asked.weight_grads, found[torch.float64].weight_grads)
    settled = DataStream(rows, 2, dtype=torch.float32)
    trainer.train(start, settled)
    assert trainer._last.training.weights.dtype == torch.float32  # asked for, and so left
    given = DataStream(rows, 2, weights=torch.full((3,), 1 / 3, dtype=torch.float64))
    assert given.weights.dtype == torch.float64


@pytest.mark.parametrize("per_token", [False, True])
def test_magic_as_its_users_write_it(per_token: bool, tmp_path: Path, tokenizer: Any) -> None:
    torchopt = pytest.importorskip("torchopt")
    network, dataset, folder = model(), of(text=TEXTS), str(tmp_path / "ckpts")
    network.loss_function = weighted_causal_lm_ce
    trainer, start = Trainer.initialize(network, torchopt.adam(lr=1e-2, eps_root=1e-6))
    shape = (len(dataset), 8) if per_token else None
    stream = DataStream(dataset, tokenizer, batch_size=2, device="cpu", weight_shape=shape)
    state = trainer.train(start, stream, save_dir=folder)
    assert isinstance(state, TrainerState)
    query_stream = DataStream(dataset.select([1]), tokenizer, batch_size=1)
    result = trainer.backward(folder, stream, trainer.evaluate(state, query_stream))
    assert isinstance(result, BackwardState)

    direction = torch.randn(stream.weights.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def phi(h: float) -> Tensor:
        moved = DataStream(dataset, tokenizer, batch_size=2, weights=1 + h * direction)
        return trainer.evaluate(trainer.train(start, moved), query_stream).value

    measured = float(phi(1e-5) - phi(-1e-5)) / 2e-5
    slope = float((result.weight_grads * direction).sum())
    assert slope == pytest.approx(measured, rel=1e-6)
    assert 1.001 * slope != pytest.approx(measured, rel=1e-6)


def test_a_models_own_loss_takes_data_weights() -> None:
    network, ids = model().eval(), torch.tensor([[2, 5, 7, 3], [4, 4, 9, 8]])
    network.loss_function = weighted_causal_lm_ce
    weights = torch.tensor([0.5, 2.0], dtype=torch.float64, requires_grad=True)
    labels = ids.masked_fill(ids == 3, -100)
    loss = network(input_ids=ids, labels=labels, example_weight=weights).loss
    ce = F.cross_entropy(network(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    each = (ce.view(2, 3) * (labels[:, 1:] != -100)).sum(1)
    torch.testing.assert_close(loss, (weights * each).sum() / 5)
    torch.testing.assert_close(torch.autograd.grad(loss, weights)[0], each / 5)


def by_positions(logits: Tensor, labels: Tensor, *, example_weight: Any = None, vocab_size: int = 0) -> Tensor:
    """Divides by all positions, ignored ones included."""
    ce = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none").view(len(labels), -1)
    return (ce if example_weight is None else ce * example_weight[:, None]).mean()


def by_targets(logits: Tensor, labels: Tensor, *, example_weight: Any = None, vocab_size: int = 0) -> Tensor:
    positions = labels[:, 1:].numel()
    return by_positions(logits, labels, example_weight=example_weight) * positions / (labels[:, 1:] != -100).sum()


def unweighted(logits: Tensor, labels: Tensor, vocab_size: int, **unread: Any) -> Tensor:
    return by_targets(logits, labels)


@pytest.mark.parametrize("loss, told", [
    (by_targets, None),
    (by_positions, r"by_positions\) is not the objective .*: with weights it gave .* divided by the number of valid"),
    (unweighted, r"unweighted\) is not the objective that is trained: with weights"),
    (lambda logits, labels, vocab_size: logits.sum(), "cannot be called with logits, labels.*example_weight: TypeError"),
])  # fmt: skip
def test_a_loss_function_has_to_be_the_objective(loss: Any, told: str | None) -> None:
    network = model()
    network.loss_function = loss
    if told is None:
        Trainer.initialize(network, adamw(1e-3))
        return
    with pytest.raises(ValueError, match=told):
        Trainer.initialize(network, adamw(1e-3))


def test_chunks_of_no_length_are_rows_of_their_own() -> None:
    assert DataConfig(dataset="x", chunk_length=0) == DataConfig(dataset="x")
    assert DataConfig(dataset="x", chunk_length=8).chunk_length == 8


def test_the_code_of_the_page_on_python_runs(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchopt")
    page = (Path(__file__).parent.parent / "docs" / "python.md").read_text(encoding="utf8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {
        "model": model(), "tokenizer": tokenizer, "dataset": of(text=TEXTS), "query_dataset": of(text=TEXTS[:1]),
    }  # fmt: skip
    exec(blocks[0].replace("cuda", "cpu"), names)
    names |= {
        "one_epoch": DataStream(names["dataset"], tokenizer, 2), "query_stream": names["stream"],
        "two_epochs": DataStream(names["dataset"], tokenizer, 2, epochs=2),
    }  # fmt: skip
    exec(blocks[1], names)
    final = names["trainer"].train(names["start"], names["two_epochs"])
    whole = names["trainer"].backward(None, names["two_epochs"], names["trainer"].evaluate(final, names["stream"]))
    found = names["late"].weight_grads + names["early"].weight_grads
    torch.testing.assert_close(found, whole.weight_grads, rtol=1e-9, atol=1e-12)


def test_torchopt_without_a_root_epsilon_has_the_scores_of_adamw() -> None:
    torchopt = pytest.importorskip("torchopt")
    rows, found = [[5, 3, 4, 2], [7, 8, 9], [4, 4, 6, 10, 3]], []
    for optimizer in (torchopt.adam(lr=1e-4), adamw(1e-4, eps_root=0.0)):  # most tokens never come
        trainer, start = Trainer.initialize(model(), optimizer)
        stream = DataStream(rows, 2)
        final = trainer.train(start, stream)
        query = trainer.evaluate(final, DataStream([[3, 5, 7]], 1))
        found.append((final.params, trainer.backward(None, stream, query).weight_grads))
    for name, theta in found[0][0].items():
        torch.testing.assert_close(theta, found[1][0][name], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-3, atol=0)  # torchopt counts in float32
