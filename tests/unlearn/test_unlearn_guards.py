"""What unlearning refuses before it begins and after it ends, with the numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from unlearning import FORGET, RETAIN, evened, language_model, pairs, started

from retrograd.core.engine import Double
from retrograd.data.pairs import PairStream
from retrograd.lm.engines import Load, choose_engine
from retrograd.unlearn import guards
from retrograd.unlearn.methods import METHODS, find_method
from retrograd.unlearn.reference import adapters_off, frozen_copy, perturbed, reference_of
from retrograd.unlearn.settings import Settings, chosen_blocks

ORTH, NPO = METHODS["orth_circuit_breakers"], METHODS["npo"]


@pytest.mark.parametrize("name", METHODS)
def test_negative_weights_are_for_the_cross_entropy_family(name: str) -> None:
    weights = torch.ones(3, 4)
    weights[0, 1], weights[2, 2] = -0.25, -0.5
    if METHODS[name].signed:
        guards.check_weights(METHODS[name], weights)
        return
    with pytest.raises(ValueError, match=f"2 of 12 weights are negative, the least -0.5, and {name} takes none"):
        guards.check_weights(METHODS[name], weights)


def test_updates_that_are_no_gradient_are_not_attributed() -> None:
    guards.check_attributable(NPO)
    with pytest.raises(ValueError, match="runs of npo cannot be attributed: it overwrites weights"):
        guards.check_attributable(replace(NPO, no_gradient="it overwrites weights"))


def test_weights_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="1 of 2 weights are NaN or infinite"):
        guards.check_weights(NPO, torch.tensor([1.0, torch.inf]))


@pytest.mark.parametrize("name", METHODS)
def test_the_defaults_of_every_method_are_accepted(name: str) -> None:
    method = METHODS[name]
    objective, _ = started(method, language_model(layers=1), method.defaults)
    guards.check_stream(objective, pairs(method, forget_batch=4, retain_batch=4))
    assert guards.flags(objective) == []


def test_streams_that_a_method_cannot_use_are_refused() -> None:
    lm = language_model(layers=1)

    def check(name: str, stream: PairStream, size: int | None = None, **changes: Any) -> None:
        guards.check_stream(started(METHODS[name], lm, evened(METHODS[name], **changes))[0], stream, size)

    rows = {"forget_batch": 2, "retain_batch": 2}
    weights = pairs(NPO).weights.clone()
    weights[:5, 1:] = 0
    with pytest.raises(ValueError, match=r"all 5 forget rows have weight 0 .* empty after selection"):
        check("npo", pairs(NPO, weights=weights))
    with pytest.raises(ValueError, match=r"npo has a retain coefficient of 0.7 and there are no retain rows"):
        check("npo", PairStream(FORGET, None, **rows))
    check("npo", PairStream(FORGET, None, **rows), retain=0.0)
    with pytest.raises(ValueError, match="dpo needs an alternative row for each of 5 forget rows"):
        check("dpo", PairStream(FORGET, RETAIN, **rows))
    with pytest.raises(ValueError, match="npo takes no alternative rows, and 5 were given"):
        check("npo", pairs(METHODS["dpo"]))
    with pytest.raises(ValueError, match="a micro-batch of 3 rows takes pairs apart: a batch is 2 units of 2 rows"):
        check("npo", pairs(NPO), 3)
    with pytest.raises(ValueError, match=r"needs at least 2; some have 1. Give a micro-batch of 4 rows"):
        check("orth_circuit_breakers", pairs(ORTH), 2)
    check("orth_circuit_breakers", pairs(ORTH), 2, as_run=True)
    with pytest.raises(ValueError, match="1 of 48 weights are negative"):
        weights = torch.ones(8, 6).double()
        weights[7, 1] = -1
        check("npo", pairs(NPO, weights=weights))


def test_orth_of_one_row_and_pairs_taken_apart_stop_the_objective_too() -> None:
    lm = language_model(layers=1)
    objective, params = started(ORTH, lm)
    batch = pairs(ORTH, forget_batch=1, retain_batch=1)[0]
    with pytest.raises(ValueError, match="this one has 1, so that it would be 0"):
        objective(params, batch.inputs, batch.scale)
    objective, params = started(METHODS["dpo"], lm)
    batch = pairs(NPO)[0]
    with pytest.raises(ValueError, match="2 forget rows and 0 alternative ones"):
        objective(params, batch.inputs, batch.scale)


def test_pairs_of_a_micro_batch_are_counted() -> None:
    assert guards.forget_rows(pairs(ORTH, forget_batch=4, retain_batch=4)[0], 4) == [2, 2]


def test_a_reference_is_asked_for_and_is_of_the_start() -> None:
    lm = language_model(layers=1)
    batch = pairs(NPO)[0]
    with pytest.raises(ValueError, match="npo needs a reference for its forget term"):
        NPO.objective(lm)
    with pytest.raises(ValueError, match="wga needs a reference for retain_term 'kl'"):
        METHODS["wga"].objective(lm, None, evened(METHODS["wga"], retain_term="kl"))
    assert METHODS["wga"].objective(lm, None).reference is None
    objective = NPO.objective(lm, frozen_copy(lm))
    guards.check_reference(objective, lm.params, batch)
    with pytest.raises(ValueError, match="differs from the model it is to be the start of by"):
        guards.check_reference(objective, perturbed(lm.params, 0.5, 0), batch)
    with pytest.raises(ValueError, match="has no adapters to turn off"):
        adapters_off(lm)


@pytest.mark.parametrize("lora", [False, True])
def test_a_reference_equal_to_the_model_is_refused_where_there_is_no_slope(lora: bool) -> None:
    lm = language_model(lora=lora, layers=1)
    objective, batch = ORTH.objective(lm, reference_of(lm)), pairs(ORTH)[0]
    guards.check_reference(objective, lm.params, batch)
    with pytest.raises(ValueError, match=r"equal to the current model .*start from perturbed\(params, 0.001, seed\)"):
        guards.check_start(objective, lm.params, batch)
    guards.check_start(objective, perturbed(lm.params, ORTH.perturb, 0), batch)
    guards.check_start(NPO.objective(lm, reference_of(lm)), lm.params, batch)  # has a slope there


def test_a_perturbed_start_is_a_function_of_the_seed_and_of_the_size() -> None:
    params = language_model(layers=1).params
    one, same, other = (perturbed(params, 1e-3, seed) for seed in (0, 0, 1))
    assert all(torch.equal(one[n], same[n]) for n in params)
    assert not any(torch.equal(one[n], other[n]) for n in params)
    moved = torch.cat([(one[n] - params[n]).flatten() for n in params])
    whole = torch.cat([p.flatten() for p in params.values()])
    assert float(moved.norm() / whole.norm()) == pytest.approx(1e-3, rel=0.05)


def test_parameters_that_did_not_change_are_named() -> None:
    before = {"a": torch.zeros(2), "b": torch.zeros(2)}
    after = {"a": torch.ones(2), "b": torch.zeros(2)}
    guards.check_changed(before, after, ["a"])
    with pytest.raises(ValueError, match="1 of 2 parameters that were to change did not: b"):
        guards.check_changed(before, after)
    with pytest.raises(ValueError, match="1 parameters that were to change are not trained at all, such as c"):
        guards.check_changed(before, after, ["a", "c"])
    low, moved = ({name: x.bfloat16() for name, x in one.items()} for one in (before, after))
    with pytest.warns(UserWarning, match=r"did not: b.*as they do in half precision: take --dtype float32"):
        guards.check_changed(low, moved)
    with pytest.raises(ValueError, match=r"of .* parameters that were to change did not"):
        guards.check_changed(low, low)


def test_historical_faults_are_flagged_and_only_where_there_are_some() -> None:
    lm = language_model(layers=1)
    diff = METHODS["grad_diff"]
    found = guards.flags(diff.objective(lm, None, replace(diff.defaults, as_run=True)))
    assert found == [
        "grad_diff as run: the forget loss has no cap, and the retain term kl is a sum over tokens divided by rows"
    ]
    with pytest.raises(ValueError, match="wga has no historical fault that as_run would permit"):
        METHODS["wga"].objective(lm, None, replace(METHODS["wga"].defaults, as_run=True))
    wga = evened(METHODS["wga"], as_run=True, retain_term="kl")
    assert "divided by rows" in guards.flags(METHODS["wga"].objective(lm, reference_of(lm), wga))[0]


def test_settings_that_mean_nothing_are_refused() -> None:
    lm = language_model(layers=1)
    with pytest.raises(ValueError, match=r"forget is -1.0; a coefficient is at least 0"):
        Settings(forget=-1.0)
    with pytest.raises(ValueError, match="give one of them"):
        Settings(depths=(0.5,), blocks=(1,))
    with pytest.raises(ValueError, match="npo takes NPOSettings settings, not Settings"):
        NPO.objective(lm, reference_of(lm), Settings())
    with pytest.raises(ValueError, match="beta2 a whole number from 0"):
        replace(METHODS["satimp"].defaults, beta1=-1.0)
    for k in (1, 30):
        objective, params = started(METHODS["topk_entropy"], lm, evened(METHODS["topk_entropy"], top_k=k))
        with pytest.raises(ValueError, match=f"top_k is {k}; it has to be from 2 to the vocabulary, 22"):
            objective(params, pairs(NPO)[0].inputs, pairs(NPO)[0].scale)


def test_blocks_are_shares_of_the_depth() -> None:
    assert chosen_blocks(Settings(), 3) == (0, 1, 2)
    assert chosen_blocks(Settings(depths=(0.0, 0.5, 1.0)), 32) == (0, 16, 31)
    assert chosen_blocks(Settings(blocks=(2, 0)), 3) == (0, 2)
    with pytest.raises(ValueError, match="there is no block 3 in a model of 3; they are numbered 0 to 2"):
        chosen_blocks(Settings(blocks=(3,)), 3)
    with pytest.raises(ValueError, match=r"depth 1.5 is no share"):
        chosen_blocks(Settings(depths=(1.5,)), 3)
    lm = language_model(layers=1)
    with pytest.raises(ValueError, match="there is no block 1 in a model of 1"):
        ORTH.objective(lm, reference_of(lm), evened(ORTH, blocks=(1,)))
    assert (ORTH.adapter_rank(4096), ORTH.adapter_rank(64)) == (64, 2)


def test_the_engine_of_blocks_is_refused_for_another_objective() -> None:
    lm = language_model(layers=1)
    objective = METHODS["grad_diff"].objective(lm)
    with pytest.raises(ValueError, match=r"'blocks' computes the weighted cross-entropy .* take 'double'"):
        choose_engine("blocks", lm.module, objective)
    chosen = choose_engine("auto", lm.module, objective, Load(4, 30, 1, 0))
    assert (chosen.name, type(chosen.engine)) == ("double", Double)


def test_a_method_is_found_by_name_or_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("from retrograd.unlearn.likelihood.wga import METHOD\n")
    assert find_method(str(file)) == METHODS["wga"]
    file.write_text("METHOD = 3\n")
    with pytest.raises(ValueError, match="has no METHOD = Method"):
        find_method(str(file))
    with pytest.raises(ValueError, match="unknown method 'nop'; the methods are grad_ascent, grad_diff"):
        find_method("nop")
    with pytest.raises(ValueError, match=r"there is no file .*other\.py"):
        find_method(str(tmp_path / "other.py"))
