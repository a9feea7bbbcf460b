"""Further queries of a run by the processes of a job: the bits of one process, and of one that was killed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from ranks import command
from test_job import arguments, killed, scores
from test_job import world as world

from retrograd.cli import main
from retrograd.core import tree
from retrograd.runs.files import read_tensors


@pytest.fixture(scope="module")
def run(world: Path) -> Path:
    """Of two logical shards, in one process."""
    assert main(arguments(world, world / "asked", "blocks", "--shards", "2", "--train.epochs", "1")) == 0
    assert main(asking(world, world / "asked", "alone")) == 0
    return world / "asked"


def asking(world: Path, run: Path, name: str, *more: str) -> list[str]:
    return ["query", str(run), "--name", name, "--query.dataset", f"{world}/train.jsonl", "--query.limit", "3",
            "--query.reduction", "none", *more]  # fmt: skip


def checkpoints(run: Path) -> list[str]:
    return sorted(str(path.relative_to(run)) for path in (run / "checkpoints").rglob("*") if path.is_file())


@pytest.mark.parametrize("how", [pytest.param("replicate", marks=pytest.mark.slow), "shard"])
def test_a_query_by_two_ranks_has_the_bits_of_one(world: Path, run: Path, how: str) -> None:
    before = checkpoints(run)
    assert command(2, asking(world, run, how, "--parallel", how, "--patience", "30")) == [0, 0]
    assert scores(run / "queries" / how).shape[-1] == 3
    assert torch.equal(scores(run / "queries" / how), scores(run / "queries/alone"))
    slopes = [read_tensors(run / "queries" / name / "gradient.safetensors")[0] for name in (how, "alone")]
    assert tree.digest(dict(sorted(slopes[0].items()))) == tree.digest(dict(sorted(slopes[1].items())))
    assert checkpoints(run) == before
    assert command(2, asking(world, run, how, "--parallel", how)) == [0, 0], "done is done"


def test_what_cannot_share_a_run_s_queries_is_told(
    world: Path, run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert command(3, asking(world, run, "third"))[0] == 2
    assert "2 logical shards and this job has 3 processes" in capfd.readouterr().err
    assert main(asking(world, run, "third", "--patience", "-1")) == 2
    assert "--patience is -1.0" in capfd.readouterr().err
    assert main(asking(world, run, "third", "--replicas", "2")) == 2
    assert "makes copies of the pieces of --parallel shard" in capfd.readouterr().err
    chain = tmp_path / "chain"
    shutil.copytree(run, chain)
    (chain / "manifest.json").write_text(
        json.dumps({**json.loads((chain / "manifest.json").read_text()), "command": "attack"})
    )
    (chain / "run_config.yaml").write_text("{model: m, method: npo, attribute: tokens}")
    assert command(2, asking(world, chain, "third"))[0] == 2
    assert "goes through an attack, which is one process's" in capfd.readouterr().err


@pytest.mark.slow
def test_a_query_whose_rank_is_lost_goes_on_in_pieces_and_whole(world: Path, tmp_path: Path) -> None:
    """Of a run that kept its states."""
    run, more = tmp_path / "run", ["--replay.keep", "--replay.heartbeat", "0", "--replay.plan", "all"]
    assert command(2, arguments(world, run, "blocks", *more, "--parallel", "shard")) == [0, 0]
    before = checkpoints(run)
    assert any("state-" in path for path in before)
    assert main(asking(world, run, "alone")) == 0
    assert command(2, asking(world, run, "auto")) == [0, 0], "in pieces, as it was begun"
    asked = asking(world, run, "lost", "--parallel", "shard")
    killed(2, 1, 2, asked)
    assert (run / "checkpoints/of-2/rank-0").is_dir()
    killed(2, 0, 2, asked)
    assert main(asked) == 0
    for name in ("auto", "lost"):
        assert torch.equal(scores(run / "queries" / name), scores(run / "queries/alone"))
        told = (run / "queries" / name / "metrics.jsonl").read_text().splitlines()
        assert sorted(json.loads(line)["step"] for line in told) == list(range(6)), "each step once"
    assert checkpoints(run) == before
    assert main(["verify", str(run), "--steps", "2", "--strict"]) == 0
