"""The kernel refuses rather than guesses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from worlds import objective, params, query, training

from retrograd.core import check, tree
from retrograd.core.engine import Double
from retrograd.core.optim import SGD, AdamW, Muon, Schedule
from retrograd.core.plan import make
from retrograd.core.slots import ReplayDriftError
from retrograd.core.step import Batch, Recipe, Training
from retrograd.core.sweep import NonFiniteError, metagradient


def test_replay_that_drifts_by_one_bit_is_refused_and_names_its_step() -> None:
    calls = []

    def drifting(p, inputs, c):
        calls.append(1)
        return objective(p, inputs, c) * (1 + (len(calls) > 6) * 2.3e-16)

    run = training(Recipe(SGD(0.1)))._replace(engine=Double(drifting))
    with pytest.raises(ReplayDriftError, match="replayed state 1 has digest"):
        metagradient(run, params(), query, make("binomial", len(run.stream), slots=1))


def test_nonfinite_training_names_the_step() -> None:
    run = training(Recipe(SGD(0.1)))
    weights = run.weights.clone()
    weights[int(run.stream[2].index[0, 0])] = float("nan")
    with pytest.raises(NonFiniteError, match="at step"):
        metagradient(run._replace(weights=weights), params(), query)


@pytest.mark.parametrize("how", ["train", "metagradient", "tangent"])
def test_an_overflow_of_the_last_update_is_refused(how: str) -> None:
    """One step from 0 with a learning rate that carries θ past the largest float; its loss and gradient are finite."""

    def objective(p, inputs, c):
        return torch.sum(c * (p["theta"] - 1e3) ** 2)

    batch = Batch({"x": torch.zeros(1)}, torch.zeros(1, dtype=torch.int64), torch.ones(1))
    training = Training(Recipe(SGD(1e37)), Double(objective), [batch], torch.ones(1))
    params = {"theta": torch.zeros(())}
    calls = {
        "train": lambda: check.train(training, params),
        "metagradient": lambda: metagradient(training, params, lambda p: (p["theta"][None], {"theta": torch.ones(1)})),
        "tangent": lambda: check.forward_tangent(training, params, torch.ones(1, 1)),
    }
    with pytest.raises(NonFiniteError, match=r"the update of step 0, the last, left the finite numbers: 100.00%"):
        calls[how]()


def test_nonfinite_cotangent_names_the_step() -> None:
    def broken(p):
        values, grads = query(p)
        grads["bias"][0, 0] = float("inf")
        return values, grads

    with pytest.raises(NonFiniteError, match=r"cotangent left the finite numbers at step 5: .*% of its entries"):
        metagradient(training(Recipe(SGD(0.1))), params(), broken)


@pytest.mark.parametrize("make_bad,message", [
    (lambda: SGD(float("nan")), "lr is nan"),
    (lambda: SGD(-1.0), "lr is -1"),
    (lambda: SGD(0.1, momentum=1.0), "momentum is 1.0"),
    (lambda: SGD(0.1, nesterov=True), "nesterov needs momentum"),
    (lambda: AdamW(0.1, eps=0.0, eps_root=0.0), "both 0"),
    (lambda: AdamW(0.1, beta2=1.0), "beta2 is 1.0"),
    (lambda: Muon(float("inf")), "lr is inf"),
    (lambda: Schedule("square", 0.1, 10), "unknown learning-rate schedule 'square'"),
    (lambda: Schedule("linear", float("inf"), 10), "learning rate is inf"),
    (lambda: Schedule("linear", 0.1, 10, 10), "warmup has to be shorter"),
    (lambda: Recipe(SGD(0.1), max_grad_norm=0.0), "max_grad_norm is 0"),
    (lambda: Recipe(SGD(0.1), micro_batch_size=0), "micro_batch_size is 0"),
])  # fmt: skip
def test_bad_hyperparameters(make_bad, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_bad()


def test_an_illegal_plan_is_refused_before_any_step() -> None:
    run = training(Recipe(SGD(0.1)))
    with pytest.raises(ValueError, match="illegal plan"):
        metagradient(run, params(), query, make("all", len(run.stream) - 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
def test_digest_sees_every_bit_and_no_order_of_summation(dtype: torch.dtype) -> None:
    x = torch.arange(1, 1004).to(dtype)
    first = tree.digest({"x": x})
    assert first == tree.digest({"x": x.clone()})
    for place in (0, 500, 1002):
        raw = x.clone().view(torch.uint8)
        raw[place * x.element_size()] ^= 1
        assert tree.digest({"x": raw.view(dtype)}) != first
    swapped = x.clone().view(
        torch.int64 if dtype.itemsize == 8 else torch.int32 if dtype.itemsize == 4 else torch.int16
    )
    swapped[3] += 1
    swapped[4] -= 1
    assert tree.digest({"x": swapped.view(dtype)}) != first


def test_a_state_made_of_other_tensors_is_refused() -> None:
    like = {"a": torch.zeros(2), "b": torch.zeros(3)}
    assert tree.unnamed(like, tree.named(like))["b"].shape == (3,)
    with pytest.raises(ValueError, match=r"missing \['b'\]"):
        tree.unnamed(like, {"a": torch.zeros(2)})
    with pytest.raises(ValueError, match="tensor b is"):
        tree.unnamed(like, {"a": torch.zeros(2), "b": torch.zeros(4)})


def test_muon_keeps_its_hyperparameters_in_the_record() -> None:
    assert replace(Muon(0.1), lr=0.2) == Muon(0.2)
