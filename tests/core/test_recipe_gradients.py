"""∂φ/∂lr_t and ∂φ/∂weight_decay against retraining with another recipe, and the curvature probe."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_exactness import INGREDIENTS, STEPS
from worlds import params, query, training

from retrograd.core import check, step
from retrograd.core.engine import Double
from retrograd.core.optim import SGD, AdamW, Pair, rate
from retrograd.core.plan import save_all
from retrograd.core.residuals import Residuals
from retrograd.core.slots import Ledger, MemorySlots
from retrograd.core.step import Batch, Recipe, Training, initial_state
from retrograd.core.sweep import Reversed, metagradient, seed_cotangent, sweep


def gradients(recipe: Recipe) -> tuple[torch.Tensor, torch.Tensor]:
    """∂φ/∂lr [T, K] and ∂φ/∂weight_decay [K] of the shared world."""
    found: dict[int, dict[str, torch.Tensor]] = {}

    def observe(event: object) -> None:
        if isinstance(event, Reversed):
            found[event.step] = event.recipe

    metagradient(training(recipe), params(), query, observe=observe)
    by_step = [found[t] for t in range(STEPS)]
    return torch.stack([f["lr"] for f in by_step]), sum(f["weight_decay"] for f in by_step)


@pytest.mark.parametrize("name", INGREDIENTS)
def test_recipe_gradients_agree_with_other_recipes(name: str) -> None:
    recipe, h = INGREDIENTS[name], 1e-6
    lr, decay = gradients(recipe)
    weights = torch.randn(STEPS, generator=torch.Generator().manual_seed(1)).double()

    def value(size: float, extra: float) -> torch.Tensor:
        given = recipe.optimizer
        moved = replace(
            given, lr=lambda t: rate(given.lr, t) + size * float(weights[t]), weight_decay=given.weight_decay + extra
        )
        return query(check.train(training(replace(recipe, optimizer=moved)), params()).params)[0]

    measured = (value(h, 0.0) - value(-h, 0.0)) / (2 * h)
    assert check.relative_error(weights @ lr, measured) < 1e-6
    assert check.relative_error(weights @ lr * 1.001, measured) > 1e-6
    # weight decay cannot be negative, so away from 0 the difference is central and at 0 it is the one-sided of order 2
    if recipe.optimizer.weight_decay:
        measured = (value(0.0, h) - value(0.0, -h)) / (2 * h)
    else:
        measured = (-3 * value(0.0, 0.0) + 4 * value(0.0, h) - value(0.0, 2 * h)) / (2 * h)
    assert check.relative_error(decay, measured) < 1e-5
    assert check.relative_error(decay * 1.001, measured) > 1e-5


def test_a_foreign_pair_has_no_recipe_gradients() -> None:
    torchopt = pytest.importorskip("torchopt")
    events: list[Reversed] = []

    def observe(event: object) -> None:
        if isinstance(event, Reversed):
            events.append(event)

    metagradient(training(Recipe(Pair(torchopt.sgd(0.1)))), params(), query, observe=observe)
    assert [event.recipe for event in events] == [{}] * STEPS


@pytest.mark.parametrize("clip", [None, 0.05])
def test_sgd_has_the_same_recipe_gradients_without_its_gradient(
    clip: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of the scores, but where the rate is 0 and where clipping needs the gradient."""
    asked: list[bool] = []
    real = step.needs_gradient
    monkeypatch.setattr(step, "needs_gradient", lambda *given: asked.append(real(*given)) or asked[-1])
    recipe = Recipe(SGD(lambda t: 0.0 if t == 2 else 0.3, weight_decay=0.2), max_grad_norm=clip)
    found = gradients(recipe)
    assert asked == [clip is not None or t == 2 for t in reversed(range(STEPS))]
    monkeypatch.setattr(step, "needs_gradient", lambda *given: True)
    computed = gradients(recipe)
    assert bool((computed[0] != 0).all())
    for one, other in zip(found, computed):
        assert check.relative_error(one, other) < 1e-12


@pytest.mark.parametrize("optimizer", [SGD(0.01), AdamW(1e-3, eps_root=1e-6)], ids=["sgd", "adamw"])
def test_the_probe_finds_the_sharpest_direction(optimizer: SGD | AdamW) -> None:
    """On ½θᵀAθ with eigenvalues 1 … 5 the (preconditioned) Hessian's largest eigenvalue is known."""
    draw = torch.Generator().manual_seed(2)
    basis = torch.linalg.qr(torch.randn(5, 5, generator=draw, dtype=torch.float64))[0]
    a = basis @ torch.diag(torch.arange(1.0, 6.0, dtype=torch.float64)) @ basis.T

    class Quadratic:
        def __len__(self) -> int:
            return 60

        def __getitem__(self, step: int) -> Batch:
            return Batch({}, torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.float64))

    def objective(p: dict[str, torch.Tensor], inputs: object, c: torch.Tensor) -> torch.Tensor:
        return c.sum() * 0.5 * p["x"] @ a @ p["x"]

    start = {"x": torch.ones(5, dtype=torch.float64)}
    run = Training(Recipe(optimizer), Double(objective), Quadratic(), torch.ones(1, dtype=torch.float64))
    slots, ledger, state, plan = MemorySlots(), Ledger(), initial_state(run.recipe, start), save_all(60)
    turn = len(plan) - 1 - [type(a).__name__ for a in plan][::-1].index("Turn")
    for event in sweep(plan[: turn + 1], run, slots, ledger, Residuals(0), state=state):
        state = event.outcome.state if type(event).__name__ == "Advanced" else state
        final = event.outcome.state
    cotangent = seed_cotangent({"x": torch.ones(1, 5, dtype=torch.float64)}, final)
    events = list(
        sweep(plan[turn + 1 :], run, slots, ledger, Residuals(0), state=state, cotangent=cotangent, curvature=True)
    )
    last = [event for event in events if isinstance(event, Reversed)][-1]
    if isinstance(optimizer, SGD):
        expected = 5.0
    else:
        grads = {"x": a @ start["x"]}
        metric = optimizer.preconditioner(start, initial_state(run.recipe, start).moments, grads, 0)["x"]
        expected = float(torch.linalg.eigvals(metric[:, None] * a).real.max())
    assert last.sharpness == pytest.approx(expected, rel=0.05)
