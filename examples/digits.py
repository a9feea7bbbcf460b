"""Any module, any loss: which training images taught a small network to read its test digits?

A convolutional net on scikit-learn's digits. The scores of the training images are checked by retraining without random
subsets (LDS), and without the strongest proponents and detractors.

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
        nn.Conv2d(1, 16, 3, padding=1), nn.GroupNorm(1, 16), nn.GELU(), nn.Flatten(), nn.Linear(1024, 10)
    )  # fmt: skip

    def loss(params: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:  # one loss per image, [B]
        return F.cross_entropy(functional_call(model, params, (batch["x"],)), batch["y"], reduction="none")

    train, count = {"x": x[:1200], "y": y[:1200]}, 1200
    trainer, start = Trainer.initialize(model, sgd(lr=0.01, momentum=0.9), loss)
    stream = DataStream(train, batch_size=100, epochs=4)
    query = DataStream({"x": x[1200:1500], "y": y[1200:1500]}, batch_size=300, shuffle=False)

    state = trainer.train(start, stream)
    value = trainer.evaluate(state, query)
    scores = trainer.backward(None, stream, value).weight_grads  # [1200] nats per unit of weight
    print(f"query loss {float(value.value):.4f} nats; {int((scores < 0).sum())} of {count} images are proponents")

    def without(rows: Tensor) -> float:
        weights = torch.ones(count).index_fill_(0, rows, 0.0)
        retrained = trainer.train(start, DataStream(train, batch_size=100, epochs=4, weights=weights))
        return float(trainer.evaluate(retrained, query).value - value.value)

    for fraction in (0.01, 0.05, 0.1):
        found = trainer.validate(start, stream, query, scores, subsets=30, fraction=fraction)
        low, high = found.interval
        print(
            f"{fraction:.0%} left out, 30 times: LDS {found.mean_lds:.3f} [{low:.3f}, {high:.3f}], "
            f"slope {found.agreement[0].slope:.2f}"
        )

    order = scores.argsort()
    proponents, detractors = order[scores[order] < 0][:10], order[scores[order] > 0][-10:]
    for name, rows in (("strongest proponents", proponents), ("strongest detractors", detractors)):
        change = f"predicted {-float(scores[rows].sum()):+.5f}, measured {without(rows):+.5f} nats"
        print(f"without the {len(rows)} {name}: {change}")


if __name__ == "__main__":
    main()
