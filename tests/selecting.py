"""Three short rows, two scores of each of their real tokens, and larger random ones, for tests of selections."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, tensor

from retrograd.data.stream import token_rows
from retrograd.select.places import Places, places_of

ROWS = token_rows([[5, 6, 7, 8], [5, 6], [9, 5, 6]])  # real tokens: 3, 1 and 2
TAU = tensor([-2.0, 0.0, 1.0, -4.0, 3.0, -2.0], dtype=torch.float64)  # mean size 2
MU = tensor([-1.0, 1.0, -1.0, 0.0, 2.0, -3.0], dtype=torch.float64)


def double(*values: float) -> Tensor:
    return tensor(values, dtype=torch.float64)


def many(seed: int = 0) -> tuple[Places, Tensor, Tensor]:
    """Rows of different lengths, with tokens of different frequency, and scores without ties."""
    draw = np.random.default_rng(seed)
    rows = token_rows([draw.integers(0, 6, draw.integers(3, 9)).tolist() for _ in range(30)])
    places = places_of(rows)
    return places, torch.from_numpy(draw.normal(size=len(places))), torch.from_numpy(draw.normal(size=len(places)))
