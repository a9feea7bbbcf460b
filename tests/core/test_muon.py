"""Newton–Schulz and its pullback in closed form, against autograd."""

from __future__ import annotations

import pytest
import torch
from torch.func import vjp

from retrograd.core import check
from retrograd.core.optim.muon import newton_schulz, newton_schulz_pullback


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6), (1, 4), (4, 1)], ids=str)
def test_the_pullback_of_newton_schulz_is_autograds(shape: tuple[int, int]) -> None:
    draw = torch.Generator().manual_seed(0)
    matrix = torch.randn(shape, generator=draw, dtype=torch.float64)
    bars = torch.randn((3, *shape), generator=draw, dtype=torch.float64)
    expected, pull = vjp(lambda x: newton_schulz(x, 5), matrix)
    found, slopes = newton_schulz_pullback(matrix, bars, 5)
    assert check.relative_error(found, expected) < 1e-12
    for own, bar in zip(slopes, bars):
        assert check.relative_error(own, *pull(bar)) < 1e-12
        assert check.relative_error(1.001 * own, *pull(bar)) > 1e-12


def test_a_direction_of_zeros_has_the_finite_slope_of_its_size() -> None:
    zeros, bars = torch.zeros(2, 3, dtype=torch.float64), torch.ones(1, 2, 3, dtype=torch.float64)
    assert torch.equal(newton_schulz_pullback(zeros, bars, 1)[1], bars * 3.4445 / 1e-14**0.5)
