"""Variants of methods: a latent attack inside circuit breakers, L2-SP, removal that stops at a budget."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from unlearning import OPTIMIZERS, evened, language_model, pairs, query, started

from retrograd.core import check
from retrograd.core.engine import Double
from retrograd.core.step import Recipe, Training, coefficients, micro_batches
from retrograd.core.sweep import metagradient
from retrograd.data.pairs import FORGET
from retrograd.lm.outputs import outputs_of
from retrograd.unlearn import guards
from retrograd.unlearn.latent import LatentAttack
from retrograd.unlearn.laws import LAWS, broken_laws
from retrograd.unlearn.methods import METHODS
from retrograd.unlearn.reference import reference_of

BREAKERS, SEQUENTIAL, TWO = (METHODS[name] for name in ("circuit_breakers", "sequential", "two_phase"))
LAT = replace(BREAKERS.defaults, lat_steps=3, lat_size=0.2)
UNDER_ATTACK = [name for name in LAWS if name != "gradient"]


def test_a_latent_attack_keeps_every_law_but_that_of_the_gradient() -> None:
    assert broken_laws(BREAKERS, LAT, UNDER_ATTACK) == []
    (told,) = broken_laws(BREAKERS, LAT, ["gradient"])  # δ follows the parameters: why such runs are not attributed
    assert told.startswith("circuit_breakers breaks the law of gradient: along one direction of the parameters")


def test_runs_under_a_latent_attack_are_not_attributed() -> None:
    guards.check_attributable(BREAKERS, BREAKERS.defaults)
    with pytest.raises(ValueError, match="runs of circuit_breakers cannot be attributed: its latent attack is found"):
        guards.check_attributable(BREAKERS, LAT)


@pytest.mark.parametrize("family", ["gpt-neox", "llama-gqa"])
def test_the_attack_says_the_forget_rows_better_and_leaves_the_others(family: str) -> None:
    lm = language_model(family)
    batch = pairs(BREAKERS)[0]
    outputs = outputs_of(lm, (0, 1))
    plain = outputs(lm.params, batch.inputs)
    attacked = [LatentAttack(steps, 0.2)(outputs, lm.params, batch.inputs, lm.module) for steps in (1, 4)]

    def loss(out: Any, forget: bool) -> float:
        rows = (batch.inputs["side"][out.rows] == FORGET) == forget
        return float(F.cross_entropy(out.logits[rows], out.targets[rows]))

    assert loss(attacked[1], True) < loss(plain, True)
    assert loss(attacked[0], True) < loss(plain, True)
    kept = batch.inputs["side"][plain.rows] != FORGET
    assert torch.equal(attacked[1].logits[kept], plain.logits[kept])
    moved = (attacked[1].states[0] - plain.states[0])[~kept].norm(dim=-1)
    assert (moved > 0).all()


def test_the_attack_is_a_descent_by_hand() -> None:
    """One step: δ = −size·‖h‖·g/‖g‖ at the embedding and both blocks, from a naive forward pass."""
    lm = language_model()
    batch = pairs(BREAKERS, forget_batch=1, retain_batch=1)[0]
    row = int((batch.inputs["side"] == FORGET).nonzero()[0])
    last = int(batch.inputs["target_mask"][row].nonzero()[-1])
    ids = batch.inputs["input_ids"][row][: last + 1][None]
    body, head = lm.module.gpt_neox, lm.module.get_output_embeddings()

    def run(*added: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        seen = []
        handles = [
            module.register_forward_hook(
                lambda m, a, out, d=d: (seen.append(out if torch.is_tensor(out) else out[0]), seen[-1] + d)[1]
                if torch.is_tensor(out) else (seen.append(out[0]), (seen[-1] + d, *out[1:]))[1]
            )
            for module, d in zip((body.embed_in, *body.layers), added)
        ]  # fmt: skip
        hidden = body(input_ids=ids).last_hidden_state
        for handle in handles:
            handle.remove()
        return head(hidden)[0, :-1], seen

    zeros = [torch.zeros(1, ids.shape[1], lm.module.config.hidden_size, dtype=torch.float64) for _ in range(3)]
    live = [z.clone().requires_grad_() for z in zeros]
    logits, seen = run(*live)
    slopes = torch.autograd.grad(F.cross_entropy(logits, ids[0, 1:], reduction="sum"), live)
    norms = [h.norm(dim=-1, keepdim=True) for h in seen]
    step = [-0.3 * n * torch.nan_to_num(g / g.norm(dim=-1, keepdim=True)) for n, g in zip(norms, slopes)]
    expected = run(*step)[0]
    found = LatentAttack(1, 0.3)(outputs_of(lm, (0, 1)), lm.params, batch.inputs, lm.module)
    assert torch.allclose(found.logits[found.rows == row], expected, atol=1e-10)


def test_a_size_near_0_is_no_attack() -> None:
    lm, stream = language_model(), pairs(BREAKERS)
    plain, params = started(BREAKERS, lm)
    tiny = BREAKERS.objective(lm, reference_of(lm), evened(BREAKERS, lat_steps=2, lat_size=1e-12))
    inputs, c = stream[0].inputs, coefficients(stream[0], stream.weights)
    assert float(tiny(params, inputs, c)) == pytest.approx(float(plain(params, inputs, c)), rel=1e-9)


def test_l2_sp_is_the_squared_distance_from_the_start_and_is_not_linear_in_the_weights() -> None:
    settings = evened(SEQUENTIAL, l2_sp=0.25)
    assert broken_laws(replace(SEQUENTIAL, linear=False), settings) == []
    (told,) = broken_laws(SEQUENTIAL, settings, ["linear"])
    assert told.startswith("sequential breaks the law of linear")
    lm, stream = language_model(), pairs(SEQUENTIAL, forget_batch=2, retain_batch=2)
    objective, params = started(SEQUENTIAL, lm, settings)
    without, _ = started(SEQUENTIAL, lm, evened(SEQUENTIAL))
    assert not objective.linear
    assert without.linear
    batch = stream[0]
    c = coefficients(batch, stream.weights)
    distance = sum(float((params[name] - theta).square().sum()) for name, theta in lm.params.items())
    added = float(objective(params, batch.inputs, c)) - float(without(params, batch.inputs, c))
    assert added == pytest.approx(0.25 * distance, rel=1e-9)
    parts = micro_batches(batch, stream.unit)
    assert len(parts) > 1
    each = sum(objective.terms(params, part.inputs, coefficients(part, stream.weights))["l2_sp"][1] for part in parts)
    assert each == pytest.approx(distance, rel=1e-9)


def test_l2_sp_needs_the_whole_model() -> None:
    lm = language_model(lora=True)
    objective, params = started(SEQUENTIAL, lm, evened(SEQUENTIAL, l2_sp=0.1))
    stream = pairs(SEQUENTIAL)
    with pytest.raises(ValueError, match="adapters have none: train the whole model"):
        objective(params, stream[0].inputs, coefficients(stream[0], stream.weights))


def test_removal_stops_beyond_the_budget_and_goes_on_within_it() -> None:
    tight, wide = (evened(TWO, budget=budget, switch=0.9) for budget in (1e-6, 1e6))
    lm, stream = language_model(), pairs(TWO)
    batch = stream[0]
    c = coefficients(batch, stream.weights)
    reference = reference_of(lm)
    (stops, params), (goes_on, _) = started(TWO, lm, tight), started(TWO, lm, wide)
    plain = TWO.objective(lm, reference, evened(TWO, switch=0.9))
    assert stops.terms(params, batch.inputs, c)["forget"][1] == 0.0
    assert float(goes_on(params, batch.inputs, c)) == float(plain(params, batch.inputs, c))
    at_start = stops.terms(lm.params, batch.inputs, c)["forget"][1]
    assert at_start == plain.terms(lm.params, batch.inputs, c)["forget"][1] > 0
    assert broken_laws(TWO, wide) == []
    with pytest.raises(ValueError, match="two_phase needs a reference"):
        TWO.objective(lm, None, wide)


@pytest.mark.parametrize(("method", "changes"), [
    (SEQUENTIAL, {"l2_sp": 0.05}), (TWO, {"budget": 0.02, "switch": 0.9}), (TWO, {"budget": 1e6, "switch": 0.9}),
])  # fmt: skip
def test_their_metagradients_agree_with_retraining(method: Any, changes: dict[str, Any]) -> None:
    """A budget of 0.02 is kept at some steps and not at others."""
    lm, stream = language_model(layers=1), pairs(method)
    objective, params = started(method, lm, evened(method, **changes))
    weights = 0.6 + torch.rand(stream.weights.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    run = Training(Recipe(OPTIMIZERS["adamw"]), Double(objective), stream, weights)
    scores = metagradient(run, params, query(lm))[1][0]
    v = torch.randn(weights.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    measured = check.central_difference(run, params, query(lm), v, 2e-5)[0]
    assert check.relative_error(torch.sum(scores * v), measured) < 1e-6


@pytest.mark.parametrize(("method", "changes", "match"), [
    (BREAKERS, {"lat_steps": -1}, "lat_steps is -1 and lat_size 0.1"),
    (BREAKERS, {"lat_steps": 2, "lat_size": 0.0}, "a size is above 0"),
    (SEQUENTIAL, {"l2_sp": -0.1}, "l2_sp is -0.1; a coefficient is at least 0"),
    (TWO, {"budget": 0.0}, "budget is 0.0; a divergence of 0 stops everything"),
])  # fmt: skip
def test_settings_that_cannot_work_are_refused(method: Any, changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        replace(method.defaults, **changes)
