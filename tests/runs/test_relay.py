"""A trajectory's files, whole and in pieces: every layout has the bits, and a file that does not is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from retrograd.core import tree
from retrograd.core.optim import AdamW, Cotangent, Params
from retrograd.core.step import Recipe, State, initial_state
from retrograd.runs.errors import RunError
from retrograd.runs.files import append_line, read_tensors, write_tensors
from retrograd.runs.states.relay import part_of, relay

SHARDS, IDENTITY = 4, "3-mine"
RECIPE = Recipe(AdamW(0.1, spared=("a.weight",)), pieces=SHARDS)


def params(seed: int, *lead: int) -> Params:
    """One name ends with another, and no size divides."""
    draw = torch.Generator().manual_seed(seed)
    shapes = {"weight": (7, 3), "a.weight": (5,), "scale": ()}
    return {name: torch.randn((*lead, *shape), generator=draw) for name, shape in shapes.items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """State 3, the final one, and a cotangent of two queries with the scores so far."""
    for name, step in (("state-000003", 3), ("final", 5)):
        state = State(step, params(step), {"m": params(step + 10), "v": params(step + 20)})
        digest = tree.digest((state.params, state.moments))
        metadata = {"step": str(step), "identity": IDENTITY, "digest": digest}
        write_tensors(tmp_path / f"{name}.safetensors", tree.named(state), metadata)
    cotangent, scores = Cotangent(params(6, 2), {"m": params(7, 2), "v": params(8, 2)}), torch.randn(2, 9)
    metadata = {"step": "4", "identity": IDENTITY, "digest": tree.digest((cotangent, scores)), "query": "asked"}
    write_tensors(tmp_path / "reverse.safetensors", {**tree.named(cotangent), "scores": scores}, metadata)
    append_line(tmp_path / "digests.txt", "identity x")
    return tmp_path


def laid(folder: Path, size: int, replicas: int = 1) -> None:
    relay(folder, initial_state(RECIPE, params(0)), RECIPE, (replicas, size), IDENTITY)


def read(folder: Path) -> dict[str, tuple[Params, dict[str, str]]]:
    return {path.name: read_tensors(path) for path in sorted(folder.glob("*.safetensors"))}


def test_every_layout_has_the_bits(folder: Path) -> None:
    before = read(folder)
    for size, replicas, name in ((2, 1, "of-2"), (4, 1, "of-4"), (2, 2, "of-2x2"), (1, 4, "of-4x1"), (2, 1, "of-2")):
        laid(folder, size, replicas)
        assert not list(folder.glob("*.safetensors"))
        assert [path.name for path in folder.iterdir()] == [name]
        for rank in range(size * replicas):
            assert len(read(part_of(folder, replicas, size, rank))) == 3
            assert (part_of(folder, replicas, size, rank) / "digests.txt").exists()
    laid(folder, 1)
    after = read(folder)
    assert after.keys() == before.keys()
    for name, (tensors, metadata) in before.items():
        assert after[name][1] == metadata
        assert all(torch.equal(after[name][0][key], x) for key, x in tensors.items())


def test_what_not_every_process_has_is_left_behind(folder: Path) -> None:
    laid(folder, 2)
    (part_of(folder, 1, 2, 1) / "state-000003.safetensors").unlink()
    path = part_of(folder, 1, 2, 1) / "reverse.safetensors"
    tensors, metadata = read_tensors(path)
    write_tensors(path, tensors, {**metadata, "step": "3"})  # killed between two writes
    laid(folder, 1)
    assert list(read(folder)) == ["final.safetensors"]


@pytest.mark.parametrize("lost", [False, True])
def test_a_cotangent_that_processes_have_of_two_steps_is_of_none(folder: Path, lost: bool) -> None:
    laid(folder, 2)
    first, second = (part_of(folder, 1, 2, rank) / "reverse.safetensors" for rank in range(2))
    laid(folder, 2)
    assert first.exists()
    assert second.exists()
    tensors, metadata = read_tensors(second)
    second.unlink()
    if not lost:
        write_tensors(second, tensors, {**metadata, "step": "3"})
    laid(folder, 2)
    assert not first.exists()
    assert not second.exists()
    second.write_bytes(b"torn")
    with pytest.raises(RunError, match=r"broken or truncated \(4 bytes\)"):
        laid(folder, 2)


def test_what_every_process_of_one_replica_has_is_taken(folder: Path) -> None:
    laid(folder, 2, 2)
    first, second = (part_of(folder, 2, 2, rank) for rank in (0, 3))
    (first / "state-000003.safetensors").unlink()
    (second / "final.safetensors").unlink()
    for place in (0, 3):
        path = part_of(folder, 2, 2, place) / "reverse.safetensors"
        tensors, metadata = read_tensors(path)
        write_tensors(path, tensors, {**metadata, "step": "3"})
    laid(folder, 1)
    assert list(read(folder)) == ["final.safetensors", "state-000003.safetensors"]


def test_a_kill_on_the_way_leaves_one_layout_that_counts(folder: Path) -> None:
    whole = folder.with_name("whole")
    shutil.copytree(folder, whole)
    laid(folder, 2)
    for path in whole.glob("*.safetensors"):  # as before the whole files went
        shutil.copy(path, folder)
    laid(folder, 2)
    assert not list(folder.glob("*.safetensors"))
    laid(folder, 1)
    assert {name: more for name, (_, more) in read(folder).items()} == {n: m for n, (_, m) in read(whole).items()}


def test_a_broken_or_foreign_file_is_refused(folder: Path) -> None:
    laid(folder, 2)
    path = part_of(folder, 1, 2, 0) / "final.safetensors"
    tensors, metadata = read_tensors(path)
    write_tensors(path, {**tensors, "params.weight@0": tensors["params.weight@0"] + 1}, metadata)
    with pytest.raises(RunError, match="does not have the bits that were written"):
        laid(folder, 1)
    write_tensors(path, tensors, {**metadata, "identity": "3-other"})
    with pytest.raises(RunError, match="was written by another run"):
        laid(folder, 4)
