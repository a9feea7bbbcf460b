"""Methods on states and parameters against their formulas, written out row by row on the plain model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from test_unlearn_methods import apart, drawn, gradient
from tiny import configurations
from torch import Tensor
from torch.nn import functional as F
from unlearning import as_language_model, evened, language_model, pairs, query, started

from retrograd.core.check import train
from retrograd.core.engine import Double
from retrograd.core.optim import SGD
from retrograd.core.step import Recipe, Training, coefficients
from retrograd.data.pairs import FORGET, PairStream
from retrograd.lm.model import CausalLM, bound_model, only_trained, trainable
from retrograd.unlearn.activation import rmu
from retrograd.unlearn.methods import METHODS
from retrograd.unlearn.reference import reference_of
from retrograd.unlearn.settings import Settings, chosen_blocks

Row = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def rows_of(
    lm: CausalLM, params: dict[str, Tensor], stream: PairStream, weights: Tensor, step: int, block: int = 0
) -> tuple[list[Row], list[Row]]:
    """(h, h0, z, targets, w) of each forget and each retain row, h the output of `block`, without padding."""
    bind, sides = bound_model(lm.module), ([], [])
    batch = stream[step]
    for row, side in zip(stream.rows_at(step), batch.inputs["side"]):
        tokens = torch.from_numpy(stream.rows.input_ids[row])
        out, then = (bind(p)(input_ids=tokens[None], output_hidden_states=True) for p in (params, lm.params))
        h, h0 = (one.hidden_states[block + 1][0, :-1] for one in (out, then))
        entry = (h, h0, out.logits[0, :-1], tokens[1:], weights[row, 1 : len(tokens)])
        sides[0 if side == FORGET else 1].append(entry)
    return sides


def mean(side: list[Row], loss: Any) -> float:
    """(1/Z) Σ w·loss(h, h0)."""
    return float(sum(torch.sum(w * loss(h, h0)) for h, h0, _, _, w in side) / sum(len(w) for *_, w in side))


def terms_of(name: str, step: int = 1, **changes: Any) -> tuple[dict[str, tuple[float, float]], list[Row], list[Row]]:
    method, lm = METHODS[name], language_model()
    objective, params = started(method, lm, evened(method, **changes))
    stream = pairs(method, forget_batch=3, retain_batch=3)
    weights = drawn(stream.weights.shape)
    parts = objective.terms(params, stream[step].inputs, coefficients(stream[step], weights))
    return parts, *rows_of(lm, params, stream, weights, step)


def test_circuit_breakers_by_hand() -> None:
    parts, forget, retain = terms_of("circuit_breakers", blocks=(0,))
    cb = mean(forget, lambda h, h0: F.cosine_similarity(h, h0, dim=-1).relu())
    assert parts["forget"] == pytest.approx((0.5 * (1 - 0.25 * 0.5), cb), rel=1e-9)
    assert parts["retain"][1] == pytest.approx(mean(retain, lambda h, h0: (h - h0).norm(dim=-1)), rel=1e-2)


def test_rmu_by_hand() -> None:
    """u has entries of one sign, as its source draws it; both terms are means over the width."""
    parts, forget, retain = terms_of("rmu", depths=(), blocks=(0,), steer=3.0, direction_seed=5)
    u = torch.rand(16, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    u /= u.square().sum().sqrt()

    def steered(h: Tensor, h0: Tensor) -> Tensor:
        return torch.stack([F.mse_loss(x, 3 * x0.norm() * u) for x, x0 in zip(h, h0)])

    assert parts["forget"] == pytest.approx((0.5, mean(forget, steered)), rel=1e-12)
    assert parts["retain"][1] == pytest.approx(mean(retain, lambda h, h0: (h - h0).square().mean(-1)), rel=1e-12)
    other = terms_of("rmu", depths=(), blocks=(0,), steer=3.0, direction_seed=6)[0]
    assert abs(other["forget"][1] / parts["forget"][1] - 1) > 1e-4


@pytest.mark.parametrize("family", configurations())
def test_rmu_trains_the_last_matrix_of_the_chosen_mlps(family: str) -> None:
    """A few matrices of other names in every family; the model around them is frozen and the same."""
    from transformers import AutoModelForCausalLM

    module = AutoModelForCausalLM.from_config(configurations()[family], attn_implementation="sdpa").double().eval()
    names = rmu.output_projections(replace(METHODS["rmu"].defaults, depths=(1.0,), span=0.5), module)
    ending = {"gpt-neox": "dense_4h_to_h.weight", "gpt2-tied": "mlp.c_proj.weight"}.get(family, "mlp.down_proj.weight")
    (name,) = names
    assert name.split(".")[2] == "1"
    assert name.endswith(ending)
    lm = as_language_model(module)
    expected = query(lm)(lm.params)[0]
    few = only_trained(lm, names)
    assert set(few.params) == set(names) == set(trainable(module)[0])
    assert torch.equal(query(few)(few.params)[0], expected)


def test_rmu_defaults_are_shares_of_the_depth() -> None:
    """Blocks 5, 6 and 7 of 32, as published, and one of 4."""
    from transformers import AutoModelForCausalLM

    found = {}
    for layers in (4, 32):
        configuration = configurations()["gpt-neox"]
        configuration.num_hidden_layers = layers
        names = rmu.output_projections(METHODS["rmu"].defaults, AutoModelForCausalLM.from_config(configuration))
        found[layers] = [int(name.split(".")[2]) for name in names]
    assert found == {4: [1], 32: [5, 6, 7]}
    with pytest.raises(ValueError, match="span is 0; it is a share of the depth"):
        replace(METHODS["rmu"].defaults, span=0)
    with pytest.raises(ValueError, match="1 parameters to train are not in the model, such as absent"):
        only_trained(language_model(), ["absent"])


def test_weighted_ascent_orth_by_hand() -> None:
    parts, forget, _ = terms_of("weighted_ascent_orth", blocks=(0,), cap=1.2)
    limit = 1.2 * torch.tensor(forget[0][2].shape[-1]).double().log()
    losses = [(w * F.cross_entropy(z, y, reduction="none").minimum(limit)).sum() for _, _, z, y, w in forget]
    assert any((F.cross_entropy(z, y, reduction="none") > limit).any() for _, _, z, y, _ in forget)
    ascent = -sum(losses) / sum(len(w) for *_, w in forget)
    pools = [torch.sum(w[:, None] * h, 0) / len(w) for h, *_, w in forget]
    eps = [0.01 * h0.norm(dim=-1).mean() for _, h0, *_ in forget]
    units = [pool / (pool.square().sum() + small**2).sqrt() for pool, small in zip(pools, eps)]
    alike = torch.stack([(units[i] @ units[j]).relu() for i in range(3) for j in range(3) if i != j]).mean()
    assert parts["ascent"] == pytest.approx((0.5, float(ascent)), rel=1e-12)
    assert parts["orth"] == pytest.approx((0.3, float(alike)), rel=1e-9)
    assert terms_of("weighted_ascent_orth", orth=0.0)[0].keys() == {"ascent", "retain"}
    assert terms_of("weighted_ascent_orth", forget=0.0)[0].keys() == {"orth", "retain"}


def test_two_phases_follow_each_other() -> None:
    """Forget up to the switch with a share of retain, retain alone after it; the first is either removal."""
    method, lm = METHODS["two_phase"], language_model(layers=1)
    settings = replace(method.defaults, forget=2.0, retain=5.0, switch=0.5, hold=0.2)
    objective, params = started(method, lm, settings)
    stream = pairs(method, epochs=2)
    assert len(stream) == 5
    found = [objective.terms(params, stream[t].inputs, stream[t].scale) for t in range(5)]
    assert [terms["forget"][0] for terms in found] == [2, 2, 2, 0, 0]
    assert [terms["retain"][0] for terms in found] == pytest.approx([1, 1, 1, 5, 5])
    other = started(METHODS["weighted_sft"], lm, evened(METHODS["weighted_sft"], forget=0.0, retain=5.0, retain_ramp=(1, 1)))  # fmt: skip
    slopes = [gradient(o, params, stream[4].inputs, stream[4].scale)[1] for o in (objective, other[0])]
    assert apart(*slopes) < 1e-12
    ascent = started(method, lm, replace(settings, removal="ascent"))[0]
    plain = started(METHODS["grad_ascent"], lm)[0]
    values = [o.terms(params, stream[0].inputs, stream[0].scale)["forget"][1] for o in (ascent, plain)]
    assert values[0] == values[1] != found[0]["forget"][1]
    for wrong in ({"switch": 1.0}, {"hold": 1.5}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            replace(method.defaults, **wrong)


def test_task_arithmetic_is_fine_tuning_taken_away() -> None:
    """The plain way: fine-tune on the forget rows alone by SGD, then subtract what that added."""
    method, lm = METHODS["task_arithmetic"], language_model(layers=1)
    stream, rate, scale = pairs(method, epochs=2), 0.05, 1.7
    weights = drawn(stream.weights.shape)
    fine_tuned = dict(lm.params)
    for t in range(len(stream)):
        forget = stream[t].inputs["side"] == FORGET
        c = coefficients(stream[t], weights) * forget[:, None]
        slopes = gradient(lm.objective, fine_tuned, stream[t].inputs, c)[1]
        fine_tuned = {name: p - rate * slopes[name] for name, p in fine_tuned.items()}
    expected = {name: p - scale * (fine_tuned[name] - p) for name, p in lm.params.items()}
    objective = method.objective(lm, reference_of(lm), replace(method.defaults, scale=scale))
    run = Training(Recipe(SGD(rate)), Double(objective), stream, weights)
    found = train(run, lm.params).params
    moved = {name: p - lm.params[name] for name, p in found.items()}
    assert apart(moved, {name: p - lm.params[name] for name, p in expected.items()}) < 1e-12
    with pytest.raises(ValueError, match="scale is 0"):
        replace(method.defaults, scale=0)
    adapted = language_model(lora=True, layers=1)
    objective, params = started(method, adapted)
    with pytest.raises(ValueError, match=r"that of adapters is a product of them: .* --lora.rank 0"):
        objective(params, stream[0].inputs, stream[0].scale)


@pytest.mark.parametrize(("step", "block"), [(0, 1), (1, 1), (2, 0), (3, 0)])
def test_sequential_reads_the_visited_block_by_the_original_rest(step: int, block: int) -> None:
    """The plain way: a copy of the model whose blocks up to the visited one are the current ones."""
    method, lm = METHODS["sequential"], language_model()
    objective, params = started(method, lm, evened(method, retain=0.0, visits=(0.0, 1.0), top_k=5))
    stream = pairs(method, epochs=2, horizon=4)
    weights = drawn(stream.weights.shape)
    c = coefficients(stream[step], weights)
    moved = {n: p if any(f"layers.{at}." in n for at in range(block + 1)) else lm.params[n] for n, p in params.items()}
    losses, count = [], 0
    for _, _, z, y, w in rows_of(lm, moved, stream, weights, step)[0]:
        best = z.sort(-1, descending=True).values[:, :5]
        losses.append(torch.sum(w * F.cross_entropy(best, torch.full_like(best, 0.2), reduction="none")))
        count += len(y)
    (value,) = objective.terms(params, stream[step].inputs, c).values()
    expected = sum(losses) / count / torch.tensor(5.0, dtype=torch.float64).log()
    assert value[1] == pytest.approx(float(expected), rel=1e-12)
    slopes = gradient(objective, params, stream[step].inputs, c)[1]
    reached = {int(n.split(".")[2]) for n, g in slopes.items() if "layers" in n and float(g.norm()) > 0}
    assert reached == set(range(block + 1))


def test_sequential_visits_are_shares_of_the_depth_and_adapters_begin_as_no_change() -> None:
    method, lm = METHODS["sequential"], language_model(lora=True)
    assert chosen_blocks(Settings(depths=method.defaults.visits), 32) == (16, 20, 24, 28)
    assert chosen_blocks(Settings(depths=method.defaults.visits), 4) == (2, 3)
    objective, params = started(method, lm, evened(method, retain=0.0, visits=(0.0,)))
    inputs = pairs(method)[0].inputs
    found = method.at(objective.settings, params, objective.reference, inputs["progress"][0], lm.module)
    off = objective.outputs(lm.params, inputs, adapters=False).logits
    early = {n: p if "layers.0" in n else lm.params[n] for n, p in params.items()}
    assert all(torch.equal(found[n], early[n]) for n in found)
    assert apart(objective.outputs({**found, **{n: lm.params[n] for n in found}}, inputs).logits, off) < 1e-12
    with pytest.raises(ValueError, match="visits is empty"):
        replace(method.defaults, visits=())
