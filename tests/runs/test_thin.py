"""Gradients with many rows of zeros are held by the others, and come back with all their bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import worlds
from test_replay import ADAMW, GRADIENTS, ON_DISK, run
from test_store import Stream, gpu  # noqa: F401  a fixture

from retrograd.core import tree
from retrograd.core.optim import SGD, Params
from retrograd.core.step import Recipe
from retrograd.core.sweep import Event, Turned
from retrograd.runs.errors import RunError
from retrograd.runs.files import read_tensors
from retrograd.runs.states import sparse_rows as thin
from retrograd.runs.states import store
from retrograd.runs.states.budget import Replay
from retrograd.runs.states.sparse_rows import Rows, thin_like, thinned, whole
from retrograd.runs.states.store import Gradients


def sparse(rows: int, *shape: int, dtype: torch.dtype = torch.float32, live: int = 3) -> torch.Tensor:
    draw = torch.Generator().manual_seed(rows)
    found = torch.zeros(rows, *shape, dtype=dtype)
    place = torch.randperm(rows, generator=draw)[:live]
    found[place] = torch.randn(live, *shape, generator=draw).to(dtype)
    return found


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves of any size are held by rows, however many."""
    monkeypatch.setattr(thin, "_LARGE", 0)
    monkeypatch.setattr(thin, "_WORTH", 1)
    monkeypatch.setattr(store, "_SMALL", 0)


@pytest.mark.parametrize(
    ("leaf", "rows"),
    [
        (sparse(1000, 8), 3),
        (sparse(1000, 2, 3, dtype=torch.bfloat16), 3),
        (sparse(500, 7, dtype=torch.bfloat16), 3),  # a row of 14 bytes
        (sparse(100, 5, dtype=torch.float64), 3),
        (sparse(30, 4), 3),
        (torch.zeros(1000, 4), 0),
        (sparse(1000, 4).index_fill(0, torch.tensor([5]), -0.0), 4),
        (sparse(1000, 4, live=499), 499),
        (sparse(1000, 4, live=501), None),
        (torch.randn(1000, 4), None),
        (sparse(1000, 4).t(), None),
        (torch.zeros(1000), None),
        (torch.zeros(0, 4), None),
        (torch.zeros(4, 0), None),
    ],
)
def test_rows_that_are_not_zero(monkeypatch: pytest.MonkeyPatch, leaf: torch.Tensor, rows: int | None) -> None:
    monkeypatch.setattr(thin, "_LARGE", 0)
    given = {"leaf": leaf, "other": torch.ones(3)}
    found = thinned(given)
    assert (len(found["leaf"].index) if isinstance(found["leaf"], Rows) else None) == rows
    assert tree.digest(whole(found, given)) == tree.digest(given)
    again = thin_like(given, tree.named(found), "")
    assert {name: type(x) for name, x in again.items()} == {name: type(x) for name, x in found.items()}


def test_small_leaves_stay() -> None:
    assert isinstance(thinned({"x": torch.zeros(1000, 4)})["x"], torch.Tensor)
    assert isinstance(thinned({"x": torch.zeros(1 << 18, 1)})["x"], Rows)


@pytest.mark.parametrize("recipe", [ADAMW, Recipe(SGD(0.1, momentum=0.9))], ids=["adamw", "momentum"])
@pytest.mark.parametrize("replay", [GRADIENTS, ON_DISK], ids=["memory", "disk"])
def test_the_same_scores(tmp_path: Path, small: None, recipe: Recipe, replay: Replay) -> None:
    expected, kept = run(recipe, Replay("all")), []

    def seen(event: Event) -> None:
        if isinstance(event, Turned):
            kept.extend(read_tensors(path)[0] for path in tmp_path.glob("gradient-*"))

    folder = tmp_path if replay.disk else None
    assert torch.equal(run(recipe, replay, folder, seen), expected)
    assert all("params.embed.index" in tensors and "params.embed" not in tensors for tensors in kept)
    assert bool(kept) == bool(replay.disk)


@pytest.mark.parametrize("on_disk", [0, 99])
@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_a_store_of_gradients(
    tmp_path: Path, small: None, on_disk: int, device: str, request: pytest.FixtureRequest
) -> None:
    stream: Stream | None = request.getfixturevalue("gpu") if device == "gpu" else None
    given = [gradient(step) for step in range(4)]
    held = Gradients(given[0], tmp_path, "run", on_disk)
    for step, one in enumerate(given):
        held.put(step, one)
    held.store.settle()
    assert stream is None or stream.asked
    assert all(isinstance(kept.params["embed"], Rows) for kept in held.store.memory.values())
    assert len(held.store.memory) == (0 if on_disk else 4)
    held.follow([3, 2, 1, 0])
    for step in (3, 2, 1, 0):
        found = held.get(step)
        assert found is not None
        assert tree.digest(found) == tree.digest(given[step])
        assert list(found) == list(given[step])


@pytest.mark.parametrize("part", ["index", "values"])
def test_a_flipped_bit_is_told(tmp_path: Path, small: None, part: str) -> None:
    held = Gradients(gradient(3), tmp_path, "run", 9)
    held.put(0, gradient(3))
    held.store.settle()
    path = tmp_path / "gradient-000001.safetensors"
    raw, wanted = bytearray(path.read_bytes()), read_tensors(path)[0][f"params.embed.{part}"]
    place = raw.index(wanted.numpy().tobytes())
    raw[place + 3] ^= 64  # of an index, a row far beyond the last
    path.write_bytes(raw)
    with pytest.raises(RunError, match="does not have the bits that were written"):
        held.get(0)


def gradient(step: int) -> Params:
    return {"embed": sparse(40, 6, live=step), "head": torch.randn(40, 6), "bias": torch.ones(6) * step}


def test_this_world_has_rows_without_a_token() -> None:
    params = worlds.params()
    training = worlds.training(ADAMW)
    _, grads, _ = training.engine.gradient(params, [training.stream[0]], training.weights, None)
    assert not grads["embed"][9:].any()
