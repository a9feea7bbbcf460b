"""A convolutional net on scikit-learn's digits: scores predict retraining."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from retrograd import DataStream, Trainer
from retrograd.optim import adamw, sgd


@pytest.mark.parametrize(
    "optimizer",
    [
        pytest.param(sgd(0.01, momentum=0.9), id="sgd"),
        pytest.param(adamw(1e-3, eps_root=1e-6), id="adamw", marks=pytest.mark.slow),
    ],
)
def test_digits_are_validated(optimizer) -> None:
    torch.manual_seed(0)
    digits = load_digits()
    x, y = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.GroupNorm(1, 16), nn.GELU(), nn.Flatten(), nn.Linear(1024, 10)
    )  # fmt: skip

    def loss(params: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(functional_call(model, params, (batch["x"],)), batch["y"], reduction="none")

    trainer, start = Trainer.initialize(model, optimizer, loss)
    stream = DataStream({"x": x[:1200], "y": y[:1200]}, batch_size=100, epochs=4)
    query = DataStream({"x": x[1200:1500], "y": y[1200:1500]}, batch_size=300, shuffle=False)
    state = trainer.train(start, stream)
    value = trainer.evaluate(state, query)
    scores = trainer.backward(None, stream, value).weight_grads
    assert float(value.value) < 0.5  # it has learnt to read
    found = trainer.validate(start, stream, query, scores, subsets=20, fraction=0.05)
    assert found.predicted.shape == found.measured.shape == (20, 1)
    assert found.mean_lds >= 0.95
    assert found.mean_lds == pytest.approx(stats.spearmanr(found.predicted[:, 0], found.measured[:, 0]).statistic)
    assert found.interval[0] > 0.8
    nothing = trainer.validate(start, stream, query, scores, subsets=1, fraction=0.0)
    assert np.all(nothing.measured == 0)
