"""The ladder of exactness, once for every ingredient of a step, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from worlds import Tokens, objective, params, query, training

from retrograd.core import check, tree
from retrograd.core.engine import Double
from retrograd.core.optim import SCHEDULES, SGD, Adam, AdamW, Cotangent, Muon, Pair, Schedule
from retrograd.core.optim.foreign import autograd_pullback
from retrograd.core.plan import Advance, Turn, make
from retrograd.core.residuals import Residuals
from retrograd.core.slots import Ledger, MemorySlots
from retrograd.core.step import Recipe, initial_state, pullback, recovered, step
from retrograd.core.sweep import metagradient, seed_cotangent, sweep
from retrograd.proofs.slopes import extrapolated_slope

STEPS = len(Tokens())
SPARED = ("hidden", "bias", "scale")
INGREDIENTS = {
    "sgd": Recipe(SGD(0.3)),
    "sgd-momentum": Recipe(SGD(0.1, momentum=0.9)),
    "sgd-nesterov-decay": Recipe(SGD(0.1, momentum=0.9, nesterov=True, weight_decay=0.1)),
    "adamw": Recipe(AdamW(0.02, eps_root=1e-6)),
    "adamw-decay": Recipe(AdamW(0.02, beta1=0.8, beta2=0.95, eps_root=1e-6, weight_decay=0.3)),
    "adamw-eps-root-0": Recipe(AdamW(1e-3, eps_root=0.0, eps=1e-4)),
    "adam": Recipe(Adam(0.02, beta1=0.8, beta2=0.95, eps_root=1e-6, weight_decay=0.3)),
    "adam-spared": Recipe(Adam(0.02, eps_root=1e-6, weight_decay=0.3, spared=SPARED)),
    "adamw-spared": Recipe(AdamW(0.02, eps_root=1e-6, weight_decay=0.3, spared=SPARED)),
    "sgd-spared": Recipe(SGD(0.3, weight_decay=0.3, spared=SPARED)),
    "sgd-nesterov-spared": Recipe(SGD(0.1, 0.9, True, 0.3, spared=SPARED), max_grad_norm=0.5),
    "muon-spared": Recipe(Muon(0.05, weight_decay=0.5, eps_root=1e-6, exclude=("embed",), spared=SPARED)),
    "muon": Recipe(Muon(0.05, eps_root=1e-6)),
    "muon-decay-plain": Recipe(Muon(0.05, nesterov=False, weight_decay=0.5, eps_root=1e-6, exclude=("embed",))),
    "clipping": Recipe(SGD(0.3, momentum=0.5), max_grad_norm=0.05),
    "clipping-adamw": Recipe(AdamW(0.02, eps_root=1e-6), max_grad_norm=0.05),
    "accumulation": Recipe(AdamW(0.02, eps_root=1e-6), micro_batch_size=3, max_grad_norm=0.1),
    **{f"schedule-{kind}": Recipe(SGD(Schedule(kind, 0.3, STEPS, warmup_steps=2))) for kind in SCHEDULES},
    "schedule-ends": Recipe(AdamW(Schedule("polynomial", 0.03, STEPS, 2, 1.5, start=0.01, end=0.005), eps_root=1e-6)),
}


@pytest.fixture(params=INGREDIENTS, scope="module")
def recipe(request: pytest.FixtureRequest) -> Recipe:
    return INGREDIENTS[request.param]


@pytest.fixture(params=[False, True], ids=["per-row", "per-token"], scope="module")
def stream(request: pytest.FixtureRequest) -> Tokens:
    return Tokens(per_token=request.param)


def direction(shape: torch.Size) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@cache
def scores_of(recipe: Recipe, stream: Tokens = Tokens()) -> Tensor:
    """The scores that every law is about."""
    return metagradient(training(recipe, stream), params(), query)[1]


def test_equals_one_unrolled_graph(recipe: Recipe, stream: Tokens) -> None:
    run, scores = training(recipe, stream), scores_of(recipe, stream)
    expected = check.unrolled(run, params(), objective, query)[1]
    assert check.relative_error(scores, expected) < 1e-12
    assert check.relative_error(scores * 1.001, expected) > 1e-12


def test_forward_mode_identity(recipe: Recipe) -> None:
    run, scores = training(recipe), scores_of(recipe)
    v = direction(run.weights.shape)
    _, slope = check.forward_mode(run, params(), objective, query, v)
    assert check.relative_error(scores @ v, slope) < 1e-12
    assert check.relative_error(1.001 * scores @ v, slope) > 1e-12


def test_the_tangent_identity_by_hessian_vector_products(recipe: Recipe) -> None:
    """⟨τ, v⟩ = ⟨∇φ, θ̇_T⟩ for two directions at once, and the states on the way are training's own."""
    run, seen = training(recipe, Tokens(per_token=True)), []
    scores = scores_of(recipe, Tokens(per_token=True))
    v = torch.stack([direction(run.weights.shape), direction(run.weights.shape).flip(0)])
    final, tangents = check.forward_tangent(run, params(), v, lambda state: seen.append(state.step))
    assert tree.digest(final) == tree.digest(check.train(run, params()))
    assert seen == list(range(1, STEPS + 1))
    slopes = sum(torch.einsum("k...,d...->kd", g, tangents[n]) for n, g in query(final.params)[1].items())
    expected = torch.einsum("k...,d...->kd", scores, v)
    assert check.relative_error(slopes, expected) < 1e-12
    assert check.relative_error(slopes, 1.001 * expected) > 1e-12


def test_the_tangent_of_zeros_at_the_start_costs_no_product(monkeypatch: pytest.MonkeyPatch) -> None:
    run, taken = training(Recipe(SGD(0.1))), []
    pullback = type(run.engine).pullback
    monkeypatch.setattr(type(run.engine), "pullback", lambda *given: (taken.append(1), pullback(*given))[1])
    check.forward_tangent(run, params(), direction(run.weights.shape)[None])
    assert len(taken) == STEPS - 1


def test_the_tangent_passes_through_a_foreign_optimizer_with_a_step_count() -> None:
    torchopt = pytest.importorskip("torchopt")
    run = training(Recipe(Pair(torchopt.adam(0.02, eps_root=1e-6))))
    _, scores = metagradient(run, params(), query)
    v = direction(run.weights.shape)
    final, tangents = check.forward_tangent(run, params(), v[None])
    slopes = sum(torch.einsum("k...,d...->k", g, tangents[n]) for n, g in query(final.params)[1].items())
    assert check.relative_error(slopes, scores @ v) < 1e-12


def test_the_extrapolated_slope_knows_how_sure_it_is() -> None:
    def wavy(h: float) -> Tensor:
        return torch.tensor([3 + 40 * h, 20 * h], dtype=torch.float64).sin()

    sizes, goal = [0.02 / 2**i for i in range(6)], torch.full((2,), 1e-9, dtype=torch.float64)
    expected = torch.tensor([40, 20]).double() * torch.tensor([3.0, 0.0]).double().cos()
    found = extrapolated_slope(wavy, sizes, 1e-16, goal, expected)
    assert ((found.slope - expected).abs() <= found.uncertainty).all()
    assert (found.uncertainty < 1e-3).all()
    assert found.trainings == 12
    noisy = extrapolated_slope(wavy, sizes, 1e-4, goal, expected)
    assert ((noisy.slope - expected).abs() <= noisy.uncertainty).all()
    assert (noisy.uncertainty > 1e-3).all()  # rounding of φ of that size cannot be seen in its values


def test_a_slope_at_a_larger_scale_is_not_taken_for_the_derivative() -> None:
    """φ = h + 0.01·sin(1000 h): its slope is 11 at 0, and near 1 at every size looked at."""

    def rough(h: float) -> Tensor:
        return torch.tensor([h], dtype=torch.float64) + 0.01 * torch.tensor([1000 * h], dtype=torch.float64).sin()

    goal = torch.full((1,), 1e-3, dtype=torch.float64)
    found = extrapolated_slope(rough, [0.08, 0.04, 0.02, 0.01], 1e-16, goal, 11 + goal)
    assert found.uncertainty.isinf()


def test_a_coincidence_is_no_slope() -> None:
    """Differences of a run with dropout, which fell by a factor near 4 once, at a slope 20 % too low."""
    differences = {0.02: 0.277, 0.01: -0.082, 0.005: -0.176, 0.0025: -0.091, 0.00125: -0.028, 0.000625: -0.006}

    def values(h: float) -> Tensor:
        near = min(differences, key=lambda size: abs(size - abs(h)))
        wrong = differences[near] if near == abs(h) else 0.1 * math.sin(1e4 * abs(h))  # rough in between too
        return torch.tensor([h * (1 + wrong)], dtype=torch.float64)

    goal = torch.full((1,), 2.5e-3, dtype=torch.float64)
    found = extrapolated_slope(values, list(differences)[:3], 1e-7, goal, goal * 0 + 1)
    assert (found.slope - 1).abs() > 0.1  # the coincidence
    assert 8 * found.uncertainty > (found.slope - 1).abs()  # condemns nothing
    found = extrapolated_slope(values, list(differences), 1e-7, goal, goal * 0 + 1)
    assert (found.slope - 1).abs() < 0.01 or found.uncertainty.isinf()


def _rough(seed: int) -> tuple[Callable[[float], Tensor], float]:
    """A sum of 40 waves of lengths between 1e-6 and one of 3e-4 to 0.3, and its slope at 0."""
    draw = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, count: int = 1) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=draw, dtype=torch.float64)

    lengths = 10 ** uniform(-6, float(uniform(-3.5, -0.5)), 40)
    heights = torch.randn(40, generator=draw, dtype=torch.float64) * lengths ** uniform(0.3, 0.9)
    phases = uniform(0, 2 * math.pi, 40)
    slope = float((heights / lengths * phases.cos()).sum())
    return lambda h: (6 + (heights * (h / lengths + phases).sin()).sum())[None], slope


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_right_slopes_of_rough_functions_are_not_condemned_and_wrong_ones_of_smooth_functions_are(
    dtype: torch.dtype,
) -> None:
    from retrograd.trust.certificate import compare
    from retrograd.trust.verify import RETRAINED, _sizes

    tolerance, eps = RETRAINED[dtype], torch.finfo(dtype).eps

    def verdict(values: Callable[[float], Tensor], slope: float) -> str:
        expected = torch.tensor([slope], dtype=torch.float64)
        found = extrapolated_slope(values, _sizes(dtype), eps, expected.abs() * tolerance / 2, expected)
        one = [x[None] for x in (expected, found.slope, found.uncertainty, expected.abs())]
        return compare("retraining", "", *one, tolerance)[0].verdict

    judged = [verdict(*_rough(seed)) for seed in range(150)]
    assert judged.count("failed") == 0
    for curve in (1.0, 5.0, 20.0):

        def smooth(h: float, curve: float = curve) -> Tensor:
            return torch.tensor([6 + 3 * math.sin(curve * h + 0.5)], dtype=torch.float64)

        right = 3 * curve * math.cos(0.5)
        assert [verdict(smooth, x * right) for x in (1, 1.1, 0.5, -1)] == ["passed", "failed", "failed", "failed"]


TIED = ("sgd-nesterov-decay", "adamw-decay", "muon", "accumulation")


@pytest.mark.parametrize(
    ("ingredient", "tied"), [*((name, False) for name in INGREDIENTS), *((name, True) for name in TIED)]
)
def test_retraining_agrees(ingredient: str, tied: bool) -> None:
    """Central differences and the Taylor rate; a score made 0.1 % wrong fails both."""
    run = training(INGREDIENTS[ingredient])
    scores = metagradient(run, params(tied=True), query)[1] if tied else scores_of(run.recipe)
    v = direction(run.weights.shape)
    slope = scores @ v
    measured = check.central_difference(run, params(tied=tied), query, v, h=1e-6)
    assert check.relative_error(slope, measured) < 1e-6
    assert check.relative_error(1.001 * slope, measured) > 1e-6

    def rate(slope: Tensor, size: float) -> float:
        errors = check.taylor_errors(run, params(tied=tied), query, v, slope, (size, size / 2)).norm(dim=1)
        return float(torch.log2(errors[0] / errors[1]))

    assert rate(slope, 1e-4) == pytest.approx(2, abs=0.1)
    assert rate(slope * 1.001, 1e-6) == pytest.approx(1, abs=0.4)


def test_sgd_on_a_quadratic_has_its_closed_form() -> None:
    """ℓ_t = w_i/2 (θ − x_i)²: θ' = (1 − lr·w)θ + lr·w·x, so ∂θ_T/∂w_t = lr(x_t − θ_t)·Π_{s>t}(1 − lr)."""
    from dataclasses import dataclass

    from retrograd.core.engine import Double
    from retrograd.core.step import Batch, Training

    x, lr, n = torch.linspace(-1, 2, 7, dtype=torch.float64), 0.1, 7

    @dataclass
    class OneByOne:
        def __len__(self) -> int:
            return n

        def __getitem__(self, t: int) -> Batch:
            return Batch({"x": x[t : t + 1]}, torch.tensor([t]), torch.ones(1, dtype=torch.float64))

    run = Training(
        Recipe(SGD(lr)),
        Double(lambda p, inputs, c: torch.sum(c * (p["theta"] - inputs["x"]) ** 2) / 2),
        OneByOne(),
        torch.ones(n, dtype=torch.float64),
    )
    start = {"theta": torch.tensor([0.5], dtype=torch.float64)}
    _, scores = metagradient(run, start, lambda p: (p["theta"].detach(), {"theta": torch.ones(1, 1).double()}))
    theta, expected = 0.5, []
    for t in range(n):
        expected.append(lr * (float(x[t]) - theta) * (1 - lr) ** (n - 1 - t))
        theta = (1 - lr) * theta + lr * float(x[t])
    torch.testing.assert_close(scores[0], torch.tensor(expected, dtype=torch.float64), rtol=1e-13, atol=1e-15)


def test_float32_error_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    exact = scores_of(INGREDIENTS["adamw"])
    low = training(INGREDIENTS["adamw"], Tokens(dtype=torch.float32))
    _, scores = metagradient(low, tree.map(torch.Tensor.float, params()), query)
    error = check.relative_error(scores.double(), exact)
    with capsys.disabled():
        print(f"\nfloat32 scores against float64: relative error {error:.1e}")
    assert 1e-9 < error < 1e-4


PLANS = {
    "interval": make("interval", STEPS, every=2),
    "sqrt": make("sqrt", STEPS),
    "log": make("log", STEPS),
    **{f"binomial-{s}": make("binomial", STEPS, slots=s) for s in (1, 2, 3)},
}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("ingredient", ["adamw-decay", "muon", "sgd-momentum", "accumulation"])
def test_every_plan_gives_the_same_bits(plan: tuple, ingredient: str) -> None:
    run = training(INGREDIENTS[ingredient])
    _, scores = metagradient(run, params(), query, plan)
    assert torch.equal(scores, scores_of(run.recipe))


def test_queries_in_one_sweep_equal_single_sweeps(recipe: Recipe) -> None:
    run = training(recipe)
    _, together = metagradient(run, params(), lambda p: query(p, 3))
    for k in range(3):

        def single(p: dict[str, Tensor], k: int = k) -> tuple[Tensor, dict[str, Tensor]]:
            values, grads = query(p, 3)
            return values[k : k + 1], {n: g[k : k + 1] for n, g in grads.items()}

        _, alone = metagradient(run, params(), single)
        assert check.relative_error(alone[0], together[k]) < 1e-12


def test_token_scores_sum_to_row_scores(recipe: Recipe) -> None:
    tokens, rows = scores_of(recipe, Tokens(per_token=True)), scores_of(recipe)
    assert check.relative_error(tokens.sum(-1), rows) < 1e-12


def test_one_global_normaliser(recipe: Recipe) -> None:
    """Micro-batching changes rounding only: per-part means would change the objective."""
    whole, parts = (scores_of(replace(recipe, micro_batch_size=size)) for size in (None, 1))
    assert check.relative_error(parts, whole) < 1e-10


def test_the_last_batch_is_simply_shorter() -> None:
    """10 rows in batches of 4: the last batch has 2 rows, its own Z, and every row is visited once an epoch."""
    stream = Tokens()
    last = stream[stream.per_epoch - 1]
    assert len(last.index) == 2
    assert float(last.scale.sum()) == pytest.approx(1)
    seen = torch.cat([stream[t].index[:, 0] for t in range(stream.per_epoch)])
    assert sorted(seen.tolist()) == list(range(10))


@pytest.mark.parametrize("eps_root", [0.0, 1e-12])
def test_scores_stay_finite_without_eps_root(eps_root: float) -> None:
    """Rows 9 and 10 of the embedding never get a gradient: autograd's √ would give 0·∞ there."""
    run = training(Recipe(AdamW(1e-3, eps_root=eps_root, eps=1e-8)))
    _, scores = metagradient(run, params(), query)
    assert torch.isfinite(scores).all()
    assert scores.abs().max() > 0


def test_momentum_is_in_the_state_so_a_resumed_run_is_the_run(recipe: Recipe) -> None:
    """A run cut anywhere and continued from the state alone has the same bits (peers hid momentum in a closure)."""
    run = training(recipe)
    whole = check.train(run, params())
    state = initial_state(run.recipe, params())
    for t in range(len(run.stream)):
        saved = {name: leaf.clone() for name, leaf in tree.named(state).items()}
        state = step(run, tree.unnamed(state, saved)._replace(step=t)).state
    assert tree.digest(state) == tree.digest(whole)


OPTIMIZERS = {name: INGREDIENTS[name].optimizer for name in INGREDIENTS if not name.startswith(("clip", "schedule"))}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_closed_form_pullback_equals_autograd(optimizer: SGD | AdamW | Muon) -> None:
    draw = torch.Generator().manual_seed(1)
    theta = params(1)
    moments = tree.map(lambda x: torch.rand(x.shape, generator=draw).double() * 0.1, optimizer.init(theta))
    grads = tree.map(lambda x: torch.randn(x.shape, generator=draw).double() * 0.1, theta)

    def bars(x: Tensor) -> Tensor:
        return torch.randn((3, *x.shape), generator=draw).double()

    cotangent = Cotangent(tree.map(bars, theta), tree.map(bars, moments))
    found, gs, *_ = optimizer.pullback(theta, moments, grads, 4, cotangent)
    expected = autograd_pullback(
        lambda p, m, g: optimizer.update(p, m, g, 4), (theta, moments, grads), tuple(cotangent)
    )
    for one, other in zip(tree.leaves((*found, gs)), tree.leaves(expected), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("ours,theirs", [
    (SGD(0.1), lambda p: torch.optim.SGD(p, 0.1)),
    (SGD(0.1, 0.9, True, 0.1), lambda p: torch.optim.SGD(p, 0.1, 0.9, nesterov=True, weight_decay=0.1)),
    (Adam(0.1, eps_root=0.0, weight_decay=0.2), lambda p: torch.optim.Adam(p, 0.1, weight_decay=0.2)),
    (AdamW(0.1, eps_root=0.0, weight_decay=0.2), lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.2)),
])  # fmt: skip
def test_updates_are_those_of_torch(ours: SGD | AdamW, theirs: object) -> None:
    theta = params(2)
    live = [t.clone().requires_grad_() for t in theta.values()]
    reference = theirs(live)  # type: ignore[operator]
    moments = ours.init(theta)
    for t in range(4):
        grads = {n: torch.sin(x * (t + 1)) for n, x in theta.items()}
        for x, g in zip(live, grads.values()):
            x.grad = torch.sin(x.detach() * (t + 1)) + 0 * g
        reference.step()
        theta, moments = ours.update(theta, moments, grads, t)
    for x, y in zip(theta.values(), live):
        torch.testing.assert_close(x, y.detach(), rtol=1e-12, atol=1e-13)


def of_two_groups(kind: Any, p: list[Tensor], *given: Any, **decay: Any) -> torch.optim.Optimizer:
    """torch's optimizer with the decay on embed and head alone."""
    free = [x for name, x in zip(params(), p) if name in SPARED]
    groups = [
        {"params": [x for name, x in zip(params(), p) if name not in SPARED]},
        {"params": free, "weight_decay": 0},
    ]
    return kind(groups, *given, **decay)


@pytest.mark.parametrize("name", [name for name in INGREDIENTS if "spared" in name and "muon" not in name])
def test_spared_parameters_are_a_group_of_torch_without_decay(name: str) -> None:
    ours = replace(INGREDIENTS[name].optimizer, lr=0.1, **({} if "sgd" in name else {"eps_root": 0.0}))
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[name.split("-")[0]]
    more = {"momentum": 0.9, "nesterov": True} if "nesterov" in name else {}
    test_updates_are_those_of_torch(ours, lambda p: of_two_groups(kind, p, 0.1, weight_decay=0.3, **more))
    with pytest.raises(AssertionError):
        test_updates_are_those_of_torch(replace(ours, spared=("bias",)), lambda p: of_two_groups(kind, p, 0.1, **more))


def test_a_pullback_that_forgets_where_decay_goes_is_caught() -> None:
    """Decay left out of θ̄; decay on parameters that are spared."""

    class Forgetful(Adam):
        def pullback(self, params: Any, moments: Any, grads: Any, step: int, cotangent: Cotangent) -> Any:
            coupled = {name: g + self.weight_decay * params[name] for name, g in grads.items()}
            return self._plain().pullback(params, moments, coupled, step, cotangent)

    class Unsparing(AdamW):
        def pullback(self, *given: Any) -> Any:
            return replace(INGREDIENTS["adamw-spared"].optimizer, spared=()).pullback(*given)

    for name, wrong in (("adam", Forgetful), ("adamw-spared", Unsparing)):
        ours = INGREDIENTS[name].optimizer
        mutated = wrong(**{name: getattr(ours, name) for name in ours.__dataclass_fields__})
        run = training(Recipe(mutated))
        _, scores = metagradient(run, params(), query)
        expected = check.unrolled(run, params(), objective, query)[1]
        assert check.relative_error(scores, expected) > 1e-6
        assert tree.digest(check.train(run, params())) == tree.digest(check.train(training(Recipe(ours)), params()))


def test_sparing_every_parameter_is_no_decay_and_sparing_none_changes_no_bit() -> None:
    for ours in (SGD(0.1, 0.9, weight_decay=0.2), Adam(0.02, weight_decay=0.2), AdamW(0.02, weight_decay=0.2)):
        plain = training(Recipe(replace(ours, weight_decay=0.0)))
        spared = training(Recipe(replace(ours, spared=tuple(params()))))
        assert tree.digest(check.train(spared, params())) == tree.digest(check.train(plain, params()))
        assert torch.equal(metagradient(spared, params(), query)[1], metagradient(plain, params(), query)[1])


def test_muon_is_torch_muon() -> None:
    """Up to the bfloat16 in which torch's runs Newton–Schulz."""
    theta = {"w": torch.randn(6, 9, generator=torch.Generator().manual_seed(0))}
    live = theta["w"].clone().requires_grad_()
    reference = torch.optim.Muon([live], lr=0.1, weight_decay=0.3, adjust_lr_fn="match_rms_adamw")
    ours = Muon(0.1, weight_decay=0.3)
    moments = ours.init(theta)
    for t in range(3):
        g = torch.cos(live.detach() * (t + 1))
        live.grad = g
        reference.step()
        theta, moments = ours.update(theta, moments, {"w": g}, t)
    assert check.relative_error(theta["w"], live.detach()) < 0.01


def test_schedules_are_those_of_transformers_and_torch() -> None:
    from transformers import optimization as hf

    def rates(make_schedule: object) -> list[float]:
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
        schedule = make_schedule(optimizer)  # type: ignore[operator]
        found = []
        for _ in range(20):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step() if len(found) < 20 else None
        return found

    references = {
        "constant": lambda o: hf.get_constant_schedule_with_warmup(o, 5),
        "linear": lambda o: hf.get_linear_schedule_with_warmup(o, 5, 20),
        "cosine": lambda o: hf.get_cosine_schedule_with_warmup(o, 5, 20),
        "polynomial": lambda o: hf.get_polynomial_decay_schedule_with_warmup(o, 5, 20, lr_end=0, power=2.0),
        "one-cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.5, total_steps=20, pct_start=0.25),
        "one-cycle-linear": lambda o: torch.optim.lr_scheduler.OneCycleLR(
            o, 0.5, total_steps=20, pct_start=0.25, anneal_strategy="linear"
        ),
    }
    assert set(references) == set(SCHEDULES)
    for kind, reference in references.items():
        ours = Schedule(kind, 0.5, 20, warmup_steps=5)
        assert [ours(t) for t in range(20)] == pytest.approx(rates(reference), rel=1e-9, abs=1e-12), kind

    def cycle(o: torch.optim.Optimizer, how: str) -> Any:
        given = {"total_steps": 20, "pct_start": 0.25, "div_factor": 10, "final_div_factor": 2.5}
        return torch.optim.lr_scheduler.OneCycleLR(o, 0.5, anneal_strategy=how, **given)

    def in_two(o: torch.optim.Optimizer, decay: Callable[[], Any]) -> Any:
        rise = torch.optim.lr_scheduler.LinearLR(o, 0.1, 1.0, total_iters=5)
        return torch.optim.lr_scheduler.SequentialLR(o, [rise, decay(o)], milestones=[5])

    lr = torch.optim.lr_scheduler
    given_ends = {
        "linear": lambda o: in_two(o, lambda o: lr.LinearLR(o, 1.0, 0.04, total_iters=15)),
        "cosine": lambda o: in_two(o, lambda o: lr.CosineAnnealingLR(o, 15, eta_min=0.02)),
        "one-cycle": lambda o: cycle(o, "cos"),
        "one-cycle-linear": lambda o: cycle(o, "linear"),
    }
    for kind, reference in given_ends.items():
        ours = Schedule(kind, 0.5, 20, warmup_steps=5, start=0.05, end=0.02)
        assert [ours(t) for t in range(20)] == pytest.approx(rates(reference), rel=1e-9, abs=1e-12), kind
        assert Schedule(kind, 0.5, 20, 5, start=0.04, end=0.02)(0) == pytest.approx(0.04)
    for power in (1.0, 2.0):
        ours = Schedule("polynomial", 0.5, 20, 5, power, end=0.02)
        expected = rates(lambda o: hf.get_polynomial_decay_schedule_with_warmup(o, 5, 20, lr_end=0.02, power=power))
        assert [ours(t) for t in range(20)] == pytest.approx(expected, rel=1e-9)
    expected = rates(lambda o: hf.get_cosine_with_min_lr_schedule_with_warmup(o, 5, 20, min_lr=0.02))
    ours = Schedule("cosine", 0.5, 20, 5, end=0.02)
    assert [ours(t) for t in range(20)] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("given,message", [
    ({"start": 0.6, "warmup_steps": 2}, "starts at 0.6; it has to be from 0 to its peak, 0.5"),
    ({"end": 0.6}, "ends at 0.6; it has to be from 0 to its peak, 0.5"),
    ({"start": 0.1}, "start at 0.1, and there is no step of warmup"),
    ({"end": 0.1, "kind": "constant"}, "end at 0.1, and a constant one has no decay"),
    ({"warmup_steps": 9}, "9 warmup steps of 9 in all"),
], ids=["start", "end", "no-warmup", "no-decay", "too-long"])  # fmt: skip
def test_schedules_that_do_not_fit_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule(**{"kind": "linear", "lr": 0.5, "total_steps": 9, **given})


def test_torchopt_pair_through_the_autograd_update_half() -> None:
    torchopt = pytest.importorskip("torchopt")
    run = training(Recipe(Pair(torchopt.adam(0.02, eps_root=1e-6))))
    _, scores = metagradient(run, params(), query)
    twin = training(Recipe(AdamW(0.02, eps_root=1e-6)))
    _, expected = metagradient(twin, params(), query)
    assert check.relative_error(scores, expected) < 1e-4  # torchopt corrects its bias in float32
    v = direction(run.weights.shape)
    assert check.relative_error(scores @ v, check.central_difference(run, params(), query, v)) < 1e-6


def test_dropout_is_replayed_with_its_draws() -> None:
    """Active dropout: random numbers are a function of (seed, step, micro-batch), so replay and retraining agree."""
    from torch.nn import functional as F

    from retrograd.core.engine import Double

    def noisy(p: dict[str, Tensor], inputs: dict[str, Tensor], c: Tensor) -> Tensor:
        return objective({**p, "embed": F.dropout(p["embed"], 0.3)}, inputs, c)

    recipe = Recipe(SGD(0.1, momentum=0.9), micro_batch_size=3, stochastic=True)
    run = training(recipe)._replace(engine=Double(noisy))
    _, scores = metagradient(run, params(), query)
    torch.randn(7)  # what others draw does not matter
    _, again = metagradient(run, params(), query, make("binomial", STEPS, slots=2))
    assert torch.equal(scores, again)
    v = direction(run.weights.shape)
    assert check.relative_error(scores @ v, check.central_difference(run, params(), query, v)) < 1e-6
    other = run._replace(recipe=replace(recipe, seed=1))
    assert not torch.equal(metagradient(other, params(), query)[1], scores)


def test_one_pullback_is_the_transpose_of_one_step() -> None:
    """⟨λ, J v⟩ = ⟨Jᵀλ, v⟩ for a single step, with J v by central differences of the step itself."""
    run = training(INGREDIENTS["clipping"])
    state = step(run, initial_state(run.recipe, params())).state
    draw = torch.Generator().manual_seed(8)
    v = tree.map(lambda x: torch.randn(x.shape, generator=draw).double(), state)
    bar = tree.map(lambda x: torch.randn((1, *x.shape), generator=draw).double(), Cotangent(*state[1:]))
    pulled = pullback(run, state, bar).cotangent
    h = 1e-6
    ahead, behind = (step(run, tree.map(lambda x, d, s=s: x + s * d, state, v)).state for s in (h, -h))
    moved = tree.map(lambda a, b: (a - b) / (2 * h), ahead, behind)
    left = float(tree.dot(tree.map(lambda x: x[0], bar), moved[1:]))
    right = float(tree.dot(tree.map(lambda x: x[0], pulled), v[1:]))
    assert left == pytest.approx(right, rel=1e-6)


@pytest.mark.parametrize("shape", [(7, 13), (640,), (1,)])
def test_large_leaves_are_updated_in_pieces_to_the_same_values(shape: tuple[int, ...], monkeypatch: object) -> None:
    draw = torch.Generator().manual_seed(2)

    def some(*sizes: int) -> dict[str, Tensor]:
        return {"x": torch.rand((*sizes, *shape), generator=draw).double() + 0.1}

    optimizer, theta, grads, moments = AdamW(0.1, weight_decay=0.1), some(), some(), {"m": some(), "v": some()}
    cotangent = Cotangent(some(3), {"m": some(3), "v": some(3)})

    def both() -> list[Tensor]:
        given = (theta, moments, grads, 4)
        return tree.leaves((optimizer.update(*given), optimizer.pullback(*given, cotangent)))

    whole = both()
    monkeypatch.setattr("retrograd.core.optim.elementwise._PIECE", 30)  # type: ignore[attr-defined]
    for one, other in zip(both(), whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-14, atol=0)


@pytest.mark.parametrize("bucket", [1, 20, 1000])
def test_small_leaves_are_updated_together_to_the_same_values(bucket: int, monkeypatch: object) -> None:
    draw = torch.Generator().manual_seed(3)
    shapes = {"a": (2, 4), "b": (5,), "c": (), "d": (2, 2, 2), "e": (40,), "f": (8,)}

    def some(*sizes: int) -> dict[str, Tensor]:
        return {name: torch.rand((*sizes, *shape), generator=draw).double() + 0.1 for name, shape in shapes.items()}

    optimizer, theta, grads, moments = AdamW(0.1, weight_decay=0.1), some(), some(), {"m": some(), "v": some()}
    cotangent = Cotangent(some(3), {"m": some(3), "v": some(3)})

    def both() -> tuple[object, object]:
        given = (theta, moments, grads, 4)
        return optimizer.update(*given), optimizer.pullback(*given, cotangent)

    alone = both()
    monkeypatch.setattr("retrograd.core.optim.elementwise._JOINED", {"cpu"})  # type: ignore[attr-defined]
    monkeypatch.setattr("retrograd.core.optim.elementwise._BUCKET", bucket)  # type: ignore[attr-defined]
    together = both()
    assert tree.named(together).keys() == tree.named(alone).keys()
    for one, other in zip(tree.leaves(together), tree.leaves(alone), strict=True):
        assert one.shape == other.shape
        assert one.storage_offset() * one.element_size() % 64 == 0
        torch.testing.assert_close(one, other, rtol=1e-13, atol=0)


@pytest.mark.parametrize("bucket", [1, 20, 1000])
def test_small_leaves_are_traced_together_to_the_same_tangents(bucket: int, monkeypatch: pytest.MonkeyPatch) -> None:
    run, calls = training(Recipe(AdamW(0.1, weight_decay=0.1))), list[int]()
    monkeypatch.setattr("retrograd.core.optim.adamw._root", lambda x: (calls.append(x.numel()), x.sqrt())[1])
    monkeypatch.setattr("retrograd.core.optim.elementwise._BUCKET", bucket)
    values = (params(), {"m": params(1), "v": tree.map(torch.square, params(2))}, params(3))
    tangents = (params(4), {"m": params(5), "v": params(6)}, params(7))

    def moved(*given: Any) -> Any:
        return run.recipe.optimizer.update(*given, 4)

    h = 1e-6
    ahead, behind = (moved(*tree.map(lambda x, dx, s=s: x + s * dx, values, tangents)) for s in (h, -h))
    calls.clear()
    found = torch.func.jvp(moved, values, tangents)[1]
    sizes = [66, 36, 6, 1, 66]  # of the leaves
    assert calls == {1: sizes, 20: [66, 36, 7, 66], 1000: [sum(sizes)]}[bucket]
    for one, a, b in zip(*map(tree.leaves, (found, ahead, behind)), strict=True):
        torch.testing.assert_close(one, (a - b) / (2 * h), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_the_moments_around_a_step_give_its_gradient_back(optimizer: SGD | AdamW | Muon) -> None:
    draw = torch.Generator().manual_seed(1)
    theta = params(1)
    moments = tree.map(lambda x: torch.rand(x.shape, generator=draw).double() * 0.1, optimizer.init(theta))
    grads = tree.map(lambda x: torch.randn(x.shape, generator=draw).double() * 0.1, theta)
    found = optimizer.recovered(theta, moments, optimizer.update(theta, moments, grads, 4)[1])
    if isinstance(optimizer, Muon) or (isinstance(optimizer, SGD) and not optimizer.momentum):
        assert found is None
        return
    assert found is not None
    assert check.relative_error(*(torch.cat([x[n].flatten() for n in theta]) for x in (found, grads))) < 1e-14


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name.startswith("adam")])
def test_the_preconditioner_is_the_slope_of_the_update(name: str) -> None:
    """θ' = (1 − lr·wd)·θ − lr·P⁻¹·m̂, wd where decay is decoupled and not spared."""
    optimizer, draw = OPTIMIZERS[name], torch.Generator().manual_seed(1)
    theta = params(1)
    moments = tree.map(lambda x: torch.rand(x.shape, generator=draw).double() * 0.1, optimizer.init(theta))
    grads = tree.map(lambda x: torch.randn(x.shape, generator=draw).double() * 0.1, theta)
    new, after = optimizer.update(theta, moments, grads, 4)
    lr, found = optimizer.lr, optimizer.preconditioner(theta, moments, grads, 4)
    for n, x in theta.items():
        decay = 0.0 if isinstance(optimizer, Adam) or n in optimizer.spared else optimizer.weight_decay
        moved = found[n] * after["m"][n] / (1 - optimizer.beta1**5)
        torch.testing.assert_close(new[n], x * (1 - lr * decay) - lr * moved, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("recipe", [
    Recipe(AdamW(0.1, beta1=0.999)), Recipe(SGD(0.1, momentum=0.995)), Recipe(AdamW(0.1), max_grad_norm=1.0),
], ids=["beta1", "momentum", "clipping"])  # fmt: skip
def test_no_gradient_is_recovered_where_it_would_not_be_the_gradient(recipe: Recipe) -> None:
    state = initial_state(recipe, params())
    assert recovered(recipe, state, state.moments) is None


def test_no_gradient_is_recovered_from_half_precision() -> None:
    recipe = Recipe(AdamW(0.1))
    state = initial_state(recipe, {name: theta.bfloat16() for name, theta in params().items()})
    assert recovered(recipe, state, state.moments) is None


@pytest.mark.parametrize("plan", ["all", "binomial"])
@pytest.mark.parametrize("name", ["adamw-decay", "sgd-nesterov-decay", "sgd"])
def test_a_sweep_computes_no_gradient_that_the_moments_hold_or_nothing_needs(
    name: str, plan: str, monkeypatch: object
) -> None:
    run = training(replace(INGREDIENTS[name], micro_batch_size=1))
    calls, original = [], Double.gradient

    def counting(self: Double, *given: Any) -> Any:
        calls.append(1)
        return original(self, *given)

    actions = make(plan, STEPS, slots=3)
    monkeypatch.setattr(Double, "gradient", counting)  # type: ignore[attr-defined]
    _, scores = metagradient(run, params(), query, actions)
    taken = sum(action.stop - action.start for action in actions if isinstance(action, Advance)) + 1
    assert len(calls) == taken
    monkeypatch.setattr("retrograd.core.sweep.recovered", lambda *given: None)  # type: ignore[attr-defined]
    monkeypatch.setattr("retrograd.core.step.needs_gradient", lambda *given: True)  # type: ignore[attr-defined]
    _, computed = metagradient(run, params(), query, actions)
    assert len(calls) == 2 * taken + STEPS
    assert check.relative_error(scores, computed) < 1e-12


def test_a_sweep_has_the_same_bits_whether_the_final_state_is_at_hand() -> None:
    run = training(INGREDIENTS["adamw"])
    actions, ledger, slots = make("all", STEPS), Ledger(), MemorySlots()
    turn = next(i for i, action in enumerate(actions) if isinstance(action, Turn)) + 1
    *_, last, turned = sweep(
        actions[:turn], run, slots, ledger, Residuals(0), state=initial_state(run.recipe, params())
    )
    final, found = turned.outcome.state, []
    for after in (final, None, last.outcome.state):
        kept = MemorySlots()
        kept.states = dict(slots.states)
        bar = seed_cotangent(query(final.params)[1], final)
        state = last.outcome.state
        *_, event = sweep(actions[turn:], run, kept, ledger, Residuals(0), state=state, cotangent=bar, after=after)
        found.append(tree.digest((event.cotangent, event.scores)))
    assert found[0] == found[1] == found[2]
