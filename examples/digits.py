"""Any module, any loss: which training images taught a small network to read its test digits?

A convolutional net on scikit-learn's digits. The score of each training image is checked by retraining without the
strongest proponents and detractors of the query.

    python examples/digits.py
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from retrograd import DataStream, Trainer
from retrograd.optim import sgd


def main() -> None:
    torch.manual_seed(0)
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    y = torch.tensor(digits.target)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.GELU(), nn.Conv2d(8, 8, 3, padding=1), nn.GELU(),
        nn.Flatten(), nn.Linear(512, 10),
    )  # fmt: skip

    def loss(params: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:  # one loss per image, [B]
        return F.cross_entropy(functional_call(model, params, (batch["x"],)), batch["y"], reduction="none")

    train, count = {"x": x[:600], "y": y[:600]}, 600
    trainer, start = Trainer.initialize(model, sgd(lr=0.1, momentum=0.9), loss)
    stream = DataStream(train, batch_size=50, epochs=3)
    query = DataStream({"x": x[600:700], "y": y[600:700]}, batch_size=100, shuffle=False)

    state = trainer.train(start, stream)
    value = trainer.evaluate(state, query)
    scores = trainer.backward(None, stream, value).weight_grads  # [600] nats per unit of weight
    print(f"query loss {float(value.value):.4f} nats; {int((scores < 0).sum())} of {count} images are proponents")

    def without(rows: Tensor) -> float:
        weights = torch.ones(count).index_fill_(0, rows, 0.0)
        retrained = trainer.train(start, DataStream(train, batch_size=50, epochs=3, weights=weights))
        return float(trainer.evaluate(retrained, query).value - value.value)

    order = scores.argsort()
    for name, rows in (("10 strongest proponents", order[:10]), ("10 strongest detractors", order[-10:])):
        print(f"without the {name}: predicted {-float(scores[rows].sum()):+.5f}, measured {without(rows):+.5f} nats")


if __name__ == "__main__":
    main()
