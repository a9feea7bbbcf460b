"""A disk that fills on one process of a run in pieces: the others end in time and say why, and the run goes on."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import command, forked
from test_job import SHARD, arguments, scores
from test_job import world as world

from retrograd.cli import main
from retrograd.runs import files

KEPT = ["--replay.heartbeat", "0", "--replay.plan", "all", "--replay.memory", "0", "--patience", "30", *SHARD]


@pytest.fixture(scope="module")
def whole(world: Path) -> Path:
    assert command(2, arguments(world, world / "full-whole", "blocks", *KEPT)) == [0, 0]
    return world / "full-whole"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "name"),
    [(1, "state-000002.safetensors"), (1, "final.safetensors"), (1, "reverse.safetensors"),
     (0, "state-000002.safetensors"), (0, "reverse.safetensors")],
)  # fmt: skip
def test_a_disk_that_fills_on_one_rank(
    world: Path, whole: Path, tmp_path: Path, rank: int, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    asked = arguments(world, tmp_path / "run", "blocks", *KEPT)

    def job(mine: int) -> int:
        plain, full = files.rename, False

        def rename(temporary: Path, path: Path) -> Any:
            nonlocal full
            full = full or (mine == rank and path.name == name)
            if full:
                raise OSError(errno.ENOSPC, "No space left on device")
            return plain(temporary, path)

        files.rename = rename
        return main(asked)

    assert forked(2, job) == [1, 1]
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    file = tmp_path / f"run/checkpoints/of-2/rank-{rank}/{name}"
    assert any(line.startswith(f"error: the disk is full while writing {file}") for line in told), "the one that it is"
    others = f"error: rank {rank} failed: RunError: the disk is full while writing {file}" if rank else "rank 0"
    assert any(others in line for line in told), "the other one"
    assert not list(tmp_path.rglob(".*tmp*"))
    assert command(2, asked) == [0, 0]
    assert torch.equal(scores(tmp_path / "run"), scores(whole))
    lines = [(run / "metrics.jsonl").read_text().splitlines() for run in (tmp_path / "run", whole)]
    assert lines[0] == lines[1], "every step is told once"
