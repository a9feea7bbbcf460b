"""The friendly face: as in the README, for language models and for any module."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from retrograd import DataStream, Trainer, weighted_causal_lm_ce
from retrograd.core import check, tree
from retrograd.core.step import NonFiniteError
from retrograd.optim import SGD, adamw, sgd
from retrograd.runs.states.budget import Replay


def classifier(seed: int = 0) -> tuple[nn.Module, object, DataStream, DataStream]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 36, 3)).double()

    def loss(params: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(functional_call(model, params, (batch["x"],)), batch["y"], reduction="none")

    draw = torch.Generator().manual_seed(1)
    x, y = torch.randn(14, 1, 8, 8, generator=draw).double(), torch.randint(0, 3, (14,), generator=draw)
    stream = DataStream({"x": x[:10], "y": y[:10]}, 4, epochs=2, dtype=torch.float64)
    return model, loss, stream, DataStream({"x": x[10:], "y": y[10:]}, 3, shuffle=False, dtype=torch.float64)


@pytest.mark.parametrize("save", [True, False], ids=["on-disk", "in-memory"])
def test_scores_of_an_image_classifier_equal_retraining(tmp_path: Path, save: bool) -> None:
    model, loss, stream, query_stream = classifier()
    folder = tmp_path / "ckpts" if save else None
    trainer, state = Trainer.initialize(model, adamw(lr=1e-2, eps_root=1e-6), loss)
    final = trainer.train(state, stream, save_dir=folder)
    query = trainer.evaluate(final, query_stream)
    scores = trainer.backward(folder, stream, query).weight_grads
    v = torch.randn(10, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def phi(h: float) -> Tensor:
        moved = DataStream(stream.rows, 4, epochs=2, weights=stream.weights + h * v, dtype=torch.float64)
        return trainer.evaluate(trainer.train(state, moved), query_stream).value

    measured = (phi(1e-5) - phi(-1e-5)) / 2e-5
    assert float(scores @ v) == pytest.approx(float(measured), rel=1e-6)
    assert float(1.001 * scores @ v) != pytest.approx(float(measured), rel=1e-6)


def test_another_process_can_run_backward_from_the_folder(tmp_path: Path) -> None:
    model, loss, stream, query_stream = classifier()
    trainer, state = Trainer.initialize(model, sgd(0.1, 0.9), loss)
    final = trainer.train(state, stream, save_dir=tmp_path)
    query = trainer.evaluate(final, query_stream)
    here = trainer.backward(tmp_path, stream, query).weight_grads
    fresh, again = Trainer.initialize(classifier()[0], sgd(0.1, 0.9), classifier()[1])
    resumed = fresh.train(again, stream, save_dir=tmp_path)  # done already: read, not trained
    assert tree.digest(resumed) == tree.digest(final)
    there = fresh.backward(tmp_path, stream, fresh.evaluate(resumed, query_stream)).weight_grads
    assert torch.equal(here, there)


def test_language_model_as_in_the_readme(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny.configurations()["gpt2-tied"]).double()
    rows = [[2, 5, 7, 3], [4, 4, 9], [8, 3, 2, 6, 5], [7, 7]]
    trainer, state = Trainer.initialize(model, adamw(lr=1e-3, eps_root=1e-8))
    stream = DataStream(rows, batch_size=2, weight_shape=(4, 5), dtype=torch.float64)
    state = trainer.train(state, stream, save_dir=tmp_path / "ckpts")
    query = trainer.evaluate(state, DataStream([[2, 5, 7]], batch_size=1, dtype=torch.float64))
    result = trainer.backward(tmp_path / "ckpts", stream, query)
    assert result.weight_grads.shape == (4, 5)
    assert (result.weight_grads[:, 0] == 0).all()
    logits = functional_call(model, dict(state.params), (torch.tensor([[2, 5, 7]]),)).logits
    torch.testing.assert_close(query.value, weighted_causal_lm_ce(logits, torch.tensor([[2, 5, 7]])))


@pytest.mark.parametrize("replay", [
    Replay(plan="binomial", slots=2), Replay(plan="sqrt"), Replay(memory=1, disk=1 << 40),
    Replay(plan="interval", interval=3, memory=1 << 40, disk=1 << 40, keep=True),
])  # fmt: skip
def test_every_plan_and_tier_gives_the_same_bits(tmp_path: Path, replay: Replay) -> None:
    model, loss, stream, query_stream = classifier()
    found = []
    for folder, settings in ((None, None), (tmp_path, replay)):
        trainer, state = Trainer.initialize(model, adamw(1e-2, eps_root=1e-6), loss)
        final = trainer.train(state, stream, folder, replay=settings)
        query = trainer.evaluate(final, query_stream)
        found.append(trainer.backward(folder, stream, query, replay=settings).weight_grads)
    assert torch.equal(*found)


def test_a_wrong_call_says_what_is_missing(tmp_path: Path) -> None:
    model, loss, stream, query_stream = classifier()
    with pytest.raises(ValueError, match="is no Hugging Face language model, so it needs a loss"):
        Trainer.initialize(model, sgd(0.1))
    with pytest.raises(ValueError, match=r"is no \(init, update\) pair"):
        Trainer.initialize(model, torch.optim.SGD(model.parameters(), 0.1), loss)
    trainer, state = Trainer.initialize(model, sgd(0.1), loss)
    query = trainer.evaluate(state, query_stream)
    with pytest.raises(ValueError, match="no finished run of this recipe, start and stream in memory"):
        trainer.backward(None, stream, query)
    with pytest.raises(ValueError, match="no finished run"):
        trainer.backward(tmp_path, stream, query)
    summed, start = Trainer.initialize(model, sgd(0.1), lambda p, b: loss(p, b).sum())
    with pytest.raises(ValueError, match=r"loss returned shape \(\) for a batch of \(4,\) weights"):
        summed.train(start, stream)
    with pytest.raises(ValueError, match="running statistics"):
        Trainer.initialize(nn.Sequential(nn.BatchNorm1d(3)), sgd(0.1), loss, dropout=True)


def test_a_folder_of_another_recipe_is_refused(tmp_path: Path) -> None:
    from retrograd.runs.errors import RunError

    model, loss, stream, _ = classifier()
    trainer, state = Trainer.initialize(model, sgd(0.1), loss)
    trainer.train(state, stream, save_dir=tmp_path)
    other, state = Trainer.initialize(model, sgd(0.2), loss)
    with pytest.raises(RunError, match="written by another run"):
        other.train(state, stream, save_dir=tmp_path)


def test_states_that_do_not_fit_are_refused_with_the_numbers() -> None:
    model, loss, stream, _ = classifier()
    trainer, state = Trainer.initialize(model, SGD(0.1), loss)
    with pytest.raises(ValueError, match=r"plan 'all' holds 6 states of [\d,]+ bytes, and memory 10,000"):
        trainer.train(state, stream, replay=Replay(plan="all", memory=10_000))


def test_a_retraining_that_diverges_is_refused_with_its_step() -> None:
    model, loss, stream, query = classifier()
    trainer, state = Trainer.initialize(model, SGD(1e308), loss)
    with pytest.raises(NonFiniteError, match=r"retrained with everything: .*left the finite numbers"):
        trainer.validate(state, stream, query, torch.zeros(10), subsets=2)


def test_torchopt_optimizer_in_the_trainer() -> None:
    torchopt = pytest.importorskip("torchopt")
    model, loss, stream, query_stream = classifier()
    trainer, state = Trainer.initialize(model, torchopt.sgd(0.1, momentum=0.9), loss)
    final = trainer.train(state, stream)
    scores = trainer.backward(None, stream, trainer.evaluate(final, query_stream)).weight_grads
    ours, state = Trainer.initialize(model, sgd(0.1, 0.9), loss)
    expected = ours.backward(None, stream, ours.evaluate(ours.train(state, stream), query_stream)).weight_grads
    assert check.relative_error(scores, expected) < 1e-10


@pytest.mark.parametrize("adapters", [False, True])
def test_rows_that_do_not_fit_the_model_are_refused_in_words(adapters: bool) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(tiny.configurations()["gpt2-tied"])
    if adapters:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["c_attn"]))
    trainer, state = Trainer.initialize(model, sgd(0.1))
    good = DataStream([[1, 2, 3], list(range(20))], 1)
    for rows, message in (
        ([[1, 2], [3, tiny.VOCABULARY, 4]], "row 1 has token id 22 at position 1, outside the vocabulary of 22"),
        ([[1, -100, 2]], "row 0 has token id -100 at position 1, outside the vocabulary of 22: .*padding is not part"),
        ([[1, 2], [3] * 33], "row 1 has 33 tokens, more than the model's context of 32: cut it"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer.train(state, DataStream(rows, 1))
        with pytest.raises(ValueError, match=message):
            trainer.evaluate(state, DataStream(rows, 1))
    assert len(trainer.evaluate(trainer.train(state, good), good).gradient) == len(state.params)
