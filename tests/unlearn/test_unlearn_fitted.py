"""What methods fit before the first step: tuned lenses and maps from a teacher, against plain fits of the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_unlearn_by_hand import mean, rows_of
from test_unlearn_methods import drawn
from tiny import configurations, save_model
from torch import Tensor
from torch.nn import functional as F
from unlearning import as_language_model, evened, language_model, pairs, started

from retrograd.core.step import coefficients
from retrograd.data.pairs import PairStream
from retrograd.lm.outputs import outputs_of
from retrograd.unlearn.activation.checkpoint_transfer import ridge_map
from retrograd.unlearn.lens import read_out
from retrograd.unlearn.methods import METHODS
from retrograd.unlearn.reference import reference_of

LENS, TRANSFER = METHODS["tuned_lens"], METHODS["checkpoint_transfer"]


@pytest.mark.parametrize("family", ["gpt-neox", "gpt2-tied", "gemma", "olmo2"])
def test_norm_and_head_of_the_last_states_are_the_logits(family: str) -> None:
    lm = language_model(family)
    found = outputs_of(lm, (1,))(lm.params, pairs(LENS)[0].inputs)
    assert found.logits is not None
    assert torch.allclose(read_out(lm.module)(found.states[1]), found.logits, rtol=1e-5, atol=1e-6)


def test_a_lens_is_trained_as_by_hand() -> None:
    """Plain AdamW on plain layers, row by row; the lens says what the model will better than no lens does."""
    lm, stream = language_model(), pairs(LENS, epochs=2)
    settings = replace(LENS.defaults, blocks=(0, 1), lens_epochs=3, lens_lr=0.01)
    lens = LENS.fitted_to(lm, reference_of(lm), stream, settings).value
    layer, model = torch.nn.Linear(16, 16).double(), lm.module
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    optimizer, ones = torch.optim.AdamW(layer.parameters(), 0.01, weight_decay=0.01), torch.ones_like(stream.weights)
    losses = []
    for step in range(3 * len(stream)):
        rows = rows_of(lm, lm.params, stream, ones, step % len(stream))[0]
        h, z = (torch.cat([row[place] for row in rows]).detach() for place in (0, 2))
        read = model.lm_head(model.gpt_neox.final_layer_norm(h + layer(h)))
        loss = F.kl_div(read.log_softmax(-1), z.log_softmax(-1), reduction="batchmean", log_target=True)
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert lens.maps.keys() == {0}, "the last block needs none"
    assert torch.allclose(lens.maps[0][0], layer.weight.detach(), rtol=1e-6, atol=1e-9)
    assert torch.allclose(lens.maps[0][1], layer.bias.detach(), rtol=1e-6, atol=1e-9)
    assert losses[-1] < 0.9 * losses[0]
    again = LENS.fitted_to(lm, reference_of(lm), stream, settings)
    assert torch.equal(again.value.maps[0][0], lens.maps[0][0])
    other = LENS.fitted_to(lm, reference_of(lm), stream, replace(settings, lens_epochs=1))
    assert other.digest != again.digest


def test_tuned_lens_by_hand() -> None:
    lm = language_model()
    objective, params = started(LENS, lm, evened(LENS))
    stream = pairs(LENS, forget_batch=3, retain_batch=3)
    weights = drawn(stream.weights.shape)
    found = objective.terms(params, stream[1].inputs, coefficients(stream[1], weights))["forget"]
    model, (a, b) = lm.module, objective.fitted.value.maps[0]

    def flat(h: Tensor, h0: Tensor) -> Tensor:
        z = model.lm_head(model.gpt_neox.final_layer_norm(h))
        even = torch.full_like(z, 1 / z.shape[-1])
        return F.cross_entropy(z, even, reduction="none").detach() / np.log(z.shape[-1])

    def value(block: int, change: Any) -> float:
        return mean(rows_of(lm, params, stream, weights, 1, block)[0], lambda h, h0: flat(change(h), h0))

    first = value(0, lambda h: h + F.linear(h, a, b))
    last = mean(before_the_norm(lm, params, stream, weights), flat)
    assert found == pytest.approx((0.5, (first + last) / 2), rel=1e-9)


def before_the_norm(lm: Any, params: dict[str, Tensor], stream: PairStream, weights: Tensor) -> Any:
    """The rows with the last block's output; `hidden_states` has it after the norm."""
    from retrograd.data.pairs import FORGET

    batch, found = stream[1], []
    out = outputs_of(lm, (1,))(params, batch.inputs)
    for place, (row, side) in enumerate(zip(stream.rows_at(1), batch.inputs["side"])):
        h = out.states[1][out.rows == place]
        if side == FORGET:
            found.append((h, h, None, None, weights[row, 1 : len(h) + 1]))
    return found


def test_the_ridge_map_is_least_squares_with_rows_that_pull_to_zero() -> None:
    draw = torch.Generator().manual_seed(0)
    x, y = (torch.randn(40, d, generator=draw, dtype=torch.float64) + 3 for d in (5, 4))
    a, b = ridge_map(x, y, 0.3)
    centred, other = (x - x.mean(0)).numpy(), (y - y.mean(0)).numpy()
    strength = 0.3 * np.trace(centred.T @ centred) / 5
    rows, targets = np.vstack([centred, np.sqrt(strength) * np.eye(5)]), np.vstack([other, np.zeros((5, 4))])
    expected = np.linalg.lstsq(rows, targets, rcond=None)[0]
    assert np.allclose(a.numpy(), expected, rtol=1e-10)
    assert torch.allclose(x.mean(0) @ a + b, y.mean(0), rtol=1e-12)
    exact = ridge_map(x, x @ a + b, 1e-14)
    assert torch.allclose(exact[0], a, rtol=1e-9)


def test_checkpoint_transfer_by_hand(tmp_path: Path) -> None:
    """The maps are fitted on the retain rows' states, and forget states are held against the mapped teacher's."""
    lm = language_model()
    save_model(tmp_path / "teacher", seed=3)
    settings = evened(TRANSFER, blocks=(0,), teacher=str(tmp_path / "teacher"), ridge=0.01)
    stream = pairs(TRANSFER)
    objective, params = started(TRANSFER, lm, settings)
    teacher = objective.fitted.value.teacher
    ones, weights = torch.ones_like(stream.weights), drawn(stream.weights.shape)
    seen = [[torch.cat([row[0] for row in rows_of(one, one.params, stream, ones, step)[1]]) for step in range(2)]
            for one in (teacher, lm)]  # 3 rows, 2 a step  # fmt: skip
    a, b = ridge_map(*(torch.cat(parts).detach() for parts in seen), 0.01)
    taught = rows_of(teacher, teacher.params, stream, weights, 2)[0]
    own = rows_of(lm, params, stream, weights, 2)[0]
    rows = [(h, x[0], *rest) for (h, _, *rest), x in zip(own, taught)]
    expected = mean(rows, lambda h, x: torch.stack([F.mse_loss(x0 @ a + b, h0) for x0, h0 in zip(x, h)]).detach())
    found = objective.terms(params, stream[2].inputs, coefficients(stream[2], weights))["forget"]
    assert found == pytest.approx((0.5, expected), rel=1e-9)


def test_a_teacher_is_of_the_same_depth_and_named_by_its_digest(tmp_path: Path) -> None:
    lm, stream = language_model(layers=1), pairs(TRANSFER)
    made = [
        TRANSFER.fitted_to(lm, reference_of(lm), stream, replace(TRANSFER.defaults, teacher_seed=seed)).digest
        for seed in (0, 1, 0)
    ]
    assert made[0] == made[2] != made[1]
    save_model(tmp_path / "deep")
    with pytest.raises(ValueError, match="has 2 blocks, the model 1: give one of the same tokenizer and depth"):
        TRANSFER.fitted_to(lm, reference_of(lm), stream, replace(TRANSFER.defaults, teacher=str(tmp_path / "deep")))
    with pytest.raises(ValueError, match="needs what it fits before the first step"):
        TRANSFER.objective(lm, reference_of(lm))
    alone = PairStream([[1, 2, 3]], None, forget_batch=1, retain_batch=1, dtype=torch.float64)
    with pytest.raises(ValueError, match="fits its maps on retain rows and there are none"):
        TRANSFER.fitted_to(lm, reference_of(lm), alone)
    for method, wrong in ((TRANSFER, {"ridge": 0.0}), (LENS, {"lens_epochs": 0})):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            replace(method.defaults, **wrong)


def test_a_model_that_caps_its_logits_has_no_lens() -> None:
    from transformers import AutoModelForCausalLM

    class Capped(type(AutoModelForCausalLM.from_config(configurations()["gpt-neox"]))):  # type: ignore[misc]
        def forward(self, *arguments: Any, **options: Any) -> Any:
            found = super().forward(*arguments, **options)
            found.logits = 2 * torch.tanh(found.logits)
            return found

    torch.manual_seed(0)
    lm = as_language_model(Capped(configurations()["gpt-neox"]).double().eval())
    with pytest.raises(ValueError, match="norm and head of the last block's states are not the model's logits"):
        LENS.fitted_to(lm, reference_of(lm), pairs(LENS))
