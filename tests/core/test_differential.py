"""Some of the random configurations of bench/differential.py, and that it sees what is wrong."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from retrograd.core import lookups
from retrograd.core.optim import SCHEDULES
from retrograd.proofs import first_step

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
import differential
from differential import PAD


@pytest.mark.parametrize("seed", [10, pytest.param(7, marks=pytest.mark.slow)])
def test_random_runs_equal_an_independent_loop(seed: int) -> None:
    assert not differential.wrong(differential.compare(seed, retrain=seed % differential.EVERY == 0))


@pytest.mark.slow
def test_many_random_runs() -> None:
    found = {seed: differential.compare(seed, seed % differential.EVERY == 0) for seed in range(1000, 1060)}
    assert {seed: errors for seed, errors in found.items() if differential.wrong(errors)} == {}


def test_every_ingredient_is_drawn() -> None:
    drawn = [differential.configuration(seed) for seed in range(500)]
    assert {one.family for one in drawn} == set(differential.FAMILIES)
    assert {one.engine for one in drawn} == {"double", "blocks"}
    assert {one.optimizer["name"] for one in drawn} == {"sgd", "momentum", "nesterov", "adam", "adamw", "muon"}
    assert {one.schedule for one in drawn} == set(SCHEDULES)
    assert {one.optimizer["spare"] for one in drawn} == {True, False}
    assert {None in one.ends for one in drawn} == {True, False}
    assert {one.plan["plan"] for one in drawn} == {"all", "sqrt", "binomial", "interval", "auto", "gradients"}
    for kind in ("lora", "frozen", "per_token", "shuffle", "durable", "interrupted", "max_grad_norm"):
        assert {bool(getattr(one, kind)) for one in drawn} == {True, False}, kind
    assert {len(one.queries) for one in drawn} == {1, 2, 3}
    assert any(len(row) > 1 for one in drawn for row in one.rows)
    assert differential.configuration(7) == differential.configuration(7)


def test_it_sees_a_wrong_derivative(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second backward that stops at the padding token; a clip taken for a constant."""
    draws = [differential.configuration(seed) for seed in range(500)]
    padded = next(
        one.seed
        for one in draws
        if one.family == "llama-padded" and not one.lora and not one.durable and one.steps > 2
        and one.schedule in ("constant", "cosine") and sum(d.count(PAD) for d in one.documents) > 2
    )  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(lookups.Passing, "turn", lambda self: None)
        with pytest.raises(
            ValueError, match=r"second derivative of the loss .*embed_tokens\.weight"
        ):  # at the first step
            differential.compare(padded, retrain=False)
        patch.setattr(first_step, "prove", lambda *given, **named: None)
        assert "scores" in differential.wrong(differential.compare(padded, retrain=False))
    clipped = next(one.seed for one in draws if one.max_grad_norm == 0.5 and 2 < one.steps < 5 and not one.durable)
    with monkeypatch.context() as patch:
        patch.setattr("retrograd.core.step.clip_pullback", lambda grads, limit, bars, *_: bars)
        assert "scores" in differential.wrong(differential.compare(clipped, retrain=False))
