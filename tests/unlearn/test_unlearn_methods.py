"""Laws that every unlearning method obeys, run over the one list of methods, in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from unlearning import evened, language_model, pairs, query, started, training

from retrograd.core import check, tree
from retrograd.core.engine import Double
from retrograd.core.optim import SGD, rate
from retrograd.core.plan import make
from retrograd.core.step import Recipe, Training, coefficients, initial_state, micro_batches, step
from retrograd.core.sweep import Reversed, metagradient
from retrograd.data.pairs import ALTERNATIVE, FORGET, PairStream
from retrograd.lm.model import bound_model
from retrograd.runs.states.budget import Replay
from retrograd.runs.trajectory import Trajectory
from retrograd.trust.ensemble import train_many
from retrograd.unlearn import laws
from retrograd.unlearn.method import Method
from retrograd.unlearn.methods import METHODS
from retrograd.unlearn.reference import perturbed, reference_of

SIGNED = ("grad_ascent", "grad_diff", "weighted_sft", "task_arithmetic")


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> Method:
    return METHODS[request.param]


def drawn(shape: torch.Size, seed: int = 7) -> Tensor:
    """Data weights between 0.3 and 1.3."""
    return 0.3 + torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradient(
    objective: Any, params: dict[str, Tensor], inputs: Any, c: Tensor
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Value, gradient by parameter, and gradient by coefficient."""
    live, c = {n: p.detach().requires_grad_() for n, p in params.items()}, c.detach().requires_grad_()
    value = objective(live, inputs, c)
    *found, slopes = torch.autograd.grad(value, [*live.values(), c], materialize_grads=True)
    return value.detach(), dict(zip(live, found)), slopes


def apart(one: Any, other: Any) -> float:
    return float(tree.norm(tree.map(torch.sub, one, other)) / tree.norm(other))


# plain SGD takes another way through the kernel where the objective is linear: one of those is enough for every day
DIFFERENTIABLE = [name for name, m in METHODS.items() if not m.refusal()]
QUICK = [("adamw", name) for name in DIFFERENTIABLE] + [
    ("sgd", name) for name, m in METHODS.items() if not m.linear or name == "wga"
]
WHOLE = [(optimizer, name) for optimizer in ("adamw", "sgd") for name in DIFFERENTIABLE]


@pytest.mark.parametrize(
    ("optimizer", "name"), [pytest.param(*run, marks=[] if run in QUICK else pytest.mark.slow) for run in WHOLE]
)
def test_metagradients_agree_with_retraining(optimizer: str, name: str) -> None:
    """Of forget and of retain tokens apart: neither hides behind the other."""
    lm = language_model(layers=1)
    run, params = training(name, optimizer, lm)
    assert len(run.stream) == 3
    scores = metagradient(run, params, query(lm))[1][0]
    directions = side_directions(run.stream)
    measured = torch.cat([check.central_difference(run, params, query(lm), v, 2e-5) for v in directions])
    for v, slope in zip(directions, measured):
        assert check.relative_error(torch.sum(scores * v), slope) < 1e-6


@pytest.mark.parametrize("fault", ["slopes", "curvature", "detach"])
def test_a_wrong_pullback_does_not_agree_with_retraining(fault: str) -> None:
    """Slopes or Hessian-vector products 0.1 % too large, and a loss that has the gradient but not its derivative."""
    lm = language_model(layers=1)
    run, params = training("wga", "adamw", lm)
    v = side_directions(run.stream)[0]
    measured = check.central_difference(run, params, query(lm), v, 2e-5)[0]
    wrong: Any = Detached(run.engine.objective) if fault == "detach" else Mutated(run.engine.objective, fault)
    same = check.train(run._replace(engine=wrong), params).params
    assert apart(same, check.train(run, params).params) < 1e-12, "training does not notice"
    scores = metagradient(run._replace(engine=wrong), params, query(lm))[1][0]
    assert check.relative_error(torch.sum(scores * v), measured) > 1e-6


@dataclass(frozen=True)
class Mutated(Double):
    fault: str = ""

    def pullback(self, *given: Any, residual: Any = None) -> Any:
        return self._wrong(*super().pullback(*given))

    def linearize(self, *given: Any) -> Any:
        grads, pull = super().linearize(*given)
        return grads, lambda bars: self._wrong(*pull(bars))

    def _wrong(self, curvature: Any, scores: Any) -> Any:
        if self.fault == "slopes":
            return curvature, 1.001 * scores
        return {name: 1.001 * product for name, product in curvature.items()}, scores


class Detached(Double):
    """WGA as it is published: weights p^β through a detach."""

    def __init__(self, objective: Any) -> None:
        def published(params: dict[str, Tensor], inputs: Any, c: Tensor) -> Tensor:
            out, settings = objective.outputs(params, inputs), objective.settings
            side = inputs["side"][out.rows]
            ce = F.cross_entropy(out.logits, out.targets, reduction="none")
            ramp = settings.retain_ramp[0] + (settings.retain_ramp[1] - settings.retain_ramp[0]) * inputs["progress"][0]
            losses = torch.where(
                side == FORGET, -settings.forget * torch.exp(-ce).detach() * ce, settings.retain * ramp * ce
            )
            return torch.sum(c[out.rows, out.columns] * losses)

        super().__init__(published)


def side_directions(stream: PairStream) -> list[Tensor]:
    v = torch.randn(stream.weights.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    forget = torch.zeros_like(v)
    forget[: stream.sizes[FORGET]] = 1
    return [v * forget, v * (1 - forget)]


@pytest.mark.parametrize("name", ["npo", "orth_circuit_breakers", "grad_diff"])
def test_the_checks_of_exactness_know_objectives_that_are_not_linear(name: str) -> None:
    """Unrolled graph, forward mode and forward tangent; taken for linear, the tangent of one that is not is wrong."""
    lm = language_model(layers=1)
    run, params = training(name, "adamw", lm, micro_batch_size=2 if METHODS[name].additive else None)
    _, scores = metagradient(run, params, query(lm))
    v = drawn(run.weights.shape)
    assert check.relative_error(scores, check.unrolled(run, params, run.engine.objective, query(lm))[1]) < 1e-12
    expected = torch.sum(scores[0] * v)
    forward = check.forward_mode(run, params, run.engine.objective, query(lm), v)[1][0]
    assert check.relative_error(forward, expected) < 1e-11

    def tangent(run: Training) -> float:
        final, pushed = check.forward_tangent(run, params, v[None])
        gradient = query(lm)(final.params)[1]
        return check.relative_error(sum(torch.sum(gradient[n] * pushed[n]) for n in gradient), expected)

    assert tangent(run) < 1e-11
    assert (tangent(run._replace(engine=TakenForLinear(run.engine.objective))) < 1e-11) == METHODS[name].linear


class TakenForLinear(Double):
    linear = True


@pytest.mark.parametrize("name", ["npo", "grad_diff"])
def test_learning_rate_gradients_of_sgd_do_not_infer_from_linearity(name: str) -> None:
    lm, h = language_model(layers=1), 1e-5
    run, params = training(name, "sgd", lm)

    def found(run: Training) -> Tensor:
        events: list[Reversed] = []
        metagradient(run, params, query(lm), observe=lambda e: events.append(e) if isinstance(e, Reversed) else None)
        return sum(event.recipe["lr"] for event in events)

    def value(size: float) -> Tensor:
        optimizer = SGD(lambda t: rate(run.recipe.optimizer.lr, t) + size)
        return query(lm)(check.train(run._replace(recipe=Recipe(optimizer)), params).params)[0]

    measured = (value(h) - value(-h)) / (2 * h)
    assert check.relative_error(found(run), measured) < 1e-6
    if not METHODS[name].linear:
        taken = found(run._replace(engine=TakenForLinear(run.engine.objective)))
        assert check.relative_error(taken, measured) > 1e-6


def test_a_stack_of_retrainings_equals_one(method: Method) -> None:
    """Retraining many data weights at once, as `validate` does, works for every method."""
    lm = language_model(layers=1)
    run, params = training(method.name, "sgd", lm)
    members = torch.stack([run.weights, 0.5 * run.weights])
    many = train_many(run, params, members, objective=run.engine.objective)
    assert apart({n: x[1] for n, x in many.items()}, check.train(run, params, members[1]).params) < 1e-12


@pytest.mark.parametrize("term", ["ce", "kl", "l2"])
def test_retain_terms_are_token_means_of_the_whole_batch(term: str) -> None:
    """Padding and micro-batches change nothing, nor does length where predictions see no context."""
    method = METHODS["weighted_sft"]
    objective, params = started(method, language_model(layers=1), evened(method, forget=0.0, retain_term=term))
    stream = pairs(method, forget_batch=4, retain_batch=4)
    batch, weights = stream[0], drawn(stream.weights.shape)
    c = coefficients(batch, weights)
    whole = gradient(objective, params, batch.inputs, c)[:2]
    assert float(whole[0]) > 1e-3
    padded = dict(batch.inputs)
    for name, value in (("input_ids", 5), ("target_mask", False), ("scale", 0.0)):
        padded[name] = F.pad(padded[name], (0, 3), value=value)
    assert apart(gradient(objective, params, padded, F.pad(c, (0, 3)))[:2], whole) < 1e-12
    parts = micro_batches(batch, 2)
    each = [gradient(objective, params, part.inputs, coefficients(part, weights))[:2] for part in parts]
    assert len(each) == 4
    assert apart(tree.map(lambda *x: sum(x), *each), whole) < 1e-12

    def change(**settings: Any) -> float:
        lm, values = laws._model(True), []
        objective, params = started(method, lm, evened(method, forget=0.0, retain_term=term, **settings))
        params = {n: lm.params[n] if "attention.dense" in n else x for n, x in params.items()}
        for repeats in (1, 2):
            rows = [[a, b] * repeats + [a] for a, b in ((3, 4), (5, 9))]
            stream = PairStream(rows, rows, forget_batch=2, retain_batch=2, dtype=torch.float64)
            values.append(objective(params, stream[0].inputs, stream[0].scale))
        return check.relative_error(*values)

    assert change() < 1e-12
    if term == "kl":
        assert change(as_run=True) > 0.1, "the historical normaliser grows with the rows, which is why it is a fault"


def test_at_the_reference_retain_terms_are_zero_and_flat() -> None:
    lm = language_model(layers=1)
    for term in ("kl", "l2"):
        settings = evened(METHODS["weighted_sft"], forget=0.0, retain_term=term)
        objective = METHODS["weighted_sft"].objective(lm, reference_of(lm), settings)
        batch = pairs(METHODS["weighted_sft"])[1]
        value, slopes, _ = gradient(objective, lm.params, batch.inputs, batch.scale)
        moved = gradient(objective, perturbed(lm.params, 0.1, 0), batch.inputs, batch.scale)
        assert abs(float(value)) < 1e-15
        assert float(tree.norm(slopes)) < 1e-12
        assert float(moved[0]) > 1e-3
        assert float(tree.norm(moved[1])) > 1e-3


def test_at_the_reference_preferences_are_ascent() -> None:
    """σ(0) = 1/2: the value is (2/β) log 2 and the gradient that of −Σ_t w·CE, the mean over sequences."""
    lm = language_model(layers=1)
    for name in ("npo", "dpo"):
        method = METHODS[name]
        objective = method.objective(lm, reference_of(lm), evened(method, retain=0.0, forget=1.0))
        batch = pairs(method)[1]
        weights = drawn(pairs(method).weights.shape)
        value, slopes, _ = gradient(objective, lm.params, batch.inputs, coefficients(batch, weights))
        assert float(value) == pytest.approx(2 / objective.settings.beta * math.log(2), rel=1e-12)
        sign = torch.where(batch.inputs["side"] == FORGET, -1.0, 0.0).double()
        sign[batch.inputs["side"] == ALTERNATIVE] = 1.0
        w = weights.flatten()[batch.index] * (batch.scale > 0)
        expected = gradient(lm.objective, lm.params, batch.inputs, w * sign[:, None] * batch.inputs["share"][:, None])[
            1
        ]
        assert apart(slopes, expected) < 1e-10


Row = tuple[Tensor, Tensor, Tensor, Tensor]  # z [m, V], targets [m], w [m], z_ref [m, V]


def published(name: str, settings: Any, forget: list[Row], others: list[Row]) -> Tensor:
    """F as its source computes it: row by row, with `detach` where the source has it."""
    z, y, w, then = (torch.cat(part) for part in zip(*forget))
    ce, count = F.cross_entropy(z, y, reduction="none"), len(y)
    p, vocabulary = torch.exp(-ce).detach(), z.shape[-1]
    onehot = F.one_hot(y, vocabulary)

    def ratio(row: Row) -> Tensor:
        return torch.sum(row[2] * (F.cross_entropy(row[3], row[1], reduction="none") - F.cross_entropy(row[0], row[1], reduction="none")))  # fmt: skip

    match name:
        case "grad_ascent" | "grad_diff":
            return -torch.sum(w * ce) / count
        case "weighted_sft":
            return torch.sum(w * ce) / count
        case "wga":
            return -torch.sum(w * p**settings.beta * ce) / count
        case "satimp":
            return -torch.sum(w * p**settings.beta1 * (1 - p) ** settings.beta2 * ce) / count
        case "ce_u":
            teacher = z.masked_fill(onehot.bool(), -torch.inf).softmax(-1).detach()
            return torch.sum(w * F.cross_entropy(z, teacher, reduction="none")) / count
        case "undial":
            teacher = (then - settings.beta * onehot).softmax(-1)
            return torch.sum(w * F.cross_entropy(z, teacher, reduction="none")) / count
        case "max_entropy" | "two_phase":  # in its first phase
            return (
                torch.sum(w * F.cross_entropy(z, torch.full_like(z, 1 / vocabulary), reduction="none"))
                / count
                / math.log(vocabulary)
            )
        case "topk_entropy":
            best = z.sort(-1, descending=True).values[:, : settings.top_k]
            flat = torch.full_like(best, 1 / settings.top_k)
            return torch.sum(w * F.cross_entropy(best, flat, reduction="none")) / count / math.log(settings.top_k)
        case "npo":
            return torch.stack(
                [-2 / settings.beta * F.logsigmoid(-settings.beta * ratio(row)) for row in forget]
            ).mean()
        case "simnpo":
            means = [torch.sum(w * F.cross_entropy(z, y, reduction="none")) / len(y) for z, y, w, _ in forget]
            return torch.stack(
                [-2 / settings.beta * F.logsigmoid(settings.beta * c - settings.margin) for c in means]
            ).mean()
        case "dpo":
            gaps = [ratio(win) - ratio(lose) for win, lose in zip(others, forget, strict=True)]
            return torch.stack([-2 / settings.beta * F.logsigmoid(settings.beta * gap) for gap in gaps]).mean()
    raise AssertionError(name)


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.family == "likelihood"])
def test_the_gradient_is_the_published_one(name: str) -> None:
    """By the plain model on each row alone, without padding; what has a `detach` there is a potential here."""
    method, lm = METHODS[name], language_model()
    changes: dict[str, Any] = {"topk_entropy": {"top_k": 7}, "ce_u": {"ignore_first": False}, "simnpo": {"beta": 1.5, "margin": 0.3}}.get(name, {})  # fmt: skip
    settings = evened(method, retain=0.0, forget=1.0, **changes)
    objective, params = started(method, lm, settings)
    stream = pairs(method)
    batch, weights = stream[0], drawn(stream.weights.shape)
    found = gradient(objective, params, batch.inputs, coefficients(batch, weights))[1]
    live, bind = {n: p.detach().requires_grad_() for n, p in params.items()}, bound_model(lm.module)

    def rows(side: int) -> list[Row]:
        taken = [int(row) for row, s in zip(stream.rows_at(0), batch.inputs["side"]) if s == side]
        found = []
        for row in taken:
            tokens = torch.from_numpy(stream.rows.input_ids[row])
            logits = [bind(p)(input_ids=tokens[None]).logits[0, :-1] for p in (live, lm.params)]
            found.append((logits[0], tokens[1:], weights[row, 1 : len(tokens)], logits[1].detach()))
        return found

    value = published(name, settings, rows(FORGET), rows(ALTERNATIVE))
    expected = dict(zip(live, torch.autograd.grad(value, list(live.values()), materialize_grads=True)))
    assert apart(found, expected) < 1e-12
    assert apart({n: 1.001 * g for n, g in found.items()}, expected) > 1e-12


def test_orthogonal_circuit_breakers_by_hand() -> None:
    """On block 0, which is `hidden_states[1]` of transformers: both terms and the pairs of three forget rows."""
    method, lm = METHODS["orth_circuit_breakers"], language_model()
    settings = evened(method, blocks=(0,))
    objective, params = started(method, lm, settings)
    stream = pairs(method, forget_batch=3, retain_batch=3)
    batch, weights = stream[1], drawn(stream.weights.shape)
    bind, states, kept = bound_model(lm.module), [], []
    for row, side in zip(stream.rows_at(1), batch.inputs["side"]):
        tokens = torch.from_numpy(stream.rows.input_ids[row])
        h, h0 = (
            bind(p)(input_ids=tokens[None], output_hidden_states=True).hidden_states[1][0, :-1]
            for p in (params, lm.params)
        )
        (states if side == FORGET else kept).append((h, h0, weights[row, 1 : len(tokens)]))
    z, z_retain = (sum(len(w) for *_, w in side) for side in (states, kept))
    cb = sum(torch.sum(w * F.cosine_similarity(h, h0, dim=-1).relu()) for h, h0, w in states) / z
    pools = [torch.sum(w[:, None] * h, 0) / len(w) for h, _, w in states]
    eps = [0.01 * h0.norm(dim=-1).mean() for _, h0, _ in states]
    units = [pool / (pool.square().sum() + small**2).sqrt() for pool, small in zip(pools, eps)]
    alike = torch.stack([(units[i] @ units[j]).relu() for i in range(3) for j in range(3) if i != j]).mean()
    mass = torch.stack([w.sum() for *_, w in states]).mean()
    l2 = sum(torch.sum(w * (h - h0).norm(dim=-1)) for h, h0, w in kept) / z_retain
    p = batch.inputs["progress"][0]
    assert float(p) == pytest.approx(1 / 2)
    parts = objective.terms(params, batch.inputs, coefficients(batch, weights))
    assert parts["cb"] == pytest.approx((float(0.5 * (1 - 0.25 * p)), float(cb)), rel=1e-9)
    assert parts["orth"] == pytest.approx((float(0.3 * (0.4 + 0.6 * p) * mass), float(alike)), rel=1e-9)
    assert parts["retain"][0] == pytest.approx(0.7 * (0.5 + 0.5 * p))
    assert parts["retain"][1] == pytest.approx(float(l2), rel=1e-2)  # the norm is a parabola near 0
    total = objective(params, batch.inputs, coefficients(batch, weights))
    assert float(total) == pytest.approx(sum(c * v for c, v in parts.values()), rel=1e-12)


def test_the_gates_of_circuit_breakers_are_apart() -> None:
    method, lm = METHODS["orth_circuit_breakers"], language_model(layers=1)
    batch = pairs(method)[1]

    def names(**changes: Any) -> set[str]:
        objective, params = started(method, lm, evened(method, **changes))
        return set(objective.terms(params, batch.inputs, batch.scale))

    assert names() == {"cb", "orth", "retain"}
    assert names(forget=0.0) == {"orth", "retain"}
    assert names(orth=0.0) == {"cb", "retain"}
    assert names(forget=0.0, as_run=True) == {"retain"}, "the historical gate, which as_run permits"


def test_bounded_ascent_stops_at_its_cap() -> None:
    """A token beyond the cap has no gradient; as_run has no cap."""
    method, lm = METHODS["grad_ascent"], language_model(layers=1)
    batch = pairs(method)[0]
    norms = []
    for changes in ({"cap": 1e-3}, {"cap": 1e-3, "as_run": True}):
        objective, params = started(method, lm, evened(method, retain=0.0, **changes))
        norms.append(float(tree.norm(gradient(objective, params, batch.inputs, batch.scale)[1])))
    assert norms[0] == 0
    assert norms[1] > 0.1


def test_ramps_follow_the_progress() -> None:
    method, lm = METHODS["grad_diff"], language_model(layers=1)
    settings = replace(method.defaults, forget=2.0, forget_ramp=(1.0, 0.75), retain=5.0, retain_ramp=(0.0, 1.0))
    objective, params = started(method, lm, settings)
    stream = pairs(method, horizon=2)
    found = [objective.terms(params, stream[t].inputs, stream[t].scale) for t in range(3)]
    assert [terms["forget"][0] for terms in found] == [2.0, 1.75, 1.5]
    assert [terms["retain"][0] for terms in found] == [0.0, 2.5, 5.0]


@pytest.mark.parametrize("size", [None, 2])
def test_noted_terms_are_those_of_each_step_however_it_is_replayed(size: int | None) -> None:
    """Asked at every event, they are `terms` of that step's micro-batches; the way back leaves nothing behind."""
    method, lm = METHODS["npo"], language_model(layers=1)
    objective, params = started(method, lm, evened(method))
    stream = pairs(method, epochs=2)
    run = Training(Recipe(SGD(0.02, momentum=0.5), micro_batch_size=size), Double(objective), stream, stream.weights)
    state, expected = initial_state(run.recipe, params), []
    for t in range(len(stream)):
        parts = [objective.terms(state.params, b.inputs, coefficients(b, run.weights))
                 for b in micro_batches(stream[t], size)]  # fmt: skip
        expected.append({name: sum(part[name][1] for part in parts if name in part) for name in ("forget", "retain")})
        state = step(run, state).state
    objective.noted()
    for plan in (make("all", len(stream)), make("binomial", len(stream), slots=1)):
        found: dict[int, list[dict[str, float]]] = {}

        def observe(event: Any, found: dict[int, list[dict[str, float]]] = found) -> None:
            terms = objective.noted()
            if not isinstance(event, Reversed):
                found.setdefault(event.step, []).append(terms)

        metagradient(run, params, query(lm), plan, observe=observe)
        assert objective.noted() == {}
        for t, terms in enumerate(expected):
            assert found[t]
            for one in found[t]:
                assert one == pytest.approx(terms, rel=1e-12)
    assert sum(map(len, found.values())) > len(stream)  # some were replayed


@pytest.mark.parametrize("term", ["forget", "retain"])
def test_a_micro_batch_without_a_term_has_no_gradient(term: str) -> None:
    method, lm = METHODS["weighted_sft"], language_model(layers=1)
    objective, params = started(method, lm, evened(method, retain=0.0))
    batch = pairs(method)[0]
    one = tree.map(lambda x: x[:1] if term == "forget" else x[1:2], batch.inputs)
    value, slopes, _ = gradient(objective, params, one, one["scale"])
    assert (float(value) == 0) == (term == "retain")
    assert (float(tree.norm(slopes)) == 0) == (term == "retain")


def test_what_takes_signs_is_the_cross_entropy_family(method: Method) -> None:
    assert method.signed == (method.name in SIGNED)


def test_adapters_compare_with_the_model_without_them() -> None:
    """Circuit breakers on LoRA: off is as if B were 0, and metagradients agree with retraining."""
    name = "orth_circuit_breakers"
    lm = language_model(lora=True, layers=1)
    run, params = training(name, "sgd", lm)
    objective = run.engine.objective
    assert not objective.reference.adapters
    inputs = run.stream[0].inputs
    off = objective.outputs(params, inputs, False).states[0]
    bare = objective.outputs({n: x * ("lora_B" not in n) for n, x in params.items()}, inputs).states[0]
    assert torch.equal(off, bare)
    assert apart(objective.outputs(params, inputs).states[0], off) > 1e-3
    scores = metagradient(run, params, query(lm))[1][0]
    v = side_directions(run.stream)[0]
    measured = check.central_difference(run, params, query(lm), v, 2e-5)[0]
    assert check.relative_error(torch.sum(scores * v), measured) < 1e-6


def test_a_row_without_weight_has_no_infinite_slope() -> None:
    """Orth of a row whose weights are all 0: its pool is 0, and what a weight would change is finite and right."""
    method, lm = METHODS["orth_circuit_breakers"], language_model(layers=1)
    objective, params = started(method, lm, evened(method, forget=0.0, retain=0.0))
    batch = pairs(method)[1]
    c = batch.scale.clone()
    c[0] = 0
    slopes = gradient(objective, params, batch.inputs, c)[2]
    push = torch.zeros_like(c)
    push[0] = batch.scale[0]
    value = [objective(params, batch.inputs, c + h * push) for h in (2e-6, 1e-6, 0.0)]
    measured = (4 * value[1] - value[0] - 3 * value[2]) / 2e-6  # one-sided, for a cosine's relu has a corner there
    assert float(torch.sum(slopes * push)) in (0.0, pytest.approx(float(measured), rel=1e-4))
    assert 0 < float(measured) < 1e3


def test_a_run_on_disk_is_resumed_and_reversed_to_the_same_bits(tmp_path: Path) -> None:
    """A trajectory takes pairs and methods as it takes any run: states on disk, another process, the same scores."""
    lm = language_model(layers=1)
    run, params = training("npo", "adamw", lm, micro_batch_size=2)
    state = initial_state(run.recipe, params)
    value, gradient = query(lm)(check.train(run, params).params)
    expected = metagradient(run, params, query(lm))[1]
    keep = Replay(memory=0, disk=1 << 30, keep=True, plan="all")
    Trajectory(run, state, keep, tmp_path, "one").train()
    again = Trajectory(run, state, keep, tmp_path, "one")
    final = again.train()
    assert torch.equal(query(lm)(final.params)[0], value)
    assert torch.equal(again.reverse(gradient), expected)
