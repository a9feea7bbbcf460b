"""A Trainer's folder belongs to one function, its cotangents to one query, and a run goes on where another ended."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from retrograd import BackwardState, DataStream, Trainer, TrainerState
from retrograd.core import check, tree
from retrograd.core.sweep import Advanced, Reversed
from retrograd.optim import adamw, muon, sgd
from retrograd.runs.errors import RunError
from retrograd.runs.states.budget import Replay

EVERY = Replay(memory=0, disk=1 << 40, keep=True, plan="all", heartbeat=0.0)


class Held(nn.Module):
    """A classifier with a buffer, a frozen layer and dropout."""

    def __init__(self, scale: float = 1.0, frozen: int = 0, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.dropout = nn.Linear(3, 8), nn.Linear(8, 3), nn.Dropout(dropout)
        torch.manual_seed(frozen)
        self.base = nn.Linear(3, 3)
        self.base.requires_grad_(False)
        self.register_buffer("scale", torch.tensor(scale))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.last(self.dropout(torch.tanh(self.first(self.base(x)))))


def cross_entropy(model: nn.Module) -> Callable[[Any, Any], Tensor]:
    return lambda p, b: F.cross_entropy(functional_call(model, p, (b["x"],)), b["y"], reduction="none")


def data(count: int, seed: int, **options: Any) -> DataStream:
    draw = torch.Generator().manual_seed(seed)
    x, y = torch.randn(count, 3, generator=draw, dtype=torch.float64), torch.randint(0, 3, (count,), generator=draw)
    return DataStream({"x": x, "y": y}, 4, **options)


def made(optimizer: Any = None, **options: Any) -> tuple[Trainer, TrainerState]:
    model = Held(**options)
    return Trainer.initialize(model, optimizer or sgd(0.3, 0.9), cross_entropy(model))


class Transformation(NamedTuple):
    init: Callable[..., Any]
    update: Callable[..., Any]


def foreign(lr: float) -> Transformation:
    return Transformation(lambda p: {}, lambda g, s, params=None: ({n: -lr * x for n, x in g.items()}, s))


def squared(model: nn.Module) -> Callable[[Any, Any], Tensor]:
    return lambda p, b: (functional_call(model, p, (b["x"],)) ** 2).sum(1)


OTHERS: dict[str, Callable[[], tuple[Trainer, TrainerState]]] = {
    "frozen weights": lambda: made(frozen=1),
    "buffer": lambda: made(scale=2.0),
    "learning rate": lambda: made(sgd(lambda step: 0.2, 0.9)),
    "foreign optimizer": lambda: made(foreign(0.1)),
    "loss": lambda: (lambda model: Trainer.initialize(model, sgd(0.3, 0.9), squared(model)))(Held()),
    "dropout's rate": lambda: made(dropout=0.5),
}


@pytest.mark.parametrize("name", OTHERS)
def test_the_folder_of_another_function_is_refused(name: str, tmp_path: Path) -> None:
    trainer, state = made()
    trainer.train(state, data(8, 1), tmp_path)
    other, state = OTHERS[name]()
    with pytest.raises(RunError, match=r"was written by another run .*frozen weights.*use another folder"):
        other.train(state, data(8, 1), tmp_path)
    again, state = made()
    assert again.train(state, data(8, 1), tmp_path).step == 2  # its own is read


@pytest.mark.parametrize("first, second", [(0.3, 0.01), (lambda step: 0.3, lambda step: 0.01)], ids=["float", "call"])
def test_settings_of_foreign_optimizers_and_callable_rates_count(first: Any, second: Any, tmp_path: Path) -> None:
    make = foreign if isinstance(first, float) else sgd
    trainer, state = made(make(first))
    trainer.train(state, data(8, 1), tmp_path)
    other, state = made(make(second))
    with pytest.raises(RunError, match="was written by another run"):
        other.train(state, data(8, 1), tmp_path)


def test_digests_alone_are_another_runs_too(tmp_path: Path) -> None:
    def die(event: Any) -> None:
        if isinstance(event, Advanced) and event.step == 1:
            raise KeyboardInterrupt

    least = Replay(plan="binomial", slots=1)  # no state is on disk yet
    trainer, state = made()
    with pytest.raises(KeyboardInterrupt):
        trainer.train(state, data(12, 1), tmp_path, replay=least, observe=die)
    assert [file.name for file in tmp_path.iterdir()] == ["digests.txt"]
    other, start = made(scale=2.0)
    with pytest.raises(RunError, match=r"was written by another run"):
        other.train(start, data(12, 1), tmp_path, replay=least)
    assert trainer.train(state, data(12, 1), tmp_path, replay=least).step == 3
    lines = (tmp_path / "digests.txt").read_text().splitlines()
    (tmp_path / "final.safetensors").unlink()
    (tmp_path / "digests.txt").write_text("".join(f"{line}\n" for line in lines[1:]))
    with pytest.raises(RunError, match=r"was written by an earlier version of retrograd \(run 1 [0-9a-f]+\)"):
        trainer.train(state, data(12, 1), tmp_path, replay=least)


def test_weights_frozen_in_place_are_seen_by_the_next_call(tmp_path: Path) -> None:
    trainer, state = made()
    trainer.train(state, data(8, 1), tmp_path)
    with torch.no_grad():
        trainer.module.base.weight.add_(1e-3)
    with pytest.raises(RunError, match="was written by another run"):
        trainer.train(state, data(8, 1), tmp_path)


def test_a_killed_sweep_is_gone_on_with_by_its_own_query_only(tmp_path: Path) -> None:
    class Kill(Exception):
        pass

    def die(event: Any) -> None:
        if isinstance(event, Reversed) and event.step == 1:
            raise Kill

    stream, (trainer, state) = data(12, 1), made()
    final = trainer.train(state, stream, tmp_path, replay=EVERY)
    queries = [trainer.evaluate(final, data(5, seed)) for seed in (7, 8)]
    with pytest.raises(Kill):
        trainer.backward(tmp_path, stream, queries[0], replay=EVERY, observe=die)
    assert [file.name for file in tmp_path.glob("reverse*")], "the kill left a cotangent behind"
    seen: list[int] = []
    for query, first in ((queries[1], {2}), (queries[0], {0, 1})):  # the other begins anew, its own goes on
        seen.clear()
        fresh, start = made()
        found = fresh.backward(
            tmp_path, stream, query, replay=EVERY,
            observe=lambda event: seen.append(event.step) if isinstance(event, Reversed) else None,
        )  # fmt: skip
        assert seen[0] in first
        fresh.train(start, stream)
        assert torch.equal(found.weight_grads, fresh.backward(None, stream, query).weight_grads)
    assert not list(tmp_path.glob("reverse*"))


def test_a_cotangent_under_one_key_is_refused_to_another_query(tmp_path: Path) -> None:
    stream, (trainer, state) = data(12, 1), made()
    final = trainer.train(state, stream, tmp_path, replay=EVERY)
    queries = [trainer.evaluate(final, data(5, seed)).gradient for seed in (7, 8)]
    trajectory = trainer._trajectory(state, trainer._fitting(stream), tmp_path, EVERY, lambda event: None)
    trajectory.train()
    trajectory.reverse(queries[0])  # its last cotangent stays until `clean`
    with pytest.raises(RunError, match=r"a sweep of another query.*Finish that query first, or delete the file"):
        trajectory.reverse(queries[1])


def test_a_query_is_asked_with_dropout_off_and_the_mode_comes_back() -> None:
    model = Held(dropout=0.5)
    trainer, state = Trainer.initialize(model, sgd(0.1), cross_entropy(model), dropout=True)
    final = trainer.train(state, data(8, 1))
    one, other = (trainer.evaluate(final, data(5, 2)) for _ in range(2))
    assert all(part.training for part in model.modules())
    assert tree.digest(one) == tree.digest(other)
    model.eval()
    batch = data(5, 2).rows
    torch.testing.assert_close(one.value, cross_entropy(model)(final.params, batch).mean())
    seen = trainer.evaluate(final, lambda params: (torch.tensor([float(model.training)]), {}))
    assert seen.value == 0


OPTIMIZERS = {
    "adamw": lambda: adamw(lambda step: 0.03 / (1 + step), eps_root=1e-6, weight_decay=0.1),
    "sgd": lambda: sgd(0.1, 0.9),
    "muon": lambda: muon(0.01),
}
REPLAYS = {
    "memory": (False, None), "disk": (True, None), "binomial": (True, Replay(plan="binomial", slots=2)),
    "on disk": (True, Replay(memory=1, disk=1 << 40, heartbeat=0.0)),
    "gradients": (False, Replay(plan="gradients", slots=1)),
}  # fmt: skip


@pytest.mark.parametrize(
    "optimizer, kept", [*(("adamw", kept) for kept in REPLAYS), ("sgd", "memory"), ("muon", "disk")]
)
def test_a_run_goes_on_with_the_bits_of_one_run_and_its_scores(optimizer: str, kept: str, tmp_path: Path) -> None:
    (save, replay), model = REPLAYS[kept], Held(dropout=0.2)
    places = [tmp_path / name if save else None for name in ("first", "second")]
    trainer, start = Trainer.initialize(model, OPTIMIZERS[optimizer](), cross_entropy(model), dropout=True)
    whole, half = data(10, 1, epochs=3), data(10, 1, epochs=1)
    steps: list[int] = []
    final = trainer.train(start, whole)
    query = trainer.evaluate(final, data(5, 2))
    expected = trainer.backward(None, whole, query)

    middle = trainer.train(start, half, places[0], replay=replay)
    assert middle.step == 3
    first = trainer._last
    went_on = trainer.train(
        middle, whole, places[1], replay=replay,
        observe=lambda event: steps.append(event.step) if isinstance(event, Advanced) else None,
    )  # fmt: skip
    assert (went_on.step, steps[0]) == (9, 3)
    assert tree.digest(went_on) == tree.digest(final)

    late = trainer.backward(places[1], whole, query, replay=replay)
    trainer._last = first  # a folder would be found by itself
    early = trainer.backward(places[0], half, late._replace(weight_grads=None), start=start, replay=replay)
    assert check.relative_error(late.weight_grads + early.weight_grads, expected.weight_grads) < 1e-12
    assert check.relative_error(1.001 * late.weight_grads + early.weight_grads, expected.weight_grads) > 1e-6
    for name, bar in expected.param_grads.items():
        torch.testing.assert_close(early.param_grads[name], bar, rtol=1e-10, atol=1e-14)


def test_a_run_that_goes_on_is_resumed_after_a_kill(tmp_path: Path) -> None:
    class Kill(Exception):
        pass

    def die(event: Any) -> None:
        if isinstance(event, (Advanced, Reversed)) and event.step == 5:
            raise Kill

    trainer, start = made(adamw(0.03, eps_root=1e-6))
    whole, replay = data(10, 1, epochs=3), Replay(plan="binomial", slots=2, disk=1 << 40, heartbeat=0.0)
    middle = trainer.train(start, data(10, 1))
    with pytest.raises(Kill):
        trainer.train(middle, whole, tmp_path, replay=replay, observe=die)
    final = trainer.train(middle, whole, tmp_path, replay=replay)
    assert tree.digest(final) == tree.digest(trainer.train(start, whole))
    query = trainer.evaluate(final, data(5, 2))
    with pytest.raises(Kill):
        trainer.backward(tmp_path, whole, query, start=middle, replay=replay, observe=die)
    fresh, _ = made(adamw(0.03, eps_root=1e-6))
    found = fresh.backward(tmp_path, whole, query, start=middle, replay=replay)
    trainer.train(middle, whole)
    expected = trainer.backward(None, whole, query)
    assert torch.equal(found.weight_grads, expected.weight_grads)
    with pytest.raises(RunError, match="was written by another run"):
        fresh.backward(tmp_path, whole, query, start=start)


def test_a_finished_state_is_told_what_to_do_and_a_new_phase_begins_afresh() -> None:
    trainer, start = made(adamw(0.03, eps_root=1e-6))
    final = trainer.train(start, data(8, 1))
    with pytest.raises(ValueError, match=r"at step 2 and the stream ends at step 2.*trainer.restart\(state\)"):
        trainer.train(final, data(8, 1))
    with pytest.raises(ValueError, match="nothing left to train"):
        trainer.validate(final, data(8, 1), data(4, 2), torch.zeros(8))
    phase = trainer.restart(final)
    assert phase.step == 0
    assert all((x == 0).all() for x in tree.leaves(phase.moments))
    assert trainer.train(phase, data(8, 1)).step == 2


def test_several_queries_and_states_of_optax_shape_are_pulled_back() -> None:
    trainer, start = made(adamw(0.03, eps_root=1e-6))
    stream = data(8, 1)
    final = trainer.train(start, stream)
    one, other = (trainer.evaluate(final, data(5, seed)) for seed in (2, 3))
    plain = {name: g[0] for name, g in one.gradient.items()}
    expected = trainer.backward(None, stream, one)
    zeros = [torch.zeros_like(x) for x in tree.leaves(final.moments)]
    trainer.train(start, stream)
    single = trainer.backward(None, stream, BackwardState(plain, zeros, torch.ones_like(stream.weights)))
    assert torch.equal(single.weight_grads, 1 + expected.weight_grads)
    assert single.value is None
    both = {name: torch.cat([g, other.gradient[name]]) for name, g in one.gradient.items()}
    trainer.train(start, stream)
    found = trainer.backward(None, stream, BackwardState(both, None, None))
    assert found.weight_grads.shape == (2, 8)
    torch.testing.assert_close(found.weight_grads[0], expected.weight_grads)
    assert found.param_grads["first.weight"].shape == (2, 8, 3)


@pytest.mark.parametrize("change, told", [
    (lambda q: q._replace(param_grads={}), r"missing \['first.bias', 'first.weight', 'last.bias'\], unknown \[\]"),
    (lambda q: q._replace(param_grads={**q.param_grads, "last.bias": torch.zeros(4)}), r"gradient of last.bias has"),
    (lambda q: q._replace(opt_grads=[torch.zeros(1)]), "opt_grads has 1 tensors; this optimizer's moments have 8"),
    (lambda q: q._replace(opt_grads=[torch.zeros(1)] * 8), r"a tensor of opt_grads has shape \(1, 1\)"),
    (lambda q: q._replace(weight_grads=torch.zeros(3)), r"weight_grads has shape \(3,\); for this run .*\(8,\)"),
])  # fmt: skip
def test_a_cotangent_that_does_not_fit_is_refused(change: Callable[[BackwardState], BackwardState], told: str) -> None:
    trainer, start = made(adamw(0.03, eps_root=1e-6))
    trainer.train(start, data(8, 1))
    fitting = BackwardState({name: torch.ones_like(x) for name, x in start.params.items()}, None, None)
    with pytest.raises(ValueError, match=told):
        trainer.backward(None, data(8, 1), change(fitting))
