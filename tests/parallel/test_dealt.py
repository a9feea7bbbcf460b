"""Whole pieces of work for each process of a job: every one is somebody's, and attacks are what one process makes of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from ranks import command, forked
from rich.console import Console

from retrograd.cli import main
from retrograd.lab.build import lab
from retrograd.parallel.deal import Deal, dealt
from retrograd.settings.commands import LabConfig


@pytest.mark.parametrize("share", [Deal.mine, Deal.neighbours])
def test_every_piece_is_of_one_process(share: Any) -> None:
    found = forked(3, lambda rank: list(share(Deal(), range(7))))
    assert sorted(piece for mine in found for piece in mine) == list(range(7))
    assert max(map(len, found)) - min(map(len, found)) <= 1


def test_nobody_goes_on_before_all_are_there(tmp_path: Path) -> None:
    def before_and_after(rank: int) -> int:
        with dealt() as deal:
            (tmp_path / str(rank)).touch()
            deal.meet()
            there = len(list(tmp_path.iterdir()))
            deal.meet()
        return there

    assert forked(2, before_and_after) == [2, 2]


def test_alone_there_is_nobody_to_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with dealt() as deal:
        deal.meet()
    assert (deal.rank, list(deal.mine("abc"))) == (0, ["a", "b", "c"])


@pytest.mark.slow  # a lab, and eight attacks twice
def test_attacks_of_two_processes_are_those_of_one(tmp_path: Path) -> None:
    world, suite = tmp_path / "lab", tmp_path / "two.yaml"
    lab(LabConfig(world, facts=16, width=32, layers=1, epochs=2, batch_size=32, workers=1), Console(quiet=True))
    suite.write_text("- {data: half, lr: 1e-3, steps: 3, batch_size: 4}\n- {attack: prune, strengths: [0.5]}\n")

    shutil.copytree(world / "models/random", tmp_path / "nothing")  # one model has one role
    random, nothing = str(world / "models/random"), str(tmp_path / "nothing")

    def arguments(out: Path) -> list[str]:
        return ["attack", str(out), "--model", random, "--shallow", random, "--random", nothing, "--lab", str(world),
                "--suite", str(suite)]  # fmt: skip

    assert command(2, arguments(tmp_path / "two")) == [0, 0]
    assert main(arguments(tmp_path / "one")) == 0
    two, one = (json.loads((tmp_path / name / "recovery.json").read_text()) for name in ("two", "one"))
    assert two["meetings"] == one["meetings"]
    assert len(one["meetings"]) == 8
    assert command(2, arguments(tmp_path / "two")) == [0, 0]  # nothing is left to do
