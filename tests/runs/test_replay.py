"""Kept gradients: a state made again by the update alone is the one that was, and what is kept is chosen on integers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import test_exactness
import torch
import worlds
from test_blocks import build
from test_blocks import stream as text
from test_store import until

from retrograd.core import tree
from retrograd.core.engine import Blocks, Double
from retrograd.core.optim import AdamW, Params
from retrograd.core.plan import Snapshot, Turn, binomial, binomial_advances, check, enough
from retrograd.core.slots import ReplayDriftError
from retrograd.core.step import Recipe, Training, initial_state
from retrograd.core.sweep import Advanced, Event, Remade, Turned
from retrograd.data.stream import DataStream
from retrograd.lm.chain import decoder_chain
from retrograd.lm.model import causal_objective, trainable
from retrograd.runs.errors import RunError
from retrograd.runs.states import store
from retrograd.runs.states.budget import Layout, Replay, layout
from retrograd.runs.states.store import Store
from retrograd.runs.trajectory import Trajectory

GRADIENTS = Replay("gradients", slots=2)
ADAMW = Recipe(AdamW(1e-2, eps_root=1e-6))
ON_DISK = Replay("gradients", slots=2, memory=1, disk=1 << 30)


def run(
    recipe: Recipe, replay: Replay, folder: Path | None = None, observe: Callable[[Event], None] = lambda event: None
) -> torch.Tensor:
    training = worlds.training(recipe)
    whole = Trajectory(training, initial_state(recipe, worlds.params()), replay, folder, "run", observe)
    scores = whole.reverse(worlds.query(whole.train().params)[1])
    whole.clean()
    return scores


@pytest.fixture
def gradients(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A word for each gradient that `double` computes of itself, and not within a pullback."""
    real, calls = Double.gradient, []

    def counted(self: Double, *given: Any) -> Any:
        calls.append("gradient")
        return real(self, *given)

    monkeypatch.setattr(Double, "gradient", counted)
    return calls


@pytest.mark.parametrize("micro", [None, 2], ids=["whole", "micro-batches"])
@pytest.mark.parametrize("name", ["sgd", "sgd-nesterov-decay", "adamw-decay", "muon", "clipping", "clipping-adamw"])
def test_the_same_bits_without_a_second_gradient(name: str, micro: int | None, gradients: list[str]) -> None:
    recipe = replace(test_exactness.INGREDIENTS[name], micro_batch_size=micro)
    expected, events = run(recipe, Replay("all")), []
    gradients.clear()
    assert torch.equal(run(recipe, GRADIENTS, observe=events.append), expected)
    assert len(gradients) == 6  # one for each step, and none on the way back: several micro-batches take the kept one
    assert sum(isinstance(event, Remade) for event in events) == binomial_advances(6, 2) - 5
    assert not any(isinstance(event, Advanced) and event.replayed for event in events)


@pytest.mark.parametrize("recipe", [
    Recipe(AdamW(3e-3, eps_root=1e-6)), Recipe(AdamW(3e-3, eps_root=1e-6), max_grad_norm=0.1, micro_batch_size=1),
], ids=["adamw", "clipping"])  # fmt: skip
@pytest.mark.parametrize("kind", ["double", "blocks"])
def test_the_same_bits_of_a_language_model(kind: str, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    module, rows = build("gpt2-tied", torch.float32), text(torch.float32)
    data = DataStream(rows.rows, 2, epochs=2, weight_shape=tuple(rows.weights.shape))
    engine = Blocks(decoder_chain(module)) if kind == "blocks" else Double(causal_objective(module)[0])
    training, passes, found = Training(recipe, engine, data, data.weights), [], []
    if kind == "blocks":
        real = Blocks.first
        monkeypatch.setattr(Blocks, "first", lambda *given: (passes.append(1), real(*given))[1])
    for replay in (Replay("all"), GRADIENTS):
        whole = Trajectory(training, initial_state(recipe, trainable(module)[0]), replay)
        final = whole.train()
        _, grads, _ = engine.gradient(final.params, [text(torch.float32)[0]], rows.weights, None)
        passes.clear()
        found.append(whole.reverse({name: g[None] for name, g in grads.items()}))
        if kind == "blocks" and replay.plan == "gradients":
            assert not passes  # not even for the clipped gradient, which the moments do not hold
    assert torch.equal(*found)


def test_a_norm_has_the_same_bits_however_the_gradient_lay() -> None:
    """Of a weight used transposed the gradient is transposed; clipping divides by a norm, summed in another order."""
    draw = torch.Generator().manual_seed(0)
    params = {"w": torch.randn(301, 57, generator=draw)}
    data = DataStream({"x": torch.randn(12, 301, generator=draw)}, 2)

    def objective(p: Params, inputs: Any, c: torch.Tensor) -> torch.Tensor:
        return (torch.tanh(inputs["x"] @ p["w"].T.contiguous().T * 0.1).square().sum(1) * c).sum()

    training = Training(Recipe(AdamW(1e-2, eps_root=1e-6), max_grad_norm=0.1), Double(objective), data, data.weights)
    assert not training.engine.gradient(params, [data[0]], data.weights, None)[1]["w"].is_contiguous()
    found = []
    for replay in (Replay("all"), GRADIENTS):
        whole = Trajectory(training, initial_state(training.recipe, params), replay)
        found.append(whole.reverse({"w": whole.train().params["w"][None]}))
    assert torch.equal(*found)


def test_a_wrong_gradient_makes_another_state_and_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    real = store.Gradients.get

    def wrong(self: store.Gradients, step: int) -> Params | None:
        found = real(self, step)
        return None if found is None else tree.map(lambda g: g * (1 + 1e-9), found)

    monkeypatch.setattr(store.Gradients, "get", wrong)
    with pytest.raises(ReplayDriftError, match="replayed state"):
        run(ADAMW, GRADIENTS)


@pytest.mark.parametrize("missing", [(), (2,), (1, 4, 5), (1, 2, 3, 4, 5, 6)], ids=str)
def test_a_killed_run_uses_the_gradients_that_are_there(tmp_path: Path, missing: tuple[int, ...]) -> None:
    expected, told = run(ADAMW, Replay("all")), []

    def killed(event: Event) -> None:
        told.append(event)
        if isinstance(event, Turned):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(ADAMW, ON_DISK, tmp_path, killed)
    until(lambda: len(list(tmp_path.glob("gradient-*.safetensors"))) == 6)  # the last is on its way
    for step in missing:
        (tmp_path / f"gradient-{step:06d}.safetensors").unlink()
    told.clear()
    assert torch.equal(run(ADAMW, ON_DISK, tmp_path, told.append), expected)
    assert sum(isinstance(event, Advanced) and event.replayed for event in told) <= len(missing)
    assert any(isinstance(event, Remade) for event in told)  # some are needed twice, and kept when taken again
    assert sorted(file.name for file in tmp_path.iterdir()) == ["digests.txt", "final.safetensors"]


def test_a_flipped_bit_in_a_gradient_is_told(tmp_path: Path) -> None:
    def damaged(event: Event) -> None:
        path = tmp_path / "gradient-000002.safetensors"
        if isinstance(event, Turned):
            raw = bytearray(path.read_bytes())
            raw[-5] ^= 1
            path.write_bytes(raw)

    with pytest.raises(RunError, match=r"gradient-000002.* does not have the bits .* the gradient is computed again"):
        run(ADAMW, ON_DISK, tmp_path, damaged)
    (tmp_path / "gradient-000002.safetensors").unlink()  # as the message says
    assert torch.equal(run(ADAMW, ON_DISK, tmp_path), run(ADAMW, Replay("all")))


def test_kept_gradients_serve_further_sweeps(tmp_path: Path, gradients: list[str]) -> None:
    keep = Replay("gradients", memory=1 << 30, disk=1 << 30, keep=True)
    expected = run(ADAMW, keep, tmp_path)
    names = sorted(file.name for file in tmp_path.glob("gradient-*"))
    assert names == [f"gradient-{step:06d}.safetensors" for step in range(1, 7)]
    for replay in (keep, Replay("binomial", slots=2, disk=1 << 30, keep=True)):  # whatever the next one plans
        gradients.clear()
        assert torch.equal(run(ADAMW, replay, tmp_path), expected)
        assert not gradients
    assert sorted(file.name for file in tmp_path.glob("gradient-*")) == names


def test_states_made_again_are_held_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_SMALL", 0)
    packed, real = [], Store._in_memory
    monkeypatch.setattr(Store, "_in_memory", lambda self, state: (packed.append(state.step), real(self, state))[1])
    run(ADAMW, GRADIENTS)
    actions = binomial(6, 2)
    trained = sum(isinstance(action, Snapshot) for action in actions[: actions.index(Turn())])
    assert check(actions, 6).snapshots > trained
    assert len(packed) == trained - 1 + 6  # of training, but for the initial state, and the gradients


@pytest.mark.parametrize("repeats", [1, 2, 3])
def test_enough_slots_are_the_fewest(repeats: int) -> None:
    for steps in range(1, 80):
        slots = enough(steps, repeats)
        assert math.comb(slots + repeats, repeats) >= steps
        assert slots == 1 or math.comb(slots - 1 + repeats, repeats) < steps


def chosen(replay: Replay, steps: int = 64, state: int = 300, gradient: int = 100, **more: bool) -> Layout:
    return layout(replay, steps, state, gradient, **{"elementwise": True, **more})


def test_auto_keeps_gradients_where_they_take_two_thirds_or_less() -> None:
    found = chosen(Replay())
    assert (found.kind, found.cost.slots, found.cost.replays) == ("gradients", 10, 53)
    assert (found.held_bytes, found.gradients_on_disk) == (10 * 300 + 64 * 100, 0)
    assert chosen(Replay(), gradient=300).kind == "all"  # plain SGD: a state is no larger
    assert chosen(Replay(), elementwise=False).kind == "all"  # Muon's update is no less work than a gradient
    assert chosen(Replay(), steps=2).kind == "all"
    assert chosen(Replay(memory=9_400)).kind == "gradients"
    assert chosen(Replay(), on_host=False).kind == "all"  # a GPU would copy states made again there and back
    assert chosen(Replay(memory=12_000), on_host=False).kind == "gradients"  # where 40 states would fit


def test_auto_takes_fewer_states_before_it_takes_gradients_again() -> None:
    found = chosen(Replay(memory=8_000))
    assert (found.kind, found.cost.slots) == ("gradients", 5)
    assert found.extra < chosen(Replay("binomial", memory=8_000)).extra
    assert chosen(Replay(memory=7_000)).kind == "binomial"  # two states beside them: each step six times again
    tight = chosen(Replay(memory=6_300))  # no room for a state beside them
    assert (tight.kind, tight.cost.slots) == ("binomial", 21)
    several = chosen(Replay(memory=1000 * 100 + 300), steps=1000)  # one state made again from the first, 500 times each
    assert (several.kind, several.cost.slots) == ("binomial", 334)


def test_gradients_go_to_disk_when_memory_does_not_hold_them() -> None:
    found = chosen(Replay(memory=5_000, disk=1 << 30))
    assert (found.kind, found.on_disk, found.gradients_on_disk) == ("gradients", 0, 64 - 20)
    assert chosen(Replay(memory=0, disk=1 << 30)).kind == "all"  # states made again would be written and read again
    kept = chosen(Replay(memory=1 << 30, disk=1 << 30, keep=True))
    assert (kept.kind, kept.gradients_on_disk) == ("gradients", 64)


def test_gradients_that_do_not_fit_are_refused_with_the_numbers() -> None:
    with pytest.raises(ValueError, match="holds 1 state of 300 bytes and 64 gradients of 100 bytes, and memory 6,399"):
        chosen(Replay("gradients", memory=6_399))
    with pytest.raises(ValueError, match="holds 30 states of 300 bytes and 64 gradients"):
        chosen(Replay("gradients", memory=9_000, slots=30))
    with pytest.raises(ValueError, match=r"plan 'binomial' holds 1 state .* and memory 200 and disk 0 bytes do not"):
        chosen(Replay(memory=200))
