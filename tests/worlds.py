"""Small float64 training runs that every exactness test shares."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from retrograd.core.engine import Double
from retrograd.core.step import Batch, Recipe, Training


def params(seed: int = 0, tied: bool = False) -> dict[str, Tensor]:
    """A two-layer token classifier; with `tied`, the output layer is the embedding."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64) * 0.4

    leaves = {"embed": normal(11, 6), "hidden": normal(6, 6), "bias": normal(6), "scale": 1 + normal()}
    return leaves if tied else {**leaves, "head": normal(11, 6)}


def losses(p: dict[str, Tensor], inputs: dict[str, Tensor]) -> Tensor:
    """Cross-entropy of each token, [B, L] nats."""
    x = F.embedding(inputs["x"], p["embed"])
    x = F.layer_norm(x + torch.tanh(x @ p["hidden"] + p["bias"]), (6,))
    logits = p["scale"] * x @ p.get("head", p["embed"]).T
    return F.cross_entropy(logits.flatten(0, 1), inputs["y"].flatten(), reduction="none").view(inputs["y"].shape)


def objective(p: dict[str, Tensor], inputs: dict[str, Tensor], c: Tensor) -> Tensor:
    return torch.sum(losses(p, inputs) * c)


@dataclass(frozen=True)
class Tokens:
    """A stream of random token rows; per-token or per-row weights; the last batch is shorter."""

    rows: int = 10
    batch: int = 4
    epochs: int = 2
    length: int = 3
    per_token: bool = False
    dtype: torch.dtype = torch.float64

    @property
    def per_epoch(self) -> int:
        return -(-self.rows // self.batch)

    def __len__(self) -> int:
        return self.epochs * self.per_epoch

    @cache  # noqa: B019  # a handful of streams, whose batches all tests read
    def __getitem__(self, t: int) -> Batch:
        epoch, part = divmod(t, self.per_epoch)
        order = np.random.default_rng(epoch).permutation(self.rows)
        rows = torch.from_numpy(order[part * self.batch : (part + 1) * self.batch].copy())
        data = np.random.default_rng(99)
        x = torch.from_numpy(data.integers(0, 9, (self.rows, self.length)))  # ids 9 and 10 never occur
        y = torch.from_numpy(data.integers(0, 11, (self.rows, self.length)))
        mask = torch.from_numpy(data.random((self.rows, self.length)) < 0.8)[rows]
        index = rows[:, None] * self.length + torch.arange(self.length) if self.per_token else rows[:, None]
        index = index.expand(len(rows), self.length)
        return Batch({"x": x[rows], "y": y[rows]}, index, mask.to(self.dtype) / mask.sum())

    def ones(self) -> Tensor:
        return torch.ones((self.rows, self.length) if self.per_token else self.rows, dtype=self.dtype)


def training(recipe: Recipe, stream: Tokens | None = None) -> Training:
    stream = stream or Tokens()
    return Training(recipe, Double(objective), stream, stream.ones())


def query(p: dict[str, Tensor], columns: int = 2) -> tuple[Tensor, dict[str, Tensor]]:
    """K smooth scalars of the parameters and their gradients."""
    live = {n: t.detach().requires_grad_() for n, t in p.items()}
    draw = np.random.default_rng(5)
    values, grads = [], []
    for _ in range(columns):
        x, y = (torch.from_numpy(draw.integers(0, 9, (5, 3))) for _ in range(2))
        value = losses(live, {"x": x, "y": y}).mean()
        values.append(value.detach())
        grads.append(torch.autograd.grad(value, list(live.values())))
    return torch.stack(values), {n: torch.stack(g) for n, g in zip(live, zip(*grads))}
