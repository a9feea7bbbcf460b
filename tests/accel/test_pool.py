"""Host memory that is used again: only what nobody uses any more, and no bit depends on it."""

from __future__ import annotations

import contextlib
import mmap
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import test_exactness
import torch
import worlds
from test_replay import GRADIENTS, ON_DISK, run

from retrograd.accel import pool
from retrograd.core import memory
from retrograd.core.step import Recipe, initial_state
from retrograd.runs.states.budget import Replay
from retrograd.runs.trajectory import Trajectory

SIZE = 4 << 20


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of all blocks that were asked of the machine."""
    real, sizes = pool._fresh, list[int]()

    def counted(size: int) -> mmap.mmap:
        sizes.append(size)
        return real(size)

    monkeypatch.setattr(pool, "_fresh", counted)
    return sizes


def while_reusing(limit: int = 1 << 62) -> contextlib.AbstractContextManager[object]:
    """The time between the items of a `reusing`."""
    items = pool.reusing([1, 2], limit)
    next(items)
    return contextlib.closing(items)


def test_a_block_is_used_again_when_no_view_of_it_is_left(blocks: list[int]) -> None:
    with while_reusing():
        first = pool.block(SIZE)
        first.fill_(1)
        place, view = first.data_ptr(), first[:8].view(torch.float64)[0]
        del first
        second = pool.block(SIZE)
        assert second.data_ptr() != place
        assert view.view(torch.int64) == 0x0101010101010101
        del view
        assert pool.block(SIZE).data_ptr() == place
        assert pool.block(SIZE + 64).data_ptr() != place
        assert blocks == [SIZE, SIZE, SIZE + 64]


def test_nothing_idle_is_kept_when_nobody_asks_for_it(blocks: list[int]) -> None:
    pool.block(SIZE)
    pool.block(SIZE)
    with while_reusing():
        pool.block(SIZE)
        with while_reusing():
            pool.block(SIZE)
        pool.block(SIZE)
        assert len(blocks) == 3
        outlives = pool.block(SIZE)
    pool.block(SIZE)
    del outlives
    with while_reusing():
        pool.block(SIZE)
        assert len(blocks) == 5


def test_no_more_is_idle_than_the_limit(blocks: list[int]) -> None:
    with while_reusing(2 * SIZE):
        three = [pool.block(SIZE) for _ in range(3)]
        three.clear()
        three = [pool.block(SIZE) for _ in range(3)]
        assert len(blocks) == 4
        three.clear()


def test_what_is_held_long_is_fresh_and_not_used_again(blocks: list[int]) -> None:
    with while_reusing():
        pool.block(SIZE)
        pool.held(SIZE)
        pool.block(SIZE)
    assert blocks == [SIZE, SIZE]


@pytest.mark.parametrize("size", [0, 12, SIZE], ids=["none", "small", "large"])
def test_memory_of_any_size(size: int) -> None:
    like = torch.zeros(size // 4, 1, dtype=torch.float32).t()
    with while_reusing():
        found = [memory.empty_like(like), pool.empty(like.shape, like)]
    for made in (*found, memory.empty_like(like)):
        assert (made.shape, made.dtype, made.is_contiguous()) == (like.shape, like.dtype, True)
        assert made.data_ptr() % 64 == 0 or not size
    assert [x.numel() for x in (pool.block(size), pool.held(size))] == [size, size]


@cache
def expected_of(recipe: Recipe) -> torch.Tensor:
    return run(recipe, Replay("all"))


@pytest.mark.parametrize("micro", [None, 2], ids=["whole", "micro-batches"])
@pytest.mark.parametrize("plan", ["all", "gradients", "on-disk", "binomial"])
@pytest.mark.parametrize("name", ["sgd", "sgd-nesterov-decay", "adamw-decay", "muon", "clipping-adamw"])
def test_what_is_written_into_idle_memory_changes_no_score(
    name: str, plan: str, micro: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(test_exactness.INGREDIENTS[name], micro_batch_size=micro)
    expected = expected_of(recipe)
    replay = {
        "all": Replay("all"),
        "gradients": GRADIENTS,
        "on-disk": replace(ON_DISK, memory=2_000),
        "binomial": Replay("binomial", slots=2, memory=2_000, disk=1 << 20),
    }[plan]
    monkeypatch.setattr(pool, "_LARGE", 1)
    used_again = spoiled(monkeypatch)
    assert torch.equal(run(recipe, replay, tmp_path if replay.disk else None), expected)
    assert used_again


def spoiled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of blocks that were used again; what they held has been overwritten."""
    take, sizes = pool._idle.take, list[int]()

    def taken(size: int) -> mmap.mmap | None:
        block = take(size)
        if block is not None:
            sizes.append(size)
        return block

    def given(block: mmap.mmap) -> None:
        block[:] = b"\xff" * len(block)  # not a number, in any dtype
        give(block)

    give = pool._idle.give
    monkeypatch.setattr(pool._idle, "take", taken)
    monkeypatch.setattr(pool._idle, "give", given)
    return sizes


def test_a_longer_run_asks_for_hardly_more_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blocks: list[int]
) -> None:
    monkeypatch.setattr(pool, "_LARGE", 1)
    recipe, asked = test_exactness.INGREDIENTS["adamw"], []
    for epochs in (2, 6):
        blocks.clear()
        training = worlds.training(recipe, worlds.Tokens(epochs=epochs))
        replay = Replay("all", memory=12_000, disk=1 << 20)
        whole = Trajectory(training, initial_state(recipe, worlds.params()), replay, tmp_path / str(epochs))
        whole.reverse(worlds.query(whole.train().params)[1])
        asked.append(len(blocks))
    assert asked[1] < 1.5 * asked[0]  # what is read ahead is a matter of time
