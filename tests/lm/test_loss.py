"""The fused vocabulary head against plain logits, and the alignment of token losses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from retrograd.lm.head import fused_ce, fused_ce_again, fused_ce_leaving
from retrograd.lm.loss import token_ce, weighted_causal_lm_ce

M, D, V = 7, 5, 11


def leaves(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = ((M, D), (V, D), (V,), (M,))
    return [torch.randn(s, generator=draw, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


TARGETS = torch.tensor([0, 3, 3, 10, 1, 9, 2])


def plain(h: Tensor, w: Tensor, b: Tensor | None, c: Tensor, chunk: int | None = None) -> Tensor:
    return torch.sum(c * F.cross_entropy(F.linear(h, w, b), TARGETS, reduction="none"))


def fused(h: Tensor, w: Tensor, b: Tensor | None, c: Tensor, chunk: int | None = None) -> Tensor:
    return fused_ce(h, w, b, TARGETS, c, chunk)


def all_orders(function, inputs: list[Tensor], live: list[Tensor], scale: float, chunk: int | None) -> list[Tensor]:
    """Value, gradient, and pullback of the gradient along fixed random cotangents."""
    value = function(*inputs, chunk) * scale
    grads = torch.autograd.grad(value, live, create_graph=True)
    draw = torch.Generator().manual_seed(1)
    bars = [torch.randn(g.shape, generator=draw, dtype=torch.float64).to(g.dtype) for g in grads]
    second = torch.autograd.grad(grads, live, bars, materialize_grads=True)
    return [value, *grads, *second]


def error(found: list[Tensor], expected: list[Tensor]) -> float:
    return max(((a - b).norm() / b.norm().clamp(min=1e-300)).item() for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("chunk", [1, 3, M, 100, None])
@pytest.mark.parametrize("scale", [1.0, 0.7])
@pytest.mark.parametrize("with_bias", [True, False])
def test_value_gradient_and_double_backward_are_exact(chunk: int | None, scale: float, with_bias: bool) -> None:
    h, w, b, c = leaves()
    inputs = [h, w, b if with_bias else None, c]
    live = [x for x in inputs if x is not None]
    found = all_orders(fused, inputs, live, scale, chunk)
    expected = all_orders(plain, inputs, live, scale, chunk)
    assert error(found, expected) < 1e-12
    assert error([x * 1.001 for x in found], expected) > 1e-12


@pytest.mark.parametrize("frozen", [0, 1, 3])
def test_what_is_frozen_is_left_out(frozen: int) -> None:
    inputs = leaves()
    inputs[frozen] = inputs[frozen].detach()
    live = [x for x in inputs if x.requires_grad]
    assert error(all_orders(fused, inputs, live, 1.0, 3), all_orders(plain, inputs, live, 1.0, 3)) < 1e-12


def test_head_tied_to_an_embedding() -> None:
    _, w, b, c = leaves()

    def tied(function):
        return lambda w, b, c, chunk: function(torch.tanh(w[:M]), w, b, c, chunk)

    expected = all_orders(tied(plain), [w, b, c], [w, b, c], 1.0, 3)
    assert error(all_orders(tied(fused), [w, b, c], [w, b, c], 1.0, 3), expected) < 1e-12


def test_gradgradcheck() -> None:
    assert torch.autograd.gradgradcheck(lambda *x: fused(*x, chunk=3), leaves())


def test_float32_and_extreme_logits() -> None:
    single, double = leaves(torch.float32), leaves()
    found = all_orders(fused, single, single, 1.0, 3)
    assert error([x.double() for x in found], all_orders(plain, double, double, 1.0, 3)) < 1e-5
    huge = fused(single[0] * 1e3, single[1], None, single[3])
    expected = plain(double[0] * 1e3, double[1], None, double[3])
    assert float(huge) == pytest.approx(float(expected), rel=1e-5)


def test_same_bits_twice() -> None:
    inputs = leaves(torch.float32)
    first, again = (all_orders(fused, inputs, inputs, 1.0, 3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again))


def test_column_k_is_the_loss_of_predicting_token_k() -> None:
    logits = torch.log(torch.tensor([[[0.5, 0.25, 0.25], [0.1, 0.1, 0.8], [1 / 3] * 3]]))
    ce = token_ce(logits, torch.tensor([[0, 1, 2]]))
    torch.testing.assert_close(ce, -torch.log(torch.tensor([[1.0, 0.25, 0.8]])))
    assert ce[0, 0] == 0


def test_loss_averaged_over_valid_targets_only() -> None:
    draw = torch.Generator().manual_seed(2)
    logits, ids = torch.randn(2, 5, 9, generator=draw), torch.randint(0, 9, (2, 5), generator=draw)
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
    labels = ids.masked_fill(~mask, -100)[:, 1:]
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), ignore_index=-100)
    torch.testing.assert_close(weighted_causal_lm_ce(logits, ids, torch.ones(2), mask), expected)
    half = weighted_causal_lm_ce(logits, ids, torch.full((2, 5), 0.5), mask)
    torch.testing.assert_close(half, expected / 2)  # Z does not depend on the weights


def test_weights_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"weights of shape \(3,\) do not fit rows of shape \(2, 5\)"):
        weighted_causal_lm_ce(torch.zeros(2, 5, 4), torch.zeros(2, 5, dtype=torch.long), torch.ones(3))
    with pytest.raises(ValueError, match="no valid target among 2 rows of 1 tokens"):
        weighted_causal_lm_ce(torch.zeros(2, 1, 4), torch.zeros(2, 1, dtype=torch.long))


def test_a_retained_graph_gives_the_same_gradient_every_time() -> None:
    draw = torch.Generator().manual_seed(3)
    h, w = (torch.randn(n, 5, generator=draw, dtype=torch.float64).requires_grad_() for n in (7, 11))
    y, c = torch.arange(7), torch.rand(7, generator=draw, dtype=torch.float64).requires_grad_()
    expected = torch.autograd.grad(fused_ce(h, w, None, y, c), (h, w, c))
    loss = fused_ce(h, w, None, y, c)
    for _ in range(3):
        loss.backward(retain_graph=True)  # adds into .grad in place
    for leaf, once in zip((h, w, c), expected):
        torch.testing.assert_close(leaf.grad, 3 * once, rtol=1e-13, atol=0)
    kept = torch.autograd.grad(loss, (h, w, c), create_graph=True)
    for found in kept:
        found.detach().zero_()  # whoever gets a gradient may write into it
    for found, once in zip(torch.autograd.grad(loss, (h, w, c)), expected):
        torch.testing.assert_close(found, once, rtol=1e-13, atol=0)


@pytest.mark.parametrize("known", [False, True])
def test_the_graph_without_the_gradients_values_has_the_same_pullback(known: bool) -> None:
    """Of the gradient itself only ∂h has a value; zeros stand for the rest, in no room of their own."""
    draw = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64).requires_grad_()

    h, w, b, c, y = random(7, 4), random(11, 4), random(11), random(7), torch.arange(7)
    seeds = [random(*x.shape).detach() for x in (h, w, b)]
    loss, left = fused_ce_leaving(h, w, b, y, c, 3)
    found = []
    for value in (loss, fused_ce_again(h, w, b, y, c, left if known else None, 3)):
        grads = torch.autograd.grad(value, (h, w, b), create_graph=True)
        found.append((grads, torch.autograd.grad(grads, (h, w, b, c), seeds)))
    assert torch.equal(found[0][0][0], found[1][0][0])
    assert all(torch.equal(x, other) for x, other in zip(found[0][1], found[1][1], strict=True))
    assert float(found[1][0][1].norm()) == float(found[1][0][2].norm()) == 0
    assert found[1][0][1].untyped_storage().nbytes() < 64
